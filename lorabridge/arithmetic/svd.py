"""Low-rank factors of a matrix that is read in blocks of rows: randomized, seeded, with the error measured afterwards.

The matrix is sketched as ``D @ omega`` with a Gaussian ``omega``, sharpened by power iterations with a QR
factorization after each product (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1). Whatever the sketch missed
is seen in the end: the residual is computed from the matrix and the finished factors, not estimated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .lowrank import Matrix, balanced

Rows = npt.NDArray[np.float64] | npt.NDArray[np.float32]
Blocks = Callable[[], Iterator[tuple[int, Rows]]]
"""Yield (first row, block of rows), from the first row to the last, each time it is called.

Blocks of float32 are multiplied in float32, which halves the time and loses nothing that 16-bit weights ever held;
sums over blocks, norms and the small matrices are float64 in any case.
"""

ITERATIONS = 3
"""Power iterations: each makes the gap between kept and dropped singular values count twice more."""
OVERSAMPLING = 10
"""Columns of the sketch beyond the rank (Halko et al., 4.3: five or ten)."""
DENSE = 256
"""Matrices whose shorter side is up to this are decomposed whole."""
FIRST_SKETCH = 32


@dataclass(frozen=True, slots=True)
class Factors:
    """``b @ a`` near a matrix: ``a`` ``[rank, columns]``, ``b`` ``[rows, rank]``, float64.

    ``total``: Frobenius norm of the matrix. ``dropped``: what the decomposition itself says was left out, before the
    factors are rounded to any type.
    """

    a: Matrix
    b: Matrix
    total: float
    dropped: float

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return self.a.shape[0]


def factorize(
    blocks: Blocks, shape: tuple[int, int], *, rank: int | None = None, energy: float | None = None, seed: int = 0
) -> Factors:
    """Return the best factors of a rank, or of the smallest rank that retains a share of the energy.

    ``energy``: share of the squared Frobenius norm, above 0 and up to 1. Where both are given the rank is a limit. The
    same matrix, seed and linear algebra library give the same bits. The rank is at least 1.
    """
    if rank is None and energy is None:
        raise ValueError("a rank or an energy is needed")
    total = math.sqrt(sum(_square(block) for _, block in blocks()))
    short = min(shape)
    limit = min(short, rank) if rank is not None else short
    width = limit + OVERSAMPLING if energy is None else min(limit, FIRST_SKETCH) + OVERSAMPLING
    while short > DENSE and 2 * width <= short:
        u, values, vt = _sketched(blocks, shape, width, seed)
        chosen, reached = _choose(values[: width - OVERSAMPLING], total, limit, energy)
        if reached:
            return _factors(u, values, vt, chosen, total)
        width = 2 * (width - OVERSAMPLING) + OVERSAMPLING
    whole = np.empty(shape)
    for first, block in blocks():
        whole[first : first + block.shape[0]] = block
    u, values, vt = np.linalg.svd(whole, full_matrices=False)
    chosen, _ = _choose(values, total, limit, energy)
    return _factors(u, values, vt, chosen, total)


def residual(blocks: Blocks, a: Matrix, b: Matrix) -> float:
    """Return the Frobenius norm of the matrix minus ``b @ a``, computed block by block."""
    square = 0.0
    for first, block in blocks():
        square += _square(block - _typed(b[first : first + block.shape[0]], block) @ _typed(a, block))
    return math.sqrt(square)


def _square(block: Rows) -> float:
    """Return the sum of squares, added up in double precision."""
    return float(np.sum(np.multiply(block, block, dtype=np.float64)))


def _typed(x: Matrix, like: Rows) -> Rows:
    return x if like.dtype == np.float64 else x.astype(np.float32)


def _choose(values: Matrix, total: float, limit: int, energy: float | None) -> tuple[int, bool]:
    """Return the rank, and whether the values at hand suffice to decide it."""
    if energy is None:
        return max(1, min(limit, len(values))), True
    if total == 0.0:
        return 1, True
    noise = float(np.finfo(np.float64).eps) * max(1, len(values))
    kept = np.cumsum((values / total) ** 2)
    found = int(np.searchsorted(kept, min(energy, 1.0) - noise)) + 1
    return max(1, min(found, limit, len(values))), found <= len(values) or len(values) >= limit


def _sketched(blocks: Blocks, shape: tuple[int, int], width: int, seed: int) -> tuple[Matrix, Matrix, Matrix]:
    """Return the leading singular triples that a sketch of some width captures."""
    omega = np.random.Generator(np.random.PCG64(seed)).standard_normal((shape[1], width))
    q, _ = np.linalg.qr(_times(blocks, shape[0], omega))
    for _ in range(ITERATIONS):
        wide, _ = np.linalg.qr(_transposed_times(blocks, shape[1], q))
        q, _ = np.linalg.qr(_times(blocks, shape[0], wide))
    right, core = np.linalg.qr(_transposed_times(blocks, shape[1], q))
    u, values, vt = np.linalg.svd(core.T)
    return q @ u, values, vt @ right.T


def _times(blocks: Blocks, rows: int, x: Matrix) -> Matrix:
    out = np.empty((rows, x.shape[1]))
    for first, block in blocks():
        out[first : first + block.shape[0]] = block @ _typed(x, block)
    return out


def _transposed_times(blocks: Blocks, columns: int, x: Matrix) -> Matrix:
    out = np.zeros((columns, x.shape[1]))
    for first, block in blocks():
        out += block.T @ _typed(x[first : first + block.shape[0]], block)
    return out


def _factors(u: Matrix, values: Matrix, vt: Matrix, rank: int, total: float) -> Factors:
    a, b = balanced(u[:, :rank], values[:rank], vt[:rank])
    kept = float(np.sum(values[:rank] ** 2))
    return Factors(a, b, total, math.sqrt(max(total**2 - kept, 0.0)))
