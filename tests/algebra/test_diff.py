"""Comparing checkpoints: the same content in any container and dialect, and honest numbers where it is not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_adapters import Net, apart, deltas, loaded, saved, wrapped
from safetensors.torch import load_file, save_file

from lorabridge import convert
from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.diff import DiffOptions, diff, most_ulps
from lorabridge.actions.resize import resize
from lorabridge.errors import MappingError

ALL = {"target_modules": ["q", "k", "emb", "conv"]}


def net(path: Path, **changes: object) -> Path:
    torch.manual_seed(0)
    state = Net().state_dict()
    state.update(changes)
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    return path


@pytest.mark.parametrize("name", ["a.ckpt", "a.bin", "a.safetensors", "b.ckpt"])
def test_containers_and_dialects_do_not_count(name: str, tmp_path: Path) -> None:
    (source,) = saved(wrapped([{"r": 4, "lora_alpha": 6, **ALL}]), tmp_path)
    to = ("loralib-ms" if name[0] == "a" else "mindpet") if name.endswith("ckpt") else "peft"
    options = ConvertOptions(target_dialect=to, exclude=("conv", "emb") if to == "mindpet" else ())
    convert(source, tmp_path / name, options)
    found = diff(source, tmp_path / name, DiffOptions(exclude=options.exclude) if to != "mindpet" else None)
    if to == "mindpet":
        assert {row.path for row in found.deltas if not row.same} == {"conv", "emb"}
        found = diff(source, tmp_path / name, DiffOptions(include=("q", "k")))
    assert found.same
    assert all(row.differing == 0 for row in found.tensors)
    assert diff(tmp_path / name, source, DiffOptions(include=("q", "k"))).same


def test_models_in_both_frameworks_are_the_same(tmp_path: Path) -> None:
    source = net(tmp_path / "net.safetensors")
    convert(source, tmp_path / "net.ckpt", ConvertOptions(target_dialect="ms", family="identity"))
    found = diff(source, tmp_path / "net.ckpt")
    assert found.same
    assert len(found.tensors) == 9
    assert "same: 9 tensors" in found.summary()


def test_one_element_is_found_with_its_distance(tmp_path: Path) -> None:
    first = net(tmp_path / "a.safetensors")
    weight = load_file(first)["q.weight"]
    other = weight.clone()
    other[3, 2] = torch.nextafter(torch.nextafter(weight[3, 2], torch.tensor(9.0)), torch.tensor(9.0))
    found = diff(first, net(tmp_path / "b.safetensors", **{"q.weight": other}))
    (row,) = [row for row in found.tensors if not row.same]
    assert (row.name, row.differing, row.elements, row.ulps) == ("q.weight", 1, 192, 2)
    assert row.max_abs == float((other - weight).abs().max())
    assert row.relative == pytest.approx(float((other - weight).norm() / weight.norm()), rel=1e-6)
    assert diff(first, tmp_path / "b.safetensors", DiffOptions(tolerance=1e-6)).same
    assert diff(first, tmp_path / "b.safetensors", DiffOptions(exclude=("q",))).same


def test_missing_shapes_types_and_nan_are_differences(tmp_path: Path) -> None:
    first = net(tmp_path / "a.safetensors")
    state = load_file(first)
    broken = state["k.weight"].clone()
    broken[0, 0] = math.nan
    second = net(tmp_path / "b.safetensors", **{
        "q.bias": None, "head.bias": torch.zeros(5), "head.weight": state["head.weight"].double(), "k.weight": broken,
        "k.bias": state["k.bias"].bfloat16(), "new": torch.zeros(1),
    })  # fmt: skip
    rows = {row.name: row for row in diff(first, second).tensors if not row.same}
    assert set(rows) == {"q.bias", "head.bias", "head.weight", "k.weight", "k.bias", "new"}
    assert rows["q.bias"].note == "B does not have it"
    assert rows["new"].note == "A does not have it"
    assert rows["head.weight"].note == "float32 in A, float64 in B, equal values"
    assert rows["k.weight"].max_abs == math.inf
    assert rows["k.bias"].differing > 0
    wide = diff(first, second, DiffOptions(include=("head.weight",), tolerance=0.0))
    assert wide.same


def test_other_factorizations_are_compared_by_their_deltas(tmp_path: Path) -> None:
    model = wrapped([{"r": 6, "lora_alpha": 9, **ALL}])
    (source,) = saved(model, tmp_path)
    resize(source, tmp_path / "small", rank=3)
    found = diff(source, tmp_path / "small")
    assert not found.same
    before, after = deltas(model, "a0"), loaded(tmp_path / "small")
    for row in found.deltas:
        assert row.apart == pytest.approx(apart(after[row.path], before[row.path]), rel=1e-4)
        assert row.ranks == (6, 3)
        assert row.cosine is not None
        assert 0.3 < row.cosine < 1
    assert diff(source, tmp_path / "small", DiffOptions(tolerance=1.0)).same


def test_the_same_delta_in_other_factors_is_the_same(tmp_path: Path) -> None:
    (source,) = saved(wrapped([{"r": 4, "lora_alpha": 8, **ALL}]), tmp_path)
    state = load_file(source / "adapter_model.safetensors")
    torch.manual_seed(9)
    turned = {}
    for name, tensor in state.items():
        turned[name] = tensor
        if name.endswith("q.lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            mix = torch.randn(4, 4, dtype=torch.float64) + 3 * torch.eye(4)
            a = torch.cat([mix @ tensor.double(), torch.zeros(1, tensor.shape[1])])
            b = torch.cat([state[other].double() @ mix.inverse(), torch.ones(state[other].shape[0], 1)], 1)
            new = {name: a.float(), other: b.float()}
    turned.update(new)
    (tmp_path / "turned").mkdir()
    save_file(turned, tmp_path / "turned" / "adapter_model.safetensors")
    config = (source / "adapter_config.json").read_text()
    patterned = config.replace('"rank_pattern": {}', '"rank_pattern": {"q": 5}')
    patterned = patterned.replace('"alpha_pattern": {}', '"alpha_pattern": {"q": 10}')
    (tmp_path / "turned" / "adapter_config.json").write_text(patterned)
    found = diff(source, tmp_path / "turned")
    assert [(row.path, row.same) for row in found.deltas] == [("q", True)]
    assert found.same
    assert 0 < (found.deltas[0].apart or 0) <= (found.deltas[0].allowed or 0) < 1e-5
    assert not diff(source, tmp_path / "turned", DiffOptions(tolerance=0.0)).same


def test_another_scaling_is_a_difference(tmp_path: Path) -> None:
    (source,) = saved(wrapped([{"r": 4, "lora_alpha": 8}]), tmp_path)
    (tmp_path / "twice").mkdir()
    for file in source.glob("adapter_*"):
        data = file.read_bytes().replace(b'"lora_alpha": 8', b'"lora_alpha": 4')
        (tmp_path / "twice" / file.name).write_bytes(data)
    found = diff(source, tmp_path / "twice")
    assert [(row.apart, row.note) for row in found.deltas] == [(pytest.approx(0.5), "another scaling")] * 2
    assert not found.same


def test_patterns_that_match_nothing_are_told(tmp_path: Path) -> None:
    first = net(tmp_path / "a.safetensors")
    with pytest.raises(MappingError, match="matches no"):
        diff(first, first, DiffOptions(include=("nothing",)))


@pytest.mark.parametrize("width", [16, 32, 64])
@given(seed=st.integers(0, 2**32), steps=st.integers(-5, 5))
@settings(deadline=None, max_examples=60)
def test_ulps_count_floats(width: int, seed: int, steps: int) -> None:
    kind = np.dtype(f"f{width // 8}")
    x = np.random.default_rng(seed).integers(0, 2**64, 1, np.uint64, endpoint=False).view(kind)[:1]
    x = np.where(np.isfinite(x), x, kind.type(0))
    there = x.copy()
    for _ in range(abs(steps)):
        there = np.nextafter(there, kind.type(math.inf if steps > 0 else -math.inf))
    if np.isfinite(there).all():
        assert most_ulps(x.view(f"u{width // 8}"), there.view(f"u{width // 8}")) == abs(steps)


def test_zeros_are_one_place_and_extremes_are_far() -> None:
    zero, negative = np.array([0.0], np.float32), np.array([-0.0], np.float32)
    assert most_ulps(zero.view(np.uint32), negative.view(np.uint32)) == 0
    top = np.array([np.finfo(np.float64).max])
    assert most_ulps(top.view(np.uint64), (-top).view(np.uint64)) == 2 * int(top.view(np.int64)[0])


def test_a_sign_of_zero_and_a_nan_payload_are_differences(tmp_path: Path) -> None:
    def file(name: str, words: list[int]) -> Path:
        bits = torch.tensor(words, dtype=torch.int32).view(torch.float32)
        save_file({"x": bits}, tmp_path / name)
        return tmp_path / name

    one = file("a.safetensors", [0, 0x3F800000, 0x7FC00000])
    two = file("b.safetensors", [-(2**31), 0x3F800000, 0x7FC00001])
    (row,) = diff(one, two).tensors
    assert (row.same, row.differing, row.max_abs) == (False, 2, 0.0)
