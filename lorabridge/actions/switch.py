"""Put another adapter in the place of a merged one, in one pass over the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..axes import computes
from ..conversion.accounts import Here
from ..dialects.adapter import Adapter
from ..merging.identity import MERGED_KEY, MergedMark, merged_mark
from ..merging.kernel import Merger, Seen
from ..merging.planning import Merged
from ..merging.planning import merge as merge_headers
from ..merging.twins import comparing
from ..merging.unmerge_kernel import Unmerger
from ..merging.unmerge_planning import Restored, nodes_of, onto, stand_in, traces_onto
from . import merge_inputs, restoring
from .base_check import check_bases, marked
from .merge_inputs import MergeOptions, Opened
from .merge_report import MergedRow, overall
from .model_output import ModelOutput, Progress, check_finite, write
from .restoring import GuessRow, Way
from .undo import UndoSummary, UndoWriter


@dataclass(frozen=True, slots=True)
class SwitchReport:
    """One switch, done or (``dry_run``) planned.

    ``exact``: the weights went through the exact base, so the result is what merging the new adapter into the base
    gives, bit for bit. Otherwise ``guesses`` say what may be wrong about the base in between, and ``wrong`` is the
    share of the elements of these parameters that is expected to be. ``rows``: what the new adapter did to each.
    """

    merged: str
    old: tuple[str, ...]
    new: tuple[str, ...]
    undo: str
    target: str
    target_format: str
    target_dialect: str
    exact: bool
    restored: tuple[str, ...]
    tensors: int
    nbytes: int
    seconds: float
    rows: tuple[MergedRow, ...]
    vanished: float
    guesses: tuple[GuessRow, ...]
    wrong: float
    undo_out: UndoSummary | None
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    digest: str
    dry_run: bool

    def as_json(self) -> dict[str, object]:
        """Return the JSON document of ``lorabridge switch --json``."""
        return {"schema": "lorabridge/switch/1", **asdict(self)}

    def summary(self) -> str:
        """Return one line: what went where, and how good it is."""
        from ..reports.plain import count

        done = "would switch" if self.dry_run else "switched"
        how = "through the exact base" if self.exact else "through the best inverse, not the exact base"
        return (
            f"{done} {count(len(self.rows) or len(self.restored), 'parameter')} {how}, of "
            f"{count(self.tensors, 'tensor')} ({self.target_dialect} {self.target_format}) at {self.target}"
        )

    def _repr_html_(self) -> str:
        from ..reports.plain import table_html

        rows = ((r.parameter, f"{r.relative:.2e}", f"{r.changed:.1%}", f"{r.vanished:.1%}") for r in self.rows)
        return table_html(self.summary(), ("parameter", "delta / weight", "changed", "vanished"), rows)


def switch(
    merged: Path | str, old: Path | str | Sequence[Path | str], new: Path | str | Sequence[Path | str],
    target: Path | str, options: MergeOptions | None = None, *, undo: Path | str | None = None,
    undo_out: Path | str | None = None, progress: Progress | None = None,
) -> SwitchReport:  # fmt: skip
    """Replace the adapters ``old`` in ``merged`` by ``new``, write the model to ``target`` and return what was done.

    With ``undo``, the file that the merge wrote, each weight goes through the exact base; ``undo_out`` then gets the
    undo file of the new adapters. ``options.weights`` are those of the new adapters. All or nothing. Raises the errors
    of :func:`lorabridge.actions.unmerge.unmerge` and of :func:`lorabridge.actions.merge.merge`.
    """
    started = time.perf_counter()
    old, new = merge_inputs.paths_of(old), merge_inputs.paths_of(new)
    options = options or MergeOptions()
    kept = restoring.open_undo(undo)
    told = restoring.recorded(replace(options, weights=()), kept, len(old))
    paths = [*old, *new]
    with merge_inputs.opened(Path(merged), paths, replace(told, weights=())) as given:
        way = restoring.way_back(_part(given, 0, len(old)), told, kept)
        there = _part(replace(way.given, adapters=given.adapters, labels=given.labels), len(old), len(paths))
        landed = _landed(way, there, options)
        result = onto(way.restored, landed)
        base = replace(way.restored.model, extras=tuple(e for e in way.restored.model.extras if not computes(e.value)))
        warnings = check_bases(there, base, options)
        writing = restoring.planned(
            way.given, result.model, landed.config, target, options,
            metadata={MERGED_KEY: _mark(way, there, landed, options).as_text()}, merged=True, seed=f"switch {undo}",
        )  # fmt: skip
        writer = None if undo_out is None else UndoWriter(undo_out, options)
        merger, unmerger = _run(writing, way, landed, there, result, options, writer, progress)
        total, rows = overall(merger.changes), restoring.guesses(unmerger)
        return SwitchReport(
            **writing.described(),
            **way.described(),
            old=tuple(str(one.path) for one in given.adapters[: len(old)]),
            new=tuple(str(one.path) for one in there.adapters),
            seconds=time.perf_counter() - started,
            rows=tuple(MergedRow.of(name, change) for name, change in merger.changes.items()),
            vanished=total.vanished / max(1, total.reached),
            guesses=rows,
            wrong=restoring.expected_wrong(rows),
            undo_out=None if writer is None else writer.summary,
            notes=(*landed.notes, *writing.notes),
            warnings=(*way.warnings, *warnings, *landed.warnings, *(() if kept is not None else (INEXACT,))),
            dry_run=options.dry_run,
        )


INEXACT = (
    "without an undo file the result is near to merging the new adapter into the base, and not the same: "
    "what rounding lost when the old one was merged stays lost"
)


def _part(given: Opened, start: int, stop: int) -> Opened:
    return replace(given, adapters=given.adapters[start:stop], labels=given.labels[start:stop])


def _landed(way: Way, there: Opened, options: MergeOptions) -> Merged:
    """Plan the merge of the new adapters into the restored base."""
    base = stand_in(way.restored.model)
    return merge_headers(
        base, merge_inputs.additions(there, base, options), config=way.config, exact=options.exact,
        residual_base=options.residual_base, same=comparing(there.joined),
    )  # fmt: skip


def _mark(way: Way, there: Opened, landed: Merged, options: MergeOptions) -> MergedMark:
    """Record what the new adapters add, and what the weights were before, as far as that is known."""
    held = merged_mark(there.base.source.metadata, where=str(there.base.path))
    known = {extra.name: extra.value for extra in way.restored.model.extras}
    before = MergedMark(way.given.origin.name, held.base if held is not None else there.base.path.name, ())
    if held is not None and held.side == way.given.origin.name:
        bases = {name: (row[0],) for name, row in held.weights.items() if row[0]}
        before = replace(before, weights=bases)
    nodes = nodes_of(landed.model)
    plain = {name: value if value is not None and not computes(value) else None for name in nodes
             for value in [known.get(name)]}  # fmt: skip
    mark = marked(there, nodes, plain, [name for name in _names(landed.model) if name not in known], options,
                  held=before)  # fmt: skip
    weights = {name: row for name, row in mark.weights.items() if len(row) > 1}
    return replace(mark, weights=weights, through_exact_base=way.undo is not None)


def _names(model: Adapter) -> list[str]:
    return [extra.name for extra in model.extras]


def _run(
    writing: ModelOutput, way: Way, landed: Merged, there: Opened, result: Restored, options: MergeOptions,
    writer: UndoWriter | None, progress: Progress | None,
) -> tuple[Merger, Unmerger]:  # fmt: skip
    seen: Seen | None = None
    finish: Callable[[], None] | None = None
    if writer is not None and not options.dry_run:
        restorer = Unmerger({}, way.undo)
        kernels = {**restorer.kernels(), **Merger().kernels()}
        seen, finish = writer.start(way.restored.model, traces_onto(way.restored, landed), there, way.config, kernels)
    merger = Merger(seen)
    unmerger = Unmerger(result.away, way.undo, merger.kernels()["merge"])

    def before_commit() -> None:
        unmerger.check()
        check_finite(merger)
        if finish is not None:
            finish()

    if not options.dry_run:
        write(writing, options, Here(unmerger.kernels()), before_commit, progress)
    return merger, unmerger
