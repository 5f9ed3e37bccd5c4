"""Prove that two files mean the same: from the files alone, layer by layer, or as whole models."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from .sides import Side
from .verify_case import Case, Progress, decide
from .verify_inputs import VerifyOptions, described, opened
from .verify_report import DepthResult, VerifyReport
from .verify_tensors import verify_tensors


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

        def side_of(role: str, path: Path, base: Side | None = None) -> Side:
            side = opened(role, path, options, base)
            stack.callback(side.source.close)
            return side

        base = side_of("BASE", options.base) if options.base is not None else None
        first, second = side_of("SRC", Path(source), base), side_of("DST", Path(target), base)
        case = decide(first, second, base, options)
        chosen = _chosen(case, options)
        depths = tuple(_run(name, depth, case, options, progress) for name, depth in chosen.items())
        return VerifyReport(
            relation=case.relation,
            files=tuple(described(side) for side in (first, second, base) if side is not None),
            depths=depths,
            compared=case.compared(),
            warnings=case.warnings,
            command=command or shlex.join(["lorabridge", "verify", str(source), str(target)]),
            seconds=time.perf_counter() - started,
        )


@dataclass(frozen=True, slots=True)
class Depth:
    """One depth: what runs it, why it means nothing for two files, and what is missing to run it.

    The last two are empty where there is nothing to say.
    """

    run: Callable[[Case, VerifyOptions, Progress | None], DepthResult]
    inapplicable: Callable[[Case], str]
    refusal: Callable[[Case], str]


def _nothing(case: Case) -> str:
    return ""


def _layers() -> Depth:
    from .verify_layers import inapplicable, refusal, verify_layers

    return Depth(verify_layers, inapplicable, refusal)


def _model() -> Depth:
    from .verify_model import refusal, verify_model

    return Depth(verify_model, _nothing, refusal)


DEPTHS: dict[str, Callable[[], Depth]] = {
    "tensors": lambda: Depth(verify_tensors, _nothing, _nothing),
    "layers": _layers,
    "model": _model,
}
"""The depths, the cheapest first; each is imported when it is needed."""


def _chosen(case: Case, options: VerifyOptions) -> dict[str, Depth]:
    """Return the depths; UsageError where one asked for by name cannot run."""
    unknown = [name for name in options.depths if name not in DEPTHS]
    if unknown:
        raise UsageError(f"no depth is called {unknown[0]!r}", hint=f"depths: {', '.join(DEPTHS)}")
    chosen: dict[str, Depth] = {}
    for name, make in DEPTHS.items():
        depth = make()
        if name in options.depths and (why := depth.inapplicable(case) or depth.refusal(case)):
            raise UsageError(
                f"depth {name!r} cannot run", where=why, hint="leave out --depth to run the depths that are possible"
            )
        chosen[name] = depth
    return chosen


def _run(name: str, depth: Depth, case: Case, options: VerifyOptions, progress: Progress | None) -> DepthResult:
    by_itself = not options.depths and name != "model"
    if not (by_itself or name in options.depths or (options.model and name == "model")):
        return DepthResult(name, "left out", "not asked for")
    if why := depth.inapplicable(case):
        return DepthResult(name, "left out", why)
    if why := depth.refusal(case):
        return DepthResult(name, "refused", why)
    return depth.run(case, options, progress)
