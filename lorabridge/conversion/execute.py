"""Run a plan: stream every output from a source to a sink, with the same bytes on any number of workers."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..axes import Kernel, computes
from ..distributed.assembled import Assembled
from ..errors import InputError
from ..files import placeholders
from ..formats.untrusted import open_regular, pread_into
from ..joined import Joined
from ..tensors import Extent, Sink, Source
from .plan import Plan
from .tasks import Piece, Task, alone, cut, ordered, refuse_packed, rows

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ..tensors import Bits

MEMORY = 192 << 20
"""Bytes of tensors that the running tasks may hold together; a larger task runs alone."""
CHUNK = 64 << 20
"""Most bytes of one copy, so that progress moves and an interrupt is heard."""
READ = 8 << 20
"""Bytes per read where copied bytes are hashed on their way."""
ROWS = "\0rows"
"""What the rows of a source tensor are called that are read apart from the rest."""
_INTERVAL = 0.05

Kernels = Callable[[str], Mapping[str, Kernel]]
Read = Callable[[str, "tuple[int, int] | None"], "Bits"]
"""See :meth:`lorabridge.tensors.Source.read`."""
Progress = Callable[[int, int], None]
Identity = tuple[int | str, int | str, int, int | str] | None


@dataclass(frozen=True)
class Outcome:
    """What a run did: ``digests`` maps outputs to the sha256 of their bytes (empty unless asked for)."""

    digests: Mapping[str, str]
    seconds: float
    bytes_copied: int
    bytes_computed: int


def run(
    plan: Plan,
    source: Source,
    sink: Sink,
    *,
    kernels: Kernels,
    metadata: Mapping[str, str],
    workers: int,
    progress: Progress | None = None,
    digests: bool = False,
    memory: int = MEMORY,
) -> Outcome:
    """Write every output of a plan, then finish the sink.

    ``kernels(output)`` returns the arithmetic kernels for that output. ``progress(done, total)`` counts output bytes;
    it is called from any thread, one at a time, at most twenty times a second and at the end. ``memory`` bounds
    the bytes of tensors in flight; a larger task runs alone. Raises the first error of any worker after all
    have stopped, InputError when a source file changes meanwhile, MappingError for arithmetic on types below a byte.
    """
    started = time.perf_counter()
    refuse_packed(plan)
    extents = {name: source.extents(name) for step in plan.steps for name in step.reads}
    before = identities(source, extents)
    sink.begin(plan.specs, metadata)
    meter = _Meter(plan.nbytes, progress)
    hashes = {spec.name: hashlib.sha256() for spec in plan.specs} if digests else {}
    tasks = deque(ordered(cut(plan, extents, whole=digests), workers))
    _Work(source.read, sink, kernels, hashes, meter, _Gate(memory), tasks).all(workers)
    check_unchanged(before)
    sink.finish()
    meter.end()
    seconds = time.perf_counter() - started
    return Outcome({name: h.hexdigest() for name, h in hashes.items()}, seconds, meter.copied, meter.computed)


def perform(tasks: Sequence[Task], read: Read, sink: Sink, *, kernels: Kernels, digests: bool = False) -> Outcome:
    """Do some tasks of a plan in this thread, one after the other.

    The sink is neither begun nor finished. What one task holds is all the memory that is taken. With ``digests`` the
    tasks must hold their outputs whole (``tasks.cut(whole=True)``).
    """
    started = time.perf_counter()
    meter = _Meter(0, None)
    outputs = {piece.output for task in tasks for piece in task.pieces} if digests else ()
    hashes = {name: hashlib.sha256() for name in outputs}
    _Work(read, sink, kernels, hashes, meter, _Gate(MEMORY), deque(tasks)).all(1)
    found = {name: h.hexdigest() for name, h in hashes.items()}
    return Outcome(found, time.perf_counter() - started, meter.copied, meter.computed)


def check_unchanged(before: Mapping[Path, Identity]) -> None:
    """Refuse files that are no longer what :func:`identities` saw: an InputError lists them."""
    changed = sorted(str(path) for path, was in before.items() if _identity(path) != was)
    if changed:
        raise InputError("input files changed during the run", where=changed, hint="run again when they are complete")


def default_workers() -> int:
    """Return how many threads to use where nothing says: one per CPU of this process, at most eight.

    Where a store takes part there are eight, since a request waits longer than it works.
    """
    return placeholders.WORKERS if placeholders.any_placed() else min(8, len(os.sched_getaffinity(0)))


def _identity(path: Path) -> Identity:
    remote = placeholders.found(path)
    if remote is not None:
        now = remote.store.object(remote.key)
        return now.identity if now is not None else None
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def identities(source: Source, extents: Mapping[str, tuple[Extent, ...]]) -> dict[Path, Identity]:
    """Return what tells each input file from another or changed one: device, inode, size, mtime_ns; None if absent.

    Of an object in a store: protocol, key, size and version, as it was listed when the source was opened.
    """
    paths = {extent.path for ranges in extents.values() for extent in ranges}
    for part in source.sources if isinstance(source, Joined) else (source,):
        paths |= part.pieces.files if isinstance(part, Assembled) else {part.path} if part.path.is_file() else set()
    listed = {path: placeholders.found(path) for path in paths}
    return {path: remote.identity if remote is not None else _identity(path) for path, remote in listed.items()}


class _Gate:
    """Let tasks in while what they hold together fits; one that never fits goes in alone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def held(self, nbytes: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not nbytes or not self._used or self._used + nbytes <= self._limit)
            self._used += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()


