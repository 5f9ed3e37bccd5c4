"""Combining adapters, with peft's add_weighted_adapter as the judge where it defines the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft_adapters import Net, apart, deltas, loaded, saved, wrapped

from lorabridge.actions.combine import CombineOptions, combine
from lorabridge.actions.combine_methods import METHODS
from lorabridge.arithmetic.blend import kept_at_random
from lorabridge.errors import InputError, LorabridgeError, MappingError, OutputError, UsageError

WEIGHTS = (0.7, -0.4)
EVERYWHERE = (("*", WEIGHTS),)
ALL = {"target_modules": ["q", "k", "emb", "conv"]}


def judged(model, method: str, **more: object) -> dict[str, np.ndarray]:
    model.add_weighted_adapter(list(model.peft_config), list(WEIGHTS), "judge", combination_type=method, **more)
    return deltas(model, "judge")


def summed(model, weights=WEIGHTS) -> dict[str, np.ndarray]:
    parts = [deltas(model, f"a{i}") for i in range(len(weights))]
    paths = {path for part in parts for path in part}
    return {p: sum(w * part[p] for w, part in zip(weights, parts, strict=True) if p in part) for p in paths}


def test_cat_is_the_sum_and_peft_agrees(tmp_path: Path) -> None:
    model = wrapped([{"r": 4, "lora_alpha": 6, **ALL}, {"r": 3, "lora_alpha": 8, "use_rslora": True, **ALL}])
    report = combine(saved(model, tmp_path), tmp_path / "out", CombineOptions(weights=EVERYWHERE))
    ours, sums, judge = loaded(tmp_path / "out"), summed(model), judged(model, "cat")
    assert set(ours) == set(sums) == {"q", "k", "emb", "conv"}
    for path in ours:
        assert apart(ours[path], sums[path]) < 1e-7
        assert apart(judge[path], sums[path]) < 1e-6
    assert {row.rank for row in report.modules} == {7}
    assert {row.apart for row in report.modules} == {None}


def test_cat_without_rounding_keeps_the_bits(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    model = wrapped([{"r": 4, "lora_alpha": 8}, {"r": 2, "lora_alpha": 2}])
    sources = saved(model, tmp_path)
    report = combine(sources, tmp_path / "out", CombineOptions(weights=(("*", (1.0, -0.5)),)))
    assert {row.apart for row in report.modules} == {0.0}
    parts = [load_file(path / "adapter_model.safetensors") for path in sources]
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = "base_model.model.q.lora_A.weight"
    assert made[name].tobytes() == np.concatenate([part[name] for part in parts]).tobytes()
    name = "base_model.model.q.lora_B.weight"
    assert made[name].tobytes() == np.concatenate([parts[0][name] * 2, parts[1][name] * -0.5], 1).tobytes()
    ours, sums = loaded(tmp_path / "out"), summed(model, (1.0, -0.5))
    assert all(apart(ours[path], sums[path]) < 1e-15 for path in sums)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("linear", {}),
        ("ties", {"density": 0.4}),
        ("magnitude_prune", {"density": 0.4}),
        ("svd", {"svd_rank": 3}),
        ("ties_svd", {"density": 0.4, "svd_rank": 3}),
        ("magnitude_prune_svd", {"density": 0.4, "svd_rank": 3}),
    ],
)
def test_methods_give_what_peft_gives(method: str, more: dict[str, float], tmp_path: Path) -> None:
    model = wrapped([{"r": 4, "lora_alpha": 6, **ALL}, {"r": 4, "lora_alpha": 3, **ALL}])
    options = CombineOptions(method, EVERYWHERE, density=more.get("density"), rank=more.get("svd_rank"))
    report = combine(saved(model, tmp_path), tmp_path / "out", options)
    judge, ours, sums = judged(model, method, **more), loaded(tmp_path / "out"), summed(model)
    for row in report.modules:
        assert apart(ours[row.path], judge[row.path]) < 1e-5, row.path
        assert row.apart == pytest.approx(apart(ours[row.path], sums[row.path]), rel=1e-4, abs=1e-7)
    assert bool(report.notes) is (method != "svd")


@pytest.mark.parametrize("election", ["total", "frequency"])
def test_elections_are_peft_s(election: str, tmp_path: Path) -> None:
    model = wrapped([{"r": 4}, {"r": 4}, {"r": 4}])
    options = CombineOptions("ties", (("*", (0.5, 1.0, 2.0)),), density=0.6, election=election)
    combine(saved(model, tmp_path), tmp_path / "out", options)
    model.add_weighted_adapter(
        ["a0", "a1", "a2"], [0.5, 1.0, 2.0], "judge", combination_type="ties", density=0.6,
        majority_sign_method=election,
    )  # fmt: skip
    judge, ours = deltas(model, "judge"), loaded(tmp_path / "out")
    assert all(apart(ours[path], judge[path]) < 1e-5 for path in judge)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_is_peft_s_with_our_seeded_masks(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The masks come from our generator, in peft's order: A of each adapter, then B; or each delta."""
    model = wrapped([{"r": 4, "lora_alpha": 6}, {"r": 4, "lora_alpha": 3}])
    rank = 4 if method.endswith("_svd") else None
    options = CombineOptions(method, EVERYWHERE, density=0.5, seed=11, rank=rank)
    sources = saved(model, tmp_path)
    combine(sources, tmp_path / "out", options)
    parts = ["delta"] if rank else ["0/A", "0/B"]
    keys = [f"{path}/{part}/{i}" for path in ("q", "k") for part in parts for i in range(2)]

    def bernoulli(probability: torch.Tensor) -> torch.Tensor:
        mask = kept_at_random(tuple(probability.shape), 0.5, 11, keys.pop(0))
        return torch.from_numpy(mask).to(probability.dtype)

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    judge = judged(model, method, density=0.5, **({"svd_rank": rank} if rank else {}))
    monkeypatch.undo()
    ours = loaded(tmp_path / "out")
    assert not keys
    assert all(apart(ours[path], judge[path]) < 1e-5 for path in judge)
    combine(sources, tmp_path / "again", options)
    file = "adapter_model.safetensors"
    assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_weights_may_differ_by_module_and_modules_by_adapter(tmp_path: Path) -> None:
    model = wrapped([{"r": 2, "target_modules": ["q", "k"]}, {"r": 2, "target_modules": ["k", "head"]}])
    options = CombineOptions(weights=(("k", (0.5, 0.25)), ("*", (2.0, 1.0))))
    report = combine(saved(model, tmp_path), tmp_path / "out", options)
    ours, (one, two) = loaded(tmp_path / "out"), (deltas(model, name) for name in ("a0", "a1"))
    assert [row.inputs for row in report.modules] == [(1,), (0, 1), (0,)]
    assert apart(ours["k"], 0.5 * one["k"] + 0.25 * two["k"]) < 1e-7
    assert apart(ours["q"], 2 * one["q"]) < 1e-7
    assert apart(ours["head"], two["head"]) < 1e-7


