"""The forward direction: from a file's headers to the outputs of a conversion, without touching data.

Everything here is a function of names, shapes, configs and settings, so the same outputs can be planned again later
from a manifest alone; the way back relies on that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import dialects, tables
from .axes import Expr, cast, reads
from .dialects import factors
from .dialects.adapter import Adapter, Content, Dialect, Facts, Json, LoraModule
from .dtypes import BY_NAME, DType
from .errors import MappingError
from .selection import Selection, select, tensors_of


@dataclass(frozen=True, slots=True)
class Settings:
    """What a conversion depends on beside the source's headers.

    ``compress``: per target module path the rank to which its factors are compressed (see ``factors.compress``).
    """

    family: str = "identity"
    layout: Mapping[str, str] = field(default_factory=dict)
    mappings: Path | None = None
    model_config: Json | None = None
    target_facts: Facts = Facts()
    selection: Selection = Selection()
    adapter_only: bool = False
    dtype: DType | None = None
    on_overflow: str = "error"
    compress: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Forward:
    """The outputs of a conversion and what is said about them.

    ``adapter``: in the target's names. ``unused``: (source tensor, reason) for what is left out on purpose;
    ``unselected``: source tensors outside the selection.
    """

    adapter: Adapter
    outputs: tuple[tuple[str, Expr], ...]
    config: Json | None
    facts: Facts
    unused: tuple[tuple[str, str], ...]
    unselected: tuple[str, ...]
    notes: tuple[str, ...]


def forward(content: Content, source: Dialect, target: Dialect, settings: Settings) -> Forward:
    """Parse, select, map and spell one checkpoint.

    Raises MappingError for everything the target cannot express, with every tensor that is concerned.
    """
    adapter = source.parse(content)
    adapter, unselected = select(adapter, settings.selection)
    dropped = list(adapter.left_out)
    if settings.adapter_only and adapter.modules:
        base = [extra for extra in adapter.extras if extra.kind == "base"]
        dropped += [(name, "base weight, left out by --adapter-only") for name in tensors_of((), base)]
        adapter = replace(adapter, extras=tuple(e for e in adapter.extras if e.kind != "base"))
    before = set(tensors_of(adapter.modules, adapter.extras))
    mapped = _map(adapter, source, target, settings)
    after = set(tensors_of(mapped.modules, mapped.extras))
    dropped += _dropped_by_table(adapter, mapped, before - after)
    if settings.compress:
        mapped = replace(mapped, modules=tuple(_compressed(mapped.modules, target, settings)))
    written = target.write(mapped, settings.target_facts)
    outputs = tuple((name, _typed(expr, settings)) for name, expr in written.tensors)
    _check_all_used(content, outputs, dropped, unselected)
    return Forward(
        mapped, outputs, written.config, written.facts, tuple(dropped), unselected, tuple(written.notes)
    )  # fmt: skip


def _map(adapter: Adapter, source: Dialect, target: Dialect, settings: Settings) -> Adapter:
    if source.framework == target.framework:
        return adapter
    known = tables.load_tables(settings.mappings)
    if settings.family not in known:
        raise MappingError(
            f"no table for the family {settings.family!r}",
            where=f"known families: {', '.join(sorted(known))}",
            hint="pick one with --family, or give your own table with --mappings DIR",
        )
    table = known[settings.family]
    sizes = tables.sizes_from_config(table, settings.model_config) if settings.model_config else None
    to = "ms" if target.framework == "mindspore" else "hf"
    return tables.map_adapter(table, adapter, to=to, sizes=sizes, layout=settings.layout)


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
        yield factors.compress(ready, rank) if rank is not None and rank < ready.terms[0].rank else ready


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
            f"{len(lost)} tensors have no place in the target", where=lost, hint="exclude them with --exclude, or report"
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
    )


def dialect_named(name: str) -> Dialect:
    """Return an adapter dialect, or the plain-model spelling of a side ("hf", "ms")."""
    from .dialects.model import HF, MS

    return {"hf": HF, "ms": MS}.get(name) or dialects.by_name(name)