class _Meter:
    """Count bytes and call ``progress``, one call at a time and not too often."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.copied = self.computed = 0
        self._total = total
        self._progress = progress
        self._lock = threading.Lock()
        self._last = time.monotonic()

    def add(self, nbytes: int, *, copied: bool) -> None:
        with self._lock:
            if copied:
                self.copied += nbytes
            else:
                self.computed += nbytes
            now = time.monotonic()
            if self._progress is not None and now - self._last >= _INTERVAL:
                self._last = now
                self._progress(self.copied + self.computed, self._total)

    def end(self) -> None:
        with self._lock:
            if self._progress is not None:
                self._progress(self._total, self._total)


class _Stopped(Exception):
    """Another worker failed or the user interrupted."""


@dataclass
class _Work:
    read: Read
    sink: Sink
    kernels: Kernels
    hashes: Mapping[str, hashlib._Hash]
    meter: _Meter
    gate: _Gate
    tasks: deque[Task]
    errors: list[BaseException] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def all(self, workers: int) -> None:
        if workers <= 1:
            self._each()
        else:
            with ThreadPoolExecutor(workers, "lorabridge") as pool:
                try:
                    for future in [pool.submit(self._each) for _ in range(workers)]:
                        future.result()
                except BaseException as error:
                    self.stop.set()
                    self.errors.append(error)
        if self.errors:
            raise self.errors[0]

    def _each(self) -> None:
        try:
            while not self.stop.is_set():
                try:
                    task = self.tasks.popleft()
                except IndexError:
                    return
                with self.gate.held(task.held):
                    self._task(task)
        except _Stopped:
            return
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()

    def _task(self, task: Task) -> None:
        uses = Counter(name for piece in task.pieces for name in piece.needs)
        cache: dict[str, Bits] = {}

        def fetch(name: str) -> Bits:
            bits = cache.pop(name) if name in cache else self.read(name, None)
            uses[name] -= 1
            if uses[name] > 0:
                cache[name] = bits
            return bits

        for piece in task.pieces:
            if piece.extents:
                self._copy(piece)
            else:
                self._evaluate(piece, fetch)

    def _copy(self, piece: Piece) -> None:
        offset = piece.offset
        chunk = READ if self.hashes else CHUNK
        for extent in piece.extents:
            for start in range(0, extent.length, chunk):
                part = Extent(extent.path, extent.offset + start, min(chunk, extent.length - start))
                if self.hashes:
                    self._write(piece.output, offset, _read(part), copied=True)
                else:
                    self._check()
                    self.sink.copy(piece.output, offset, part)
                    self.meter.add(part.length, copied=True)
                offset += part.length

    def _evaluate(self, piece: Piece, fetch: Callable[[str], Bits]) -> None:
        from .blocks import blocks

        expr, offset = piece.expr, piece.offset
        apart = rows(expr)
        get = fetch
        if apart is not None:
            expr = alone(expr, ROWS)

            def get(name: str) -> Bits:
                return self.read(apart[0], apart[1:]) if name == ROWS else fetch(name)

        kernels = self.kernels(piece.output) if computes(expr) else {}
        for block in blocks(expr, get, kernels):
            self._write(piece.output, offset, block, copied=False)
            offset += block.nbytes

    def _write(self, output: str, offset: int, block: Bits, *, copied: bool) -> None:
        self._check()
        if self.hashes:
            self.hashes[output].update(memoryview(cast("Buffer", block)))
        self.sink.write(output, offset, block)
        self.meter.add(block.nbytes, copied=copied)

    def _check(self) -> None:
        if self.stop.is_set():
            raise _Stopped


def _read(extent: Extent) -> Bits:
    import numpy as np

    block = np.empty(extent.length, np.uint8)
    with open_regular(extent.path) as file:
        done = pread_into(file, memoryview(cast("Buffer", block)), extent.offset)
    if done < extent.length:
        problem = f"the file ends {extent.length - done:,} bytes earlier than its header promises"
        raise InputError(problem, where=str(extent.path), hint="do not change input files during a run")
    return block
