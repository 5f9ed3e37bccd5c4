"""Recognise factors by their names alone, for files that no dialect can parse as they are."""

from __future__ import annotations

from collections.abc import Mapping

from ..tensors import TensorSpec
from .inspect_report import InspectedModule, Pair, TensorRow

# (ending of A, ending of B): peft, loralib and loralib-ms, MindPet, old MindPet, diffusers and kohya.
ENDINGS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_embedding_A", ".lora_embedding_B"),
    (".lora_A", ".lora_B"),
    (".mindpet_delta_lora_a", ".mindpet_delta_lora_b"),
    (".tk_delta_lora_a", ".tk_delta_lora_b"),
    (".lora_down.weight", ".lora_up.weight"),
)
MISSING = TensorRow("", "missing", ())


def loose_pairs(specs: Mapping[str, TensorSpec]) -> tuple[InspectedModule, ...]:
    """Pair tensors whose names end as factors do; a half without its other half is shown with shape [].

    The rank is the length that A's rows and B's columns share, and None where they do not.
    """
    found: dict[str, dict[int, TensorSpec]] = {}
    for name, spec in specs.items():
        for side, ending in ((side, pair[side]) for pair in ENDINGS for side in (0, 1)):
            if name.endswith(ending):
                found.setdefault(name[: -len(ending)], {})[side] = spec
                break
    return tuple(_module(path, halves.get(0), halves.get(1)) for path, halves in found.items())


def _module(path: str, a: TensorSpec | None, b: TensorSpec | None) -> InspectedModule:
    fits = a is not None and b is not None and len(a.shape) > 1 < len(b.shape) and a.shape[0] == b.shape[1]
    pair = Pair(_row(a), _row(b), 0, b.shape[0] if b is not None and b.shape else 0)
    feature = "no lora_B" if b is None else "no lora_A" if a is None else "" if fits else _misfit(a, b)
    rank = a.shape[0] if fits and a is not None else None
    return InspectedModule(path, "unknown", rank, None, None, (pair,), (feature,) if feature else ())


def _misfit(a: TensorSpec, b: TensorSpec) -> str:
    """Say what a pair is whose ranks differ: a MergedLinear holds the rows of A of several blocks."""
    count = a.shape[0] // b.shape[1] if len(a.shape) == len(b.shape) == 2 and b.shape[1] else 0
    whole = count > 1 and a.shape[0] == count * b.shape[1] and b.shape[0] % count == 0
    return f"MergedLinear of {count} blocks?" if whole else "shapes do not fit"


def _row(spec: TensorSpec | None) -> TensorRow:
    return TensorRow(spec.name, spec.dtype.name, spec.shape) if spec is not None else MISSING
