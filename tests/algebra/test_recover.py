"""Recovering what files do not say, from merges that loralib and peft made."""

from __future__ import annotations

import math
from pathlib import Path

import loralib
import pytest
import torch
from peft_adapters import saved, wrapped
from safetensors.torch import load_file, save_file
from torch import nn

from lorabridge import convert, open_checkpoint
from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.recover import RecoverOptions, recover
from lorabridge.actions.recover_fit import nearest
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import InputError, MappingError

ALL = {"target_modules": ["q", "k", "emb", "conv"]}


class Fused(nn.Module):
    """loralib's layers: a fused projection of three parts, a square one that is stored transposed, an embedding."""

    def __init__(self, alpha: float, mask: list[bool]) -> None:
        super().__init__()
        self.qkv = loralib.MergedLinear(8, 24, r=2, lora_alpha=alpha, enable_lora=mask)
        self.turned = loralib.Linear(8, 8, r=2, lora_alpha=alpha, fan_in_fan_out=True)
        self.wide = loralib.Linear(8, 20, r=4, lora_alpha=alpha)
        self.words = loralib.Embedding(30, 8, r=2, lora_alpha=alpha)
        self.pixels = loralib.Conv2d(3, 4, 3, r=2, lora_alpha=alpha)


def fused(folder: Path, alpha: float = 6, mask: tuple[bool, ...] = (True, False, True)) -> tuple[Path, Path, Path]:
    """Write a base, what loralib merges, and a bare file of the factors alone."""
    torch.manual_seed(0)
    net = Fused(alpha, list(mask)).train()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.3)
    plain = {name: t.clone() for name, t in net.state_dict().items() if "lora_" not in name}
    plain = {name.replace(".conv.", "."): t.contiguous() for name, t in plain.items()}
    save_file(plain, folder / "base.safetensors")
    torch.save(loralib.lora_state_dict(net), folder / "lora.pt")
    torch.save(net.state_dict(), folder / "training.pt")
    net.eval()
    merged = {n.replace(".conv.", "."): t.contiguous() for n, t in net.state_dict().items() if "lora_" not in n}
    save_file(merged, folder / "merged.safetensors")
    torch.save(net.state_dict(), folder / "evaluated.pt")
    return folder / "base.safetensors", folder / "merged.safetensors", folder / "lora.pt"


@pytest.mark.parametrize("mask", [(True, False, True), (False, True, True), (False, False, True), (True, True, True)])
def test_loralib_files_tell_nothing_and_merges_tell_all(mask: tuple[bool, ...], tmp_path: Path) -> None:
    base, merged, lora = fused(tmp_path, 6, mask)
    found = recover(base, merged, lora)
    assert found.fits
    rows = {row.path: row for row in found.modules}
    assert {row.alpha(rslora=False) for row in rows.values()} == {(6.0, True)}
    assert all(row.residual is not None and row.residual < 1e-6 for row in rows.values())
    if not all(mask):
        assert rows["qkv"].enable_lora == mask
    assert rows["turned"].fan_in_fan_out is True
    assert (rows["turned"].other or 0) > 0.5
    assert rows["qkv"].fan_in_fan_out is False
    assert "--alpha 6" in found.flags


def test_the_flags_make_the_conversion_right(tmp_path: Path) -> None:
    base, merged, lora = fused(tmp_path)
    found = recover(base, merged, lora)
    said = [flag.split(" ", 1) for flag in found.flags]
    facts = []
    for name, value in said:
        pattern, _, text = value.strip("'").rpartition("=")
        field = name[2:].replace("-", "_")
        read = {"alpha": float, "enable_lora": lambda t: [p == "T" for p in t.split(",")]}.get(
            field, lambda t: t == "yes"
        )
        facts.append(Fact(pattern or "*", field, read(text)))
    facts += [Fact("pixels", "kernel_size", [3]), Fact("pixels", "kind", "conv2d"), Fact("words", "kind", "embedding")]
    ordered = tuple(sorted(facts, key=lambda fact: fact.pattern == "*"))
    convert(lora, tmp_path / "peft", ConvertOptions(target_dialect="peft", facts=Facts(ordered)))
    with open_checkpoint(tmp_path / "peft" / "adapter_model.safetensors") as made:
        a, b = (made[f"base_model.model.qkv.lora_{side}.weight"] for side in "AB")
    change = load_file(merged)["qkv.weight"] - load_file(base)["qkv.weight"]
    import json

    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    rank, alpha = (
        config["rank_pattern"].get("qkv", config["r"]),
        config["alpha_pattern"].get("qkv", config["lora_alpha"]),
    )
    assert torch.allclose(torch.from_numpy(alpha / rank * (b @ a)), change, atol=1e-6)


@pytest.mark.parametrize(("name", "state"), [("training.pt", 0), ("evaluated.pt", 1)])
def test_a_full_checkpoint_s_merged_state_is_told(name: str, state: int, tmp_path: Path) -> None:
    base, merged, _ = fused(tmp_path, mask=(True, True, True))
    found = recover(base, merged, tmp_path / name)
    assert found.fits
    assert {row.merged for row in found.modules if row.path != "pixels"} == {state}
    assert f"--merged {'yes' if state else 'no'}" in found.flags


