"""Spell an adapter in the names of a diffusion model's original code, so that ComfyUI and diffusers read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..arithmetic import products
from ..axes import Expr, read, reshape, scale
from ..dtypes import BY_NAME
from ..errors import MappingError
from ..tensors import TensorSpec
from . import factors, flattened_spelling, flattened_tables, kohya_write
from .adapter import Adapter, Extra, Facts, LoraModule, Written
from .diffusers_write import folded
from .pairs import MERGE, Problems

WITHOUT_ALPHA = ("hunyuan_video",)
"""Pipelines for which diffusers 0.42.1 reads no alpha in files of the original names."""
COMFY = flattened_tables.DOTTED["lora_unet_"]
_PROCESSORS = {
    "img_attn.qkv": "processor.qkv_lora1", "txt_attn.qkv": "processor.qkv_lora2",
    "img_attn.proj": "processor.proj_lora1", "txt_attn.proj": "processor.proj_lora2",
    "linear1": "processor.qkv_lora", "linear2": "processor.proj_lora",
}  # fmt: skip


def write(adapter: Adapter, facts: Facts, dialect: str) -> Written:
    """Return the tensors, sorted by module.

    Shapes: factors as in ``kohya``; ``diff_b`` and ``lora_B.bias`` ``[out]``. ``facts`` may state ``names_of`` for the
    pipeline whose names these are, and ``alpha_in`` "weights" for ``comfy``: then, and always for ``bfl`` and
    ``xlabs``, which have no alpha, and for HunyuanVideo, the scaling is multiplied into B (exactly for powers of two,
    else rounded once, which a note says) and all ranks become one. MappingError for everything a dialect has no place
    for, and for modules of no known model.
    """
    _refuse(adapter, dialect)
    only = facts.get("*", "names_of")
    axes = {m.path: (m.out, m.terms[0].a.shape[1], *m.kernel_size) for m in adapter.modules}
    spelling = flattened_spelling.spell(axes, only if isinstance(only, str) else None, dotted=True)
    if spelling.pipeline is None:
        known = ", ".join(pipeline.name for pipeline in flattened_tables.PIPELINES)
        raise MappingError(
            "the original code's names of these modules are not known", where=list(axes),
            hint=f"known: {known}; write them with --to diffusers",
        )  # fmt: skip
    named = [(spelling.names[m.path], m) for m in adapter.modules if m.path in spelling.names]
    for table in dict.fromkeys(spelling.fused.values()):
        fused = kohya_write.through([m for m in adapter.modules if spelling.fused.get(m.path) == table], table, to="ms")
        named += [(spelling.named(table, m.path), m) for m in fused]
    named = [(_renamed(name, dialect), _whole(module, dialect)) for name, module in sorted(named, key=lambda x: x[0])]
    notes = kohya_write.grown(adapter.modules, [module for _, module in named])
    plain = dialect == "comfy" and spelling.pipeline.name not in WITHOUT_ALPHA
    if not plain or facts.get("*", "alpha_in") == "weights":
        ready, said = folded([module for _, module in named])
        named = [(name, module) for (name, _), module in zip(named, ready, strict=True)]
        notes += said
        plain = False
    tensors = [item for name, module in named for item in _tensors(name, module, dialect, alpha=plain)]
    extras = through_extras(adapter.extras, [spelling.pipeline.name], to="ms")
    tensors += [(extra.name, extra.value) for extra in extras]
    modules = [replace(module, path=name) for name, module in named]
    return Written(tensors, notes=tuple(notes), modules=modules)


def through_extras(
    given: Mapping[str, TensorSpec] | Sequence[Extra], pipelines: Sequence[str], *, to: flattened_tables.SideName
) -> tuple[Extra, ...]:
    """Carry whole parameters of a pipeline's first network through its table; diffusers' have the component before.

    ``given``: extras, or headers by name. MappingError where there are any and no pipeline is known.
    """
    from ..families.tables import load_family, map_adapter

    if not given:
        return ()
    if not pipelines:
        where = [extra.name for extra in given] if not isinstance(given, Mapping) else list(given)
        raise MappingError("whole norms of no known model", where=where, hint="remove them, or name it with --names-of")
    part = flattened_tables.pipeline_named(pipelines[0]).parts[0]
    extras = extras_of(given) if isinstance(given, Mapping) else tuple(given)
    bare = tuple(replace(extra, path=extra.path.removeprefix(f"{part.component}.")) for extra in extras)
    made = map_adapter(load_family(part.table), Adapter((), bare), to=to, sizes={}, layout={"hf_prefix": ""}).extras
    return made if to == "ms" else tuple(replace(e, path=f"{part.component}.{e.path}") for e in made)


def extras_of(wholes: Mapping[str, TensorSpec]) -> tuple[Extra, ...]:
    """Return whole parameters as extras that replace the base's."""
    split = ((name.rpartition("."), spec) for name, spec in wholes.items())
    return tuple(Extra(path, parameter, read(spec), "modules_to_save") for (path, _, parameter), spec in split)


