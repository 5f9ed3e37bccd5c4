"""The command ``lorabridge reassemble``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from ._group import Command, Manual, documented
from ._options import CHECKPOINT_OUT
from .convert import Given, conduct, convert

if TYPE_CHECKING:
    from .convert import Action


@documented(
    Manual(
        arguments={
            "SRC": "A directory that ranks wrote: rank_0, rank_1 ...",
            "DST": CHECKPOINT_OUT,
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

    def action() -> Action:
        from ..actions.reassemble import reassemble as run

        return run

    conduct("reassemble", "reassembling", action, source, target, given)
