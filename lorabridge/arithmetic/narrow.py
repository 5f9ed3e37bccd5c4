"""Add deltas to bfloat16 weights: in float32 wherever that decides the rounding, and exactly where it does not.

The merged number is the sum of weight, delta and the delta's residue, rounded once. Nearly always its approximation in
float32 is so far from the middle between two bfloat16 numbers that it rounds to the same: a bound on what the
approximation is off by tells where. The few elements that are left are formed in float64, and the very few where the
residue can still decide, with the residue. The result therefore depends on no constant in this file; the time does.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from ..dtypes import BY_NAME
from .deltas import Delta, Indices, Matrix
from .floats import Bits, Mask, arithmetic, encode, rounded

Words = npt.NDArray[np.uint16]
Singles = npt.NDArray[np.float32]
Adjust = Callable[[Matrix, int, int], Matrix]

BFLOAT16 = BY_NAME["bfloat16"]
HALF = 0x8000
"""Half a place of bfloat16, in last places of float32."""
INFINITE = 0x7F80
USUAL = 8
"""Numbers more than so many times as large as the weights on average are formed exactly: the others' bound is tight."""
_BIAS, _PLACES = 127, 8
"""A number of biased exponent E is at most 2 ** (E - 127 - 8) from the nearest bfloat16."""
_LEAST = 2.0**-125
"""Smaller numbers are, or may become, subnormal: their places are not those that float64's bits show."""
_LARGEST = 2.0**127
"""Below this, no delta overflows float32."""
_SLACK = 1 + 2.0**-10


class Room(threading.local):
    """Buffers of one thread, kept from call to call: fresh memory would cost as much as the arithmetic."""

    def __init__(self) -> None:
        self.size = -1

    def fit(self, size: int) -> None:
        """Make room for blocks of ``size`` elements."""
        if size <= self.size < 4 * size + 1024:
            return
        self.size = size
        self.sums = np.empty(size)
        self.singles = np.empty(size, np.float32)
        self.wide = np.empty(size, np.uint32)
        self.narrow = np.empty(size, np.uint16)
        self.hard = np.empty(size, bool)
        self.mark = np.empty(size, bool)


ROOM = Room()


