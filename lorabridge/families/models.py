"""What a family table says about a whole model: its sizes, its parameters' names and shapes, its family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from math import prod

from ..errors import MappingError
from ..sizes import ANY, SizeError, config_integer
from .proofs import check_sizes
from .rules import SideName, Slot, Table, slots
from .stacks import Stacks
from .variants import Index, Shape, Variant, layout_from_config, missing_choice, resolve

Sizes = Mapping[str, int]
_MOST_NAMES = 1_000_000


def sizes_from_config(table: Table, config: Mapping[str, object]) -> dict[str, int]:
    """Return the table's sizes for a model's config.json; a MappingError lists every field that is missing or odd.

    A size may be without a value where the layouts that the config decides leave no rule that uses it.
    """
    sizes: dict[str, int] = {}
    problems = []
    counts = {field for _, span in table.holes for size in span.sizes for field in size.fields}
    told = layout_from_config(table, config)
    needed = _needed(table, told)

    def known(field: str) -> int | None:
        return sizes[field] if field in sizes else config_integer(config, field)

    for name, size in table.sizes:
        try:
            sizes[name] = size.value(known, zero=name in counts)
        except SizeError as error:
            if name in needed or not error.missing:
                problems.append(f"{table.file}: size {name!r}: {error}")
    if refusals := _refusals(table, config):
        raise MappingError(
            f"the table {table.family} has no model with this config", where=refusals,
            hint="there is nothing to convert it to; --family identity keeps the names",
        )  # fmt: skip
    problems = problems or check_sizes(table, sizes, told)
    if problems:
        raise MappingError(
            f"the config does not fit the table {table.family}", where=problems,
            hint="give the config.json of the model that the checkpoint belongs to",
        )  # fmt: skip
    return sizes


def _needed(table: Table, told: Mapping[str, str]) -> set[str]:
    """Return the sizes that holes and the rules that can hold use, and those that these are made of."""
    used = [size for rule in table.rules if rule.holds(told) for size in rule.sizes]
    used += [size for _, span in table.holes for size in span.sizes]
    needed = {field for size in used for field in size.fields}
    for name, size in reversed(table.sizes):
        if name in needed:
            needed |= set(size.fields)
    return needed


def _refusals(table: Table, config: Mapping[str, object]) -> list[str]:
    """Say why the ms side has no such model."""
    out = []
    for refused in table.refused:
        try:
            value = config_integer(config, refused.config)
        except SizeError as error:
            out.append(f"{refused.ref}: {error}")
            continue
        if refused.meets(value or 0):
            said = str(config.get(refused.config))[:40]
            out.append(f"{refused.ref}: {refused.config} is {said} in the config: {refused.why}")
    return out


def slot_shape(slot: Slot, side: SideName, sizes: Sizes) -> Shape:
    """Return the shape of a parameter on one side; a SizeError where a size has no value."""
    rule, face = slot.rule, slot.rule.side(side)
    if slot.field == "param":
        if face.stored is not None:
            return face.stored.stored_shape(sizes)
        return tuple(axis.value(sizes) for axis in rule.axes)
    out = sum(rule.out[part].value(sizes) for part in face.faces[slot.face].parts)
    if slot.field == "bias" or rule.inner is None:
        return (out,)
    if face.stored is not None:
        return face.stored.stored_shape(sizes)
    inner = rule.inner.value(sizes)
    if rule.kind == "conv":
        return (out, inner, *(length.value(sizes) for length in rule.axes))
    return (out, inner) if face.order == "out in" else (inner, out)


def slot_labels(slot: Slot, side: SideName) -> list[str]:
    """Return what each axis of a parameter counts, for messages."""
    rule, face = slot.rule, slot.rule.side(side)
    if face.stored is not None and slot.field in ("param", "weight"):
        return face.stored.labels()
    if slot.field == "param":
        return [axis.text for axis in rule.axes]
    rows = " + ".join(rule.out[part].text for part in face.faces[slot.face].parts)
    if slot.field == "bias" or rule.inner is None:
        return [rows]
    if rule.kind == "conv":
        return [rows, rule.inner.text, *(length.text for length in rule.axes)]
    return [rows, rule.inner.text] if face.order == "out in" else [rule.inner.text, rows]


def names(
    table: Table, sizes: Sizes, side: SideName, *, layout: Mapping[str, str] | None = None, architecture: str = "",
    optional: bool = False,
) -> dict[str, Shape]:  # fmt: skip
    """Return every parameter name and shape of a full model on one side, in the table's order.

    An axis that may have any length is -1. Parameters that only some architectures have are included when
    ``architecture`` (a class name of transformers, as in config.json) is one of them; what a model may lack when
    ``optional``. Ties and buffers are not listed. A UsageError names a layout that is needed.
    """
    variant = resolve(table, (), side=side, layout=layout or {})
    numbers = hole_numbers(table, side, sizes)
    out: dict[str, Shape] = {}
    missing: dict[str, tuple[str, ...]] = {}
    for slot in slots(table, side):
        if slot.field == "module" or (slot.rule.only and architecture not in slot.rule.only):
            continue
        if not slot.rule.holds(variant.layout) or (slot.optional and not optional):
            continue
        missing |= {key: () for key, _ in slot.rule.when if key not in variant.layout}
        for name in fill(slot, side, variant, numbers):
            out[name] = slot_shape(slot, side, sizes)
    if missing:
        raise missing_choice(table, "nothing tells", missing)
    return Stacks.of(table, side, variant).stacked_shapes(out)


def hole_numbers(table: Table, side: SideName, sizes: Sizes) -> dict[str, range]:
    """Return the numbers of every integer hole on a side."""
    return {hole: span.numbers(side, sizes) for hole, span in table.holes}


def fill(slot: Slot, side: SideName, variant: Variant, numbers: Mapping[str, range]) -> Iterator[str]:
    """Return every name of a slot."""
    holes = slot.template.holes
    ranges = [range(options) if options else numbers.get(hole, range(0)) for hole, options in holes.items()]
    if prod(len(values) for values in ranges) > _MOST_NAMES:
        raise MappingError(f"{slot.template} would have more than {_MOST_NAMES} names", where=str(slot.rule.ref))
    for values in product(*ranges):
        yield variant.name(slot, side, dict(zip(holes, values, strict=True)))


def detect_family(tables: Mapping[str, Table], paths: Iterable[str], side: SideName) -> list[str]:
    """Return the families that know every given module path or parameter name on that side, under one prefix."""
    paths = list(dict.fromkeys(paths))
    found = []
    for family, table in tables.items():
        for prefix in table.prefix(side).answers:
            index = Index(table, side, (prefix,))
            if paths and not table.identity and all(index.find(path) for path in paths):
                found.append(family)
                break
    return found


def same_shape(shape: Shape, wanted: Shape) -> bool:
    """Compare shapes; ANY in ``wanted`` is equal to every length."""
    return len(shape) == len(wanted) and all(w in (n, ANY) for n, w in zip(shape, wanted, strict=True))


def shape_problem(name: str, shape: Shape, slot: Slot, side: SideName, sizes: Sizes) -> str:
    """Say which size a shape contradicts, with both numbers."""
    wanted = slot_shape(slot, side, sizes)
    said = ", ".join(f"{label} = {number}" for label, number in zip(slot_labels(slot, side), wanted, strict=True))
    return f"{name}: shape {tuple(shape)}, but {said} ({slot.rule.ref})"
