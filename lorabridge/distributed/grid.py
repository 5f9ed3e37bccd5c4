"""Tensors as a grid of boxes: chunks with an offset and a shape each, put together axis by axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..axes import Expr, join, zeros
from ..dtypes import DType

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset of the first element and shape, both with an entry per axis of the tensor."""


def assemble_boxes(boxes: Mapping[Box, Expr], shape: Sequence[int], dtype: DType) -> Expr:
    """Put a tensor together from boxes that cover it without gap or overlap, as a grid along each axis in turn.

    Boxes without elements are passed over. Each expression has its box's shape. ValueError says in one clause what
    is missing, laps over or is no grid.
    """
    wanted = tuple(shape)
    held = {box: expr for box, expr in boxes.items() if 0 not in box[1]}
    if 0 in wanted:
        if held:
            raise ValueError(f"a chunk lies outside the empty shape {list(wanted)}")
        return zeros(dtype, wanted)
    for offset, size in held:
        if len(offset) != len(wanted) or any(o + n > whole for o, n, whole in zip(offset, size, wanted, strict=True)):
            raise ValueError(f"a chunk of shape {list(size)} at {list(offset)} lies outside the shape {list(wanted)}")
    return _along(held, wanted, 0, (0,) * len(wanted))


def _along(boxes: Mapping[Box, Expr], shape: tuple[int, ...], axis: int, start: tuple[int, ...]) -> Expr:
    """Put the boxes together that lie in the part of the tensor whose axes below ``axis`` are settled."""
    if axis == len(shape):
        if len(boxes) != 1:
            raise ValueError(f"{len(boxes) or 'no'} chunks hold the place {list(start)}")
        return next(iter(boxes.values()))
    spans: dict[tuple[int, int], dict[Box, Expr]] = {}
    for (offset, size), expr in boxes.items():
        spans.setdefault((offset[axis], size[axis]), {})[offset, size] = expr
    at, parts = 0, []
    for (begin, length), inside in sorted(spans.items(), key=lambda item: item[0]):
        if begin > at:
            raise ValueError(f"nothing holds {at} to {begin} of axis {axis}")
        if begin < at:
            raise ValueError(f"chunks lap over at {begin} of axis {axis}")
        parts.append(_along(inside, shape, axis + 1, (*start[:axis], begin, *start[axis + 1 :])))
        at += length
    if at < shape[axis]:
        raise ValueError(f"nothing holds {at} to {shape[axis]} of axis {axis}")
    return join(parts, axis)
