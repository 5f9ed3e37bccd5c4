"""The kernels of unmerging and switching, and what a merge notes for them.

A merged weight's node (``lorabridge.arithmetic.recipe``) says how the delta is made; unmerging evaluates the same node
on the merged weight and takes the delta away. The node is cut into the blocks of the undo file, so that each comes with
what restores it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock

import numpy as np

from ..arithmetic import recipe as recipes
from ..arithmetic.deltas import Delta, Matrix
from ..arithmetic.floats import Bits, values
from ..arithmetic.numerics import Notes
from ..arithmetic.numerics import kernels as numeric_kernels
from ..arithmetic.recipe import Recipe, recipe_of
from ..arithmetic.residue import pieces, predict
from ..axes import Compute, Expr, Join, Kernel, evaluate, join
from ..dtypes import DType
from ..tensors import Source
from .prepared import Prepared, deltas_of
from .undo import Checksum, Mode, Recorder, UndoFile, block_rows

KERNEL = "unmerge"
"""A node that is not cut any further, and otherwise the same as one of a merge."""
RESTORE = "restore"
"""A node inside that of a merge: all its updates are taken away."""
KEPT = "kept"
"""A block that the undo file holds itself."""


@dataclass(frozen=True, slots=True)
class Guess:
    """What the best inverse of one weight may have got wrong.

    ``blurred``: elements of which rounding lost bits; the others are right up to the sign of a zero, if the file and
    the adapter are those of the merge. ``wrong``: how many of them are expected to differ, each candidate being as
    likely as any other. ``largest``: the largest possible error.
    """

    elements: int = 0
    blurred: int = 0
    wrong: float = 0.0
    largest: float = 0.0

    def plus(self, other: Guess) -> Guess:
        """Add another part."""
        return Guess(
            self.elements + other.elements, self.blurred + other.blurred, self.wrong + other.wrong,
            max(self.largest, other.largest),
        )  # fmt: skip


def summed(deltas: Sequence[Delta], start: int, stop: int) -> Matrix:
    """Return rows [start, stop) of the sum of deltas, added in their order."""
    out = deltas[0].rows(start, stop)
    for delta in deltas[1:]:
        out += delta.rows(start, stop)
    return out


def additive(recipe: Recipe) -> bool:
    """Say whether the update is an addition; a magnitude's normalisation is not (DoRA)."""
    return not any(update.magnitude for update in recipe.updates)


def split(
    node: Compute, args: Sequence[Bits], count: int
) -> tuple[tuple[Compute, list[Bits]], tuple[Compute, list[Bits]]]:
    """Take a node apart: one with its first ``count`` updates, and one with the others; the weight goes to both."""
    recipe, first = recipe_of(node)
    cut = 1 + sum(update.operands for update in recipe.updates[:count])
    halves = []
    for updates, mine in ((recipe.updates[:count], slice(1, cut)), (recipe.updates[count:], slice(cut, None))):
        part = recipes.node(replace(recipe, updates=updates), node.args[0], node.args[mine])
        params = (part.params[0], ("first", first))
        halves.append((replace(part, params=params), [args[0], *args[mine]] if args else []))
    return halves[0], halves[1]


def fingerprint(node: Compute, source: Source) -> str:
    """Return what identifies the delta of a merged weight: the recipe but for its name, and its operands' bits."""
    recipe, _ = recipe_of(node)
    digest = hashlib.sha256(json.dumps({**recipes.described(recipe), "name": ""}, sort_keys=True).encode())
    kernels = numeric_kernels(recipe.name, Notes(), {})
    for operand in node.args[1:]:
        bits = np.ascontiguousarray(evaluate(operand, source.read, kernels))
        digest.update(f"\0{operand.dtype} {operand.shape}\0".encode())
        digest.update(bits.tobytes())
    return digest.hexdigest()


class Recording:
    """Note what a merge loses: called with each block, as ``lorabridge.merging.kernel.Merger`` calls ``seen``.

    ``nodes``: the merged weights by their names in the base; others are noted otherwise. ``source``: what they read.
    """

    def __init__(self, recorder: Recorder, nodes: Mapping[str, Compute], source: Source) -> None:
        self._recorder = recorder
        self._nodes = nodes
        for name, node in nodes.items():
            mode: Mode = "delta" if additive(recipe_of(node)[0]) else "near"
            recorder.expect(name, node.dtype, node.shape, mode, delta=fingerprint(node, source))

    def __call__(
        self, name: str, dtype: DType, shape: tuple[int, int], first: int, before: Bits, after: Bits,
        delta: Matrix | None,
    ) -> None:  # fmt: skip
        """Note the rows of one weight from ``first`` on."""
        if name in self._nodes:
            self._recorder.take(name, first, before, after, delta)


