"""Products of factors that are low-rank pairs in disguise: Hadamard (LoHa), Kronecker (LoKr), Tucker (``lora_mid``).

| | delta | exact pair ``b @ a`` | rank |
|---|---|---|---|
| LoHa | ``(b1 a1) * (b2 a2)`` | ``a[i, j] = a1[i] * a2[j]``, ``b[:, i, j] = b1[:, i] * b2[:, j]`` | ``r1 r2`` |
| LoKr | ``kron(w1, w2)``, ``w = b a`` or whole | ``kron(b1, b2) @ kron(a1, a2)``; whole: ``w 1``, ``1 w`` | ``r1 r2`` |
| Tucker | ``up[o, p] mid[p, q, *k] down[q, i]`` | ``a[p, i, *k] = sum_q mid[p, q, *k] down[q, i]``, ``b = up``| ``r`` |

The first two are the mixed-product rules of Khatri and Rao (1968) and of the Kronecker product: an element of the new
factors is one product of two old ones, which float64 holds exactly for anything up to float32. It is rounded once, to
``dtype``; 16-bit factors lose nothing in float32. A whole ``w[m, n]`` counts as rank ``min(m, n)``. Tucker's elements
are sums of ``r`` products, added in float64 and rounded once. Conventions: LyCORIS 4.1.3 (``functional/loha.py``,
``lokr.py``, ``general.py``: ``rebuild_tucker``); peft's LoHa and LoKr are the same products.

The functions in this file build expressions from headers; :func:`compute` is what the kernels of ``numerics`` run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..axes import Compute, Expr, ShapeError, reshape, transpose
from ..dtypes import BY_NAME, DType
from . import tuned

if TYPE_CHECKING:
    from .lowrank import Matrix

KERNELS = ("constant", "identity", "khatri_rao", "kronecker", "contract", "scale_rows", *tuned.KERNELS)
"""Names of the kernels that :func:`compute` knows."""

Pair = tuple[Expr, Expr]
"""Factors in the order ``(a, b)``: ``a`` ``[rank, in]``, ``b`` ``[out, rank]``."""


def wide(*factors: Expr) -> DType:
    """Return the type in which products of factors are kept: float32, or float64 where a factor is float64."""
    return BY_NAME["float64" if any(x.dtype.name == "float64" for x in factors) else "float32"]


def constant(value: float, dtype: DType, shape: Sequence[int] = ()) -> Expr:
    """Stand for a tensor that holds one number everywhere; the number must be one of the type's."""
    return Compute("constant", (), (("value", float(value)),), "", dtype, tuple(shape))


def identity(size: int, dtype: DType) -> Expr:
    """Stand for a square matrix of ones on the diagonal."""
    return Compute("identity", (), (), "", dtype, (size, size))


def khatri_rao(x: Expr, y: Expr, dtype: DType) -> Expr:
    """Multiply every row of ``x`` ``[r, n]`` with every row of ``y`` ``[s, n]``: ``[r * s, n]``, row ``i * s + j``."""
    if len(x.shape) != 2 or len(y.shape) != 2 or x.shape[1] != y.shape[1]:
        raise ShapeError(f"rows of {x.shape} and {y.shape} have different lengths")
    return Compute("khatri_rao", (x, y), (), "", dtype, (x.shape[0] * y.shape[0], x.shape[1]))


def kronecker(x: Expr, y: Expr, dtype: DType) -> Expr:
    """Put ``y`` ``[p, q]`` into every element of ``x`` ``[m, n]``, multiplied by it: ``[m * p, n * q]``."""
    if len(x.shape) != 2 or len(y.shape) != 2:
        raise ShapeError(f"{x.shape} and {y.shape} are not two matrices")
    return Compute("kronecker", (x, y), (), "", dtype, (x.shape[0] * y.shape[0], x.shape[1] * y.shape[1]))


def contract(core: Expr, down: Expr, dtype: DType) -> Expr:
    """Sum ``core`` ``[p, q, *k]`` with ``down`` ``[q, i]`` over q: ``[p, i, *k]``."""
    if len(core.shape) < 2 or len(down.shape) != 2 or core.shape[1] != down.shape[0]:
        raise ShapeError(f"{core.shape} and {down.shape} have no axis in common")
    return Compute("contract", (core, down), (), "", dtype, (core.shape[0], down.shape[1], *core.shape[2:]))


def scale_rows(x: Expr, factors: Expr, dtype: DType) -> Expr:
    """Multiply every row of ``x`` ``[m, n]`` by its own factor of ``factors`` ``[m]`` or ``[m, 1]``, rounded once."""
    column = reshape(factors, (math.prod(factors.shape), 1))
    if len(x.shape) != 2 or x.shape[0] != column.shape[0]:
        raise ShapeError(f"{factors.shape} is not one factor for each row of {x.shape}")
    return Compute("scale_rows", (x, column), (), "", dtype, x.shape)


