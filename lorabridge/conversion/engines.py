"""Who does a plan's tasks: threads of this process, or the machines of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from ..axes import computes
from ..errors import UsageError
from ..files.syscalls import refusals, sync
from ..formats.ranges import ranged
from ..tensors import Sink, Source
from . import execute
from .plan import Plan
from .shares import Recipe, shares, terms_of
from .tasks import refuse_packed

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


def run(
    plan: Plan,
    source: Source,
    sink: Sink,
    *,
    engine: Engine,
    recipe: Recipe,
    format: str,
    metadata: Mapping[str, str],
    workers: int,
    progress: Progress | None,
) -> None:
    """Write every output of a plan that computes nothing, then finish the sink; the bytes do not depend on the engine.

    ``recipe``: opens the same source and makes the same plan in another process. ``format``: the container, for
    messages. ``workers``: 0 for as many as there are. Raises what ``execute.run`` raises, UsageError for containers
    that several machines cannot write.
    """
    if engine.name == "process":
        execute.run(
            plan, source, sink, kernels=lambda name: {}, metadata=metadata,
            workers=workers or execute.default_workers(), progress=progress,
        )  # fmt: skip
        return
    if any(computes(expr) for expr in plan.outputs().values()):
        raise UsageError("arithmetic is not done on a cluster", hint="use --engine process")
    from . import engine_ray

    refuse_packed(plan)
    extents = {name: source.extents(name) for step in plan.steps for name in step.reads}
    before = execute.identities(source, extents)
    placing = ranged(sink, format)
    sink.begin(plan.specs, metadata)
    places = {spec.name: placing.ranges(spec.name) for spec in plan.specs if spec.nbytes}
    files = {extent.path for held in places.values() for extent in held}
    _flush(files)  # so that no page with a header is dirty here while others write the rest of it
    terms, tasks = terms_of(recipe, plan, source)
    with engine_ray.cluster(engine.address) as slots:
        done = 0
        for nbytes in engine_ray.results(list(shares(terms, tasks, places, workers or slots)), workers or 2 * slots):
            done += nbytes
            if progress is not None:
                progress(done, plan.nbytes)
    execute.check_unchanged(before)
    for name in places:
        placing.settle(name)
    sink.finish()
    if progress is not None:
        progress(plan.nbytes, plan.nbytes)


def _flush(files: Iterable[Path]) -> None:
    for path in files:
        with refusals(path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                sync(fd)
            finally:
                os.close(fd)
