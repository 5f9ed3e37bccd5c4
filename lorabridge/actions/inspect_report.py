"""What an inspection found, as data, text and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ..errors import LorabridgeError
from ..reports import plain
from .inspect_ranks import RanksReport, layouts_text

Rows = list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor; ``kind`` says what it is beside the factors (modules_to_save, bias, base ...), or is empty."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Pair:
    """One pair of factors of a module, on the output rows [start, stop)."""

    a: TensorRow
    b: TensorRow
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class NormRow:
    """Frobenius norms of A, B and the delta ``scaling * B @ A``; ``nonfinite`` counts NaN and infinite elements.

    With several pairs the norm is over all of them. ``delta`` is None where the scaling is unknown.
    """

    a: float
    b: float
    delta: float | None
    nonfinite: int


@dataclass(frozen=True, slots=True)
class InspectedModule:
    """One adapted module; what the file does not say is None. ``features``: rslora, dora, lora_bias ..."""

    path: str
    kind: str
    rank: int | None
    alpha: float | None
    scaling: float | None
    pairs: tuple[Pair, ...]
    features: tuple[str, ...] = ()
    norms: NormRow | None = None


@dataclass(frozen=True, slots=True)
class FactorRow:
    """One factor's values: statistics over its finite elements, and the first rows and columns."""

    module: str
    factor: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    minimum: float
    maximum: float
    mean: float
    std: float
    norm: float
    zeros: int
    nonfinite: int
    leading: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something wrong with the file, told like an error: problem, places, hint."""

    problem: str
    where: tuple[str, ...] = ()
    hint: str = ""

    @classmethod
    def of(cls, error: LorabridgeError) -> Problem:
        """Take over an error's parts."""
        return cls(error.problem, error.where, error.hint)


