"""Open a base and adapters, and bring the adapters to the base's names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import dialects
from ..conversion.engines import Engine
from ..conversion.forward import dialect_named
from ..conversion.read_facts import of_base
from ..conversion.repository import Input, open_input
from ..dialects.adapter import Adapter, Dialect, Extra, Facts, LoraModule
from ..dialects.deltas import refuse_deltas
from ..dialects.pairs import EMBEDDING_WEIGHTS
from ..errors import LorabridgeError, MappingError, UsageError, counted
from ..families import tables
from ..families.rules import SideName
from ..joined import Joined, prefixed
from ..manifest import Manifest
from ..merging.components import of_component
from ..merging.identity import MERGED_KEY, merged_mark
from ..merging.landing import home_of, moved_prefix
from ..merging.planning import Addition
from .choices import source_dialect
from .stated import Stated
from .storage_order import Named, oriented

BASE = "base"
_WHOSE = {"hf": "PyTorch", "ms": "MindSpore"}


@dataclass(frozen=True, slots=True)
class MergeOptions(Stated):
    """Everything a merge can be told; see ``lorabridge merge --help`` for the meaning of each."""

    adapter_dialect: str | None = None
    target_dialect: str | None = None
    weights: tuple[float, ...] = ()
    exact: bool = False
    residual_base: bool = False
    onto_merged: bool = False
    any_base: bool = False
    any_adapter: bool = False
    leave: tuple[str, ...] = ()
    max_shard_size: int | None = None
    crc: bool = False
    workers: int = 0
    dry_run: bool = False
    overwrite: bool = False
    engine: Engine = field(default_factory=Engine)


@dataclass(frozen=True, slots=True)
class Opened:
    """The inputs of a merge: ``origin`` is the base's side; ``labels`` name the adapters in a joined source."""

    base: Input
    adapters: tuple[Input, ...]
    origin: Dialect
    joined: Joined
    labels: tuple[str, ...]


def paths_of(adapters: Path | str | Sequence[Path | str]) -> list[Path]:
    """Return the adapters as paths; one may be given as it is."""
    return [Path(adapters)] if isinstance(adapters, Path | str) else [Path(adapter) for adapter in adapters]


@contextmanager
def opened(base: Path, adapters: Sequence[Path], options: MergeOptions) -> Iterator[Opened]:
    """Open every input and close it at the end; checks what can be known before a dialect is parsed."""
    if options.weights and len(options.weights) != len(adapters):
        raise UsageError(
            f"{counted(len(options.weights), 'weight')} for {counted(len(adapters), 'adapter')}",
            hint="give --weights one number per adapter",
        )
    with ExitStack() as stack:
        given = []
        for path in (base, *adapters):
            one = open_input(Path(path), config=options.config)
            stack.callback(one.source.close)
            given.append(one)
        first = given[0]
        origin = _base_side(first)
        if not options.onto_merged:
            _refuse_merged(first)
        labels = tuple(f"adapter{i}" for i in range(len(adapters)))
        sources = {BASE: first.source} | {label: one.source for label, one in zip(labels, given[1:], strict=True)}
        yield Opened(first, tuple(given[1:]), origin, Joined(sources), labels)


def _base_side(given: Input) -> Dialect:
    found = dialects.detect(replace(given.content(), config=None))
    if found:
        raise MappingError(
            "the base holds an adapter",
            where=[f"{given.path}: {name}: {why}" for name, why in found],
            hint="give the base model first, then the adapter",
        )
    mindspore = given.source.format == "mindspore" or given.source.metadata.get("format") == "ms"
    return dialect_named("ms" if mindspore else "hf")


def _refuse_merged(given: Input) -> None:
    known = [given.stated]
    if given.manifest is not None:
        known += [given.manifest.facts, given.manifest.stated]
    said = [entry for facts in known for entry in facts.entries if entry.field == "merged" and entry.value is True]
    if said or MERGED_KEY in given.source.metadata:
        raise MappingError(
            "the base is a merged model already",
            where=_held(given),
            hint="merge into the original base, or pass --onto-merged to add another adapter",
        )


def _held(given: Input) -> list[str]:
    """Name a merged model and what was merged into it."""
    mark = merged_mark(given.source.metadata, where=str(given.path))
    adapters = [] if mark is None else [str(row.get("adapter")) for row in mark.adapters]
    return [str(given.path), *([f"holds {', '.join(adapters)}"] if adapters else [])]


