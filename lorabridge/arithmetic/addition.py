"""Add deltas to stored weights: the exact weight plus the delta, rounded once to the weight's type.

Sums are formed in float64, where weights of every type are exact, and rounded to nearest, ties to even; bfloat16 has
a way of its own there (``lorabridge.arithmetic.narrow``). All steps work on blocks that stay in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..dtypes import DType
from .deltas import Delta, Matrix
from .floats import Bits, arithmetic, values
from .narrow import ROOM, Adjust, Narrowing, Room, squares, widened

BLOCK = 1 << 18
"""Elements per block: they stay in the last cache, and are so many that threads seldom wait for the interpreter."""
TYPES = ("bfloat16", "float16", "float32", "float64")
"""What weights may be stored as; narrower types come with scales that a sum would not know."""

Floats = npt.NDArray[np.floating[npt.NBitBase]]
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
    spans = [(low, min(low + step, rows)) for low in range(0, rows, step)]
    room = ROOM
    room.fit(step * columns)
    with np.errstate(all="ignore"):
        if dtype.name == "bfloat16":
            return out, _narrow(weight, out, deltas, spans, start, adjust, seen, room)
        total = Change()
        for low, high in spans:
            given, into = weight[low:high], out[low:high]
            sums, reached = _sum(deltas, start + low, start + high, room, adjust)
            delta = float(np.vdot(sums, sums))
            alone = sums + 0.0 if seen is not None and adjust is None else None
            numbers: Floats = given.view(arithmetic(dtype))
            numbers = numbers.astype(np.float32) if dtype.name == "float16" else numbers
            np.add(sums, numbers, out=sums)
            _fix_zeros(sums, given, dtype)
            if adjust is not None:
                sums = adjust(sums, start + low, start + high)
                moved = sums - numbers
                delta = float(np.vdot(moved, moved))
            total = total.plus(_rounded(sums, given, into, dtype, numbers, reached, delta))
            if seen is not None:
                seen(start + low, given, into, alone)
    return out, total


def _narrow(
    weight: Bits, out: Bits, deltas: Sequence[Delta], spans: Sequence[tuple[int, int]], start: int,
    adjust: Adjust | None, seen: Seen | None, room: Room,
) -> Change:  # fmt: skip
    """Add to bfloat16 weights."""
    work = Narrowing(weight, out, deltas if adjust is None else (), start, room)
    reached = 0
    for low, high in spans:
        given = weight[low:high]
        sums, count = _sum(deltas, start + low, start + high, room, adjust)
        reached += count
        if adjust is None:
            work.add(low, high, sums)
        else:
            numbers = widened(given, room.wide[: given.size].reshape(given.shape))
            work.weight += squares(numbers)
            sums += numbers
            sums = adjust(sums, start + low, start + high)
            moved = (sums - numbers).reshape(-1)
            work.delta += float(np.vdot(moved, moved))
            work.put(low, high, sums)
        if seen is not None:
            work.settle(high)
            seen(start + low, given, out[low:high], None if adjust is not None else np.add(sums, 0.0, out=sums))
    work.settle(len(weight))
    vanished = max(0, reached - work.changed)
    return Change(
        weight.size, reached, work.changed, vanished, work.error, work.weight, work.delta, work.broken, work.odd
    )


def _sum(
    deltas: Sequence[Delta], start: int, stop: int, room: Room, adjust: Adjust | None
) -> tuple[Matrix, int]:  # fmt: skip
    """Return rows of the sum of deltas, and how many of their elements are not zero."""
    size = (stop - start) * deltas[0].shape[1]
    sums = deltas[0].rows(start, stop, room.sums[:size].reshape(stop - start, -1))
    for delta in deltas[1:]:
        sums += delta.rows(start, stop)
    dense = adjust is not None or any(delta.dense for delta in deltas)
    return sums, size if dense else int(np.count_nonzero(sums))


def _fix_zeros(sums: Matrix, given: Bits, dtype: DType) -> None:
    """Make the sum of -0.0 and a zero positive: the sign of a zero delta depends on the order of summation."""
    negative = given == given.dtype.type(1 << (dtype.bits - 1))
    if negative.any():
        sums[negative] += 0.0


def _rounded(
    sums: Matrix, given: Bits, into: Bits, dtype: DType, numbers: Floats, reached: int, delta: float
) -> Change:  # fmt: skip
    """Round one block into place, by the library's own conversion, which is one rounding, and measure it."""
    typed = into.view(arithmetic(dtype))
    np.copyto(typed, sums, casting="same_kind")
    np.subtract(sums, typed, out=sums)
    error = float(max(sums.max(initial=0.0), -sums.min(initial=0.0)))
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
