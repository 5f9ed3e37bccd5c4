"""Adapters and full models through family tables: MindFormers' names and storage orders, and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dialects.peft_models import CASES, bert, gpt2
from safetensors.torch import load_file

from lorabridge import ConvertOptions, convert
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError, UsageError


def state(folder: Path, file: str) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / file).items()}


@pytest.fixture
def gpt2_model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    gpt2().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize(("family", "build"), [("gpt2", gpt2), ("bert", bert)])
@pytest.mark.parametrize("manifest", [True, False], ids=["with manifest", "without"])
def test_full_model_and_back(family: str, build, manifest: bool, tmp_path: Path, mindspore) -> None:
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path / "hf")

    convert(tmp_path / "hf", tmp_path / "out.ckpt", ConvertOptions(family=family))

    assert len(mindspore.load_checkpoint(str(tmp_path / "out.ckpt"))) > 10
    options = ConvertOptions()
    if not manifest:
        (tmp_path / "out.ckpt.lorabridge.json").unlink()
        options = ConvertOptions(family=family, config=tmp_path / "hf" / "config.json")
    convert(tmp_path / "out.ckpt", tmp_path / "back", options)
    assert state(tmp_path / "hf", "model.safetensors") == state(tmp_path / "back", "model.safetensors")
    one, two = (json.loads((tmp_path / d / "config.json").read_text()) for d in ("hf", "back"))
    assert one == two
    again = type(model).from_pretrained(tmp_path / "back")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_gpt2_values_lie_where_mindformers_reads_them(gpt2_model: Path, tmp_path: Path, mindspore) -> None:
    """The fused Conv1D weight [in, 3 out] becomes three [out, in]; MindFormers keeps projection as [in, out]."""
    convert(gpt2_model, tmp_path / "out.ckpt", ConvertOptions(family="gpt2"))
    loaded = mindspore.load_checkpoint(str(tmp_path / "out.ckpt"))
    hf = load_file(gpt2_model / "model.safetensors")
    fused = hf["transformer.h.1.attn.c_attn.weight"].numpy()
    for i, dense in enumerate(("dense1", "dense2", "dense3")):
        value = loaded[f"backbone.blocks.1.attention.{dense}.weight"].asnumpy()
        np.testing.assert_array_equal(value, fused[:, 16 * i : 16 * (i + 1)].T)
    kept = loaded["backbone.blocks.1.attention.projection.weight"].asnumpy()
    np.testing.assert_array_equal(kept, hf["transformer.h.1.attn.c_proj.weight"].numpy())


def test_a_model_needs_a_family(gpt2_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="family") as raised:
        convert(gpt2_model, tmp_path / "out.ckpt")
    assert "gpt2" in raised.value.where[0]
    assert not (tmp_path / "out.ckpt").exists()


@pytest.mark.parametrize("dialect", ["mindpet", "loralib-ms"])
@pytest.mark.parametrize("case", ["gpt2", "bert"])
def test_adapter_and_back(case: str, dialect: str, tmp_path: Path) -> None:
    CASES[case].adapted().save_pretrained(tmp_path / "peft")
    options = ConvertOptions(target_dialect=dialect, family=case)
    report = convert(tmp_path / "peft", tmp_path / "out.ckpt", options)
    assert all(
        "dense" in module.path or "output" in module.path or "projection" in module.path for module in report.modules
    )
    convert(tmp_path / "out.ckpt", tmp_path / "back")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "peft" / file).read_bytes() == (tmp_path / "back" / file).read_bytes()


def test_split_factors_that_were_trained_apart(tmp_path: Path, mindspore) -> None:
    """Three Dense that share A on the way out may come back with three: the rank grows, the deltas stay."""
    CASES["gpt2"].adapted().save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "out.ckpt", ConvertOptions(target_dialect="mindpet", family="gpt2"))
    loaded = mindspore.load_checkpoint(str(tmp_path / "out.ckpt"))
    rng = np.random.default_rng(0)
    for name, value in loaded.items():
        if name.endswith("lora_a"):
            value.set_data(mindspore.Tensor(rng.standard_normal(value.shape, dtype=np.float32)))
    (tmp_path / "out.ckpt").unlink()
    mindspore.save_checkpoint(loaded, str(tmp_path / "out.ckpt"))
    report = convert(tmp_path / "out.ckpt", tmp_path / "back")
    assert any("not restored from the manifest" in warning for warning in report.warnings)
    tensors = load_file(tmp_path / "back" / "adapter_model.safetensors")
    a = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"].double().numpy()
    b = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].double().numpy()
    assert a.shape == (12, 16)
    delta = np.concatenate([
        loaded[f"backbone.blocks.0.attention.{d}.mindpet_delta_lora_b"].asnumpy().astype(np.float64)
        @ loaded[f"backbone.blocks.0.attention.{d}.mindpet_delta_lora_a"].asnumpy().astype(np.float64)
        for d in ("dense1", "dense2", "dense3")
    ])  # fmt: skip
    np.testing.assert_array_equal(b @ a, delta)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["rank_pattern"]


def test_mindpet_checkpoint_without_a_manifest(tmp_path: Path, mindspore) -> None:
    """A checkpoint as MindPet's own callback writes it: optimizer state in it is left out and listed."""
    rng = np.random.default_rng(0)
    records = []
    for name in ("dense1", "dense3"):
        path = f"backbone.blocks.0.attention.{name}"
        for leaf, shape in (("a", (4, 16)), ("b", (16, 4))):
            tensor = mindspore.Tensor(rng.standard_normal(shape, dtype=np.float32))
            records.append({"name": f"{path}.mindpet_delta_lora_{leaf}", "data": tensor})
            records.append({"name": f"moment1.{path}.mindpet_delta_lora_{leaf}", "data": tensor})
    records.append({"name": "global_step", "data": mindspore.Tensor([3], mindspore.int32)})
    mindspore.save_checkpoint(records, str(tmp_path / "delta.ckpt"))

    with pytest.raises(MappingError, match="alpha"):
        convert(tmp_path / "delta.ckpt", tmp_path / "peft", ConvertOptions(family="gpt2"))
    facts = Facts((Fact("*", "alpha", 8),))
    report = convert(tmp_path / "delta.ckpt", tmp_path / "peft", ConvertOptions(family="gpt2", facts=facts))

    assert len(report.left_out) == 5
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": (8, 16),
        "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight": (48, 8),
    }


def test_what_mindpet_cannot_say(tmp_path: Path) -> None:
    CASES["dora"].adapted().save_pretrained(tmp_path / "peft")
    with pytest.raises(MappingError, match=r"(?i)dora|magnitude") as raised:
        convert(tmp_path / "peft", tmp_path / "out.ckpt", ConvertOptions(target_dialect="mindpet"))
    assert "merge" in raised.value.hint
    assert not list(tmp_path.glob("out*"))


def test_folded_scalings_come_back_exactly(tmp_path: Path) -> None:
    """Scalings that one global alpha cannot give are folded into B; the residues restore every bit."""
    CASES["patterns"].adapted().save_pretrained(tmp_path / "peft")
    report = convert(tmp_path / "peft", tmp_path / "out.ckpt", ConvertOptions(target_dialect="mindpet"))
    assert report.rounding
    convert(tmp_path / "out.ckpt", tmp_path / "back")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "peft" / file).read_bytes() == (tmp_path / "back" / file).read_bytes()
