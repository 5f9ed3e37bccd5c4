"""Add deltas to stored weights: the exact weight plus the delta, rounded once to the weight's type.

Sums are formed in float64, where weights of every type are exact, and rounded to nearest, ties to even. All steps work
on blocks that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..dtypes import DType
from .deltas import Delta, Indices, Matrix
from .floats import Bits, arithmetic, encode, rounded, values

BLOCK = 1 << 17
"""Elements per block: one float64 buffer of them is a MiB."""
NEAR = 32
"""How near float32 may come to the middle between two bfloat16 numbers, in its own last places, 65536 to a step."""
TYPES = ("bfloat16", "float16", "float32", "float64")
"""What weights may be stored as; narrower types come with scales that a sum would not know."""

Floats = npt.NDArray[np.floating[npt.NBitBase]]
Adjust = Callable[[Matrix, int, int], Matrix]
Seen = Callable[[int, Bits, Bits, Matrix | None], None]
"""Called with a block's first row, the weight's bits, the merged bits, and the delta where just a delta was added."""


@dataclass(frozen=True, slots=True)
class Change:
    """What merging did to (a part of) one weight.

    ``elements``: of the weight; ``reached``: with a delta other than zero; ``changed``: whose bits differ;
    ``vanished``: reached and not changed, since the delta is below half of the last place. ``error``: the largest
    rounding error; ``weight``, ``delta``: sums of squares. ``broken``: results that are not finite; ``odd``: weights
    that were not finite before, whose bits are kept.
    """

    elements: int = 0
    reached: int = 0
    changed: int = 0
    vanished: int = 0
    error: float = 0.0
    weight: float = 0.0
    delta: float = 0.0
    broken: int = 0
    odd: int = 0

    def plus(self, other: Change) -> Change:
        """Add another part of the same weight."""
        return Change(
            self.elements + other.elements, self.reached + other.reached, self.changed + other.changed,
            self.vanished + other.vanished, max(self.error, other.error), self.weight + other.weight,
            self.delta + other.delta, self.broken + other.broken, self.odd + other.odd,
        )  # fmt: skip


def added(
    weight: Bits,
    dtype: DType,
    deltas: Sequence[Delta],
    *,
    start: int,
    adjust: Adjust | None = None,
    seen: Seen | None = None,
) -> tuple[Bits, Change]:
    """Return the bits of ``weight + sum(deltas)`` and what changed.

    ``weight``: bits ``[rows, columns]``, C-contiguous, the rows from ``start`` on of what the deltas add to.
    ``adjust(sum, first row, last row)`` replaces the sum before rounding (DoRA's normalisation). The result has the
    same bits for any cutting into rows. Elements that were not finite keep their bits; sums that are not finite are
    counted as ``broken``. ``seen`` gets every block as it is done.
    """
    rows, columns = weight.shape
    out: Bits = np.empty(weight.shape, weight.dtype)
    step = max(1, min(BLOCK // max(1, columns), rows))
    room = _Room(step * columns)
    dense = adjust is not None or any(delta.dense for delta in deltas)
    rough = [delta for delta in deltas if delta.rest and adjust is None]
    small = sum(delta.error for delta in rough) * 2.0**24 / NEAR  # below, an error is more than NEAR last places
    total = Change()
    with np.errstate(all="ignore"):
        for low in range(0, rows, step):
            high = min(low + step, rows)
            given, into = weight[low:high], out[low:high]
            sums = _delta(deltas, start + low, start + high, room)
            reached = given.size if dense else int(np.count_nonzero(sums))
            delta = float(np.vdot(sums, sums))
            alone = sums + 0.0 if seen is not None and adjust is None else None
            numbers = room.weight(given, dtype)
            np.add(sums, numbers, out=sums)
            _fix_zeros(sums, given, dtype)
            if adjust is not None:
                sums = adjust(sums, start + low, start + high)
                moved = sums - numbers
                delta = float(np.vdot(moved, moved))
            finer = Finer(tuple(rough), start + low, small)
            total = total.plus(_rounded(sums, given, into, dtype, room, numbers, reached, delta, finer))
            if seen is not None:
                seen(start + low, given, into, alone)
    return out, total


class _Room:
    """Buffers of one call, so that blocks allocate little."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.sums = np.empty(size)
        self.singles = np.empty(size, np.float32)
        self.wide = np.empty(size, np.uint32)
        self.words = np.empty(size, np.uint32)
        self._second = np.empty(0)

    def second(self, size: int) -> Matrix:
        """Return another float64 buffer, made when it is first needed."""
        if not self._second.size:
            self._second = np.empty(self.size)
        return self._second[:size]

    def weight(self, given: Bits, dtype: DType) -> Floats:
        """Return the numbers of a block in a type that holds them exactly."""
        if dtype.name == "bfloat16":  # the upper half of a float32
            wide = self.wide[: given.size].reshape(given.shape)
            np.left_shift(given, 16, out=wide, dtype=np.uint32)
            return wide.view(np.float32)
        typed: Floats = given.view(arithmetic(dtype))
        return typed.astype(np.float32) if dtype.name == "float16" else typed


def _delta(deltas: Sequence[Delta], start: int, stop: int, room: _Room) -> Matrix:
    size = (stop - start) * deltas[0].shape[1]
    sums = deltas[0].rows(start, stop, room.sums[:size].reshape(stop - start, -1))
    for delta in deltas[1:]:
        sums += delta.rows(start, stop, room.second(size).reshape(stop - start, -1))
    return sums


@dataclass(frozen=True, slots=True)
class Finer:
    """Add the deltas' residues to single sums of the block that begins with row ``start``; ``small`` sums need it."""

    deltas: tuple[Delta, ...]
    start: int
    small: float

    def add(self, sums: Matrix, places: Indices) -> Matrix:
        """Return sums, given by their places in the flat block, with the residues."""
        if not self.deltas:
            return sums
        rows, columns = np.divmod(places, self.deltas[0].shape[1])
        for delta in self.deltas:
            sums = sums + delta.residue(rows + self.start, columns)
        return sums


def _fix_zeros(sums: Matrix, given: Bits, dtype: DType) -> None:
    """Make the sum of -0.0 and a zero positive: the sign of a zero delta depends on the order of summation."""
    negative = given == given.dtype.type(1 << (dtype.bits - 1))
    if negative.any():
        sums[negative] += 0.0


def _rounded(
    sums: Matrix, given: Bits, into: Bits, dtype: DType, room: _Room, numbers: Floats, reached: int, delta: float,
    finer: Finer,
) -> Change:  # fmt: skip
    """Round one block into place and measure it."""
    error = (_to_bfloat16 if dtype.name == "bfloat16" else _to_direct)(sums, into, dtype, room, finer)
    weight, broken, odd = float(np.vdot(numbers, numbers)), 0, 0
    if not np.isfinite(error):
        finite = np.isfinite(numbers)
        into[~finite] = given[~finite]
        result = values(into, dtype)
        bad = finite & ~np.isfinite(result)
        broken, odd = int(np.count_nonzero(bad)), int(finite.size - np.count_nonzero(finite))
        weight, delta, error = float(np.sum(numbers[finite].astype(np.float64) ** 2)), 0.0, 0.0
    changed = int(np.count_nonzero(given != into))
    return Change(given.size, reached, changed, max(0, reached - changed), error, weight, delta, broken, odd)


def _to_direct(sums: Matrix, into: Bits, dtype: DType, room: _Room, finer: Finer) -> float:
    """Round by the library's own conversion, which is one rounding from float64; return the largest error."""
    typed = into.view(arithmetic(dtype))
    np.copyto(typed, sums, casting="same_kind")
    np.subtract(sums, typed, out=sums)
    return float(max(sums.max(initial=0.0), -sums.min(initial=0.0)))


def _to_bfloat16(sums: Matrix, into: Bits, dtype: DType, room: _Room, finer: Finer) -> float:
    """Round through float32: its upper half after adding half a place. Return the largest error.

    Where float32 lies between two bfloat16 numbers, or nearly so, and where little is left of what was added, the sum
    is formed with the deltas' residues and rounded from float64: nothing is rounded twice, and few sums need residues.
    """
    singles = room.singles[: sums.size].reshape(sums.shape)
    words = room.words[: sums.size].reshape(sums.shape)
    np.copyto(singles, sums, casting="same_kind")
    np.add(singles.view(np.uint32), np.uint32(0x8000 + NEAR), out=words)
    np.left_shift(words, 16, out=words)
    close = words <= np.uint32((2 * NEAR) << 16)
    if finer.small > 0.0:
        np.bitwise_and(singles.view(np.uint32), np.uint32(0x7FFFFFFF), out=words)
        close |= words.view(np.float32) < np.float32(finer.small)
    hard = np.flatnonzero(close)
    np.add(singles.view(np.uint32), np.uint32(0x8000), out=words)
    np.right_shift(words, 16, out=into, casting="unsafe")
    if hard.size:
        exact = finer.add(sums.reshape(-1)[hard], hard)
        into.reshape(-1)[hard] = encode(rounded(exact, dtype), dtype)
    np.bitwise_and(words, np.uint32(0xFFFF0000), out=words)
    np.subtract(singles, words.view(np.float32), out=singles)
    return float(max(singles.max(initial=0.0), -singles.min(initial=0.0)))
