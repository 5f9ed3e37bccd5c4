"""Drawings of a verification as inline SVG: a strip of errors and bars of delta norms, arranged by layer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .plain import escape, html_text

if TYPE_CHECKING:
    from ..actions.verify_report import ModuleRow

LABEL = 34
"""Characters of a line's name that are drawn; the whole name is the label's title."""
MOST_LINES = 24
ROOM = 860
"""Pixels that the columns share."""
BAR = 460
"""Pixels of the longest bar with its number, where bars lie."""
FLAT = 40
"""Modules per line where their names have no layers to arrange them by."""

_NUMBER = re.compile(r"(?<![^. ])\d{1,6}(?![^. ])")
_STEPS = (("l1", 1e-3), ("l2", 1e-2), ("l3", 1e-1), ("l4", 0.5), ("l5", 1.0))

LEGEND = (
    ("l0", "every bit equal"), ("l1", "< 1/1000"), ("l2", "< 1/100"), ("l3", "< 1/10"), ("l4", "< 1/2"),
    ("l5", "up to the bound"), ("x", "different"), ("n", "not compared"),
)  # fmt: skip
"""Classes of cells, and what they mean."""


Cell = Callable[[float, float, "ModuleRow"], Iterator[str]]


@dataclass(frozen=True, slots=True)
class Grid:
    """Modules by layer: ``lines`` holds for each name the module of every column that has one.

    ``axis``: what the columns count, "layer", "sequence" or "module".
    """

    axis: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, Mapping[str, ModuleRow]], ...]


def grids(rows: Sequence[ModuleRow]) -> tuple[Grid, ...]:
    """Arrange modules: blocks of a network by the number in their path, outputs by their sequence.

    Names without a number, and networks of more kinds than fit under each other, are drawn in their order.
    """
    outputs = [row for row in rows if row.kind in ("logits", "hidden")]
    modules = [row for row in rows if row.kind not in ("logits", "hidden")]
    return tuple(_grid(part, axis) for part, axis in ((modules, "layer"), (outputs, "sequence")) if part)


def _grid(rows: Sequence[ModuleRow], axis: str) -> Grid:
    lines: dict[str, dict[str, ModuleRow]] = {}
    columns: dict[str, None] = {}
    for row in rows:
        found = _NUMBER.search(row.path)
        name = row.path[: found.start()] + "*" + row.path[found.end() :] if found else row.path
        column = found.group() if found else ""
        if column in lines.setdefault(name, {}):
            return _flat(rows)
        lines[name][column] = row
        columns[column] = None
    if len(lines) > MOST_LINES:
        return _flat(rows)
    order = sorted(columns, key=lambda text: (text == "", int(text or 0)))
    return Grid(axis, tuple(order), tuple(_without_common(lines)))


def _without_common(lines: Mapping[str, Mapping[str, ModuleRow]]) -> Iterator[tuple[str, Mapping[str, ModuleRow]]]:
    """Shorten names by the beginning that all of them share, up to the layer's number."""
    numbered = [name for name in lines if "*" in name]
    heads = {name.partition("*")[0] for name in numbered}
    for name, cells in lines.items():
        short = name.partition("*")[2].lstrip(". ") if len(heads) == 1 and name in numbered else name
        yield (short or name.replace("*", "").strip(". ")), cells


def _flat(rows: Sequence[ModuleRow]) -> Grid:
    columns = tuple(str(i + 1) for i in range(min(FLAT, len(rows))))
    lines = []
    for start in range(0, len(rows), FLAT):
        part = rows[start : start + FLAT]
        lines.append((f"modules {start + 1} to {start + len(part)}", dict(zip(columns, part, strict=False))))
    return Grid("module", columns, tuple(lines))


def level(row: ModuleRow) -> str:
    """Return the class of a module's cell, one of LEGEND's."""
    if row.ok is None:
        return "n"
    if not row.ok:
        return "x"
    if row.max_abs == 0 or (row.max_abs is None and row.ratio is None):
        return "l0"
    ratio = row.ratio or 0.0
    return next((name for name, top in _STEPS if ratio <= top), "l5")


def strip(grid: Grid) -> str:
    """Draw one cell per module, coloured by its error as a part of its bound; a cross marks those beyond it."""
    width, height = _cell(grid), 18

    def cell(x: float, y: float, row: ModuleRow) -> Iterator[str]:
        kind = level(row)
        w, h = width - 2, height - 3
        yield f'<g class="cell {kind}"><title>{html_text(_said(row))}</title>'
        yield f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="2.5"/>'
        if kind == "x":
            m, n, r = x + w / 2, y + h / 2, 3.2
            yield f'<path d="M{m - r:g} {n - r:g}l{2 * r:g} {2 * r:g}m0 {-2 * r:g}l{-2 * r:g} {2 * r:g}"/>'
        yield "</g>"

    return _drawing(grid, width, height, "errors of modules", cell)


