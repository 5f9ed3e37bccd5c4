"""The grammar of family tables: sections of TOML to values. ``mappings/README.md`` describes it for authors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from ..sizes import Size, SizeError
from .arrangements import Arrangement
from .reader import Item, Reader
from .rules import (
    ONE,
    SIDES,
    Buffer,
    Face,
    Layout,
    Order,
    Prefix,
    Refused,
    Rule,
    RuleRef,
    Side,
    SideName,
    Span,
    Stack,
    Table,
    Tied,
    When,
)

__all__ = ["Item", "Reader", "table_of"]

SCHEMA = 1

_SECTIONS = ("schema", "family", "match", "sizes", "holes", "prefix", "identity", "layout", "linear", "embedding",
             "conv", "param", "stack", "tied", "buffer", "refused")  # fmt: skip
_RULE_KEYS = ("hf", "ms", "when", "only", "prefix", "optional")


def table_of(reader: Reader, data: Item) -> Table:
    """Turn a table's TOML into a value; problems are left in the reader."""
    top = RuleRef(reader.file, 0)
    reader.known(top, data, _SECTIONS)
    if data.get("schema") != SCHEMA or isinstance(data.get("schema"), bool):
        reader.complain(reader.key(top, "schema"), f"schema must be {SCHEMA}")
    match_ref, match = reader.section(data, "match")
    reader.known(match_ref, match, ("model_type",))
    prefix_ref, prefixes = reader.section(data, "prefix")
    reader.known(prefix_ref, prefixes, (*SIDES, "alike"))
    rules = [
        read(reader, ref, item)
        for section, (read, keys) in _RULES.items()
        for ref, item in reader.items(data, section, (*_RULE_KEYS, *keys))
    ]
    return Table(
        family=reader.text(top, data, "family"),
        file=reader.file,
        model_types=reader.words(match_ref, match, "model_type"),
        sizes=_sizes(reader, data),
        holes=_holes(reader, data),
        hf_prefix=_prefix(reader, prefix_ref, prefixes, "hf"),
        ms_prefix=_prefix(reader, prefix_ref, prefixes, "ms"),
        alike=reader.flag(prefix_ref, prefixes, "alike", False),
        layouts=tuple(_layout(reader, *row) for row in reader.items(data, "layout", _LAYOUT_KEYS)),
        rules=tuple(sorted(rules, key=lambda rule: rule.ref.line)),
        stacks=tuple(_stack(reader, *row) for row in reader.items(data, "stack", _STACK_KEYS)),
        tied=tuple(_tied(reader, *row) for row in reader.items(data, "tied", ("hf", "ms", "to", "when"))),
        buffers=tuple(_buffer(reader, *row) for row in reader.items(data, "buffer", _BUFFER_KEYS)),
        refused=tuple(_refused(reader, *row) for row in reader.items(data, "refused", _REFUSED_KEYS)),
        identity=reader.flag(top, data, "identity", False),
    )


def _sizes(reader: Reader, data: Item) -> tuple[tuple[str, Size], ...]:
    ref, _ = reader.section(data, "sizes")
    return tuple((key, reader.size(ref, key, text)) for key, text in reader.pairs(ref, data, "sizes"))


def _holes(reader: Reader, data: Item) -> tuple[tuple[str, Span], ...]:
    ref, items = reader.section(data, "holes")
    found = []
    for name, value in items.items():
        if isinstance(value, str):
            first, dots, last = (text.strip() for text in value.partition(".."))
            start = reader.size(ref, name, first if dots else "0")
            found.append((name, Span(start, start, stop=reader.size(ref, name, last if dots else first))))
        elif isinstance(value, dict):
            reader.known(reader.key(ref, name), value, ("count", *SIDES))
            starts = {side: reader.size(ref, name, reader.text(ref, value, side, "0")) for side in SIDES}
            found.append((name, Span(**starts, count=reader.size(ref, name, reader.text(ref, value, "count")))))
        else:
            reader.complain(reader.key(ref, name), "a hole is 'n', 'a .. b' or { count = ..., hf = ..., ms = ... }")
    return tuple(found)


def _prefix(reader: Reader, ref: RuleRef, prefixes: Item, side: SideName) -> Prefix:
    value = prefixes.get(side, "")
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict):
        reader.complain(reader.key(ref, side), "a prefix is a text, or { text = ..., optional = true }")
        return Prefix()
    reader.known(reader.key(ref, side), value, ("text", "optional", "also"))
    text, also = value.get("text", ""), reader.words(reader.key(ref, side), value, "also")
    for one in (text, *also):
        if not isinstance(one, str) or (one and ("{" in one or not one.endswith("."))):
            reader.complain(reader.key(ref, side), "a prefix is literal text that ends with a dot")
            return Prefix()
        if one:
            reader.template(ref, side, one)
    return Prefix(text, reader.flag(ref, value, "optional", False), also)


