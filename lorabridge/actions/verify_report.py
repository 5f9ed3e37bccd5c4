"""What a verification compared and found, as data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

SCHEMA = "lorabridge/verify/1"
DEPTHS = ("tensors", "layers", "model")
"""The depths in the order in which they run; each proves more than the one before and needs more installed."""

Relation = Literal["conversion", "adapters", "models", "merge", "record"]
RELATIONS: dict[Relation, str] = {
    "conversion": "a conversion that its manifest describes",
    "adapters": "two adapters",
    "models": "two whole models, or two files of parameters that are no LoRA",
    "merge": "an adapter and a checkpoint into which it was merged",
    "record": "a base and a model whose manifest says what was merged into it",
}


@dataclass(frozen=True, slots=True)
class ComparedFile:
    """One of the files: ``role`` is "SRC", "DST" or "BASE"; ``nbytes`` counts tensors."""

    role: str
    path: str
    format: str
    dialect: str
    framework: str
    tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Check:
    """One statement about the files as a whole, whether it holds, and the places where it does not."""

    name: str
    ok: bool
    detail: str = ""
    where: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One adapted module, or one parameter of a whole model, at one depth.

    ``path``: in DST's names; ``origin``: in SRC's names. ``scaling``: DST's. ``delta_norm``: Frobenius norm of
    ``scaling * B @ A``. ``max_abs``: largest absolute difference (depth *tensors*: the Frobenius norm of the
    difference of the deltas, which no element exceeds). ``max_rel``: largest difference relative to the larger of the
    two numbers (*tensors*: of the norms). ``ulps``: the same in units in the last place of the larger. ``bound``: what
    ``max_abs`` is held against, 0 where bits must be equal (*layers*: the bound at the element that comes closest
    to it). ``ratio``: largest error over its own bound, elementwise; above 1 is a failure. ``ok``: None where the
    module was not compared, which ``note`` explains. Numbers that do not apply are None.
    """

    path: str
    kind: str
    ok: bool | None
    origin: str = ""
    rank: int = 0
    scaling: float | None = None
    delta_norm: float | None = None
    max_abs: float | None = None
    max_rel: float | None = None
    ulps: float | None = None
    cosine: float | None = None
    bound: float | None = None
    ratio: float | None = None
    elements: int = 0
    note: str = ""

    @property
    def severity(self) -> tuple[int, float]:
        """Sort key: failures first, then by how near the bound is; NaN counts as the worst."""
        ratio = self.ratio if self.ratio is not None else 0.0
        return (0 if self.ok is False else 1, -math.inf if math.isnan(ratio) else -ratio)


@dataclass(frozen=True, slots=True)
class DepthResult:
    """What one depth did.

    ``state``: "run", "refused" (``reason`` says what it needs) or "left out" (not asked for). ``proved``: sentences
    about what was established and under which assumptions. ``modules``: in DST's order.
    """

    name: str
    state: Literal["run", "refused", "left out"]
    reason: str = ""
    proved: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    modules: tuple[ModuleRow, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool | None:
        """Every check and every compared module holds; None when the depth did not run."""
        if self.state != "run":
            return None
        return all(check.ok for check in self.checks) and all(row.ok is not False for row in self.modules)

    @property
    def failed(self) -> tuple[ModuleRow, ...]:
        """The modules that differ."""
        return tuple(row for row in self.modules if row.ok is False)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """One verification.

    ``files``: SRC, DST and, where there is one, BASE. ``compared``: sentences on what was held against what.
    ``command``: a shell command that does the same again.
    """

    relation: Relation
    files: tuple[ComparedFile, ...]
    depths: tuple[DepthResult, ...]
    compared: tuple[str, ...]
    warnings: tuple[str, ...]
    command: str
    seconds: float

    @property
    def ok(self) -> bool:
        """At least one depth ran, and everything that ran holds."""
        ran = [depth.ok for depth in self.depths if depth.ok is not None]
        return bool(ran) and all(ran)

    @property
    def verdict(self) -> Literal["equal", "different"]:
        """The verdict in one word."""
        return "equal" if self.ok else "different"

    @property
    def exit_code(self) -> int:
        """0 where equal, 1 where not (as DifferentError)."""
        return 0 if self.ok else 1

    def depth(self, name: str) -> DepthResult | None:
        """Return one depth's result."""
        return next((depth for depth in self.depths if depth.name == name), None)

    def worst(self, count: int) -> tuple[tuple[str, ModuleRow], ...]:
        """Return (depth, row) of the modules nearest to or beyond their bounds, the worst first."""
        rows = [(depth.name, row) for depth in self.depths for row in depth.modules]
        return tuple(sorted(rows, key=lambda item: item[1].severity)[:count])

    def summary(self) -> str:
        """Return the verdict in one line."""
        source, target = self.files[0].path, self.files[1].path
        said = "; ".join(self._depth_texts())
        return f"{self.verdict}: {source} and {target}: {said}"

    def _depth_texts(self) -> Iterator[str]:
        for depth in self.depths:
            if depth.state == "run":
                yield f"{depth.name} {_outcome(depth)}"
            elif depth.state == "refused":
                yield f"{depth.name} refused ({depth.reason})"

    def as_json(self) -> dict[str, object]:
        """Return the JSON document of ``lorabridge verify --json``."""
        depths = [{**asdict(depth), "ok": depth.ok} for depth in self.depths]
        return {"schema": SCHEMA, "verdict": self.verdict, "summary": self.summary(), **asdict(self), "depths": depths}

    def _repr_html_(self) -> str:
        from ..reports.plain import table_html

        rows = [(name, row.path, row.kind, row.rank, row.max_abs, row.bound, row.note) for name, row in self.worst(20)]
        return table_html(self.summary(), ("depth", "module", "kind", "rank", "error", "bound", ""), rows)


def _outcome(depth: DepthResult) -> str:
    """Say in a few words how one depth ended."""
    bad = [check.name for check in depth.checks if not check.ok]
    compared = [row for row in depth.modules if row.ok is not None]
    parts = []
    if depth.failed:
        worst = min(depth.failed, key=lambda row: row.severity)
        parts.append(f"{len(depth.failed)} of {len(compared)} differ, worst {worst.path}" + _because(worst))
    if bad:
        parts.append(f"not so: {', '.join(bad[:3])}" + (f" and {len(bad) - 3} more" if len(bad) > 3 else ""))
    if parts:
        return ", ".join(parts)
    skipped = len(depth.modules) - len(compared)
    text = "ok" + (f" ({len(compared)} compared{_largest(compared)})" if compared else "")
    return text + (f", {skipped} not compared" if skipped else "")


def _because(row: ModuleRow) -> str:
    return f" ({row.note})" if row.note else ""


def _largest(rows: list[ModuleRow]) -> str:
    top = max((row.max_abs for row in rows if row.max_abs is not None), default=None)
    if top is None:
        return ""
    ratio = max((row.ratio for row in rows if row.ratio is not None), default=0.0)
    return ", every bit" if top == 0 else f", error at most {top:.2g}, {ratio:.2g} of its bound"
