"""Deltas as thin products, compared without ever forming them.

A module's delta ``scaling * b @ a`` has out times in elements, its factors rank times (out + in). Differences of deltas
are products of the stacked factors ``[b1 s1, -b2 s2]`` and ``[a1; a2]``, whose norms follow from thin QR factorizations
(see ``lowrank``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..arithmetic.floats import Numbers
from ..dialects import factors
from ..dialects.adapter import LoraModule, Term
from ..dtypes import DType
from ..tensors import Source
from .sides import numbers_of


@dataclass(frozen=True, slots=True)
class Thin:
    """A delta ``scaling * b @ a`` in double precision: ``a`` ``[rank, columns]``, ``b`` ``[out, rank]``.

    Blocks of several terms or groups are placed in zeros. ``a_type`` and ``b_type``: of the stored factors, None where
    they differ among terms.
    """

    a: Numbers
    b: Numbers
    scaling: float
    a_type: DType | None
    b_type: DType | None

    @property
    def finite(self) -> bool:
        """No factor holds NaN or infinities, nor is the scaling one."""
        return bool(np.isfinite(self.a).all() and np.isfinite(self.b).all() and math.isfinite(self.scaling))

    def compact(self) -> Thin:
        """Leave out the rows of ``a`` and columns of ``b`` whose product is zero, as padding adds them."""
        kept = (self.a != 0).any(axis=1) & (self.b != 0).any(axis=0)
        return Thin(self.a[kept], self.b[:, kept], self.scaling, self.a_type, self.b_type)

    def reach(self) -> float:
        """Return the sum of ``|scaling| ||b_k|| ||a_k||`` over the rank: no less than the norm of ``|b| |a|``."""
        return abs(self.scaling) * float(np.linalg.norm(self.a, axis=1) @ np.linalg.norm(self.b, axis=0))


def thin(module: LoraModule, source: Source, *, peft_form: bool = True) -> Thin:
    """Read a module's factors; conv factors in peft's form unless ``peft_form`` is false and they have loralib's.

    MappingError where loralib's factors of a grouped convolution have no such form.
    """
    if peft_form:
        module = factors.conv_to_peft(module)
    blocks = [block for term in module.terms for block in _blocks(module, term, source)]
    height = module.out
    if module.conv_form == "loralib" and module.kind.startswith("conv"):
        height = blocks[0][1].shape[0]
    b = np.zeros((height, sum(a.shape[0] for a, _, _ in blocks)))
    at = 0
    for a, rows, start in blocks:
        b[start : start + rows.shape[0], at : at + a.shape[0]] = rows
        at += a.shape[0]
    types = [{term.a.dtype for term in module.terms}, {term.b.dtype for term in module.terms}]
    a_type, b_type = (next(iter(found)) if len(found) == 1 else None for found in types)
    return Thin(np.concatenate([a for a, _, _ in blocks]), b, module.scaling.value, a_type, b_type)


def _blocks(module: LoraModule, term: Term, source: Source) -> Iterator[tuple[Numbers, Numbers, int]]:
    """Yield (a, b, first row): one product, or one per group of a grouped convolution in peft's form."""
    a, b = numbers_of(term.a, source), numbers_of(term.b, source)
    a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    groups = module.groups if module.kind.startswith("conv") and module.conv_form == "peft" else 1
    rows, rank = b.shape[0] // groups, b.shape[1]
    for g in range(groups):
        part = a if groups == 1 else a[g * rank : (g + 1) * rank]
        yield part, b[g * rows : (g + 1) * rows], term.start + g * rows


@dataclass(frozen=True, slots=True)
class Difference:
    """Two deltas compared: Frobenius norms of both, of their difference, and their inner product."""

    first: float
    second: float
    apart: float
    inner: float

    @property
    def cosine(self) -> float | None:
        """Cosine of the angle between the deltas; None where one is zero."""
        return self.inner / (self.first * self.second) if self.first and self.second else None

    @property
    def factor(self) -> float | None:
        """The multiple of the first delta that lies nearest to the second."""
        return self.inner / self.first**2 if self.first else None

    def beside(self, factor: float) -> float:
        """Return the norm of the second delta minus ``factor`` times the first."""
        square = self.second**2 - 2 * factor * self.inner + (factor * self.first) ** 2
        return math.sqrt(max(square, 0.0))


def difference(first: Thin, second: Thin) -> Difference:
    """Compare two deltas of the same size; NaN where a factor is not finite."""
    if not (first.finite and second.finite):
        return Difference(math.nan, math.nan, math.nan, math.nan)
    _, left = np.linalg.qr(np.concatenate([first.b * first.scaling, second.b * second.scaling], axis=1))
    _, right = np.linalg.qr(np.concatenate([first.a, second.a]).T)
    rank = first.a.shape[0]
    one, two = left[:, :rank] @ right[:, :rank].T, left[:, rank:] @ right[:, rank:].T
    return Difference(_norm(one), _norm(two), _norm(one - two), float(np.vdot(one, two)))


def norm(delta: Thin) -> float:
    """Return the Frobenius norm of one delta."""
    if not delta.finite:
        return math.nan
    _, left = np.linalg.qr(delta.b)
    _, right = np.linalg.qr(delta.a.T)
    return abs(delta.scaling) * _norm(left @ right.T)


def _norm(x: Numbers) -> float:
    return float(np.linalg.norm(x))