def peft_merge(folder: Path, config: dict[str, object], times: int = 1, dtype=torch.float32) -> tuple[Path, Path, Path]:
    model = wrapped([config])
    (adapter,) = saved(model, folder)
    model = model.to(dtype)
    torch.manual_seed(4)
    base = {k.replace("base_model.model.", "").replace(".base_layer", ""): v.clone()
            for k, v in model.state_dict().items() if "lora_" not in k}  # fmt: skip
    save_file(base, folder / "base.safetensors")
    state = model.merge_and_unload().state_dict()
    merged = {
        k: (base[k] + times * (v - base[k]) if times != 1 else v).to(dtype).contiguous() for k, v in state.items()
    }
    save_file(merged, folder / "merged.safetensors")
    return folder / "base.safetensors", folder / "merged.safetensors", adapter


@pytest.mark.parametrize("times", [0, 1, 2])
def test_peft_adapters_are_found_merged_so_often(times: int, tmp_path: Path) -> None:
    found = recover(*peft_merge(tmp_path, {"r": 4, "lora_alpha": 6, **ALL}, times))
    assert [row.times for row in found.modules] == [times] * 4
    assert found.fits
    assert not any(flag.startswith("--alpha") for flag in found.flags)


def test_half_precision_rounding_is_allowed_for(tmp_path: Path) -> None:
    base, merged, adapter = peft_merge(tmp_path, {"r": 4, "lora_alpha": 6, **ALL}, dtype=torch.bfloat16)
    (adapter / "adapter_config.json").unlink()
    (adapter / "adapter_model.safetensors").rename(tmp_path / "bare.safetensors")
    found = recover(base, merged, tmp_path / "bare.safetensors")
    assert found.fits
    for row in found.modules:
        assert row.scaling == pytest.approx(1.5, abs=4 * (row.error or 0) + 0.02)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_tell_the_two_readings_apart(rslora: bool, tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 6, "rank_pattern": {"q": 2, "emb": 3}, "use_rslora": rslora, **ALL}
    base, merged, adapter = peft_merge(tmp_path, config)
    (adapter / "adapter_model.safetensors").rename(tmp_path / "bare.safetensors")
    found = recover(base, merged, tmp_path / "bare.safetensors")
    assert found.fits
    assert "--alpha 6" in found.flags
    assert ("--use-rslora yes" in found.flags) is rslora
    document = found.as_json()
    assert document["schema"] == "lorabridge/recover/1"
    assert document["fits"] is True


def test_a_wrong_statement_is_told(tmp_path: Path) -> None:
    base, merged, adapter = peft_merge(tmp_path, {"r": 9, "lora_alpha": 18, "use_rslora": True})
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_rslora": true', '"use_rslora": false'))
    found = recover(base, merged, adapter)
    assert found.fits
    assert {row.times for row in found.modules} == {None}
    assert all(row.note == "3 times the stated scaling, as if rsLoRA were read wrong" for row in found.modules)
    assert "--alpha 54" in found.flags


def test_nothing_fits_a_foreign_merge(tmp_path: Path) -> None:
    base, merged, _ = peft_merge(tmp_path, {"r": 4, **ALL})
    (tmp_path / "other").mkdir()
    other = saved(wrapped([{"r": 4, **ALL}], seed=77), tmp_path / "other")[0]
    found = recover(base, merged, other)
    assert not found.fits
    assert found.flags == ()
    assert all("not explained" in row.note for row in found.modules)
    same = recover(base, base, tmp_path / "a0")
    assert same.fits
    assert {row.times for row in same.modules} == {0}
    (other / "adapter_model.safetensors").rename(tmp_path / "bare.safetensors")
    assert not recover(base, base, tmp_path / "bare.safetensors").fits


def test_inputs_are_checked(tmp_path: Path) -> None:
    base, merged, adapter = peft_merge(tmp_path, {"r": 2})
    with pytest.raises(InputError, match="no LoRA factors"):
        recover(base, merged, base)
    save_file({"x.weight": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(MappingError, match="no module"):
        recover(tmp_path / "x.safetensors", tmp_path / "x.safetensors", adapter)
    dora = peft_merge(tmp_path / "d" if (tmp_path / "d").mkdir() is None else tmp_path, {"r": 2, "use_dora": True})
    found = recover(*dora)
    assert not found.fits
    assert all("DoRA" in row.note for row in found.modules)


def test_models_may_be_in_the_other_framework(tmp_path: Path) -> None:
    base, merged, adapter = peft_merge(tmp_path, {"r": 2, "lora_alpha": 5, "target_modules": ["q", "k"]})
    for path in (base, merged):
        options = ConvertOptions(target_dialect="ms", family="identity")
        convert(path, path.with_suffix(".ckpt"), options)
    found = recover(base.with_suffix(".ckpt"), merged.with_suffix(".ckpt"), adapter, RecoverOptions(family="identity"))
    assert [row.times for row in found.modules] == [1, 1]


def test_simple_numbers_are_preferred_within_the_error() -> None:
    assert nearest(16.00001, 1e-5) == (16.0, True)
    assert nearest(0.30000001, 1e-8) == (0.3, True)
    assert nearest(math.pi, 1e-9) == (3.14159, False)
    assert nearest(2.52, 0.01) == (2.5, True)
