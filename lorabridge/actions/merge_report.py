"""What a merge did, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ..arithmetic.addition import Change

if TYPE_CHECKING:
    from .undo import UndoSummary


@dataclass(frozen=True, slots=True)
class MergedRow:
    """What happened to one parameter.

    ``relative``: norm of the delta over the norm of the weight. ``changed``: share of the elements whose bits changed;
    ``vanished``: share of those with a delta that kept their bits, because it is below half of the last place.
    ``error``: the largest rounding error. ``kept``: elements that were not finite before and were left alone.
    """

    parameter: str
    elements: int
    relative: float
    changed: float
    vanished: float
    error: float
    kept: int = 0

    @classmethod
    def of(cls, name: str, change: Change) -> MergedRow:
        """Turn counts into shares."""
        relative = math.sqrt(change.delta / change.weight) if change.weight > 0 else 0.0
        return cls(
            name, change.elements, relative, change.changed / max(1, change.elements),
            change.vanished / max(1, change.reached), change.error, change.odd,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class MergeReport:
    """One merge, done or (``dry_run``) planned.

    ``merged``: base parameters that got a delta; ``replaced``: those that an adapter brought whole. ``rows``: what
    happened to each; empty for a dry run. ``vanished`` and ``error``: over all of them. ``nbytes``: bytes of the
    output tensors. ``carried`` and ``not_carried``: files beside the base that were copied, and that stay behind.
    ``undo``: what the undo file holds, where one was asked for.
    """

    base: str
    adapters: tuple[str, ...]
    target: str
    target_format: str
    target_dialect: str
    merged: tuple[str, ...]
    replaced: tuple[str, ...]
    tensors: int
    nbytes: int
    seconds: float
    rows: tuple[MergedRow, ...]
    vanished: float
    error: float
    left_out: tuple[tuple[str, str], ...]
    carried: tuple[str, ...]
    not_carried: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    digest: str
    dry_run: bool
    undo: UndoSummary | None = None

    def as_json(self) -> dict[str, object]:
        """Return the JSON document of ``lorabridge merge --json``."""
        return {"schema": "lorabridge/merge/1", **asdict(self)}

    def summary(self) -> str:
        """Return one line: what went where."""
        from ..reports.plain import count

        done = "would merge" if self.dry_run else "merged"
        whole = f", {count(len(self.replaced), 'whole tensor')}" if self.replaced else ""
        adapters = "" if len(self.adapters) == 1 else f" of {len(self.adapters)} adapters"
        return (
            f"{done} {count(len(self.merged), 'delta')}{adapters}{whole} into {count(self.tensors, 'tensor')} "
            f"({self.target_dialect} {self.target_format}) at {self.target}"
        )

    def _repr_html_(self) -> str:
        from ..reports.plain import table_html

        rows = (
            (r.parameter, f"{r.relative:.2e}", f"{r.changed:.1%}", f"{r.vanished:.1%}", f"{r.error:.1e}")
            for r in self.rows
        )
        return table_html(self.summary(), ("parameter", "delta / weight", "changed", "vanished", "error"), rows)


def overall(changes: Mapping[str, Change]) -> Change:
    """Add up what happened everywhere."""
    total = Change()
    for change in changes.values():
        total = total.plus(change)
    return total
