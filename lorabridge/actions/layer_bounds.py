"""How far a library's output of an adapted layer may be from the exact one: masses of terms times gamma.

Derivations: docs/verify.md. All numbers here are sums of non-negative terms, computed in the working type; their own
rounding is covered by the factor ``1 + gamma(n)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..arithmetic.floats import Numbers
from ..dialects.adapter import LoraModule
from ..dtypes import DType
from ..tensors import Source
from . import bounds
from .layer_side import Array, Base
from .sides import numbers_of
from .thin import Thin, norm, thin

ROWS = 1024
"""Rows of a base weight that are handled at once."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """Relative changes of one file's values against the other's, by a conversion that rounded: of the delta's factors
    together, and of the vectors beside them."""

    delta: float = 0.0
    beside: float = 0.0


def rounded_between(first: LoraModule, second: LoraModule) -> Rounded:
    """Return what one rounding to the coarser type of each pair of factors can change; zero where types agree."""
    u = []
    for x, y in ((first.terms[0].a, second.terms[0].a), (first.terms[0].b, second.terms[0].b)):
        moved = y is second.terms[0].b and first.scaling.value != second.scaling.value and _folded(first, second)
        u.append(max(map(bounds.roundoff, (x.dtype, y.dtype))) if x.dtype != y.dtype or moved else 0.0)
    vectors = [(first.magnitude, second.magnitude), (first.lora_bias, second.lora_bias)]
    beside = [max(map(bounds.roundoff, (x.dtype, y.dtype))) for x, y in vectors if x and y and x.dtype != y.dtype]
    return Rounded((1 + u[0]) * (1 + u[1]) - 1, max(beside, default=0.0))


def _folded(first: LoraModule, second: LoraModule) -> bool:
    """Say whether a scaling went into B and had to round there: the ratio is no power of two."""
    ratio = first.scaling.value / second.scaling.value if second.scaling.value else math.inf
    return math.isfinite(ratio) and ratio != 0 and math.frexp(ratio)[0] != 0.5


def layer_bound(
    module: LoraModule, source: Source, base: Base, x: Array, dtype: DType, between: Rounded
) -> tuple[Numbers, float]:
    """Return the bound of each output element, ``[n, out]``, and the delta's Frobenius norm.

    A convolution's outputs come position by position, ``[n * positions, out]``.
    """
    delta = thin(module, source, peft_form=False)
    pieces = _pieces(module, delta, base, x)
    terms = pieces.terms + delta.a.shape[0] + bounds.SLACK
    g = np.array([bounds.gamma(int(n), bounds.roundoff(dtype)) for n in terms])[:, None]
    bias = np.zeros(module.out) if base.bias is None else np.abs(base.bias.astype(np.float64))
    beside = np.zeros(module.out)
    if module.lora_bias is not None:
        beside = abs(delta.scaling) * np.abs(numbers_of(module.lora_bias, source)).ravel()
    if module.magnitude is None:
        bound = (
            g * (pieces.base + pieces.delta + bias + beside) + between.delta * pieces.delta + between.beside * beside
        )
    else:
        bound = _dora(module, source, delta, base, pieces, g, dtype, between) + g * (bias + beside)
    return (bound + terms[:, None] * bounds.smallest(dtype)) * (1 + g), norm(delta)


@dataclass(frozen=True, slots=True)
class _Pieces:
    """``base``: ``|W| |x|``; ``delta``: ``|s| |B| |A| |x|``; both ``[n, out]``; ``terms``: longest sum, per row."""

    base: Numbers
    delta: Numbers
    terms: Numbers


def _pieces(module: LoraModule, delta: Thin, base: Base, x: Array) -> _Pieces:
    a, b, s = np.abs(delta.a), np.abs(delta.b), abs(delta.scaling)
    if module.kind == "embedding":
        table = np.abs(base.weight[x]).astype(np.float64)
        return _Pieces(table, s * (a[:, x].T @ b.T), np.ones(len(x)))
    if module.kind == "linear":
        size = np.abs(x)
        through = np.empty((len(x), module.out))
        for span in _spans(module.out):
            through[:, span] = size @ np.abs(base.weight[span]).T
        return _Pieces(through, s * ((size.astype(np.float64) @ a.T) @ b.T), np.count_nonzero(x, axis=1).astype(float))
    patches = _patches(np.abs(x).astype(np.float64), module)
    weight = np.abs(base.weight.astype(np.float64)).reshape(module.out, -1)
    through = _grouped(patches, weight, module)
    whole = patches.reshape(len(patches), -1)
    terms = np.count_nonzero(whole, axis=1).astype(float)
    if module.conv_form == "loralib":
        return _Pieces(through, s * _grouped(patches, (b @ a).reshape(module.out, -1), module), terms)
    return _Pieces(through, s * ((whole @ a.T) @ b.T), terms)


def _spans(rows: int) -> Iterator[slice]:
    return (slice(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS))


def _patches(x: Numbers, module: LoraModule) -> Numbers:
    """Return what each output position sees, ``[n * positions, in, kernel elements]``."""
    dims = len(module.kernel_size)
    axes = tuple(range(2, 2 + dims))
    windows: Numbers = np.lib.stride_tricks.sliding_window_view(x, module.kernel_size, axis=axes)  # type: ignore[call-overload]
    moved = np.moveaxis(windows, 1, 1 + dims)
    return moved.reshape(-1, x.shape[1], math.prod(module.kernel_size))


def _grouped(patches: Numbers, kernel: Numbers, module: LoraModule) -> Numbers:
    """Convolve patches with a kernel ``[out, in / groups * kernel elements]``, group by group."""
    seen = [part.reshape(len(patches), -1) for part in np.split(patches, module.groups, axis=1)]
    return np.concatenate([p @ rows.T for p, rows in zip(seen, np.split(kernel, module.groups), strict=True)], axis=1)


def _dora(
    module: LoraModule, source: Source, delta: Thin, base: Base, pieces: _Pieces, g: Numbers, dtype: DType,
    between: Rounded,
) -> Numbers:  # fmt: skip
    """Bound ``c (W x + D x)`` with ``c = m / ||W + D||`` row by row.

    peft adds ``(c - 1) W x + c D x`` to ``W x``, others multiply the sum: both are covered by the mass
    ``(1 + |c - 1| + |c|) |W| |x| + 2 |c| |D| |x|``. The norm's relative error is
    ``gamma(rank + 3) || |W| + |D| || / || W + D || + gamma(length + 4)``, and it multiplies everything.
    """
    assert module.magnitude is not None
    magnitude = numbers_of(module.magnitude, source).ravel()
    u = bounds.roundoff(dtype)
    norms, masses, length = _norms(module, delta, base)
    with np.errstate(divide="ignore", invalid="ignore"):
        c = np.abs(magnitude / norms)
        off = (bounds.gamma(delta.a.shape[0] + 3, u) + between.delta) * masses / norms
    off = off + bounds.gamma(length + 4, u) + between.beside
    mass = (1 + np.abs(c - 1) + c) * pieces.base + 2 * c * pieces.delta
    whole = c * (pieces.base + pieces.delta)
    bound: Numbers = g * mass + whole * off * (1 + off) + between.delta * c * pieces.delta
    return bound


def _norms(module: LoraModule, delta: Thin, base: Base) -> tuple[Numbers, Numbers, int]:
    """Return ``||W + D||``, ``|| |W| + |s B| |A| ||`` per output, and how many numbers each norm sums."""
    weight = base.weight.T if module.kind == "embedding" else base.weight.reshape(module.out, -1)
    norms, masses = np.empty(module.out), np.empty(module.out)
    dense = module.kind.startswith("conv") and module.conv_form == "loralib"
    for span in _spans(module.out):
        rows = weight[span].astype(np.float64)
        if dense:  # its product has the kernel's elements in another shape
            change = (delta.b @ delta.a).reshape(weight.shape)[span] * delta.scaling
            mass = (np.abs(delta.b) @ np.abs(delta.a)).reshape(weight.shape)[span]
        else:
            change, mass = delta.b[span] @ delta.a * delta.scaling, np.abs(delta.b[span]) @ np.abs(delta.a)
        norms[span] = np.linalg.norm(rows + change, axis=1)
        masses[span] = np.linalg.norm(np.abs(rows) + mass * abs(delta.scaling), axis=1)
    return norms, masses, weight.shape[1]
