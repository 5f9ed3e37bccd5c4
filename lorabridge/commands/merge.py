"""The command ``lorabridge merge``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

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
    engine_options,
    fact_options,
    keep_blas_single,
    key_option,
    mappings_option,
    model_options,
    output_options,
    planned_options,
    progress_option,
    ranks_options,
    table_options,
    told,
    written,
)
from ._progress import Progress
from ._terminal import Output, width
from ._values import FACTS, LOCATION, Name, check_family, dialects, real

if TYPE_CHECKING:
    from ..actions.merge import MergeOptions
    from ..actions.merge_report import MergeReport


class Given(NamedGiven, StatedGiven, WrittenGiven, ShownGiven):
    """The options as click hands them over."""

    adapter_dialect: str | None
    target_dialect: str | None
    weights: str | None
    exact: bool
    residual_base: bool
    onto_merged: bool
    any_base: bool
    undo: Path | None
    engine: Literal["process", "ray"]
    address: str | None


@documented(
    Manual(
        arguments={
            "BASE": "The base model: a file, a sharded set's index, or a directory, of either framework.",
            "ADAPTER...": "One or more adapters: files or peft directories, of any dialect.",
            "OUT": CHECKPOINT_OUT,
        },
        groups={
            "From and to": ("adapter_dialect", "target_dialect", "family", "config", "layout", "mappings", "key_file"),
            "What the adapter does not say": tuple(FACTS),
            "Numbers": ("weights", "exact", "residual_base", "onto_merged", "any_base"),
            "Ranks": ("strategies", "steps"),
            "Writing": ("undo", "max_shard_size", "crc", "workers", "dry_run", "overwrite"),
            "Machines": ("engine", "address"),
            "Output": OUTPUT,
        },
        examples=(
            "lorabridge merge llama/ style/ facts/ merged/ --weights 0.7,1",
            "lorabridge merge llama/ adapter/ merged/ --undo merged.undo",
            "lorabridge merge gpt2/ lora.ckpt merged/ --family gpt2",
            "lorabridge merge gpt2/ adapter/ merged.ckpt --family gpt2",
        ),
    )
)
@click.command("merge", cls=Command)
@click.argument("base", metavar="BASE", type=LOCATION)
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, type=LOCATION)
@click.argument("target", metavar="OUT")
@click.option("--from", "adapter_dialect", type=Name("dialect", dialects), metavar="DIALECT",
              help="Dialect of the adapters, where detection is wrong or cannot decide.")  # fmt: skip
@click.option("--to", "target_dialect", type=Name("dialect", dialects), metavar="hf|ms",
              help="Names of OUT; by default the base's, or those that OUT's container calls for.")  # fmt: skip
@table_options(
    "The model's config.json or an adapter_config.json, where it is not beside its file.",
    family="Table of module names, where base, adapter and OUT are not all of one framework.",
    example="qkv_concat=grouped",
)
@mappings_option
@key_option
@fact_options
@ranks_options(BASE="base", ADAPTER="adapters")
@click.option("--weights", metavar="W,W...", help="Multiply each adapter's deltas by a number.")
@click.option("--exact", is_flag=True, help="Compute deltas to 48 bits for bfloat16 too; other types get them anyway.")
@click.option("--residual-base", is_flag=True,
              help="BASE is the one that PiSSA, OLoRA, LoftQ ... left when training began.")  # fmt: skip
@click.option("--onto-merged", is_flag=True, help="Merge another adapter into a model that was merged before.")
@click.option("--any-base", is_flag=True,
              help="Go on where the adapter records another base: the result may be worth nothing.")  # fmt: skip
@click.option("--undo", metavar="FILE", type=LOCATION,
              help="Write what rounding loses, so that `lorabridge unmerge` gives BASE's bits back.")  # fmt: skip
@model_options("Split OUT: 5GB ...; by default as BASE is split.")
@planned_options("OUT")
@engine_options
@output_options
@progress_option
def merge(base: Path, adapters: tuple[Path, ...], target: str, **given: Unpack[Given]) -> None:
    """Merge adapters into a base model, rounding once.

    Every module must land, or nothing is written. The output's bits depend on the inputs alone, not on the machine. A
    statement about modules is VALUE for all of them or PATTERN=VALUE for those whose path matches the glob PATTERN.
    """
    out = Output("merge", given["json"], given["quiet"], given["verbose"])
    keep_blas_single()
    check_family(given["family"], given["mappings"])
    options = _options(given)
    from ..actions.merge import merge as run

    with Progress("merging", enabled=not (given["no_progress"] or given["quiet"])) as progress:
        done = run(base, adapters, target, options, undo=given["undo"], progress=progress)
    if out.json:
        out.document(done.as_json())
        return
    _show(out, done)


def _options(given: Given) -> MergeOptions:
    from ..actions.merge_inputs import MergeOptions
    from ..conversion.engines import Engine

    return MergeOptions(
        **told(given), **written(given), adapter_dialect=given["adapter_dialect"],
        target_dialect=given["target_dialect"], weights=read_weights(given["weights"]), exact=given["exact"],
        residual_base=given["residual_base"], onto_merged=given["onto_merged"], any_base=given["any_base"],
        engine=Engine(given["engine"], given["address"]),
    )  # fmt: skip


def read_weights(given: str | None) -> tuple[float, ...]:
    """Read one weight per adapter, separated by commas; a BadParameter names what is no number."""
    if given is None:
        return ()
    try:
        return tuple(real(part) for part in given.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{given!r}: {error}", param_hint="--weights") from error


def _show(out: Output, done: MergeReport) -> None:
    out.wrote(done.summary(), done)
    if done.undo is not None:
        out.summary(plain.escape(done.undo.sentence()))
    if done.rows:
        out.result(f"{done.vanished:.1%} of the deltas vanished in rounding; largest error {done.error:.1e}")
    if out.verbose:
        rows = [
            (r.parameter, f"{r.relative:.1e}", f"{r.changed:.1%}", f"{r.vanished:.1%}", f"{r.error:.1e}")
            for r in done.rows
        ]
        if rows:
            header = ("parameter", "delta/weight", "changed", "vanished", "error")
            out.result(plain.table(header, rows, right=" rrrr", width=width()))
        out.left_out(done.left_out)
        for name in done.replaced:
            out.result(plain.escape(f"replaced: {name}"))
    out.warn(done.warnings)
    out.notes(done.notes)
    if done.not_carried:
        out.hint(f"not carried: {', '.join(done.not_carried)}", label="note: ")
    if not done.dry_run:
        out.hint(f"lorabridge inspect {shlex.quote(done.target)}", label="next: ")
