"""Where the command line writes: results on stdout, everything else on stderr, in any encoding and colour."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TextIO

from ..files.placeholders import spoken
from ..reports import plain

if TYPE_CHECKING:
    from collections.abc import Iterable

RED, YELLOW, BOLD = "31;1", "33", "1"
_ASCII = str.maketrans({"→": "->", "←": "<-", "×": "x", "…": "...", "–": "-", "—": "-", "✓": "ok", "‘": "'", "’": "'"})


def prepare() -> None:
    """Make the standard streams safe to write any text to.

    A closed descriptor is filled with /dev/null, so that no output file can be opened as number 1 or 2 and receive
    messages. What an encoding cannot hold is written as an escape instead of raising UnicodeEncodeError.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def colours(stream: TextIO | None, environ: Mapping[str, str] = os.environ) -> bool:
    """Say whether to colour a stream: NO_COLOR beats FORCE_COLOR, which beats what the stream is."""
    if stream is None or environ.get("NO_COLOR"):
        return False
    if environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and environ.get("TERM") != "dumb"


def width() -> int | None:
    """Return the columns that a result should fit in; None when it goes to a file and COLUMNS says nothing."""
    import shutil

    if os.environ.get("COLUMNS", "").isdigit():
        return int(os.environ["COLUMNS"])
    return shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else None


def write(stream: TextIO | None, text: str, *, label: str = "", code: str = "") -> None:
    """Write text and a line end, with control characters escaped and an optional coloured label before it."""
    if stream is None:
        return
    encoding = (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "")
    text = plain.escape(spoken(text), keep="\n")
    if not encoding.startswith("utf"):
        text = text.translate(_ASCII)
    if label and code and colours(stream):
        label = f"\x1b[{code}m{label}\x1b[0m"
    stream.write(f"{label}{text}\n")


class Written(Protocol):
    """What a report says about the writing of one output."""

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""

    @property
    def seconds(self) -> float:
        """How long everything took."""

    @property
    def dry_run(self) -> bool:
        """Nothing was written."""


@dataclass(frozen=True)
class Output:
    """Print one command's result in the form that its options ask for.

    ``command`` names the JSON schema. Under ``json`` stdout holds exactly one document and stderr no messages, since
    the document has them.
    """

    command: str
    json: bool = False
    quiet: bool = False
    verbose: bool = False

    def document(self, content: Mapping[str, object]) -> None:
        """Print the one JSON document of this run."""
        print_document(self.command, content)

    def result(self, text: str) -> None:
        """Print a result."""
        if not self.json:
            write(sys.stdout, text)

    def summary(self, text: str) -> None:
        """Print the one line that says what was done; not under --quiet."""
        if not self.json and not self.quiet:
            write(sys.stdout, text)

    def wrote(self, what: str, done: Written) -> None:
        """Print the line that says what was written, with its size and, where it was, the time."""
        line = f"{plain.escape(what)} ({plain.size(done.nbytes)})"
        self.summary(line if done.dry_run else f"{line} in {done.seconds:.1f} s")

    def left_out(self, rows: Iterable[tuple[str, str]]) -> None:
        """Print which tensors were left out, and why."""
        for name, why in rows:
            self.result(plain.escape(f"left out: {name} ({why})"))

    def notes(self, texts: Iterable[str]) -> None:
        """Print what is good to know; not under --quiet."""
        for text in texts:
            self.hint(text, label="note: ")

    def warn(self, texts: Iterable[str]) -> None:
        """Print warnings, under --quiet too: they say what the user must know."""
        for text in texts:
            if not self.json:
                write(sys.stderr, plain.escape(text), label="warning: ", code=YELLOW)

    def hint(self, text: str, *, label: str = "hint: ") -> None:
        """Print advice; not under --quiet."""
        if not self.json and not self.quiet:
            write(sys.stderr, plain.escape(text), label=label, code=BOLD)


def print_document(command: str, content: Mapping[str, object]) -> None:
    """Print a JSON document with the schema of a command."""
    name = command.replace(" ", "-") or "error"
    text = plain.json_text({"schema": f"lorabridge/{name}/1", **content})
    if sys.stdout is not None:
        sys.stdout.write(spoken(text) + "\n")
