"""The command ``lorabridge combine``."""

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
from ._values import LOCATION, Name, check_family, dialects, facts, pairs, weights

METHODS = (
    "cat", "linear", "svd", "ties", "dare", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd", "dare_svd",
    "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
)  # fmt: skip


@documented(
    Manual(
        arguments={
            "ADAPTER...": "Two adapters or more, in any container and dialect.",
            "OUT": ADAPTER_OUT,
        },
        groups={
            "How to combine": ("method", "weight", "rank", "energy", "density", "majority_sign", "seed", "dtype"),
            "To": ("target_dialect", "family", "config", "layout", "mappings"),
            "What the files do not say": ("alpha", "use_rslora", "fan_in_fan_out", "enable_lora"),
            "Ranks": ("strategies", "steps"),
            "Selection": ("include", "exclude"),
            "Writing": ("workers", "dry_run", "overwrite"),
            "Output": OUTPUT,
        },
        examples=(
            "lorabridge combine math/ code/ both/ --weights 0.7,0.3",
            "lorabridge combine math/ code/ both/ --method svd --rank 16",
            "lorabridge combine math/ code/ both/ --method ties --density 0.5",
        ),
    )
)
@click.command("combine", cls=Command)
@click.argument("sources", metavar="ADAPTER...", nargs=-1, required=True, type=LOCATION)
@click.argument("target", metavar="OUT")
@click.option("--method", type=click.Choice(METHODS), default="cat", show_default=True,
              help="cat: the exact sum, of the ranks together; svd: the sum at a lower rank; the others as peft's "
              "combination_type.", metavar="METHOD")  # fmt: skip
@click.option("--weights", "weight", metavar="[PATTERN=]W,W...", multiple=True,
              help="One weight per adapter, 1 by default; a pattern says for which modules. "
              "May be repeated.")  # fmt: skip
@click.option("--rank", metavar="R", type=click.IntRange(min=1), help="Rank of methods with svd; by default the "
              "largest of the inputs.")  # fmt: skip
@click.option("--energy", metavar="SHARE", type=click.FloatRange(0, 1, min_open=True),
              help="Take the smallest rank that retains this share of the squared norm, for example 0.99.")  # fmt: skip
@click.option("--density", metavar="SHARE", type=click.FloatRange(0, 1, min_open=True),
              help="Share of the elements that pruning keeps (ties, dare, magnitude_prune).")  # fmt: skip
@click.option("--majority-sign", type=click.Choice(["total", "frequency"]), default="total", show_default=True,
              help="How ties elects signs: by sums or by counts.")  # fmt: skip
@click.option("--seed", metavar="N", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of dare's random choices; the same seed gives the same bytes.")  # fmt: skip
@click.option("--dtype", metavar="DTYPE", help="Type of the written factors; by default the inputs' widest.")
@click.option("--to", "target_dialect", type=Name("dialect", dialects), metavar="DIALECT",
              help="Dialect of OUT; by default the first adapter's.")  # fmt: skip
@table_options("config.json of the base model, where the table needs its sizes.")
@mappings_option
@facts_for("alpha", "use_rslora", "fan_in_fan_out", "enable_lora")
@ranks_options(ADAPTER="sources")
@selection_options("Combine", "Leave out")
@target_options
@output_options
@progress_option
def combine(
    sources: tuple[Path, ...], target: str, method: str, weight: tuple[str, ...], rank: int | None,
    energy: float | None, density: float | None, majority_sign: str, seed: int, dtype: str | None,
    target_dialect: str | None, family: str | None, config: Path | None, layout: tuple[str, ...], mappings: Path | None,
    alpha: tuple[str, ...], use_rslora: tuple[str, ...], fan_in_fan_out: tuple[str, ...],
    enable_lora: tuple[str, ...], include: tuple[str, ...], exclude: tuple[str, ...], workers: int, dry_run: bool,
    overwrite: bool, json: bool, quiet: bool, verbose: bool, no_progress: bool,
) -> None:  # fmt: skip
    """Combine several adapters of one base model into one adapter.

    cat is exact: its delta is the weighted sum of the deltas. Every other method says how far from that sum its result
    lies, module by module.
    """
    out = Output("combine", json, quiet, verbose)
    check_family(family, mappings)
    stated = {"alpha": alpha, "use_rslora": use_rslora, "fan_in_fan_out": fan_in_fan_out, "enable_lora": enable_lora}
    from ..actions.combine import CombineOptions
    from ..actions.combine import combine as run
    from ..actions.combine_report import HEADER

    options = CombineOptions(
        method=method, weights=weights(weight), rank=rank, energy=energy, density=density, election=majority_sign,
        seed=seed, target_dialect=target_dialect, family=family, config=config, layout=pairs(layout, "--layout"),
        mappings=mappings, facts=facts(stated.items()), dtype=dtype, include=include, exclude=exclude,
        workers=workers, dry_run=dry_run, overwrite=overwrite,
    )  # fmt: skip
    with Progress("combining", enabled=not (no_progress or quiet)) as progress:
        done = run(sources, target, options, progress=progress)
    if json:
        out.document(done.as_json())
        return
    out.wrote(done.summary(), done)
    if verbose:
        out.result(plain.table(HEADER, done.rows(), right="  rrrr", width=width()))
    else:
        off = [row.apart for row in done.modules if row.apart]
        if off:
            out.hint(f"the deltas lie up to {max(off):.2g} of their norm off the weighted sum; -v lists them",
                     label="note: ")  # fmt: skip
    out.warn(done.warnings)
    out.notes(done.notes)
