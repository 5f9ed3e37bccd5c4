"""The arithmetic kernels of conversions: cast, scale and its undoing, compression. Everything else moves bits.

Each kernel rounds every element once. What was rounded is noted per output tensor, and what a scaling loses is kept
as a residue, so that the way back restores the source bit for bit.
"""

from __future__ import annotations

import hashlib
import math
import struct
import zlib
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from ..axes import Compute, Kernel, reads
from ..dtypes import BY_NAME, DType
from ..errors import InputError, MappingError, counted
from . import blockscales, lowrank, products
from .floats import (
    LAYOUTS,
    Bits,
    Mask,
    Numbers,
    arithmetic,
    bounded,
    carry_nans,
    encode,
    rounded,
    spans,
    unfit,
    values,
)  # fmt: skip
from .notes import Notes, Rounding

__all__ = ["Notes", "Rounding", "cast", "kernels", "scaled", "unscaled", "values"]

Words = npt.NDArray[np.unsignedinteger[npt.NBitBase]]
WHOLE = ("int", "uint", "bool")
DIRECT = frozenset(
    pair
    for narrow, wide in (("float16", "float32"), ("bfloat16", "float32"), ("float32", "float64"))
    for pair in ((narrow, wide), (wide, narrow))
)
"""Casts for which numpy and ml_dtypes convert in one step; tests hold them against exact arithmetic."""
POLICIES = ("error", "saturate", "inf")


def kernels(output: str, notes: Notes, residues: Mapping[str, bytes]) -> Mapping[str, Kernel]:
    """Return the kernels that :func:`lorabridge.axes.evaluate` needs for one output.

    ``residues``: from the forward run, by the names of the tensors that the way back reads; ``unscale`` takes the
    entry whose digest is that of the bits it gets, so a residue never applies to bits that have changed since.
    """

    def run_cast(node: Compute, args: list[Bits]) -> Bits:
        policy = str(dict(node.params).get("on_overflow", "error"))
        bits, rounding = cast(args[0], node.args[0].dtype, node.dtype, on_overflow=policy, where=output)
        notes.add(output, rounding)
        return bits

    def run_scale(node: Compute, args: list[Bits]) -> Bits:
        source, factor = node.args[0].dtype, _factor(node)
        bits, rounding = scaled(args[0], source, factor, node.dtype, where=output)
        notes.add(output, rounding)
        notes.keep(output, _digest(bits), _residue(args[0], unscaled(bits, node.dtype, factor, source)))
        return bits

    def run_unscale(node: Compute, args: list[Bits]) -> Bits:
        naive = unscaled(args[0], node.args[0].dtype, _factor(node), node.dtype)
        digest = _digest(args[0])
        for name in dict.fromkeys((output, *reads(node))):
            residue = _unpack(residues[name], name).get(digest) if name in residues else None
            if residue is not None:
                return _restored(naive, residue, name)
        return naive

    def run_compress(node: Compute, args: list[Bits]) -> Bits:
        rank = int(dict(node.params)["rank"])
        a, b = (values(bits, arg.dtype) for bits, arg in zip(args, node.args, strict=True))
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise MappingError(
                "factors that are not finite cannot be compressed", where=output, hint="repair them first"
            )
        small = lowrank.compress(a, b, rank)[0 if node.kernel == "compress_a" else 1]
        bits, _ = _rounded_bits(np.ascontiguousarray(small), node.dtype, "error", output)
        return bits

    def run_product(node: Compute, args: list[Bits]) -> Bits:
        numbers = [values(bits, arg.dtype) for bits, arg in zip(args, node.args, strict=True)]
        made = products.compute(node.kernel, numbers, node.shape, float(dict(node.params).get("value", 0.0)))
        bits, rounding = _rounded_bits(made, node.dtype, "error", output)
        notes.add(output, rounding)
        return bits

    def run_dequantize(node: Compute, args: list[Bits]) -> Bits:
        double, made = BY_NAME["float64"], np.empty(node.shape, node.dtype.carrier())
        for rows, exact in blockscales.products(node, args):
            carried = np.ascontiguousarray(exact).view(double.carrier())
            made[rows], rounding = _blockwise(carried, double, node.dtype, "error", output, blockscales.narrowed)
            notes.add(output, rounding)
        return made

    return {
        "cast": run_cast, "scale": run_scale, "unscale": run_unscale, "dequantize": run_dequantize,
        "compress_a": run_compress, "compress_b": run_compress,
        **dict.fromkeys(products.KERNELS, run_product),
    }  # fmt: skip