def test_svd_with_an_energy_takes_the_rank_it_needs(tmp_path: Path) -> None:
    model = wrapped([{"r": 4}, {"r": 4}])
    report = combine(saved(model, tmp_path), tmp_path / "out", CombineOptions("svd", energy=0.9))
    assert all(1 <= row.rank < 8 and row.apart is not None and row.apart**2 <= 0.1 + 1e-6 for row in report.modules)
    full = combine(saved(model, tmp_path), tmp_path / "full", CombineOptions("svd", energy=1.0))
    assert all(row.rank == 8 for row in full.modules)


def test_every_method_runs_and_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    sources = saved(wrapped([{"r": 2}, {"r": 2}]), tmp_path)
    for name, method in METHODS.items():
        options = CombineOptions(name, density=0.5 if method.prunes else None, dry_run=True)
        assert combine(sources, tmp_path / "out", options).as_json()["schema"] == "lorabridge/combine/1"
    assert not (tmp_path / "out").exists()


def test_other_dialects_and_containers_hold_the_same(tmp_path: Path) -> None:
    from lorabridge import convert

    model = wrapped([{"r": 4, "lora_alpha": 6}, {"r": 2, "lora_alpha": 3}])
    sources = saved(model, tmp_path)
    combine(sources, tmp_path / "out.ckpt", CombineOptions(weights=EVERYWHERE))
    convert(tmp_path / "out.ckpt", tmp_path / "back", None)
    back, sums = loaded(tmp_path / "back"), summed(model)
    assert all(apart(back[path], sums[path]) < 1e-7 for path in sums)


def test_what_has_no_sum_is_refused(tmp_path: Path) -> None:
    dora = saved(wrapped([{"r": 2}, {"r": 2, "use_dora": True}]), tmp_path / "dora")
    with pytest.raises(MappingError, match="more than a delta"):
        combine(dora, tmp_path / "out")
    heads = saved(wrapped([{"r": 2, "modules_to_save": ["head"]}, {"r": 2}]), tmp_path / "one")
    combine(heads, tmp_path / "carried")
    other = saved(wrapped([{"r": 2, "modules_to_save": ["head"]}], seed=5), tmp_path / "two")
    with pytest.raises(MappingError, match="no weighted sum"):
        combine([heads[0], other[0]], tmp_path / "out")
    combine([heads[0], other[0]], tmp_path / "without", CombineOptions(exclude=("head*",)))
    uneven = saved(wrapped([{"r": 2}, {"r": 3}]), tmp_path / "ranks")
    with pytest.raises(MappingError, match="factors of one rank"):
        combine(uneven, tmp_path / "out", CombineOptions("linear"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (CombineOptions("sum"), UsageError),
        (CombineOptions("ties"), UsageError),
        (CombineOptions("linear", density=0.5), UsageError),
        (CombineOptions("cat", rank=3), UsageError),
        (CombineOptions(weights=(("*", (1.0,)),)), UsageError),
        (CombineOptions(weights=(("nothing", (1.0, 1.0)),)), MappingError),
        (CombineOptions(exclude=("nothing",)), MappingError),
        (CombineOptions(weights=(("*", (float("inf"), 1.0)),)), MappingError),
    ],
)
def test_impossible_wishes_are_told(options: CombineOptions, error: type[LorabridgeError], tmp_path: Path) -> None:
    sources = saved(wrapped([{"r": 2}, {"r": 2}]), tmp_path)
    with pytest.raises(error):
        combine(sources, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_inputs_and_places_are_checked(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    sources = saved(wrapped([{"r": 2}, {"r": 2}]), tmp_path)
    save_file(Net().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="no LoRA factors"):
        combine([sources[0], tmp_path / "model.safetensors"], tmp_path / "out")
    with pytest.raises(OutputError):
        combine(sources, sources[0])
    with pytest.raises(UsageError, match="directory"):
        combine(sources, tmp_path / "out.safetensors")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="exists"):
        combine(sources, tmp_path / "taken")
    combine(sources, tmp_path / "taken", CombineOptions(overwrite=True))
