"""Parts of a run for workers on other machines: tasks of the driver's plan, done on files that both sides see.

A worker gets no tensors, only tasks and where their outputs lie; it opens the source itself, and only where a task
reads what cannot be copied from file to file. A share can be done twice, by a worker that was thought dead and by its
successor: both write the same bytes to the same places.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from .. import __version__
from ..distributed.assembled import Assembled
from ..distributed.told import step_of, strategies_of
from ..errors import InputError, LorabridgeError, UsageError
from ..formats.ranges import Piece, PlacedSink
from ..joined import Joined
from ..tensors import Extent, Source
from . import execute
from .accounts import Arithmetic
from .execute import Outcome
from .plan import canonical
from .repository import open_input
from .tasks import Task

SMALLEST, LARGEST = 4 << 20, 256 << 20
"""Bytes of a share: enough to be worth a call, and little enough that a lost worker's share is soon made up for."""
PER_SLOT = 8
"""Shares for each worker, so that slow machines do fewer."""

Stamps = Mapping[str, tuple[int, int | str] | None]
"""Size and mtime_ns of files by absolute path; None for one that is not there."""


class Opener(Protocol):
    """How a source is opened, the same in every process. Hashable, of plain values."""

    def open(self) -> Source:
        """Open the source; reads headers only."""
        ...


@dataclass(frozen=True, slots=True)
class InputOpener:
    """What ``repository.open_input`` opens. Absolute paths."""

    path: Path
    strategies: tuple[Path, ...] = ()
    step: str | None = None

    @classmethod
    def of(cls, path: Path, strategies: Sequence[Path] = (), step: str | None = None) -> InputOpener:
        """Make the paths such as other processes can open; what ``distributed.told`` has of the path is told them."""
        found = strategies or strategies_of(path)
        return cls(path.absolute(), tuple(one.absolute() for one in found), step_of(path) if step is None else step)

    def open(self) -> Source:
        """Open the source."""
        return open_input(self.path, strategies=self.strategies, step=self.step).source


@dataclass(frozen=True, slots=True)
class JoinedOpener:
    """Several sources as one, see :class:`lorabridge.joined.Joined`."""

    parts: tuple[tuple[str, InputOpener], ...]

    def open(self) -> Source:
        """Open every source."""
        return Joined({prefix: opener.open() for prefix, opener in self.parts})


@dataclass(frozen=True, slots=True)
class Terms:
    """What driver and workers must agree on. ``inputs``: a digest of every input file; ``source``: of its tensors."""

    opener: Opener
    version: str
    inputs: str
    source: str


@dataclass(frozen=True, slots=True)
class Share:
    """Neighbouring tasks, ``nbytes`` in all, and where the outputs they write lie in the staged files.

    ``stamps``: of the files that the tasks copy from. ``digests``: the outputs' digests are wanted; ``checked``: so are
    the checksums of the pieces that are written.
    """

    terms: Terms
    tasks: tuple[Task, ...]
    nbytes: int
    places: Mapping[str, tuple[Extent, ...]]
    stamps: Stamps
    arithmetic: Arithmetic
    digests: bool
    checked: bool


@dataclass(frozen=True, slots=True)
class Done:
    """A share that is on disk, what its kernels noted, and with ``checked`` which pieces of which tensor it wrote."""

    outcome: Outcome
    arithmetic: Arithmetic
    pieces: Mapping[str, Sequence[Piece]]


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


def terms_of(opener: Opener, source: Source) -> Terms:
    """Return what must be agreed on about a source."""
    return Terms(opener, __version__, _digest(stamps_of(source)), _fingerprint(source))


def stamps_of(source: Source) -> Stamps:
    """Return the stamps of every file that a source reads tensors from."""
    found = execute.identities(source, {name: source.extents(name) for name in source.specs})
    return {path: stamp(path) for path in sorted(map(os.path.abspath, found))}


