"""The report of a verification as Markdown (CommonMark with tables), for issues, logs and pull requests."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from .html import MARK, STATES, Digests, number, outcome, worst
from .plain import escape, size

if TYPE_CHECKING:
    from ..actions.verify_report import DepthResult, ModuleRow, VerifyReport

# Beside Markdown's own letters: mentions, formulas, and bare addresses, which become links on GitHub.
_SPECIAL = re.compile(r"([\\`*_\[\]|<>~&$@#]|:(?=//)|(?<=www)\.|^\s*[-+=]|^\d+(?=[.)]))", re.IGNORECASE)


def markdown(
    report: VerifyReport, *, digests: Digests | None = None, versions: Mapping[str, str] | None = None, when: str = ""
) -> str:  # fmt: skip
    """Return the report as text. Names from files are escaped: no markup, link, mention or HTML of theirs survives."""
    lines = [f"<!-- {MARK} -->", f"# {'✓ Equal' if report.ok else '✗ Different'}", "", plain(outcome(report)), ""]
    lines += [f"- {plain(line)}" for line in report.compared]
    if report.warnings:
        lines += ["", "## Warnings", "", *(f"- {plain(line)}" for line in report.warnings)]
    if not report.ok:
        lines += _modules("Worst modules", worst(report))
    lines += ["", "## What was compared", "", "| input | path | what it is | tensors | size |"]
    lines += ["|---|---|---|---:|---:|"]
    for file in report.files:
        what = plain(f"{file.dialect} ({file.framework}), {file.format}")
        lines.append(f"| {file.role} | {code(file.path)} | {what} | {file.tensors:,} | {size(file.nbytes)} |")
    sums = [(role, name, digest) for role, files in (digests or {}).items() for name, digest in files]
    if sums:
        lines += ["", "SHA-256:", "", *(f"- {role} {code(name)} {code(digest)}" for role, name, digest in sums)]
    for depth in report.depths:
        lines += _depth(depth)
    if report.ok:
        lines += _modules("Nearest to their bounds", worst(report))
    made = [f"{name} {version}" for name, version in (versions or {}).items()]
    foot = " · ".join([*([when] if when else []), f"{report.seconds:.1f} s", *made])
    lines += ["", "## To do it again", "", *_fenced(escape(report.command)), "", plain(foot), ""]
    return "\n".join(lines)


def _depth(depth: DepthResult) -> Iterator[str]:
    state = STATES[depth.state] if depth.state != "run" else "equal" if depth.ok else "different"
    yield from ("", f"## Depth {depth.name}: {state}", "")
    if depth.reason:
        yield from (plain(depth.reason), "")
    if depth.ok:
        yield from (f"- {plain(line)}" for line in depth.proved)
    for check in depth.checks:
        detail = f" ({plain(check.detail)})" if check.detail else ""
        yield f"- {'✓' if check.ok else '✗'} {plain(check.name)}{detail}"
        if not check.ok:
            yield from (f"  - {code(place)}" for place in check.where[:20])
            if len(check.where) > 20:
                yield f"  - and {len(check.where) - 20:,} more"
    compared = [row for row in depth.modules if row.ok is not None]
    if compared:
        yield f"- {len(compared) - len(depth.failed):,} of {len(compared):,} comparisons within their bounds"


def _modules(title: str, rows: Sequence[tuple[str, ModuleRow]]) -> list[str]:
    if not rows:
        return []
    head = ["", f"## {title}", "", "| module | depth | error | bound | of bound | cosine | |"]
    lines = []
    for depth, row in rows:
        bound = "bits" if row.bound == 0 else number(row.bound)
        cosine = "" if row.cosine is None else f"{row.cosine:.6f}"
        numbers = f"{number(row.max_abs)} | {bound} | {number(row.ratio)} | {cosine}"
        lines.append(f"| {code(row.path)} | {depth} | {numbers} | {plain(row.note)} |")
    return [*head, "|---|---|---:|---:|---:|---:|---|", *lines]


def plain(text: str) -> str:
    """Escape a text so that Markdown shows it as it is, on one line."""
    return _SPECIAL.sub(_escaped, escape(text))


def _escaped(found: re.Match[str]) -> str:
    special = found[0].strip()
    return f"&#{ord(special[0])};{special[1:]}" if special[0].isalnum() else f"\\{special}"


def code(text: str) -> str:
    """Spell a name as code that neither backticks nor the bars of a table end."""
    said = escape(text).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall("`+", said)), default=0) + 1)
    pad = " " if said[:1] in ("`", " ", "") or said[-1:] in ("`", " ") else ""
    return f"{fence}{pad}{said}{pad}{fence}"


def _fenced(text: str) -> list[str]:
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return [f"{fence}sh", text, fence]
