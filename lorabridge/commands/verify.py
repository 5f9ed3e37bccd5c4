"""The command ``lorabridge verify``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from ..reports import plain
from ._group import Command, Manual, documented
from ._options import (
    NamedGiven,
    ShownGiven,
    StatedGiven,
    fact_options,
    key_option,
    mappings_option,
    output_options,
    progress_option,
    ranks_options,
    table_options,
    told,
)
from ._progress import Progress
from ._terminal import Output, width
from ._values import FACTS, LOCATION, Name, check_family, dialects, is_fact

if TYPE_CHECKING:
    from ..actions.verify_inputs import VerifyOptions
    from ..actions.verify_report import DepthResult, ModuleRow, VerifyReport

SHOWN = 10
"""Modules and places that are listed without --verbose."""


class Given(NamedGiven, StatedGiven, ShownGiven):
    """The options as click hands them over."""

    base: Path | None
    depth: tuple[str, ...]
    model: bool
    source_dialect: str | None
    target_dialect: str | None
    seed: int
    report: Path | None


@documented(
    Manual(
        arguments={
            "SRC": "A checkpoint: an adapter or a model, a file, a sharded set's index, or a directory.",
            "DST": "What it was converted to (or from), another adapter, or a model into which it was merged.",
        },
        groups={
            "What to compare": ("base", "depth", "model", "seed"),
            "From and to": ("source_dialect", "target_dialect", "family", "config", "layout", "mappings", "key_file"),
            "What the files do not say": tuple(FACTS),
            "Ranks": ("strategies", "steps"),
            "Output": ("report", "json", "quiet", "verbose", "no_progress"),
        },
        examples=(
            "lorabridge verify peft_adapter/ out.ckpt",
            "lorabridge verify lora.pt out.ckpt --alpha 16 --depth tensors",
            "lorabridge verify adapter/ merged/ --base model/",
            "lorabridge verify adapter/ out.ckpt --base model/ --model --report p.html",
        ),
        optional={"--fan-in-fan-out": (is_fact("fan_in_fan_out"), "yes")},
    )
)
@click.command("verify", cls=Command)
@click.argument("source", metavar="SRC", type=LOCATION)
@click.argument("target", metavar="DST", type=LOCATION)
@click.option("--base", metavar="BASE", type=LOCATION,
              help="The model without the adapter, in either framework's names. Without it frozen weights are random; "
              "an adapter and a merged model need it.")  # fmt: skip
@click.option("--depth", type=click.Choice(["tensors", "layers", "model"]), multiple=True,
              help="Compare at this depth; by default tensors and layers where possible. May be repeated.")  # fmt: skip
@click.option("--model", is_flag=True,
              help="Run the whole network in both frameworks too (depth model); an adapter needs --base.")  # fmt: skip
@click.option("--seed", metavar="N", type=click.IntRange(min=0), default=0, show_default=True,
              help="Seed of random inputs and frozen weights.")  # fmt: skip
@click.option("--from", "source_dialect", type=Name("dialect", dialects), metavar="DIALECT",
              help="Dialect of SRC, where detection is wrong or cannot decide.")  # fmt: skip
@click.option("--to", "target_dialect", type=Name("dialect", dialects), metavar="DIALECT",
              help="Dialect of DST, where detection is wrong or cannot decide.")  # fmt: skip
@table_options(
    "adapter_config.json of SRC or the model's config.json, where it is not beside SRC.",
    family="Table of module names between the two; by default a manifest's, or the one that fits.",
    example="qkv=grouped",
)
@mappings_option
@key_option
@fact_options
@ranks_options(SRC="source", DST="target", BASE="base")
@click.option("--report", metavar="FILE", type=LOCATION,
              help="Write the findings into FILE.html, FILE.md or FILE.png as well.")  # fmt: skip
@output_options
@progress_option
@click.pass_context
def verify(context: click.Context, source: Path, target: Path, **given: Unpack[Given]) -> None:
    """Prove that two files mean the same, or show where they do not.

    Depth tensors compares the files themselves: the conversion between them run again in both directions, or factors
    and deltas, or base + scaling * B A with a merged model. Depth layers runs every adapted layer with torch and peft
    (or loralib) on one side and with MindSpore on the other and holds the outputs against a bound that follows from
    their types and widths. --model runs the whole network in both and compares every block and the logits. Exit code 0
    means equal, 1 different.
    """
    out = Output("verify", given["json"], given["quiet"], given["verbose"])
    check_family(given["family"], given["mappings"])
    options = _options(given)
    from ..actions.verify import verify as run

    if given["report"] is not None:
        from ..actions.report_file import check_path

        check_path(given["report"])
    with _Stages(enabled=not (given["no_progress"] or given["quiet"])) as stages:
        found = run(source, target, options, command=_command(context), progress=stages)
    if given["report"] is not None:
        from ..actions.report_file import write_report

        write_report(found, given["report"])
    if out.json:
        out.document(found.as_json())
    else:
        _show(out, found)
    if found.exit_code:
        raise click.exceptions.Exit(found.exit_code)


class _Stages:
    """Show the progress of one depth after the other."""

    def __init__(self, *, enabled: bool) -> None:
        self._enabled = enabled
        self._name = ""
        self._bar: Progress | None = None

    def __enter__(self) -> _Stages:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)

    def __call__(self, depth: str, done: int, total: int) -> None:
        if depth != self._name or self._bar is None:
            self.__exit__()
            self._name, self._bar = depth, Progress(f"verifying {depth}", enabled=self._enabled)
        self._bar(done, total)


def _options(given: Given) -> VerifyOptions:
    from ..actions.verify_inputs import VerifyOptions

    return VerifyOptions(
        **told(given), base=given["base"], depths=given["depth"], model=given["model"],
        source_dialect=given["source_dialect"], target_dialect=given["target_dialect"], seed=given["seed"],
    )  # fmt: skip


def _command(context: click.Context) -> str:
    """Spell a command that compares the same files in the same way; how it prints is left out."""
    words = ["lorabridge", "verify", str(context.params["source"]), str(context.params["target"])]
    silent = {"source", "target", "report", "json", "quiet", "verbose", "no_progress"}
    for option in context.command.params:
        value = context.params.get(option.name or "")
        if option.name in silent or value in (None, (), False) or value == option.default:
            continue
        for item in value if isinstance(value, tuple) else (value,):
            words += [option.opts[-1], *([] if item is True else [str(item)])]
    return shlex.join(words)


def _show(out: Output, found: VerifyReport) -> None:
    out.result(plain.escape(found.summary()))
    _show_modules(out, found)
    for depth in found.depths:
        _show_checks(out, depth)
    for line in found.compared:
        out.summary(plain.escape(line))
    for depth in found.depths:
        for line in depth.proved if depth.ok else ():
            out.summary(plain.escape(f"{depth.name}: {line}"))
    out.warn(found.warnings)
    if not out.verbose and not found.ok:
        out.hint("-v lists every module and place", label="note: ")


def _show_modules(out: Output, found: VerifyReport) -> None:
    """List the modules that differ, the worst first; all of them under --verbose."""
    total = sum(len(depth.modules) for depth in found.depths)
    shown = [item for item in found.worst(total if out.verbose else SHOWN) if out.verbose or item[1].ok is False]
    if shown:
        header = ("module", "depth", "kind", "rank", "error", "of bound", "ulps", "cosine", "")
        out.result(plain.table(header, [_cells(*item) for item in shown], right="   rrrrr", width=width()))


def _show_checks(out: Output, depth: DepthResult) -> None:
    for check in depth.checks:
        if not check.ok:
            out.result(plain.escape(f"{depth.name}: not so: {check.name} ({check.detail})"))
            places = check.where if out.verbose else check.where[:SHOWN]
            for place in places:
                out.result(plain.escape(f"  {place}"))
            if len(check.where) > len(places):
                out.result(f"  and {len(check.where) - len(places)} more")
        elif out.verbose:
            out.result(plain.escape(f"{depth.name}: {check.name}: {check.detail}"))


def _cells(depth: str, row: ModuleRow) -> tuple[str, ...]:
    numbers = (_number(row.max_abs), _number(row.ratio), _number(row.ulps), _cosine(row.cosine))
    return (row.path, depth, row.kind, plain.number(row.rank), *numbers, row.note)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"