def named_by(options: MergeOptions, *inputs: Input) -> MergeOptions:
    """Return the options with the table and the layouts of the first input whose manifest names that table, or one.

    Layouts that are given outrank those of the manifest.
    """
    for one in inputs:
        kept = one.manifest if one.manifest is not None and one.manifest.describes(one.source.specs) else None
        family, layout = (None, {}) if kept is None else kept.named
        if family not in (None, "identity") and options.family in (None, family):
            return replace(options, family=family, layout={**layout, **options.layout})
    return options


def additions(given: Opened, base: Adapter, options: MergeOptions) -> list[Addition]:
    """Parse every adapter and bring it to the base's names, reading from the joined source."""
    out: list[Addition] = []
    weights = options.weights or (1.0,) * len(given.adapters)
    for label, one, weight in zip(given.labels, given.adapters, weights, strict=True):
        kept = one.manifest if one.manifest is not None and one.manifest.describes(one.source.specs) else None
        facts = options.facts.then(one.stated).then(kept.facts if kept else Facts())
        if given.origin.name == "hf":
            facts = facts.then(of_base(facts, one.source.specs, given.base.source.specs, str(given.base.path)))
        dialect = source_dialect(one, kept, facts, options.adapter_dialect)
        if dialect.name in ("hf", "ms"):
            raise MappingError(
                "the adapter holds no LoRA factors", where=str(one.path), hint="name its dialect with --from"
            )
        adapter = prefixed(dialect.parse(one.content(facts)), label, one.source.specs)
        refuse_deltas(adapter, "be merged into weights")
        adapter = _as_peft_computes(adapter) if dialect.name == "peft" else adapter
        adapter = _with_rows(adapter, kept)
        adapter = of_component(adapter, {extra.name for extra in base.extras}, str(one.path))
        told = named_by(options, one, given.base)
        for part in _on_side(adapter, dialect, base, given, told):
            out.append(Addition(_stored(part, base, given, told), weight, str(one.path)))
    return out


def _as_peft_computes(adapter: Adapter) -> Adapter:
    """Double the delta of an attention's output projection.

    peft adds it twice to nn.MultiheadAttention, when it computes and when it merges (0.21.2, lora/layer.py lines 2084
    to 2089), so this is what such an adapter was trained with.
    """
    attention = {f"{module.path}.out_proj" for module in adapter.modules if module.weight == "in_proj_weight"}
    twice = [module.path for module in adapter.modules if module.path in attention]
    if not twice:
        return adapter
    modules = tuple(
        replace(m, scaling=replace(m.scaling, alpha=2 * m.scaling.alpha)) if m.path in attention else m
        for m in adapter.modules
    )
    said = f"{', '.join(twice)}: the delta counts twice, as peft adds it to nn.MultiheadAttention"
    return replace(adapter, modules=modules, warnings=(*adapter.warnings, said))


def _on_side(
    adapter: Adapter, dialect: Dialect, base: Adapter, given: Opened, options: MergeOptions
) -> list[Adapter]:  # fmt: skip
    """Rename through the family's table where the adapter is in the other framework's names."""
    known = {extra.name for extra in base.extras}
    moved, _ = moved_prefix(adapter, known)
    told = options.family not in (None, "identity")
    here = dialects.naming(dialect) == dialects.naming(given.origin) and not adapter.config.get("layer_replication")
    if here and told and not _lands(moved, known, whole=True):
        return [_respelled(adapter, moved, base, given, options)]
    if dialects.naming(dialect) == dialects.naming(given.origin) or _lands(moved, known, whole=told):
        return [adapter]
    if not told:
        raise UsageError(
            f"the adapter has {_WHOSE.get(dialects.naming(dialect), dialect.name)} names, the base has not",
            where=[adapter.modules[0].path if adapter.modules else given.labels[0]],
            hint="pass --family NAME; `lorabridge tables list` lists the known ones",
        )
    project = dialects.naming(dialect)
    if project not in ("hf", "ms") and given.origin.name != "hf":
        raise MappingError(
            f"no table leads from {project}'s names to those of the base", where=given.labels[0],
            hint="convert the adapter to peft first (--to peft)",
        )  # fmt: skip
    table = tables.load_family(str(options.family), options.mappings)
    sizes = tables.sizes_from_config(table, given.base.model_config) if given.base.model_config else None
    side = "hf" if given.origin.framework == "torch" else "ms"
    mapped = [
        tables.map_adapter(table, part, to=side, sizes=sizes, layout=options.layout)  # type: ignore[arg-type]
        for part in _alike(_tokens_named(adapter, table, side, options))
    ]
    return mapped


