"""What an extraction found and kept, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class ExtractedRow:
    """One module: its weight's shape, the rank, and how near the factors are.

    ``norm``: Frobenius norm of the difference of the weights. ``residual``: of that difference minus ``B @ A``, with
    the factors as they are stored. ``energy``: the share of the squared norm that is retained.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    norm: float
    residual: float
    energy: float


@dataclass(frozen=True, slots=True)
class ExtractReport:
    """One extraction, done or (``dry_run``) tried.

    ``beside``: parameters that changed and go into the adapter whole, with what belongs to the same module.
    ``unchanged``: how many tensors are equal. ``left_out``: (tensor, reason); ``nbytes``: of the output's tensors.
    """

    base: str
    tuned: str
    target: str
    target_dialect: str
    target_format: str
    modules: tuple[ExtractedRow, ...]
    beside: tuple[str, ...]
    unchanged: int
    left_out: tuple[tuple[str, str], ...]
    tensors: int
    nbytes: int
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float
    dry_run: bool

    @property
    def energy(self) -> float:
        """The share of the squared norm of all differences that the factors retain."""
        total = sum(row.norm**2 for row in self.modules)
        return 1.0 - sum(row.residual**2 for row in self.modules) / total if total else 1.0

    def as_json(self) -> dict[str, object]:
        """Return the JSON document of ``lorabridge extract --json``."""
        return {"schema": "lorabridge/extract/1", "energy": self.energy, **asdict(self)}

    def summary(self) -> str:
        """Return one line: what was found and kept."""
        from ..reports.plain import count

        done = "would extract" if self.dry_run else "extracted"
        beside = f" and {count(len(self.beside), 'whole tensor')}" if self.beside else ""
        return (
            f"{done} {count(len(self.modules), 'module')}{beside} ({100 * self.energy:.4g} % of the energy) to "
            f"{self.target_dialect} {self.target_format} at {self.target}"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """Return the modules as cells."""
        from ..reports.plain import shape

        return [
            (m.path, m.kind, shape(m.shape), str(m.rank), f"{m.norm:.4g}", f"{m.residual:.4g}", f"{100 * m.energy:.5g}")
            for m in self.modules
        ]

    def _repr_html_(self) -> str:
        from ..reports.plain import table_html

        return table_html(self.summary(), HEADER, self.rows())


HEADER = ("module", "kind", "shape", "rank", "norm", "residual", "energy %")
