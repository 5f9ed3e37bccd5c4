"""The delta of a low-rank update, with the same bits on every machine.

A matrix product in floating point depends on the order of summation, hence on the BLAS build, its threads and how rows
are cut into blocks. Here it cannot: factors are brought to 24-bit fixed point (a power-of-two unit per row of ``b``
and per column of ``a``), so every product is an integer below 2**48 of one common unit, and up to 32 of them add up
to at most 2**53: each partial sum is exact in float64, whatever the order, with or without fused multiply-add. Longer
sums are cut into slices of 32 ranks, added in a fixed order. With ``exact`` the residues of that rounding are kept to
24 further bits and their products with the factors are added too. The idea is that of error-free matrix products
(Ozaki, Ogita, Oishi and Rump 2012); all other steps are single IEEE operations on elements.

Where rounding to a narrow type leaves no doubt, the residues need not be known: :attr:`Delta.doubt` bounds them.

Three laws follow, and tests hold them: rows computed alone equal the same rows of the whole; the transposed update is
the transpose of the update; and factors that were stacked under one module (ranks whose rows of ``b`` do not meet)
give the bits that each of them gives alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]

DIGITS = 24
"""Bits of the fixed-point factors."""
SLICE = 32
"""Ranks whose products are added exactly: 32 * 2**24 * 2**24 = 2**53."""
_GATHERED = 1 << 13
"""Single elements that are computed at a time."""
_ABOVE = 1 + 2.0**-20
"""A factor that makes up for the rounding of a bound."""


@dataclass(frozen=True, slots=True)
class Factors:
    """One product ``b @ a`` on the output rows from ``start`` on: ``b`` ``[rows, rank]``, ``a`` ``[rank, columns]``."""

    b: Matrix
    a: Matrix
    start: int = 0


@dataclass(frozen=True, slots=True)
class Part:
    """One exact product: ``left @ right`` on an interval of rows and of columns."""

    left: Matrix
    right: Matrix
    rows: tuple[int, int]
    columns: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rest:
    """What a part lacks: ``left @ right.T``, where each factor stands beside the other's residue.

    Residues have at most 23 bits, so that twice as many products still add up exactly.
    """

    left: Matrix
    right: Matrix
    rows: tuple[int, int]
    columns: tuple[int, int]

    def at(self, rows: Indices, columns: Indices) -> Matrix:
        """Return single elements."""
        inside = (rows >= self.rows[0]) & (rows < self.rows[1])
        inside &= (columns >= self.columns[0]) & (columns < self.columns[1])
        left, right = self.left[rows[inside] - self.rows[0]], self.right[columns[inside] - self.columns[0]]
        out = np.zeros(rows.shape)
        out[inside] = np.einsum("ij,ij->i", left, right)
        return out


@dataclass(frozen=True, slots=True)
class Delta:
    """``scaling * sum(b @ a)`` of a shape, made ready: any rows of it can be computed, from any thread.

    Made by :func:`prepare`. ``shape``: of the result, after the transposition if there is one. ``dense``: no row and no
    column is zero by construction. ``rest``: the products that ``exact`` would add. No element is larger than
    ``bound``, and ``exact`` would change none by more than ``doubt``; both are NaN or infinite where factors are.
    """

    shape: tuple[int, int]
    parts: tuple[Part, ...]
    scaling: float
    dense: bool
    rest: tuple[Rest, ...] = ()
    bound: float = math.nan
    doubt: float = math.nan

    @property
    def nbytes(self) -> int:
        """Bytes of the prepared factors."""
        return sum(part.left.nbytes + part.right.nbytes for part in self.parts)

    def rows(self, start: int, stop: int, out: Matrix | None = None) -> Matrix:
        """Return rows [start, stop) as float64 ``[stop - start, columns]``, in ``out`` where given (C-contiguous).

        The sign of a zero is not determined; adding 0.0 makes it positive (:func:`delta_rows` does).
        """
        out = np.empty((stop - start, self.shape[1])) if out is None else out
        whole = (0, self.shape[1])
        first = True
        for part in self.parts:
            low, high = max(start, part.rows[0]), min(stop, part.rows[1])
            if low >= high:
                continue
            left = part.left[low - part.rows[0] : high - part.rows[0]]
            if first and (low, high) == (start, stop) and part.columns == whole:
                np.matmul(left, part.right, out=out)
            else:
                if first:
                    out[...] = 0.0
                out[low - start : high - start, slice(*part.columns)] += left @ part.right
            first = False
        if first:
            out[...] = 0.0
        if self.scaling != 1.0:
            np.multiply(out, self.scaling, out=out)
        return out

    def residue(self, rows: Indices, columns: Indices) -> Matrix:
        """Return what ``exact`` would add to single elements, given by their row and column numbers."""
        out = np.zeros(rows.shape)
        for low in range(0, rows.size, _GATHERED):
            part = slice(low, low + _GATHERED)
            for rest in self.rest:
                out[part] += rest.at(rows[part], columns[part])
        return out * self.scaling

    def columns(self, start: int, stop: int) -> Matrix:
        """Return columns [start, stop) of all rows: the same bits as :meth:`rows` gives for them."""
        narrow = [
            Part(part.left, part.right[:, max(start - low, 0) : stop - low], part.rows, (max(start, low) - start, high))
            for part in self.parts
            if (low := part.columns[0]) < stop and (high := min(stop, part.columns[1]) - start) > 0
        ]
        return Delta((self.shape[0], stop - start), tuple(narrow), self.scaling, False).rows(0, self.shape[0])


def prepare(
    terms: Sequence[Factors], height: int, scaling: float = 1.0, *, exact: bool = False, transposed: bool = False
) -> Delta:
    """Make the delta ``[height, columns]`` of some terms ready; ``transposed``: its transpose, ``[columns, height]``.

    All terms have the same columns. ``scaling`` multiplies the finished sum once (a power of two goes into the
    factors, which is the same). Not finite factors give not finite deltas. Raises ValueError for shapes
    that do not fit.
    """
    if not terms:
        raise ValueError("a delta needs at least one term")
    columns = terms[0].a.shape[1]
    pairs = []
    for term in terms:
        (rows, rank), (inner, width) = term.b.shape, term.a.shape
        if rank != inner or width != columns or term.start < 0 or term.start + rows > height:
            raise ValueError(
                f"factors {term.b.shape} @ {term.a.shape} at {term.start} do not fit [{height}, {columns}]"
            )
        pairs += [(b, a, term.start) for b, a in _separate(term.b, term.a)]
    folded = scaling if abs(math.frexp(scaling)[0]) == 0.5 else 1.0
    found = [_products(b, a, start, folded, transposed) for b, a, start in pairs]
    parts, rest = [p for high, _, _ in found for p in high], [p for _, low, _ in found for p in low]
    if exact:
        parts, rest = [p for high, low, _ in found for p in (*high, *map(_as_part, low))], []
    shape = (columns, height) if transposed else (height, columns)
    dense = bool(parts) and scaling != 0.0 and _dense(parts, shape)
    size = abs(scaling / folded) * _ABOVE
    bound, doubt = (sum(x[i] for _, _, x in found) * size for i in (0, 1))
    return Delta(shape, tuple(parts), scaling / folded, dense, tuple(rest), bound, 0.0 if exact else doubt)


def _as_part(rest: Rest) -> Part:
    return Part(rest.left, np.ascontiguousarray(rest.right.T), rest.rows, rest.columns)


def _longest(x: Matrix) -> float:
    """Return the largest Euclidean norm of a column, or somewhat more."""
    top = float(np.max(np.abs(x), initial=0.0))
    if top == 0.0 or not math.isfinite(top):
        return top
    scaled = x * (1.0 / top) if top > 2.0**-1000 else np.ones(x.shape)
    np.multiply(scaled, scaled, out=scaled)
    return top * math.sqrt(float(np.max(np.add.reduce(scaled, axis=0)))) * _ABOVE


def _dense(parts: Sequence[Part], shape: tuple[int, int]) -> bool:
    rows = np.zeros(shape[0], bool)
    columns = np.zeros(shape[1], bool)
    for part in parts:
        rows[slice(*part.rows)] |= (part.left != 0.0).any(axis=1)
        columns[slice(*part.columns)] |= (part.right != 0.0).any(axis=0)
    return bool(rows.all() and columns.all())


def product(b: Matrix, a: Matrix, *, exact: bool = False) -> Matrix:
    """Return ``b @ a``: ``[rows, rank] @ [rank, columns]`` in float64, the same bits everywhere.

    The error of an element is below rank * 2**-24 of its row's largest ``b`` times its column's largest ``a``; with
    ``exact`` below rank * 2**-48 of it, or a rounding of float64.
    """
    return delta_rows([Factors(b, a)], scaling=1.0, start=0, stop=b.shape[0], exact=exact)


def delta_rows(
    terms: Sequence[Factors], *, scaling: float, start: int, stop: int, height: int | None = None, exact: bool = False,
    transposed: bool = False,
) -> Matrix:  # fmt: skip
    """Return rows [start, stop) of ``scaling * sum(b @ a)`` as float64; zeros are positive.

    ``height``: output rows of the whole module, by default those that the terms reach. ``transposed``: rows are those
    of the transposed delta. Where many blocks of one delta are needed, :func:`prepare` it once.
    """
    height = max(term.start + term.b.shape[0] for term in terms) if height is None else height
    out = prepare(terms, height, scaling, exact=exact, transposed=transposed).rows(start, stop)
    return np.add(out, 0.0, out=out)


def _separate(b: Matrix, a: Matrix) -> list[tuple[Matrix, Matrix]]:
    """Take factors apart that share no row of ``b``: stacked by a fusion, they were independent before it."""
    used = b != 0.0
    alive = used.any(axis=0)
    if b.shape[1] == 1 or bool((used.all(axis=1)).any()):
        return [(b, a)]
    meets = (used.T.astype(np.float32) @ used.astype(np.float32)) > 0.0
    groups: list[list[int]] = []
    left = [rank for rank in range(b.shape[1]) if alive[rank]]
    while left:
        reach = np.zeros(b.shape[1], bool)
        reach[left[0]] = True
        size = 0
        while size != (size := int(reach.sum())):
            reach = meets[reach].any(axis=0)
        groups.append([rank for rank in left if reach[rank]])
        left = [rank for rank in left if not reach[rank]]
    if len(groups) == 1 and len(groups[0]) == b.shape[1]:
        return [(b, a)]
    return [(np.ascontiguousarray(b[:, group]), np.ascontiguousarray(a[group])) for group in groups]


def _products(
    b: Matrix, a: Matrix, start: int, scaling: float, transposed: bool
) -> tuple[list[Part], list[Rest], tuple[float, float]]:  # fmt: skip
    """Return the exact products of the high parts, and those of high parts with residues, whose sum is ``b @ a``.

    The numbers bound the elements of the former and of the latter.
    """
    rows = np.flatnonzero((b != 0.0).any(axis=1))
    if not rows.size or not b.shape[1]:
        return [], [], (0.0, 0.0)
    low, high = int(rows[0]), int(rows[-1]) + 1
    where, columns = (start + low, start + high), (0, a.shape[1])
    b0, b1 = _fixed(np.ascontiguousarray(b[low:high].T), scaling)
    a0, a1 = _fixed(a, 1.0)
    main, rest = [], []
    lacking = bool(b1.any() or a1.any())
    for k in range(0, a.shape[0], SLICE):
        part = slice(k, k + SLICE)
        if transposed:
            main.append(Part(np.ascontiguousarray(a0[part].T), b0[part], columns, where))
        else:
            main.append(Part(np.ascontiguousarray(b0[part].T), a0[part], where, columns))
        if lacking:
            left, right = (np.ascontiguousarray(np.vstack(x).T) for x in ((b0[part], b1[part]), (a1[part], a0[part])))
            rest.append(Rest(right, left, columns, where) if transposed else Rest(left, right, where, columns))
    largest = _longest(b0), _longest(a0)
    return main, rest, (largest[0] * largest[1], largest[0] * _longest(a1) + _longest(b1) * largest[1])


def _fixed(x: Matrix, scaling: float) -> tuple[Matrix, Matrix]:
    """Round columns to 24-bit fixed point, and what is left to 24 further bits; ``scaling``: a power of two."""
    with np.errstate(all="ignore"):
        top = np.maximum(np.max(x, axis=0, initial=0.0), -np.min(x, axis=0, initial=0.0))
        _, exponent = np.frexp(top)
        if np.abs(exponent).max(initial=0) > 900 or not 2.0**-99 < abs(scaling) < 2.0**99:  # far powers of two
            high = np.ldexp(np.rint(np.ldexp(x, DIGITS - exponent)), exponent - DIGITS)
            low = np.ldexp(np.rint(np.ldexp(x - high, 2 * DIGITS - exponent)), exponent - 2 * DIGITS)
            return high * scaling, low * scaling
        unit = np.ldexp(1.0, exponent - DIGITS)
        low = x * (1.0 / unit)
        high = np.rint(low)
        low -= high
        low *= 2.0**DIGITS
        np.rint(low, out=low)
        low *= unit * (scaling * 2.0**-DIGITS)
        high *= unit * scaling
    return high, low
