"""What a combination did, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class CombinedRow:
    """One module of the result.

    ``ranks``, ``weights``: of the adapters that have the module, in the order of the inputs (``inputs`` are their
    numbers, from 0). ``apart``: Frobenius norm of the result's delta minus the weighted sum of the deltas, relative to
    that sum; 0 where the method is the sum and nothing was rounded, None where it is the sum and B was rounded once.
    """

    path: str
    kind: str
    inputs: tuple[int, ...]
    ranks: tuple[int, ...]
    weights: tuple[float, ...]
    rank: int
    scaling: float
    apart: float | None


@dataclass(frozen=True, slots=True)
class CombineReport:
    """One combination, done or (``dry_run``) tried; ``nbytes``: of the output's tensors."""

    sources: tuple[str, ...]
    target: str
    method: str
    target_dialect: str
    target_format: str
    modules: tuple[CombinedRow, ...]
    tensors: int
    nbytes: int
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    dry_run: bool

    def as_json(self) -> dict[str, object]:
        """Return the JSON document of ``lorabridge combine --json``."""
        return {"schema": "lorabridge/combine/1", **asdict(self)}

    def summary(self) -> str:
        """Return one line: what became of what."""
        from ..reports.plain import count

        done = "would combine" if self.dry_run else "combined"
        ranks = [row.rank for row in self.modules]
        span = f"{min(ranks)}" if len(set(ranks)) < 2 else f"{min(ranks)} to {max(ranks)}"
        return (
            f"{done} {count(len(self.sources), 'adapter')} ({self.method}) into {count(len(self.modules), 'module')} "
            f"of rank {span} ({self.target_dialect} {self.target_format}) at {self.target}"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """Return the modules as cells: path, ranks, weights, rank, scaling, distance from the sum."""
        return [
            (
                m.path, " ".join(map(str, m.ranks)), " ".join(f"{w:g}" for w in m.weights), str(m.rank),
                f"{m.scaling:g}", "rounded" if m.apart is None else f"{m.apart:.2g}",
            )
            for m in self.modules
        ]  # fmt: skip

    def _repr_html_(self) -> str:
        from ..reports.plain import table_html

        return table_html(self.summary(), HEADER, self.rows())


HEADER = ("module", "ranks", "weights", "rank", "scaling", "off the sum")
