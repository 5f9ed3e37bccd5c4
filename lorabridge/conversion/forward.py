"""The forward direction: from a file's headers to the outputs of a conversion, without touching data.

Everything here is a function of names, shapes, configs and settings, so the same outputs can be planned again later
from a manifest alone; the way back relies on that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .. import dialects
from ..axes import Expr, cast, reads
from ..dialects import blockscales, deltas, experts, factors
from ..dialects.adapter import Adapter, Content, Dialect, Fact, Facts, Json, LoraModule, Written
from ..dialects.peft_config import unsupported_fields
from ..dialects.peft_write import of_part
from ..dtypes import BY_NAME, DType
from ..errors import MappingError, UsageError, counted
from ..names import natural_key
from .selection import Selection, select, tensors_of

if TYPE_CHECKING:
    from ..families.tables import Table


BASE_NAME = "base_model_name_or_path"
"""The field of peft's config that names the base model."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a conversion depends on beside the source's headers.

    ``compress``: per target module path the rank to which its factors are compressed (see ``factors.compress``).
    ``dequantize``: multiply float8 weights by the scales of their blocks (see ``dialects.blockscales``). ``base_name``:
    what the target calls the base model.
    """

    family: str = "identity"
    layout: Mapping[str, str] = field(default_factory=dict)
    mappings: Path | None = None
    model_config: Json | None = None
    target_facts: Facts = field(default_factory=Facts)
    selection: Selection = field(default_factory=Selection)
    adapter_only: bool = False
    dtype: DType | None = None
    on_overflow: str = "error"
    compress: Mapping[str, int] = field(default_factory=dict)
    dequantize: bool = False
    base_name: str | None = None


@dataclass(frozen=True, slots=True)
class Forward:
    """The outputs of a conversion and what is said about them.

    ``adapter``: in the target's names. ``unused``: (source tensor, reason) for what is left out on purpose;
    ``unselected``: source tensors outside the selection; ``ties``: (source tensor left out, source tensor it must
    equal bit for bit), to be checked before anything is written. ``modules``: as the dialect wrote them, where ranks
    and scalings may differ from those of ``adapter``. ``files``: see ``dialects.adapter.Written``.
    """

    adapter: Adapter
    outputs: tuple[tuple[str, Expr], ...]
    config: Json | None
    facts: Facts
    unused: tuple[tuple[str, str], ...]
    unselected: tuple[str, ...]
    notes: tuple[str, ...]
    ties: tuple[tuple[str, str], ...] = ()
    modules: tuple[LoraModule, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def forward(content: Content, source: Dialect, target: Dialect, settings: Settings) -> Forward:
    """Parse, select, map and spell one checkpoint.

    Raises MappingError for everything the target cannot express, with every tensor that is concerned.
    """
    adapter = source.parse(content)
    if target.framework == "torch":
        adapter = _without_texts(adapter)
    if settings.dequantize:
        adapter = blockscales.dequantized(adapter, settings.model_config, settings.dtype)
    _check_factors(adapter, target)
    adapter, unselected = select(adapter, settings.selection)
    if unselected:
        adapter = of_part(adapter)
    dropped = list(adapter.left_out)
    if settings.adapter_only and (adapter.modules or deltas.deltas(adapter)):
        base = [extra for extra in adapter.extras if extra.kind == "base"]
        dropped += [(name, "base weight, left out by --adapter-only") for name in tensors_of((), base)]
        adapter = replace(adapter, extras=tuple(e for e in adapter.extras if e.kind != "base"), merged=False)
    before = set(tensors_of(adapter.modules, adapter.extras))
    table = _table(source, target, settings)
    if table is not None:
        blockscales.refuse_scaled(adapter, "go through a table of names")
        settings = replace(settings, layout=_layout(table, settings))
    mapped = _relaid(adapter, source, target, settings) if table is None else _map(adapter, table, target, settings)
    ties = () if table is None else _ties(adapter, table, target, settings)
    after = set(tensors_of(mapped.modules, mapped.extras))
    dropped += _dropped_by_table(adapter, mapped, before - after)
    _check_expressible(mapped, target)
    if settings.compress:
        mapped = replace(mapped, modules=tuple(_compressed(mapped.modules, target, settings)))
    if settings.base_name is not None:
        mapped = replace(mapped, config={**mapped.config, BASE_NAME: settings.base_name})
    written = target.write(mapped, settings.target_facts.then(Facts((Fact("*", "table", settings.family),))))
    if settings.base_name is not None:
        _check_named(settings.base_name, written, target)
    tensors = sorted(written.tensors, key=lambda row: natural_key(row[0]))
    outputs = tuple((name, _typed(expr, settings)) for name, expr in tensors)
    _check_all_used(content, outputs, dropped, unselected)
    return Forward(
        mapped, outputs, written.config, written.facts, tuple(dropped), unselected, tuple(written.notes), ties,
        tuple(written.modules), written.files, written.metadata,
    )  # fmt: skip


def _check_named(name: str, written: Written, target: Dialect) -> None:
    """Refuse a name for the base model where nothing that is written says it."""
    said = [value for config in (written.config, written.metadata) for value in (config or {}).values()]
    if name not in said and not any(name in text for text in written.files.values()):
        raise UsageError(
            f"a file of {target.name!r} has no place for the base model's name", where=f"--base-name {name}",
            hint="leave --base-name out, or write a peft directory (--to peft)",
        )  # fmt: skip


def _check_factors(adapter: Adapter, target: Dialect) -> None:
    """Refuse to write a plain model as an adapter, and parameters of other algorithms than LoRA as one of LoRA."""
    if deltas.deltas(adapter) and target.name not in deltas.COUNTERPARTS:
        deltas.refuse_deltas(adapter, f"become a file of {target.name}")
    if not adapter.modules and target.name not in ("hf", "ms") and not deltas.deltas(adapter):
        raise MappingError(
            f"the checkpoint holds no LoRA factors that {target.name!r} could hold",
            where=f"{len(adapter.extras)} plain parameters",
            hint=f"convert it as a whole model with --to {'hf' if target.framework == 'torch' else 'ms'}",
        )


def _without_texts(adapter: Adapter) -> Adapter:
    """Leave out the strings that MindSpore's append_dict stores as records: no torch file has tensors of text."""
    texts = [extra for extra in adapter.extras if extra.value.dtype.kind == "text"]
    said = tuple((name, "a string, which only a .ckpt holds") for name in tensors_of((), texts))
    kept = tuple(extra for extra in adapter.extras if extra.value.dtype.kind != "text")
    return replace(adapter, extras=kept, left_out=(*adapter.left_out, *said)) if texts else adapter


