"""The command line: one file per command, none of them imported before it is asked for."""

from __future__ import annotations

from typing import NoReturn

COMMANDS = {
    "convert": "lorabridge.commands.convert:convert",
    "merge": "lorabridge.commands.merge:merge",
    "unmerge": "lorabridge.commands.unmerge:unmerge",
    "switch": "lorabridge.commands.switch:switch",
    "verify": "lorabridge.commands.verify:verify",
    "reassemble": "lorabridge.commands.reassemble:reassemble",
    "reshard": "lorabridge.commands.reshard:reshard",
    "inspect": "lorabridge.commands.inspect:inspect",
    "resize": "lorabridge.commands.resize:resize",
    "extract": "lorabridge.commands.extract:extract",
    "combine": "lorabridge.commands.combine:combine",
    "recover": "lorabridge.commands.recover:recover",
    "diff": "lorabridge.commands.diff:diff",
    "tables": "lorabridge.commands.tables:tables",
    "clean": "lorabridge.commands.clean:clean",
    "env": "lorabridge.commands.env:env",
}
"""Name of each command and where its click object lives, in the order in which the help lists them."""


def main() -> NoReturn:
    """Run the command line on this process's arguments and exit with its code."""
    import sys

    from ._run import run

    sys.exit(run(sys.argv[1:]))
