"""Spell an adapter as sd-scripts does, so that it, its successors and diffusers' importers read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..arithmetic import products
from ..axes import Expr, reshape
from ..dtypes import BY_NAME
from . import factors, flattened
from .adapter import Adapter, Facts, LoraModule, Written
from .pairs import MERGE, Problems

MODULE = "networks.lora"
"""What sd-scripts calls the network of such a file (``ss_network_module``)."""


def write(adapter: Adapter, facts: Facts) -> Written:
    """Return the tensors, sorted by module, and sd-scripts' metadata.

    Shapes: ``lora_down.weight`` ``[rank, in, *kernel]``, ``lora_up.weight`` ``[out, rank, 1, ...]``, ``alpha`` one
    float32, ``dora_scale`` ``[out, 1, ...]``. ``facts`` may state ``names_of`` for a pipeline's spelling. MappingError
    for everything sd-scripts has no place for, and for modules that two pipelines spell differently.
    """
    modules = [_plain(module) for module in adapter.modules]
    _refuse(modules, adapter)
    only = facts.get("*", "names_of")
    named = only if isinstance(only, str) and any(p.name == only for p in flattened.PIPELINES) else None
    spelling = flattened.spell({m.path: _axes(m) for m in modules}, named)
    tensors = [item for module in modules for item in _tensors(spelling.names[module.path], module)]
    notes = list(factors_notes(adapter.modules, modules))
    if spelling.pipeline is None:
        notes.append("the modules are those of no pipeline that is known: their paths are flattened as they are")
    metadata = _metadata(modules, spelling.pipeline)
    return Written(tensors, notes=tuple(notes), modules=modules, metadata=metadata)


def split(modules: Sequence[LoraModule], fused: Mapping[str, str]) -> list[LoraModule]:
    """Carry modules that are several of diffusers' through the table that says so; the others stay as they are.

    ``fused``: path in the original naming, its component before it, to the table's name.
    """
    out = [module for module in modules if module.path not in fused]
    for table in dict.fromkeys(fused.values()):
        from ..families.tables import load_family, map_adapter

        mine = [module for module in modules if fused.get(module.path) == table]
        bare = tuple(replace(module, path=module.path.partition(".")[2]) for module in mine)
        out += map_adapter(load_family(table), Adapter(bare), to="hf", sizes={}).modules
    return out


def factors_notes(before: Sequence[LoraModule], after: Sequence[LoraModule]) -> list[str]:
    """Say whose rank grew because several terms became one pair."""
    return [
        f"{new.path}: {len(old.terms)} blocks became one pair of rank {new.terms[0].rank}, exactly"
        for old, new in zip(before, after, strict=True)
        if len(old.terms) > 1
    ]


def _plain(module: LoraModule) -> LoraModule:
    """Return the module as one pair with a plain ``alpha / rank``."""
    single = factors.single_pair(module, "peft")
    return replace(single, scaling=factors.plain_scaling(single))


def _axes(module: LoraModule) -> tuple[int, ...]:
    return module.out, module.terms[0].a.shape[1], *module.kernel_size


def _tensors(name: str, module: LoraModule) -> list[tuple[str, Expr]]:
    (term,) = module.terms
    tensors = [
        (f"{name}.alpha", products.constant(module.scaling.alpha, BY_NAME["float32"])),
        (f"{name}.lora_down.weight", term.a),
        (f"{name}.lora_up.weight", term.b),
    ]
    if module.magnitude is not None:
        ones = (1,) * max(1, len(module.kernel_size) + 1)
        tensors.append((f"{name}.dora_scale", reshape(module.magnitude, (module.out, *ones))))
    return tensors


def _metadata(modules: Sequence[LoraModule], pipeline: flattened.Pipeline | None) -> dict[str, str]:
    """Return ``ss_network_*`` as sd-scripts' tools expect it; "Dynamic" where modules differ, as its resize writes."""
    ranks = {module.terms[0].rank for module in modules}
    alphas = {module.scaling.alpha for module in modules}
    metadata = {
        "ss_network_module": MODULE,
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }
    if pipeline is not None:
        metadata["ss_base_model_version"] = pipeline.version
    return metadata


def _refuse(modules: Sequence[LoraModule], adapter: Adapter) -> None:
    problems = Problems("properties of the adapter have no place in sd-scripts' files")
    for module in modules:
        if module.kind == "embedding":
            problems.add("sd-scripts has no LoRA for embeddings", module.path, MERGE)
        if module.weight != "weight":
            problems.add(f"sd-scripts has no LoRA for {module.weight}", module.path, MERGE)
        if module.lora_bias is not None:
            problems.add("sd-scripts has no bias on the B factor", module.path, MERGE)
        if module.groups != 1:
            problems.add("sd-scripts has no LoRA for grouped convolutions", module.path, MERGE)
    for extra in adapter.extras:
        problems.add("sd-scripts' files hold factors only", extra.name, "leave such tensors out with --exclude")
    problems.raise_any()
