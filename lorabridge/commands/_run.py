"""Run the command line: from arguments to an exit code, with every failure told in one way."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType

import click

from .. import errors
from ..reports import plain
from . import COMMANDS
from ._group import cli
from ._terminal import BOLD, RED, prepare, print_document, write

COMPLETE = "_LORABRIDGE_COMPLETE"
CLOSED_PIPE = 141  # 128 + SIGPIPE, what a shell reports for a program that the signal ends


class Terminated(BaseException):
    """SIGTERM arrived; a BaseException so that nothing on the way out takes it for a failure to handle."""


def run(args: Sequence[str]) -> int:
    """Run one command and return the exit code; nothing escapes but what Python itself cannot survive."""
    prepare()
    previous = _on_sigterm(_terminate)
    try:
        return _run(args)
    except BrokenPipeError:
        _discard_stdout()
        return CLOSED_PIPE
    finally:
        _on_sigterm(previous)


def _run(args: Sequence[str]) -> int:
    try:
        try:
            code = _invoke(args)
        except click.exceptions.Exit as stop:
            code = stop.exit_code
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except BaseException as raised:
        error = explain(raised, command_of(args))
        _tell(error, args, raised)
        return error.exit_code
    return code


def _invoke(args: Sequence[str]) -> int:
    if COMPLETE in os.environ:
        try:
            cli.main(list(args), prog_name="lorabridge", complete_var=COMPLETE)
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 0
    # Not cli.main(): it would answer a closed pipe and Ctrl-C with its own codes.
    with cli.make_context("lorabridge", list(args), auto_envvar_prefix="LORABRIDGE") as context:
        cli.invoke(context)
    return 0


def explain(raised: BaseException, command: str = "") -> errors.LorabridgeError:
    """Turn whatever ended a run of a command into an error with a problem, a place, a hint and an exit code."""
    if isinstance(raised, errors.LorabridgeError):
        return raised
    if isinstance(raised, click.ClickException):
        return _usage(raised, command)
    if isinstance(raised, KeyboardInterrupt | click.Abort):
        return _stopped("interrupted", 128 + signal.SIGINT)
    if isinstance(raised, Terminated):
        return _stopped("terminated", 128 + signal.SIGTERM)
    if isinstance(raised, MemoryError):
        return errors.StorageError("not enough memory", hint="use fewer --workers, or a machine with more memory")
    if isinstance(raised, OSError) and raised.errno is not None:
        where = str(raised.filename) if raised.filename is not None else ""
        if isinstance(raised, FileNotFoundError):
            return errors.InputError("no such file or directory", where=where, hint="check the path")
        return errors.StorageError((raised.strerror or "input or output failed").lower(), where=where)
    return errors.LorabridgeError(
        f"internal error: {type(raised).__name__}: {raised}",
        hint="please report this with the output of `lorabridge env`; LORABRIDGE_DEBUG=1 shows the traceback",
    )


def _usage(raised: click.ClickException, command: str) -> errors.LorabridgeError:
    context = getattr(raised, "ctx", None)
    path = context.command_path if context is not None else f"lorabridge {command}".rstrip()
    problem, _, advice = raised.format_message().strip().partition(" Did you mean ")
    hint = f"`{path} --help` lists what it takes"
    if advice:
        hint = f"did you mean {advice.rstrip('?')}? {hint}"
    return errors.UsageError(problem[:1].lower() + problem[1:].rstrip("."), hint=hint)


def _stopped(word: str, code: int) -> errors.LorabridgeError:
    error = errors.LorabridgeError(word)
    error.code, error.exit_code = word, code
    return error


def _tell(error: errors.LorabridgeError, args: Sequence[str], raised: BaseException) -> None:
    stopped = error.exit_code > 128
    if stopped and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not become a traceback
    as_json = wants_json(args)
    if as_json:
        print_document(command_of(args), {"error": error.as_json()})
        sys.stdout.flush()
    if not as_json or not sys.stdout.isatty():
        problem, _, hint = plain.error_text(error).partition("\nhint: ")
        write(sys.stderr, problem, label="error: ", code=RED)
        if hint:
            write(sys.stderr, hint, label="hint: ", code=BOLD)
    if os.environ.get("LORABRIDGE_DEBUG", "") not in ("", "0"):
        import traceback

        write(sys.stderr, "".join(traceback.format_exception(raised)).rstrip())


def wants_json(args: Sequence[str]) -> bool:
    """Say whether ``--json`` is among the options, even where the rest of them cannot be parsed."""
    options = list(args)[: args.index("--")] if "--" in args else args
    variable = f"LORABRIDGE_{command_of(args).replace(' ', '_').upper()}_JSON"
    return "--json" in options or os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")


def command_of(args: Sequence[str]) -> str:
    """Return the command (and subcommand) that the arguments name, or an empty string."""
    words = [arg for arg in args if not arg.startswith("-")]
    if not words or words[0] not in COMMANDS:
        return ""
    try:
        command = cli.get_command(click.Context(cli), words[0])
    except Exception:  # told already: this runs while an error is being reported
        return words[0]
    if isinstance(command, click.Group) and len(words) > 1 and words[1] in command.commands:
        return f"{words[0]} {words[1]}"
    return words[0]


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _on_sigterm(handler: signal.Handlers | int | object) -> object:
    if threading.current_thread() is not threading.main_thread():
        return None
    previous = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, handler)  # type: ignore[arg-type]  # whatever getsignal returned
    return previous


def _discard_stdout() -> None:
    """Point stdout at /dev/null, so that the interpreter's own flush at exit finds an open file."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):
        return
