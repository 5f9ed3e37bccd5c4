"""Resizing adapters: dense SVDs of peft's own deltas are the judge of ranks, energies and values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from peft_adapters import apart, deltas, loaded, saved, wrapped

from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.resize import resize
from lorabridge.errors import InputError, LorabridgeError, MappingError, UsageError

ALL = {"target_modules": ["q", "k", "emb", "conv"]}


def spectrum(delta: np.ndarray) -> np.ndarray:
    return np.linalg.svd(delta.reshape(delta.shape[0], -1), compute_uv=False)


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"lora_alpha": 5, "alpha_pattern": {"q": 3}}])
def test_a_rank_gives_the_best_factors_of_that_rank(more: dict[str, object], tmp_path: Path) -> None:
    model = wrapped([{"r": 6, "lora_alpha": 9, **ALL, **more}])
    (source,) = saved(model, tmp_path)
    report = resize(source, tmp_path / "out", rank=2)
    before, after = deltas(model, "a0"), loaded(tmp_path / "out")
    for row in report.modules:
        values = spectrum(before[row.path])
        best = np.linalg.norm(values[2:])
        assert np.linalg.norm(after[row.path] - before[row.path]) == pytest.approx(best, rel=1e-5)
        assert row.energy == pytest.approx(1 - best**2 / np.sum(values**2), rel=1e-5)
        assert (row.before, row.after) == (6, 2)
    assert set(after) == set(before)


def test_an_energy_takes_the_smallest_rank_per_module(tmp_path: Path) -> None:
    model = wrapped([{"r": 6, **ALL}])
    (source,) = saved(model, tmp_path)
    report = resize(source, tmp_path / "out", energy=0.8)
    for row in report.modules:
        values = spectrum(deltas(model, "a0")[row.path])[:6]
        share = np.cumsum(values**2) / np.sum(values**2)
        assert row.after == int(np.argmax(share >= 0.8)) + 1
        assert row.energy >= 0.8 - 1e-6
    whole = resize(source, tmp_path / "whole", energy=1.0)
    assert {row.path: row.after for row in whole.modules} == {"q": 6, "k": 6, "emb": 6, "conv": 5}  # 5 channels


@pytest.mark.parametrize("name", ["out.ckpt", "out.safetensors", "out.bin"])
def test_any_dialect_and_container(name: str, tmp_path: Path) -> None:
    from lorabridge import convert

    model = wrapped([{"r": 6, "lora_alpha": 9, **ALL}])
    (source,) = saved(model, tmp_path)
    to = "loralib-ms" if name.endswith("ckpt") else "peft"
    convert(source, tmp_path / f"full-{name}", ConvertOptions(target_dialect=to))
    report = resize(tmp_path / f"full-{name}", tmp_path / name, rank=2)
    assert report.conversion.target_dialect == to
    again = resize(tmp_path / name, tmp_path / "peft", rank=2, options=ConvertOptions(target_dialect="peft"))
    assert any("nothing was compressed" in warning for warning in again.warnings)
    before, after = deltas(model, "a0"), loaded(tmp_path / "peft")
    for path, delta in before.items():
        u, s, vt = np.linalg.svd(delta.reshape(delta.shape[0], -1), full_matrices=False)
        assert apart(after[path].reshape(delta.shape[0], -1), u[:, :2] * s[:2] @ vt[:2]) < 1e-5


def test_extras_and_dora_travel(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    (source,) = saved(wrapped([{"r": 4, "use_dora": True, "modules_to_save": ["head"], "bias": "lora_only"}]), tmp_path)
    report = resize(source, tmp_path / "out", rank=2)
    assert any("DoRA" in warning for warning in report.warnings)
    old, new = (load_file(p / "adapter_model.safetensors") for p in (source, tmp_path / "out"))
    assert set(old) == set(new)
    assert all(old[n].tobytes() == new[n].tobytes() for n in old if ".lora_A" not in n and ".lora_B" not in n)


def test_a_dry_run_measures_and_writes_nothing(tmp_path: Path) -> None:
    (source,) = saved(wrapped([{"r": 4}]), tmp_path)
    report = resize(source, tmp_path / "out", rank=2, options=ConvertOptions(dry_run=True))
    assert not (tmp_path / "out").exists()
    assert 0 < report.modules[0].energy < 1
    assert report.as_json()["schema"] == "lorabridge/resize/1"
    assert "would resize 2 modules of 2 (rank 4 -> 2" in report.summary()


@pytest.mark.parametrize(
    "wish", [{}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.1}, {"rank": 1, "energy": 0.5}]
)  # fmt: skip
def test_impossible_wishes_are_told(wish: dict[str, float], tmp_path: Path) -> None:
    (source,) = saved(wrapped([{"r": 4}]), tmp_path)
    with pytest.raises(UsageError):
        resize(source, tmp_path / "out", **wish)
    assert not (tmp_path / "out").exists()


def test_what_has_no_other_rank_is_refused(tmp_path: Path) -> None:
    import json

    from peft_adapters import Net
    from safetensors.torch import save_file

    (source,) = saved(wrapped([{"r": 4}]), tmp_path)
    config = source / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": "pissa"}))
    with pytest.raises(MappingError, match="pissa"):
        resize(source, tmp_path / "out", rank=2)
    save_file(Net().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(LorabridgeError) as raised:
        resize(tmp_path / "model.safetensors", tmp_path / "out", rank=2)
    assert isinstance(raised.value, InputError)
    assert not (tmp_path / "out").exists()