def hadamard_pair(first: Pair, second: Pair, dtype: DType | None = None) -> Pair:
    """Return the pair of ``(b1 @ a1) * (b2 @ a2)``: ``a`` ``[r1 * r2, in]``, ``b`` ``[out, r1 * r2]``.

    Raises ShapeError where the two products have different shapes.
    """
    (a1, b1), (a2, b2) = first, second
    kept = dtype or wide(a1, b1, a2, b2)
    _check_pairs(first, second)
    return khatri_rao(a1, a2, kept), transpose(khatri_rao(transpose(b1), transpose(b2), kept))


def kronecker_pair(first: Pair | Expr, second: Pair | Expr, dtype: DType | None = None) -> Pair:
    """Return the pair of ``kron(w1, w2)``, each ``w`` a whole matrix or a pair ``(a, b)`` with ``w = b @ a``.

    Of two ways to write a whole matrix as a product with the identity, that of smaller rank is taken. A conv's ``a2``
    or ``w2`` comes with its kernel flattened into its columns; the result's columns are ``[in1, in2, *kernel]`` flat.
    """
    pairs = [x if isinstance(x, tuple) else whole_pair(x) for x in (first, second)]
    for pair in pairs:
        _check_pairs(pair)
    (a1, b1), (a2, b2) = pairs
    kept = dtype or wide(a1, b1, a2, b2)
    return kronecker(a1, a2, kept), kronecker(b1, b2, kept)


def whole_pair(matrix: Expr) -> Pair:
    """Write a matrix as a pair: itself and the identity, on the side that gives the smaller rank. Exact."""
    rows, columns = matrix.shape
    if rows < columns:
        return matrix, identity(rows, matrix.dtype)
    return identity(columns, matrix.dtype), matrix


def tucker_pair(core: Expr, down: Expr, up: Expr, dtype: DType | None = None) -> Pair:
    """Return the pair of a Tucker update: ``a`` ``[p, in, *k]``, ``b`` = ``up`` as it is.

    ``core`` ``[p, q, *k]``, ``down`` ``[q, in]``, ``up`` ``[out, p]`` (trailing axes of length one are dropped).
    """
    flat_down, flat_up = (reshape(x, x.shape[:2]) if math.prod(x.shape[2:]) == 1 else x for x in (down, up))
    if len(flat_up.shape) != 2 or flat_up.shape[1] != core.shape[0]:
        raise ShapeError(f"{up.shape} does not follow a core of shape {core.shape}")
    return contract(core, flat_down, dtype or wide(core, down)), flat_up


def compute(kernel: str, args: Sequence[Matrix], shape: Sequence[int], value: float = 0.0) -> Matrix:
    """Run one kernel on float64 arrays; the result is not rounded yet.

    ``value``: of a "constant", or what a kernel of ``tuned`` takes. Raises KeyError for another kernel's name.
    """
    import numpy as np

    if kernel == "constant":
        return np.full(tuple(shape), value)
    if kernel == "identity":
        return np.eye(shape[0])
    if kernel in tuned.KERNELS:
        return tuned.compute(kernel, args, shape, value)
    x, y = args
    if kernel == "scale_rows":
        return np.asarray(x * y)
    if kernel == "khatri_rao":
        return np.asarray((x[:, None, :] * y[None, :, :]).reshape(tuple(shape)))
    if kernel == "kronecker":
        return np.asarray((x[:, None, :, None] * y[None, :, None, :]).reshape(tuple(shape)))
    if kernel == "contract":
        return np.ascontiguousarray(np.moveaxis(np.tensordot(x, y, axes=(1, 0)), -1, 1))
    raise KeyError(kernel)


def hadamard_delta(a1: Matrix, b1: Matrix, a2: Matrix, b2: Matrix) -> Matrix:
    """Return LoHa's delta ``(b1 @ a1) * (b2 @ a2)``, ``[out, in]`` in float64, unscaled."""
    return (b1 @ a1) * (b2 @ a2)


def kronecker_delta(w1: Matrix, w2: Matrix) -> Matrix:
    """Return LoKr's delta ``kron(w1, w2)``, unscaled: ``[m * p, n * q, *k]`` of ``[m, n]`` and ``[p, q, *k]``."""
    shape = (w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1])
    flat = w2.reshape(w2.shape[0], -1)
    return compute("kronecker", (w1, flat), (shape[0], w1.shape[1] * flat.shape[1])).reshape(*shape, *w2.shape[2:])


def _check_pairs(*pairs: Pair) -> None:
    """Refuse pairs that are none, or whose products have different shapes."""
    sizes = set()
    for a, b in pairs:
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise ShapeError(f"factors of shape {a.shape} and {b.shape} are no pair")
        sizes.add((b.shape[0], a.shape[1]))
    if len(sizes) > 1:
        raise ShapeError(f"products of shapes {' and '.join(map(str, sorted(sizes)))} are not of one shape")
