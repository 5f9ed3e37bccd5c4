"""The report of a verification as one HTML page: no scripts, no network, readable in light and dark and on paper."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..files.placeholders import spoken
from . import svg
from .plain import count, html_text, size

if TYPE_CHECKING:
    from ..actions.verify_report import Check, ComparedFile, DepthResult, ModuleRow, VerifyReport

MARK = "lorabridge verify report"
"""Stands near the beginning of every report, so that a later one may replace it."""
WORST, NEAREST = 20, 10

Digests = Mapping[str, Sequence[tuple[str, str]]]
"""For the role of each input (SRC, DST, BASE) its files and their SHA-256."""

STATES = {"run": "run", "refused": "refused", "left out": "left out"}

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c2024; --soft: #60646c; --line: #e0e3e8; --panel: #f7f8fa;
  --good: #1a7f4b; --good-soft: #e7f6ed; --bad: #c62a2f; --bad-soft: #fdecec; --warn: #8a5b00; --warn-soft: #fff6e0;
  --l0: #dfe3e8; --l1: #cfe8e6; --l2: #9dd0cd; --l3: #62b1af; --l4: #2f8c8c; --l5: #0f5f63; --bar: #7b8fd6; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --ink: #e8eaed; --soft: #9ba1a9; --line: #2e3238;
  --panel: #1c1f23; --good: #5fd39a; --good-soft: #142a20; --bad: #ff8a8a; --bad-soft: #351a1c; --warn: #f1c265;
  --warn-soft: #2e2511; --l0: #31363d; --l1: #22423f; --l2: #27605d; --l3: #2f8582; --l4: #4fb3ae; --l5: #9be4dd;
  --bar: #7184cf; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1, h2, h3 { line-height: 1.25; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; }
p { margin: .4rem 0; }
code, pre, td.path { font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; font-size: .85rem; }
.mono { font-family: ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; }
code, td.path { overflow-wrap: anywhere; }
.verdict { border: 1px solid var(--line); border-left: .5rem solid var(--tone); border-radius: .5rem;
  background: var(--tint); padding: 1.1rem 1.4rem; }
.verdict h1 { color: var(--tone); font-size: 1.75rem; }
.verdict p { overflow-wrap: anywhere; margin-bottom: 0; }
.good { --tone: var(--good); --tint: var(--good-soft); } .bad { --tone: var(--bad); --tint: var(--bad-soft); }
.idle { --tone: var(--soft); --tint: var(--panel); } .note { --tone: var(--warn); --tint: var(--warn-soft); }
.tag { display: inline-block; border-radius: 1rem; padding: 0 .6rem; font-size: .82rem; font-weight: 600;
  color: var(--tone); background: var(--tint); border: 1px solid var(--line); white-space: nowrap; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .6rem; font-size: .87rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-size: .8rem; color: var(--soft); font-weight: 600; white-space: nowrap; background: var(--panel); }
tr:last-child > td { border-bottom: 0; }
td.num, th.num { text-align: right; white-space: nowrap; }
td.path { min-width: 17rem; } td .soft, td .sum { font-size: .78rem; color: var(--soft); }
td .sum span { overflow-wrap: anywhere; } td .say { font: .82rem/1.4 system-ui, sans-serif; color: var(--soft); }
tr.bad .say { color: var(--bad); }
tr.bad td:first-child { box-shadow: inset .25rem 0 var(--bad); }
.depth { border: 1px solid var(--line); border-radius: .5rem; padding: 1rem 1.2rem 1.1rem; margin-top: 1rem; }
.depth header { display: flex; gap: .7rem; align-items: baseline; flex-wrap: wrap; }
.depth header .time { margin-left: auto; color: var(--soft); font-size: .85rem; }
ul { margin: .6rem 0 0; padding-left: 1.2rem; } li { margin: .25rem 0; overflow-wrap: anywhere; }
ul.checks { list-style: none; padding-left: 0; }
ul.checks > li { padding-left: 1.6rem; text-indent: -1.6rem; } ul.checks li ul { text-indent: 0; }
.sign { display: inline-block; width: 1.6rem; text-indent: 0; font-weight: 700; color: var(--tone); }
.soft, figcaption { color: var(--soft); font-size: .87rem; }
figure { margin: 1.1rem 0 0; } .scroll { overflow-x: auto; padding: .3rem 0; }
figcaption b { color: var(--ink); }
svg { display: block; }
svg text { font: 12px ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; fill: var(--ink); }
svg text.axis { fill: var(--soft); font-size: 10.5px; }
.l0 { --k: var(--l0); } .l1 { --k: var(--l1); } .l2 { --k: var(--l2); } .l3 { --k: var(--l3); } .l4 { --k: var(--l4); }
.l5 { --k: var(--l5); } .x { --k: var(--bad); }
.cell rect { fill: var(--k); } .key { background: var(--k); }
.x path { stroke: var(--page); stroke-width: 1.6; fill: none; stroke-linecap: round; }
.cell.n rect { fill: none; stroke: var(--soft); stroke-dasharray: 2 2; }
.key.n { border: 1px dashed var(--soft); }
.bar { fill: var(--bar); } .bar.odd { fill: var(--bad); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .8rem; color: var(--soft); margin-top: .3rem; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .35rem;
  vertical-align: -.08rem; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; margin: 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--soft); margin-bottom: .6rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media (max-width: 44rem) { main { padding: 1rem .8rem 3rem; } .verdict { padding: .9rem 1rem; }
  td.path { min-width: 11rem; } .inputs thead { display: none; } .inputs tr { display: block; padding: .5rem 0;
  border-bottom: 1px solid var(--line); } .inputs tr:last-child { border: 0; } .inputs td { display: block; border: 0;
  padding: .1rem .7rem; text-align: left; } .inputs td::before { content: attr(data-is);
  color: var(--soft); } .inputs td:first-child { font-weight: 600; } }
@media print { main { max-width: none; } .depth, figure, tr { break-inside: avoid; } }
"""


