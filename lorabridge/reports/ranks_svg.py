"""Drawings of one tensor over the ranks as inline SVG: its slices as boxes, and the devices that hold them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from .plain import html_text

if TYPE_CHECKING:
    from ..actions.inspect_ranks import SlicedTensor, SliceRow

WIDE, TALL = 400.0, 250.0
"""Pixels of the largest drawing of a tensor."""
STRIP = 46.0
"""Pixels of the height of a vector."""
CELL, ROW = 46.0, 30.0
"""Pixels of a device."""
MOST = 1024
"""Slices and devices that are drawn."""
GOLDEN = 137.508
"""Degrees between the hues of neighbouring ranks."""


def tensor_box(tensor: SlicedTensor) -> str:
    """Draw a tensor's slices where they lie in it, "" where that is not known or they are too many."""
    if tensor.shape is None or not tensor.slices or len(tensor.slices) > MOST or 0 in tensor.shape:
        return ""
    shape = (math.prod(tensor.shape),) if tensor.flat else tensor.shape
    axes = _drawn(tensor.slices, shape)
    sizes = [shape[axis] for axis in axes]
    width, height = _extent(sizes)
    parts = [_open("slices of the tensor", width + 70, height + 24)]
    parts.append(f'<rect class="hollow" x="1" y="18" width="{width:.1f}" height="{height:.1f}"/>')
    across = axes[-1] if axes else None
    name = "elements" if tensor.flat else f"axis {across}: {shape[across]:,}" if across is not None else "one number"
    parts.append(f'<text class="axis" x="{width / 2:.0f}" y="11" text-anchor="middle">{name}</text>')
    if len(axes) == 2:
        down, x = f"axis {axes[0]}: {shape[axes[0]]:,}", width + 14
        parts.append(
            f'<text class="axis" transform="translate({x:.0f} {18 + height / 2:.0f}) rotate(90)" '
            f'text-anchor="middle">{down}</text>'
        )
    hidden = [axis for axis in range(len(shape)) if axis not in axes]
    for row in tensor.slices:
        if any(row.start[axis] for axis in hidden):
            continue
        spans = [(row.start[axis] / shape[axis], row.shape[axis] / shape[axis]) for axis in axes]
        (top, tall), (left, wide) = ((0.0, 1.0), (0.0, 1.0), *spans)[-2:]
        parts.extend(_slice(row, 1 + left * width, 18 + top * height, wide * width, tall * height))
    return "".join([*parts, "</svg>"])


def _drawn(rows: Sequence[SliceRow], shape: Sequence[int]) -> list[int]:
    """Choose at most two axes to draw: those that are cut, then the last ones."""
    cut = [axis for axis in range(len(shape)) if len({row.start[axis] for row in rows}) > 1]
    rest = [axis for axis in reversed(range(len(shape))) if axis not in cut]
    return sorted([*cut, *rest][:2])


def _extent(sizes: Sequence[int]) -> tuple[float, float]:
    """Return the drawing's width and height: the tensor's proportions, as far as they can be seen."""
    if len(sizes) < 2:
        return (WIDE, STRIP) if sizes else (STRIP, STRIP)
    aspect = max(0.4, min(sizes[1] / sizes[0], 4.0))
    width = min(WIDE, TALL * aspect)
    return width, width / aspect


def _slice(row: SliceRow, x: float, y: float, width: float, height: float) -> Iterator[str]:
    kind = "lost" if row.missing else "odd" if row.apart else "held"
    hue = (row.ranks[0] if row.ranks else 0) * GOLDEN % 360
    yield f'<g class="slice {kind}" style="--h:{hue:.0f}"><title>{html_text(said(row))}</title>'
    yield f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"/>'
    copies = len(row.ranks) > 1 and not row.missing
    if copies and width > 8 and height > 8:
        yield f'<rect class="copy" x="{x + 3:.2f}" y="{y + 3:.2f}" width="{width - 6:.2f}" height="{height - 6:.2f}"/>'
    label = _label(row)
    short = next((text for text in (label, label.partition(" ")[0]) if 7.4 * len(text) + 8 < width), "")
    if short and height >= 14:
        middle, base = x + width / 2, y + height / 2 + 4
        yield f'<text x="{middle:.1f}" y="{base:.1f}" text-anchor="middle">{html_text(short)}</text>'
    yield "</g>"


