"""The command ``lorabridge env``."""

from __future__ import annotations

import click

from ._group import Command, Manual, documented
from ._options import output_options
from ._terminal import Output


@documented(
    Manual(
        groups={"Output": ("json", "quiet", "verbose")},
        examples=("lorabridge env", "lorabridge env --json > env.json"),
    )
)
@click.command("env", cls=Command)
@output_options
def env(json: bool, quiet: bool, verbose: bool) -> None:
    """Show versions and machine, for bug reports.

    Frameworks are not imported. Combinations known not to work are named with their cure.
    """
    from ..actions.env import environment

    out = Output("env", json, quiet, verbose)
    found = environment()
    if json:
        out.document(found.as_json())
    elif quiet:
        out.warn(found.problems)
    else:
        out.result(found.text())