def page(
    report: VerifyReport, *, digests: Digests | None = None, versions: Mapping[str, str] | None = None, when: str = ""
) -> str:  # fmt: skip
    """Return the page. ``versions``: of the libraries that took part; ``when``: date and time as text.

    Everything that comes from files is escaped, control characters included.
    """
    verdict = report.verdict
    first = next((depth.name for depth in report.depths if svg.largest_norm(depth.modules) is not None), "")
    body = "".join(
        [
            _head(report),
            _list("Warnings", report.warnings),
            "" if report.ok else _worst(report),
            _inputs(report, digests or {}),
            "<h2>What was found</h2>",
            *(_depth(depth, normed=depth.name == first) for depth in report.depths),
            _worst(report) if report.ok else "",
            "<h2>To do it again</h2><pre>" + html_text(report.command) + "</pre>",
            _every_module(report),
            _foot(report, versions or {}, when),
        ]
    )
    return (
        f'<!doctype html>\n<html lang="en"><!-- {MARK} --><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{html_text(verdict)}: lorabridge verify</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _head(report: VerifyReport) -> str:
    tone, sign = ("good", "✓ Equal") if report.ok else ("bad", "✗ Different")
    said = "".join(f"<p>{html_text(line)}</p>" for line in report.compared)
    return (
        f'<section class="verdict {tone}"><h1>{sign}</h1><p>{html_text(outcome(report))}</p></section>'
        f'<div class="soft">{said}</div>'
    )


def outcome(report: VerifyReport) -> str:
    """Return the verdict's line without what the page says elsewhere: the word and the paths."""
    return report.summary().removeprefix(f"{report.verdict}: {report.files[0].path} and {report.files[1].path}: ")


def _inputs(report: VerifyReport, digests: Digests) -> str:
    head = "<tr><th>input</th><th>path</th><th>what it is</th><th class=num>tensors</th><th class=num>size</th></tr>"
    rows = "".join(_input(file, digests.get(file.role, ())) for file in report.files)
    table = f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"
    return f'<h2>What was compared</h2><div class="wide inputs">{table}</div>'


def _input(file: ComparedFile, digests: Sequence[tuple[str, str]]) -> str:
    sums = "".join(
        f'<div class="sum">{breakable(name)} sha256 <span>{html_text(digest)}</span></div>' for name, digest in digests
    )
    what = f"{file.dialect} ({file.framework}), {file.format}"
    return (
        f'<tr><td>{html_text(file.role)}</td><td class="path">{breakable(file.path)}{sums}</td>'
        f'<td>{html_text(what)}</td><td class=num data-is="tensors ">{file.tensors:,}</td>'
        f'<td class=num data-is="size ">{size(file.nbytes)}</td></tr>'
    )


def _depth(depth: DepthResult, *, normed: bool) -> str:
    tone, word = "idle", STATES[depth.state]
    if depth.state == "run":
        tone, word = ("good", "equal") if depth.ok else ("bad", "different")
    elif depth.state == "refused":
        tone = "note"
    time = f'<span class="time">{depth.seconds:.1f} s</span>' if depth.state == "run" else ""
    parts = [f'<header><h3>{html_text(depth.name)}</h3><span class="tag {tone}">{word}</span>{time}</header>']
    if depth.reason:
        parts.append(f"<p>{html_text(depth.reason)}</p>")
    if depth.proved and depth.ok:
        parts.append("<ul>" + "".join(f"<li>{html_text(line)}</li>" for line in depth.proved) + "</ul>")
    if depth.checks:
        parts.append('<ul class="checks">' + "".join(map(_check, depth.checks)) + "</ul>")
    parts.extend(_figures(depth.modules, normed))
    return f'<section class="depth" id="{html_text(depth.name)}">{"".join(parts)}</section>'


def _check(check: Check, most: int = 20) -> str:
    tone, sign = ("good", "✓") if check.ok else ("bad", "✗")
    detail = f' <span class="soft">{html_text(check.detail)}</span>' if check.detail else ""
    places = "".join(f"<li><code>{html_text(place)}</code></li>" for place in check.where[:most])
    if len(check.where) > most:
        places += f"<li>and {len(check.where) - most:,} more</li>"
    return (
        f'<li class="{tone}"><span class="sign">{sign}</span>{html_text(check.name)}{detail}'
        + (f"<ul>{places}</ul>" if places and not check.ok else "")
        + "</li>"
    )


def _figures(rows: Sequence[ModuleRow], normed: bool) -> Iterator[str]:
    """Yield the error strips of one depth and, once in a report, the delta bars."""
    found = svg.grids(rows)
    for grid in found:
        yield f'<figure><div class="scroll">{svg.strip(grid)}</div></figure>'
    if found:
        yield f'<div class="legend"><span>error as a part of its bound:</span>{LEGEND}</div>'
    for grid in found if normed else ():
        drawn = svg.bars(grid)
        if drawn:
            top = svg.largest_norm([row for _, cells in grid.lines for row in cells.values()])
            yield (
                f'<figure><figcaption>Norms of the deltas <span class="mono">‖scaling · B A‖</span>; '
                f'the highest bar is {top:.4g}</figcaption><div class="scroll">{drawn}</div></figure>'
            )


def worst(report: VerifyReport) -> list[tuple[str, ModuleRow]]:
    """Return the modules to show first: those that differ, or those nearest to their bounds where none does."""
    failed = sum(len(depth.failed) for depth in report.depths)
    if not report.ok:
        return list(report.worst(min(failed, WORST)))
    return [item for item in report.worst(NEAREST) if item[1].ok is not None]


def _worst(report: VerifyReport) -> str:
    rows = worst(report)
    if not rows:
        return ""
    more = sum(len(depth.failed) for depth in report.depths) - len(rows)
    rest = f'<p class="soft">and {count(more, "module")} more</p>' if more > 0 else ""
    return f"<h2>{'Nearest to their bounds' if report.ok else 'Worst modules'}</h2>{_table(rows)}{rest}"


def _every_module(report: VerifyReport) -> str:
    rows = [(depth.name, row) for depth in report.depths for row in depth.modules]
    if len(rows) <= WORST:
        return ""
    return f"<details><summary>All {count(len(rows), 'comparison')}</summary>{_table(rows)}</details>"


LEGEND = "".join(
    f'<span><span class="key {kind}"></span>{html_text(text)}</span>' for kind, text in svg.LEGEND
)  # fmt: skip

HEADER = (
    ("module", ""), ("depth", ""), ("kind", ""), ("rank", "num"), ("scaling", "num"), ("norm of delta", "num"),
    ("error", "num"), ("bound", "num"), ("of bound", "num"), ("ulps", "num"), ("cosine", "num"),
)  # fmt: skip


def _table(rows: Sequence[tuple[str, ModuleRow]]) -> str:
    """Spell modules as a table without the columns in which nothing stands."""
    lines = [_cells(*row) for row in rows]
    kept = [i for i in range(len(HEADER)) if any(line[i] for line in lines)]
    head = "".join(f"<th class={HEADER[i][1] or 'text'}>{HEADER[i][0]}</th>" for i in kept)
    body = []
    for (_, row), line in zip(rows, lines, strict=True):
        cells = "".join(f'<td class="{_kind(i)}">{line[i]}</td>' for i in kept)
        body.append(f'<tr class="bad">{cells}</tr>' if row.ok is False else f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _kind(column: int) -> str:
    return HEADER[column][1] or ("path" if column == 0 else "text")


def _cells(depth: str, row: ModuleRow) -> tuple[str, ...]:
    """Return one row's cells, escaped."""
    name = breakable(row.path)
    if row.origin and row.origin != row.path:
        name += f'<div class="soft">{breakable(row.origin)}</div>'
    if row.note:
        name += f'<div class="say">{html_text(row.note)}</div>'
    bound = "bits" if row.bound == 0 else number(row.bound)
    cosine = "" if row.cosine is None else f"{row.cosine:.6f}"
    return (
        name, html_text(depth), html_text(row.kind), str(row.rank or ""), number(row.scaling, 6),
        number(row.delta_norm, 4), number(row.max_abs), bound, number(row.ratio), number(row.ulps), cosine,
    )  # fmt: skip


def breakable(path: str) -> str:
    """Escape a path and let lines break after its dots and slashes."""
    return re.sub(r"([./])(?=[^./])", r"\1<wbr>", html_text(spoken(path)))


def number(value: float | None, digits: int = 3) -> str:
    """Spell a number with a few digits; nothing where there is none."""
    if value is None:
        return ""
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.{digits}g}"


def _list(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return f"<h2>{title}</h2><ul>" + "".join(f"<li>{html_text(line)}</li>" for line in lines) + "</ul>"


def _foot(report: VerifyReport, versions: Mapping[str, str], when: str) -> str:
    made = [f"{name} {version}" for name, version in versions.items()]
    parts = [*([when] if when else []), f"{report.seconds:.1f} s", *made]
    return f"<footer>{html_text(' · '.join(parts))}</footer>"