def _label(row: SliceRow) -> str:
    if row.missing:
        return "missing"
    if len(row.ranks) == 1:
        return str(row.ranks[0])
    others = ", ".join(map(str, row.ranks[1:])) if len(row.ranks) < 5 else f"{len(row.ranks) - 1} more"
    return f"{row.ranks[0]} ({others})"


def said(row: SliceRow) -> str:
    """Describe a slice in words."""
    where = "[" + ", ".join(f"{s}:{s + n}" for s, n in zip(row.start, row.shape, strict=True)) + "]"
    if row.missing:
        return f"{where}: on no rank" + (f"; should be on {', '.join(map(str, row.ranks))}" if row.ranks else "")
    text = f"{where}: rank {row.ranks[0]}"
    if row.ranks[1:]:
        text += f", copies on {', '.join(map(str, row.ranks[1:]))}"
    if row.apart:
        text += f"; the copy on {', '.join(map(str, row.apart))} differs"
    return text


def device_grid(tensor: SlicedTensor, ranks: int) -> str:
    """Draw the stage's devices in the colours of the slices they hold; "" where they are too many."""
    held: dict[int, SliceRow] = {}
    for row in tensor.slices:
        for rank in row.ranks:
            held.setdefault(rank, row if tensor.shape is not None else replace(row, ranks=(rank,)))
    devices = math.prod(tensor.grid)
    first, grid = tensor.stage * devices, tensor.grid
    if not grid or not all(first <= rank < first + devices for rank in held):
        devices, first, grid = ranks, 0, ()  # no grid is told, or it is of some axes of the run's
    if not 0 < devices <= MOST:
        return ""
    columns = grid[-1] if grid and grid[-1] <= 16 else min(devices, 8)
    places = _places(devices, columns, grid)
    width = columns * CELL + 4
    height = max(y for _, y in places) + ROW + 22
    parts = [_open("devices", width, height)]
    text = f"grid {' x '.join(map(str, grid))}" if grid else "ranks"
    parts.append(f'<text class="axis" x="0" y="11">{text}</text>')
    for number, (x, y) in enumerate(places):
        parts.extend(_device(first + number, held, x, y + 18))
    return "".join([*parts, "</svg>"])


def _places(devices: int, columns: int, grid: Sequence[int]) -> list[tuple[float, float]]:
    """Return where each device is drawn: rows of the grid's last axis, apart where an outer axis moves on."""
    block = grid[-1] * grid[-2] if len(grid) > 2 and grid[-1] == columns else 0
    return [
        (number % columns * CELL, number // columns * ROW + (number // block * 8.0 if block else 0.0))
        for number in range(devices)
    ]


def _device(rank: int, held: Mapping[int, SliceRow], x: float, y: float) -> Iterator[str]:
    row = held.get(rank)
    if row is None:
        yield f'<g class="slice none"><title>rank {rank}: holds none of it</title>'
    else:
        kind = "lost" if row.missing else "odd" if row.apart and rank in row.apart else "held"
        hue = row.ranks[0] * GOLDEN % 360
        title = html_text(said(row) if row.missing else f"rank {rank} holds {said(row)}")
        yield f'<g class="slice {kind}" style="--h:{hue:.0f}"><title>{title}</title>'
    yield f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{CELL - 4:.1f}" height="{ROW - 4:.1f}" rx="3"/>'
    if row is not None and row.ranks[0] != rank and not row.missing:
        wide, tall = CELL - 10, ROW - 10
        yield f'<rect class="copy" x="{x + 4:.1f}" y="{y + 4:.1f}" width="{wide:.1f}" height="{tall:.1f}" rx="2"/>'
    yield f'<text x="{x + CELL / 2 - 1:.1f}" y="{y + ROW / 2 + 3:.1f}" text-anchor="middle">{rank}</text></g>'


def _open(what: str, width: float, height: float) -> str:
    return (
        f'<svg role="img" aria-label="{what}" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" xmlns="http://www.w3.org/2000/svg">'
    )