@dataclass(frozen=True, slots=True)
class InspectReport:
    """One checkpoint seen from its headers.

    ``contents``: adapter, model or unknown. ``dialect`` with the reason ``why``; ``candidates``: every dialect that
    fits. ``families``: tables that fit. ``origin``: what a manifest says it was made from. ``dtypes``: (name,
    tensors, bytes). ``left_out``: (tensor, reason). ``ranks``: how a
    distributed checkpoint lies. Sizes are in bytes.
    """

    path: str
    format: str
    contents: str
    dialect: str | None
    why: str
    candidates: tuple[tuple[str, str], ...]
    families: tuple[str, ...]
    config_from: str
    origin: str
    nbytes: int
    dtypes: tuple[tuple[str, int, int], ...]
    tensors: tuple[TensorRow, ...]
    modules: tuple[InspectedModule, ...]
    extras: tuple[TensorRow, ...]
    left_out: tuple[tuple[str, str], ...]
    metadata: tuple[tuple[str, str], ...]
    not_carried: tuple[str, ...]
    warnings: tuple[str, ...]
    problems: tuple[Problem, ...]
    factors: tuple[FactorRow, ...] = ()
    ranks: RanksReport | None = None

    def as_json(self) -> dict[str, object]:
        """Return the JSON document of ``lorabridge inspect --json``."""
        content = asdict(replace(self, ranks=replace(self.ranks, examples=()) if self.ranks else None))
        if self.ranks is not None:
            content["ranks"].pop("examples")
        content["metadata"] = dict(self.metadata)
        for key, names in (("candidates", ("dialect", "why")), ("left_out", ("tensor", "reason"))):
            content[key] = [dict(zip(names, row, strict=True)) for row in getattr(self, key)]
        content["dtypes"] = [dict(zip(("dtype", "tensors", "nbytes"), row, strict=True)) for row in self.dtypes]
        return {"schema": "lorabridge/inspect/1", **content}

    def head(self) -> Rows:
        """Return (label, text) rows: what the file is."""
        dtypes = ", ".join(name if len(self.dtypes) == 1 else f"{name} x {n}" for name, n, _ in self.dtypes)
        held = f"{plain.count(len(self.tensors), 'tensor')}, {plain.size(self.nbytes)}"
        also = [f"{name} ({why})" for name, why in self.candidates if name != self.dialect]
        rows = [
            ("path", self.path),
            ("container", f"{self.format}: {held}{', ' if dtypes else ''}{dtypes}"),
            ("ranks", self.ranks.head if self.ranks else ""),
            ("contents", self.contents),
            ("dialect", f"{self.dialect or 'none recognised'}{f': {self.why}' if self.why else ''}"),
            ("fits also", "; ".join(also)),
            ("config", self.config_from),
            ("family", ", ".join(self.families)),
            ("made from", self.origin),
            ("modules", self._modules_line()),
        ]  # fmt: skip
        return [(label, text) for label, text in rows if text]

    def _modules_line(self) -> str:
        if not self.modules:
            return ""
        parts = [str(len(self.modules))]
        for name in ("rank", "alpha", "scaling"):
            values = sorted({v for m in self.modules if (v := getattr(m, name)) is not None})
            unknown = any(getattr(m, name) is None for m in self.modules)
            text = " to ".join(plain.number(v) for v in dict.fromkeys((values[0], values[-1]))) if values else ""
            parts.append(f"{name} {text}{' or ' if text and unknown else ''}{'unknown' if unknown else ''}")
        return ", ".join(parts)

    def module_rows(self) -> tuple[Sequence[str], Rows]:
        """Return header and rows of the module table, one row per pair of factors."""
        header = ["module", "kind", "rank", "alpha", "scaling", "A", "B", "dtype", "notes"]
        with_norms = any(m.norms for m in self.modules)
        rows: Rows = []
        for m in self.modules:
            for i, pair in enumerate(m.pairs):
                notes = [*m.features, *([f"rows {pair.start}:{pair.stop}"] if len(m.pairs) > 1 else [])]
                row = [m.path, m.kind, plain.number(m.rank), plain.number(m.alpha),
                       plain.number(m.scaling), plain.shape(pair.a.shape), plain.shape(pair.b.shape),
                       pair.a.dtype if pair.a.dtype == pair.b.dtype else f"{pair.a.dtype}/{pair.b.dtype}",
                       ", ".join(notes)]  # fmt: skip
                if with_norms:
                    row += _norm_cells(m.norms if i == 0 else None)
                rows.append(tuple(row))
        if not any(row[8] for row in rows):
            header, rows = header[:8] + header[9:], [row[:8] + row[9:] for row in rows]
        return header + (["|A|", "|B|", "|delta|", "not finite"] if with_norms else []), rows

    def text(self, *, width: int | None = None, tensors: bool = False) -> str:
        """Return the report for people; ``tensors`` lists every tensor, ``width`` is the columns to fit in."""
        label_width = max(len(label) for label, _ in self.head()) + 2
        blocks = ["\n".join(f"{label.ljust(label_width)}{plain.escape(text)}" for label, text in self.head())]
        if self.ranks is not None:
            blocks += layouts_text(self.ranks, width=width)
        header, rows = self.module_rows()
        if rows:
            blocks.append(plain.table(header, rows, right="  rrr    rrrr", width=width))
        blocks += [_factor_text(row) for row in self.factors]
        shown = self.tensors if tensors else self.extras
        if shown:
            table = [(t.name, t.kind, t.dtype, plain.shape(t.shape)) for t in shown]
            blocks.append(plain.table(("tensor", "kind", "dtype", "shape"), table, width=width))
        metadata = self.metadata if tensors else ()
        for title, pairs in (("left out when converting", self.left_out), ("metadata", metadata)):
            if pairs:
                blocks.append("\n".join([f"{title}:", *(f"  {plain.escape(f'{k}: {v}')}" for k, v in pairs)]))
        if self.problems:
            blocks.append("\n".join(["problems:", *(line for p in self.problems for line in _problem_lines(p))]))
        return "\n\n".join(blocks)

    def _repr_html_(self) -> str:
        header, rows = self.module_rows()
        parts = [plain.table_html("lorabridge inspect", ("", ""), self.head())]
        if rows:
            parts.append(plain.table_html(plain.count(len(self.modules), "module"), header, rows))
        if self.problems:
            parts.append(plain.list_html("problems", ["\n".join(_problem_lines(p)) for p in self.problems]))
        return "<div>" + "".join(parts) + "</div>"


def _norm_cells(norms: NormRow | None) -> list[str]:
    if norms is None:
        return ["", "", "", ""]
    return [plain.number(norms.a), plain.number(norms.b), plain.number(norms.delta), str(norms.nonfinite)]


def _factor_text(row: FactorRow) -> str:
    values = [f"    {'  '.join(f'{v: .6e}' for v in line)}" for line in row.leading]
    statistics = (
        f"  min {row.minimum:.6g}, max {row.maximum:.6g}, mean {row.mean:.6g}, std {row.std:.6g}, norm {row.norm:.6g}, "
        f"zeros {row.zeros}, not finite {row.nonfinite}"
    )
    title = plain.escape(f"{row.module} {row.factor}: {plain.shape(row.shape)} {row.dtype} ({row.tensor})")
    return "\n".join([title, statistics, "  leading values:", *values])


def _problem_lines(problem: Problem) -> list[str]:
    error = LorabridgeError(problem.problem, where=problem.where, hint=problem.hint)
    return ["  " + line for line in plain.error_text(error).split("\n")]
