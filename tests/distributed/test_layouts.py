"""Slices of a layout against MindSpore's own runtime slicing and its transform of checkpoints."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge import axes
from lorabridge.distributed.layout import ALL, Layout, assemble, slice_of
from lorabridge.dtypes import BY_NAME
from lorabridge.tensors import TensorSpec

F32 = BY_NAME["float32"]


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    grid = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4)))
    axes_left = draw(st.permutations(range(len(grid))))
    rank = draw(st.integers(1, 3))
    cuts: list[tuple[int, ...]] = []
    for _ in range(rank):
        count = draw(st.integers(0, min(2, len(axes_left))))
        cuts.append(tuple(axes_left[:count]))
        axes_left = axes_left[count:]
    replicas = Layout(grid, tuple(cuts)).free
    groups = math.prod(grid[axis] for axis in replicas)
    divisors = [n for n in range(1, groups + 1) if groups % n == 0]
    return Layout(grid, tuple(cuts), draw(st.sampled_from([0, ALL, *divisors])))


def value(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.uint32).reshape(shape)


def cut_by_hand(layout: Layout, rank: int) -> np.ndarray:
    """Return a rank's slice of ``value`` by stepping through the grid, axis after axis, as a reader would by hand."""
    shape = tuple(n * 2 for n in layout.fractions)
    piece = value(shape)
    place = np.unravel_index(rank, layout.grid)
    for axis, grid_axes in enumerate(layout.cuts):
        for grid_axis in grid_axes:
            piece = np.split(piece, layout.grid[grid_axis], axis)[place[grid_axis]]
    free = [axis for axis in range(len(layout.grid)) if not any(axis in c for c in layout.cuts)]
    if layout.shards > 1:
        number = 0
        for axis in free:
            number = number * layout.grid[axis] + int(place[axis])
        piece = np.split(piece, layout.shards, 0)[number % layout.shards]
    return piece


@settings(deadline=None, max_examples=150)
@given(layouts())
def test_every_rank_gets_its_slice_and_the_slices_make_the_tensor(layout: Layout) -> None:
    assert layout.problem() == ""
    shape = tuple(n * 2 for n in layout.fractions)
    whole = axes.read(TensorSpec("x", F32, shape))
    pieces = {}
    for rank in range(layout.devices):
        got = axes.evaluate(slice_of(whole, layout, rank), lambda _: value(shape), {})
        assert np.array_equal(got, cut_by_hand(layout, rank))
        assert got.shape == layout.local_shape(shape)
        spec = TensorSpec(str(layout.place(rank)), F32, got.shape)
        pieces[layout.place(rank)] = (axes.read(spec), got)
    reads = {index: read for index, (read, _) in pieces.items()}
    bits = {str(index): got for index, (_, got) in pieces.items()}
    joined = assemble(reads, layout.fractions)
    assert np.array_equal(axes.evaluate(joined, bits.__getitem__, {}), value(shape))
    composed = axes.substitute(
        joined, {str(layout.place(r)): slice_of(whole, layout, r) for r in range(layout.devices)}
    )
    assert np.array_equal(axes.evaluate(composed, lambda _: value(shape), {}), value(shape))


@settings(deadline=None, max_examples=60)
@given(layouts())
def test_holders_are_the_ranks_whose_slices_are_equal(layout: Layout) -> None:
    found = layout.holders()
    assert sorted(itertools.chain(*found.values())) == list(range(layout.devices))
    assert len(found) == math.prod(layout.fractions)
    for index, ranks in found.items():
        assert [layout.replica(rank) for rank in ranks] == list(range(len(ranks)))
        assert {layout.place(rank) for rank in ranks} == {index}


def test_mindspore_cuts_a_tensor_in_the_same_way() -> None:
    from mindspore import Tensor
    from mindspore.parallel._tensor import _load_tensor

    for grid, tensor_map in itertools.product([(2, 4), (2, 2, 2), (4, 2)], itertools.product([-1, 0, 1], repeat=2)):
        if tensor_map[0] == tensor_map[1] != -1:
            continue
        cuts = tuple(() if axis == -1 else (len(grid) - 1 - axis,) for axis in tensor_map)
        layout = Layout(grid, cuts)
        shape = tuple(n * 3 for n in layout.fractions)
        full = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        expr = axes.read(TensorSpec("x", F32, shape))
        for rank in range(layout.devices):
            theirs = _load_tensor(Tensor(full), list(grid), list(tensor_map), rank_id=rank)
            ours = axes.evaluate(slice_of(expr, layout, rank), lambda _, full=full: full, {})
            assert np.array_equal(theirs.asnumpy() if hasattr(theirs, "asnumpy") else theirs, ours), (grid, tensor_map)


def test_layouts_that_cannot_be_say_why() -> None:
    assert "has no devices" in Layout((), ((),)).problem()
    assert "does not have" in Layout((2,), ((1,),)).problem()
    assert "twice" in Layout((2, 2), ((0,), (0,))).problem()
    assert "do not divide" in Layout((2, 3), ((0,),), 2).problem()
    assert "scalar" in Layout((2,), (), ALL).problem()
