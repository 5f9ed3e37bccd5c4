"""Write docs/cli.md from the commands themselves; with --check, only say whether it is up to date."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from lorabridge import errors
from lorabridge.commands import COMMANDS
from lorabridge.commands._group import Command, Group, cli, sections

PAGE = Path(__file__).with_name("cli.md")

HEAD = """\
# The command line

This page is made from the commands by `python docs/generate.py`; a test fails when it is out of date.
`lorabridge`, `python -m lorabridge` and, in a checkout, `python cli.py` are the same program. Every path may
be one of a store, such as `s3://bucket/adapter`: see [stores.md](stores.md).
"""

STREAMS = """\
## Streams and JSON

Results go to stdout; progress, warnings, notes and hints go to stderr. Progress is a bar on a terminal, a line every
30 seconds where stderr is not one, and nothing under `--no-progress` or `--quiet`. `--quiet` leaves warnings and
errors. Control, bidirectional and invisible characters in names are written as backslash escapes; what an encoding
cannot hold is written as an escape too.

Under `--json` stdout is exactly one JSON document. Its `schema` is `lorabridge/<command>/1` (subcommands:
`lorabridge/tables-list/1`); keys keep their meaning within a schema number, new keys may appear. Sizes are bytes,
paths are as given, and numbers that JSON lacks are the strings `NaN`, `Infinity` and `-Infinity`. On failure the
document is `{"schema": ..., "error": {"code", "problem", "where", "hint"}}` with the same exit code as without
`--json`; where stdout is not a terminal the error is told on stderr as well.
"""

ENVIRONMENT = """\
## Environment variables

| variable | effect |
|---|---|
| `LORABRIDGE_MAPPINGS` | directory with family tables of your own, as `--mappings` |
| `LORABRIDGE_WORKERS` | threads, as `--workers` |
| `LORABRIDGE_<COMMAND>_<OPTION>` | any other option, for example `LORABRIDGE_CONVERT_OVERWRITE=1` |
| `LORABRIDGE_DEBUG=1` | show the traceback of an error |
| `NO_COLOR` | no colours; outranks `FORCE_COLOR` |
| `FORCE_COLOR` | colours although the stream is not a terminal |
| `COLUMNS` | width that tables should fit in |
"""

COMPLETION = """\
## Completion

Commands, options, dialects and families complete in bash (4.4 or later), zsh and fish. Add one line to the shell's
start-up file:

| shell | file | line |
|---|---|---|
| bash | `~/.bashrc` | `eval "$(_LORABRIDGE_COMPLETE=bash_source lorabridge)"` |
| zsh | `~/.zshrc` | `eval "$(_LORABRIDGE_COMPLETE=zsh_source lorabridge)"` |
| fish | `~/.config/fish/completions/lorabridge.fish` | `_LORABRIDGE_COMPLETE=fish_source lorabridge \\| source` |
"""

OTHER_CODES = {
    0: "done",
    130: "interrupted with Ctrl-C",
    141: "the reader of stdout went away",
    143: "terminated",
}


def page() -> str:
    """Return the text of the page."""
    root = click.Context(cli, info_name="lorabridge")
    parts = [HEAD, *(_command(command, path) for command, path in commands(root))]
    return "\n".join([*parts, STREAMS, _exit_codes(), ENVIRONMENT, COMPLETION])


def commands(root: click.Context) -> Iterator[tuple[click.Command, str]]:
    """Yield every command with its full name, subcommands after their group."""
    for name in COMMANDS:
        command = cli.get_command(root, name)
        assert command is not None
        yield command, f"lorabridge {name}"
        if isinstance(command, click.Group):
            for sub in command.list_commands(root):
                inner = command.get_command(root, sub)
                assert inner is not None
                yield inner, f"lorabridge {name} {sub}"


def _command(command: click.Command, path: str) -> str:
    ctx = click.Context(command, info_name=path)
    usage = " ".join(command.collect_usage_pieces(ctx))
    blocks = [f"## {path}\n", f"```\n{path} {usage}\n```\n", _paragraphs(command.help or "")]
    if isinstance(command, Command | Group):
        if command.manual.arguments:
            blocks.append(_rows(("Arguments", "meaning"), list(command.manual.arguments.items())))
        for heading, options in sections(command, ctx):
            shown = [o for o in options if not o.hidden and "--help" not in o.opts]
            if shown:
                blocks.append(_rows((heading, "meaning"), [_option(o) for o in shown]))
        if command.manual.examples:
            blocks.append("```\n" + "\n".join(command.manual.examples) + "\n```\n")
    return "\n".join(blocks)


def _option(option: click.Option) -> tuple[str, str]:
    metavar = ""
    if not option.is_flag:
        choices = option.type.choices if isinstance(option.type, click.Choice) else ()
        metavar = " " + (option.metavar or "|".join(choices) or option.type.name.upper())
    default = f" Default: {option.default}." if option.show_default else ""
    return ", ".join((*option.opts[:-1], option.opts[-1] + metavar)), (option.help or "") + default


def _rows(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| `{_cell(name)}` | {_cell(text)} |" for name, text in rows), ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _paragraphs(text: str) -> str:
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    return "\n\n".join(paragraphs) + "\n"


def _exit_codes() -> str:
    known = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.LorabridgeError)]
    rows = {e.exit_code: f"{(e.__doc__ or '').split('.')[0]} (`{e.code}`)." for e in known}
    rows[errors.LorabridgeError.exit_code] = (
        "A defect of lorabridge (`internal`); please report it with `lorabridge env`."
    )
    rows |= {code: text[:1].upper() + text[1:] + "." for code, text in OTHER_CODES.items()}
    lines = [f"| {code} | {text} |" for code, text in sorted(rows.items())]
    return "\n".join(["## Exit codes\n", "| code | meaning |", "|---|---|", *lines, ""])


def main() -> int:
    """Write the page, or compare it under --check; return the exit code."""
    text = page()
    if sys.argv[1:] == ["--check"]:
        same = PAGE.is_file() and PAGE.read_text("utf-8") == text
        print(f"{PAGE} is {'up to date' if same else 'out of date: run python docs/generate.py'}")
        return 0 if same else 1
    PAGE.write_text(text, "utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
