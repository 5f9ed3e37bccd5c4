"""Switching: through the exact base it gives what merging the new adapter into the base gives, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import DTYPES, adapter, bits, gpt2, plain_adapter, plain_model

from lorabridge.actions.merge import merge
from lorabridge.actions.merge_inputs import MERGED_KEY, MergeOptions
from lorabridge.actions.switch import switch
from lorabridge.actions.undo import UndoWriter
from lorabridge.actions.unmerge import unmerge
from lorabridge.errors import InputError, MappingError, OutputError
from lorabridge.merging.undo import UndoFile

KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "wider": {"r": 6, "target_modules": ["c_attn", "c_fc"]},
    "dora": {"use_dora": True},
    "replaced": {"modules_to_save": ["ln_f", "wpe"], "target_modules": ["c_proj"]},
    "tokens": {"trainable_token_indices": {"wte": [3, 7, 8]}},
    "embedding": {"target_modules": ["wte", "c_attn"]},
    "biases": {"bias": "lora_only"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gpt2(tmp_path_factory.mktemp("base") / "gpt2", "bfloat16")


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {kind: adapter(base, folder / kind, seed=5 + i, **KINDS[kind]) for i, kind in enumerate(KINDS)}


def undoable(base: Path, given: list[Path], out: Path | str, undo: Path, **options: object) -> None:
    told = MergeOptions(**options)  # type: ignore[arg-type]
    merge(base, given, out, told, watch=UndoWriter(undo, told))


PAIRS = [
    ("plain", "wider"), ("wider", "plain"), ("plain", "dora"), ("dora", "plain"), ("plain", "replaced"),
    ("replaced", "plain"), ("tokens", "plain"), ("plain", "tokens"), ("embedding", "tokens"), ("tokens", "embedding"),
    ("embedding", "plain"), ("biases", "dora"), ("dora", "replaced"), ("replaced", "embedding"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), PAIRS, ids=[f"{a}-{b}" for a, b in PAIRS])
def test_through_the_exact_base_it_is_a_merge_of_the_new_adapter(
    tmp_path: Path, base: Path, adapters: dict[str, Path], old: str, new: str
) -> None:
    undoable(base, [adapters[old]], tmp_path / "old", tmp_path / "old.u")
    undoable(base, [adapters[new]], tmp_path / "new", tmp_path / "new.u")
    done = switch(
        tmp_path / "old", [adapters[old]], [adapters[new]], tmp_path / "got", undo=tmp_path / "old.u",
        undo_out=tmp_path / "got.u",
    )  # fmt: skip
    assert done.exact
    assert bits(tmp_path / "got") == bits(tmp_path / "new")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("got", "new")]
    assert configs[0] == configs[1]
    mine, direct = UndoFile(tmp_path / "got.u"), UndoFile(tmp_path / "new.u")
    assert mine.tensors == direct.tensors
    unmerge(tmp_path / "got", [adapters[new]], tmp_path / "back", undo=tmp_path / "got.u")
    assert bits(tmp_path / "back") == bits(base)


def test_a_merged_model_cannot_take_its_old_adapter_twice(
    tmp_path: Path, base: Path, adapters: dict[str, Path]
) -> None:
    undoable(base, [adapters["plain"]], tmp_path / "old", tmp_path / "u")
    switch(tmp_path / "old", [adapters["plain"]], [adapters["wider"]], tmp_path / "new", undo=tmp_path / "u")
    with pytest.raises(MappingError, match="merged model already"):
        merge(tmp_path / "new", [adapters["plain"]], tmp_path / "twice")


def test_through_the_other_frameworks_file(tmp_path: Path, base: Path, adapters: dict[str, Path]) -> None:
    undoable(base, [adapters["plain"]], tmp_path / "old.ckpt", tmp_path / "u", family="gpt2")
    merge(base, [adapters["wider"]], tmp_path / "new")
    options = MergeOptions(family="gpt2", config=base / "config.json")
    switch(
        tmp_path / "old.ckpt", [adapters["plain"]], [adapters["wider"]], f"{tmp_path}/got/", options,
        undo=tmp_path / "u",
    )  # fmt: skip
    assert bits(tmp_path / "got") == bits(tmp_path / "new")


def test_weights_are_those_of_the_new_adapters(tmp_path: Path, base: Path, adapters: dict[str, Path]) -> None:
    undoable(base, [adapters["plain"]], tmp_path / "old", tmp_path / "u", weights=(0.5,), exact=True)
    new = [adapters["wider"], adapters["plain"]]
    merge(base, new, tmp_path / "new", MergeOptions(weights=(2.0, -1.0)))
    options = MergeOptions(weights=(2.0, -1.0))
    switch(tmp_path / "old", [adapters["plain"]], new, tmp_path / "got", options, undo=tmp_path / "u")
    assert bits(tmp_path / "got") == bits(tmp_path / "new")


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Return a base and two adapters of one linear weight."""
    rng = np.random.default_rng(4)
    base = plain_model(tmp_path / "base.safetensors", {"a.weight": (torch.randn(256, 128) * 0.02).to(torch.bfloat16)})
    made = []
    for name in ("old", "new"):
        factors = rng.standard_normal((4, 128), np.float32), rng.standard_normal((256, 4), np.float32) * 1e-3
        made.append(plain_adapter(tmp_path / name, {"a": factors}))
    return base, made[0], made[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_an_undo_file_it_is_near_and_says_so(
    tmp_path: Path, small: tuple[Path, Path, Path], dtype: str
) -> None:
    _, old, new = small
    base = plain_model(tmp_path / "b.safetensors", {"a.weight": (torch.randn(256, 128) * 0.02).to(DTYPES[dtype])})
    merge(base, [old], tmp_path / "old.safetensors")
    merge(base, [new], tmp_path / "right.safetensors")
    done = switch(tmp_path / "old.safetensors", [old], [new], tmp_path / "got.safetensors")
    assert not done.exact
    assert done.warnings
    assert "not the exact base" in done.summary()
    assert 0 < done.wrong < 0.2
    right, got = (load_file(tmp_path / f"{name}.safetensors")["a.weight"] for name in ("right", "got"))
    differ = (right != got).double().mean().item()
    assert 0 < differ <= 2 * done.wrong
    worst = max(row.error for row in done.guesses)
    assert (right.double() - got.double()).abs().max().item() <= 3 * worst
    with safe_open(tmp_path / "got.safetensors", "pt") as file:
        assert json.loads(file.metadata()[MERGED_KEY])["through_exact_base"] is False


def test_the_wrong_old_adapter_is_refused(tmp_path: Path, small: tuple[Path, Path, Path]) -> None:
    base, old, new = small
    undoable(base, [old], tmp_path / "m.safetensors", tmp_path / "u")
    with pytest.raises(MappingError, match="another delta"):
        switch(tmp_path / "m.safetensors", [new], [old], tmp_path / "no.safetensors", undo=tmp_path / "u")
    with pytest.raises(InputError):
        switch(tmp_path / "m.safetensors", [old, old], [new], tmp_path / "no.safetensors", undo=tmp_path / "u")
    assert not (tmp_path / "no.safetensors").exists()


def test_an_existing_undo_file_is_not_replaced_unasked(tmp_path: Path, small: tuple[Path, Path, Path]) -> None:
    base, old, new = small
    undoable(base, [old], tmp_path / "m.safetensors", tmp_path / "u")
    out = tmp_path / "got.safetensors"
    with pytest.raises(OutputError, match="the undo file exists"):
        switch(tmp_path / "m.safetensors", [old], [new], out, undo=tmp_path / "u", undo_out=tmp_path / "u")
    assert not out.exists()


def test_a_dry_run_writes_nothing(tmp_path: Path, small: tuple[Path, Path, Path]) -> None:
    base, old, new = small
    undoable(base, [old], tmp_path / "m.safetensors", tmp_path / "u")
    before = sorted(tmp_path.iterdir())
    done = switch(
        tmp_path / "m.safetensors", [old], [new], tmp_path / "no.safetensors", MergeOptions(dry_run=True),
        undo=tmp_path / "u", undo_out=tmp_path / "v",
    )  # fmt: skip
    assert "would switch 1 parameter" in done.summary()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("exact", [True, False])
def test_switching_from_and_to_repeated_layers(tmp_path: Path, base: Path, exact: bool) -> None:
    made = {}
    for seed, (name, ranges) in enumerate({"old": [[1, 2], [0, 1], [0, 2]], "new": [[0, 2], [1, 2]]}.items()):
        random = np.random.default_rng(seed)
        count = sum(stop - start for start, stop in ranges)
        factors = {f"transformer.h.{i}.attn.c_attn": (random.standard_normal((4, 32), np.float32),
                   random.standard_normal((96, 4), np.float32) * 0.01) for i in range(count)}  # fmt: skip
        made[name] = plain_adapter(tmp_path / name, factors)
        path = made[name] / "adapter_config.json"
        said = {"layer_replication": ranges, "fan_in_fan_out": True}
        path.write_text(json.dumps(json.loads(path.read_text()) | said))
    merge(base, [made["old"]], tmp_path / "merged", watch=UndoWriter(tmp_path / "u", MergeOptions()))
    merge(base, [made["new"]], tmp_path / "direct", watch=UndoWriter(tmp_path / "v", MergeOptions()))
    undo, undo_out = (tmp_path / "u", tmp_path / "w") if exact else (None, None)
    switch(tmp_path / "merged", [made["old"]], [made["new"]], tmp_path / "out", undo=undo, undo_out=undo_out)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "direct"))
    assert ours.keys() == theirs.keys()
    assert (tmp_path / "out/config.json").read_text() == (tmp_path / "direct/config.json").read_text()
    if not exact:
        assert all(torch.allclose(ours[n].float(), theirs[n].float(), rtol=0.02, atol=1e-3) for n in ours)
        return
    assert bits(tmp_path / "out") == bits(tmp_path / "direct")
    unmerge(tmp_path / "out", [made["new"]], tmp_path / "back", undo=tmp_path / "w")
    assert bits(tmp_path / "back") == bits(base)
