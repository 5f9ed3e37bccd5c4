"""Spell an adapter as sd-scripts does, so that it, its successors and diffusers' importers read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..arithmetic import products
from ..axes import Expr, reshape
from ..dtypes import BY_NAME
from . import factors, flattened_spelling, flattened_tables
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
    _refuse(adapter)
    only = facts.get("*", "names_of")
    named = only if isinstance(only, str) and any(p.name == only for p in flattened_tables.PIPELINES) else None
    spelling = flattened_spelling.spell({m.path: _axes(m) for m in adapter.modules}, named)
    named_modules = [(spelling.names[m.path], m) for m in adapter.modules if m.path in spelling.names]
    for table in dict.fromkeys(spelling.fused.values()):
        fused = through([m for m in adapter.modules if spelling.fused.get(m.path) == table], table, to="ms")
        named_modules += [(spelling.named(table, m.path), m) for m in fused]
    named_modules = [(name, _plain(module)) for name, module in sorted(named_modules, key=lambda item: item[0])]
    tensors = [item for name, module in named_modules for item in _tensors(name, module)]
    modules = [module for _, module in named_modules]
    notes = grown(adapter.modules, modules)
    if spelling.pipeline is None:
        notes.append(
            "the modules are those of no pipeline that is known: their paths are flattened as they are, and only this "
            "file's manifest, or the base model named with --names-of PATH, leads from the names back to modules"
        )
    metadata = _metadata(modules, spelling.pipeline)
    return Written(tensors, notes=tuple(notes), modules=modules, metadata=metadata)


def split(modules: Sequence[LoraModule], fused: Mapping[str, str]) -> list[LoraModule]:
    """Carry modules that are several of diffusers' through the table that says so; the others stay as they are.

    ``fused``: path in the original naming, its component before it, to the table's name.
    """
    out = [module for module in modules if module.path not in fused]
    for table in dict.fromkeys(fused.values()):
        out += through([module for module in modules if fused.get(module.path) == table], table, to="hf")
    return out


def through(modules: Sequence[LoraModule], table: str, *, to: flattened_tables.SideName) -> tuple[LoraModule, ...]:
    """Rename modules of one component by its table; those of diffusers' side have the component before them."""
    from ..families.tables import load_family, map_adapter

    loaded = load_family(table)
    component = modules[0].path.partition(".")[0]
    bare = tuple(replace(module, path=module.path.removeprefix(f"{component}.")) for module in modules)
    made = map_adapter(loaded, Adapter(bare), to=to, sizes={}, layout={"hf_prefix": ""}).modules
    return made if to == "ms" else tuple(replace(m, path=f"{component}.{m.path}") for m in made)


def grown(before: Sequence[LoraModule], after: Sequence[LoraModule]) -> list[str]:
    """Say which modules became one pair of a rank that no module had: several under one name, or several blocks."""
    ranks = {module.path: module.scaling.rank for module in before}
    return [
        f"{module.path}: one pair of rank {module.terms[0].rank} for several blocks, exactly"
        for module in after
        if ranks.get(module.path, max(ranks.values())) != module.terms[0].rank
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


def _metadata(modules: Sequence[LoraModule], pipeline: flattened_tables.Pipeline | None) -> dict[str, str]:
    """Return ``ss_network_*`` as sd-scripts' tools expect it; "Dynamic" where modules differ, as its resize writes."""
    ranks = {module.terms[0].rank for module in modules}
    alphas = {module.scaling.alpha for module in modules}
    metadata = {
        "ss_network_module": MODULE,
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }
    if pipeline is not None and pipeline.version:
        metadata["ss_base_model_version"] = pipeline.version
    return metadata


def _refuse(adapter: Adapter) -> None:
    problems = Problems("properties of the adapter have no place in sd-scripts' files")
    for module in adapter.modules:
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