def _renamed(name: str, dialect: str) -> str:
    """Return a module's name in a dialect; MappingError for one that XLabs' processors do not adapt."""
    if dialect == "comfy":
        return name
    bare = name.removeprefix(COMFY)
    if dialect == "bfl":
        return bare
    block, number, rest = bare.split(".", 2)
    if block not in ("double_blocks", "single_blocks") or rest not in _PROCESSORS:
        raise MappingError(
            "XLabs' processors adapt the attention of Flux only", where=bare,
            hint="leave the module out with --exclude, or write --to comfy",
        )  # fmt: skip
    return f"{block}.{number}.{_PROCESSORS[rest]}"


def _whole(module: LoraModule, dialect: str) -> LoraModule:
    """Return the module as one pair with a plain scaling; XLabs' of a single block on the attention's rows alone."""
    if dialect == "xlabs" and module.path.endswith(".linear1"):
        rows = module.out // 7 * 3
        if any(term.stop > rows for term in module.terms):
            raise MappingError(
                "XLabs' processors adapt the attention of Flux only, not the MLP of its single blocks",
                where=module.path, hint="leave proj_mlp out with --exclude, or write --to comfy",
            )  # fmt: skip
        module = replace(module, out=rows)
    single = factors.single_pair(module, "peft")
    return replace(single, scaling=factors.plain_scaling(single))


def _tensors(name: str, module: LoraModule, dialect: str, *, alpha: bool) -> list[tuple[str, Expr]]:
    (term,) = module.terms
    down, up = ("lora_down", "lora_up") if alpha else ("lora_A", "lora_B")
    if dialect == "xlabs":
        down, up = "down", "up"
    tensors = [(f"{name}.{down}.weight", term.a), (f"{name}.{up}.weight", term.b)]
    if alpha:
        tensors.append((f"{name}.alpha", products.constant(module.scaling.alpha, BY_NAME["float32"])))
    if module.lora_bias is not None:
        bias, factor = module.lora_bias, module.scaling.value
        if dialect == "comfy":
            tensors.append((f"{name}.diff_b", bias if factor == 1.0 else scale(bias, factor, bias.dtype)))
        else:
            tensors.append((f"{name}.lora_B.bias", bias))
    if module.magnitude is not None:
        ones = (1,) * max(1, len(module.kernel_size) + 1)
        tensors.append((f"{name}.dora_scale", reshape(module.magnitude, (module.out, *ones))))
    return tensors


def _refuse(adapter: Adapter, dialect: str) -> None:
    problems = Problems(f"properties of the adapter have no place in files of {dialect}")
    for module in adapter.modules:
        if module.kind == "embedding":
            problems.add(f"{dialect} has no LoRA for embeddings", module.path, MERGE)
        if module.weight != "weight":
            problems.add(f"{dialect} has no LoRA for {module.weight}", module.path, MERGE)
        if module.groups != 1:
            problems.add(f"{dialect} has no LoRA for grouped convolutions", module.path, MERGE)
        if dialect != "comfy" and module.path.startswith("text_encoder"):
            cure = "convert them into a file of their own (--include, --exclude), or write --to comfy"
            problems.add(f"{dialect} has no text encoders", module.path, cure)
        if dialect != "comfy" and module.magnitude is not None:
            problems.add(f"{dialect} has no DoRA", module.path, MERGE)
        if dialect == "xlabs" and module.lora_bias is not None:
            problems.add("xlabs has no bias on the B factor", module.path, MERGE)
    for extra in adapter.extras:
        if dialect != "bfl":
            problems.add(f"files of {dialect} hold factors only", extra.name, "leave such tensors out with --exclude")
    problems.raise_any()
