"""The arithmetic of checking a merged weight: expected values, their bounds, and what a mistake would look like."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..arithmetic import floats, numerics
from ..arithmetic.floats import Bits, Mask, Numbers
from ..dtypes import DType
from . import bounds
from .thin import Thin


@dataclass(frozen=True, slots=True)
class Merged:
    """How a delta lies in a weight.

    ``turned``: the weight is stored ``[in, out]``. ``reshaped``: loralib's convolution, whose ``b @ a`` has the
    weight's elements in C order and another shape. ``magnitude``: DoRA's, per output. ``worker``: the type in which
    the delta is taken to have been computed.
    """

    delta: Thin
    turned: bool
    reshaped: bool
    magnitude: Numbers | None
    worker: DType


@dataclass(frozen=True, slots=True)
class Expected:
    """One block of what the merged weight should be.

    ``value``: in double precision; ``noise``: how far that may be from the exact value; ``bound``: how far a correct
    merge may be from it; ``delta``: the change of the weight.
    """

    value: Numbers
    noise: Numbers
    bound: Numbers
    delta: Numbers


def expected_rows(
    case: Merged, base: Bits, base_type: DType, merged: Bits, merged_type: DType, block: int
) -> Iterator[tuple[Numbers, Numbers, Expected]]:
    """Yield (base, merged, expected) for blocks of rows of about ``block`` elements.

    Bounds, with u of the stored type, w of the working type and ``mass = |scaling| |b| |a|`` (docs/verify.md):
    the product costs ``gamma(rank + 3, w) mass``; libraries round the delta to the stored type up to twice before
    they add it (``2 u |delta|``); the sum is rounded to the stored type, and before that to the working type.
    """
    flat_base, flat_merged = base.reshape(base.shape[0], -1), merged.reshape(merged.shape[0], -1)
    rows, columns = flat_base.shape
    u, w = bounds.roundoff(merged_type), bounds.roundoff(case.worker)
    rank = case.delta.a.shape[0]
    scale = _norms(case, flat_base, base_type, block) if case.magnitude is not None else None
    for start in range(0, rows, step := max(1, block // max(columns, 1))):
        span = slice(start, min(start + step, rows))
        weight = numerics.values(flat_base[span], base_type)
        found = numerics.values(flat_merged[span], merged_type)
        delta, mass = _delta(case, span, (rows, columns))
        total = weight + delta
        noise = bounds.gamma(rank + 4, 2.0**-53) * (np.abs(weight) + mass)
        slack = bounds.gamma(rank + 3, w) * mass + 2 * u * np.abs(delta) + w * np.abs(total)
        if scale is not None:
            factor, uncertain = (_along(case, part, span) for part in scale)
            total, noise = total * factor, (noise + 4 * 2.0**-53 * np.abs(total)) * np.abs(factor)
            slack = np.abs(factor) * slack + (np.abs(total) + np.abs(factor) * slack) * (uncertain + 6 * u + 3 * w)
            delta = total - weight
        bound = (slack + u * np.abs(total)) * (1 + 4 * u + 4 * w) + noise + bounds.smallest(merged_type)
        yield weight, found, Expected(total, noise, bound, delta)


def _delta(case: Merged, span: slice, shape: tuple[int, int]) -> tuple[Numbers, Numbers]:
    """Return a block of the delta and of ``|scaling| |b| |a|``, in the weight's order."""
    a, b, s = case.delta.a, case.delta.b, case.delta.scaling
    if case.reshaped:
        whole = (b @ a * s).reshape(shape), (np.abs(b) @ np.abs(a) * abs(s)).reshape(shape)
        return whole[0][span], whole[1][span]
    left, right = (a.T[span], b.T) if case.turned else (b[span], a)
    return left @ right * s, np.abs(left) @ np.abs(right) * abs(s)


