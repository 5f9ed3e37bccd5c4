"""The command ``lorabridge extract``."""

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
    ranks_options,
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
            "BASE": "The model before training: a file, a sharded set's index, or a directory.",
            "TUNED": "The model after training.",
            "OUT": ADAPTER_OUT,
        },
        groups={
            "How much to keep": ("rank", "energy", "seed", "dtype"),
            "What changed": ("include", "exclude", "save", "kind", "fan_in_fan_out"),
            "Ranks": ("strategies", "steps"),
            "To": ("target_dialect", "family", "config", "layout", "mappings"),
            "Writing": ("workers", "dry_run", "overwrite"),
            "Output": OUTPUT,
        },
        examples=(
            "lorabridge extract base/ tuned/ adapter/ --rank 16",
            "lorabridge extract base/ tuned/ adapter/ --energy 0.95 --save lm_head -v",
            "lorabridge extract base/ tuned/ adapter.ckpt --rank 8 --family llama",
        ),
    )
)
@click.command("extract", cls=Command)
@click.argument("base", metavar="BASE", type=LOCATION)
@click.argument("tuned", metavar="TUNED", type=LOCATION)
@click.argument("target", metavar="OUT")
@click.option("--rank", metavar="R", type=click.IntRange(min=1), help="Rank of every module, at most.")
@click.option("--energy", metavar="SHARE", type=click.FloatRange(0, 1, min_open=True),
              help="Take per module the smallest rank that retains this share of the squared norm.")  # fmt: skip
@click.option("--seed", metavar="N", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of the random sketches of large matrices.")  # fmt: skip
@click.option("--dtype", metavar="DTYPE", default="float32", show_default=True, help="Type of the factors.")
@selection_options("Compare", "Do not compare")
@click.option("--save", metavar="GLOB", multiple=True,
              help="Take changed modules that match over whole (modules_to_save). May be repeated.")  # fmt: skip
@facts_for("kind", "fan_in_fan_out")
@click.option("--to", "target_dialect", type=Name("dialect", dialects), metavar="DIALECT",
              help="Dialect of OUT; by default peft, or loralib-ms for MindSpore.")  # fmt: skip
@table_options("The model's config.json, where it is not beside the models.")
@mappings_option
@ranks_options(BASE="base", TUNED="tuned")
@target_options
@output_options
@progress_option
def extract(
    base: Path, tuned: Path, target: str, rank: int | None, energy: float | None, seed: int, dtype: str,
    include: tuple[str, ...], exclude: tuple[str, ...], save: tuple[str, ...], kind: tuple[str, ...],
    fan_in_fan_out: tuple[str, ...], target_dialect: str | None, family: str | None, config: Path | None,
    layout: tuple[str, ...], mappings: Path | None, workers: int, dry_run: bool, overwrite: bool, json: bool,
    quiet: bool, verbose: bool, no_progress: bool,
) -> None:  # fmt: skip
    """Extract an adapter from the difference of two models.

    Each changed matrix gets the best factors of its rank, with the residual measured afterwards. Changed norms and
    biases go into the adapter whole; what no adapter can hold is an error that lists it.
    """
    out = Output("extract", json, quiet, verbose)
    check_family(family, mappings)
    stated = facts({"kind": kind, "fan_in_fan_out": fan_in_fan_out}.items())
    from ..actions.extract import ExtractOptions
    from ..actions.extract import extract as run
    from ..actions.extract_report import HEADER

    options = ExtractOptions(
        rank=rank, energy=energy, seed=seed, dtype=dtype, include=include, exclude=exclude, save=save,
        target_dialect=target_dialect, family=family, config=config, layout=pairs(layout, "--layout"),
        mappings=mappings, facts=stated, workers=workers, dry_run=dry_run, overwrite=overwrite,
    )  # fmt: skip
    with Progress("extracting", enabled=not (no_progress or quiet)) as progress:
        done = run(base, tuned, target, options, progress=progress)
    if json:
        out.document(done.as_json())
        return
    out.wrote(done.summary(), done)
    if verbose:
        out.result(plain.table(HEADER, done.rows(), right="   rrrr", width=width()))
        for name in done.beside:
            out.result(f"taken over whole: {plain.escape(name)}")
        out.left_out(done.left_out)
    elif done.modules:
        worst = min(done.modules, key=lambda row: row.energy)
        out.hint(f"least retained: {100 * worst.energy:.4g} % of {worst.path} (rank {worst.rank}); -v lists all",
                 label="note: ")  # fmt: skip
    if done.left_out and not verbose:
        out.hint(f"{plain.count(len(done.left_out), 'tensor')} left out; -v lists them", label="note: ")
    out.warn(done.warnings)
    out.notes(done.notes)
