"""Linear algebra of low-rank products: norms and compression of ``b @ a`` without ever forming it.

All matrices are float64: ``a`` ``[r, n]``, ``b`` ``[m, r]``. With thin QR factorizations ``b = Qb Rb`` and
``a.T = Qa Ra`` the delta is ``Qb (Rb Ra.T) Qa.T``, so its singular values are those of the small core (Golub and
Van Loan, 5.2 and 8.6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Norms:
    """Frobenius norms of ``a``, ``b`` and the delta ``scaling * b @ a``, and the delta's largest singular value."""

    a: float
    b: float
    delta: float
    spectral: float


def norms(a: Matrix, b: Matrix, scaling: float) -> Norms:
    """Measure a factor pair; NaN where values are not finite."""
    values = singular_values(a, b) * abs(scaling)
    spectral = float(values[0]) if values.size else 0.0
    return Norms(_frobenius(a), _frobenius(b), _frobenius(values), spectral)


def singular_values(a: Matrix, b: Matrix) -> Matrix:
    """Return the singular values of ``b @ a``, largest first, at most r of them; NaN where values are not finite."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return np.full(a.shape[0], math.nan)
    _, rb = np.linalg.qr(b)
    _, ra = np.linalg.qr(a.T)
    found: Matrix = np.linalg.svd(rb @ ra.T, compute_uv=False)
    return found


def rank_for(a: Matrix, b: Matrix, tolerance: float) -> tuple[int, float]:
    """Return the smallest rank whose best approximation is within ``tolerance``, and its error.

    Errors are Frobenius norms relative to the delta's (Eckart and Young 1936). Tolerance 0 drops only what rounding
    in double precision cannot tell from nothing. The rank is at least 1.
    """
    values = singular_values(a, b)
    if not np.isfinite(values).all():
        return a.shape[0], 0.0
    total = _frobenius(values)
    if total == 0.0:
        return 1, 0.0
    noise = total * float(np.finfo(np.float64).eps) * max(a.shape[1], b.shape[0])
    tails = [_frobenius(values[rank:]) for rank in range(len(values) + 1)]
    allowed: float = max(tolerance * total, noise)
    rank = next(rank for rank, tail in enumerate(tails) if rank and tail <= allowed)
    return rank, tails[rank] / total


def compress(a: Matrix, b: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """Return the factors of the best approximation of ``b @ a`` of a lower rank.

    Rows and columns beyond the delta's own rank are zero; see :func:`balanced` for the form.
    """
    qb, rb = np.linalg.qr(b)
    qa, ra = np.linalg.qr(a.T)
    u, values, vt = np.linalg.svd(rb @ ra.T, full_matrices=False)
    left, right = qb @ u[:, :rank], vt[:rank] @ qa.T
    some_a, some_b = balanced(left, values[:rank], right)
    small_a, small_b = np.zeros((rank, a.shape[1])), np.zeros((b.shape[0], rank))
    small_a[: len(some_a)], small_b[:, : len(some_a)] = some_a, some_b
    return small_a, small_b


def balanced(u: Matrix, values: Matrix, vt: Matrix) -> tuple[Matrix, Matrix]:
    """Return factors ``(a, b)`` with ``b @ a == u @ diag(values) @ vt``: square roots of the values go to both.

    Each column of ``u`` gets the sign that makes its largest element positive, so that the result does not depend on
    the linear algebra library's choice.
    """
    peaks = np.argmax(np.abs(u), axis=0)
    signs = np.where(u[peaks, np.arange(u.shape[1])] < 0, -1.0, 1.0)
    root = np.sqrt(values) * signs
    return root[:, None] * vt, u * root


def _frobenius(x: Matrix) -> float:
    """Return the Frobenius norm, scaled so that squares neither overflow nor vanish."""
    top = float(np.max(np.abs(x), initial=0.0))
    if top == 0.0 or not math.isfinite(top):
        return top
    return top * float(np.linalg.norm((x / top).ravel()))
