"""Depth *tensors*: what relation holds between the files themselves, without any framework."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from ..axes import Expr
from ..dialects.adapter import Adapter
from ..families.rules import SideName
from .storage_order import Named, oriented
from .verify_case import Case, Progress
from .verify_conversion import (
    Replanned,
    plain_plan,
    recorded_digests,
    replan,
    run_backward,
    run_forward,
    tied,
)
from .verify_factors import Both, compare, extras
from .verify_inputs import VerifyOptions, described
from .verify_merge import Parts, frozen, merge_rows
from .verify_record import verify_record
from .verify_report import Check, DepthResult, ModuleRow

Step = Callable[[int], None]


def verify_tensors(case: Case, options: VerifyOptions, progress: Progress | None = None) -> DepthResult:
    """Compare the files; MappingError where a table or a dialect cannot say what corresponds to what."""
    started = time.perf_counter()
    step = meter("tensors", _total(case), progress)
    checks: tuple[Check, ...]
    rows: tuple[ModuleRow, ...] = ()
    if case.relation == "conversion":
        checks, rows, proved = _conversion(case, options, step)
    elif case.relation == "adapters":
        carried = case.route.carry(case.first.adapter, case.first.names, case.second.names)
        both = Both(carried, case.first.source, case.second.adapter, case.second.source)
        rows, checks = compare(both, step), (extras(both),)
        proved = ("deltas are equal: factors bit for bit, or as the rows say",)
    elif case.relation == "models":
        planned = plain_plan(case.first, case.second, case.route.family, case.route.layout, options)
        checks = (*planned.checks, *_both_ways(planned, case, step))
        proved = ("every bit of each model follows from the other's",)
    elif case.record is not None:
        checks, proved = verify_record(case.first, case.second, case.record, options, step)
    else:
        checks, rows, proved = _merge(case, options, step)
    result = DepthResult("tensors", "run", "", proved, checks, rows, time.perf_counter() - started)
    return result if result.ok else replace(result, proved=())


def meter(depth: str, total: int, progress: Progress | None) -> Step:
    """Return a function that adds up bytes and reports them."""
    done = 0

    def step(nbytes: int) -> None:
        nonlocal done
        done = min(done + nbytes, total)
        if progress is not None:
            progress(depth, done, total)

    return step


def _total(case: Case) -> int:
    sizes = [described(one).nbytes for one in (case.first, case.second)]
    return {"conversion": sum(sizes) + 2 * sizes[1], "models": sum(sizes), "adapters": sum(sizes)}.get(
        case.relation, sizes[1]
    ) or 1  # fmt: skip


def _conversion(
    case: Case, options: VerifyOptions, step: Step
) -> tuple[tuple[Check, ...], tuple[ModuleRow, ...], tuple[str, ...]]:
    assert case.kept is not None
    planned = replan(case.first, case.kept, options)
    if isinstance(planned, Check):
        return (planned,), (), ()
    checks = [*planned.checks, *_both_ways(planned, case, step)]
    digests = recorded_digests(case.second.source, case.kept, step)
    checks += [digests] if digests is not None else []
    rows: tuple[ModuleRow, ...] = ()
    if planned.made.adapter.modules:
        rows = compare(Both(planned.made.adapter, case.first.source, case.second.adapter, case.second.source), step)
    lost = planned.plan.inverse().lost
    back = f"every bit of {case.first.role} that was carried follows from {case.second.role}"
    if lost:
        back = f"{len(lost)} tensors were rounded or compressed on purpose and do not follow from {case.second.role}"
    return tuple(checks), rows, (f"every bit of {case.second.role} follows from {case.first.role}", back)


def _both_ways(planned: Replanned, case: Case, step: Step) -> list[Check]:
    names, forward = run_forward(planned.plan, case.first.source, case.second.source, step)
    kept = case.kept.residues if case.kept is not None else {}
    back = run_backward(planned.plan, case.first.source, case.second.source, kept, step)
    ties = tied(planned, case.first.source)
    return [names, forward, back, *([ties] if ties is not None else [])]


def _merge(
    case: Case, options: VerifyOptions, step: Step
) -> tuple[tuple[Check, ...], tuple[ModuleRow, ...], tuple[str, ...]]:
    assert case.base is not None
    adapter = case.route.carry(_weighted(case.first.adapter, case.weight), case.first.names, case.second.names)
    base = case.route.carry(case.base.adapter, case.base.names, case.second.names)
    merged = _parameters(case.second.adapter)
    adapter = oriented(adapter, merged, _named(case, options))
    parts = Parts(
        adapter, case.first.source, _parameters(base), case.base.source, merged, case.second.source
    )  # fmt: skip
    rows = merge_rows(parts, step)
    check = frozen(parts, step)
    proved = ("each merged weight is base + scaling * B A to within the roundings of one merge",)
    if all(row.note == "rounded once" for row in rows):
        proved = ("each element of each merged weight is base + scaling * B A, rounded once to nearest",)
    return (check,), rows, proved


def _named(case: Case, options: VerifyOptions) -> Named:
    """Say whose names the merged checkpoint has: as told, else as its manifest says."""
    second = case.second
    family, layout = (None, {}) if second.kept is None else second.kept.named
    config = second.given.model_config or (case.base.given.model_config if case.base is not None else None) or {}
    layout = {**(layout if options.family in (None, family) else {}), **options.layout}
    side: SideName = "hf" if second.names == "hf" else "ms"
    return Named(side, options.family or family, layout, options.mappings, config.get("model_type"))


def _weighted(adapter: Adapter, weight: float) -> Adapter:
    """Return an adapter whose deltas count so many times."""
    if weight == 1:
        return adapter
    scaled = (replace(m, scaling=replace(m.scaling, alpha=weight * m.scaling.alpha)) for m in adapter.modules)
    return replace(adapter, modules=tuple(scaled))


def _parameters(adapter: Adapter) -> dict[str, Expr]:
    return {extra.name: extra.value for extra in adapter.extras}
