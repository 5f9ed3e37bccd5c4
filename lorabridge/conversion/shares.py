"""Parts of a run for workers on other machines: each reopens the source, makes the same plan and does some tasks.

A worker gets no tensors and no tasks, only what they are made from again, so that little travels. A share can be done
twice, by a worker that was thought dead and by its successor: both write the same bytes to the same places.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from .. import __version__
from ..errors import InputError, LorabridgeError, UsageError
from ..formats.ranges import PlacedSink
from ..tensors import Extent, Source
from . import execute
from .plan import Plan
from .tasks import Task, cut

SMALLEST, LARGEST = 4 << 20, 256 << 20
"""Bytes of a share: enough to be worth a call, and little enough that a lost worker's share is soon made up for."""
PER_SLOT = 8
"""Shares for each worker, so that slow machines do fewer."""


class Recipe(Protocol):
    """How a source is opened and its plan made, the same in every process. Hashable, of plain values."""

    def open(self) -> tuple[Plan, Source]:
        """Open the source and plan; reads headers only."""
        ...


@dataclass(frozen=True, slots=True)
class Terms:
    """What driver and workers must agree on: ``inputs`` covers every input file's path, size and mtime."""

    recipe: Recipe
    version: str
    digest: str
    inputs: str
    tasks: int


@dataclass(frozen=True, slots=True)
class Share:
    """Tasks [start, stop) of a plan, ``nbytes`` in all, and where the outputs they write lie in the staged files."""

    terms: Terms
    start: int
    stop: int
    nbytes: int
    places: Mapping[str, tuple[Extent, ...]]


@dataclass(frozen=True, slots=True)
class Refused:
    """A :class:`lorabridge.errors.LorabridgeError` of a worker, as data."""

    code: str
    problem: str
    where: tuple[str, ...]
    hint: str

    def error(self) -> LorabridgeError:
        """Return the error itself."""
        kind = next((kind for kind in LorabridgeError.__subclasses__() if kind.code == self.code), LorabridgeError)
        return kind(self.problem, where=self.where, hint=self.hint)


def terms_of(recipe: Recipe, plan: Plan, source: Source) -> tuple[Terms, list[Task]]:
    """Return what must be agreed on about a run, and its tasks."""
    extents = {name: source.extents(name) for step in plan.steps for name in step.reads}
    tasks = cut(plan, extents, whole=False)
    digest = hashlib.sha256()
    for path, identity in sorted(execute.identities(source, extents).items()):
        digest.update(f"{os.path.abspath(path)} {identity and identity[2:]}\n".encode(errors="surrogateescape"))
    return Terms(recipe, __version__, plan.digest, digest.hexdigest(), len(tasks)), tasks


def shares(
    terms: Terms, tasks: Sequence[Task], places: Mapping[str, tuple[Extent, ...]], slots: int
) -> Iterator[Share]:
    """Cut tasks into runs of neighbours, which mostly write neighbouring bytes of one file."""
    sizes = [sum(piece.nbytes for piece in task.pieces) for task in tasks]
    target = min(max(sum(sizes) // (PER_SLOT * max(1, slots)), SMALLEST), LARGEST)
    start = held = 0
    for stop, size in enumerate(sizes, 1):
        held += size
        if held >= target or stop == len(sizes):
            outputs = {piece.output for task in tasks[start:stop] for piece in task.pieces}
            yield Share(terms, start, stop, held, {name: places[name] for name in outputs})
            start, held = stop, 0


def do(share: Share) -> int | Refused:
    """Do a share in this process and return how many bytes it wrote; they are on disk then."""
    try:
        source, tasks = _OPENED.get(share.terms)
        sink = PlacedSink(share.places)
        try:
            done = execute.perform(tasks[share.start : share.stop], source, sink, kernels=lambda name: {})
            sink.finish()
        finally:
            sink.close()
    except LorabridgeError as error:
        return Refused(error.code, error.problem, error.where, error.hint)
    return done


class _Opened:
    """The source and tasks that this worker opened last: the shares of one run come one after another."""

    def __init__(self) -> None:
        self._held: tuple[Terms, Source, list[Task]] | None = None

    def get(self, terms: Terms) -> tuple[Source, list[Task]]:
        if self._held is None or self._held[0] != terms:
            if self._held is not None:
                self._held[1].close()
                self._held = None
            self._held = (terms, *_agreed(terms))
        return self._held[1:]


_OPENED = _Opened()


def _agreed(terms: Terms) -> tuple[Source, list[Task]]:
    """Open what a run reads and make sure that it is what the driver sees."""
    here = f"machine {platform.node()}"
    if terms.version != __version__:
        raise UsageError(
            f"{here} has lorabridge {__version__}, the driver has {terms.version}",
            hint="install the same version on every machine of the cluster",
        )
    plan, source = terms.recipe.open()
    try:
        mine, tasks = terms_of(terms.recipe, plan, source)
        if mine != terms:
            raise InputError(
                f"{here} sees another input than the driver",
                where=str(Path(source.path)),
                hint="read from a file system that every machine of the cluster mounts under the same path",
            )
    except BaseException:
        source.close()
        raise
    return source, tasks
