"""What a command was told of the directories that ranks wrote, where it opens several inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Told:
    """Strategy files, and which of several checkpoints is meant, by the input's path as it was given."""

    strategies: Mapping[Path, tuple[Path, ...]] = field(default_factory=dict)
    steps: Mapping[Path, str] = field(default_factory=dict)


_TOLD: ContextVar[Told] = ContextVar("told", default=Told())  # noqa: B039  (it is frozen)


@contextmanager
def using(told: Told) -> Iterator[None]:
    """Open inputs inside as ``told`` says, where nothing else is said of them."""
    token = _TOLD.set(told)
    try:
        yield
    finally:
        _TOLD.reset(token)


def strategies_of(path: Path) -> tuple[Path, ...]:
    """Return the strategy files that are told of an input."""
    return _TOLD.get().strategies.get(path, ())


def step_of(path: Path) -> str | None:
    """Return the step that is told of an input."""
    return _TOLD.get().steps.get(path)