class Narrowing:
    """The addition to the rows of one weight, block after block.

    ``weight``, ``out``: bits ``[rows, columns]``, C-contiguous; ``deltas``: what is added, whose rows count from
    ``start``; none of them where the sums that blocks come with are finished already. ``settle`` has to be called
    before results are used. The counts are those of :class:`lorabridge.arithmetic.addition.Change`.
    """

    def __init__(self, weight: Bits, out: Bits, deltas: Sequence[Delta], start: int, room: Room) -> None:
        self.changed = self.broken = self.odd = 0
        self.weight = self.delta = self.error = 0.0
        self._weight, self._out = cast("Words", weight), cast("Words", out)
        self._deltas = [delta for delta in deltas if delta.rest]
        self._start = start
        self._room = room
        doubt = math.fsum(delta.doubt for delta in deltas)
        bound = math.fsum(delta.bound for delta in deltas) + doubt
        self._doubt = doubt * _SLACK if bound < _LARGEST else math.inf
        self._margin, self._high = _margin(self._doubt + bound * 2.0**-24 + 2.0**-148, bound, weight)
        self._places: list[Indices] = []
        self._numbers: list[Matrix] = []
        self._pending = self._settled = 0
        self._wild = False

    def add(self, low: int, high: int, delta: Matrix) -> None:
        """Add a delta ``[high - low, columns]`` to rows [low, high); sums of squares are measured on the way."""
        size = delta.size
        given = self._weight[low:high].reshape(-1)
        singles, wide = self._room.singles[:size], self._room.wide[:size]
        np.copyto(singles, delta.reshape(-1), casting="same_kind")
        self.delta += squares(singles)
        numbers = widened(given, wide)
        self.weight += squares(numbers)
        np.add(numbers, singles, out=singles)
        places = self._round(low, high)
        exact = delta.reshape(-1)[places]
        exact += widened(given[places])
        self._defer(low, high, places, exact)

    def put(self, low: int, high: int, sums: Matrix) -> None:
        """Round finished sums into rows [low, high)."""
        np.copyto(self._room.singles[: sums.size], sums.reshape(-1), casting="same_kind")
        places = self._round(low, high)
        self._defer(low, high, places, sums.reshape(-1)[places])

    def _round(self, low: int, high: int) -> Indices:
        """Round the block's singles into place; return the places where the result is open.

        The exact sums lie between the singles less and the singles plus the margin. Middles between two bfloat16
        numbers, and these numbers, are those whose 15 last bits are zero: where the 17 first bits of both ends are the
        same, neither is in between.
        """
        into = self._out[low:high].reshape(-1)
        room, size = self._room, into.size
        singles, wide, hard = room.singles[:size], room.wide[:size], room.hard[:size]
        bits = singles.view(np.uint32)
        np.subtract(singles, self._margin, out=wide.view(np.float32))
        np.add(singles, self._margin, out=singles)
        np.bitwise_xor(wide, bits, out=wide)
        np.greater_equal(wide, np.uint32(HALF), out=hard)
        np.add(bits, np.uint32(HALF), out=wide)
        np.right_shift(wide, 16, out=into, casting="unsafe")
        top = max(int(into.view(np.int16).max()), int(into.max()) & 0x7FFF)
        if top > self._high:
            hard |= self._magnitudes(into) > self._high << 1
        if top >= INFINITE:
            self._wild = True
        else:
            self._measure(singles, into, top)
        places = np.flatnonzero(hard)
        np.not_equal(self._weight[low:high].reshape(-1), into, out=hard)
        self.changed += int(np.count_nonzero(hard))
        return places

    def _magnitudes(self, into: Words) -> Words:
        """Return bits without their signs, shifted to the top."""
        return np.left_shift(into, 1, out=self._room.narrow[: into.size])

    def _measure(self, singles: Singles, into: Words, top: int) -> None:
        """Find the largest rounding error, looking only where it can be larger than the largest so far.

        ``top``: the bits of the largest result.
        """
        bound = math.ldexp(1.0, max(top >> 7, 1) - _BIAS - _PLACES)
        if bound <= self.error * (1 + 2.0**-7):  # near enough: reports show two digits
            return
        if self.error == 0.0:
            self.error = min(bound, _largest(singles[: 1 << 14], into[: 1 << 14]))
        least = math.frexp(self.error)[1] + _BIAS + _PLACES if self.error else 0
        where = np.flatnonzero(self._magnitudes(into) >= max(least, 0) << 8)
        self.error = max(self.error, min(bound, _largest(singles[where], into[where])))

    def _defer(self, low: int, high: int, places: Indices, exact: Matrix) -> None:
        """Keep what is open, to settle it together: a few calls for many blocks."""
        self._places.append(places + low * self._weight.shape[1])
        self._numbers.append(exact)
        self._pending += places.size
        if self._pending > self._room.size // 4:
            self.settle(high)

    def settle(self, high: int) -> None:
        """Finish all rows before ``high``."""
        if self._pending:
            places, exact = np.concatenate(self._places), np.concatenate(self._numbers)
            exact += 0.0  # the sign of a zero delta is not determined
            bits, unsure = decided(exact, self._doubt)
            again = np.flatnonzero(unsure)
            bits[again] = encode(rounded(self._finer(exact[again], places[again]), BFLOAT16), BFLOAT16)
            self._replace(places, bits)
            self._wild |= bool(((bits & 0x7FFF) >= INFINITE).any())
            self._places, self._numbers, self._pending = [], [], 0
        if self._wild:
            self._repair(self._settled, high)
        self._settled, self._wild = high, False

    def _replace(self, places: Indices, bits: Words) -> None:
        """Put bits into single places, and correct the count of changes."""
        given, into = self._weight.reshape(-1)[places], self._out.reshape(-1)
        self.changed += int(np.count_nonzero(bits != given) - np.count_nonzero(into[places] != given))
        into[places] = bits

    def _finer(self, sums: Matrix, places: Indices) -> Matrix:
        """Add the deltas' residues to single sums."""
        rows, columns = np.divmod(places, self._weight.shape[1])
        for delta in self._deltas:
            sums = sums + delta.residue(rows + self._start, columns)
        return sums

    def _repair(self, low: int, high: int) -> None:
        """Give numbers that were not finite before their bits back, and count those that have become so."""
        for row in range(low, high):
            given = self._weight[row]
            odd = np.flatnonzero((given & 0x7FFF) >= INFINITE)
            self._replace(odd + row * given.size, given[odd])
            self.odd += odd.size
            self.broken += int(np.count_nonzero((self._out[row] & 0x7FFF) >= INFINITE)) - odd.size


