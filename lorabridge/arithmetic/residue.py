"""What an addition's rounding loses: the difference between the true bits and the best inverse, by ordinals.

Rounding ``W + delta`` to ``M`` loses bits of ``W`` only where ``M`` has a larger exponent than ``W``; elsewhere
``M - delta`` rounds to ``W`` itself. The inverse's exponent therefore tells how many bits are missing, and how many
candidates there are on which side of the rounded inverse: these contexts come from ``M`` and the delta alone, so that
the reader has them too, and only under them is the residue coded. Whatever else differs is listed by position.
Nothing here assumes that the inverse is good: any bits come back, at worst in many bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from ..dtypes import DType
from . import entropy
from .floats import LAYOUTS, Bits, Numbers, bounded, rounded, unfit, values
from .floats import encode as encoded

Words = npt.NDArray[np.unsignedinteger[npt.NBitBase]]
Delta = Callable[[int, int], Numbers]
"""The exact delta of rows [start, stop), bit-identical on every machine."""
PIECE = 1 << 16
"""Elements that are predicted at a time, so that the doubles stay in the cache."""
_GAPS = 24
_POSITIONS, _LISTED = 0, 25
"""Contexts: distances of listed elements, 1 to 24 for exponents that far below, the listed elements' residues."""
_COUNT = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Prediction:
    """The best inverse of some elements, and the contexts of those that rounding has blurred.

    ``near``: its bits, flat; ``where``: indices of the blurred ones, with their contexts; ``up``: the exact inverse
    is at or above the rounded one; ``zero``: the code that the value +0 would have.
    """

    near: Words
    where: npt.NDArray[np.int64]
    contexts: npt.NDArray[np.uint8]
    up: npt.NDArray[np.bool_]
    zero: npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Extract:
    """The residue of ``size`` elements that follow each other: codes with contexts, and a list of the unforeseen."""

    size: int
    codes: npt.NDArray[np.uint64]
    contexts: npt.NDArray[np.uint8]
    places: npt.NDArray[np.int64]
    listed: npt.NDArray[np.uint64]


def ordinals(bits: Words) -> Words:
    """Map sign-magnitude bits, any bits, one to one to unsigned integers in the order of the numbers, -0 below +0."""
    width = bits.dtype.itemsize * 8
    negative = bits >> (width - 1) != 0
    return np.where(negative, ~bits, bits | (1 << (width - 1)))


def unordinals(keys: Words) -> Words:
    """Undo :func:`ordinals`."""
    width = keys.dtype.itemsize * 8
    positive = keys >> (width - 1) != 0
    return np.where(positive, keys ^ (1 << (width - 1)), ~keys)


def inverse(merged: Words, delta: Numbers, dtype: DType) -> tuple[Words, Numbers]:
    """Return the bits nearest to ``merged - delta``, and that difference itself; not a number stays what it is.

    The result is a function of the arguments alone, on every machine: one float64 subtraction and IEEE roundings.
    """
    near: Bits
    with np.errstate(all="ignore"):
        if dtype.name == "bfloat16":
            exact = (merged.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
            exact -= delta + 0.0  # a zero delta may have either sign
            wide = exact.astype(np.float32).view(np.uint32)
            wide += np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))
            near = (wide >> np.uint32(16)).astype(np.uint16)
        elif dtype.name in ("float16", "float32", "float64"):
            exact = merged.view(np.dtype(dtype.name)).astype(np.float64)
            exact -= delta + 0.0
            near = exact.astype(np.dtype(dtype.name)).view(dtype.carrier())
        else:
            exact = values(merged, dtype) - (delta + 0.0)
            approximate = rounded(exact, dtype)
            near = encoded(bounded(approximate, unfit(exact, approximate, dtype), dtype, "saturate"), dtype)
    lost = ~np.isfinite(exact)
    if lost.any():
        near[lost] = merged[lost]
    return cast("Words", near), exact


def predict(merged: Bits, delta: Numbers | None, dtype: DType) -> Prediction:
    """Predict base elements from merged ones; without a delta they are taken as they are."""
    flat = _flat(merged)
    if delta is None:
        none = np.empty(0, np.int64)
        return Prediction(flat, none, none.astype(np.uint8), none.astype(bool), none.astype(np.uint64))
    near, exact = inverse(flat, delta.reshape(-1), dtype)
    mantissa = LAYOUTS[dtype.name].mantissa
    mask = ((1 << (dtype.bits - 1 - mantissa)) - 1) << mantissa
    where = np.flatnonzero((flat & mask) > (near & mask))
    chosen = near[where]
    gaps = ((flat[where] & mask) - (chosen & mask)) >> mantissa
    up = exact[where] >= values(chosen, dtype)
    zero = _codes(np.zeros_like(chosen), chosen, up)
    return Prediction(near, where, np.minimum(gaps, _GAPS).astype(np.uint8), up, zero)


