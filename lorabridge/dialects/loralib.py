"""loralib (microsoft/LoRA 0.1.2): factors as bare parameters ``P.lora_A``, ``P.lora_B`` of the layer that replaces P.

Layers and shapes (loralib/layers.py): Linear ``A[r, in]``, ``B[out, r]``; MergedLinear ``A[r*n, in]``,
``B[out//L*n, r]`` for n enabled of L blocks; Embedding ``A[r, num]``, ``B[dim, r]``; ConvLoRA ``A[r*k, in*k]``,
``B[out//groups*k, r*k]`` with the convolution itself one level below (``P.conv.weight``). In the hub a convolution
is called P, as the nn.Conv2d it replaces, so ``P.conv.weight`` and ``P.conv.bias`` become ``P.weight`` and ``P.bias``.
A file says nothing but tensors; alpha, enabled blocks, kernel and merged state come from facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from ..axes import Expr
from ..errors import MappingError, counted
from . import factors
from .adapter import Adapter, Content, Facts, LoraModule, Written
from .pairs import MERGE, Names, Problems, Reader, extras, group, in_mindspore, merged_state
from .readings import read_pair
from .spelling import Spelled, facts_about, name_tables, spell_extras

ROLES = {"lora_A": ("a", "weight"), "lora_B": ("b", "weight")}


class Loralib:
    """Read and write what ``loralib.lora_state_dict`` or a whole ``state_dict`` holds."""

    name = "loralib"
    framework: Literal["torch", "mindspore"] = "torch"

    def detect(self, content: Content) -> str | None:
        """Claim files with bare ``lora_A`` parameters that are not MindSpore's."""
        return None if in_mindspore(content) else bare_names(content)

    def parse(self, content: Content) -> Adapter:
        """Read modules from names, shapes and facts; raise one MappingError for everything that is missing or odd."""
        return parse_bare(content, group(content, ROLES))

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell an adapter as loralib's layers name it; what the file cannot say is in ``Written.facts``.

        Raises MappingError for DoRA, lora_bias, attention's fused input projection and conv factors that loralib
        cannot run.
        """
        _refuse(adapter)
        spelled = [_spell(module, facts) for module in adapter.modules]
        conv = {item.module.path for item in spelled if item.module.kind.startswith("conv")}
        tensors = [pair for item in spelled for pair in item.tensors]
        tensors += spell_extras(name_tables(adapter, "weight"), below_conv=conv)
        notes = tuple(note for item in spelled for note in item.notes)
        modules = tuple(item.module for item in spelled)
        return Written(tensors, facts=facts_about(adapter, spelled), notes=notes, modules=modules)


def bare_names(content: Content) -> str | None:
    """Return what shows bare factor parameters: names that end in ``lora_A`` and ``lora_B`` without ``.weight``."""
    last = {name.rpartition(".")[2] for name in content.specs}
    if "lora_E" in last:  # AdaLoRA, whose A and B are bare too
        return None
    found = [name for name in content.specs if name.rpartition(".")[2] in ("lora_A", "in_proj_lora_A")]
    found = [name for name in found if ".loras." not in name]  # AdapterHub's
    return f"{counted(len(found), 'bare parameter')} such as {found[0]}" if found else None


def parse_bare(content: Content, names: Names) -> Adapter:
    """Read every pair of a file and classify the rest; shared with loralib-ms."""
    if not names.pairs:
        raise MappingError("the file holds no lora_A and lora_B", where=content.path, hint="check --from")
    reader = Reader(content, names.rest)
    found = [read_pair(reader, path, weight, specs) for (path, weight), specs in names.pairs.items()]
    modules = tuple(module for module in found if module is not None)
    merged = merged_state(reader, modules)
    reader.problems.raise_any(content.path)
    warnings = names.warnings
    if merged:
        warnings = (*warnings, "the base weights in the file already contain the adapter: do not add it again")
    beside = tuple(extras(content, names.rest, modules))
    return Adapter(modules, beside, dict(content.config or {}), names.left_out, warnings, bool(merged))


def _refuse(adapter: Adapter) -> None:
    problems = Problems("properties of the adapter have no place in loralib")
    merge = f"{MERGE}, or choose --to peft or loralib-ms"
    for module in adapter.modules:
        if module.weight != "weight":
            problems.add(f"loralib has no layer for {module.weight}", module.path, merge)
        if module.magnitude is not None:
            problems.add("loralib has no DoRA magnitude", module.path, merge)
        if module.lora_bias is not None:
            problems.add("loralib has no bias on the B factor", module.path, merge)
    for extra in adapter.extras:
        if extra.kind == "trainable_tokens":
            problems.add("loralib has no trainable token rows", extra.name, merge)
    problems.raise_any()


def _spell(module: LoraModule, facts: Facts) -> Spelled:
    item = spell_pair(factors.conv_to_loralib(module), facts)
    plain = factors.plain_scaling(item.module)
    return replace(item, module=replace(item.module, scaling=plain))


def spell_pair(module: LoraModule, facts: Facts) -> Spelled:
    """Name one module's factors, padded to a stated rank; several blocks become a MergedLinear where they can."""
    notes: tuple[str, ...] = ()
    enable: tuple[bool, ...] = ()
    if not module.plain:
        try:
            enable = factors.as_merged(module)[2]
        except MappingError:
            ranks = [term.rank for term in module.terms]
            module = factors.grow(module)
            notes = (f"{module.path}: blocks of rank {ranks} became one pair of rank {module.terms[0].rank}",)
    wanted = facts.get(module.path, "rank")
    if isinstance(wanted, int) and wanted > module.scaling.rank:
        notes = (*notes, f"{module.path}: rank {module.scaling.rank} padded with zeros to {wanted}")
        module = factors.pad_rank(module, wanted)
    a, b = factors.as_merged(module)[:2] if enable else (module.terms[0].a, module.terms[0].b)
    chosen = facts.get(module.path, "enable_lora")
    if enable and isinstance(chosen, list) and tuple(chosen) != enable and sum(map(bool, chosen)) == sum(enable):
        raise MappingError(
            f"the enabled blocks are {list(enable)}, not {chosen}", where=module.path, hint="correct --enable-lora"
        )
    return Spelled(module, tuple(named(module, {"lora_A": a, "lora_B": b}).items()), enable, notes)


def named(module: LoraModule, parameters: Mapping[str, Expr]) -> dict[str, Expr]:
    """Return parameters under their full names; those of attention's input projection begin with ``in_proj_``.

    Other weights with a name of their own (``embedding_table``) are the only ones of their cell.
    """
    dot = f"{module.path}." if module.path else ""
    stem = "in_proj_" if module.weight == "in_proj_weight" else ""
    return {f"{dot}{stem}{name}": expr for name, expr in parameters.items()}
