"""The command ``lorabridge unmerge``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, Unpack

import click

from ..reports import plain
from ._group import Command, Manual, documented
from ._options import (
    CHECKPOINT_OUT,
    OUTPUT,
    NamedGiven,
    ShownGiven,
    StatedGiven,
    WrittenGiven,
    fact_options,
    keep_blas_single,
    mappings_option,
    model_options,
    output_options,
    progress_option,
    ranks_options,
    table_options,
    target_options,
    told,
    written,
)
from ._progress import Progress
from ._terminal import Output, width
from ._values import FACTS, LOCATION, Name, check_family, dialects

if TYPE_CHECKING:
    from ..actions.merge_inputs import MergeOptions
    from ..actions.restoring import GuessRow
    from ..actions.unmerge import UnmergeReport

F = TypeVar("F", bound=Callable[..., object])

NAMES = ("adapter_dialect", "target_dialect", "family", "config", "layout", "mappings")
WRITING = ("max_shard_size", "crc", "workers", "dry_run", "overwrite")


class Given(NamedGiven, StatedGiven, WrittenGiven, ShownGiven):
    """The options as click hands them over."""

    adapter_dialect: str | None
    target_dialect: str | None


def names_options(dialect: str, side: str) -> Callable[[F], F]:
    """Add what says how adapters and models are named, as ``lorabridge merge`` has it; two get these names."""

    def add(command: F) -> F:
        for option in reversed((
            click.option(dialect, "adapter_dialect", type=Name("dialect", dialects), metavar="DIALECT",
                         help="Dialect of the adapters, where detection is wrong or cannot decide."),
            click.option(side, "target_dialect", type=click.Choice(["hf", "ms"]),
                         help="Names of OUT; by default the base's, or what OUT's container calls for."),
            table_options(
                "The model's config.json or an adapter_config.json, where it is not beside its file.",
                family="Table of module names, where the files are not all of one framework.",
                example="qkv_concat=grouped",
            ),
        )):  # fmt: skip
            command = option(command)
        return command

    return add


def any_adapter_option(command: F) -> F:
    """Add --any-adapter."""
    said = "Go on where the model records another adapter: the result may be worth nothing."
    return click.option("--any-adapter", is_flag=True, help=said)(command)


split_options = model_options("Split OUT: 5GB ...; by default as MERGED is split.")
"""How the model is written."""


@documented(
    Manual(
        arguments={
            "MERGED": "The merged model, as the merge wrote it or converted.",
            "OUT": CHECKPOINT_OUT,
        },
        groups={
            "What was merged": ("adapters", "undo", "weights", "exact", "leave", "any_adapter"),
            "From and to": NAMES,
            "What the adapter does not say": tuple(FACTS),
            "Ranks": ("strategies", "steps"),
            "Writing": WRITING,
            "Output": OUTPUT,
        },
        examples=(
            "lorabridge unmerge merged/ base/ --adapter adapter/ --undo merged.undo",
            "lorabridge unmerge merged/ near_base/ --adapter adapter/",
        ),
    )
)
@click.command("unmerge", cls=Command)
@click.argument("merged_model", metavar="MERGED", type=LOCATION)
@click.argument("target", metavar="OUT")
@click.option("--adapter", "adapters", metavar="A", multiple=True, required=True, type=LOCATION,
              help="The adapter that was merged; several in their order.")  # fmt: skip
@click.option("--undo", metavar="FILE", type=LOCATION,
              help="What `merge --undo FILE` wrote; without it the result is only near to the base.")  # fmt: skip
@click.option("--weights", metavar="W,W...", help="What each adapter's deltas were multiplied by; FILE knows it.")
@click.option("--exact", is_flag=True, help="The merge was told --exact; FILE knows it.")
@click.option("--leave", metavar="GLOB", multiple=True,
              help="Parameters that stay as they are in MERGED. May be repeated.")  # fmt: skip
@any_adapter_option
@names_options("--from", "--to")
@mappings_option
@fact_options
@ranks_options(MERGED="merged_model", ADAPTER="adapters")
@split_options
@target_options
@output_options
@progress_option
def unmerge(
    merged_model: Path, target: str, adapters: tuple[Path, ...], undo: Path | None, weights: str | None, exact: bool,
    leave: tuple[str, ...], any_adapter: bool, **given: Unpack[Given],
) -> None:  # fmt: skip
    """Take an adapter out of a merged model again.

    With the undo file that merge wrote, the base comes back bit for bit on any machine, and its digests are checked.
    Without it the best inverse is computed: its report says how many elements are expected to differ from the base.
    What an adapter replaced or normalised (DoRA) then stays as it is in MERGED, and is named.
    """
    out = Output("unmerge", given["json"], given["quiet"], given["verbose"])
    if undo is not None and (weights is not None or exact):
        raise click.UsageError("--weights and --exact are what --undo knows")
    if undo is not None and leave:
        raise click.UsageError("--leave is for what cannot be computed back; --undo restores everything")
    options = replace(options_of(given, weights, exact=exact), leave=leave, any_adapter=any_adapter)
    from ..actions.unmerge import unmerge as run

    with Progress("unmerging", enabled=not (given["no_progress"] or given["quiet"])) as progress:
        done = run(merged_model, adapters, target, options, undo=undo, progress=progress)
    if out.json:
        out.document(done.as_json())
        return
    _show(out, done)


def options_of(given: Given, weights: str | None, *, exact: bool) -> MergeOptions:
    """Return the action's options; imports it, so that this comes after what can be refused without."""
    check_family(given["family"], given["mappings"])
    keep_blas_single()
    from ..actions.merge_inputs import MergeOptions
    from .merge import read_weights

    return MergeOptions(
        **told(given), **written(given), adapter_dialect=given["adapter_dialect"],
        target_dialect=given["target_dialect"], weights=read_weights(weights), exact=exact,
    )  # fmt: skip


def show_guesses(out: Output, rows: Sequence[GuessRow]) -> None:
    """Print what may be wrong, by parameter."""
    if rows:
        header = ("parameter", "blurred", "expected wrong", "largest error")
        cells = [(r.parameter, f"{r.blurred:.2%}", f"{r.wrong:.2%}", f"{r.error:.1e}") for r in rows]
        out.result(plain.table(header, cells, right=" rrr", width=width()))


def _show(out: Output, done: UnmergeReport) -> None:
    out.wrote(done.summary(), done)
    if out.verbose:
        show_guesses(out, done.rows)
        out.left_out(done.left_out)
    out.warn(done.warnings)
    out.notes(done.notes)