def stamp(path: str) -> tuple[int, int] | None:
    """Return size and mtime_ns of a file, None where it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def shares(
    terms: Terms, tasks: Sequence[Task], places: Mapping[str, tuple[Extent, ...]], slots: int, *,
    stamps: Stamps, arithmetic: Arithmetic, digests: bool = False, checked: bool = False,
) -> Iterator[Share]:  # fmt: skip
    """Cut tasks into runs of neighbours, which mostly write neighbouring bytes of one file."""
    sizes = [sum(piece.nbytes for piece in task.pieces) for task in tasks]
    target = min(max(sum(sizes) // (PER_SLOT * max(1, slots)), SMALLEST), LARGEST)
    start = held = 0
    for stop, size in enumerate(sizes, 1):
        held += size
        if held >= target or stop == len(sizes):
            mine = tuple(_anywhere(task) for task in tasks[start:stop])
            outputs = dict.fromkeys(piece.output for task in mine for piece in task.pieces)
            files = {str(extent.path) for task in mine for piece in task.pieces for extent in piece.extents}
            yield Share(
                terms, mine, held, {name: _absolute(places[name]) for name in outputs},
                {file: stamps[file] for file in files}, arithmetic.elsewhere(), digests, checked,
            )  # fmt: skip
            start, held = stop, 0


def _anywhere(task: Task) -> Task:
    """Return a task that can be done in any directory."""
    return replace(task, pieces=tuple(replace(piece, extents=_absolute(piece.extents)) for piece in task.pieces))


def _absolute(extents: Sequence[Extent]) -> tuple[Extent, ...]:
    return tuple(replace(extent, path=Path(os.path.abspath(extent.path))) for extent in extents)


def do(share: Share) -> Done | Refused:
    """Do a share in this process; what it wrote is on disk then."""
    try:
        _check(share)
        sink = PlacedSink(share.places, checked=share.checked)
        try:
            outcome = execute.perform(
                share.tasks, _OPENED.reader(share.terms), sink, kernels=share.arithmetic.kernels, digests=share.digests
            )
            sink.finish()
        finally:
            sink.close()
    except LorabridgeError as error:
        return Refused(error.code, error.problem, error.where, error.hint)
    return Done(outcome, share.arithmetic, sink.pieces)


def _check(share: Share) -> None:
    """Refuse to work with another version than the driver's, or on other files than it sees."""
    if share.terms.version != __version__:
        raise UsageError(
            f"machine {platform.node()} has lorabridge {__version__}, the driver has {share.terms.version}",
            hint="install the same version on every machine of the cluster",
        )
    other = [path for path, held in share.stamps.items() if stamp(path) != held]
    if other:
        raise _another(other)


def _another(where: Sequence[str]) -> InputError:
    return InputError(
        f"machine {platform.node()} sees another input than the driver",
        where=where,
        hint="read from a file system that every machine of the cluster mounts under the same path, and do not change "
        "input files during a run",
    )


class _Opened:
    """The source that this worker opened last: the shares of one run come one after another."""

    def __init__(self) -> None:
        self._held: tuple[Terms, Source] | None = None

    def reader(self, terms: Terms) -> execute.Read:
        """Return what reads from a source; it is opened when that is called first."""
        return lambda name, rows: self._get(terms).read(name, rows)

    def _get(self, terms: Terms) -> Source:
        if self._held is None or self._held[0] != terms:
            if self._held is not None:
                self._held[1].close()
                self._held = None
            self._held = terms, _agreed(terms)
        return self._held[1]


_OPENED = _Opened()


def _agreed(terms: Terms) -> Source:
    """Open what a run reads and make sure that it is what the driver sees."""
    source = terms.opener.open()
    try:
        if terms_of(terms.opener, source) != terms:
            raise _another([str(source.path)])
    except BaseException:
        source.close()
        raise
    return source


def _digest(stamps: Stamps) -> str:
    return hashlib.sha256(repr(sorted(stamps.items())).encode(errors="surrogateescape")).hexdigest()


def _fingerprint(source: Source) -> str:
    """Return a digest of a source's tensors, and of how they are put together."""
    digest = hashlib.sha256()
    for name, spec in source.specs.items():
        digest.update(f"{name!r} {spec.dtype} {spec.shape}\n".encode())
    for part in source.sources if isinstance(source, Joined) else (source,):
        if isinstance(part, Assembled):
            for name, placed in part.arrangement.placed.items():
                digest.update(f"{name!r} {canonical(placed.expr)}\n".encode())
    return digest.hexdigest()
