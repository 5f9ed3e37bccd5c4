"""Who does a plan's tasks: threads of this process, or the machines of a Ray cluster."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ..errors import UsageError
from ..files import placeholders
from ..files.syscalls import refusals, sync
from ..formats import keys
from ..formats.ranges import Piece, ranged
from ..tensors import Extent, Sink, Source
from . import execute
from .accounts import Arithmetic
from .execute import Outcome
from .plan import Plan
from .shares import Opener, shares, stamps_of, terms_of
from .tasks import cut, refuse_packed

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Engine:
    """``address``: of a running Ray cluster; without it Ray's own rules decide, and at last it starts one here."""

    name: Literal["process", "ray"] = "process"
    address: str | None = None

    def check(self) -> None:
        """Raise UsageError where this engine cannot run."""
        if self.name == "process" and self.address is not None:
            raise UsageError("an address is given for the engine of this process", hint="add --engine ray")
        if self.name == "ray" and find_spec("ray") is None:
            raise UsageError("ray not installed", hint="pip install 'lorabridge[ray]' on every machine of the cluster")


@dataclass(frozen=True, slots=True)
class Work:
    """Where the parts of a run come from that is not done by this process alone.

    ``opener``: opens the same source elsewhere. ``folder``: where the output is staged. ``format``: the container, for
    messages.
    """

    opener: Opener
    folder: Path
    format: str


def run(
    plan: Plan,
    source: Source,
    sink: Sink,
    *,
    engine: Engine,
    work: Work,
    arithmetic: Arithmetic,
    metadata: Mapping[str, str],
    workers: int,
    progress: Progress | None,
    digests: bool = False,
) -> Outcome:
    """Write every output of a plan, then finish the sink; the bytes do not depend on the engine.

    ``workers``: 0 for as many as there are. ``arithmetic`` holds at the end what all kernels noted. Raises what
    ``execute.run`` raises; for a cluster also UsageError where it cannot be joined, or for a container or a source that
    several machines cannot write or read, and what ``survey.judge`` raises.
    """
    if engine.name == "process":
        return execute.run(
            plan, source, sink, kernels=arithmetic.kernels, metadata=metadata,
            workers=workers or execute.default_workers(), progress=progress, digests=digests,
        )  # fmt: skip
    from . import engine_ray

    started = time.perf_counter()
    refuse_packed(plan)
    extents = {name: source.extents(name) for step in plan.steps for name in step.reads}
    _refuse_sealed(source, extents)
    placing = ranged(sink, work.format)
    terms, stamps = terms_of(work.opener, source), stamps_of(source)
    before = execute.identities(source, extents)
    _refuse_stores([*before, work.folder])
    found = {spec.name: hashlib.sha256().hexdigest() for spec in plan.specs} if digests else {}
    pieces: dict[str, list[Piece]] = {}
    copied = computed = 0
    with engine_ray.cluster(engine.address) as machines:
        engine_ray.ask(machines, work.folder, stamps)
        sink.begin(plan.specs, metadata)
        places = {spec.name: placing.ranges(spec.name) for spec in plan.specs if spec.nbytes}
        _flush({extent.path for held in places.values() for extent in held})
        slots = workers or sum(machine.cpus for machine in machines)
        parts = shares(
            terms, cut(plan, extents, whole=digests), places, slots,
            stamps=stamps, arithmetic=arithmetic, digests=digests, checked=placing.checked,
        )  # fmt: skip
        for done in engine_ray.results(parts, workers or 2 * slots):
            arithmetic.absorb(done.arithmetic)
            found.update(done.outcome.digests)
            for name, parts_of in done.pieces.items():
                pieces.setdefault(name, []).extend(parts_of)
            copied, computed = copied + done.outcome.bytes_copied, computed + done.outcome.bytes_computed
            if progress is not None:
                progress(copied + computed, plan.nbytes)
    execute.check_unchanged(before)
    for name in places:
        placing.settle(name, pieces.get(name, ()))
    sink.finish()
    if progress is not None:
        progress(plan.nbytes, plan.nbytes)
    return Outcome(found, time.perf_counter() - started, copied, computed)


def _refuse_sealed(source: Source, extents: Mapping[str, tuple[Extent, ...]]) -> None:
    """Refuse what may have to be read with a key: it is not sent over a network."""
    if getattr(source, "encryption", "") or (keys.current() is not None and not all(extents.values())):
        raise UsageError(
            "the key of an encrypted checkpoint is not given to other machines", where=str(source.path),
            hint="use --engine process, or leave the key out where nothing is encrypted",
        )  # fmt: skip


def _refuse_stores(paths: Iterable[Path]) -> None:
    """Refuse what this process has placeholders for: no other machine has them."""
    remote = [str(path) for path in paths if placeholders.destination(path) is not None]
    if remote:
        raise UsageError(
            "what lies in a store is read and written by one process", where=remote,
            hint="use --engine process, or a file system that every machine of the cluster mounts",
        )  # fmt: skip


def _flush(files: Iterable[Path]) -> None:
    """Put headers on disk and forget their pages, so that this machine never writes back what others have changed."""
    for path in files:
        with refusals(path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                sync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
