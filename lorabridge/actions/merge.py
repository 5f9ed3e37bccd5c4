"""Merge adapters into a base model: one pass, one rounding, a complete model directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..axes import Expr, computes, read, reads
from ..conversion import plan
from ..conversion.forward import Forward
from ..dialects.blockscales import refuse_scaled
from ..distributed.assembled import Assembled
from ..errors import MappingError, UsageError
from ..joined import prefixed
from ..merging.identity import MERGED_KEY, base_of, merged_mark
from ..merging.kernel import Merger, Merging, Seen
from ..merging.planning import Merged
from ..merging.planning import merge as merge_headers
from ..merging.twins import comparing
from ..merging.unmerge_planning import nodes_of
from . import merge_inputs, merge_record
from .base_check import check_bases, check_not_held, marked
from .companions import carried_files
from .merge_inputs import MergeOptions, Opened, paths_of
from .merge_report import MergedRow, MergeReport, overall
from .model_output import ModelOutput, Progress, check_finite, goal_of, place_of, renamed, write

__all__ = ["MergeOptions", "merge", "plan_merge"]


@dataclass(frozen=True, slots=True)
class MergeJob:
    """A merge that is planned and not yet run; ``stay``: files beside the base that stay behind."""

    given: Opened
    merged: Merged
    model: ModelOutput
    stay: tuple[str, ...]


Watch = Callable[[MergeJob], tuple[Seen, Callable[[], None]]]


def merge(
    base: Path | str, adapters: Path | str | Sequence[Path | str], target: Path | str,
    options: MergeOptions | None = None, *, undo: Path | str | None = None, progress: Progress | None = None,
    watch: Watch | None = None,
) -> MergeReport:  # fmt: skip
    """Merge adapters into ``base``, write the model to ``target`` and return what was done.

    ``undo``: a file for what rounding loses, so that ``unmerge`` gives the base's bits back. ``watch`` is called with
    the plan; it returns what is called with every block of every merged weight, before and after (see ``kernel.Seen``),
    and what is called before the model is published. All or nothing: on any error nothing appears at the target.
    Raises InputError (malformed input), MappingError (a module that does not land, results that are not finite, a
    merged base, another base than an adapter records), OutputError, StorageError, UsageError.
    """
    started = time.perf_counter()
    options = options or MergeOptions()
    options.engine.check()
    writer = None
    if undo is not None:
        from .undo import UndoWriter

        watch = writer = UndoWriter(undo, options)
    if watch is not None and options.engine.name != "process":
        raise UsageError(
            "what is made from every merged block, such as an undo file, is made by one process",
            hint="use --engine process",
        )
    with merge_inputs.opened(Path(base), paths_of(adapters), options) as given:
        job = plan_merge(given, target, options)
        seen, before_commit = (None, None) if watch is None or options.dry_run else watch(job)
        merging = Merging(Merger(seen))
        merger = merging.merger
        if not options.dry_run:
            for one in (given.base, *given.adapters):
                if isinstance(one.source, Assembled):
                    one.source.check_replicas()

            def finish() -> None:
                check_finite(merger)
                if before_commit is not None:
                    before_commit()

            write(job.model, options, merging, finish, progress)
        changes = merger.changes
        total = overall(changes)
        warnings = list(job.merged.warnings)
        if total.odd:
            odd = [name for name, change in changes.items() if change.odd]
            warnings.append(f"{total.odd} weights were not finite and are kept as they are, first in {odd[0]}")
        return MergeReport(
            **job.model.described(),
            base=str(given.base.path),
            adapters=tuple(str(one.path) for one in given.adapters),
            merged=job.merged.parameters,
            replaced=job.merged.replaced,
            seconds=time.perf_counter() - started,
            rows=tuple(MergedRow.of(name, change) for name, change in changes.items()),
            vanished=total.vanished / max(1, total.reached),
            error=total.error,
            carried=tuple(sorted(path.name for path in job.model.carried)),
            not_carried=job.stay,
            warnings=tuple(warnings),
            notes=job.model.notes,
            dry_run=options.dry_run,
            undo=None if writer is None else writer.summary,
        )


def plan_merge(given: Opened, target: Path | str, options: MergeOptions) -> MergeJob:
    """Decide everything from headers: where each module lands, the target's names, the steps."""
    parsed = given.origin.parse(given.base.content())
    refuse_scaled(parsed, "take an adapter in")
    base = prefixed(parsed, merge_inputs.BASE, given.base.source.specs)
    merged = merge_headers(
        base, merge_inputs.additions(given, base, options), config=given.base.model_config, exact=options.exact,
        residual_base=options.residual_base, same=comparing(given.joined),
    )  # fmt: skip
    goal = goal_of(given.origin, target, options)
    output, shard_size = place_of(given, goal, target, options)
    named = merge_inputs.named_by(options, given.base, *given.adapters)
    made = renamed(given, merged, goal, named)
    _check_ties(given, made)
    warnings = check_bases(given, base, options)
    held, nodes = merged_mark(given.base.source.metadata, where=str(given.base.path)), nodes_of(merged.model)
    known = {extra.name for extra in base.extras}
    added = [extra.name for extra in merged.model.extras if extra.name not in known]
    mark = marked(given, nodes, {n: base_of(node) for n, node in nodes.items()}, added, options, held=held)
    check_not_held(mark, held, nodes, str(given.base.path))
    planned = plan.build(given.joined.specs, made.outputs, made.unused, seed=f"merge {goal.name}")
    carried, stay = carried_files(given.base, [one.path for one in given.adapters], output.directory)
    recipe = merge_record.recipe(given, output.target, options)
    model = ModelOutput(
        given, goal, output, planned, (*merged.notes, *made.notes), shard_size, merged.config,
        {MERGED_KEY: mark.as_text()},
        merge_record.record(given, output, goal, named, planned, merged.config, recipe), carried, True,
    )  # fmt: skip
    merged = replace(merged, warnings=(*merged.warnings, *warnings))
    return MergeJob(given, merged, model, tuple(path.name for path in stay))


def _check_ties(given: Opened, made: Forward) -> None:
    """Refuse a target that ties what the merge, or the base itself, does not."""
    values = {extra.name: extra.value for extra in made.adapter.extras}
    written = {name for value in values.values() if computes(value) for name in _reads_weight(value)}
    apart, same = [], comparing(given.joined)
    for name, other in made.ties:
        merged = name in written or other in written
        if merged or not same(*(read(given.joined.specs[one]) for one in (name, other))):
            apart.append(f"{name.partition('/')[2]} differs from {other.partition('/')[2]}")
    if apart:
        raise MappingError(
            "a head that the target ties to the embedding is not tied after the merge",
            where=apart,
            hint="write the names of the base's own framework, whose config can untie them",
        )


def _reads_weight(value: Expr) -> list[str]:
    return [name for name in reads(value) if name.startswith(f"{merge_inputs.BASE}/")]
