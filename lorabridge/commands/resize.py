"""The command ``lorabridge resize``."""

from __future__ import annotations

from pathlib import Path

import click

from ..reports import plain
from ._group import Command, Manual, documented
from ._options import (
    ADAPTER_OUT,
    OUTPUT,
    facts_for,
    mappings_option,
    output_options,
    progress_option,
    selection_options,
    table_options,
    target_options,
)
from ._progress import Progress
from ._terminal import Output, width
from ._values import LOCATION, Name, check_family, dialects, facts, pairs


@documented(
    Manual(
        arguments={
            "ADAPTER": "An adapter in any container and dialect.",
            "OUT": ADAPTER_OUT,
        },
        groups={
            "How much to keep": ("rank", "energy", "dtype"),
            "From and to": ("source_dialect", "target_dialect", "family", "config", "layout", "mappings"),
            "What the file does not say": ("alpha", "use_rslora", "fan_in_fan_out", "enable_lora", "kind"),
            "Selection": ("include", "exclude"),
            "Writing": ("workers", "dry_run", "overwrite"),
            "Output": OUTPUT,
        },
        examples=(
            "lorabridge resize adapter/ small/ --rank 8",
            "lorabridge resize adapter.ckpt small.ckpt --energy 0.99 -v",
        ),
    )
)
@click.command("resize", cls=Command)
@click.argument("source", metavar="ADAPTER", type=LOCATION)
@click.argument("target", metavar="OUT")
@click.option("--rank", metavar="R", type=click.IntRange(min=1), help="The new rank; lower ones stay.")
@click.option("--energy", metavar="SHARE", type=click.FloatRange(0, 1, min_open=True),
              help="Take per module the smallest rank that retains this share of the squared norm.")  # fmt: skip
@click.option("--dtype", metavar="DTYPE", help="Cast floating-point tensors: fp32, fp16, bf16 ...; rounds once.")
@click.option("--from", "source_dialect", type=Name("dialect", dialects), metavar="DIALECT",
              help="Dialect of ADAPTER, where detection is wrong or cannot decide.")  # fmt: skip
@click.option("--to", "target_dialect", type=Name("dialect", dialects), metavar="DIALECT",
              help="Dialect of OUT; by default ADAPTER's.")  # fmt: skip
@table_options("adapter_config.json, where it is not beside ADAPTER.")
@mappings_option
@facts_for("alpha", "use_rslora", "fan_in_fan_out", "enable_lora", "kind")
@selection_options("Write", "Leave out")
@target_options
@output_options
@progress_option
def resize(
    source: Path, target: str, rank: int | None, energy: float | None, dtype: str | None,
    source_dialect: str | None, target_dialect: str | None, family: str | None, config: Path | None,
    layout: tuple[str, ...], mappings: Path | None, alpha: tuple[str, ...], use_rslora: tuple[str, ...],
    fan_in_fan_out: tuple[str, ...], enable_lora: tuple[str, ...], kind: tuple[str, ...], include: tuple[str, ...],
    exclude: tuple[str, ...], workers: int, dry_run: bool, overwrite: bool, json: bool, quiet: bool, verbose: bool,
    no_progress: bool,
) -> None:  # fmt: skip
    """Change the rank of an adapter.

    Each module gets the best factors of the new rank (SVD of its delta, which is never formed), and the report says
    how much of the delta they retain. Scalings keep their value.
    """
    out = Output("resize", json, quiet, verbose)
    check_family(family, mappings)
    stated = {"alpha": alpha, "use_rslora": use_rslora, "fan_in_fan_out": fan_in_fan_out,
              "enable_lora": enable_lora, "kind": kind}  # fmt: skip
    from ..actions.choices import ConvertOptions
    from ..actions.resize import HEADER
    from ..actions.resize import resize as run

    options = ConvertOptions(
        source_dialect=source_dialect, target_dialect=target_dialect, family=family, config=config,
        layout=pairs(layout, "--layout"), mappings=mappings, facts=facts(stated.items()), dtype=dtype,
        include=include, exclude=exclude, workers=workers, dry_run=dry_run, overwrite=overwrite,
    )  # fmt: skip
    with Progress("resizing", enabled=not (no_progress or quiet)) as progress:
        done = run(source, target, rank=rank, energy=energy, options=options, progress=progress)
    if json:
        out.document(done.as_json())
        return
    out.wrote(done.summary(), done.conversion)
    if verbose:
        out.result(plain.table(HEADER, done.rows(), right="  rrrr", width=width()))
    out.warn(done.warnings)
    out.notes(done.conversion.notes)
