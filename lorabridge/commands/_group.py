"""The click classes behind every command: loaded when asked for, documented in one form, forgiving about typos."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import click

from .. import __version__
from . import COMMANDS
from ._terminal import write


@dataclass(frozen=True)
class Manual:
    """What a command's help and its reference page say beside the options' own help.

    ``arguments``: metavar to meaning. ``groups``: heading to the parameter names under it; the others come last,
    under "Options". ``examples``: commands to copy. ``optional``: options that may stand without a value, with the
    test that tells a value from the next argument and the value that the bare option means.
    """

    arguments: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    examples: Sequence[str] = ()
    optional: Mapping[str, tuple[Callable[[str], bool], str]] = field(default_factory=dict)


_HYPHEN = "\N{NON-BREAKING HYPHEN}"


class _Formatter(click.HelpFormatter):
    """Keep words such as ``mindone-gm`` on one line, so that they can be found and copied."""

    def write_dl(self, rows: Iterable[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        """Write terms and their meanings."""
        kept = [(term, re.sub(r"(?<=\w)-(?=\w)", _HYPHEN, text)) for term, text in rows]
        super().write_dl(kept, col_max, col_spacing)

    def getvalue(self) -> str:
        """Return the text."""
        return super().getvalue().replace(_HYPHEN, "-")


class _Context(click.Context):
    formatter_class = _Formatter


class Command(click.Command):
    """A command whose help has its arguments, options under headings, and examples."""

    context_class = _Context
    manual = Manual()

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give options that stand without a value the value they mean, then parse."""
        return super().parse_args(ctx, _complete_values(args, self.manual))

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write nothing: newer versions of click call this, and format_options writes the arguments for all."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the arguments, then the options heading by heading."""
        if self.manual.arguments:
            with formatter.section("Arguments"):
                formatter.write_dl(list(self.manual.arguments.items()))
        for heading, options in sections(self, ctx):
            records = [record for option in options if (record := option.get_help_record(ctx))]
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are, so that they can be copied."""
        _write_examples(self.manual, formatter)


class Group(click.Group):
    """A group that imports a command when it is named and suggests the nearest one when it does not exist."""

    manual = Manual()
    lazy: Mapping[str, str] = {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of their table."""
        return [*self.lazy, *self.commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        if cmd_name not in self.lazy:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = self.lazy[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        if not isinstance(command, click.Command):
            raise TypeError(f"{self.lazy[cmd_name]} is not a click command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the first argument names."""
        name = args[0]
        if not name.startswith("-") and name not in self.list_commands(ctx) and not ctx.resilient_parsing:
            raise click.UsageError(f"no such command {name!r}{did_you_mean(name, self.list_commands(ctx))}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write each command with the first sentence of its help, whole."""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, command.get_short_help_str(limit=400)) for name, command in found if command is not None]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they are."""
        _write_examples(self.manual, formatter)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return `` Did you mean ...?`` with the nearest known words, or all of them where none is near."""
    near = difflib.get_close_matches(word, known) or list(known)[:24]
    return f" Did you mean {', '.join(near)}?" if near else ""


def sections(command: click.Command, ctx: click.Context) -> list[tuple[str, list[click.Option]]]:
    """Return a command's options under their headings, those without one last."""
    options = [p for p in command.get_params(ctx) if isinstance(p, click.Option)]
    manual = command.manual if isinstance(command, Command | Group) else Manual()
    placed = {name for names in manual.groups.values() for name in names}
    found = [(h, [o for name in names for o in options if o.name == name]) for h, names in manual.groups.items()]
    return [*found, ("Options", [o for o in options if o.name not in placed])]


def _complete_values(args: list[str], manual: Manual) -> list[str]:
    out: list[str] = []
    for i, arg in enumerate(args):
        if arg == "--":
            return out + args[i:]
        if arg in manual.optional:
            is_value, meant = manual.optional[arg]
            following = args[i + 1] if i + 1 < len(args) else "--"
            arg = arg if is_value(following) else f"{arg}={meant}"
        out.append(arg)
    return out


def _write_examples(manual: Manual, formatter: click.HelpFormatter) -> None:
    if manual.examples:
        with formatter.section("Examples"):
            for example in manual.examples:
                formatter.write(f"{' ' * formatter.current_indent}{example}\n")


C = TypeVar("C", bound=click.Command)


def documented(manual: Manual) -> Callable[[C], C]:
    """Attach a manual to a command."""

    def attach(command: C) -> C:
        if not isinstance(command, Command | Group):
            raise TypeError(f"{command.name} is no command of lorabridge's own class")
        command.manual = manual
        return command

    return attach


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        write(sys.stdout, f"lorabridge {__version__}")
        ctx.exit()


@documented(
    Manual(
        examples=(
            "lorabridge convert peft_adapter/ out.ckpt",
            "lorabridge inspect out.ckpt",
            "lorabridge convert out.ckpt back/ --to peft",
        )
    )
)
@click.group(
    "lorabridge", cls=Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
    "-V", "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Carry LoRA adapters and checkpoints between PyTorch and MindSpore.

    Conversions are exact and can be undone; a run writes everything or nothing. Paths may lie in stores: s3://, obs://,
    hf://. Each command has its own --help.
    """
    if ctx.invoked_subcommand is None:
        write(sys.stderr, ctx.get_help())
        ctx.exit(2)


cli.lazy = COMMANDS
