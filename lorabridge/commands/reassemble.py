"""The command ``lorabridge reassemble``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Unpack

import click

from ._group import Command, Manual, documented
from ._progress import Progress
from ._terminal import Output
from ._values import LOCATION, known_family
from .convert import Given as ConvertGiven
from .convert import convert, options_of, show


class Given(ConvertGiven):
    """The options as click hands them over."""

    strategies: tuple[Path, ...]
    step: str | None
    check_replicas: bool


@documented(
    Manual(
        arguments={
            "SRC": "A directory that ranks wrote: rank_0, rank_1 ...",
            "DST": "A file, whose suffix decides the container (.safetensors, .bin/.pt, .ckpt), or a directory.",
        },
        groups={
            "Ranks": ("strategies", "step", "check_replicas"),
            **convert.manual.groups,
        },
        examples=(
            "lorabridge reassemble checkpoint/ whole.safetensors --strategy strategy/",
            "lorabridge reassemble checkpoint/ adapter/ --to peft --family llama",
        ),
        optional=convert.manual.optional,
    )
)
@click.command("reassemble", cls=Command, params=list(convert.params))
@click.option("--strategy", "strategies", metavar="FILE", multiple=True, type=LOCATION,
              help="MindSpore's strategy file, once per stage, or a directory of them; by default strategy/ in or "
              "beside SRC.")  # fmt: skip
@click.option("--step", metavar="EPOCH_STEP", help="Which checkpoint, where the ranks hold several: 2_1000.")
@click.option("--check-replicas/--no-check-replicas", default=True, show_default=True,
              help="Compare all copies of a slice before anything is written.")  # fmt: skip
def reassemble(source: Path, target: str, **given: Unpack[Given]) -> None:
    """Put a distributed checkpoint together into one.

    Names stay as they are; --to, --family and all that `lorabridge convert` takes change them in the same pass. What
    no rank holds, what replicas disagree on and what does not fit the strategy is an error, and nothing is written.
    """
    out = Output("reassemble", given["json"], given["quiet"], given["verbose"])
    if given["family"] is not None:
        known_family(given["family"], given["mappings"], hint="--family")
    options = replace(
        options_of(given), strategies=given["strategies"], step=given["step"], check_replicas=given["check_replicas"]
    )
    from ..actions.reassemble import reassemble as run

    with Progress("reassembling", enabled=not (given["no_progress"] or given["quiet"])) as progress:
        done = run(source, target, options, progress=progress)
    if out.json:
        out.document(done.as_json())
        return
    show(out, done)