def bars(grid: Grid) -> str:
    """Draw the Frobenius norm of every delta as a bar, all on one scale; empty where no module has one.

    A bar for NaN or an infinity is as high as the highest, in the colour of errors.
    """
    top = largest_norm([row for _, cells in grid.lines for row in cells.values()])
    if top is None:
        return ""
    flat = len(grid.columns) == 1
    width, height = (BAR, 18) if flat else (_cell(grid), 30)

    def cell(x: float, y: float, row: ModuleRow) -> Iterator[str]:
        norm = row.delta_norm
        if norm is None:
            return
        share = (min(norm / top, 1.0) if top else 0.0) if math.isfinite(norm) else 1.0
        kind = "bar" if math.isfinite(norm) else "bar odd"
        if flat:
            w, h, above = max(share * (width - 70), 1.0), height - 5.0, y + 1
            yield f'<text class="axis" x="{x + w + 6:.1f}" y="{y + 13:g}">{norm:.3g}</text>'
        else:
            w, h = width - 2, max(share * (height - 7), 1.0)
            above = y + height - 5 - h
        yield f'<rect class="{kind}" x="{x:g}" y="{above:.2f}" width="{w:.2f}" height="{h:.2f}" rx="1">'
        yield f"<title>{html_text(f'{row.path}: norm {norm:.4g}')}</title></rect>"

    return _drawing(grid, width, height, "norms of deltas", cell)


def largest_norm(rows: Sequence[ModuleRow]) -> float | None:
    """Return the norm that the highest bar stands for."""
    return max((r.delta_norm for r in rows if r.delta_norm is not None and math.isfinite(r.delta_norm)), default=None)


def _drawing(grid: Grid, width: float, height: int, what: str, cell: Cell) -> str:
    """Put the cells of every line beside its name, under the numbers of the columns."""
    names = [escape(name) for name, _ in grid.lines]
    longest = min(max((len(name) for name in names), default=0), LABEL)
    left = 16 + 7.3 * longest
    total = left + width * len(grid.columns) + 8
    tall = 22 + height * len(grid.lines) + 2
    parts = [
        f'<svg role="img" aria-label="{what}" width="{total:.0f}" height="{tall}" '
        f'viewBox="0 0 {total:.0f} {tall}" xmlns="http://www.w3.org/2000/svg">'
    ]
    if any(grid.columns):
        parts.append(f'<text class="axis" x="{left - 10:.0f}" y="12" text-anchor="end">{grid.axis}</text>')
    every = _every(len(grid.columns), width)
    for i, column in enumerate(grid.columns):
        if i % every == 0:
            x = left + width * i + (width - 2) / 2
            parts.append(f'<text class="axis" x="{x:g}" y="12" text-anchor="middle">{html_text(column)}</text>')
    place = {column: left + width * i for i, column in enumerate(grid.columns)}
    for k, (name, (_, cells)) in enumerate(zip(names, grid.lines, strict=True)):
        y = 20 + height * k
        middle = y + height / 2 + 2.5
        parts.append(
            f'<text x="{left - 10:.0f}" y="{middle:g}" text-anchor="end">{html_text(_short(name))}'
            f"<title>{html_text(name)}</title></text>"
        )
        for column, row in cells.items():
            parts.extend(cell(place[column], y, row))
    return "".join([*parts, "</svg>"])


def _cell(grid: Grid) -> float:
    """Return the width of a column, such that the usual numbers of layers fill a page and none becomes too thin."""
    return float(max(14, min(40, ROOM // max(len(grid.columns), 1))))


def _every(count: int, width: float) -> int:
    """Return how many columns one number stands for, so that numbers of three digits do not touch."""
    return 1 if width >= 22 else 2 if count <= 50 else 4


def _short(name: str) -> str:
    """Keep the end of a long name, which tells more than its beginning."""
    return name if len(name) <= LABEL else "…" + name[1 - LABEL :]


def _said(row: ModuleRow) -> str:
    error = "" if row.max_abs is None else f", error {row.max_abs:.3g}"
    bound = "" if not row.bound else f" of {row.bound:.3g}"
    verdict = {None: "not compared", True: "equal", False: "different"}[row.ok]
    return f"{row.path}: {verdict}{error}{bound}" + (f" ({row.note})" if row.note else "")
