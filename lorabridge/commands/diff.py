"""The command ``lorabridge diff``."""

from __future__ import annotations

from pathlib import Path

import click

from ..reports import plain
from ._group import Command, Manual, documented
from ._options import (
    OUTPUT,
    facts_for,
    key_option,
    mappings_option,
    output_options,
    progress_option,
    ranks_options,
    selection_options,
    table_options,
)
from ._progress import Progress
from ._terminal import Output, width
from ._values import LOCATION, Name, check_family, dialects, facts, pairs

SHOWN = 20
"""Rows that are shown without -v."""


@documented(
    Manual(
        arguments={"A": "A checkpoint file, a sharded set's index, or a directory.", "B": "Another one."},
        groups={
            "What counts as the same": ("tolerance", "include", "exclude"),
            "What the files do not say": (
                "source_dialect",
                "target_dialect",
                "family",
                "config",
                "layout",
                "mappings",
                "key_file",
                "alpha",
                "use_rslora",
                "fan_in_fan_out",
                "enable_lora",
                "kind",
            ),
            "Ranks": ("strategies", "steps"),
            "Output": OUTPUT,
        },
        examples=(
            "lorabridge diff adapter/ out.ckpt",
            "lorabridge diff step100/ step200/ --exclude '*.bias' -v",
            "lorabridge diff adapter/ small/ --tolerance 0.01",
        ),
    )
)
@click.command("diff", cls=Command)
@click.argument("first", metavar="A", type=LOCATION)
@click.argument("second", metavar="B", type=LOCATION)
@click.option("--tolerance", metavar="SHARE", type=click.FloatRange(0, 1),
              help="Relative error (Frobenius norm) up to which a tensor or delta counts as the same.")  # fmt: skip
@selection_options("Compare", "Do not compare")
@click.option("--from", "source_dialect", type=Name("dialect", dialects), metavar="DIALECT", help="Dialect of A.")
@click.option("--to", "target_dialect", type=Name("dialect", dialects), metavar="DIALECT", help="Dialect of B.")
@table_options("adapter_config.json or config.json, where it is not beside the files.")
@mappings_option
@key_option
@facts_for("alpha", "use_rslora", "fan_in_fan_out", "enable_lora", "kind")
@ranks_options(A="first", B="second")
@output_options
@progress_option
@click.pass_context
def diff(
    context: click.Context, first: Path, second: Path, tolerance: float | None, include: tuple[str, ...],
    exclude: tuple[str, ...], source_dialect: str | None, target_dialect: str | None, family: str | None,
    config: Path | None, layout: tuple[str, ...], mappings: Path | None, alpha: tuple[str, ...],
    use_rslora: tuple[str, ...], fan_in_fan_out: tuple[str, ...], enable_lora: tuple[str, ...],
    kind: tuple[str, ...], json: bool, quiet: bool, verbose: bool, no_progress: bool,
) -> None:  # fmt: skip
    """Say whether two checkpoints hold the same, and where they do not.

    Containers, dialects and the order of tensors do not count. Tensors are compared bit by bit; modules whose factors
    have other shapes or scalings by their deltas. The exit code is 0 where all is the same, 1 where something differs.
    """
    out = Output("diff", json, quiet, verbose)
    check_family(family, mappings)
    stated = {"alpha": alpha, "use_rslora": use_rslora, "fan_in_fan_out": fan_in_fan_out,
              "enable_lora": enable_lora, "kind": kind}  # fmt: skip
    from ..actions.diff import DiffOptions
    from ..actions.diff import diff as run
    from ..actions.diff_report import HEADER

    options = DiffOptions(
        tolerance=tolerance, source_dialect=source_dialect, target_dialect=target_dialect, family=family,
        config=config, layout=pairs(layout, "--layout"), mappings=mappings, facts=facts(stated.items()),
        include=include, exclude=exclude,
    )  # fmt: skip
    with Progress("comparing", enabled=not (no_progress or quiet)) as progress:
        found = run(first, second, options, progress=progress)
    if json:
        out.document(found.as_json())
    else:
        out.summary(plain.escape(found.summary()))
        rows = found.rows(every=verbose)
        shown = rows if verbose else rows[:SHOWN]
        if shown and not quiet:
            out.result(plain.table(HEADER, shown, right=" rrrr", width=width()))
        if len(rows) > len(shown):
            out.hint(f"{len(rows) - len(shown)} more differ; -v lists them", label="note: ")
        if found.unselected:
            out.hint(f"{plain.count(found.unselected, 'tensor')} not selected", label="note: ")
        if found.left_out:
            names = ", ".join(name for name, _ in found.left_out[:3])
            out.hint(f"{plain.count(len(found.left_out), 'tensor')} not compared: {names}", label="note: ")
    if not found.same:
        context.exit(1)