def _linear(reader: Reader, ref: RuleRef, item: Item) -> Rule:
    out = item.get("out")
    parts = tuple(out) if isinstance(out, dict) else ("",)
    faces = {side: _faces(reader, ref, item, side, parts) for side in SIDES}
    given = dict(reader.pairs(ref, item, "out")) if isinstance(out, dict) else {"": reader.text(ref, item, "out")}
    if "groups" in item and all(len(modules) == 1 < len(parts) for modules in faces.values()):
        reader.complain(reader.key(ref, "groups"), "both sides are fused: say hf_groups and ms_groups")
    sides = {
        side: Side(
            faces[side],
            _order(reader, ref, item, f"{side}_order"),
            _parameter(reader, ref, item, f"{side}_weight", "weight"),
            _parameter(reader, ref, item, f"{side}_bias", "bias"),
            _rows(reader, ref, item, side, parts),
        )
        for side in SIDES
    }
    return _conditioned(
        reader, ref, item,
        Rule(
            "linear", ref, sides["hf"], sides["ms"], parts,
            tuple(reader.size(ref, "out", given.get(part, "1")) for part in parts),
            reader.size(ref, "in", reader.text(ref, item, "in")),
            bias=_bias(reader, ref, item),
        ),
    )  # fmt: skip


def _parameter(reader: Reader, ref: RuleRef, item: Item, key: str, usual: str) -> str:
    """Read what a module calls its weight or bias."""
    name = reader.text(ref, item, key, usual)
    if not (name.isascii() and name.isidentifier()):
        reader.complain(reader.key(ref, key), f"{key} must be the name of one parameter")
        return usual
    return name


def _faces(reader: Reader, ref: RuleRef, item: Item, side: SideName, parts: Sequence[str]) -> tuple[Face, ...]:
    """Read one side's modules: one that holds every part, or a table of them whose keys name their parts."""
    value = item.get(side)
    named = reader.pairs(ref, item, side) if isinstance(value, dict) else (("", reader.text(ref, item, side)),)
    groups = _groups(reader, ref, item, side)
    held = [tuple(key.split()) for key, _ in named]
    if len(named) == 1 and set(held[0]) != set(parts):
        held = [tuple(parts)]
    words = [part for group in held for part in group]
    if set(words) - {""} > set(parts) - {""}:
        reader.complain(reader.key(ref, "out"), f"out must give the size of {', '.join(words)}")
    elif sorted(words) != sorted(parts):
        said = f", or name each of {', '.join(parts)} once" if len(parts) > 1 else ""
        reader.complain(ref, f"{side} must have exactly one module{said}")
    faces = []
    for (key, text), group in zip(named, held, strict=True):
        positions = tuple(parts.index(part) for part in group if part in parts)
        own = groups.pop(key, groups.get("", ONE) if len(group) > 1 else ONE)
        faces.append(Face(reader.template(ref, side, text), positions or (0,), own))
    for key in groups:
        if key:
            reader.complain(reader.key(ref, f"{side}_groups"), f"{side} has no module {key!r}")
    return tuple(faces)


def _groups(reader: Reader, ref: RuleRef, item: Item, side: SideName) -> dict[str, Size]:
    name = f"{side}_groups" if f"{side}_groups" in item else "groups"
    value = item.get(name, "1")
    if isinstance(value, dict):
        return {key: reader.size(ref, name, text) for key, text in reader.pairs(ref, item, name)}
    return {"": reader.size(ref, name, str(value))}


def _rows(
    reader: Reader, ref: RuleRef, item: Item, side: SideName, parts: Sequence[str]
) -> tuple[Arrangement | None, ...]:
    name = f"{side}_rows"
    value = item.get(name)
    if value is None:
        return ()
    given = dict(reader.pairs(ref, item, name)) if isinstance(value, dict) else {parts[0]: str(value)}
    if set(given) - set(parts) or (len(parts) > 1 and not isinstance(value, dict)):
        reader.complain(reader.key(ref, name), f"{name} is a table over the parts {', '.join(parts)}")
    return tuple(_arrangement(reader, ref, name, Arrangement.of_rows, given.get(part)) for part in parts)


