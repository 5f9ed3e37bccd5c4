"""Encodings, colours, widths and progress."""

from __future__ import annotations

import fcntl
import io
import json
import os
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
from console import Invoke, clean_environ
from safetensors.numpy import save_file

from lorabridge.commands import _progress, _terminal
from lorabridge.commands._progress import Progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("tty", "environ", "coloured"),
    [
        (True, {}, True),
        (True, {"TERM": "dumb"}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        (False, {}, False),
        (False, {"FORCE_COLOR": "1"}, True),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_colours_follow_the_environment(tty: bool, environ: dict[str, str], coloured: bool) -> None:
    assert _terminal.colours(Terminal() if tty else io.StringIO(), environ) is coloured
    assert _terminal.colours(None, environ) is False


def test_only_the_label_is_coloured_and_nothing_from_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = Terminal()
    _terminal.write(stream, "a\x1b[5mb", label="error: ", code=_terminal.RED)
    assert stream.getvalue() == "\x1b[31;1merror: \x1b[0ma\\x1b[5mb\n"


def test_a_missing_stream_takes_nothing() -> None:
    _terminal.write(None, "lost", label="x", code="1")


def test_an_ascii_stream_gets_ascii() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace")
    _terminal.write(stream, "peft → ms … é")
    stream.flush()
    assert raw.getvalue() == b"peft -> ms ... \\xe9\n"


@pytest.mark.parametrize(
    "environ",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"LANG": "C", "LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"TERM": "dumb"},
        {"NO_COLOR": "1"},
        {"COLUMNS": "20"},
        {"COLUMNS": "0"},
        {"COLUMNS": "x"},
    ],
    ids=str,
)
def test_any_name_can_be_printed_anywhere(environ: dict[str, str], launch: Invoke, hostile_names: Path) -> None:
    result = launch("inspect", hostile_names, "--tensors", raw=True, **environ)
    assert result.code == 0, result.err
    assert "Traceback" not in result.err
    assert not set(result.out + result.err) & {"\x1b", "\x9b", "\r", "\x00", "\x07"}
    assert r"evil\x1b[2J\u202etxt" in result.out
    failed = launch("inspect", "é\x1b\u202e漢.nowhere", raw=True, **environ)
    assert failed.code == 3, failed.err
    assert "\x1b" not in failed.err


def test_hostile_names_are_inert_in_json(launch: Invoke, hostile_names: Path) -> None:
    result = launch("inspect", hostile_names, "--json")
    assert result.out.isascii()
    names = [row["name"] for row in json.loads(result.out)["tensors"]]
    assert "evil\x1b[2J\u202etxt" in names


def test_no_escape_codes_without_a_terminal(launch: Invoke, peft_dir: Path) -> None:
    for args in (("inspect", peft_dir), ("inspect", "nowhere"), ("--help",), ("env",)):
        result = launch(*args)
        assert "\x1b" not in result.out + result.err


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_half_minute(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    with Progress("converting") as progress:
        for second in range(0, 95, 5):
            clock[0] = 100.0 + second
            progress(second * 10**7, 10**9)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.split("\n") == [
        "converting: 300 MB of 1 GB (30 %), 10 MB/s, 70 s left",
        "converting: 600 MB of 1 GB (60 %), 10 MB/s, 40 s left",
        "converting: 900 MB of 1 GB (90 %), 10 MB/s, 10 s left",
        "",
    ]


def test_a_terminal_gets_a_bar_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with Progress("converting") as progress:
        progress(0, 10**9)
        progress(10**9, 10**9)
        shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "converting:" in shown
    assert "/1.00G" in shown


def test_progress_can_be_off(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("converting", enabled=False) as progress:
        clock[0] += 1000
        progress(1, 2)
    assert capsys.readouterr().err == ""


def on_a_terminal(*args: object, **environ: str) -> str:
    """Return what a run prints when stdout and stderr are a terminal."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "lorabridge", *(str(arg) for arg in args)],
            stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=clean_environ() | {"TERM": "xterm"} | environ,
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        while chunk := read_terminal(ours):
            shown += chunk
        process.wait(timeout=60)
        return shown.decode()
    finally:
        os.close(ours)


def read_terminal(number: int) -> bytes:
    try:
        return os.read(number, 65536)
    except OSError:  # Linux: the last writer has gone
        return b""


def test_a_terminal_gets_colours_and_a_bar(peft_dir: Path, tmp_path: Path) -> None:
    assert "\x1b[31;1merror: \x1b[0mno such file" in on_a_terminal("inspect", "/nowhere")
    assert "\x1b[" not in on_a_terminal("inspect", "/nowhere", NO_COLOR="1")
    assert "\x1b[" not in on_a_terminal("inspect", "/nowhere", TERM="dumb")
    assert "converting:" not in on_a_terminal("convert", peft_dir, tmp_path / "a.ckpt")  # too short to watch
    save_file({f"{i}.weight": np.ones((1000, 1000), np.float32) for i in range(20)}, tmp_path / "m.safetensors")
    cast = ("convert", tmp_path / "m.safetensors", "--family", "identity", "--dtype", "bf16")
    assert "converting:" in on_a_terminal(*cast, tmp_path / "b.ckpt")
    assert "converting:" not in on_a_terminal(*cast, tmp_path / "c.ckpt", "--no-progress")
    assert "converting:" not in on_a_terminal(*cast, tmp_path / "d.ckpt", "--quiet")


def test_on_a_terminal_an_error_document_is_told_once() -> None:
    shown = on_a_terminal("inspect", "/nowhere", "--json").replace("\r\n", "\n")
    assert json.loads(shown)["error"]["code"] == "input"


def test_a_narrow_terminal_gets_a_list(peft_dir: Path) -> None:
    shown = on_a_terminal("inspect", peft_dir, COLUMNS="40")
    assert "layer.0.query\r\n  kind linear, rank 4," in shown
