"""The laws of tensor expressions: what they mean, how they come back, when they are plain copies."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorabridge import axes
from lorabridge.arithmetic import numerics
from lorabridge.axes import Compute, Join, Read, Reorder, Reshape, ShapeError, Slice, Zeros
from lorabridge.dtypes import BY_NAME
from lorabridge.inversion import invert
from lorabridge.tensors import TensorSpec

U16 = BY_NAME["uint16"]
F32 = BY_NAME["float32"]
modest = settings(deadline=None, max_examples=150)


def tensor(name, shape, seed=0):
    """A source tensor as an expression and as an array of distinct codes."""
    start = 1 + 1000 * (seed + sum(map(ord, name)) % 50)
    bits = np.arange(start, start + int(np.prod(shape)), dtype=np.uint16).reshape(shape)
    return axes.read(TensorSpec(name, U16, tuple(shape))), bits


def run(expr, sources):
    return axes.evaluate(expr, sources.__getitem__, {})


@st.composite
def views(draw, *, lossless=False):
    """An expression beside the array that numpy makes of the same steps, and its sources."""
    sources = {}

    def fresh(shape):
        name = f"t{len(sources)}"
        expr, bits = tensor(name, shape, len(sources))
        sources[name] = bits
        return expr, bits

    expr, bits = fresh(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    for _ in range(draw(st.integers(0, 5))):
        step = draw(st.sampled_from(["reorder", "reshape", "join", "zeros"] + ([] if lossless else ["cut", "twice"])))
        axis = draw(st.integers(0, bits.ndim - 1))
        if step == "reorder":
            order = draw(st.permutations(range(bits.ndim)))
            expr, bits = axes.reorder(expr, order), bits.transpose(order)
        elif step == "reshape":
            shape = draw(
                st.sampled_from([(bits.size,), (1, bits.size), (bits.size, 1), (*bits.shape, 1), bits.shape[::-1]])
            )
            expr, bits = axes.reshape(expr, shape), np.ascontiguousarray(bits).reshape(shape)
        elif step == "cut":
            start = draw(st.integers(0, bits.shape[axis]))
            stop = draw(st.integers(start, bits.shape[axis]))
            expr, bits = axes.cut(expr, axis, start, stop), bits[(slice(None),) * axis + (slice(start, stop),)]
        elif step == "twice":
            expr, bits = axes.join([expr, expr], axis), np.concatenate([bits, bits], axis)
        else:
            other = (axes.zeros(U16, bits.shape), np.zeros_like(bits)) if step == "zeros" else fresh(bits.shape)
            pair = [(expr, bits), other][:: draw(st.sampled_from([1, -1]))]
            expr = axes.join([e for e, _ in pair], axis)
            bits = np.concatenate([b for _, b in pair], axis)
        assume(bits.size <= 512)
    return expr, bits, sources


@given(made=views())
@modest
def test_expressions_mean_what_numpy_means(made):
    expr, bits, sources = made
    assert expr.shape == bits.shape
    np.testing.assert_array_equal(run(expr, sources), bits)


@given(made=views())
@modest
def test_byte_ranges_are_the_bytes(made):
    expr, bits, sources = made
    ranges = axes.byte_ranges(expr)
    if ranges is None:
        return
    made_bytes = b"".join(sources[name].tobytes()[first : first + length] for name, first, length in ranges)
    assert made_bytes == np.ascontiguousarray(bits).tobytes()


@given(made=views(lossless=True))
@modest
def test_inverse_restores_every_source_and_collapses_to_plain_reads(made):
    expr, bits, sources = made
    used = {name: sources[name] for name in axes.reads(expr)}
    back = invert({"out": expr})
    assert back.lost == ()
    assert set(back.exprs) == set(used)
    for name, source in used.items():
        np.testing.assert_array_equal(run(back.exprs[name], {"out": bits}), source)
        assert axes.substitute(back.exprs[name], {"out": expr}) == Read(name, U16, source.shape)


@given(made=views())
@modest
def test_whatever_an_inverse_claims_is_true(made):
    expr, bits, sources = made
    back = invert({"out": expr})
    assert set(back.exprs) | set(back.lost) == set(axes.reads(expr))
    for name, value in back.exprs.items():
        np.testing.assert_array_equal(run(value, {"out": bits}), sources[name])
    held = sum(sources[name].size for name in back.exprs)
    if not back.lost and bits.size > held:
        assert back.redundant


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), data=st.data())
@modest
def test_parts_of_a_tensor_give_it_back(shape, data):
    expr, bits = tensor("w", shape)
    axis = data.draw(st.integers(0, len(shape) - 1))
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[axis]), max_size=3)))
    edges = [0, *cuts, shape[axis]]
    outputs = {f"o{i}": axes.cut(expr, axis, a, b) for i, (a, b) in enumerate(pairwise(edges))}
    back = invert(outputs)
    values = {name: run(part, {"w": bits}) for name, part in outputs.items()}
    np.testing.assert_array_equal(run(back.exprs["w"], values), bits)
    assert axes.substitute(back.exprs["w"], outputs) == expr


@given(edges=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5))
@modest
def test_overlapping_parts_give_the_tensor_back_where_they_cover_it(edges):
    expr, bits = tensor("w", (6, 2))
    spans = [(min(e), max(e)) for e in edges if e[0] != e[1]]
    assume(spans)
    outputs = {f"o{i}": axes.cut(expr, 0, a, b) for i, (a, b) in enumerate(spans)}
    covered = set().union(*(range(a, b) for a, b in spans)) == set(range(6))
    back = invert(outputs)
    assert (back.lost == ()) is covered
    if covered:
        values = {name: run(part, {"w": bits}) for name, part in outputs.items()}
        np.testing.assert_array_equal(run(back.exprs["w"], values), bits)
        assert back.redundant is (sum(b - a for a, b in spans) > 6)


@pytest.mark.parametrize("order", [1, -1])
def test_copies_are_redundant_in_any_order(order):
    expr, _ = tensor("w", (4, 2))
    outputs = {"whole": expr, "part": axes.cut(expr, 0, 0, 2)}
    assert invert(dict(list(outputs.items())[::order])).redundant
    thirds = {"a": axes.cut(expr, 0, 0, 2), "b": axes.cut(expr, 0, 2, 4), "c": axes.cut(expr, 1, 0, 1)}
    assert invert(dict(list(thirds.items())[::order])).redundant
    assert not invert({"a": thirds["a"], "b": thirds["b"]}).redundant


def test_parts_that_do_not_cover_a_tensor_lose_it():
    expr, _ = tensor("w", (4, 2))
    back = invert({"o": axes.cut(expr, 0, 1, 4)})
    assert back.lost == ("w",)


def test_simplifications():
    w, _ = tensor("w", (4, 6))
    v, _ = tensor("v", (4, 6))
    assert axes.transpose(axes.transpose(w)) == w
    assert axes.reshape(axes.reshape(w, (24,)), (4, 6)) == w
    assert axes.cut(axes.cut(w, 0, 1, 4), 0, 0, 2) == Slice(w, 0, 1, 3, U16, (2, 6))
    assert axes.cut(axes.join([w, v], 0), 0, 4, 8) == v
    assert axes.join([axes.cut(w, 1, 0, 2), axes.cut(w, 1, 2, 6)], 1) == w
    assert axes.join([axes.zeros(U16, (1, 2)), axes.zeros(U16, (3, 2))], 0) == Zeros(U16, (4, 2))
    assert axes.transpose(axes.reshape(w, (24, 1))) == Reshape(w, U16, (1, 24))
    assert isinstance(axes.transpose(w), Reorder)
    assert isinstance(axes.join([w, v], 0), Join)
    empty = axes.cut(w, 0, 2, 2)
    assert axes.join([empty, w], 0) == w
    assert axes.join([empty, empty], 0).shape == (0, 6)


def test_parts_that_do_not_fit_are_refused():
    w, _ = tensor("w", (4, 6))
    for wrong in (
        lambda: axes.reorder(w, (0, 0)), lambda: axes.reshape(w, (5, 5)), lambda: axes.cut(w, 0, 3, 2),
        lambda: axes.cut(w, 0, 0, 5), lambda: axes.cut(w, 2, 0, 1), lambda: axes.join([], 0),
        lambda: axes.join([w, axes.zeros(F32, (4, 6))], 0), lambda: axes.join([w, axes.zeros(U16, (4, 5))], 0),
        lambda: axes.transpose(axes.zeros(U16, (1, 2, 3))),
        lambda: axes.join([w, w], 2),
    ):  # fmt: skip
        with pytest.raises(ShapeError):
            wrong()


def floats(name="x", dtype="bfloat16", shape=(3, 2)):
    return axes.read(TensorSpec(name, BY_NAME[dtype], shape))


def test_casts_collapse_only_where_nothing_is_lost():
    x = floats()
    wide = axes.cast(x, F32)
    assert axes.cast(wide, BY_NAME["bfloat16"]) == x
    assert axes.cast(x, BY_NAME["bfloat16"]) == x
    narrow = axes.cast(floats(dtype="float32"), BY_NAME["bfloat16"])
    assert isinstance(axes.cast(narrow, F32), Compute)
    assert invert({"o": narrow}).lost == ("x",)
    back = invert({"o": wide})
    assert axes.substitute(back.exprs["x"], {"o": wide}) == x
    assert axes.computes(wide)
    assert not axes.computes(axes.transpose(x))
    assert axes.byte_ranges(wide) is None


@pytest.mark.parametrize("factor", [0.5, 1 / 3, -7.0])
@pytest.mark.parametrize("target", ["bfloat16", "float32"])
def test_scaling_and_its_inverse_collapse(factor, target):
    x = floats()
    scaled = axes.scale(axes.transpose(x), factor, BY_NAME[target])
    back = invert({"o": scaled}).exprs["x"]
    assert isinstance(back, Reorder)
    assert axes.substitute(back, {"o": scaled}) == x
    other = axes.scale(axes.transpose(x), factor * 2, BY_NAME[target])
    assert axes.substitute(back, {"o": other}) != x
    assert axes.scale(x, 1.0, BY_NAME["bfloat16"]) == x


def test_scaled_parts_come_back_through_kernels():
    bits = np.array([[0x3F80, 0x4000], [0xC040, 0x7FC1], [0x0001, 0x8000]], np.uint16)
    x = floats()
    parts = {"a": axes.scale(axes.cut(x, 0, 0, 1), 0.3, F32), "b": axes.scale(axes.cut(x, 0, 1, 3), 3.0, F32)}
    notes = numerics.Notes()
    made = {n: axes.evaluate(e, {"x": bits}.__getitem__, numerics.kernels(n, notes, {})) for n, e in parts.items()}
    back = invert(parts).exprs["x"]
    again = axes.evaluate(back, made.__getitem__, numerics.kernels("a", notes, notes.residues))
    assert again.tobytes() == bits.tobytes()


def test_reads_and_types_below_a_byte():
    w, _ = tensor("w", (4, 6))
    v, _ = tensor("v", (4, 6))
    assert axes.reads(axes.join([v, w, axes.cut(v, 0, 0, 1)], 0)) == ("v", "w")
    small = axes.read(TensorSpec("s", BY_NAME["float4"], (4, 3)))
    assert axes.byte_ranges(small) == [("s", 0, 6)]
    assert axes.byte_ranges(axes.cut(small, 0, 0, 1)) is None
    assert axes.byte_ranges(axes.join([small, small], 0)) == [("s", 0, 6), ("s", 0, 6)]
    odd = axes.read(TensorSpec("s", BY_NAME["float4"], (1, 3)))
    assert axes.byte_ranges(axes.join([odd, odd], 0)) is None  # three half bytes do not end on a byte
