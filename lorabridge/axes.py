"""Reversible tensor expressions: what one output tensor is made of, built from headers, evaluated on bits.

An expression is a frozen tree over the tensors of a source. Its structural nodes (:class:`Reorder`,
:class:`Reshape`, :class:`Slice`, :class:`Join`, :class:`Zeros`) move bits and never compute; :class:`Compute`
names a kernel of ``lorabridge.arithmetic.numerics``. The functions in lower case build nodes, check shapes and
simplify, so that an expression followed by its inverse collapses to the plain :class:`Read` it started from. That
collapse is the proof, made before any tensor is read, that a plan can be undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .dtypes import DType, lossless
from .tensors import TensorSpec

if TYPE_CHECKING:
    from .tensors import Bits

Shape = tuple[int, ...]
Param = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Read:
    """A whole source tensor."""

    name: str
    dtype: DType
    shape: Shape


@dataclass(frozen=True, slots=True)
class Zeros:
    """A tensor of zero bits."""

    dtype: DType
    shape: Shape


@dataclass(frozen=True, slots=True)
class Reorder:
    """Axes in another order: axis ``i`` of the result is axis ``order[i]`` of ``x``."""

    x: Expr
    order: tuple[int, ...]
    dtype: DType
    shape: Shape


@dataclass(frozen=True, slots=True)
class Reshape:
    """The same C-order elements under another shape."""

    x: Expr
    dtype: DType
    shape: Shape


@dataclass(frozen=True, slots=True)
class Slice:
    """The interval [start, stop) of one axis."""

    x: Expr
    axis: int
    start: int
    stop: int
    dtype: DType
    shape: Shape


@dataclass(frozen=True, slots=True)
class Join:
    """Parts one after another along one axis."""

    parts: tuple[Expr, ...]
    axis: int
    dtype: DType
    shape: Shape


@dataclass(frozen=True, slots=True)
class Compute:
    """The result of an arithmetic kernel; ``inverse`` names the kernel that undoes it, or is empty."""

    kernel: str
    args: tuple[Expr, ...]
    params: tuple[tuple[str, Param], ...]
    inverse: str
    dtype: DType
    shape: Shape


Expr = Read | Zeros | Reorder | Reshape | Slice | Join | Compute


class ShapeError(ValueError):
    """Parts do not fit together; dialects and tables turn it into an error with a place."""


def read(spec: TensorSpec) -> Expr:
    """Stand for a source tensor."""
    return Read(spec.name, spec.dtype, spec.shape)


def zeros(dtype: DType, shape: Sequence[int]) -> Expr:
    """Stand for a tensor of zeros."""
    return Zeros(dtype, tuple(shape))


def reorder(x: Expr, order: Sequence[int]) -> Expr:
    """Permute axes, as numpy.transpose does."""
    order = tuple(order)
    if sorted(order) != list(range(len(x.shape))):
        raise ShapeError(f"order {order} does not name each axis of shape {x.shape} once")
    if isinstance(x, Reorder):
        return reorder(x.x, [x.order[i] for i in order])
    shape = tuple(x.shape[i] for i in order)
    if order == tuple(range(len(order))):
        return x
    if isinstance(x, Zeros):
        return Zeros(x.dtype, shape)
    if [i for i in order if x.shape[i] != 1] == [i for i in range(len(order)) if x.shape[i] != 1]:
        return reshape(x, shape)  # only axes of length one move: no element does
    return Reorder(x, order, x.dtype, shape)


def transpose(x: Expr) -> Expr:
    """Swap the two axes of a matrix."""
    if len(x.shape) != 2:
        raise ShapeError(f"shape {x.shape} is not a matrix")
    return reorder(x, (1, 0))


def reshape(x: Expr, shape: Sequence[int]) -> Expr:
    """Give the same elements another shape of equal size."""
    shape = tuple(shape)
    if math.prod(shape) != math.prod(x.shape):
        raise ShapeError(f"shape {x.shape} has {math.prod(x.shape)} elements, {shape} has {math.prod(shape)}")
    if isinstance(x, Reshape):
        return reshape(x.x, shape)
    if x.shape == shape:
        return x
    if isinstance(x, Zeros):
        return Zeros(x.dtype, shape)
    return Reshape(x, x.dtype, shape)


def cut(x: Expr, axis: int, start: int, stop: int) -> Expr:
    """Take the interval [start, stop) of one axis."""
    if not 0 <= axis < len(x.shape) or not 0 <= start <= stop <= x.shape[axis]:
        raise ShapeError(f"interval {start}:{stop} of axis {axis} is outside shape {x.shape}")
    if (start, stop) == (0, x.shape[axis]):
        return x
    shape = (*x.shape[:axis], stop - start, *x.shape[axis + 1 :])
    if isinstance(x, Zeros):
        return Zeros(x.dtype, shape)
    if isinstance(x, Slice) and x.axis == axis:
        return cut(x.x, axis, x.start + start, x.start + stop)
    if isinstance(x, Join) and x.axis == axis:
        return join([cut(p, axis, a, b) for p, a, b in _overlaps(x, start, stop)], axis)
    if isinstance(x, Join):
        return join([cut(p, axis, start, stop) for p in x.parts], x.axis)
    return Slice(x, axis, start, stop, x.dtype, shape)


def _overlaps(x: Join, start: int, stop: int) -> Iterator[tuple[Expr, int, int]]:
    at = 0
    for part in x.parts:
        length = part.shape[x.axis]
        lo, hi = max(start - at, 0), min(stop - at, length)
        if lo < hi or (start == stop and 0 <= start - at <= length):
            yield part, lo, max(lo, hi)
            if start == stop:
                return
        at += length


def join(parts: Sequence[Expr], axis: int = 0) -> Expr:
    """Concatenate along one axis; neighbouring slices of one tensor and neighbouring zeros melt into one."""
    if not parts:
        raise ShapeError("nothing to join")
    first = parts[0]
    if not 0 <= axis < len(first.shape):
        raise ShapeError(f"shape {first.shape} has no axis {axis}")
    for part in parts:
        same = [n for i, n in enumerate(part.shape) if i != axis] == [n for i, n in enumerate(first.shape) if i != axis]
        if part.dtype != first.dtype or len(part.shape) != len(first.shape) or not same:
            raise ShapeError(f"{part.dtype} {part.shape} cannot follow {first.dtype} {first.shape} along axis {axis}")
    flat: list[Expr] = []
    for part in parts:
        for piece in part.parts if isinstance(part, Join) and part.axis == axis else (part,):
            if piece.shape[axis] == 0 and len(parts) > 1:
                continue
            melted = _melt(flat[-1], piece, axis) if flat else None
            if melted is None:
                flat.append(piece)
            else:
                flat[-1] = melted
    if not flat:
        return first
    if len(flat) == 1:
        return flat[0]
    shape = list(first.shape)
    shape[axis] = sum(p.shape[axis] for p in flat)
    return Join(tuple(flat), axis, first.dtype, tuple(shape))


def _melt(left: Expr, right: Expr, axis: int) -> Expr | None:
    if isinstance(left, Zeros) and isinstance(right, Zeros):
        shape = list(left.shape)
        shape[axis] += right.shape[axis]
        return Zeros(left.dtype, tuple(shape))
    if not (isinstance(left, Slice) and isinstance(right, Slice) and left.axis == right.axis == axis):
        return None
    return cut(left.x, axis, left.start, right.stop) if left.stop == right.start and left.x == right.x else None


def cast(x: Expr, dtype: DType, *, on_overflow: str = "error") -> Expr:
    """Convert element values, rounding once to nearest even; exact both ways when the target is wider.

    ``on_overflow``: what to do with finite values beyond the target's largest: error, saturate or inf.
    """
    if x.dtype == dtype:
        return x
    if isinstance(x, Compute) and x.kernel == "cast" and x.args[0].dtype == dtype and lossless(dtype, x.dtype):
        return x.args[0]
    inverse = "cast" if lossless(x.dtype, dtype) else ""
    return Compute("cast", (x,), (("dtype", dtype.name), ("on_overflow", on_overflow)), inverse, dtype, x.shape)


def scale(x: Expr, factor: float, dtype: DType) -> Expr:
    """Multiply by a factor in at least float32 and round once to ``dtype``.

    The inverse kernel ``unscale`` restores the bits by itself when the factor is a power of two or the target has
    bits to spare, and otherwise with the residue that the forward run records (see ``numerics``).
    """
    if factor == 1.0:
        return cast(x, dtype)
    return Compute("scale", (x,), (("dtype", dtype.name), ("factor", float(factor))), "unscale", dtype, x.shape)


def children(expr: Expr) -> tuple[Expr, ...]:
    """Return the direct operands."""
    if isinstance(expr, Join):
        return expr.parts
    if isinstance(expr, Compute):
        return expr.args
    return () if isinstance(expr, Read | Zeros) else (expr.x,)


def reads(expr: Expr) -> tuple[str, ...]:
    """Return the names of the source tensors, each once, in order of appearance."""
    if isinstance(expr, Read):
        return (expr.name,)
    return tuple(dict.fromkeys(name for child in children(expr) for name in reads(child)))


def computes(expr: Expr) -> bool:
    """Say whether any arithmetic happens: without, every output bit is an input bit or zero."""
    return isinstance(expr, Compute) or any(computes(child) for child in children(expr))


Kernel = Callable[[Compute, "list[Bits]"], "Bits"]


def evaluate(expr: Expr, source: Callable[[str], Bits], kernels: Mapping[str, Kernel]) -> Bits:
    """Return the bits of an expression; a view of the source's array where no copy is needed.

    ``source`` returns the bits of a whole source tensor. The result need not be contiguous.
    """
    import numpy as np

    if isinstance(expr, Read):
        return source(expr.name)
    if isinstance(expr, Zeros):
        return np.zeros(expr.shape, expr.dtype.carrier())
    if isinstance(expr, Compute):
        return kernels[expr.kernel](expr, [evaluate(arg, source, kernels) for arg in expr.args])
    if isinstance(expr, Join):
        out = np.empty(expr.shape, expr.dtype.carrier())
        at = 0
        for part in expr.parts:
            where = [slice(None)] * expr.axis + [slice(at, at + part.shape[expr.axis])]
            out[tuple(where)] = evaluate(part, source, kernels)
            at += part.shape[expr.axis]
        return out
    bits = evaluate(expr.x, source, kernels)
    if isinstance(expr, Reorder):
        return bits.transpose(expr.order)
    if isinstance(expr, Reshape):
        return bits.reshape(expr.shape)
    return bits[(slice(None),) * expr.axis + (slice(expr.start, expr.stop),)]


def byte_ranges(expr: Expr) -> list[tuple[str, int, int]] | None:
    """Return (source name, first byte, length) triples whose bytes in order are the result, or None.

    Where this is not None the result can be copied by the kernel without passing through memory.
    """
    if isinstance(expr, Read):
        size = TensorSpec(expr.name, expr.dtype, expr.shape).nbytes
        return [(expr.name, 0, size)]
    if isinstance(expr, Reshape):
        return byte_ranges(expr.x)
    if isinstance(expr, Join):
        if math.prod(expr.shape[: expr.axis]) != 1 or any(math.prod(p.shape) * p.dtype.bits % 8 for p in expr.parts):
            return None
        inner = [byte_ranges(part) for part in expr.parts]
        return None if None in inner else [r for ranges in inner if ranges for r in ranges]
    if isinstance(expr, Slice):
        ranges = byte_ranges(expr.x) if math.prod(expr.shape[: expr.axis]) == 1 and expr.dtype.bits % 8 == 0 else None
        if ranges is None:
            return None
        row = math.prod(expr.shape[expr.axis + 1 :]) * expr.dtype.itemsize
        return _clip(ranges, expr.start * row, expr.stop * row)
    return None


def _clip(ranges: list[tuple[str, int, int]], start: int, stop: int) -> list[tuple[str, int, int]]:
    out, at = [], 0
    for name, first, length in ranges:
        lo, hi = max(start - at, 0), min(stop - at, length)
        if lo < hi:
            out.append((name, first + lo, hi - lo))
        at += length
    return out


def substitute(expr: Expr, given: Mapping[str, Expr]) -> Expr:
    """Replace reads by expressions and simplify; composing a plan with its inverse yields plain reads."""
    if isinstance(expr, Read):
        return given.get(expr.name, expr)
    if isinstance(expr, Zeros):
        return expr
    if isinstance(expr, Join):
        return join([substitute(part, given) for part in expr.parts], expr.axis)
    if isinstance(expr, Compute):
        args = tuple(substitute(arg, given) for arg in expr.args)
        if expr.kernel == "unscale" and _undoes(expr, args[0]):
            return children(args[0])[0]
        if expr.kernel == "cast" and len(args) == 1:
            policy = dict(expr.params).get("on_overflow", "error")
            return cast(args[0], expr.dtype, on_overflow=str(policy))
        return Compute(expr.kernel, args, expr.params, expr.inverse, expr.dtype, expr.shape)
    x = substitute(expr.x, given)
    if isinstance(expr, Reorder):
        return reorder(x, expr.order)
    if isinstance(expr, Reshape):
        return reshape(x, expr.shape)
    return cut(x, expr.axis, expr.start, expr.stop)


def _undoes(back: Compute, there: Expr) -> bool:
    """Say whether a kernel undoes the one before it: with the forward run's residue, bit for bit (see ``numerics``)."""
    if not isinstance(there, Compute) or len(there.args) != 1 or there.inverse != back.kernel:
        return False
    (arg,) = there.args
    same = [{k: v for k, v in node.params if k != "dtype"} for node in (back, there)]
    return arg.dtype == back.dtype and same[0] == same[1]
