"""The algebra across frameworks: names, orientations and fused weights meet in the family's table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.combine import CombineOptions, combine
from lorabridge.actions.convert import convert
from lorabridge.actions.diff import DiffOptions, diff
from lorabridge.actions.extract import ExtractOptions, extract
from lorabridge.actions.merge import MergeOptions, merge
from lorabridge.actions.recover import RecoverOptions, recover
from lorabridge.actions.resize import resize
from lorabridge.errors import UsageError

HIDDEN = 16


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a GPT-2, two adapters of it, the first one merged, and all of it converted to MindSpore's names."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=HIDDEN, n_layer=2, n_head=2, vocab_size=30, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder / "base")
    made = {name: adapter(folder / name, seed) for seed, name in enumerate(("one", "two"))}
    merge(folder / "base", [made["one"]], folder / "tuned")
    there = ConvertOptions(family="gpt2", config=folder / "base" / "config.json")
    for name in ("base", "tuned", "one", "two"):
        convert(folder / name, folder / f"{name}.ckpt", there)
    return {name: folder / name for name in ("base", "tuned", "one", "two")} | {
        f"{name}.ckpt": folder / f"{name}.ckpt" for name in ("base", "tuned", "one", "two")
    }


def adapter(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed + 10)
    tensors = {}
    for i in range(2):
        for name, out, inner in (("attn.c_attn", 3 * HIDDEN, HIDDEN), ("mlp.c_proj", HIDDEN, 4 * HIDDEN)):
            stem = f"base_model.model.transformer.h.{i}.{name}"
            tensors |= {
                f"{stem}.lora_A.weight": torch.randn(4, inner),
                f"{stem}.lora_B.weight": torch.randn(out, 4) * 0.1,
            }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"],
              "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("sides", ["hf ms", "ms hf", "ms ms"])
@pytest.mark.parametrize("target", ["adapter/", "adapter.ckpt"])
def test_extracting_from_models_of_either_side(tmp_path: Path, files: dict[str, Path], sides: str, target: str) -> None:
    base, tuned = (files[name + (".ckpt" if side == "ms" else "")]
                   for name, side in zip(("base", "tuned"), sides.split(), strict=True))  # fmt: skip
    rank = 12 if target.endswith("ckpt") else 4  # GPT-2's fused projection is three dense cells in MindSpore
    options = ExtractOptions(rank=rank, family="gpt2", config=files["base"] / "config.json")
    report = extract(base, tuned, f"{tmp_path}/{target}", options)
    assert all(row.energy > 1 - 1e-9 for row in report.modules)
    made = Path(f"{tmp_path}/{target}")
    merge(files["base"], [made], tmp_path / "again", MergeOptions(family="gpt2"))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", files["tuned"]))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)


def test_an_extracted_adapter_converts_without_being_told_again(tmp_path: Path, files: dict[str, Path]) -> None:
    options = ExtractOptions(rank=4, family="gpt2")
    extract(files["base"], files["tuned"], tmp_path / "made.ckpt", options)
    convert(tmp_path / "made.ckpt", tmp_path / "peft")
    names = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert any("transformer.h.0.attn.c_attn" in name for name in names)
    convert(tmp_path / "peft", tmp_path / "back.ckpt")
    assert (tmp_path / "back.ckpt").read_bytes() == (tmp_path / "made.ckpt").read_bytes()
    merge(files["base"], [tmp_path / "back.ckpt"], tmp_path / "m", MergeOptions(family="gpt2"))


def test_combining_adapters_of_both_sides(tmp_path: Path, files: dict[str, Path]) -> None:
    bare(files["two.ckpt"], tmp_path / "bare.ckpt")
    with pytest.raises(UsageError, match="names of two frameworks"):
        combine([files["one"], tmp_path / "bare.ckpt"], tmp_path / "no")
    combine([files["one"], files["two.ckpt"]], tmp_path / "both", CombineOptions(family="gpt2"))
    combine([files["one"], files["two"]], tmp_path / "plain")
    assert diff(tmp_path / "both", tmp_path / "plain", DiffOptions(tolerance=1e-6)).same
    combine([files["one"], files["two.ckpt"]], tmp_path / "told")  # the manifest of two.ckpt names the table
    assert diff(tmp_path / "told", tmp_path / "plain", DiffOptions(tolerance=1e-6)).same


def bare(source: Path, target: Path) -> None:
    """Copy a .ckpt with the facts of its sidecar but without its manifest."""
    target.write_bytes(source.read_bytes())
    facts = {"schema": "lorabridge/facts/1", "alpha": 8}
    target.with_name(target.name + ".lorabridge.json").write_text(json.dumps(facts))


def test_resizing_into_the_other_framework(tmp_path: Path, files: dict[str, Path]) -> None:
    there = ConvertOptions(family="gpt2", config=files["base"] / "config.json")
    resize(files["one"], tmp_path / "small.ckpt", rank=2, options=there)
    resize(files["one"], tmp_path / "small", rank=2)
    merge(files["base"], [tmp_path / "small"], tmp_path / "m1")
    merge(files["base"], [tmp_path / "small.ckpt"], tmp_path / "m2", MergeOptions(family="gpt2"))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("m1", "m2"))
    tuned, base = (load_file(files[name] / "model.safetensors") for name in ("tuned", "base"))
    for name in ours:
        change = (tuned[name] - base[name]).norm()
        for found in (ours[name], theirs[name]):
            assert (found - tuned[name]).norm() <= change + 1e-6


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("what", ["base", "one"])
def test_diff_sees_the_same_in_both_frameworks(files: dict[str, Path], what: str, told: bool) -> None:
    options = DiffOptions(family="gpt2" if told else None, config=files["base"] / "config.json", tolerance=1e-6)
    assert diff(files[what], files[f"{what}.ckpt"], options).same
    assert diff(files[f"{what}.ckpt"], files[what], options).same
    other = {"base": "tuned", "one": "two"}[what]
    assert not diff(files[what], files[f"{other}.ckpt"], options).same


def test_diff_says_when_no_table_leads_from_one_file_to_the_other(tmp_path: Path, files: dict[str, Path]) -> None:
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "x.ckpt", ConvertOptions(family="identity", target_dialect="ms"))
    with pytest.raises(UsageError, match="no table leads from A's names to B's"):
        diff(files["base"], tmp_path / "x.ckpt")


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("models", ["", ".ckpt"])
@pytest.mark.parametrize("adapter", ["one", "one.ckpt"])
def test_recover_across_frameworks(files: dict[str, Path], models: str, adapter: str, told: bool) -> None:
    options = RecoverOptions(family="gpt2" if told else None, config=files["base"] / "config.json")
    found = recover(files[f"base{models}"], files[f"tuned{models}"], files[adapter], options)
    assert found.fits, found.summary()
    assert all(abs(row.scaling - 2.0) < 1e-3 for row in found.modules)


def test_recover_says_when_the_models_are_exchanged(files: dict[str, Path]) -> None:
    found = recover(files["tuned"], files["base"], files["one"])
    assert found.exchanged
    assert "exchanged?" in found.summary()
    assert not any(flag.startswith("--alpha") for flag in found.flags)


def test_recover_takes_models_of_both_sides(files: dict[str, Path]) -> None:
    options = RecoverOptions(config=files["base"] / "config.json")
    assert recover(files["base"], files["tuned.ckpt"], files["one"], options).fits


def test_diff_refuses_an_adapter_beside_a_model(files: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="B is an adapter and A a whole model"):
        diff(files["base"], files["one"])
