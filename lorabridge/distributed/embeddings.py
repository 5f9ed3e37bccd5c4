"""MindSpore's embeddings whose rows lie otherwise than in equal slices: split unevenly, or by fields.

Source: mindspore 2.10, parallel/checkpoint_transform.py (_merge_param_with_strategy) and parallel/_tensor.py
(_reshape_param_data_with_weight). ``param_split_shape`` says how many rows each slice has, counted in row-major order
of the slices. With ``field`` every device, in the order of their ranks, holds as many rows of each field; the whole
holds the fields one after another. The offsets of indices that a strategy may hold beside them are about lookups.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..axes import Expr, cut, join
from .assembled import Copy, Placed
from .grid import Box
from .layout import Layout, assemble, ravel

Ranks = Mapping[int, tuple[str, Expr]]
"""The piece of every rank that is there, by its rank inside the stage."""


class Holes(ValueError):
    """Slices that no rank holds: their boxes, with the ranks that should; ``held``: those that are there."""

    def __init__(self, shape: tuple[int, ...], missing: dict[Box, tuple[int, ...]], held: dict[Box, tuple[Copy, ...]]):
        super().__init__(f"{len(missing)} of its slices are on no rank that is there")
        self.shape, self.missing, self.held = shape, missing, held


def place_embedding(name: str, layout: Layout, ranks: Ranks, first: int, stage: int) -> Placed:
    """Put an embedding together; ``first`` is the stage's first rank. ValueError where pieces do not fit the layout."""
    return _fields(name, layout, ranks, first, stage) if layout.field else _uneven(name, layout, ranks, first, stage)


def _uneven(name: str, layout: Layout, ranks: Ranks, first: int, stage: int) -> Placed:
    parts, rest = layout.parts, next(iter(ranks.values()))[1].shape[1:]
    if layout.optimizer or len(parts) != len(rest) + 1:
        raise ValueError(f"its layout of {len(parts)} axes, split unevenly, is not of slices with {len(rest) + 1}")
    whole = tuple(n * count for n, count in zip(rest, parts[1:], strict=True))
    held: dict[Box, tuple[Copy, ...]] = {}
    lost: dict[Box, tuple[int, ...]] = {}
    exprs: dict[tuple[int, ...], Expr] = {}
    slices: dict[tuple[int, ...], tuple[Copy, ...]] = {}
    boxes: dict[tuple[int, ...], Box] = {}
    for index, holders in layout.holders().items():
        rows = layout.rows[ravel(index, parts)]
        at = sum(layout.rows[ravel((row, *index[1:]), parts)] for row in range(index[0]))
        box = (at, *(i * n for i, n in zip(index[1:], rest, strict=True))), (rows, *rest)
        there = [rank for rank in holders if rank in ranks]
        for rank in there:
            if ranks[rank][1].shape != box[1]:
                found = ranks[rank][1].shape
                raise ValueError(f"rank {first + rank} holds shape {found} where the strategy says {box[1]}")
        if not there:
            lost[box] = tuple(first + rank for rank in holders)
            continue
        exprs[index], boxes[index] = ranks[there[0]][1], box
        held[box] = slices[index] = tuple(Copy(first + rank, ranks[rank][0]) for rank in there)
    if lost:
        total = sum(layout.rows[ravel((row, *(0 for _ in rest)), parts)] for row in range(parts[0]))
        raise Holes((total, *whole), lost, held)
    return Placed(name, assemble(exprs, parts), slices, layout, stage, boxes)


def _fields(name: str, layout: Layout, ranks: Ranks, first: int, stage: int) -> Placed:
    count = layout.devices
    shapes = {expr.shape for _, expr in ranks.values()}
    if len(shapes) > 1 or layout.optimizer:
        raise ValueError("its slices differ in shape, or it has optimizer shards: no embedding of several fields")
    (shape,) = shapes
    if not shape or shape[0] % layout.field or any(layout.place(r)[0] != r for r in range(count)) or len(shape) != 2:
        raise ValueError(f"slices of shape {shape} on {count} devices are not those of {layout.field} fields")
    rows = shape[0] // layout.field
    exprs: list[Expr] = []
    slices: dict[tuple[int, ...], tuple[Copy, ...]] = {}
    boxes: dict[tuple[int, ...], Box] = {}
    lost: dict[Box, tuple[int, ...]] = {}
    for number in range(layout.field * count):
        part, rank = divmod(number, count)
        box = (number * rows, 0), (rows, shape[1])
        if rank not in ranks:
            lost[box] = (first + rank,)
            continue
        piece, expr = ranks[rank]
        exprs.append(cut(expr, 0, part * rows, (part + 1) * rows))
        slices[number, 0], boxes[number, 0] = (Copy(first + rank, piece),), box
    if lost:
        whole = (layout.field * count * rows, shape[1])
        raise Holes(whole, lost, {boxes[index]: copies for index, copies in slices.items()})
    return Placed(name, join(exprs, 0), slices, layout, stage, boxes)
