"""Merge adapters into a base: from headers to a full model whose merged weights are expressions. No data is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..arithmetic import recipe
from ..axes import Expr, cast, cut, join, reads, reshape
from ..dialects.adapter import Adapter, Extra, Json
from ..dialects.peft_config import changes_base, unsupported_fields
from ..errors import MappingError
from . import ties
from .landing import land, moved_prefix, parameter_of
from .repetition import LOST, homes, repeat_layers
from .twins import Same
from .worksheet import Addition, Worksheet

__all__ = ["Addition", "Merged", "merge", "with_rows"]

FLOATS = ("bfloat16", "float16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model: ``model`` has base parameters only.

    ``config``: the model's config.json with what had to change. ``parameters``: base parameters that get a delta.
    ``replaced``: those that the adapter brings whole. ``homes``: where a base parameter is found that has another
    name in the model, because layers were repeated.
    """

    model: Adapter
    config: Json | None
    parameters: tuple[str, ...]
    replaced: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    homes: Mapping[str, str] = field(default_factory=dict)


def merge(
    base: Adapter, additions: Sequence[Addition], *, config: Json | None = None, exact: bool = False,
    residual_base: bool = False, same: Same | None = None,
) -> Merged:  # fmt: skip
    """Merge adapters into a full model, adding their deltas in the order given.

    ``base``: every extra is a base parameter. ``config``: the model's config.json, which replicated layers and untied
    embeddings need. ``exact``: deltas to 48 bits for every type; float16 and wider get them anyway.
    ``residual_base``: the base is the one that an initialisation such as PiSSA left. ``same``: compares bits, to see
    whether what an adapter holds for a tied head is what it holds for the embedding. Every module of every adapter must
    land. Raises MappingError with all that does not fit.
    """
    work = Worksheet({extra.name: extra.value for extra in base.extras}, None if config is None else dict(config))
    work.left_out += base.left_out
    _check_meaning(additions, residual_base)
    for addition in additions:
        _repeat(work, addition)
    moved = [_renamed(work, addition) for addition in additions]
    for addition in ties.settle(work, moved, same):
        _take(work, addition)
    landing = work.landing
    _check_added(work)
    if landing.problems:
        raise MappingError(
            f"the adapter does not fit the base in {len(landing.problems)} places",
            where=landing.problems,
            hint="; ".join(landing.hints) or "check that this is the base that the adapter was trained on",
        )
    _add(work, exact)
    extras = [Extra(*_split(name), value, "base") for name, value in work.values.items()]
    read = {name for value in work.values.values() for name in reads(value)}
    left_out = tuple((name, why) for name, why in dict(work.left_out).items() if name not in read)
    model = replace(base, extras=tuple(extras), left_out=left_out, merged=False)
    changed = tuple(dict.fromkeys([*work.places, *(name for name, _, _ in work.tokens)]))
    return Merged(
        model, work.config, changed, tuple(work.replaced), tuple(work.notes), tuple(work.warnings), work.homes
    )


def _split(name: str) -> tuple[str, str]:
    path, _, parameter = name.rpartition(".")
    return path, parameter


def _check_meaning(additions: Sequence[Addition], residual_base: bool) -> None:
    """Refuse adapters that are no fixed delta, or one for another base than the one that was published."""
    where: list[str] = []
    hints: dict[str, None] = {}
    for addition in additions:
        config = addition.adapter.config
        for name, why in unsupported_fields(config):
            where.append(f"{addition.label}: {name}: {why}")
            hints["merge such an adapter in peft, if it can"] = None
        if addition.adapter.merged:
            where.append(f"{addition.label}: its own base weights already hold the delta")
            hints["a merged model needs no merge: convert it"] = None
        init = changes_base(config)
        if init and not residual_base:
            where.append(f"{addition.label}: init_lora_weights={init!r} changed the base when training began")
            hints["merge into that changed base with --residual-base, or convert the adapter in peft first"] = None
        if addition.weight != 1.0 and (addition.adapter.extras or _dora(addition)):
            where.append(f"{addition.label}: a weight scales deltas, not DoRA magnitudes or whole parameters")
            hints["leave out --weights, or these modules"] = None
    if len(additions) > 1:
        said = "DoRA normalises the merged weight and cannot be added to others"
        where += [f"{addition.label}: {said}" for addition in additions if _dora(addition)]
    if where:
        raise MappingError("the adapter cannot be merged", where=where, hint="; ".join(hints))


def _dora(addition: Addition) -> bool:
    return any(module.magnitude is not None for module in addition.adapter.modules)


def _repeat(work: Worksheet, addition: Addition) -> None:
    ranges = addition.adapter.config.get("layer_replication")
    if ranges:
        found = homes(work.values, ranges, addition.label)
        if work.homes and found:
            raise MappingError("two adapters repeat layers", where=addition.label, hint="merge one after another")
        work.homes = found
        lost = [name for name, home in found.items() if home.startswith(LOST)]
        work.left_out += [(one, "of a layer that layer_replication leaves out") for name in lost
                          for one in reads(work.values[name])]  # fmt: skip
        work.values, work.config, note = repeat_layers(work.values, ranges, work.config, addition.label)
        work.notes.append(note)


def _renamed(work: Worksheet, addition: Addition) -> Addition:
    adapter, note = moved_prefix(addition.adapter, work.values)
    work.notes += [note] if note else []
    return replace(addition, adapter=adapter)