def _norms(case: Merged, base: Bits, base_type: DType, block: int) -> tuple[Numbers, Numbers]:
    """Return DoRA's ``magnitude / norm`` per output, and the relative error that a library's norm may have.

    The norm of the computed rows differs from the true one by at most ``gamma(rank + 3) ||mass||``; summing n squares
    costs ``gamma(n)``, the root and the quotient one rounding each.
    """
    assert case.magnitude is not None
    rows, columns = base.shape
    squares, masses = np.zeros(case.magnitude.size), np.zeros(case.magnitude.size)
    w, rank = bounds.roundoff(case.worker), case.delta.a.shape[0]
    for start in range(0, rows, step := max(1, block // max(columns, 1))):
        span = slice(start, min(start + step, rows))
        weight = numerics.values(base[span], base_type)
        delta, mass = _delta(case, span, (rows, columns))
        total, mass = (weight + delta) ** 2, (np.abs(weight) + mass) ** 2
        if case.turned:
            squares += total.sum(axis=0)
            masses += mass.sum(axis=0)
        else:
            squares[span], masses[span] = total.sum(axis=1), mass.sum(axis=1)
    norms = np.sqrt(squares)
    length = rows if case.turned else columns
    with np.errstate(divide="ignore", invalid="ignore"):
        uncertain = bounds.gamma(rank + 3, w) * np.sqrt(masses) / norms + bounds.gamma(length + 2, w)
        return case.magnitude / norms, uncertain


def _along(case: Merged, values: Numbers, span: slice) -> Numbers:
    return values[None, :] if case.turned else values[span, None]


@dataclass(slots=True)
class Sums:
    """What is added up over the blocks of one weight.

    ``inexact``: elements that are not the exact sum rounded once; ``beyond``: elements outside their bounds;
    ``broken``: NaN or infinite where none belongs.
    """

    dtype: DType
    elements: int = 0
    inexact: int = 0
    beyond: int = 0
    broken: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    ulps: float = 0.0
    ratio: float = 0.0
    bound: float = 0.0
    change: float = 0.0
    delta: float = 0.0
    both: float = 0.0
    allowed: float = 0.0
    found: float = 0.0
    value: float = 0.0
    product: float = 0.0

    def add(self, weight: Numbers, merged: Numbers, expected: Expected) -> None:
        """Compare one block."""
        finite = np.isfinite(merged) & np.isfinite(expected.value)
        self.elements += merged.size
        self.broken += int((~finite).sum())
        with np.errstate(invalid="ignore"):
            error = np.where(finite, np.abs(merged - expected.value), 0.0)
        self.inexact += int((~_correct(merged, expected, self.dtype)).sum())
        ratio = error / expected.bound
        self.beyond += int((ratio > 1).sum())
        worst = int(np.argmax(ratio))
        if ratio.flat[worst] > self.ratio:
            self.ratio, self.bound = float(ratio.flat[worst]), float(expected.bound.flat[worst])
        self.max_abs = max(self.max_abs, float(error.max(initial=0.0)))
        larger = np.maximum(np.abs(np.where(finite, merged, 0.0)), np.abs(np.where(finite, expected.value, 0.0)))
        with np.errstate(divide="ignore", invalid="ignore"):
            self.max_rel = max(self.max_rel, float(np.max(np.where(error > 0, error / larger, 0.0), initial=0.0)))
        self.ulps = max(self.ulps, float(np.max(bounds.ulps(error, larger, self.dtype), initial=0.0)))
        self._moments(np.where(finite, weight, 0.0), np.where(finite, merged, 0.0), expected)

    def _moments(self, weight: Numbers, merged: Numbers, expected: Expected) -> None:
        moved = merged - weight
        delta, value = np.nan_to_num(expected.delta), np.nan_to_num(expected.value)
        self.change += float(np.vdot(moved, moved))
        self.delta += float(np.vdot(delta, delta))
        self.both += float(np.vdot(moved, delta))
        self.allowed += float(np.vdot(expected.bound, expected.bound))
        self.found += float(np.vdot(merged, merged))
        self.value += float(np.vdot(value, value))
        self.product += float(np.vdot(merged, value))

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between the merged weight and what it should be."""
        size = math.sqrt(self.found * self.value)
        return self.product / size if size else None

    def diagnosis(self, scaling: float) -> str:
        """Say what would explain a weight that is not base plus delta, from the multiple of the delta nearest to it."""
        if self.broken:
            return f"{self.broken} NaN or infinite values"
        if not self.delta:
            return "not the base's weight, though the delta is zero"
        if self.beyond <= max(1, self.elements // 100):
            return f"{self.beyond} of {self.elements} elements are wrong"
        factor = self.both / self.delta
        rest = math.sqrt(max(self.change - factor * self.both, 0.0))
        if rest > 4 * math.sqrt(self.allowed):
            return "not this base and this adapter: the difference to BASE is no multiple of the delta"
        blur = 4 * math.sqrt(self.allowed / self.delta)
        if abs(factor - 2) <= blur:
            return "the delta was added twice"
        if abs(factor) <= blur:
            return "the delta was not added: this is the base's weight"
        if abs(factor + 1) <= blur:
            return "the delta was subtracted"
        return f"as if the scaling were {factor * scaling:.6g} instead of {scaling:.6g}"


def _correct(merged: Numbers, expected: Expected, dtype: DType) -> Mask:
    """Say which elements are the exact sum, rounded once to nearest: within the noise of computing that sum here."""
    low = floats.rounded(expected.value - expected.noise, dtype)
    high = floats.rounded(expected.value + expected.noise, dtype)
    return np.asarray((low <= merged) & (merged <= high))
