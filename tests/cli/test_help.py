from __future__ import annotations

import importlib.util
import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from console import Invoke, clean_environ

from lorabridge.commands import COMMANDS
from lorabridge.commands._group import Command, Group, cli, did_you_mean

ROOT = Path(__file__).parents[2]
HEAVY = ("numpy", "ml_dtypes", "safetensors", "tqdm", "torch", "mindspore", "peft", "google.protobuf", "transformers")


def everything(group: click.Group = cli, path: str = "lorabridge") -> Iterator[tuple[str, click.Command]]:
    """Yield the full name and object of every command, the groups included."""
    yield path, group
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from everything(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


ALL = dict(everything())
generate = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
assert generate is not None
assert generate.loader is not None
docs = importlib.util.module_from_spec(generate)
generate.loader.exec_module(docs)


@pytest.mark.parametrize("path", ALL)
def test_every_command_has_help_that_begins_with_what_it_does(path: str, invoke: Invoke) -> None:
    for flag in ("-h", "--help"):
        result = invoke(*path.split()[1:], flag)
        assert result.code == 0
        assert result.err == ""
        assert result.out.startswith("Usage: lorabridge")
    first = (ALL[path].help or "").strip().split("\n")[0]
    assert re.fullmatch(r"[A-Z][a-z]+,? .{10,}\.", first), first


@pytest.mark.parametrize("path", ALL)
def test_every_option_and_argument_is_explained(path: str) -> None:
    command = ALL[path]
    assert isinstance(command, Command | Group)
    for param in command.params:
        if isinstance(param, click.Option):
            assert param.help, f"{path} {param.name}"
            assert param.help.endswith("."), f"{path} {param.name}: {param.help}"
        elif isinstance(param, click.Argument):
            assert command.manual.arguments.get(param.metavar or "")


@pytest.mark.parametrize("path", ALL)
def test_examples_are_there_and_parse(path: str, invoke: Invoke) -> None:
    command = ALL[path]
    assert isinstance(command, Command | Group)
    assert 2 <= len(command.manual.examples) <= 4 or isinstance(command, Group) or not command.params[1:]
    shown = invoke(*path.split()[1:], "--help").out
    for example in command.manual.examples:
        assert f"  {example}\n" in shown
        words = shlex.split(example.partition(" > ")[0])
        assert words[0] == "lorabridge"
        parse(cli, words[1:])


def parse(command: click.Command, args: list[str], parent: click.Context | None = None) -> None:
    """Parse arguments down to the last subcommand without running it."""
    if isinstance(command, click.Group):
        group = click.Context(command, parent=parent)
        _, inner, rest = command.resolve_command(group, args)
        assert inner is not None
        parse(inner, rest, group)
    else:
        command.make_context(args[0] if args else "x", args, parent=parent).close()


def test_every_option_of_convert_stands_under_a_heading() -> None:
    command = ALL["lorabridge convert"]
    assert isinstance(command, Command)
    placed = [name for names in command.manual.groups.values() for name in names]
    assert sorted(placed) == sorted(p.name for p in command.params if isinstance(p, click.Option) and p.name)


@pytest.mark.parametrize("path", ALL)
def test_groups_name_options_that_exist(path: str) -> None:
    command = ALL[path]
    assert isinstance(command, Command | Group)
    names = {param.name for param in command.params}
    assert {name for group in command.manual.groups.values() for name in group} <= names


def test_help_fits_eighty_columns(invoke: Invoke) -> None:
    for path in ALL:
        for line in invoke(*path.split()[1:], "--help").out.split("\n"):
            assert len(line) <= 80, line


def test_the_reference_page_is_up_to_date() -> None:
    assert docs.PAGE.read_text("utf-8") == docs.page(), "run python docs/generate.py"


def test_every_command_is_on_the_reference_page() -> None:
    page = docs.PAGE.read_text("utf-8")
    for path, command in ALL.items():
        if path != "lorabridge":
            assert f"\n## {path}\n" in page
            for param in command.params:
                assert all(f"`{opt}" in page or f" {opt}" in page for opt in param.opts if opt.startswith("-"))


def test_help_names_every_dialect(invoke: Invoke) -> None:
    from lorabridge.commands._values import dialects

    shown = " ".join(invoke("convert", "--help").out.split())
    assert all(re.search(rf"\b{name}\b", shown) for name in dialects())


def test_the_version_is_the_package_s(invoke: Invoke) -> None:
    from lorabridge import __version__

    assert invoke("-V").out == invoke("--version").out == f"lorabridge {__version__}\n"


def test_without_a_command_help_goes_to_stderr(invoke: Invoke) -> None:
    result = invoke()
    assert (result.code, result.out) == (2, "")
    assert all(f"\n  {name} " in result.err for name in COMMANDS)


def test_help_takes_less_than_half_a_second_of_cpu() -> None:
    def cpu() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "lorabridge", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu() for _ in range(3)) < 0.5


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["convert", "--help"], ["inspect", "--help"], ["env"]])
def test_help_version_and_env_import_nothing_heavy(args: list[str]) -> None:
    script = (
        "import sys; from lorabridge.commands._run import run\n"
        f"code = run({args!r})\n"
        f"print('loaded:', [name for name in {HEAVY!r} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=clean_environ())
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("loaded: []\n")


def test_the_checkout_script_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, ROOT / "cli.py", "--version"], capture_output=True, text=True, cwd=os.sep)
    assert done.stdout.startswith("lorabridge ")


@pytest.mark.parametrize(
    ("args", "advice"),
    [
        (["covnert", "a", "b"], "did you mean convert, recover?"),
        (["tables", "lst"], "did you mean list?"),
        (["convert", "--famly", "x", "a", "b"], "--family"),
        (["convert", "--alhpa", "16", "a", "b"], "--alpha"),
        (["convert", "--to", "pefft", "a", "b"], "did you mean peft?"),
        (["convert", "--on-overflow", "infinite", "a", "b"], "'error', 'saturate', 'inf'"),
        (["tables", "list", "--framewo"], "`lorabridge tables list --help`"),
        (["reshard", "a", "b", "--dcp"], "`lorabridge reshard --help`"),
    ],
)
def test_a_misspelt_word_gets_advice(args: list[str], advice: str, invoke: Invoke) -> None:
    result = invoke(*args)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("error: ")
    assert advice in result.err
    assert "--help` lists what it takes" in result.err


def test_a_word_near_none_gets_them_all() -> None:
    assert did_you_mean("zzz", list(COMMANDS)) == f" Did you mean {', '.join(COMMANDS)}?"
    assert did_you_mean("zzz", []) == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(shell: str, launch: Invoke) -> None:
    result = launch(_LORABRIDGE_COMPLETE=f"{shell}_source")
    assert result.code == 0
    assert "_LORABRIDGE_COMPLETE" in result.out


@pytest.mark.parametrize(
    ("typed", "found"),
    [("lorabridge in", {"inspect"}), ("lorabridge convert --to lora", {"loralib", "loralib-ms"}),
     ("lorabridge convert --over", {"--overwrite"})],
)  # fmt: skip
def test_commands_options_and_dialects_complete(typed: str, found: set[str], launch: Invoke) -> None:
    words = typed.split()
    result = launch(
        _LORABRIDGE_COMPLETE="bash_complete", COMP_WORDS=typed, COMP_CWORD=str(len(words) - 1)
    )  # fmt: skip
    assert {line.partition(",")[2] for line in result.out.split()} == found
