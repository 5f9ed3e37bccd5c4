"""The drawings of a verification as a PNG, through matplotlib where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
from typing import TYPE_CHECKING, Protocol

from ..errors import UsageError
from . import svg
from .html import MARK
from .plain import escape

if TYPE_CHECKING:
    from ..actions.verify_report import VerifyReport

COLOURS = {
    "l0": "#dfe3e8", "l1": "#cfe8e6", "l2": "#9dd0cd", "l3": "#62b1af", "l4": "#2f8c8c", "l5": "#0f5f63",
    "x": "#c62a2f", "n": "#ffffff",
}  # fmt: skip


class Axes(Protocol):
    """The part of ``matplotlib.axes.Axes`` that is used."""

    def bar(self, x: list[float], height: list[float], **style: object) -> object: ...  # noqa: D102
    def set_title(self, text: str, **style: object) -> object: ...  # noqa: D102
    def set_xticks(self, places: list[float], labels: list[str], **style: object) -> object: ...  # noqa: D102
    def set_yticks(self, places: list[float], labels: list[str], **style: object) -> object: ...  # noqa: D102
    def set_xlim(self, first: float, last: float) -> object: ...  # noqa: D102
    def set_ylim(self, first: float, last: float) -> object: ...  # noqa: D102
    def tick_params(self, **style: object) -> object: ...  # noqa: D102


def available() -> str:
    """Say why no PNG can be drawn; empty where it can."""
    found = importlib.util.find_spec("matplotlib") is not None
    return "" if found else "matplotlib not installed; pip install 'lorabridge[report]'"


def png(report: VerifyReport) -> bytes:
    """Draw the error strips, and the norms of the deltas once; UsageError without matplotlib."""
    if why := available():
        raise UsageError("a PNG needs matplotlib", where=why, hint="write FILE.html or FILE.md instead")
    # Not pyplot: it would choose a window system and keep the figure.
    figures = importlib.import_module("matplotlib.figure")
    drawings = [(depth.name, grid) for depth in report.depths for grid in svg.grids(depth.modules)]
    first = next((depth.name for depth in report.depths if svg.largest_norm(depth.modules) is not None), "")
    plots = [(name, grid, False) for name, grid in drawings]
    plots += [(name, grid, True) for name, grid in drawings if name == first and svg.bars(grid)]
    heights = [0.25 * len(grid.lines) + 0.9 for _, grid, _ in plots] or [0.5]
    figure = figures.Figure(figsize=(11, sum(heights) + 0.8), layout="constrained")
    tone = "#1a7f4b" if report.ok else "#c62a2f"
    title = _words(report.summary())
    figure.suptitle(title if len(title) < 110 else f"{title[:110]}…", color=tone, fontsize=9, ha="left", x=0.01)
    if plots:
        axes = figure.subplots(len(plots), 1, squeeze=False, height_ratios=heights)
        for (name, grid, normed), (at,) in zip(plots, axes, strict=True):
            _draw(at, name, grid, normed)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150, metadata={"Software": MARK})
    return out.getvalue()


def _draw(axes: Axes, name: str, grid: svg.Grid, normed: bool) -> None:
    place = {column: float(i) for i, column in enumerate(grid.columns)}
    top = svg.largest_norm([row for _, cells in grid.lines for row in cells.values()]) or 1.0
    for k, (_, cells) in enumerate(grid.lines):
        y = float(len(grid.lines) - 1 - k)
        x = [place[column] for column in cells]
        if normed:
            norms = [row.delta_norm or 0.0 for row in cells.values()]
            shares = [0.9 * min(norm / top, 1.0) if math.isfinite(norm) else 0.9 for norm in norms]
            axes.bar(x, shares, bottom=y - 0.45, width=0.88, color="#7b8fd6")
        else:
            kinds = [svg.level(row) for row in cells.values()]
            axes.bar(x, [0.84] * len(x), bottom=y - 0.42, width=0.9, color=[COLOURS[kind] for kind in kinds],
                     edgecolor=["#60646c" if kind == "n" else "none" for kind in kinds],
                     hatch=["xxx" if kind == "x" else "" for kind in kinds])  # fmt: skip
    step = 1 if len(place) <= 40 else 4
    axes.set_xticks([place[c] for c in grid.columns[::step]], list(grid.columns[::step]), fontsize=7)
    labels = [_words(label)[-svg.LABEL :] for label, _ in grid.lines]
    axes.set_yticks([float(len(labels) - 1 - k) for k in range(len(labels))], labels, fontsize=7)
    axes.set_xlim(-0.6, len(place) - 0.4)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.tick_params(length=0)
    what = f"norm of the delta (highest {top:.4g})" if normed else "error by bound: light to dark, red where different"
    axes.set_title(f"{name}: {what}, by {grid.axis}", fontsize=8, loc="left")


def _words(text: str) -> str:
    """Escape a text for matplotlib, to which dollars are formulas."""
    return escape(text).replace("$", r"\$")
