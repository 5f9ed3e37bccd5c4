"""Adapters really made by peft: to MindSpore and back, the same bits and the same forward output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dialects.peft_models import CASES
from safetensors.torch import load_file

from lorabridge import ConvertOptions, convert
from lorabridge.dialects.adapter import Fact, Facts

SECOND_COPIES = {
    "bias all and saved": {
        f"base_model.model.head.{level}bias" for level in ("", "modules_to_save.", "original_module.")
    }
}
"""peft writes a saved module's bias twice under bias="all" and reads it once."""


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor[None].numpy().tobytes()


def same_files(one: Path, two: Path, left_out: set[str]) -> None:
    a, b = load_file(one / "adapter_model.safetensors"), load_file(two / "adapter_model.safetensors")
    assert set(a) - left_out == set(b)
    for name in b:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape
        assert bits(a[name]) == bits(b[name]), name
    configs = [json.loads((d / "adapter_config.json").read_text()) for d in (one, two)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_back_bit_for_bit(name: str, suffix: str, tmp_path: Path, mindspore) -> None:
    from peft import PeftModel

    case = CASES[name]
    adapted = case.adapted()
    adapted.save_pretrained(tmp_path / "peft")
    expected = case.output(adapted)
    target = tmp_path / f"out{suffix}"

    report = convert(tmp_path / "peft", target, ConvertOptions(target_dialect="loralib-ms"))

    left_out = {tensor for tensor, _ in report.left_out}
    assert left_out <= SECOND_COPIES.get(name, set())
    assert report.tensors_read + len(left_out) == len(load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    loaded = mindspore.load_checkpoint(str(target), format=suffix[1:])
    assert len(loaded) == report.tensors
    back = convert(target, tmp_path / "back")
    assert back.target_dialect == "peft"
    assert "restored bit for bit" in back.notes[0]
    assert bool(left_out) == any("not restored" in warning for warning in back.warnings)
    same_files(tmp_path / "peft", tmp_path / "back", left_out)
    again = PeftModel.from_pretrained(case.base(), tmp_path / "back").eval()
    assert torch.equal(case.output(again), expected)


@pytest.mark.parametrize("name", ["linear", "patterns", "gpt2"])
def test_mindspore_sees_the_values(name: str, tmp_path: Path, mindspore) -> None:
    CASES[name].adapted().save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "out.ckpt")
    source = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    loaded = mindspore.load_checkpoint(str(tmp_path / "out.ckpt"))
    for key, tensor in source.items():
        path = key.removeprefix("base_model.model.").removesuffix(".weight")
        np.testing.assert_array_equal(loaded[path].asnumpy(), tensor.numpy())


def test_back_without_the_manifest_needs_alpha(tmp_path: Path) -> None:
    """Without what travelled with the file, flags say what it does not."""
    from peft import PeftModel

    from lorabridge.errors import LorabridgeError

    case = CASES["linear"]
    adapted = case.adapted()
    adapted.save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "out.ckpt")
    (tmp_path / "out.ckpt.lorabridge.json").unlink()
    with pytest.raises(LorabridgeError, match="alpha") as raised:
        convert(tmp_path / "out.ckpt", tmp_path / "back")
    assert raised.value.exit_code == 4
    assert "--alpha" in raised.value.hint
    assert not (tmp_path / "back").exists()

    facts = Facts((Fact("*", "alpha", 8), Fact("*", "kind", "linear")))
    convert(tmp_path / "out.ckpt", tmp_path / "back", ConvertOptions(facts=facts))
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("peft", "back"))
    assert {k: bits(v) for k, v in a.items()} == {k: bits(v) for k, v in b.items()}
    again = PeftModel.from_pretrained(case.base(), tmp_path / "back").eval()
    assert torch.equal(case.output(again), case.output(adapted))


def test_trained_on_and_back(tmp_path: Path, mindspore) -> None:
    """Values that changed on the MindSpore side come back changed, with the config that travelled."""
    case = CASES["patterns"]
    case.adapted().save_pretrained(tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "out.ckpt")
    loaded = mindspore.load_checkpoint(str(tmp_path / "out.ckpt"))
    for value in loaded.values():
        value.set_data(mindspore.Tensor(value.asnumpy() * 2 + 1))
    (tmp_path / "out.ckpt").unlink()
    mindspore.save_checkpoint(loaded, str(tmp_path / "out.ckpt"))
    convert(tmp_path / "out.ckpt", tmp_path / "back")
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("peft", "back"))
    assert sorted(a) == sorted(b)
    for key in a:
        np.testing.assert_array_equal(a[key].numpy() * 2 + 1, b[key].numpy())
    one, two = ((tmp_path / d / "adapter_config.json").read_text() for d in ("peft", "back"))
    assert one == two
