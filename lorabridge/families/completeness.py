"""What a checkpoint lacks, has too much of, or has in another shape, compared with its family's table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import MappingError
from ..names import natural_key
from .models import Sizes, fill, hole_numbers, same_shape, shape_problem, slot_shape
from .rules import Rule, SideName, Slot, Table, Tied, other_side, slots, slots_of
from .stacks import Stacks
from .variants import Hit, Index, Shape, Variant, resolve

CONFIG = "give the model's configuration with --config config.json"


@dataclass(frozen=True, slots=True)
class Completeness:
    """How a full model's names compare with its table: lists of names, and sentences about shapes."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each."""
        lines = [f"{name}: missing" for name in self.missing]
        return (*lines, *(f"{name}: unexpected" for name in self.unexpected), *self.shapes)


def check_complete(
    table: Table, shapes: Mapping[str, Shape], *, side: SideName, sizes: Sizes | None = None,
    layout: Mapping[str, str] | None = None, architecture: str = "",
) -> Completeness:  # fmt: skip
    """Compare a full model's parameters with the table; ``shapes``: name to shape, buffers and ties included.

    Without ``sizes`` the numbers of layers are taken from the names, so that gaps are found, and shapes are not
    compared. Without ``architecture`` a part that only some architectures have may be there or not, but not by half.
    """
    if table.identity:
        return Completeness()
    variant = resolve(table, shapes, side=side, layout=layout or {})
    stacks = Stacks.of(table, side, variant)
    wrong: list[str] = []
    items = _items(table, stacks, shapes, side, sizes, wrong)
    index = Index(table, side, (variant.prefix(side),))
    hits = {name: [hit for hit in index.find(name) if variant.holds(hit.when)] for name in items}
    numbers = hole_numbers(table, side, sizes) if sizes else _numbers(table, hits)
    missing: list[str] = []
    wanted: dict[str, Slot] = {}
    for rule in table.rules:
        if not rule.holds(variant.layout):
            continue
        mine = {
            name: slot
            for slot in slots_of(rule, side)
            if slot.field != "module"
            for name in fill(slot, side, variant, numbers)
        }
        if _absent(rule, mine, items, architecture):
            continue
        wanted |= mine
        missing += [name for name, slot in mine.items() if name not in items and not slot.optional]
    ignored = {n for n, found in hits.items() if any(not isinstance(hit.what, Slot) for hit in found)}
    unexpected = sorted((n for n in items if n not in wanted and n not in ignored), key=natural_key)
    for name, slot in wanted.items():
        if sizes and name in items and not same_shape(items[name], slot_shape(slot, side, sizes)):
            wrong.append(shape_problem(name, items[name], slot, side, sizes))
    return Completeness(_stored(stacks, missing, shapes), _stored(stacks, unexpected, shapes), tuple(wrong))


def _items(
    table: Table, stacks: Stacks, shapes: Mapping[str, Shape], side: SideName, sizes: Sizes | None, wrong: list[str]
) -> dict[str, Shape]:
    """Take stacked parameters apart."""
    counts = {hole: len(numbers) for hole, numbers in hole_numbers(table, side, sizes).items()} if sizes else {}
    found: dict[str, Shape] = {}
    for name, shape in shapes.items():
        try:
            found |= stacks.items(name, shape, counts.get(stacks.hole(name) or "")) or {name: shape}
        except LookupError as error:
            raise MappingError(f"the number of {{{error.args[0]}}} is not known", where=name, hint=CONFIG) from None
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    return found


def _absent(rule: Rule, mine: Iterable[str], items: Mapping[str, Shape], architecture: str) -> bool:
    """Say whether only other architectures have a rule's parameters."""
    if not rule.only:
        return False
    return architecture not in rule.only if architecture else not any(name in items for name in mine)


def _stored(stacks: Stacks, names: Iterable[str], shapes: Mapping[str, Shape]) -> tuple[str, ...]:
    """Name parameters as they are stored; of a stack that is there, the items."""
    out: dict[str, None] = {}
    for name in names:
        item = stacks.item(name)
        out[name if item is None or item.stored in shapes else item.stored] = None
    return tuple(out)


def _numbers(table: Table, hits: Mapping[str, list[Hit]]) -> dict[str, range]:
    """Find which numbers every hole counts through from the names themselves."""
    seen: dict[str, tuple[int, int]] = {}
    for name, found in hits.items():
        rules = {id(hit.what.rule) for hit in found if isinstance(hit.what, Slot) and hit.what.field != "module"}
        if len(rules) > 1:
            raise MappingError("the name alone does not tell what the tensor is", where=name, hint=CONFIG)
        for hit in found:
            for hole, value in hit.bindings.items():
                low, high = seen.get(hole, (value, value))
                seen[hole] = min(low, value), max(high, value)
    numbers = {}
    for hole, span in table.holes:
        low, high = seen.get(hole, (0, -1))
        numbers[hole] = range(low if span.hf.fields or span.ms.fields else 0, high + 1)
        if len(numbers[hole]) > len(hits):
            raise MappingError(
                f"{len(numbers[hole])} times {{{hole}}} in a checkpoint of {len(hits)} tensors", where=table.file
            )
    return numbers


def tied_target(table: Table, tied: Tied, side: SideName, variant: Variant) -> str:
    """Return the name, on either side, of the parameter that a tied one equals."""
    for mine in slots(table, tied.owner):
        bindings = mine.template.match(tied.to.text) if mine.field != "module" else None
        if bindings is not None and mine.rule.holds(variant.layout):
            theirs = next(slot for slot in slots_of(mine.rule, side) if slot.field == mine.field)
            return variant.name(theirs, side, bindings)
    raise ValueError(f"{tied.ref}: {tied.to} is not mapped")


def tied_checks(
    table: Table, parameters: Iterable[str], *, side: SideName, layout: Mapping[str, str] | None = None
) -> list[tuple[str, str]]:
    """Return (name, name it must equal bit for bit) for the tied parameters that mapping away from ``side`` drops."""
    present = list(parameters)
    if table.identity:
        return []
    variant = resolve(table, present, side=side, layout=layout or {})
    checks = []
    for tied in table.tied:
        template = tied.side(side)
        if template is None or tied.side(other_side(side)) is not None or not variant.holds(tied.when):
            continue
        names = [name for name in present if template.match(name) is not None]
        checks += [(name, tied_target(table, tied, side, variant)) for name in names]
    return checks
