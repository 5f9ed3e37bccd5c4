"""Look at family tables: list them, show one as correspondences, check a table file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError, UsageError
from ..families.rules import Prefix, Rule, SideName, Table
from ..families.tables import load_table, load_tables

_SIDES: tuple[SideName, SideName] = ("hf", "ms")


@dataclass(frozen=True, slots=True)
class TableSummary:
    """One line of the list. ``layouts``: the layout options and their choices; ``rules``: how many there are."""

    family: str
    model_types: tuple[str, ...]
    file: str
    rules: int
    layouts: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class TableList:
    """Every table that can be used, by family."""

    tables: tuple[TableSummary, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One correspondence: names with their holes, what happens between them, when, and the line that says so."""

    hf: tuple[str, ...]
    ms: tuple[str, ...]
    kind: str
    operation: str
    condition: str
    line: str


@dataclass(frozen=True, slots=True)
class TableContent:
    """One table, readable: prefixes, sizes as expressions over the config, layout options, rows."""

    family: str
    file: str
    hf_prefix: str
    ms_prefix: str
    sizes: tuple[tuple[str, str], ...]
    layouts: tuple[tuple[str, tuple[tuple[str, str], ...], str], ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class TableCheck:
    """The outcome of checking a file: ``problems`` with file and line, or the counts of what it holds."""

    path: str
    problems: tuple[str, ...]
    family: str = ""
    counts: tuple[tuple[str, int], ...] = field(default=())

    @property
    def ok(self) -> bool:
        """The table loads and every law holds."""
        return not self.problems


def list_tables(extra_dir: Path | None = None) -> TableList:
    """Return every table, those of ``extra_dir`` beside the shipped ones; an InputError names a malformed one."""
    found = sorted(load_tables(extra_dir).values(), key=lambda table: table.family)
    return TableList(
        tuple(
            TableSummary(
                table.family,
                table.model_types,
                table.file,
                len(table.rules),
                tuple((layout.name, tuple(choice for choice, _ in layout.choices)) for layout in table.layouts),
            )
            for table in found
        )
    )


def show(family: str, extra_dir: Path | None = None) -> TableContent:
    """Return one table's correspondences; a UsageError lists the families when there is no such table."""
    known = load_tables(extra_dir)
    if family not in known:
        raise UsageError(f"no table for the family {family!r}", hint=f"known are {', '.join(sorted(known))}")
    table = known[family]
    return TableContent(
        family=table.family,
        file=table.file,
        hf_prefix=_prefix(table.hf_prefix),
        ms_prefix=_prefix(table.ms_prefix),
        sizes=tuple((name, size.text) for name, size in table.sizes),
        layouts=tuple((entry.name, entry.choices, entry.default or "") for entry in table.layouts),
        rows=tuple(_rows(table)),
    )


def check(path: Path) -> TableCheck:
    """Load and prove one table file; problems are returned, not raised."""
    try:
        table = load_table(path)
    except InputError as error:
        return TableCheck(str(path), error.where if len(error.where) > 1 else (_line(error),))
    kinds = ("linear", "embedding", "conv", "param")
    counts = [(kind, sum(rule.kind == kind for rule in table.rules)) for kind in kinds]
    counts += [
        ("stack", len(table.stacks)),
        ("tied", len(table.tied)),
        ("buffer", len(table.buffers)),
        ("layout", len(table.layouts)),
    ]
    return TableCheck(str(path), (), table.family, tuple((name, number) for name, number in counts if number))


def _line(error: InputError) -> str:
    return f"{error.problem}: {error.where[0]}" if "not a valid" not in error.problem else error.where[0]


def _prefix(prefix: Prefix) -> str:
    texts = " or ".join((prefix.text, *prefix.also))
    return f"{texts} (optional)" if prefix.optional else texts


def _rows(table: Table) -> Iterator[Row]:
    for rule in table.rules:
        faces = {side: tuple(_name(table, rule, side)) for side in _SIDES}
        conditions = [f"{key}={choice}" for key, choice in rule.when] + list(rule.only)
        yield Row(faces["hf"], faces["ms"], rule.kind, _operation(rule), ", ".join(conditions), str(rule.ref))
    for stack in table.stacks:
        stored = table.prefix(stack.owner).text * stack.prefixed + stack.stored.text
        row = (stored,), (stack.item.text,)
        mine, items = row if stack.owner == "hf" else row[::-1]
        when = ", ".join(f"{key}={choice}" for key, choice in stack.when)
        flat = ", joined to the next axis" if stack.flat else ""
        yield Row(mine, items, "stack", f"{{{stack.hole}}} counts along axis 0{flat}", when, str(stack.ref))
    for tied in table.tied:
        sides = [(str(template),) if template else () for template in (tied.hf, tied.ms)]
        when = ", ".join(f"{key}={choice}" for key, choice in tied.when)
        yield Row(sides[0], sides[1], "tied", f"equals {tied.to}", when, str(tied.ref))
    for buffer in table.buffers:
        sides = [(str(template),) if template else () for template in (buffer.hf, buffer.ms)]
        yield Row(sides[0], sides[1], "buffer", f"left out: {buffer.drop}", "", str(buffer.ref))


def _name(table: Table, rule: Rule, side: SideName) -> Iterator[str]:
    face = rule.side(side)
    for module in face.faces:
        parameter = f".{face.weight}" if rule.kind == "embedding" else ""
        yield (table.prefix(side).text if rule.prefixed else "") + module.template.text + parameter


def _operation(rule: Rule) -> str:
    words = []
    if len(rule.parts) > 1:
        rows = " ".join(f"{part}[{size}]" for part, size in zip(rule.parts, rule.out, strict=True))
        count = {side: len(rule.side(side).faces) for side in _SIDES}
        verb = "parts" if count["hf"] == count["ms"] else "split" if count["hf"] < count["ms"] else "fuse"
        words.append(f"{verb} {rows}")
    for side in _SIDES:
        groups = dict.fromkeys(face.groups.text for face in rule.side(side).faces if len(face.parts) > 1)
        words += [f"in {text} groups on {side}" for text in groups if text != "1"]
        words += [f"{side} rows {rows.text}" for rows in rule.side(side).rows if rows is not None]
        stored = rule.side(side).stored
        words += [f"{side} axes {stored.text}"] if stored is not None else []
    if rule.hf.order != rule.ms.order:
        words.append("transpose")
    return ", ".join(words) or "rename"
