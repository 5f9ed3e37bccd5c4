"""What a conversion did, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from ..arithmetic.numerics import Notes
from ..dialects.adapter import LoraModule
from .compress import CompressedRow


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """One adapted module of the target: path, kind, rank, alpha and scaling (alpha / rank, or alpha / sqrt(rank))."""

    path: str
    kind: str
    rank: int
    alpha: float
    scaling: float
    features: str = ""

    @classmethod
    def of(cls, module: LoraModule) -> ModuleRow:
        """Summarise a module; ``features`` names what goes beyond plain LoRA."""
        has = {
            "rslora": module.scaling.rslora,
            "dora": module.magnitude is not None,
            "lora_bias": module.lora_bias is not None,
            f"{len(module.terms)} blocks": len(module.terms) > 1,
        }
        features = " ".join(name for name, on in has.items() if on)
        scaling = module.scaling
        return cls(module.path, module.kind, scaling.rank, scaling.alpha, scaling.value, features)


@dataclass(frozen=True, slots=True)
class RoundingRow:
    """What arithmetic cost one output tensor: elements that were rounded, of how many, and the worst relative error.

    ``overflowed``: elements beyond the type's range, which ``--on-overflow`` made its largest value or infinite.
    """

    tensor: str
    inexact: int
    elements: int
    worst: float
    overflowed: int = 0

    @classmethod
    def rows(cls, notes: Notes) -> tuple[RoundingRow, ...]:
        """Collect what the kernels noted, in name order."""
        found = sorted(notes.rounding.items())
        return tuple(
            cls(name, r.inexact, r.elements, r.max_relative_error, r.overflowed)
            for name, r in found
            if r.inexact or r.overflowed
        )


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """One conversion, done or (``dry_run``) planned.

    ``nbytes``: bytes of the output tensors; ``peak_bytes``: bound of tensor memory; ``left_out``: (tensor, reason);
    ``unselected``: tensors outside the selection; ``not_carried``: files beside the source that stay behind.
    """

    source: str
    target: str
    source_format: str
    target_format: str
    source_dialect: str
    target_dialect: str
    family: str
    modules: tuple[ModuleRow, ...]
    tensors: int
    tensors_read: int
    nbytes: int
    steps: int
    peak_bytes: int
    seconds: float
    left_out: tuple[tuple[str, str], ...]
    unselected: tuple[str, ...]
    not_carried: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    rounding: tuple[RoundingRow, ...]
    compressed: tuple[CompressedRow, ...]
    digest: str
    dry_run: bool

    def as_json(self) -> dict[str, object]:
        """Return the JSON document of ``lorabridge convert --json``."""
        return {"schema": "lorabridge/convert/1", **asdict(self)}

    def summary(self) -> str:
        """Return one line: what went where."""
        done = "would convert" if self.dry_run else "converted"
        from ..reports.plain import count

        kind = f"{count(len(self.modules), 'module')}, " if self.modules else ""
        return (
            f"{done} {kind}{count(self.tensors, 'tensor')} ({self.source_dialect} {self.source_format} -> "
            f"{self.target_dialect} {self.target_format}) to {self.target}"
        )

    def _repr_html_(self) -> str:
        from ..reports.plain import table_html

        rows: Iterable[tuple[str, ...]] = (
            (m.path, m.kind, str(m.rank), f"{m.alpha:g}", f"{m.scaling:g}", m.features) for m in self.modules
        )
        return table_html(self.summary(), ("module", "kind", "rank", "alpha", "scaling", ""), rows)
