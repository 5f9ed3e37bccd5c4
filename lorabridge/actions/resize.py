"""Change the rank of an adapter: the best factors of a lower rank, and what of each delta they retain."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..conversion.forward import dialect_named
from ..conversion.repository import Input, framework_of, open_input
from ..dialects.adapter import Facts
from ..errors import InputError, UsageError
from .choices import ConvertOptions, source_dialect
from .compress import refuse_changed_base
from .convert import convert
from .convert_report import ConvertReport

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ResizedRow:
    """One module: rank before and after, and the share of the delta's squared Frobenius norm that is retained.

    The share counts the rounding to the factors' type; it is 1 where the rank did not change.
    """

    path: str
    kind: str
    before: int
    after: int
    scaling: float
    energy: float


@dataclass(frozen=True, slots=True)
class ResizeReport:
    """One resizing; ``conversion`` says what was written."""

    modules: tuple[ResizedRow, ...]
    warnings: tuple[str, ...]
    conversion: ConvertReport

    def as_json(self) -> dict[str, object]:
        """Return the JSON document of ``lorabridge resize --json``."""
        rows = [asdict(row) for row in self.modules]
        return {**asdict(self.conversion), "schema": "lorabridge/resize/1", "modules": rows, "warnings": self.warnings}

    def summary(self) -> str:
        """Return one line: what became of what."""
        from ..errors import counted

        done = "would resize" if self.conversion.dry_run else "resized"
        fell = [row for row in self.modules if row.after != row.before]
        spans = [_span([getattr(row, when) for row in self.modules]) for when in ("before", "after")]
        worst = min((row.energy for row in fell), default=1.0)
        return (
            f"{done} {counted(len(fell), 'module')} of {len(self.modules)} (rank {spans[0]} -> {spans[1]}, "
            f"at least {100 * worst:.4g} % of each delta's energy) to {self.conversion.target}"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """Return the modules as cells."""
        return [
            (m.path, m.kind, str(m.before), str(m.after), f"{m.scaling:g}", f"{100 * m.energy:.5g}")
            for m in self.modules
        ]

    def _repr_html_(self) -> str:
        from ..reports.plain import table_html

        return table_html(self.summary(), HEADER, self.rows())


HEADER = ("module", "kind", "before", "after", "scaling", "energy %")


def _span(ranks: list[int]) -> str:
    low, high = min(ranks, default=0), max(ranks, default=0)
    return str(low) if low == high else f"{low} to {high}"


def resize(
    source: Path | str,
    target: Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
) -> ResizeReport:
    """Write an adapter at a rank, or at the smallest ranks that retain a share of each delta's energy.

    Works in the thin space (QR of both factors, SVD of the core), so no delta is ever formed. Modules of a lower rank
    keep it. ``options`` are those of a conversion, which this is: into the source's own dialect where the target's
    suffix allows it and none is chosen. Raises MappingError for adapters that their rank is part of (PiSSA ...) and
    for grouped convolutions, and whatever ``convert`` raises.
    """
    options = replace(options or ConvertOptions(), compress=_wanted(rank, energy))
    given = open_input(Path(source), config=options.config)
    try:
        options = replace(options, target_dialect=options.target_dialect or _own_dialect(given, target, options))
        warnings = _check(given)
    finally:
        given.source.close()
    done = convert(source, target, options, progress=progress)
    if not done.modules:
        raise InputError("the input carries no LoRA factors", where=str(source), hint="name an adapter")
    fell = {row.path: row for row in done.compressed}
    rows = []
    for module in done.modules:
        row = fell.get(module.path)
        retained = 1.0 if row is None else max(0.0, 1.0 - row.error**2)
        before = module.rank if row is None else row.before
        rows.append(ResizedRow(module.path, module.kind, before, module.rank, module.scaling, retained))
    if not fell:
        warnings = (*warnings, "no module has a higher rank: nothing was compressed")
    return ResizeReport(tuple(rows), (*done.warnings, *warnings), done)


def _wanted(rank: int | None, energy: float | None) -> str:
    """Spell what convert calls compression: a rank, or the relative error that leaves a share of the energy."""
    if (rank is None) == (energy is None):
        raise UsageError("give either a rank or an energy", hint="--rank R, or --energy SHARE, for example 0.99")
    if rank is not None:
        if rank < 1:
            raise UsageError("a rank is at least 1", where=f"--rank {rank}")
        return str(rank)
    assert energy is not None
    if not 0 < energy <= 1:
        raise UsageError("an energy is a share above 0 and up to 1", where=f"--energy {energy:g}")
    return repr(math.sqrt(1.0 - energy))


def _own_dialect(given: Input, target: Path | str, options: ConvertOptions) -> str | None:
    """Return the source's dialect, or None where the target's suffix belongs to the other framework."""
    kept = given.manifest if given.manifest is not None and given.manifest.describes(given.source.specs) else None
    facts = options.facts.then(given.stated).then(kept.facts if kept else Facts())
    origin = source_dialect(given, kept, facts, options.source_dialect)
    if origin.name in ("hf", "ms"):
        raise InputError("the input carries no LoRA factors", where=str(given.path), hint="name an adapter, or --from")
    decided = framework_of(target)
    return origin.name if decided in (None, dialect_named(origin.name).framework) else None


def _check(given: Input) -> tuple[str, ...]:
    config = given.adapter_config or {}
    refuse_changed_base(config, str(given.path))
    if config.get("use_dora"):
        return ("DoRA: the magnitudes stay as they are, while the directions they scale change with the delta",)
    return ()