def _table(source: Dialect, target: Dialect, settings: Settings) -> Table | None:
    """Return the table to go through; None where names stay as they are."""
    from ..families.tables import family_names, load_family

    names = dialects.naming(source), dialects.naming(target)
    if names[0] == names[1]:
        return None
    project = next((name for name in names if name not in ("hf", "ms")), "")
    if project and "hf" not in names:
        raise MappingError(
            f"no table leads from the names of {source.name} to those of {target.name}",
            hint="convert to peft first, and from there on",
        )
    if project and not settings.family.endswith(f"_{project}"):
        known = [name for name in family_names(settings.mappings) if name.endswith(f"_{project}")]
        raise MappingError(
            f"{project} has module names of its own, which a table has to lead to",
            where=f"tables: {', '.join(known) or 'none'}",
            hint="name one with --family; --config gives it the sizes of the base",
        )
    if settings.family == "identity" and not settings.layout:
        return None

    return load_family(settings.family, settings.mappings)


def _relaid(adapter: Adapter, source: Dialect, target: Dialect, settings: Settings) -> Adapter:
    """Return the adapter as the layouts that were asked for have it, where both sides have one project's names."""
    own = dialects.naming(source)
    if not settings.family or not settings.layout or not adapter.modules or own != dialects.naming(target):
        return adapter
    from ..families import tables

    table, config = tables.load_family(settings.family, settings.mappings), settings.model_config
    sizes = tables.sizes_from_config(table, config) if config else None
    return tables.relaid(table, adapter, side="hf" if own == "hf" else "ms", sizes=sizes, layout=settings.layout)