def _factor(node: Compute) -> float:
    return float(dict(node.params)["factor"])


def cast(
    bits: Bits, source: DType, target: DType, *, on_overflow: str = "error", where: str = ""
) -> tuple[Bits, Rounding]:
    """Convert elements to another type, rounding once to nearest even; NaN stays NaN with its sign and leading payload.

    A finite value beyond the target's range, or an infinity the target has not, is an error, or with ``on_overflow``
    the largest finite value ("saturate") or infinity, NaN where there is none ("inf"). Integers and booleans are
    converted only when every element survives. Raises MappingError with counts and the worst element.
    """
    if on_overflow not in POLICIES:
        raise ValueError(f"on_overflow is one of {', '.join(POLICIES)}, not {on_overflow!r}")
    if source == target:
        return bits, Rounding(0, bits.size, 0.0)
    if source.name == "complex64" and target.name == "complex128":
        wide = np.ascontiguousarray(bits).view(arithmetic(source)).astype(arithmetic(target))
        return wide.view(target.carrier()), Rounding(0, bits.size, 0.0)
    arithmetical = source.numpy is not None and target.numpy is not None and target.name != "float8_e8m0fnu"
    if arithmetical and source.kind in WHOLE and target.kind in (*WHOLE, "float"):
        return _cast_integers(bits, source, target, where), Rounding(0, bits.size, 0.0)
    if source.kind != "float" or target.kind != "float" or not arithmetical:
        raise MappingError(
            f"{source} is not converted to {target}", where=where, hint="leave out --dtype for this tensor"
        )
    direct = _direct(bits, source, target) if (source.name, target.name) in DIRECT else None
    if direct is not None:
        return direct
    return _blockwise(bits, source, target, on_overflow, where, lambda x: (x, np.zeros(x.shape, bool)))


def _direct(bits: Bits, source: DType, target: DType) -> tuple[Bits, Rounding] | None:
    """Cast by the library's own conversion where that is one rounding; None when a value leaves the target's range."""
    flat = np.ascontiguousarray(bits).reshape(-1)
    out: Bits = np.empty(flat.shape, target.carrier())
    total = Rounding(0, 0, 0.0)
    wide = np.float64 if "float64" in (source.name, target.name) else np.float32
    with np.errstate(all="ignore"):
        for span in spans(flat.size):
            given = flat[span].view(arithmetic(source))
            typed = given.astype(arithmetic(target))
            out[span] = typed.view(target.carrier())
            before, after = given.astype(wide, copy=False), typed.astype(wide, copy=False)
            changed = before != after
            if changed.any():
                broken = np.isnan(before)
                carry_nans(flat[span], source, out[span], target, broken)
                if (np.isinf(after) & np.isfinite(before)).any():
                    return None
                changed &= ~broken
                error = np.abs((after[changed] - before[changed]) / before[changed])
                total = total.plus(Rounding(error.size, 0, float(np.max(error, initial=0.0))))
    return out.reshape(bits.shape), Rounding(total.inexact, flat.size, total.max_relative_error)


def scaled(bits: Bits, source: DType, factor: float, target: DType, *, where: str = "") -> tuple[Bits, Rounding]:
    """Multiply by a factor: the exact product, rounded once to ``target``. Overflow raises MappingError."""
    if "float64" in (source.name, target.name):
        return _blockwise(
            bits, source, target, "error", where, lambda x: _product(x, factor, last=target.name == "float64")
        )
    return _blockwise(bits, source, target, "error", where, lambda x: _product(x, factor, last=False))


