"""Errors of lorabridge: every message has a problem, a place and a cure, and every class has an exit code."""

from __future__ import annotations

from collections.abc import Callable, Iterable

SHOWN = 10
"""How many of the collected places a message lists before it counts the rest."""


_spoken: list[Callable[[str], str]] = []


def speak_with(rewrite: Callable[[str], str]) -> None:
    """Let every message from now on pass through ``rewrite``: files that stand for others are called by their names."""
    if rewrite not in _spoken:
        _spoken.append(rewrite)


def _said(text: str) -> str:
    for rewrite in _spoken:
        text = rewrite(text)
    return text


def counted(number: int, noun: str) -> str:
    """Spell a number with its noun: ``1 tensor``, ``2 tensors``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """Return the first line of what another library's error says, or "" where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "")


class LorabridgeError(Exception):
    """State what is wrong, where it is and what to do about it.

    ``problem`` is one lower-case clause without a full stop; ``where`` lists files, tensors or table lines;
    ``hint`` is one imperative clause. The class attribute ``exit_code`` is what the command line returns.
    """

    exit_code = 70
    code = "internal"

    def __init__(self, problem: str, *, where: str | Iterable[str] = (), hint: str = "") -> None:
        self.problem = _said(problem)
        self.where: tuple[str, ...] = tuple(map(_said, (where,) if isinstance(where, str) else where))
        self.hint = _said(hint)
        super().__init__(self.text())

    def text(self) -> str:
        """Return the message as lines: the problem, at most ten places and a count, the hint."""
        lines = [self.problem]
        lines += [f"  {place}" for place in self.where[:SHOWN] if place]
        if len(self.where) > SHOWN:
            lines.append(f"  and {len(self.where) - SHOWN} more (--json lists all)")
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)

    def as_json(self) -> dict[str, object]:
        """Return the error object of the JSON output."""
        return {"code": self.code, "problem": self.problem, "where": list(self.where), "hint": self.hint}


class DifferentError(LorabridgeError):
    """A check ran to its end and found a difference."""

    exit_code = 1
    code = "different"


class UsageError(LorabridgeError):
    """Options contradict each other, or one that is needed is missing."""

    exit_code = 2
    code = "usage"


class InputError(LorabridgeError):
    """An input file is malformed, unsafe, truncated or of another kind than needed."""

    exit_code = 3
    code = "input"


class MappingError(LorabridgeError):
    """A tensor is unmapped, missing or not expressible in the target, or no table fits."""

    exit_code = 4
    code = "mapping"


class OutputError(LorabridgeError):
    """The output exists, is busy or lies inside the input."""

    exit_code = 5
    code = "output"


class StorageError(LorabridgeError):
    """The operating system refused: disk full, permission, input or output error."""

    exit_code = 6
    code = "storage"