def extract(base: Bits, merged: Bits, delta: Numbers | None, dtype: DType) -> Extract:
    """Return the residue of some elements; arrays of one shape, bits in the carrier of ``dtype``, ``delta`` float64."""
    given = predict(merged, delta, dtype)
    flat = _flat(base)
    differ = flat != given.near
    differ[given.where] = False
    places = np.flatnonzero(differ)
    listed = _codes(flat[places], given.near[places], np.ones(places.size, bool))
    true = flat[given.where]
    codes = _codes(true, given.near[given.where], given.up)
    codes = np.where(codes < given.zero, codes + np.uint64(1), np.where(true == 0, np.uint64(0), codes))
    return Extract(flat.size, codes, given.contexts, places, listed)


def _flat(bits: Bits) -> Words:
    return cast("Words", np.ascontiguousarray(bits).reshape(-1))


def _codes(true: Words, near: Words, up: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    """Return residues as small unsigned integers: 0, then one step to the likely side, one to the other, and so on."""
    width = near.dtype.itemsize
    steps = (ordinals(near) - ordinals(true)).view(f"<i{width}").astype(np.int64)
    np.negative(steps, out=steps, where=~up)
    return ((steps << 1) ^ (steps >> 63)).view(np.uint64)


def _moved(near: Words, codes: npt.NDArray[np.uint64], up: npt.NDArray[np.bool_]) -> Words:
    """Undo :func:`_codes`."""
    steps = (codes >> np.uint64(1)).view(np.int64) ^ -(codes & np.uint64(1)).view(np.int64)
    np.negative(steps, out=steps, where=~up)
    return unordinals(ordinals(near) - steps.view(np.uint64).astype(near.dtype))


def pack(extracts: Sequence[Extract]) -> bytes:
    """Code residues that follow each other as one block."""
    starts = np.cumsum([0, *(part.size for part in extracts)])
    places = np.concatenate([part.places + start for part, start in zip(extracts, starts[:-1], strict=True)])
    distances = np.diff(places, prepend=-1).astype(np.uint64) - np.uint64(1)
    codes = np.concatenate([distances, *(p.listed for p in extracts), *(p.codes for p in extracts)])
    contexts = np.concatenate([_listing(places.size), *(part.contexts for part in extracts)])
    return _COUNT.pack(places.size) + entropy.encode(codes, contexts)


def _listing(count: int) -> npt.NDArray[np.uint8]:
    return np.repeat(np.array([_POSITIONS, _LISTED], np.uint8), count)


def pieces(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Cut the rows of a matrix into intervals of about ``PIECE`` elements."""
    step = max(1, PIECE // max(1, shape[1]))
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def restore(block: bytes, merged: Bits, delta: Delta | None, dtype: DType) -> Bits:
    """Return the base's bits of some rows; ``merged`` is [rows, columns] and ``delta`` counts from its first row.

    Raises :class:`lorabridge.arithmetic.entropy.MalformedError` where the block is not of these rows.
    """
    rows, columns = merged.shape
    given = [
        predict(merged[start:stop], None if delta is None else delta(start, stop), dtype)
        for start, stop in pieces((rows, columns))
    ]
    if len(block) < _COUNT.size:
        raise entropy.MalformedError("the block is empty")
    (count,) = _COUNT.unpack_from(block)
    if count > merged.size:
        raise entropy.MalformedError("the block lists more elements than there are")
    contexts = np.concatenate([_listing(count), *(part.contexts for part in given)])
    codes = entropy.decode(block[_COUNT.size :], contexts)
    steps, listed, rest = codes[:count], codes[count : 2 * count], codes[2 * count :]
    places = np.cumsum(np.minimum(steps, np.uint64(merged.size)) + np.uint64(1)).astype(np.int64) - 1
    if count and places[-1] >= merged.size:
        raise entropy.MalformedError("the block lists elements outside")
    base = np.empty(merged.size, merged.dtype)
    at = used = 0
    for part in given:
        mine = rest[used : used + part.where.size]
        known = np.where(mine == 0, part.zero, np.where(mine <= part.zero, mine - np.uint64(1), mine))
        base[at : at + part.near.size] = part.near
        base[at + part.where] = _moved(part.near[part.where], known, part.up)
        at, used = at + part.near.size, used + part.where.size
    base[places] = _moved(base[places], listed, np.ones(count, bool))
    return base.reshape(merged.shape)
