"""Prove that two files mean the same: from the files alone, layer by layer, or as whole models."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ..errors import UsageError
from .verify_case import Case, Progress, decide
from .verify_inputs import Opened, VerifyOptions, open_side
from .verify_report import DepthResult, VerifyReport
from .verify_tensors import verify_tensors

Runner = Callable[[Case, VerifyOptions, Progress | None], DepthResult]


def verify(
    source: Path | str,
    target: Path | str,
    options: VerifyOptions | None = None,
    *,
    command: str = "",
    progress: Progress | None = None,
) -> VerifyReport:
    """Compare ``source`` with ``target`` at every depth that is asked for, or that is possible where none is.

    What they are to each other is found out: a conversion that a manifest describes, two adapters, two whole models,
    or an adapter and a checkpoint into which it was merged (then ``options.base`` is needed). ``progress`` is called
    with (depth, bytes done, bytes in total). A difference is a verdict, not an error; errors are those of reading
    (InputError, MappingError) and UsageError, for a depth asked for by name that cannot run as well.
    """
    started = time.perf_counter()
    options = options or VerifyOptions()
    with ExitStack() as stack:

        def opened(role: str, path: Path) -> Opened:
            side = open_side(role, path, options)
            stack.callback(side.source.close)
            return side

        first, second = opened("SRC", Path(source)), opened("DST", Path(target))
        base = opened("BASE", options.base) if options.base is not None else None
        case = decide(first, second, base, options)
        depths = tuple(_run(name, case, options, progress) for name in _order(case, options))
        return VerifyReport(
            relation=case.relation,
            files=tuple(side.describe() for side in (first, second, base) if side is not None),
            depths=depths,
            compared=case.compared(),
            warnings=case.warnings,
            command=command or shlex.join(["lorabridge", "verify", str(source), str(target)]),
            seconds=time.perf_counter() - started,
        )


def _layers(case: Case, options: VerifyOptions, progress: Progress | None) -> DepthResult:
    from .verify_layers import verify_layers

    return verify_layers(case, options, progress)


def _layers_refused(case: Case) -> str:
    from .verify_layers import refusal

    return refusal(case)


RUNNERS: dict[str, Runner] = {"tensors": verify_tensors, "layers": _layers}
"""What runs each depth."""

REFUSALS: dict[str, Callable[[Case], str]] = {"tensors": lambda case: "", "layers": _layers_refused}
"""What says why a depth cannot run for two files; empty where it can."""


def _order(case: Case, options: VerifyOptions) -> list[str]:
    """Return the depths to report, the cheapest first; UsageError where one asked for by name cannot run."""
    unknown = [name for name in options.depths if name not in RUNNERS]
    if unknown:
        raise UsageError(f"no depth is called {unknown[0]!r}", hint=f"depths: {', '.join(RUNNERS)}")
    impossible = {name: why for name in options.depths if (why := REFUSALS[name](case))}
    if impossible:
        raise UsageError(
            f"depth {next(iter(impossible))!r} cannot run",
            where=list(impossible.values()),
            hint="leave out --depth to run the depths that are possible",
        )
    return list(RUNNERS)


def _run(name: str, case: Case, options: VerifyOptions, progress: Progress | None) -> DepthResult:
    if options.depths and name not in options.depths:
        return DepthResult(name, "left out")
    why = REFUSALS[name](case)
    return DepthResult(name, "refused", why) if why else RUNNERS[name](case, options, progress)