def _layout(table: Table, settings: Settings) -> Mapping[str, str]:
    from ..families.tables import layout_from_config

    return {**layout_from_config(table, settings.model_config or {}), **settings.layout}


def _map(adapter: Adapter, table: Table, target: Dialect, settings: Settings) -> Adapter:
    """Rename through the table; a full model must be complete on its own side first."""
    from ..families import pipelines, tables

    config = settings.model_config
    sizes = tables.sizes_from_config(table, config) if config else None
    to, side = _sides(target)
    beside = deltas.deltas(adapter)
    if not adapter.modules and not beside and not settings.selection and not _only_biases(adapter):
        named = [str(name) for name in config.get("architectures") or ()] if config else []  # type: ignore[union-attr]
        found = tables.check_complete(
            table, {extra.name: extra.value.shape for extra in adapter.extras}, side=side, sizes=sizes,
            layout=settings.layout, architecture=named[0] if named else "",
        )  # fmt: skip
        if found.problems:
            several = pipelines.advice(extra.name for extra in adapter.extras)
            raise MappingError(
                f"not a whole {table.family} model: {counted(len(found.problems), 'problem')}",
                where=found.problems,
                hint=several or "check --family and --config; select a part of a model with --include or --layers",
            )
    if not beside:
        return tables.map_adapter(table, adapter, to=to, sizes=sizes, layout=settings.layout)
    from .hosts import map_deltas

    others = replace(adapter, extras=tuple(extra for extra in adapter.extras if extra.kind != "delta"))
    mapped = tables.map_adapter(table, others, to=to, sizes=sizes, layout=settings.layout)
    moved = map_deltas(adapter, table, to=to, layout=settings.layout)
    return replace(mapped, extras=(*mapped.extras, *moved))


def _only_biases(adapter: Adapter) -> bool:
    """Say whether a file holds biases and nothing else, as BitFit trains them: it is no whole model."""
    return all(extra.parameter in ("bias", "beta") for extra in adapter.extras)


def _ties(adapter: Adapter, table: Table, target: Dialect, settings: Settings) -> tuple[tuple[str, str], ...]:
    """Return the source tensors that the table leaves out because they equal another one."""
    from ..families.tables import tied_checks

    read = {extra.name: next(iter(tensors_of((), (extra,))), "") for extra in adapter.extras}
    checks = tied_checks(table, read, side=_sides(target)[1], layout=settings.layout)
    return tuple((read[name], read[other]) for name, other in checks if other in read)


def _sides(target: Dialect) -> tuple[Literal["hf", "ms"], Literal["hf", "ms"]]:
    """Return the side that a target is on, and the other one."""
    return ("hf", "ms") if dialects.naming(target) == "hf" else ("ms", "hf")


def _check_expressible(adapter: Adapter, target: Dialect) -> None:
    """Refuse what means something in peft and would mean nothing, or something else, in the target."""
    if adapter.merged and target.name == "peft":
        raise MappingError(
            "the base weights in the file already hold the delta, and peft would add it again",
            where=[extra.name for extra in adapter.extras if extra.kind == "base"],
            hint="leave them out with --adapter-only",
        )
    stacks = dict.fromkeys(module.stack.parameter for module in adapter.modules if module.stack is not None)
    if stacks and target.name not in experts.DIALECTS:
        raise MappingError(
            f"dialect {target.name!r} has no factors of experts that one tensor holds",
            where=list(stacks),
            hint=f"choose {' or '.join(sorted(experts.DIALECTS))} with --to, merge the adapter into the base, or leave "
            "these modules out with --exclude",
        )
    if target.name == "peft":
        return
    where = [f"{name}: {why}" for name, why in unsupported_fields(adapter.config)]
    if target.name != "loralib-ms":
        rows = [extra.name for extra in adapter.extras if extra.kind == "trainable_tokens"]
        where += [f"{name}: replaces single rows of an embedding" for name in rows]
    if where:
        raise MappingError(
            f"dialect {target.name!r} cannot express what this adapter's config asks for",
            where=where,
            hint="keep it in peft, or merge it into the base first (in peft: merge_and_unload)",
        )


