"""What a merged weight is made of: the node "merge" of an expression, which can be cut into rows.

The node's first operand is the weight, seen as a matrix; the others are what its updates name, in their order. The
recipe travels in the node's parameters, so that plans and digests hold all of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from ..axes import Compute, Expr, Join, Read, Reshape, Slice, cut, reshape

KERNEL = "merge"


@dataclass(frozen=True, slots=True)
class Update:
    """One module's delta: ``scaling`` times the sum of its terms.

    ``starts``: the first output row of each term, whose operands are ``a`` and ``b``, or ``b`` alone ("vector": a
    bias, whose columns are one). ``magnitude``: a last operand normalises the sum (DoRA). ``item``: the delta
    is that of one matrix of a stack: its first row in the stored weight, and how many it has; ``starts`` count in it.
    """

    scaling: float
    starts: tuple[int, ...]
    vector: bool = False
    magnitude: bool = False
    item: tuple[int, int] | None = None

    @property
    def operands(self) -> int:
        """How many operands of the node it takes."""
        return len(self.starts) * (1 if self.vector else 2) + self.magnitude


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a weight and its updates become the merged weight.

    ``name``: the weight's name in the base. ``transposed``: the matrix (or each item of a stack) is ``[columns,
    height]``, the transpose of the deltas. ``rows``: how many the whole has; ``exact``: deltas to 48 bits.
    """

    name: str
    updates: tuple[Update, ...]
    rows: int
    transposed: bool = False
    exact: bool = False

    @property
    def by_rows(self) -> bool:
        """Any rows can be made alone; a norm along the columns needs the whole."""
        return not (self.transposed and any(update.magnitude for update in self.updates))


def node(recipe: Recipe, weight: Expr, operands: Sequence[Expr]) -> Compute:
    """Return the merged weight as an expression; ``weight`` is a matrix, and so is the result."""
    if len(weight.shape) != 2 or sum(update.operands for update in recipe.updates) != len(operands):
        raise ValueError(f"{recipe.name}: the recipe does not fit its operands")
    params = (("recipe", json.dumps(described(recipe), separators=(",", ":"))), ("first", 0))
    return Compute(KERNEL, (weight, *operands), params, "", weight.dtype, weight.shape)


def described(recipe: Recipe) -> dict[str, object]:
    """Return a recipe as plain values."""
    plain = asdict(recipe)
    for update in plain["updates"]:
        if update["item"] is None:
            del update["item"]
    return plain


def recipe_of(expr: Compute) -> tuple[Recipe, int]:
    """Return a node's recipe and the first row of the part that it makes."""
    params = dict(expr.params)
    raw = json.loads(str(params["recipe"]))
    updates = tuple(_update(update) for update in raw.pop("updates"))
    return Recipe(updates=updates, **raw), int(params["first"])


def _update(raw: dict[str, Any]) -> Update:
    first, rows = raw.pop("item", (0, 0))
    return Update(**{**raw, "starts": tuple(raw["starts"])}, item=(first, rows) if rows else None)


def is_merge(expr: Expr) -> bool:
    """Say whether an expression is a merged weight, or a part of one."""
    return isinstance(expr, Compute) and expr.kernel == KERNEL


def rows_of(expr: Expr, start: int, stop: int) -> Compute | None:
    """Return rows [start, stop) of a merged weight as a node of their own; None for what cannot be made by rows."""
    if not isinstance(expr, Compute) or expr.kernel != KERNEL or not recipe_of(expr)[0].by_rows:
        return None
    params = dict(expr.params)
    weight = expr.args[0]
    if isinstance(weight, Reshape) and weight.x.shape[:1] == weight.shape[:1]:
        part = reshape(cut(weight.x, 0, start, stop), (stop - start, *weight.shape[1:]))
    else:
        part = cut(weight, 0, start, stop)
    there = (("recipe", params["recipe"]), ("first", int(params["first"]) + start))
    return Compute(KERNEL, (part, *expr.args[1:]), there, "", expr.dtype, part.shape)


def parts_of(expr: Compute, most: int) -> Iterator[Compute]:
    """Cut a merged weight into parts of at most ``most`` bytes, none across two joined tensors."""
    row = expr.shape[1] * expr.dtype.itemsize
    edges = {0, expr.shape[0]}
    weight = expr.args[0]
    if isinstance(weight, Join) and weight.axis == 0:
        at = 0
        for part in weight.parts:
            at += part.shape[0]
            edges.add(at)
    step = max(1, most // max(1, row))
    bounds = sorted(edges)
    for low, high in pairwise(bounds):
        for start in range(low, high, step):
            part_ = rows_of(expr, start, min(start + step, high))
            if part_ is None:
                yield expr
                return
            yield part_


def rows_read(expr: Expr) -> tuple[str, int, int] | None:
    """Return (source, start, stop) where an expression is rows of a source tensor, which can be read alone."""
    while isinstance(expr, Reshape):
        expr = expr.x
    if isinstance(expr, Slice) and expr.axis == 0 and isinstance(expr.x, Read):
        return expr.x.name, expr.start, expr.stop
    return None
