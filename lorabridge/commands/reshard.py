"""The command ``lorabridge reshard``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

import click

from ..reports import plain
from ._group import Command, Manual, documented
from ._options import (
    OUTPUT,
    check_replicas_option,
    engine_options,
    output_options,
    planned_options,
    progress_option,
    step_option,
    strategy_option,
)
from ._progress import Progress
from ._terminal import Output
from ._values import LOCATION, Size
from .convert import show

if TYPE_CHECKING:
    from ..actions.reshard import ReshardOptions


class Given(TypedDict):
    """The options as click hands them over."""

    source_strategies: tuple[Path, ...]
    step: str | None
    strategies: tuple[Path, ...]
    tp: int | None
    pp: int | None
    opt_shard: int | None
    replicas: int | None
    cuts: tuple[str, ...]
    dcp: int | None
    shards: int | None
    max_shard_size: int | None
    format: str | None
    check_replicas: bool
    workers: int
    dry_run: bool
    overwrite: bool
    engine: Literal["process", "ray"]
    address: str | None
    json: bool
    quiet: bool
    verbose: bool
    no_progress: bool


@documented(
    Manual(
        arguments={
            "SRC": "A checkpoint, or a directory that ranks wrote.",
            "DST": "The directory to write: rank_0, rank_1 ... and strategy/, or one sharded checkpoint.",
        },
        groups={
            "From": ("source_strategies", "step", "check_replicas"),
            "To MindSpore's ranks": ("strategies", "tp", "pp", "opt_shard", "replicas", "cuts"),
            "To something else": ("dcp", "shards", "max_shard_size"),
            "Writing": ("format", "workers", "dry_run", "overwrite"),
            "Machines": ("engine", "address"),
            "Output": OUTPUT,
        },
        examples=(
            "lorabridge reshard llama.safetensors ranks/ --tp 4 --pp 2",
            "lorabridge reshard checkpoint/ ranks/ --strategy new_strategy.ckpt",
            "lorabridge reshard checkpoint/ model/ --max-shard-size 5GB",
        ),
    )
)
@click.command("reshard", cls=Command)
@click.argument("source", metavar="SRC", type=LOCATION)
@click.argument("target", metavar="DST")
@strategy_option("--from-strategy", "source_strategies")
@step_option
@check_replicas_option
@click.option("--strategy", "strategies", metavar="FILE", multiple=True, type=LOCATION,
              help="Strategy of the network that will load DST, once per stage or a directory.")  # fmt: skip
@click.option("--tp", metavar="N", type=click.IntRange(min=1), help="Tensor parallel size.")
@click.option("--pp", metavar="N", type=click.IntRange(min=1), help="Pipeline stages.")
@click.option("--opt-shard", metavar="N", type=click.IntRange(min=1), help="Optimizer shards among the replicas.")
@click.option("--dp", "replicas", metavar="N", type=click.IntRange(min=1),
              help="Data parallel size; by default as many as the optimizer shards.")  # fmt: skip
@click.option("--cut", "cuts", metavar="REGEX=AXIS", multiple=True,
              help="Which axis tensor parallelism cuts, or `whole`, where no rule knows a name.")  # fmt: skip
@click.option("--format", type=click.Choice(["ckpt", "safetensors"]), help="Container of the files.")
@click.option("--dcp", metavar="N", type=click.IntRange(min=1, max=100_000),
              help="Write PyTorch's distributed checkpoint, cut by rows for N ranks.")  # fmt: skip
@click.option(
    "--shards", metavar="N", type=click.IntRange(min=1), help="Write one checkpoint in N files with an index."
)
@click.option(
    "--max-shard-size", metavar="SIZE", type=Size(), help="The same, with a most of bytes per file: 5GB, 500MiB ..."
)
@planned_options("DST")
@engine_options
@output_options
@progress_option
def reshard(source: Path, target: str, **given: Unpack[Given]) -> None:
    """Cut a checkpoint, whole or distributed, for other ranks.

    MindSpore's load_checkpoint and load_distributed_checkpoint read the ranks with the strategy that is written beside
    them, torch.distributed.checkpoint what --dcp writes; one sharded checkpoint has an index as Hugging Face writes it.
    """
    out = Output("reshard", given["json"], given["quiet"], given["verbose"])
    one = given["shards"] is not None or given["max_shard_size"] is not None
    several = [
        given["dcp"],
        given["strategies"],
        given["tp"],
        given["pp"],
        given["opt_shard"],
        given["replicas"],
        given["cuts"],
    ]
    if one and (any(several) or (given["shards"] is not None and given["max_shard_size"] is not None)):
        raise click.UsageError("choose one: ranks, --dcp, --shards or --max-shard-size")
    options = _options(given)
    with Progress("resharding", enabled=not (given["no_progress"] or given["quiet"])) as progress:
        if one:
            from ..actions.reshard import reshard_files

            shards, size = given["shards"], given["max_shard_size"]
            converted = reshard_files(source, target, options, shards=shards, max_size=size, progress=progress)
        else:
            from ..actions.reshard import reshard as run

            done = run(source, target, options, progress=progress)
    if one:
        out.document(converted.as_json()) if out.json else show(out, converted)
        return
    if out.json:
        out.document(done.as_json())
        return
    out.wrote(done.summary(), done)
    if done.replicated:
        some = ", ".join(plain.escape(name) for name in done.replicated[:4])
        out.hint(f"{plain.count(len(done.replicated), 'tensor')} on every rank: {some}", label="note: ")
    out.notes(done.notes)


def _options(given: Given) -> ReshardOptions:
    from ..actions.reshard import ReshardOptions
    from ..conversion.engines import Engine
    from ..distributed.parallel import Sizes

    asked = (given["tp"], given["pp"], given["opt_shard"], given["replicas"])
    sizes = None
    if any(size is not None for size in asked):
        sizes = Sizes(given["tp"] or 1, given["pp"] or 1, given["opt_shard"] or 1, given["replicas"] or 0)
    return ReshardOptions(
        strategies=given["source_strategies"], step=given["step"], to=given["strategies"], sizes=sizes,
        cuts=tuple(_cut(text) for text in given["cuts"]),
        dcp=given["dcp"],
        format="mindspore" if given["format"] == "ckpt" else "safetensors" if given["format"] else None,
        check_replicas=given["check_replicas"], workers=given["workers"], dry_run=given["dry_run"],
        overwrite=given["overwrite"], engine=Engine(given["engine"], given["address"]),
    )  # fmt: skip


def _cut(text: str) -> tuple[str, int | None]:
    import re

    pattern, equals, axis = text.rpartition("=")
    try:
        re.compile(pattern)
    except re.error as error:
        raise click.BadParameter(f"{pattern!r} is no regular expression: {error}", param_hint="--cut") from None
    if not equals or not (axis == "whole" or (axis.isdigit() and len(axis) < 3)):
        raise click.BadParameter(f"{text!r} is not of the form REGEX=AXIS or REGEX=whole", param_hint="--cut")
    return pattern, None if axis == "whole" else int(axis)