def _arrangement(
    reader: Reader, ref: RuleRef, name: str, parse: Callable[[str], Arrangement], text: object
) -> Arrangement | None:
    if text is None:
        return None
    try:
        return parse(str(text))
    except SizeError as error:
        reader.complain(reader.key(ref, name), str(error))
        return None


def _order(reader: Reader, ref: RuleRef, item: Item, name: str) -> Order:
    value = item.get(name, "out in")
    if value not in ("out in", "in out"):
        reader.complain(reader.key(ref, name), f'{name} must be "out in" or "in out"')
        return "out in"
    return value


def _bias(reader: Reader, ref: RuleRef, item: Item) -> Literal["yes", "no", "optional"]:
    bias = item.get("bias", False)
    if not isinstance(bias, bool) and bias != "optional":
        reader.complain(reader.key(ref, "bias"), 'bias must be true, false or "optional"')
        return "no"
    return "optional" if bias == "optional" else "yes" if bias else "no"


def _conditioned(reader: Reader, ref: RuleRef, item: Item, rule: Rule) -> Rule:
    return replace(
        rule,
        when=reader.pairs(ref, item, "when"),
        only=reader.words(ref, item, "only"),
        prefixed=reader.flag(ref, item, "prefix", True),
        optional=reader.flag(ref, item, "optional", False),
    )


def _embedding(reader: Reader, ref: RuleRef, item: Item) -> Rule:
    axes = reader.text(ref, item, "axes", "1 1").split()
    if len(axes) != 2:
        reader.complain(reader.key(ref, "axes"), 'axes of an embedding are two sizes, "rows columns"')
        axes = ["1", "1"]
    sides = {}
    for side in SIDES:
        module, dot, weight = reader.text(ref, item, side).rpartition(".")
        if not dot or not (weight.isascii() and weight.isidentifier()):
            reader.complain(reader.key(ref, side), f"{side} must be module.parameter")
            module, weight = "m", "weight"
        sides[side] = Side((Face(reader.template(ref, side, module)),), "in out", weight)
    out, inner = (reader.size(ref, "axes", axes[k]) for k in (1, 0))
    rule = Rule("embedding", ref, sides["hf"], sides["ms"], out=(out,), inner=inner)
    return _conditioned(reader, ref, item, rule)


def _param(reader: Reader, ref: RuleRef, item: Item) -> Rule:
    axes = [] if item.get("axes") == "" else reader.text(ref, item, "axes").split()
    sizes = tuple(reader.size(ref, "axes", axis) for axis in axes)
    sides = {
        side: Side(
            (Face(reader.template(ref, side, reader.text(ref, item, side))),),
            stored=_stored(reader, ref, item, side, axes, sizes),
        )
        for side in SIDES
    }
    return _conditioned(reader, ref, item, Rule("param", ref, sides["hf"], sides["ms"], axes=sizes))


def _conv(reader: Reader, ref: RuleRef, item: Item) -> Rule:
    kernel = reader.text(ref, item, "kernel").split()
    sizes = tuple(reader.size(ref, "kernel", length) for length in kernel)
    out, inner = (reader.size(ref, name, reader.text(ref, item, name)) for name in ("out", "in"))
    axes = ["out", "in", *kernel]
    sides = {}
    for side in SIDES:
        stored = _stored(reader, ref, item, side, axes, (out, inner, *sizes))
        if stored is not None and stored.order != tuple(range(len(axes))):
            reader.complain(reader.key(ref, f"{side}_axes"), "a conv weight keeps the order out, in, kernel")
        template = reader.template(ref, side, reader.text(ref, item, side))
        sides[side] = Side((Face(template),), stored=stored)
    rule = Rule("conv", ref, sides["hf"], sides["ms"], out=(out,), inner=inner, axes=sizes)
    return _conditioned(reader, ref, item, replace(rule, bias=_bias(reader, ref, item)))


def _stored(
    reader: Reader, ref: RuleRef, item: Item, side: SideName, axes: Sequence[str], sizes: tuple[Size, ...]
) -> Arrangement | None:
    name = f"{side}_axes"
    parsed = _arrangement(reader, ref, name, lambda text: Arrangement.of_axes(axes, text), item.get(name))
    return None if parsed is None else replace(parsed, atoms=sizes)