def _margin(bound: float, delta: float, weight: Bits) -> tuple[np.float32, int]:
    """Return how far from their float32 sums exact ones can be, and the bits of the largest sum for which this holds.

    ``bound``: what sums are off by, apart from their own rounding, which is half a last place; adding the margin is
    rounded too. ``delta``: the largest delta. Any choice of the largest sum gives the same result.
    """
    flat = weight.reshape(-1)
    sample = np.abs(widened(flat[:: max(1, flat.size // 4096)]))
    finite = sample[np.isfinite(sample)]
    usual = float(np.mean(finite, dtype=np.float64)) if finite.size else 0.0
    if not math.isfinite(bound):
        return np.float32(np.inf), 0
    largest = np.array(min(max(USUAL * usual, 2 * delta), _LARGEST), np.float32)
    margin = np.float32((bound + float(largest) * 2.0**-23 * (1 + 2.0**-5)) * _SLACK)
    return np.nextafter(margin, np.float32(np.inf)), int(largest.view(np.uint32)) >> 16


def decided(numbers: Matrix, doubt: float) -> tuple[Words, Mask]:
    """Return numbers rounded to bfloat16, and where one that is ``doubt`` away could round otherwise.

    Half a place is added to the bits of both ends of the interval: where their upper parts are the same, no middle
    between two bfloat16 numbers lies inside.
    """
    margin = np.abs(numbers)
    unsure: Mask = margin < _LEAST
    margin *= 2.0**-50
    margin += doubt
    ends = []
    for end in (numbers - margin, numbers + margin):
        bits = end.view(np.uint64)
        bits += np.uint64(1 << 44)
        bits >>= np.uint64(45)
        ends.append(bits)
    unsure |= ends[0] != ends[1]
    ends[0] <<= np.uint64(45)
    near = ends[0].view(np.float64).astype(np.float32).view(np.uint32)
    return (near >> np.uint32(16)).astype(np.uint16), unsure


def widened(bits: Bits, out: npt.NDArray[np.uint32] | None = None) -> Singles:
    """Return bfloat16 numbers as float32."""
    wide: Singles = np.empty(bits.shape, np.float32) if out is None else out.view(np.float32)
    np.copyto(wide, bits.view(arithmetic(BFLOAT16)), casting="unsafe")
    return wide


def squares(numbers: Singles) -> float:
    """Return the sum of squares of the finite numbers."""
    total = float(np.vdot(numbers, numbers))
    if not 1e-30 < total < 1e30:
        wide = numbers[np.isfinite(numbers)].astype(np.float64)
        total = float(np.vdot(wide, wide))
    return total


def _largest(singles: Singles, into: Words) -> float:
    """Return the largest difference between numbers and what they were rounded to."""
    errors = singles - widened(into)
    return float(max(errors.max(initial=0.0), -errors.min(initial=0.0)))