def _take(work: Worksheet, addition: Addition) -> None:
    """Land one adapter: first what it brings whole, then its deltas."""
    adapter = addition.adapter
    work.left_out += adapter.left_out
    work.warnings += adapter.warnings
    for extra in adapter.extras:
        if extra.kind == "buffer":
            work.left_out += [(name, "a buffer, rebuilt by the model") for name in reads(extra.value)]
        elif extra.kind == "trainable_tokens":
            _take_tokens(work, extra, adapter)
        else:
            _replace(work, extra)
    before = len(work.landing.places)
    land(adapter.modules, work.shapes(), addition.weight, work.landing)
    for place in work.landing.places[before:]:
        work.places.setdefault(place.parameter, []).append(place)


def _replace(work: Worksheet, extra: Extra) -> None:
    old, new = work.values.get(extra.name), extra.value
    if old is None and extra.kind == "base":
        work.landing.refuse(f"{extra.name}: the adapter brings a base weight that the base does not have")
        return
    if old is not None:
        if old.dtype.kind == "float" and new.dtype.kind == "float":
            new = cast(new, old.dtype)
        if old.shape != new.shape and not _resized(work, extra.name, old, new):
            work.landing.refuse(f"{extra.name}: has shape {old.shape}, the adapter brings {new.shape}")
            return
        work.left_out += [(name, "replaced by the adapter's") for name in reads(old)]
    elif extra.kind == "bias":
        work.landing.refuse(f"{extra.name}: the base has no such bias")
        return
    else:
        work.notes.append(f"{extra.name} is new: the base does not have it")
    work.values[extra.name] = new
    work.replaced.append(extra.name)


def _resized(work: Worksheet, name: str, old: Expr, new: Expr) -> bool:
    """Follow a vocabulary that grew or shrank in the adapter's own embedding."""
    config = work.config
    if config is None or old.shape[1:] != new.shape[1:] or config.get("vocab_size") not in (old.shape[0], new.shape[0]):
        return False
    if config["vocab_size"] != new.shape[0]:
        work.notes.append(f"config: vocab_size {config['vocab_size']} became {new.shape[0]}, as {name} has rows")
        config["vocab_size"] = new.shape[0]
    return True


def _take_tokens(work: Worksheet, extra: Extra, adapter: Adapter) -> None:
    """Find which rows of an embedding the adapter replaces."""
    rows = _rows_of(extra, adapter)
    name = parameter_of(extra.path, extra.parameter, work.values) or extra.name
    table = work.values.get(name)
    inside = table is not None and rows and 0 <= min(rows) <= max(rows) < table.shape[0]
    if table is None or not inside or table.shape[1:] != extra.value.shape[1:]:
        work.landing.refuse(f"{name}: trained rows {rows[:5]} of {extra.value.shape} do not fit the base")
        return
    if len(set(rows)) != len(rows) or len(rows) != extra.value.shape[0]:
        work.landing.refuse(f"{name}: {extra.value.shape[0]} trained rows for the indices {rows[:5]}")
        return
    work.tokens.append((name, rows, extra.value))


def _rows_of(extra: Extra, adapter: Adapter) -> list[int]:
    """Return the rows that the config lists for trained tokens; of another framework's names, the one that is left."""
    listed = adapter.config.get("trainable_token_indices")
    by_path = listed if isinstance(listed, dict) else {"": listed}
    tokens = [one.path for one in adapter.extras if one.kind == "trainable_tokens"]

    def names(key: str, path: str) -> bool:
        return not key or path == key or path.endswith(f".{key}")

    fitting = [rows for key, rows in by_path.items() if names(key, extra.path)]
    if not fitting:
        others = [rows for key, rows in by_path.items() if not any(names(key, path) for path in tokens)]
        fitting = [rows for rows in others if isinstance(rows, list) and len(rows) == extra.value.shape[0]]
        fitting = fitting if len(fitting) == 1 else []
    first = fitting[0] if fitting else None
    return [row for row in first if isinstance(row, int)] if isinstance(first, list) else []


def _check_added(work: Worksheet) -> None:
    """Check what one parameter gets from several modules, and that it is stored in a type that can be added to."""
    for name, places in work.places.items():
        dtype = work.values[name].dtype
        if dtype.name not in FLOATS:
            work.landing.refuse(
                f"{name}: is stored as {dtype}, to which nothing can be added", "merge before quantisation"
            )
        if len({(place.view, place.transposed) for place in places}) > 1:
            work.landing.refuse(f"{name}: its adapters have factors of different kinds", "merge one after another")
        if len(places) > 1 and any(place.update.magnitude for place in places):
            work.landing.refuse(f"{name}: DoRA normalises the whole weight, so nothing else can be added to it")


def _add(work: Worksheet, exact: bool) -> None:
    """Turn places into merged weights, then put trained rows in."""
    for name, places in work.places.items():
        weight, first = work.values[name], places[0]
        made = recipe.Recipe(
            name, tuple(place.update for place in places), first.view[0], first.transposed,
            exact or weight.dtype.name != "bfloat16",
        )  # fmt: skip
        operands = [expr for place in places for expr in place.operands]
        work.values[name] = reshape(recipe.node(made, reshape(weight, first.view), operands), weight.shape)
    for name, rows, value in work.tokens:
        work.values[name] = with_rows(work.values[name], rows, value)
    ties.share(work)


def with_rows(table: Expr, rows: Sequence[int], value: Expr) -> Expr:
    """Return a matrix some of whose rows are those of another one, in its type."""
    value = cast(value, table.dtype)
    parts: list[Expr] = []
    at = 0
    for row, number in sorted((row, number) for number, row in enumerate(rows)):
        if row > at:
            parts.append(cut(table, 0, at, row))
        parts.append(cut(value, 0, number, number + 1))
        at = row + 1
    if at < table.shape[0]:
        parts.append(cut(table, 0, at, table.shape[0]))
    return join(parts, 0)