def unscaled(bits: Bits, source: DType, factor: float, target: DType) -> Bits:
    """Divide by a factor in double precision and round to ``target``; the same bits on every machine."""
    with np.errstate(all="ignore"):
        return _blockwise(bits, source, target, "inf", "", lambda x: (x / factor, np.zeros(x.shape, bool)))[0]


def _blockwise(
    bits: Bits,
    source: DType,
    target: DType,
    policy: str,
    where: str,
    compute: Callable[[Numbers], tuple[Numbers, Mask]],
) -> tuple[Bits, Rounding]:
    """Run ``compute`` (numbers to numbers and a mask of those already inexact) and round, block by block."""
    flat = np.ascontiguousarray(bits).reshape(-1)
    out: Bits = np.empty(flat.shape, target.carrier())
    total, misfits = Rounding(0, 0, 0.0), _Misfits()
    for span in spans(flat.size):
        given = values(flat[span], source)
        with np.errstate(all="ignore"):
            exact, off = compute(given)
        near = rounded(exact, target)
        misfit = unfit(exact, near, target)
        misfits.see(exact, misfit)
        final = bounded(near, misfit, target, policy)
        out[span] = encode(final, target)
        carry_nans(flat[span], source, out[span], target, np.isnan(given))
        total = total.plus(_measure(exact, final, off, int(misfit.sum())))
    if policy == "error":
        misfits.raise_any(target, where)
    return out.reshape(bits.shape), total


def _rounded_bits(x: Numbers, target: DType, policy: str, where: str) -> tuple[Bits, Rounding]:
    double = BY_NAME["float64"]
    return _blockwise(x.view(double.carrier()), double, target, policy, where, lambda v: (v, np.zeros(v.shape, bool)))


def _measure(exact: Numbers, final: Numbers, off: Mask, overflowed: int) -> Rounding:
    with np.errstate(all="ignore"):
        changed = (off | (final != exact)) & ~np.isnan(exact)
        inexact = int(changed.sum())
        if not inexact:
            return Rounding(0, exact.size, 0.0, overflowed)
        sized = changed & np.isfinite(exact) & np.isfinite(final) & (exact != 0)
        worst = float(np.max(np.abs((final[sized] - exact[sized]) / exact[sized]), initial=0.0))
    return Rounding(inexact, exact.size, worst, overflowed)


class _Misfits:
    """Count the numbers beyond a range and remember the largest."""

    def __init__(self) -> None:
        self.count = 0
        self.largest = 0.0

    def see(self, exact: Numbers, misfit: Mask) -> None:
        if misfit.any():
            self.count += int(misfit.sum())
            found = exact[misfit]
            top = float(found[np.argmax(np.abs(found))])
            self.largest = max(self.largest, top, key=abs)

    def raise_any(self, target: DType, where: str) -> None:
        if self.count:
            raise MappingError(
                f"{counted(self.count, 'value')} {'does' if self.count == 1 else 'do'} not fit {target} "
                f"(largest finite {LAYOUTS[target.name].largest:g})",
                where=f"{where or 'tensor'}: largest {self.largest:g}",
                hint="choose a wider --dtype, or pass --on-overflow saturate or --on-overflow inf",
            )


def _product(x: Numbers, factor: float, *, last: bool) -> tuple[Numbers, Mask]:
    """Return the product in float64 and where that is inexact.

    ``last`` says that float64 is the target: plain multiplication rounds once. Otherwise the product is rounded to odd
    (Boldo and Melquiond 2008), after which rounding to a narrower type gives what rounding the exact product
    would. Dekker's splitting (1971) yields the error; mantissas are taken apart first, so nothing overflows.
    """
    finite = np.isfinite(x) & math.isfinite(factor)
    m, e = math.frexp(factor)
    xm, xe = np.frexp(np.where(finite, x, 0.0))
    p = xm * m
    xh, xl = _split(xm)
    mh, ml = (float(part) for part in _split(np.float64(m)))
    error = ((xh * mh - p) + xh * ml + xl * mh) + xl * ml
    if last:
        out = x * factor
        off = finite & ((error != 0) | (np.ldexp(out, -(xe + e)) != p))
        return out, off & np.isfinite(out)
    magnitude = p.view(np.int64)
    toward_zero = magnitude - ((error != 0) & (np.signbit(error) != np.signbit(p))).astype(np.int64)
    odd = np.where(error != 0, toward_zero | 1, magnitude).view(np.float64)
    return np.where(finite, np.ldexp(odd, xe + e), x * factor), np.zeros(x.shape, bool)


