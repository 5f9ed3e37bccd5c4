"""The command ``lorabridge switch``."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from ..reports import plain
from ._group import Command, Manual, documented
from ._options import (
    CHECKPOINT_OUT,
    OUTPUT,
    fact_options,
    mappings_option,
    output_options,
    progress_option,
    target_options,
)
from ._progress import Progress
from ._terminal import Output, width
from ._values import FACTS, LOCATION
from .unmerge import (
    NAMES,
    WRITING,
    Given,
    any_adapter_option,
    names_options,
    options_of,
    show_guesses,
    split_options,
)

if TYPE_CHECKING:
    from ..actions.switch import SwitchReport


@documented(
    Manual(
        arguments={
            "MERGED": "The merged model, as the merge wrote it or converted.",
            "OUT": CHECKPOINT_OUT,
        },
        groups={
            "Adapters": (
                "old",
                "new",
                "undo",
                "undo_out",
                "weights",
                "exact",
                "residual_base",
                "any_adapter",
                "any_base",
            ),
            "Names": NAMES,
            "What the adapters do not say": tuple(FACTS),
            "Writing": WRITING,
            "Output": OUTPUT,
        },
        examples=(
            "lorabridge switch merged/ --from a/ --to b/ out/ --undo a.u --undo-out b.u",
            "lorabridge switch merged/ --from a/ --to b/ out/ --undo a.u",
            "lorabridge switch merged/ --from a/ --to b/ out/",
        ),
    )
)
@click.command("switch", cls=Command)
@click.argument("merged_model", metavar="MERGED", type=LOCATION)
@click.argument("target", metavar="OUT")
@click.option("--from", "old", metavar="A", multiple=True, required=True, type=LOCATION,
              help="The adapter that was merged; several in their order.")  # fmt: skip
@click.option("--to", "new", metavar="B", multiple=True, required=True, type=LOCATION,
              help="The adapter to merge in its place; may be repeated.")  # fmt: skip
@click.option("--undo", metavar="FILE", type=LOCATION,
              help="What `merge --undo FILE` wrote for A; without it the result is only near.")  # fmt: skip
@click.option("--undo-out", metavar="FILE", type=LOCATION,
              help="Write the undo file of B.")  # fmt: skip
@click.option("--weights", metavar="W,W...", help="Multiply each B's deltas by a number.")
@click.option("--exact", is_flag=True, help="Compute deltas to 48 bits for bfloat16 too; other types get them anyway.")
@click.option("--residual-base", is_flag=True,
              help="The base is the one that PiSSA, OLoRA, LoftQ ... left when B's training began.")  # fmt: skip
@any_adapter_option
@click.option("--any-base", is_flag=True,
              help="Go on where B records another base: the result may be worth nothing.")  # fmt: skip
@names_options("--dialect", "--names")
@mappings_option
@fact_options
@split_options
@target_options
@output_options
@progress_option
def switch(
    merged_model: Path, target: str, old: tuple[Path, ...], new: tuple[Path, ...], undo: Path | None,
    undo_out: Path | None, weights: str | None, exact: bool, residual_base: bool,
    any_adapter: bool, any_base: bool, **given: Unpack[Given],
) -> None:  # fmt: skip
    """Put adapter B in the place of the merged adapter A, in one pass.

    With the undo file of A every weight goes through the exact base: the result is what merging B into the base gives,
    bit for bit. Without it the result is only near to that, and is never called exact.
    """
    out = Output("switch", given["json"], given["quiet"], given["verbose"])
    if undo_out is not None and undo is None:
        raise click.UsageError("--undo-out needs --undo: without the exact base there is nothing to come back to")
    options = replace(
        options_of(given, weights, exact=exact), residual_base=residual_base, any_adapter=any_adapter, any_base=any_base
    )
    from ..actions.switch import switch as run

    with Progress("switching", enabled=not (given["no_progress"] or given["quiet"])) as progress:
        done = run(merged_model, old, new, target, options, undo=undo, undo_out=undo_out, progress=progress)
    if out.json:
        out.document(done.as_json())
        return
    _show(out, done)


def _show(out: Output, done: SwitchReport) -> None:
    out.wrote(done.summary(), done)
    if done.undo_out is not None:
        out.summary(plain.escape(done.undo_out.sentence()))
    if out.verbose:
        if done.rows:
            header = ("parameter", "delta/weight", "changed", "vanished", "error")
            rows = [(r.parameter, f"{r.relative:.1e}", f"{r.changed:.1%}", f"{r.vanished:.1%}", f"{r.error:.1e}")
                    for r in done.rows]  # fmt: skip
            out.result(plain.table(header, rows, right=" rrrr", width=width()))
        show_guesses(out, done.guesses)
        out.left_out(done.left_out)
    out.warn(done.warnings)
    out.notes(done.notes)
    if not done.dry_run:
        out.hint(f"lorabridge inspect {shlex.quote(done.target)}", label="next: ")
