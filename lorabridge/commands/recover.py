"""The command ``lorabridge recover``."""

from __future__ import annotations

from pathlib import Path

import click

from ..reports import plain
from ._group import Command, Manual, documented
from ._options import OUTPUT, facts_for, mappings_option, output_options, progress_option, ranks_options, table_options
from ._progress import Progress
from ._terminal import Output, width
from ._values import LOCATION, check_family, facts, pairs

SHOWN = 12
"""Modules that are shown without -v."""


@documented(
    Manual(
        arguments={
            "BASE": "The base model: a file, a sharded set's index, or a directory.",
            "MERGED": "The same model with the adapter merged into it, by whatever tool.",
            "ADAPTER": "The adapter whose file does not say everything.",
        },
        groups={
            "What is known": ("config", "family", "layout", "mappings", "alpha", "use_rslora", "enable_lora"),
            "Ranks": ("strategies", "steps"),
            "Output": OUTPUT,
        },
        examples=(
            "lorabridge recover base.safetensors merged.safetensors lora.pt",
            "lorabridge recover base/ merged/ lora.ckpt --family llama -v",
        ),
    )
)
@click.command("recover", cls=Command)
@click.argument("base", metavar="BASE", type=LOCATION)
@click.argument("merged", metavar="MERGED", type=LOCATION)
@click.argument("adapter", metavar="ADAPTER", type=LOCATION)
@table_options("adapter_config.json, where it is not beside ADAPTER.")
@mappings_option
@facts_for("alpha", "use_rslora", "enable_lora")
@ranks_options(BASE="base", MERGED="merged", ADAPTER="adapter")
@output_options
@progress_option
@click.pass_context
def recover(
    context: click.Context, base: Path, merged: Path, adapter: Path, config: Path | None, family: str | None,
    layout: tuple[str, ...], mappings: Path | None, alpha: tuple[str, ...], use_rslora: tuple[str, ...],
    enable_lora: tuple[str, ...], json: bool, quiet: bool, verbose: bool, no_progress: bool,
) -> None:  # fmt: skip
    """Estimate what an adapter's file does not say from a model it was merged into.

    The scaling (as alpha), which parts of fused projections are adapted, how weights are stored, and how often the
    delta was added, each with the residual that supports it. The exit code is 1 where nothing fits.
    """
    out = Output("recover", json, quiet, verbose)
    check_family(family, mappings)
    stated = facts({"alpha": alpha, "use_rslora": use_rslora, "enable_lora": enable_lora}.items())
    from ..actions.recover import RecoverOptions
    from ..actions.recover import recover as run
    from ..actions.recover_report import HEADER

    options = RecoverOptions(
        family=family, config=config, layout=pairs(layout, "--layout"), mappings=mappings, facts=stated
    )
    with Progress("fitting", enabled=not (no_progress or quiet)) as progress:
        found = run(base, merged, adapter, options, progress=progress)
    if json:
        out.document(found.as_json())
    else:
        out.summary(plain.escape(found.summary()))
        rows = found.rows()
        wrong = [cells for cells, row in zip(rows, found.modules, strict=True) if not row.fits]
        shown = rows if verbose else wrong[:SHOWN] or rows[:SHOWN]
        if not quiet:
            out.result(plain.table(HEADER, shown, right=" rrrrr", width=width()))
        if found.fits and found.flags:
            out.result(plain.escape(" ".join(found.flags)))
            out.hint("give these flags to lorabridge convert or merge")
        if len(rows) > len(shown):
            out.hint(f"{len(rows) - len(shown)} more modules; -v lists them", label="note: ")
    if not found.fits:
        context.exit(1)