def in_blocks(node: Compute) -> Expr:
    """Cut a node into the undo file's blocks, one after another."""
    step = block_rows(node.shape, node.dtype)
    parts = [recipes.rows_of(node, start, min(start + step, node.shape[0])) for start in range(0, node.shape[0], step)]
    made = [part for part in parts if part is not None]
    if len(made) != len(parts):
        raise ValueError("a normalisation along columns is not cut")
    if isinstance(node.args[0], Join):  # parts of a merge are cut where tensors meet
        made = [replace(part, kernel=KERNEL) for part in made]
    return join(made, 0) if made else node


class Unmerger:
    """Take deltas away from merged weights and, where a node has more updates, add those; one for a run.

    ``away``: how many of a weight's updates are to be taken away; weights that it does not name are exact. ``undo``:
    gives the exact base; what was restored is compared with its digests by :meth:`check`. ``merge``: the kernel that
    adds the rest.
    """

    def __init__(self, away: Mapping[str, int], undo: UndoFile | None, merge: Kernel | None = None) -> None:
        self._away = away
        self._undo = undo
        self._merge = merge
        self._prepared = Prepared()
        self._lock = Lock()
        self._sums: dict[str, Checksum] = {}
        self._guesses: dict[str, Guess] = {}

    @property
    def guesses(self) -> Mapping[str, Guess]:
        """Per weight that was restored without an undo file."""
        with self._lock:
            return dict(sorted(self._guesses.items()))

    def check(self) -> None:
        """Compare every restored tensor with the digests of base and merged; DifferentError names the first."""
        for name, seen in sorted(self._sums.items()):
            if self._undo is not None:
                seen.check(self._undo.tensors[name], str(self._undo.path))

    def kernels(self) -> Mapping[str, Kernel]:
        """Return the kernels as :func:`lorabridge.axes.evaluate` takes them."""
        return {recipes.KERNEL: self._run, KERNEL: self._run, RESTORE: self._base, KEPT: self._kept}

    def _kept(self, node: Compute, args: list[Bits]) -> Bits:
        params = dict(node.params)
        name, number = str(params["name"]), int(params["number"])
        if self._undo is None:
            raise ValueError(f"{name}: only an undo file holds it")
        base = self._undo.restore(name, number, None, None)
        self._seen(name).add(number, base, None)
        return base

    def _seen(self, name: str) -> Checksum:
        with self._lock:
            return self._sums.setdefault(name, Checksum())

    def _run(self, node: Compute, args: list[Bits]) -> Bits:
        name = recipe_of(node)[0].name
        old, new = split(node, args, self._away.get(name, 0))
        base = self._base(*old) if name in self._away else args[0]
        if not new[0].args[1:]:
            return base
        if self._merge is None:
            raise ValueError(f"{name}: nothing adds its updates")
        return self._merge(new[0], [base, *new[1][1:]])

    def _base(self, node: Compute, args: list[Bits]) -> Bits:
        recipe, first = recipe_of(node)
        merged = np.ascontiguousarray(args[0])
        deltas: tuple[Delta, ...] = ()
        if recipe.updates and additive(recipe):
            deltas = self._prepared.get((recipe, node.args[1:]), lambda: self._made(recipe, node, args))
        if self._undo is None:
            return self._guessed(recipe.name, merged, deltas, first, node.dtype)
        kept = self._undo.tensors[recipe.name]
        number = first // kept.rows
        base = self._undo.restore(
            recipe.name, number, merged, lambda start, stop: summed(deltas, first + start, first + stop)
        )
        self._seen(recipe.name).add(number, base, merged)
        return base

    def _made(self, recipe: Recipe, node: Compute, args: list[Bits]) -> tuple[Delta, ...]:
        operands = [values(bits, arg.dtype) for bits, arg in zip(args[1:], node.args[1:], strict=True)]
        return deltas_of(recipe, node.shape[1], operands)

    def _guessed(self, name: str, merged: Bits, deltas: tuple[Delta, ...], first: int, dtype: DType) -> Bits:
        base = np.empty_like(merged)
        total = Guess()
        for start, stop in pieces((merged.shape[0], merged.shape[1])):
            found = predict(merged[start:stop], summed(deltas, first + start, first + stop), dtype)
            base[start:stop] = found.near.reshape(stop - start, -1)
            gaps = found.contexts.astype(np.float64)
            place = _last_place(merged[start:stop].reshape(-1)[found.where], dtype)
            total = total.plus(
                Guess(found.near.size, found.where.size, float((1 - 0.5**gaps).sum()), float(place.max(initial=0.0)))
            )
        with self._lock:
            self._guesses[name] = self._guesses.get(name, Guess()).plus(total)
        return base


def _last_place(bits: Bits, dtype: DType) -> Matrix:
    """Return one unit in the last place of some numbers: the rounding's error, and that of the inverse, are within."""
    following: Bits = np.add(bits, 1, dtype=bits.dtype)
    out: Matrix = np.abs(values(following, dtype) - values(bits, dtype))
    finite: Matrix = out[np.isfinite(out)]
    return finite
