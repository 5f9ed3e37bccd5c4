"""The command ``lorabridge inspect``."""

from __future__ import annotations

from pathlib import Path

import click

from ._group import Command, Manual, documented
from ._options import (
    key_option,
    mappings_option,
    output_options,
    progress_option,
    step_option,
    strategy_option,
)
from ._progress import Progress
from ._terminal import Output, width
from ._values import LOCATION, Name, dialects, facts


@documented(
    Manual(
        arguments={"PATH": "A checkpoint file, a sharded set's index, or a directory."},
        groups={
            "What to show": ("norms", "module", "tensors"),
            "Ranks": ("slices", "check_replicas", "strategies", "step"),
            "What the file does not say": (
                "source_dialect",
                "config",
                "mappings",
                "key_file",
                "alpha",
                "rank",
                "enable_lora",
            ),
            "Output": ("html", "json", "quiet", "verbose", "no_progress"),
        },
        examples=(
            "lorabridge inspect peft_adapter/",
            "lorabridge inspect out.ckpt --norms",
            "lorabridge inspect out.ckpt --module '*.layer.0.*.query'",
            "lorabridge inspect ranks/ --check-replicas --html ranks.html",
        ),
    )
)
@click.command("inspect", cls=Command)
@click.argument("path", metavar="PATH", type=LOCATION)
@click.option("--norms", is_flag=True, help="Read the factors; add norms of A, B and the delta, and find NaN.")
@click.option("--module", metavar="PATH|GLOB", help="Print lora_A and lora_B: shape, dtype, statistics, first values.")
@click.option("--tensors", is_flag=True, help="List every tensor and the container's metadata.")
@click.option("--slices", metavar="NAME|GLOB", help="List which rank holds which slice of these tensors.")
@click.option("--check-replicas", is_flag=True, help="Read every copy of a slice and say whether they agree.")
@strategy_option(of="PATH")
@step_option
@click.option("--html", metavar="FILE", type=LOCATION,
              help="Write the findings into FILE as well, with a picture of tensors over the ranks.")  # fmt: skip
@click.option("--from", "source_dialect", type=Name("dialect", dialects), metavar="DIALECT",
              help="Read as this dialect, where detection is wrong or cannot decide.")  # fmt: skip
@click.option("--config", metavar="FILE", type=LOCATION,
              help="adapter_config.json or the model's config.json, where it is not beside PATH.")  # fmt: skip
@mappings_option
@key_option
@click.option("--alpha", metavar="[PATTERN=]NUMBER", multiple=True, help="The adapter's alpha.")
@click.option("--rank", metavar="[PATTERN=]R", multiple=True, help="The adapter's rank.")
@click.option("--enable-lora", metavar="[PATTERN=]T,F,T", multiple=True, help="Adapted parts of a MergedLinear.")
@output_options
@progress_option
def inspect(
    path: Path, norms: bool, module: str | None, tensors: bool, slices: str | None, check_replicas: bool,
    strategies: tuple[Path, ...], step: str | None, html: Path | None, source_dialect: str | None,
    config: Path | None, mappings: Path | None, alpha: tuple[str, ...], rank: tuple[str, ...],
    enable_lora: tuple[str, ...], json: bool, quiet: bool, verbose: bool, no_progress: bool,
) -> None:  # fmt: skip
    """Show what a checkpoint is: container, dialect, family, modules, ranks, problems.

    Only headers are read, except for --norms, --module and --check-replicas. What a conversion would refuse is shown
    as a problem, with exit code 0; a file that cannot be read at all is an error.
    """
    out = Output("inspect", json, quiet, verbose)
    stated = facts({"alpha": alpha, "rank": rank, "enable_lora": enable_lora}.items())
    from ..actions.inspect import inspect as run

    if html is not None:
        from ..actions.inspect_file import check_path, write_page

        check_path(html)

    with Progress("reading", enabled=not (no_progress or quiet)) as progress:
        found = run(path, config=config, norms=norms, module=module, facts=stated, dialect=source_dialect,
                    mappings=mappings, strategies=strategies, step=step, slices=slices,
                    check_replicas=check_replicas, progress=progress)  # fmt: skip
    if html is not None:
        write_page(found, html)
    if json:
        out.document(found.as_json())
        return
    if not quiet:
        out.result(found.text(width=width(), tensors=tensors or verbose))
    out.warn(found.warnings)
    if found.modules and not norms:
        out.hint("--norms adds norms of A, B and the delta; --module PATH prints a module's factors")