def _stored(adapter: Adapter, base: Adapter, given: Opened, options: MergeOptions) -> Adapter:
    """Say how the base stores square weights, where tables do."""
    known = {extra.name for extra in base.extras}
    side: SideName = "hf" if given.origin.name == "hf" else "ms"
    model_type = (given.base.model_config or {}).get("model_type")
    named = Named(side, options.family, options.layout, options.mappings, model_type)
    found = oriented(moved_prefix(adapter, known)[0], known, named).modules
    pairs = zip(adapter.modules, found, strict=True)
    return replace(adapter, modules=tuple(replace(m, fan_in_fan_out=one.fan_in_fan_out) for m, one in pairs))


def _respelled(
    adapter: Adapter, moved: Adapter, base: Adapter, given: Opened, options: MergeOptions
) -> Adapter:  # fmt: skip
    """Bring modules that the base calls otherwise to its spelling: experts that transformers holds in one tensor."""
    shapes = {extra.name: extra.value.shape for extra in base.extras}
    landed = [home_of(module, shapes) for module in moved.modules]
    lost = [m for m, home in zip(adapter.modules, landed, strict=True) if not home]
    table = tables.load_family(str(options.family), options.mappings)
    sizes = tables.sizes_from_config(table, given.base.model_config) if given.base.model_config else None
    side: SideName = "hf" if given.origin.framework == "torch" else "ms"
    made = tables.respell(
        table, replace(adapter, modules=tuple(lost), extras=()), side=side, like=shapes, sizes=sizes,
        layout=options.layout,
    )  # fmt: skip
    kept = tuple(m for m, home in zip(moved.modules, landed, strict=True) if home)
    return replace(moved, modules=(*kept, *made.modules))


def _tokens_named(adapter: Adapter, table: tables.Table, side: str, options: MergeOptions) -> Adapter:
    """Call the embeddings of trained token rows as the table does: MindSpore's adapter files do not name them."""
    extras = []
    for extra in adapter.extras:
        names = ("weight", *EMBEDDING_WEIGHTS) if extra.kind == "trainable_tokens" else (extra.parameter,)
        choices = [replace(extra, parameter=name) for name in names]
        extras.append(next((one for one in choices[1:] if _maps(one, table, side, options)), choices[0]))
    return replace(adapter, extras=tuple(extras))


def _maps(extra: Extra, table: tables.Table, side: str, options: MergeOptions) -> bool:
    try:
        tables.map_adapter(table, Adapter((), (extra,)), to=side, layout=options.layout)  # type: ignore[arg-type]
    except LorabridgeError:
        return False
    return True


def _lands(adapter: Adapter, known: set[str], *, whole: bool) -> bool:
    """Say whether the adapter's names are the base's; with a table at hand all of them must be."""
    found = [bool(home_of(module, known)) for module in adapter.modules]
    return bool(found) and (all(found) if whole else any(found))


def _with_rows(adapter: Adapter, kept: Manifest | None) -> Adapter:
    """Say which rows the trained tokens are for, where only the manifest does: MindSpore's files have no config."""
    listed = kept.source.config.get("trainable_token_indices") if kept is not None and kept.source.config else None
    if not listed or adapter.config.get("trainable_token_indices"):
        return adapter
    return replace(adapter, config={**adapter.config, "trainable_token_indices": listed})


def _alike(adapter: Adapter) -> list[Adapter]:
    """Split an adapter by scaling: a table may fuse modules, and a fused module has one scaling."""
    groups: dict[tuple[float, bool], list[LoraModule]] = {}
    for module in adapter.modules:
        groups.setdefault((module.scaling.value, module.scaling.rslora), []).append(module)
    parts = [
        replace(adapter, modules=tuple(modules), extras=(), left_out=(), warnings=()) for modules in groups.values()
    ]
    if not parts:
        return [adapter]
    parts[0] = replace(parts[0], extras=adapter.extras, left_out=adapter.left_out, warnings=adapter.warnings)
    return parts