_RULES: dict[str, tuple[Callable[[Reader, RuleRef, Item], Rule], tuple[str, ...]]] = {
    "linear": (_linear, ("out", "in", "bias", "hf_order", "ms_order", "groups", "hf_groups", "ms_groups", "hf_rows",
                         "ms_rows", "hf_weight", "ms_weight", "hf_bias", "ms_bias")),
    "embedding": (_embedding, ("axes",)),
    "conv": (_conv, ("out", "in", "kernel", "bias", "hf_axes", "ms_axes")),
    "param": (_param, ("axes", "hf_axes", "ms_axes")),
}  # fmt: skip


def _stack(reader: Reader, ref: RuleRef, item: Item) -> Stack:
    given = [side for side in SIDES if side in item]
    if len(given) != 1:
        reader.complain(ref, "a stack lies on one side: give hf or ms")
    side = given[0] if given else "ms"
    text = reader.text(ref, item, side, "m.weight")
    stored = reader.template(ref, side, text)
    single = reader.template(ref, "item", reader.text(ref, item, "item", f"{text}.{{e}}.weight"))
    extra = [hole for hole in single.holes if hole not in stored.holes]
    if len(extra) != 1 or set(stored.holes) - set(single.holes):
        reader.complain(ref, f"item must have the holes of {stored} and one more, the items' number")
    when = reader.pairs(ref, item, "when")
    flat, prefixed = reader.flag(ref, item, "flat", False), reader.flag(ref, item, "prefix", True)
    return Stack(ref, side, stored, single, extra[0] if extra else "e", flat, when, prefixed)


_STACK_KEYS = ("hf", "ms", "item", "flat", "when", "prefix")


def _tied(reader: Reader, ref: RuleRef, item: Item) -> Tied:
    hf = reader.template(ref, "hf", reader.text(ref, item, "hf"))
    to = reader.template(ref, "to", reader.text(ref, item, "to"))
    return Tied(ref, hf, reader.optional(ref, item, "ms"), to, when=_when(reader, ref, item))


def _when(reader: Reader, ref: RuleRef, item: Item) -> When:
    return reader.pairs(ref, item, "when")


def _buffer(reader: Reader, ref: RuleRef, item: Item) -> Buffer:
    if "hf" not in item and "ms" not in item:
        reader.complain(ref, "a buffer needs hf or ms")
    drop = reader.text(ref, item, "drop")
    sides = [reader.optional(ref, item, side) for side in SIDES]
    return Buffer(ref, sides[0], sides[1], drop, reader.flag(ref, item, "prefix", True), _when(reader, ref, item))


_BUFFER_KEYS = ("hf", "ms", "drop", "prefix", "when")


_REFUSED_KEYS = ("config", "over", "under", "why")


def _refused(reader: Reader, ref: RuleRef, item: Item) -> Refused:
    bounds = {name: item.get(name) for name in ("over", "under") if name in item}
    numbers = {name: value for name, value in bounds.items() if type(value) is int and value >= 0}
    if not bounds or len(numbers) < len(bounds):
        reader.complain(ref, "a refused config has over or under, numbers of 0 or more")
    field, why = (reader.text(ref, item, name) for name in ("config", "why"))
    return Refused(ref, field, numbers.get("over"), numbers.get("under"), why)


_LAYOUT_KEYS = ("name", "choices", "default", "config")


def _layout(reader: Reader, ref: RuleRef, item: Item) -> Layout:
    choices = reader.pairs(ref, item, "choices")
    if len(choices) < 2 or not all(text.strip() for _, text in choices):
        reader.complain(ref, "choices must have two entries or more, each with the versions it belongs to")
    default = reader.text(ref, item, "default") if "default" in item else None
    return Layout(ref, reader.text(ref, item, "name"), choices, default, _told(reader, ref, item))


def _told(reader: Reader, ref: RuleRef, item: Item) -> tuple[str, str, str | None] | None:
    """Read which choice a field of config.json says: one when it is set, or a list of that and the one otherwise."""
    value = item.get("config", {})
    rows = list(value.items()) if isinstance(value, dict) else []
    said = [(field, *(choices if isinstance(choices, list) else (choices,))) for field, choices in rows]
    if not isinstance(value, dict) or not all(isinstance(text, str) for row in said for text in row):
        reader.complain(reader.key(ref, "config"), "config is { field = 'choice' } or { field = ['choice', 'other'] }")
    elif len(said) > 1 or any(len(row) not in (2, 3) for row in said):
        reader.complain(ref, "config names one field of config.json and the choice it means when it is set")
    elif said:
        return (said[0][0], said[0][1], said[0][2] if len(said[0]) > 2 else None)
    return None
