"""Writing bare factor pairs: names of tensors, and the facts that the names cannot say."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from ..axes import Expr
from .adapter import Adapter, Extra, Fact, Facts, LoraModule, Value
from .factors import as_written
from .pairs import EMBEDDING_WEIGHTS, TOKENS


@dataclass(frozen=True, slots=True)
class Spelled:
    """One written module: as it stands in the file, its tensors, the enabled blocks of a MergedLinear, notes."""

    module: LoraModule
    tensors: tuple[tuple[str, Expr], ...]
    enable: tuple[bool, ...] = ()
    notes: tuple[str, ...] = ()


def spell_extras(extras: Iterable[Extra], *, below_conv: Collection[str] = ()) -> list[tuple[str, Expr]]:
    """Name the tensors beside the factors; those of adapted convolutions lie below ``.conv`` in loralib."""
    out = []
    for extra in extras:
        below = extra.path in below_conv and extra.parameter in ("weight", "bias")
        dot = f"{extra.path}." if extra.path else ""
        tokens = f"{dot}{TOKENS}" if extra.kind == "trainable_tokens" else extra.name
        out.append((f"{dot}conv.{extra.parameter}" if below else tokens, extra.value))
    return out


def name_tables(adapter: Adapter, name: str) -> tuple[Extra, ...]:
    """Return the extras with the tables of adapted embeddings under the name that a target's embedding gives them.

    torch says ``weight`` and MindSpore ``embedding_table``; a name that a family table chose for MindSpore stays.
    """
    adapted = {module.path for module in adapter.modules if module.kind == "embedding"}
    others = EMBEDDING_WEIGHTS if name == "weight" else ("weight",)
    return tuple(
        replace(extra, parameter=name)
        if extra.path in adapted and extra.parameter in others and extra.kind != "trainable_tokens"
        else extra
        for extra in adapter.extras
    )


def facts_about(adapter: Adapter, spelled: Sequence[Spelled]) -> Facts:
    """State what the written file cannot say: per field the usual value for all modules, and who differs."""
    stated = [(item.module.path, _statements(item)) for item in spelled]
    usual: dict[str, Value] = {}
    for key in stated[0][1] if stated else ():
        values = [facts[key] for _, facts in stated if key in facts]
        if len(values) == len(stated):
            counts = Counter(repr(value) for value in values)
            usual[key] = max(values, key=lambda value: counts[repr(value)])
    own = [
        Fact(glob.escape(path), key, value)
        for path, facts in stated
        for key, value in facts.items()
        if key not in usual or usual[key] != value
    ]
    common = [Fact("*", key, value) for key, value in usual.items()]
    paths = {item.module.path for item in spelled}
    if any(extra.kind == "base" and extra.path in paths and extra.parameter != "bias" for extra in adapter.extras):
        common.append(Fact("*", "merged", adapter.merged))
    return Facts((*own, *common))


def _statements(item: Spelled) -> dict[str, Value]:
    module = item.module
    facts: dict[str, Value] = {"alpha": as_written(module.scaling.alpha), "kind": module.kind}
    if module.scaling.rslora:
        facts["use_rslora"] = True
    if module.fan_in_fan_out is not None and module.kind == "linear":
        facts["fan_in_fan_out"] = module.fan_in_fan_out
    if item.enable:
        facts["enable_lora"] = list(item.enable)
    if module.kind.startswith("conv"):
        facts["conv_form"] = module.conv_form
        facts["kernel_size"] = list(module.kernel_size)
        facts["groups"] = module.groups
    return facts
