"""The kernel of merging: operands to deltas, deltas to weights, and an account of what changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from ..arithmetic import addition
from ..arithmetic.addition import Change, added
from ..arithmetic.deltas import Delta, Matrix
from ..arithmetic.floats import Bits, values
from ..arithmetic.notes import Notes
from ..arithmetic.numerics import kernels as numeric_kernels
from ..arithmetic.recipe import Recipe, recipe_of
from ..axes import Compute, Kernel
from ..conversion.blocks import copy_tiled
from ..dtypes import DType
from ..errors import UsageError
from .prepared import Prepared, deltas_of

Seen = Callable[[str, DType, tuple[int, int], int, Bits, Bits, Matrix | None], None]
"""Called with a base parameter, its type, its matrix's shape, and a block: first row, bits before, bits after, delta.

From any thread, in any order. The delta is what :func:`lorabridge.arithmetic.deltas.delta_rows` gives, summed over
the adapters, or None where the sum was normalised (DoRA).
"""


class Merger:
    """Make merged weights; one for a run, shared by its threads.

    ``seen`` gets every block before it is written: matrices ``[rows, columns]`` as the base stores the weight (a
    convolution's kernel axes are flat), whose rows count from the block's first. ``changes`` are kept per base
    parameter.
    """

    def __init__(self, seen: Seen | None = None) -> None:
        self._seen = seen
        self._lock = Lock()
        self._ready = Prepared()
        self._changes: dict[str, Change] = {}

    @property
    def changes(self) -> Mapping[str, Change]:
        """What changed so far, per base parameter, sorted."""
        with self._lock:
            return dict(sorted(self._changes.items()))

    @property
    def watched(self) -> bool:
        """Every block is shown to somebody in this process."""
        return self._seen is not None

    def absorb(self, changes: Mapping[str, Change]) -> None:
        """Add what changed in parts that another process merged."""
        with self._lock:
            for name, change in changes.items():
                self._changes[name] = self._changes.get(name, Change()).plus(change)

    def __reduce__(self) -> tuple[Callable[[Mapping[str, Change]], Merger], tuple[Mapping[str, Change]]]:
        return _merger, (self.changes,)

    def kernels(self) -> Mapping[str, Kernel]:
        """Return the kernel as :func:`lorabridge.axes.evaluate` takes it."""
        return {"merge": self._merge}

    def _merge(self, node: Compute, args: list[Bits]) -> Bits:
        recipe, first = recipe_of(node)
        weight = _contiguous(args[0])
        deltas = self._deltas(recipe, node, args)
        adjust = None
        if recipe.updates[-1].magnitude:
            magnitude = values(args[-1], node.args[-1].dtype).reshape(-1)
            adjust = _dora(recipe, magnitude, deltas, weight, node)
        bits, change = added(weight, node.dtype, deltas, start=first, adjust=adjust, seen=self._watch(recipe, node))
        with self._lock:
            self._changes[recipe.name] = self._changes.get(recipe.name, Change()).plus(change)
        return bits

    def _watch(self, recipe: Recipe, node: Compute) -> addition.Seen | None:
        seen, shape = self._seen, (recipe.rows, node.shape[1])
        if seen is None:
            return None

        def note(start: int, before: Bits, after: Bits, delta: Matrix | None) -> None:
            seen(recipe.name, node.dtype, shape, start, before, after, delta)

        return note

    def _deltas(self, recipe: Recipe, node: Compute, args: Sequence[Bits]) -> tuple[Delta, ...]:
        def made() -> tuple[Delta, ...]:
            operands = [values(bits, arg.dtype) for bits, arg in zip(args[1:], node.args[1:], strict=True)]
            return deltas_of(recipe, node.shape[1], operands)

        return self._ready.get((recipe, node.args[1:]), made)


def _merger(changes: Mapping[str, Change]) -> Merger:
    made = Merger()
    made.absorb(changes)
    return made


@dataclass(frozen=True, slots=True)
class Merging:
    """The merger's kernel and the casts around it; see :class:`lorabridge.conversion.accounts.Arithmetic`."""

    merger: Merger
    notes: Notes = field(default_factory=Notes)

    def kernels(self, output: str) -> Mapping[str, Kernel]:
        """Return the kernels for one output."""
        return {**numeric_kernels(output, self.notes, {}), **self.merger.kernels()}

    def elsewhere(self) -> Merging:
        """Return what merges in another process; a UsageError where somebody watches here."""
        if self.merger.watched:
            raise UsageError(
                "what is made from every merged block, such as an undo file, is made by one process",
                hint="use --engine process",
            )
        return Merging(Merger())

    def absorb(self, other: Merging) -> None:
        """Add what another process merged."""
        self.notes.absorb(other.notes)
        self.merger.absorb(other.merger.changes)


def _contiguous(bits: Bits) -> Bits:
    if bits.flags.c_contiguous:
        return bits
    out = np.empty(bits.shape, bits.dtype)
    copy_tiled(out, bits)
    return out


def _dora(
    recipe: Recipe, magnitude: Matrix, deltas: Sequence[Delta], weight: Bits, node: Compute
) -> Callable[[Matrix, int, int], Matrix]:
    """Return the normalisation of DoRA: ``magnitude / norm`` times the sum, with one norm per output row.

    Source: Liu et al. 2024, equation 5, as peft 0.21.2 merges it; norms are those of the unrounded sum.
    """
    if not recipe.transposed:

        def by_rows(sums: Matrix, start: int, stop: int) -> Matrix:
            out: Matrix = sums * (magnitude[start:stop] / _norms(sums))[:, None]
            return out

        return by_rows
    factors = np.empty(magnitude.shape)
    for low in range(0, node.shape[1], 64):
        high = min(low + 64, node.shape[1])
        columns = values(np.ascontiguousarray(weight[:, low:high]), node.dtype)
        sums = columns + _columns(deltas, low, high)
        factors[low:high] = magnitude[low:high] / _norms(np.ascontiguousarray(sums.T))

    def by_columns(sums: Matrix, start: int, stop: int) -> Matrix:
        out: Matrix = sums * factors
        return out

    return by_columns


def _columns(deltas: Sequence[Delta], low: int, high: int) -> Matrix:
    out = deltas[0].columns(low, high)
    for delta in deltas[1:]:
        out += delta.columns(low, high)
    return out


def _norms(rows: Matrix) -> Matrix:
    """Return the Euclidean norm of each row, adding squares in one order: halves onto halves."""
    squares = rows * rows
    n = squares.shape[1]
    while n > 1:
        half = n // 2
        squares[:, :half] += squares[:, n - half : n]
        n -= half
    out: Matrix = np.sqrt(squares[:, 0])
    return out
