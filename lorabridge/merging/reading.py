"""Read rows of expressions over checkpoints, touching no more of the files than these rows need where that is so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from ..arithmetic import recipe as recipes
from ..arithmetic.floats import Bits
from ..axes import Compute, Expr, Join, Kernel, Read, Reshape, Slice, evaluate
from ..tensors import Source
from .undo import block_rows, matrix


def spans(expr: Expr) -> Iterator[tuple[int, int]]:
    """Cut the rows of an expression into the blocks of an undo file."""
    count, step = matrix(expr.shape)[0], block_rows(expr.shape, expr.dtype)
    return ((start, min(start + step, count)) for start in range(0, count, step))


def rows(expr: Expr, start: int, stop: int, source: Source, kernels: Mapping[str, Kernel]) -> Bits:
    """Return rows [start, stop) of an expression's bits, reading only these rows where that is possible."""
    if isinstance(expr, Read) and expr.shape:
        return source.read(expr.name, (start, stop))
    if isinstance(expr, Slice) and expr.axis == 0:
        return rows(expr.x, expr.start + start, expr.start + stop, source, kernels)
    if isinstance(expr, Join) and expr.axis == 0:
        return np.concatenate(list(_joined(expr, start, stop, source, kernels)))
    if isinstance(expr, Reshape) and expr.shape and expr.x.shape[:1] == expr.shape[:1]:
        return rows(expr.x, start, stop, source, kernels).reshape(stop - start, *expr.shape[1:])
    if isinstance(expr, Compute) and expr.kernel == "cast":
        part = replace(expr, shape=(stop - start, *expr.shape[1:]))
        return kernels[expr.kernel](part, [rows(expr.args[0], start, stop, source, kernels)])
    made = recipes.rows_of(expr, start, stop)
    if made is not None:
        operands = [evaluate(arg, source.read, kernels) for arg in made.args[1:]]
        return kernels[made.kernel](made, [rows(made.args[0], 0, stop - start, source, kernels), *operands])
    whole = evaluate(expr, source.read, kernels)
    return np.ascontiguousarray(whole[start:stop] if expr.shape else whole)


def _joined(expr: Join, start: int, stop: int, source: Source, kernels: Mapping[str, Kernel]) -> Iterator[Bits]:
    at = 0
    for part in expr.parts:
        low, high = max(start - at, 0), min(stop - at, part.shape[0])
        if low < high:
            yield rows(part, low, high, source, kernels)
        at += part.shape[0]
