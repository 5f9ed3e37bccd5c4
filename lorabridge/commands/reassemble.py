"""The command ``lorabridge reassemble``."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import click

from ._group import Command, Manual, documented
from ._progress import Progress
from ._terminal import Output
from ._values import known_family
from .convert import Given, convert, options_of, show


@documented(
    Manual(
        arguments={
            "SRC": "A directory that ranks wrote: rank_0, rank_1 ...",
            "DST": "A file, whose suffix decides the container (.safetensors, .bin/.pt, .ckpt), or a directory.",
        },
        groups={"Ranks": convert.manual.groups["Ranks"], **convert.manual.groups},
        examples=(
            "lorabridge reassemble checkpoint/ whole.safetensors --strategy strategy/",
            "lorabridge reassemble checkpoint/ adapter/ --to peft --family llama",
        ),
        optional=convert.manual.optional,
    )
)
@click.command("reassemble", cls=Command, params=list(convert.params))
def reassemble(source: Path, target: str, **given: Unpack[Given]) -> None:
    """Put a distributed checkpoint together into one.

    Names stay as they are; --to, --family and all that `lorabridge convert` takes change them in the same pass. What
    no rank holds, what replicas disagree on and what does not fit the strategy is an error, and nothing is written.
    """
    out = Output("reassemble", given["json"], given["quiet"], given["verbose"])
    if given["family"] is not None:
        known_family(given["family"], given["mappings"], hint="--family")
    options = options_of(given)
    from ..actions.reassemble import reassemble as run

    with Progress("reassembling", enabled=not (given["no_progress"] or given["quiet"])) as progress:
        done = run(source, target, options, progress=progress)
    if out.json:
        out.document(done.as_json())
        return
    show(out, done)
