"""The commands ``lorabridge tables list``, ``show`` and ``check``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import DifferentError, InputError, OutputError
from ..reports import plain
from ._group import Command, Group, Manual, documented
from ._options import mappings_option, output_options
from ._terminal import Output, width
from ._values import LOCATION, known_family, matching_families

if TYPE_CHECKING:
    from ..actions.tables import Row, TableContent

FOUND_PROBLEMS = DifferentError.exit_code
OUTPUT = {"Output": ("json", "quiet", "verbose")}


@documented(
    Manual(
        examples=(
            "lorabridge tables list",
            "lorabridge tables show gpt2",
            "lorabridge tables check my_tables/mine.toml",
        )
    )
)
@click.group("tables", cls=Group)
def tables() -> None:
    """List, show and check tables of model families.

    A table says how a family's modules are called on the Hugging Face side and on the MindSpore side. The grammar is
    in mappings/README.md; tables of your own go into a directory that --mappings names.
    """


@documented(
    Manual(groups=OUTPUT, examples=("lorabridge tables list", "lorabridge tables list --mappings mine/ --json"))
)
@tables.command("list", cls=Command)
@mappings_option
@output_options
def list_(mappings: Path | None, json: bool, quiet: bool, verbose: bool) -> None:
    """List every table that can be used.

    The layouts are what --layout takes; -v adds their values and the tables' files.
    """
    from ..actions.tables import list_tables

    out = Output("tables list", json, quiet, verbose)
    found = list_tables(mappings)
    if json:
        out.document({"tables": [plain.plain(table) for table in found.tables]})
        return
    header, right = ["family", "model types", "rules", "layouts"], "  r"
    rows = [
        [t.family, ", ".join(t.model_types), str(t.rules), ", ".join(n for n, _ in t.layouts)] for t in found.tables
    ]
    if out.verbose:
        header.append("file")
        for row, t in zip(rows, found.tables, strict=True):
            row[3:] = ["; ".join(f"{n}={'|'.join(c)}" for n, c in t.layouts), t.file]
    out.result(plain.table(header, rows, right=right, width=width()))
    if not out.verbose:
        out.hint(
            "-v lists the values that --layout takes, `lorabridge tables show FAMILY` what they mean", label="note: "
        )


@documented(
    Manual(
        arguments={"FAMILY": "Name of a table, as `lorabridge tables list` prints it."},
        groups=OUTPUT,
        examples=("lorabridge tables show bert", "lorabridge tables show gpt2 --json"),
    )
)
@tables.command("show", cls=Command)
@click.argument("family", metavar="FAMILY", shell_complete=matching_families)
@mappings_option
@output_options
def show(family: str, mappings: Path | None, json: bool, quiet: bool, verbose: bool) -> None:
    """Show a table as correspondences between names.

    Holes such as {i} stand for numbers; each line ends with the table's line that says so.
    """
    from ..actions.tables import show as run

    out = Output("tables show", json, quiet, verbose)
    found = run(known_family(family, mappings, hint="FAMILY"), mappings)
    if json:
        out.document({"table": plain.plain(found)})
    else:
        out.result("\n".join([*_head(found), "", *(line for row in found.rows for line in _lines(row))]))


@documented(
    Manual(
        arguments={"FILE": "A table file (TOML)."},
        groups=OUTPUT,
        examples=("lorabridge tables check mine.toml", "lorabridge tables check mine.toml --json"),
    )
)
@tables.command("check", cls=Command)
@click.argument("file", metavar="FILE", type=LOCATION)
@output_options
@click.pass_context
def check(ctx: click.Context, file: Path, json: bool, quiet: bool, verbose: bool) -> None:
    """Check a table file: grammar and the laws it must obey.

    The exit code is 0 when every law holds and 1 when not; each problem is told with its line.
    """
    from ..actions.tables import check as run

    out = Output("tables check", json, quiet, verbose)
    if not file.is_file():
        problem = "a table is one file, this is none" if file.exists() else "no such file"
        raise InputError(problem, where=str(file), hint="name one table file")
    done = run(file)
    if json:
        counted = {"family": done.family, "counts": dict(done.counts)}
        out.document({"path": done.path, "ok": done.ok, **counted, "problems": done.problems})
    elif done.ok:
        counts = ", ".join(f"{number} {kind}" for kind, number in done.counts if number)
        out.summary(f"{plain.escape(done.path)} is a valid table of family {plain.escape(done.family)} ({counts})")
    else:
        lines = [f"{plain.escape(done.path)}: {plain.count(len(done.problems), 'problem')}"]
        out.result("\n".join([*lines, *(f"  {plain.escape(problem)}" for problem in done.problems)]))
    if not done.ok:
        ctx.exit(FOUND_PROBLEMS)


@documented(
    Manual(
        arguments={
            "HF": "A Hugging Face model's directory, with its config.json.",
            "MS": "A MindSpore checkpoint of the same network, of the same values where there is one.",
        },
        groups={"Writing": ("output", "family"), **OUTPUT},
        examples=(
            "lorabridge tables infer model/ model.ckpt",
            "lorabridge tables infer model/ model.ckpt -o mine.toml",
        ),
    )
)
@tables.command("infer", cls=Command)
@click.argument("hf", metavar="HF", type=LOCATION)
@click.argument("ms", metavar="MS", type=LOCATION)
@click.option("-o", "--output", metavar="FILE", type=LOCATION, help="Write the table here.")
@click.option("--family", metavar="NAME", default="mine", show_default=True, help="What the table's family is called.")
@output_options
@click.pass_context
def infer(
    ctx: click.Context, hf: Path, ms: Path, output: Path | None, family: str, json: bool, quiet: bool, verbose: bool
) -> None:
    """Propose a table from two checkpoints of one network.

    Where both hold the same values contents decide: transposes, splits, fusions and their row order are found. What
    only names and shapes support is marked, and so is what fits nowhere. The proposal is a draft: read it, then check
    it with `lorabridge tables check` and a conversion there and back. The exit code is 1 where something is left over.
    """
    from ..actions.infer import infer as run
    from ..actions.infer_text import counts, problems, table_text

    out = Output("tables infer", json, quiet, verbose)
    if output is not None and output.exists():
        raise OutputError("the output exists already", where=str(output), hint="choose another name")
    found = run(hf, ms)
    text, rests = table_text(found, family), counts(found)
    wrong = problems(text)
    if output is not None:
        output.write_text(text, "utf-8")
    if json:
        out.document({"table": text, "counts": dict(rests), "problems": wrong})
    else:
        if output is None:
            out.result(text.rstrip())
        sure = f"{plain.count(rests['contents'], 'rule')} by contents, {rests['equal contents']} by contents and name"
        left = f"{rests['shapes']} by shape and name only, {plain.count(rests['left'], 'name')} left over"
        out.hint(f"{sure}, {left}", label="note: ")
        out.warn([f"not a valid table yet: {problem}" for problem in wrong])
        if not any(rests[name] for name in ("contents", "equal contents", "shapes")):
            out.hint("the files have no parameter in common: give two whole checkpoints of one network")
    if wrong or rests["left"]:
        ctx.exit(FOUND_PROBLEMS)


def _head(table: TableContent) -> list[str]:
    prefixes = [f"{side} {prefix}" for side, prefix in (("hf", table.hf_prefix), ("ms", table.ms_prefix)) if prefix]
    lines = [f"{table.family} ({table.file})"]
    lines += [f"prefix  {', '.join(prefixes)}"] if prefixes else []
    lines += [f"size    {name} = {size}" for name, size in table.sizes]
    for name, choices, default in table.layouts:
        lines += [
            f"layout  {name}={choice}: {why}{' (default)' if choice == default else ''}" for choice, why in choices
        ]
    return [plain.escape(line) for line in lines]


def _lines(row: Row) -> list[str]:
    when = f" if {row.condition}" if row.condition else ""
    lines = [", ".join(row.hf) or "(nothing)", f"  → {', '.join(row.ms) or '(nothing)'}"]
    return [plain.escape(line) for line in (*lines, f"    {row.kind}: {row.operation}{when} ({row.line})")]