def _split(x: Numbers | np.float64) -> tuple[Numbers, Numbers]:
    scaled_up = x * 134217729.0  # 2**27 + 1
    high = scaled_up - (scaled_up - x)
    return np.asarray(high), np.asarray(x - high)


def _cast_integers(bits: Bits, source: DType, target: DType, where: str) -> Bits:
    """Convert integers when every one survives the way there and back; beyond 2**53 no float is trusted with one."""
    given = np.ascontiguousarray(bits).view(arithmetic(source))
    with np.errstate(all="ignore"):
        if target.kind == "float":
            numbers = given.astype(np.float64)
            there, _ = _rounded_bits(numbers, target, "inf", where)
            kept = (np.abs(numbers) < 2.0**53) & (values(there, target) == numbers)
        else:
            typed = given.astype(arithmetic(target))
            there = typed.view(target.carrier())
            kept = (typed.astype(given.dtype) == given) & (
                np.signbit(typed.astype(float)) == np.signbit(given.astype(float))
            )
    lost = int(kept.size - kept.sum())
    if lost:
        raise MappingError(
            f"{lost} {source} values are not {target} values", where=where, hint="leave out --dtype for this tensor"
        )
    return there.reshape(bits.shape)


def _digest(bits: Bits) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(bits).data, digest_size=16).digest()


def _residue(true: Bits, naive: Bits) -> bytes:
    """Return what to add to the naive bits to get the true ones, per element modulo the word; empty where nothing is.

    Differences are small in either direction: they are folded to 0, -1, 1, -2 ... = 0, 1, 2, 3 ..., and like bytes of
    all elements lie together, before zlib.
    """
    words = naive.dtype.str
    unsigned: Words = np.ascontiguousarray(true).view(words) - naive.view(words)
    difference = unsigned.view(words.replace("u", "i")).reshape(-1)
    if not difference.any():
        return b""
    folded = (difference << 1) ^ (difference >> (8 * naive.itemsize - 1))
    planes = np.ascontiguousarray(folded.view(np.uint8).reshape(-1, naive.itemsize).T)
    return zlib.compress(planes.data, 6)


def _restored(naive: Bits, residue: bytes, where: str) -> Bits:
    size = naive.size * naive.itemsize
    try:
        stream = zlib.decompressobj()
        raw = stream.decompress(residue, size + 1)
    except zlib.error as error:
        raise _bad_residue(where) from error
    if len(raw) != size or not stream.eof:
        raise _bad_residue(where)
    planes = np.frombuffer(raw, np.uint8).reshape(naive.itemsize, -1)
    folded: Words = np.ascontiguousarray(planes.T).view(naive.dtype.str).reshape(-1)
    one = folded.dtype.type(1)
    difference: Words = (folded >> one) ^ (~(folded & one) + one)
    true: Words = naive.view(naive.dtype.str).reshape(-1) + difference
    return true.reshape(naive.shape)


def _unpack(raw: bytes, where: str) -> dict[bytes, bytes]:
    entries, at = {}, 0
    while at < len(raw):
        if len(raw) - at < 24:
            raise _bad_residue(where)
        (length,) = struct.unpack_from("<Q", raw, at + 16)
        if length > len(raw) - at - 24:
            raise _bad_residue(where)
        entries[raw[at : at + 16]] = raw[at + 24 : at + 24 + length]
        at += 24 + length
    return entries


def _bad_residue(where: str) -> InputError:
    return InputError(
        "the manifest's residue does not fit the tensor",
        where=where,
        hint="remove the manifest and state alpha and rank",
    )
