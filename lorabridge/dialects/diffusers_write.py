"""Spell an adapter as diffusers' newest files do, alpha in the metadata or multiplied into B."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..axes import Expr, scale
from ..dtypes import BY_NAME
from ..errors import MappingError, counted
from . import factors, peft_write
from .adapter import Adapter, Extra, Facts, LoraModule, Scaling, Written
from .diffusers_names import COMPONENTS, IMPLIED

METADATA = "lora_adapter_metadata"
"""The key of the safetensors metadata under which diffusers 0.34 and later keep every component's LoraConfig."""


def write(adapter: Adapter, facts: Facts) -> Written:
    """Return the tensors of all components and, where alpha is not in them, the metadata that states it.

    The fact ``alpha_in`` decides: "weights" multiplies the scaling into B (by a power of two exactly but for numbers
    that vanish, else rounded once to float32 at least, which a note says) and pads ranks that differ, so that readers
    of every version agree; "config" keeps the factors as they are. Without it the weights are chosen where that changes
    no rank and every scaling is a power of two. MappingError: modules of no component, and what peft cannot express.
    """
    parts = _parts(adapter)
    chosen = facts.get("*", "alpha_in")
    inside = chosen == "weights" or (chosen != "config" and all(part.foldable for part in parts))
    tensors: list[tuple[str, Expr]] = []
    notes: list[str] = []
    modules: list[LoraModule] = []
    metadata: dict[str, object] = {}
    for part in parts:
        ready, said = folded(part.modules) if inside else (part.modules, [])
        made = peft_write.write(Adapter(tuple(ready), part.extras), facts)
        for name, expr in made.tensors:
            tensors.append((f"{part.component}.{name.removeprefix(peft_write.PREFIX)}", expr))
        modules += [replace(module, path=f"{part.component}.{module.path}") for module in made.modules]
        metadata.update({f"{part.component}.{key}": value for key, value in (made.config or {}).items()})
        notes += [*said, *made.notes]
    if inside:
        return Written(tensors, notes=tuple(notes), modules=modules)
    notes.append(
        f"alpha is in the metadata ({METADATA}), which diffusers reads from 0.34 on; --alpha-in weights is older"
    )
    text = json.dumps(metadata, indent=2, sort_keys=True)
    return Written(tensors, notes=tuple(notes), modules=modules, metadata={METADATA: text})


@dataclass(frozen=True, slots=True)
class _Part:
    """One component's modules and extras, with paths inside it."""

    component: str
    modules: tuple[LoraModule, ...]
    extras: tuple[Extra, ...]

    @property
    def foldable(self) -> bool:
        """All ranks are one and every scaling is a power of two: no digit changes, and no reader can misread it."""
        pairs = [factors.single_pair(module, "peft") for module in self.modules]
        one = len({pair.terms[0].rank for pair in pairs}) <= 1
        return one and all(abs(math.frexp(pair.scaling.value)[0]) == 0.5 for pair in pairs)


def _parts(adapter: Adapter) -> list[_Part]:
    found: dict[str, tuple[list[LoraModule], list[Extra]]] = {}
    lost = []
    for module in adapter.modules:
        component, path = _inside(module.path)
        if not component:
            lost.append(module.path)
        found.setdefault(component, ([], []))[0].append(replace(module, path=path))
    for extra in adapter.extras:
        component, path = _inside(extra.path)
        if not component:
            lost.append(extra.name)
        found.setdefault(component, ([], []))[1].append(replace(extra, path=path))
    if lost:
        raise MappingError(
            "the names do not say which network of a pipeline they belong to",
            where=lost,
            hint=f"rename them to begin with one of {', '.join(COMPONENTS)}",
        )
    empty = [component for component, (modules, _) in found.items() if not modules]
    if empty:
        raise MappingError(
            "a component has no factors, only whole parameters, which diffusers does not load from such a file",
            where=empty,
            hint="leave them out with --exclude",
        )
    return [_Part(name, tuple(modules), tuple(extras)) for name, (modules, extras) in found.items()]


def _inside(path: str) -> tuple[str, str]:
    """Return (component, path inside it); "" where the name does not say."""
    first, _, rest = path.partition(".")
    return (first, rest) if first in COMPONENTS else (IMPLIED.get(first, ""), path)


def folded(modules: Sequence[LoraModule]) -> tuple[list[LoraModule], list[str]]:
    """Give all modules one rank and the scaling 1, by zeros and by multiplying B."""
    pairs = [factors.single_pair(module, "peft") for module in modules]
    top = max(pair.terms[0].rank for pair in pairs)
    out, notes, said = [], [], Counter[str]()
    for module, pair in zip(modules, pairs, strict=True):
        value = pair.scaling.value
        if not math.isfinite(value):
            raise MappingError(f"a scaling of {value}", where=module.path, hint="correct alpha")
        wide = replace(pair, scaling=Scaling(float(pair.terms[0].rank), pair.terms[0].rank))
        if pair.terms[0].rank != top:
            wide = factors.pad_rank(wide, top)
            notes.append(f"{module.path}: rank {pair.terms[0].rank} became {top} with zeros, so that all have one")
        (term,) = wide.terms
        bias = None if wide.lora_bias is None else _times(wide.lora_bias, value)
        out.append(replace(wide, terms=(replace(term, b=_times(term.b, value)),), lora_bias=bias))
        if value != 1.0:
            how = "a power of two" if abs(math.frexp(value)[0]) == 0.5 else "rounded once to float32 or wider"
            said[f"scaling {value!r} multiplied into B, {how}"] += 1
    return out, [*notes, *(f"{note} ({counted(count, 'module')})" for note, count in said.items())]


def _times(x: Expr, value: float) -> Expr:
    if value == 1.0:
        return x
    exact = abs(math.frexp(value)[0]) == 0.5
    return scale(x, value, x.dtype if exact or x.dtype.name == "float64" else BY_NAME["float32"])
