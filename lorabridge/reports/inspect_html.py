"""What an inspection found as one HTML page: no scripts, no network, readable in light and dark and on paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from . import plain, ranks_svg
from .html import STYLE, breakable
from .plain import count, html_text

if TYPE_CHECKING:
    from ..actions.inspect_ranks import RanksReport, SlicedTensor
    from ..actions.inspect_report import InspectReport

MARK = "lorabridge inspect page"
"""Stands near the beginning of every page, so that a later one may replace it."""
PICTURES = 24
"""Tensors that are drawn."""

OWN_STYLE = """
.head th { width: 9rem; } .head td { overflow-wrap: anywhere; }
.pair { display: flex; flex-wrap: wrap; gap: .4rem 2.2rem; align-items: flex-start; padding: .3rem 0; }
.pair > div { overflow-x: auto; max-width: 100%; }
.notes { margin-bottom: .8rem; }
.tensor { border: 1px solid var(--line); border-radius: .5rem; padding: .9rem 1.1rem; margin-top: 1rem; }
.tensor h3 { font: 600 .9rem ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.hollow { fill: none; stroke: var(--line); }
.slice rect { fill: hsl(var(--h) 62% 80%); stroke: var(--page); stroke-width: 1.5; }
.slice text { fill: #16181b; }
.slice rect.copy { fill: none; stroke: rgb(0 0 0 / .55); stroke-width: 1; stroke-dasharray: 3 2; }
.slice.lost rect { fill: var(--bad-soft); stroke: var(--bad); stroke-dasharray: 4 3; }
.slice.lost text, .slice.odd text { fill: var(--bad); font-weight: 700; }
.slice.odd rect { stroke: var(--bad); stroke-width: 2.5; }
.slice.none rect { fill: none; stroke: var(--line); } .slice.none text { fill: var(--soft); }
.sample { display: inline-block; width: 1rem; height: .8rem; border-radius: .15rem; margin-right: .35rem;
  vertical-align: -.08rem; background: hsl(137 62% 80%); }
.sample.copy { outline: 1px dashed rgb(0 0 0 / .6); outline-offset: -3px; }
.sample.lost { background: var(--bad-soft); border: 1px dashed var(--bad); }
.sample.odd { border: 2px solid var(--bad); }
@media (prefers-color-scheme: dark) { .slice rect { fill: hsl(var(--h) 38% 62%); } .sample { background:
  hsl(137 38% 62%); } .slice.odd text { fill: #5c0d10; } }
"""


def page(report: InspectReport, *, foot: str = "") -> str:
    """Return the page; everything that comes from files is escaped, control characters included."""
    tone, word = ("note", count(len(report.problems), "problem")) if report.problems else ("good", "No problems")
    body = [
        f'<section class="verdict {tone}"><h1>{word}</h1><p class="mono">{breakable(report.path)}</p></section>',
        "<h2>What it is</h2>" + _rows(report.head(), "head"),
        _problems(report),
        _ranks(report.ranks) if report.ranks is not None else "",
    ]
    header, rows = report.module_rows()
    if rows:
        body.append(f"<h2>{count(len(report.modules), 'module')}</h2>" + _table(header, rows))
    tensors = [(t.name, t.dtype, plain.shape(t.shape)) for t in report.tensors]
    listed = _table(("tensor", "dtype", "shape"), tensors)
    body.append(f"<details><summary>All {count(len(tensors), 'tensor')}</summary>{listed}</details>")
    body.append(f"<footer>{html_text(foot)}</footer>")
    return (
        f'<!doctype html>\n<html lang="en"><!-- {MARK} --><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{html_text(report.path)}: lorabridge inspect</title><style>{STYLE}{OWN_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _problems(report: InspectReport) -> str:
    items = []
    for problem in report.problems:
        places = "".join(f"<li><code>{html_text(place)}</code></li>" for place in problem.where[:20])
        if len(problem.where) > 20:
            places += f"<li>and {len(problem.where) - 20:,} more</li>"
        hint = f'<p class="soft">{html_text(problem.hint)}</p>' if problem.hint else ""
        items.append(f"<li>{html_text(problem.problem)}{f'<ul>{places}</ul>' if places else ''}{hint}</li>")
    return f"<h2>Problems</h2><ul>{''.join(items)}</ul>" if items else ""


def _ranks(ranks: RanksReport) -> str:
    from ..actions.inspect_ranks import spans

    header = ("grid", "cut", "slices", "copies", "ranks", "tensors", "for example")
    rows = [
        (" x ".join(map(str, row.grid)) or "-", row.cut,
         f"{row.slices}, {row.missing} missing" if row.missing else str(row.slices), row.copies, spans(row.ranks),
         str(row.tensors), row.example + ("" if row.shape is None else f" {plain.shape(row.shape)}"))
        for row in ranks.layouts
    ]  # fmt: skip
    drawn = [_tensor(tensor, ranks.ranks) for tensor in ranks.examples[:PICTURES]]
    more = len(ranks.examples) - PICTURES
    notes = "".join(f"<li>{html_text(note)}</li>" for note in ranks.notes)
    listed = f'<ul class="notes">{notes}</ul>' if notes else ""
    return (
        f"<h2>{html_text(ranks.head)}</h2>{listed}{_table(header, rows)}"
        f"<h2>{'Tensors' if ranks.shown else 'One tensor of each layout'} over the devices</h2>{LEGEND}"
        + "".join(drawn)
        + (f'<p class="soft">and {count(more, "tensor")} more</p>' if more > 0 else "")
    )


LEGEND = (
    '<div class="legend"><span>a colour per slice, numbers are ranks:</span>'
    '<span><span class="sample"></span>read from here</span>'
    '<span><span class="sample copy"></span>copies of it on the ranks in brackets</span>'
    '<span><span class="sample odd"></span>a copy differs</span>'
    '<span><span class="sample lost"></span>on no rank</span></div>'
)


def _tensor(tensor: SlicedTensor, ranks: int) -> str:
    known = f", {tensor.cut}, copies {tensor.copies}"
    shape = "shape unknown," if tensor.shape is None else plain.shape(tensor.shape)
    stage = f", stage {tensor.stage}" if tensor.stage else ""
    said = f"{shape} {tensor.dtype}{known if tensor.shape is not None else ''}{stage}"
    wrong = f'<p class="bad" style="color:var(--bad)">{html_text(tensor.problem)}</p>' if tensor.problem else ""
    drawings = "".join(
        f"<div>{drawing}</div>"
        for drawing in (ranks_svg.tensor_box(tensor), ranks_svg.device_grid(tensor, ranks))
        if drawing
    )
    return (
        f'<figure class="tensor"><h3>{breakable(tensor.name)}</h3><figcaption>{html_text(said)}</figcaption>{wrong}'
        f'<div class="pair">{drawings}</div></figure>'
    )


def _rows(rows: Iterable[Sequence[str]], kind: str) -> str:
    lines = "".join(f"<tr><th>{html_text(label)}</th><td>{html_text(text)}</td></tr>" for label, text in rows)
    return f'<div class="wide {kind}"><table><tbody>{lines}</tbody></table></div>'


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{html_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{breakable(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
