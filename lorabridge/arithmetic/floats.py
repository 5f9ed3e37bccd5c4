"""Floating-point formats: bits to numbers, and numbers to bits with exactly one rounding.

Every format here but float64 is a subset of float32, and every finite value of any of them is a float64. Numbers are
therefore handled in float64 and rounded to the target in one step, to nearest, ties to even (IEEE 754-2019, 4.3.1).
Libraries often round twice on such paths (float64 to float32 to bfloat16), which is why this is spelled out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..dtypes import DType

Bits = npt.NDArray[np.generic]
Numbers = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

BLOCK = 1 << 18
"""Elements per block of the loops below: their temporaries stay in the cache, and memory stays bounded."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A binary format: mantissa bits, least normal exponent, largest finite value, and its special codes.

    ``nan``: how NaN is coded: "ieee" (all-ones exponent, any payload), "ones" (all ones under either sign),
    "sign" (the code of -0, as in the fnuz types) or "byte" (0xff). ``infinite``: the format has infinities.
    """

    mantissa: int
    least: int
    largest: float
    nan: str = "ieee"
    infinite: bool = True


# IEEE 754-2019 table 3.5; bfloat16: Intel 2018; float8: OCP 8-bit Floating Point Specification 1.0, table 1; fnuz:
# Noune et al. 2022; e8m0: OCP Microscaling Formats 1.0.
LAYOUTS = {
    "float64": Layout(52, -1022, float(np.finfo(np.float64).max)),
    "float32": Layout(23, -126, float(np.finfo(np.float32).max)),
    "float16": Layout(10, -14, 65504.0),
    "bfloat16": Layout(7, -126, 255 * 2.0**120),
    "float8_e5m2": Layout(2, -14, 57344.0),
    "float8_e4m3fn": Layout(3, -6, 448.0, "ones", infinite=False),
    "float8_e5m2fnuz": Layout(2, -15, 57344.0, "sign", infinite=False),
    "float8_e4m3fnuz": Layout(3, -7, 240.0, "sign", infinite=False),
    "float8_e8m0fnu": Layout(0, -127, 2.0**127, "byte", infinite=False),
}


def arithmetic(dtype: DType) -> np.dtype[np.generic]:
    """Return the numpy dtype of a type's numbers; ml_dtypes supplies bfloat16 and the float8 types."""
    if dtype.numpy is None:
        raise ValueError(f"no arithmetic on {dtype}")
    if dtype.name in ("bfloat16",) or dtype.name.startswith("float8"):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, dtype.numpy))
    return np.dtype(dtype.numpy).newbyteorder("<")


def values(bits: Bits, dtype: DType) -> Numbers:
    """Return the numbers that bits mean, as float64 of the same shape; exact for every float type."""
    with np.errstate(invalid="ignore"):
        found: Numbers = np.ascontiguousarray(bits).view(arithmetic(dtype)).astype(np.float64)
    return found.reshape(bits.shape)


def spans(size: int) -> Iterator[slice]:
    """Cut a flat array into blocks."""
    return (slice(start, min(start + BLOCK, size)) for start in range(0, size, BLOCK))


def rounded(x: Numbers, dtype: DType) -> Numbers:
    """Return the nearest numbers with the type's mantissa and least exponent, as float64; its range is not applied.

    Exact steps but one: scale so that the last place becomes 1, round to integer (ties to even), scale back.
    """
    if dtype.name == "float64":
        return x
    layout = LAYOUTS[dtype.name]
    _, exponent = np.frexp(x)
    place = np.maximum(exponent - 1, layout.least) - layout.mantissa
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        whole: Numbers = np.rint(np.ldexp(x, -place))
        back: Numbers = np.ldexp(whole, place)
    return np.where(np.isfinite(x), back, x)


def encode(x: Numbers, dtype: DType) -> Bits:
    """Return the bits of numbers that the type holds exactly, infinities included; NaN gets some NaN code."""
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = x if dtype.name == "float64" else x.astype(np.float32)
        typed: Bits = narrow.astype(arithmetic(dtype))
    return typed.view(dtype.carrier())


def unfit(exact: Numbers, near: Numbers, dtype: DType) -> Mask:
    """Mark the numbers beyond the type's range: finite ones that round past the largest, infinities it has not."""
    layout = LAYOUTS[dtype.name]
    with np.errstate(invalid="ignore"):
        beyond: Mask = np.abs(near) > layout.largest
    return beyond & np.isfinite(exact) if layout.infinite else beyond


def bounded(near: Numbers, misfit: Mask, dtype: DType, policy: str) -> Numbers:
    """Replace numbers beyond the range: by the largest finite one ("saturate"), or by infinity or NaN."""
    layout = LAYOUTS[dtype.name]
    bound = layout.largest if policy == "saturate" else (np.inf if layout.infinite else np.nan)
    return np.where(misfit, np.copysign(bound, near), near)


def carry_nans(bits: Bits, source: DType, into: Bits, target: DType, where: Mask) -> None:
    """Write NaN codes into ``into``: sign and leading payload bits of the source's NaN, quiet where none is left.

    Widening and narrowing again is therefore the identity for every NaN, signalling ones included.
    """
    if not where.any():
        return
    old = bits[where].astype(np.uint64)
    sign = old >> np.uint64(source.bits - 1)
    payload = _payload(old, source)
    layout = LAYOUTS[target.name]
    if layout.nan == "byte":
        code = np.full(old.shape, 0xFF, np.uint64)
    elif layout.nan == "sign":
        code = np.full(old.shape, 0x80, np.uint64)
    elif layout.nan == "ones":
        code = (sign << np.uint64(target.bits - 1)) | np.uint64((1 << (target.bits - 1)) - 1)
    else:
        kept = payload >> np.uint64(64 - layout.mantissa)
        kept = np.where(kept == 0, np.uint64(1 << (layout.mantissa - 1)), kept)
        ones = ((1 << (target.bits - 1 - layout.mantissa)) - 1) << layout.mantissa
        code = (sign << np.uint64(target.bits - 1)) | np.uint64(ones) | kept
    into[where] = code.astype(target.carrier())


def _payload(old: npt.NDArray[np.uint64], source: DType) -> npt.NDArray[np.uint64]:
    """Return a NaN's mantissa, aligned to the top of 64 bits; formats with one NaN count as quiet."""
    layout = LAYOUTS[source.name]
    if layout.nan != "ieee":
        return np.full(old.shape, 1 << 63, np.uint64)
    return old << np.uint64(64 - layout.mantissa)
