"""MindPet 1.0.4: ``P.mindpet_delta_lora_a[r, in]`` and ``P.mindpet_delta_lora_b[out, r]`` of a LoRADense.

A LoRADense that is itself the network keeps its parameters' upper-case names (``mindpet_delta_lora_A``); checkpoints
of the time when the package was called tk say ``tk_delta_lora_a``. There is one rank and one alpha for all layers
(scaling ``alpha / rank``), stored nowhere. ``TrainableParamsCheckPoint`` also saves the optimizer's state.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ..axes import Expr
from ..errors import counted
from . import factors
from .adapter import Adapter, Content, Fact, Facts, LoraModule, Written
from .loralib import parse_bare
from .pairs import MERGE, Names, Problems, group
from .spelling import spell_extras

ROLES = {
    f"{root}_delta_lora_{letter}": (letter.lower(), "weight")
    for root in ("mindpet", "tk")
    for letter in ("a", "b", "A", "B")
}
OTHER = ("mindpet_delta_", "tk_delta_")


class Mindpet:
    """Read and write LoRADense parameters; linear layers with one global rank and alpha."""

    name = "mindpet"
    framework: Literal["torch", "mindspore"] = "mindspore"

    def detect(self, content: Content) -> str | None:
        """Claim files with MindPet's (or tk's) LoRA names."""
        found = [name for name in content.specs if name.rpartition(".")[2] in ROLES]
        return f"{counted(len(found), 'parameter')} such as {found[0]}" if found else None

    def parse(self, content: Content) -> Adapter:
        """Read every LoRADense; a MappingError names mixed spellings and MindPet's other algorithms."""
        found = group(content, ROLES)
        _check_names(content, found)
        known = Facts((Fact("*", "kind", "linear"), Fact("*", "enable_lora", [True])))
        never = Facts((Fact("*", "merged", False),))  # MindPet has no way to merge
        return parse_bare(replace(content, facts=known.then(content.facts).then(never)), found)

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell linear modules with one rank and alpha (see ``factors.uniform``).

        ``facts`` may state ``rank`` and ``alpha`` for ``*``. Raises MappingError for all that a LoRADense is not.
        """
        _refuse(adapter)
        rank, alpha = facts.get("*", "rank"), facts.get("*", "alpha")
        modules, top, shared, notes = factors.uniform(
            adapter.modules,
            rank=rank if isinstance(rank, int) else None,
            alpha=float(alpha) if isinstance(alpha, int | float) else None,
        )
        tensors = [pair for module in modules for pair in _named(module)] + spell_extras(adapter.extras)
        whole = int(shared) if shared == int(shared) else shared
        said = [Fact("*", "rank", top), Fact("*", "alpha", whole)]
        orders = {module.path: module.fan_in_fan_out for module in modules if module.fan_in_fan_out is not None}
        if len(orders) == len(modules) and len(set(orders.values())) == 1:
            said.append(Fact("*", "fan_in_fan_out", next(iter(orders.values()))))
        if any(extra.kind == "base" and extra.path in {m.path for m in modules} for extra in adapter.extras):
            said.append(Fact("*", "merged", False))
        if shared != int(shared):
            notes = (*notes, f"alpha {shared!r} is not an integer, which MindPet accepts and MindFormers' tools round")
        needs = f"build the network with lora_rank={top} and lora_alpha={whole}: the file cannot say them"
        return Written(tensors, facts=Facts(tuple(said)), notes=(needs, *notes), modules=modules)


def _named(module: LoraModule) -> tuple[tuple[str, Expr], tuple[str, Expr]]:
    (term,) = module.terms
    if not module.path:
        return (("mindpet_delta_lora_A", term.a), ("mindpet_delta_lora_B", term.b))
    return ((f"{module.path}.mindpet_delta_lora_a", term.a), (f"{module.path}.mindpet_delta_lora_b", term.b))


def _check_names(content: Content, found: Names) -> None:
    """Refuse two spellings in one file (two adapters, or a half-renamed one) and MindPet's other algorithms."""
    problems = Problems()
    last = {spec.name.rpartition(".")[2]: spec.name for tensors in found.pairs.values() for spec in tensors.values()}
    styles = {name[:-1] + ("a" if name[-1].islower() else "A"): full for name, full in last.items()}
    if len(styles) > 1:
        problems.add(
            "two spellings of MindPet's LoRA names in one file", ", ".join(styles.values()), "rename one of them"
        )
    for path, tensors in ((path, t) for (path, _), t in found.pairs.items()):
        a, b = tensors["a"].shape, tensors["b"].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            problems.add("shapes are not those of a LoRADense", f"{path}: {list(a)} and {list(b)}", "check --from")
    for name in found.rest:
        part = next((part for part in name.split(".") if part.startswith(OTHER)), None)
        if part is not None:
            problems.add(
                f"{part} belongs to another algorithm than LoRA", name, "save the LoRA parameters by themselves"
            )
    problems.raise_any(content.path)


def _refuse(adapter: Adapter) -> None:
    problems = Problems("properties of the adapter have no place in MindPet")
    merge = f"{MERGE}, or choose --to loralib-ms"
    for module in adapter.modules:
        if module.kind != "linear":
            problems.add(f"MindPet has no LoRA for {module.kind}", module.path, merge)
        elif module.weight != "weight":
            problems.add(f"MindPet has no LoRA for {module.weight}", module.path, merge)
        if module.magnitude is not None:
            problems.add("MindPet has no DoRA magnitude", module.path, merge)
        if module.lora_bias is not None:
            problems.add("MindPet has no bias on the B factor", module.path, merge)
    for extra in adapter.extras:
        if extra.kind == "trainable_tokens":
            problems.add("MindPet has no trainable token rows", extra.name, merge)
    if adapter.merged and any(extra.kind == "base" for extra in adapter.extras):
        problems.add(
            "the base weights already contain the adapter, and a LoRADense would add it again",
            "base weights",
            "leave the base out with --adapter-only",
        )
    problems.raise_any()
