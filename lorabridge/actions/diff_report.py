"""What a comparison found, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor of both files.

    ``dtypes``: in A and in B. ``differing``: elements with other bits (other values where the types differ), of
    ``elements``. ``max_abs``: largest absolute difference, infinite where only one is NaN; ``ulps``: the most numbers
    of the type that lie between two elements; ``relative``: Frobenius norm of the difference relative to the larger
    tensor's. Numbers that do not apply are None.
    """

    name: str
    same: bool
    dtypes: tuple[str, str]
    shape: tuple[int, ...]
    elements: int = 0
    differing: int = 0
    max_abs: float | None = None
    ulps: int | None = None
    relative: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class DeltaRow:
    """One module whose factors cannot be compared one by one.

    ``norms``: Frobenius norms of both deltas; ``apart``: of their difference, relative to the larger; ``allowed``: up
    to which that counts as the same.
    """

    path: str
    same: bool
    ranks: tuple[int, int] = (0, 0)
    scalings: tuple[float, float] = (0.0, 0.0)
    norms: tuple[float, float] | None = None
    apart: float | None = None
    allowed: float | None = None
    cosine: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class DiffReport:
    """One comparison; ``left_out``: (tensor, reason) of what neither adapter nor model is, such as optimizer state."""

    first: str
    second: str
    dialects: tuple[str, str]
    formats: tuple[str, str]
    tensors: tuple[TensorRow, ...]
    deltas: tuple[DeltaRow, ...]
    left_out: tuple[tuple[str, str], ...]
    unselected: int
    seconds: float

    @property
    def same(self) -> bool:
        """Nothing that was compared differs."""
        return all(row.same for row in self.tensors) and all(row.same for row in self.deltas)

    def as_json(self) -> dict[str, object]:
        """Return the JSON document of ``lorabridge diff --json``."""
        return {"schema": "lorabridge/diff/1", "same": self.same, **asdict(self)}

    def summary(self) -> str:
        """Return one line: the same or not, and how much was compared."""
        from ..errors import counted

        kinds = (([row.same for row in self.tensors], "tensor"), ([row.same for row in self.deltas], "delta"))
        of = " and ".join(counted(len(rows), noun) for rows, noun in kinds if rows) or "nothing"
        if self.same:
            return f"same: {of} compared"
        wrong = [counted(rows.count(False), noun) for rows, noun in kinds if not all(rows)]
        return f"different: {' and '.join(wrong)} of {of}"

    def rows(self, *, every: bool = False) -> list[tuple[str, ...]]:
        """Return those that differ, or all, as cells."""
        tensors: list[tuple[str, ...]] = [
            (
                r.name, f"{r.differing} of {r.elements}" if r.elements else "", _number(r.max_abs), _number(r.ulps),
                _number(r.relative), r.note if not r.same or r.note else "same",
            )
            for r in self.tensors
            if every or not r.same
        ]  # fmt: skip
        deltas: list[tuple[str, ...]] = [
            (
                r.path, f"delta, rank {r.ranks[0]} and {r.ranks[1]}" if r.norms else "", "", "", _number(r.apart),
                "; ".join(filter(None, ("same" if r.same else "", r.note))),
            )
            for r in self.deltas
            if every or not r.same
        ]  # fmt: skip
        return tensors + deltas

    def _repr_html_(self) -> str:
        from ..reports.plain import table_html

        return table_html(self.summary(), HEADER, self.rows())


HEADER = ("tensor", "differing", "max abs", "ulps", "relative", "")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
