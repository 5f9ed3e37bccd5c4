"""Exit codes, error documents, signals, closed streams."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import click
import pytest
from console import Invoke, clean_environ

from lorabridge import errors
from lorabridge.commands import _run
from lorabridge.commands._group import cli


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """A command ``fail`` that raises what the test puts into the list."""
    raised: list[BaseException] = []

    @click.command("fail")
    @click.option("--json", is_flag=True)
    def fail(json: bool) -> None:
        raise raised[0]

    monkeypatch.setitem(cli.commands, "fail", fail)
    return raised


OUR_ERRORS = [
    (errors.DifferentError, 1), (errors.UsageError, 2), (errors.InputError, 3), (errors.MappingError, 4),
    (errors.OutputError, 5), (errors.StorageError, 6), (errors.LorabridgeError, 70),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "code"), OUR_ERRORS)
def test_each_error_class_has_its_exit_code(
    kind: type[errors.LorabridgeError], code: int, failing: list[BaseException], invoke: Invoke
) -> None:
    failing.append(kind("something is wrong", where=["file.x: t"], hint="do this"))
    result = invoke("fail")
    assert (result.code, result.out) == (code, "")
    assert result.err == "error: something is wrong\n  file.x: t\nhint: do this\n"


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (_run.Terminated(), 143, "terminated"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (FileNotFoundError(2, "No such file or directory", "gone.bin"), 3, "no such file or directory\n  gone.bin"),
        (OSError(28, "No space left on device", "out"), 6, "no space left on device\n  out"),
        (PermissionError(13, "Permission denied", "/x"), 6, "permission denied\n  /x"),
        (MemoryError(), 6, "not enough memory"),
        (ValueError("boom"), 70, "internal error: ValueError: boom"),
        (RecursionError(), 70, "internal error: RecursionError"),
        (OSError("no errno"), 70, "internal error: OSError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_everything_else_that_can_end_a_run(
    raised: BaseException, code: int, told: str, failing: list[BaseException], invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(_run, "_discard_stdout", lambda: None)  # pytest needs its own stdout
    before = signal.getsignal(signal.SIGINT)
    failing.append(raised)
    try:
        result = invoke("fail")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.code, result.out) == (code, "")
    assert told in result.err
    assert "Traceback" not in result.err
    if code == 70:
        assert "`lorabridge env`" in result.err
        assert len(result.err.strip().split("\n")) == 2


def test_debug_shows_the_traceback(
    failing: list[BaseException], invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing.append(ValueError("bo\x1bom"))
    monkeypatch.setenv("LORABRIDGE_DEBUG", "1")
    result = invoke("fail")
    assert "Traceback (most recent call last)" in result.err
    assert "\x1b" not in result.err
    monkeypatch.setenv("LORABRIDGE_DEBUG", "0")
    assert "Traceback" not in invoke("fail").err


@pytest.mark.parametrize(("kind", "code"), OUR_ERRORS)
def test_under_json_the_error_is_the_document(
    kind: type[errors.LorabridgeError], code: int, failing: list[BaseException], invoke: Invoke,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(_run.COMMANDS, "fail", "nowhere:fail")
    monkeypatch.setattr(cli, "lazy", {})
    failing.append(kind("bad \x1b", where=[f"t{i}" for i in range(30)], hint="h"))
    result = invoke("fail", "--json")
    assert result.code == code
    assert json.loads(result.out) == {
        "schema": "lorabridge/fail/1",
        "error": {"code": kind.code, "problem": "bad \x1b", "where": [f"t{i}" for i in range(30)], "hint": "h"},
    }
    assert result.err.startswith(r"error: bad \x1b")


@pytest.mark.parametrize(
    ("args", "schema", "code"),
    [
        (["convert", "--json"], "convert", 2),
        (["convert", "--json", "a", "b", "--nope"], "convert", 2),
        (["convert", "nowhere", "b", "--json"], "convert", 3),
        (["inspect", "nowhere", "--json"], "inspect", 3),
        (["clean", "nowhere", "--json"], "clean", 3),
        (["tables", "show", "nothing", "--json"], "tables-show", 2),
        (["nothing", "--json"], "error", 2),
    ],
)
def test_failures_before_and_inside_commands_are_documents(
    args: list[str], schema: str, code: int, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*args)
    document = json.loads(result.out)
    assert result.code == code, result
    assert document["schema"] == f"lorabridge/{schema}/1"
    assert set(document["error"]) == {"code", "problem", "where", "hint"}
    assert document["error"]["problem"]


def test_json_after_a_double_dash_is_a_path(invoke: Invoke) -> None:
    assert not _run.wants_json(["convert", "--", "--json", "x"])
    assert _run.wants_json(["convert", "a", "--json"])


def test_json_may_come_from_the_environment(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORABRIDGE_INSPECT_JSON", "1")
    assert json.loads(invoke("inspect", "/nowhere").out)["error"]["code"] == "input"


def test_a_closed_reader_ends_the_run_quietly() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "lorabridge", "convert", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=clean_environ(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, b"")


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&-"])
def test_closed_streams_do_not_break_the_run(closed: str, tmp_path: Path) -> None:
    script = f'"{sys.executable}" -m lorabridge env {closed}; echo $? > code'
    subprocess.run(["sh", "-c", script], cwd=tmp_path, env=clean_environ(), check=True, capture_output=True)
    assert (tmp_path / "code").read_text() == "0\n"


SLEEPER = """
import sys, time, click
from lorabridge.commands import _run
from lorabridge.commands._group import cli
@click.command("sleep")
def sleep():
    print("ready", flush=True)
    time.sleep(60)
cli.commands["sleep"] = sleep
sys.exit(_run.run(["sleep"]))
"""


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_end_a_run_with_their_code_and_no_traceback(number: int, code: int, word: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environ(),
        preexec_fn=partial(signal.signal, number, signal.SIG_DFL),  # shells start background jobs deaf to SIGINT
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.2)
        os.kill(process.pid, number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.decode() == f"error: {word}\n"
