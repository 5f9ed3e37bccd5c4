"""The command ``lorabridge merge``."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack

import click

from ..reports import plain
from ._group import Command, Manual, documented
from ._options import (
    NamedGiven,
    ShownGiven,
    StatedGiven,
    WrittenGiven,
    engine_options,
    fact_options,
    key_option,
    mappings_option,
    output_options,
    progress_option,
    ranks_options,
    stated,
)
from ._progress import Progress
from ._terminal import Output, width
from ._values import FACTS, LOCATION, Name, Size, dialects, known_family, pairs, real

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
            "OUT": "A file, whose suffix decides the container (.safetensors, .bin/.pt, .ckpt), or a directory.",
        },
        groups={
            "From and to": ("adapter_dialect", "target_dialect", "family", "config", "layout", "mappings", "key_file"),
            "What the adapter does not say": tuple(FACTS),
            "Numbers": ("weights", "exact", "residual_base", "onto_merged", "any_base"),
            "Ranks": ("strategies", "steps"),
            "Writing": ("undo", "max_shard_size", "crc", "workers", "dry_run", "overwrite"),
            "Machines": ("engine", "address"),
            "Output": ("json", "quiet", "verbose", "no_progress"),
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
@click.option("--family", metavar="NAME",
              help="Table of module names, where base, adapter and OUT are not all of one framework.")  # fmt: skip
@click.option("--config", metavar="FILE", type=LOCATION,
              help="The model's config.json or an adapter_config.json, where it is not beside its file.")  # fmt: skip
@click.option("--layout", metavar="KEY=VALUE", multiple=True,
              help="A choice that a table asks for, such as qkv_concat=grouped. May be repeated.")  # fmt: skip
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
@click.option("--max-shard-size", metavar="SIZE", type=Size(), help="Split OUT: 5GB ...; by default as BASE is split.")
@click.option("--crc", is_flag=True, help="Write MindSpore's CRC trailer into a .ckpt.")
@click.option("--workers", metavar="N", type=click.IntRange(min=0, max=256), default=0, envvar="LORABRIDGE_WORKERS",
              help="Threads; by default one per CPU, at most 8. The output does not depend on it.")  # fmt: skip
@click.option("-n", "--dry-run", is_flag=True, help="Plan and report; write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace OUT, in one step, if it exists.")
@engine_options
@output_options
@progress_option
def merge(base: Path, adapters: tuple[Path, ...], target: str, **given: Unpack[Given]) -> None:
    """Merge adapters into a base model, rounding once.

    Every module must land, or nothing is written. The output's bits depend on the inputs alone, not on the machine. A
    statement about modules is VALUE for all of them or PATTERN=VALUE for those whose path matches the glob PATTERN.
    """
    out = Output("merge", given["json"], given["quiet"], given["verbose"])
    for variable in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # read when numpy loads; the work is shared already
        os.environ.setdefault(variable, "1")
    if given["family"] is not None:
        known_family(given["family"], given["mappings"], hint="--family")
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
        adapter_dialect=given["adapter_dialect"], target_dialect=given["target_dialect"], family=given["family"],
        config=given["config"], layout=pairs(given["layout"], "--layout"), mappings=given["mappings"],
        facts=stated(given), weights=read_weights(given["weights"]), exact=given["exact"],
        residual_base=given["residual_base"], onto_merged=given["onto_merged"], any_base=given["any_base"],
        max_shard_size=given["max_shard_size"], crc=given["crc"], workers=given["workers"],
        dry_run=given["dry_run"], overwrite=given["overwrite"],
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
    line = f"{plain.escape(done.summary())} ({plain.size(done.nbytes)})"
    out.summary(line if done.dry_run else f"{line} in {done.seconds:.1f} s")
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
        for name, why in done.left_out:
            out.result(plain.escape(f"left out: {name} ({why})"))
        for name in done.replaced:
            out.result(plain.escape(f"replaced: {name}"))
    out.warn(done.warnings)
    for note in done.notes:
        out.hint(note, label="note: ")
    if done.not_carried:
        out.hint(f"not carried: {', '.join(done.not_carried)}", label="note: ")
    if not done.dry_run:
        out.hint(f"lorabridge inspect {shlex.quote(done.target)}", label="next: ")