def _dropped_by_table(before: Adapter, after: Adapter, gone: set[str]) -> list[tuple[str, str]]:
    """Give the table's reason for every source tensor that it dropped."""
    reasons = dict(after.left_out)
    rows = []
    for extra in before.extras:
        for name in tensors_of((), (extra,)):
            if name in gone:
                reason = reasons.get(extra.name) or reasons.get(name)
                if reason is None:
                    raise MappingError("a tensor was lost while mapping", where=name, hint="report this defect")
                rows.append((name, reason))
    return rows


def _compressed(modules: tuple[LoraModule, ...], target: Dialect, settings: Settings) -> Iterator[LoraModule]:
    for module in modules:
        ready = factors.single_pair(module, target.name)
        rank = settings.compress.get(module.path)
        yield (
            factors.compress(ready, rank, settings.dtype) if rank is not None and rank < ready.terms[0].rank else ready
        )


def _typed(expr: Expr, settings: Settings) -> Expr:
    if settings.dtype is None or expr.dtype.kind != "float":
        return expr
    return cast(expr, settings.dtype, on_overflow=settings.on_overflow)


def _check_all_used(
    content: Content,
    outputs: tuple[tuple[str, Expr], ...],
    dropped: list[tuple[str, str]],
    unselected: tuple[str, ...],
) -> None:
    used = {name for _, expr in outputs for name in reads(expr)}
    lost = sorted(set(content.specs) - used - {name for name, _ in dropped} - set(unselected))
    if lost:
        raise MappingError(
            f"{counted(len(lost), 'tensor')} without a place in the target",
            where=lost,
            hint="exclude them with --exclude, or report",
        )


def options_text(settings: Settings) -> dict[str, str]:
    """Spell settings for a manifest; :func:`settings_from` reads them back."""
    out = {"family": settings.family}
    out |= {f"layout.{key}": value for key, value in settings.layout.items()}
    out |= {f"include.{i}": p for i, p in enumerate(settings.selection.include)}
    out |= {f"exclude.{i}": p for i, p in enumerate(settings.selection.exclude)}
    out |= {f"compress.{path}": str(rank) for path, rank in settings.compress.items()}
    if settings.selection.layers:
        out["layers"] = settings.selection.layers
    if settings.adapter_only:
        out["adapter_only"] = "true"
    if settings.dequantize:
        out["dequantize"] = "true"
    if settings.dtype is not None:
        out |= {"dtype": settings.dtype.name, "on_overflow": settings.on_overflow}
    return out


def settings_from(
    options: Mapping[str, str], *, mappings: Path | None, model_config: Json | None, target_facts: Facts
) -> Settings:
    """Read settings from a manifest's options."""

    def group(prefix: str) -> dict[str, str]:
        return {k.removeprefix(prefix): v for k, v in options.items() if k.startswith(prefix)}

    dtype = options.get("dtype")
    return Settings(
        family=options.get("family", "identity"),
        layout=group("layout."),
        mappings=mappings,
        model_config=model_config,
        target_facts=target_facts,
        selection=Selection(
            tuple(group("include.").values()), tuple(group("exclude.").values()), options.get("layers")
        ),
        adapter_only="adapter_only" in options,
        dtype=BY_NAME[dtype] if dtype else None,
        on_overflow=options.get("on_overflow", "error"),
        compress={path: int(rank) for path, rank in group("compress.").items()},
        dequantize="dequantize" in options,
    )


def dialect_named(name: str) -> Dialect:
    """Return an adapter dialect, or the plain-model spelling of a side ("hf", "ms")."""
    from ..dialects.model import HF, MS

    return {"hf": HF, "ms": MS}.get(name) or dialects.by_name(name)
