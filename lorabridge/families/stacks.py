"""Stacked parameters: one stored tensor that rules see as many, one per expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..axes import cut, join, reshape
from ..dialects.adapter import Extra
from ..names import Template
from .rules import SideName, Stack, Table
from .variants import Shape, Variant


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a stored tensor: ``stored`` is its full name, ``number`` the item's place in it."""

    stack: Stack
    stored: str
    number: int


@dataclass(frozen=True, slots=True)
class Stacks:
    """The stacks of one side under one variant: (stack, stored template, item template), prefixes included."""

    entries: tuple[tuple[Stack, Template, Template], ...]

    @classmethod
    def of(cls, table: Table, side: SideName, variant: Variant) -> Stacks:
        """Take the stacks that the variant has."""
        entries = []
        for stack in table.stacks:
            if stack.owner == side and variant.holds(stack.when):
                prefix = variant.prefix(side) if stack.prefixed else ""
                entries.append((stack, stack.stored.between(prefix), stack.item.between(prefix)))
        return cls(tuple(entries))

    def item(self, name: str) -> Item | None:
        """Return which stored tensor a parameter of a rule lies in; None where it is stored by itself."""
        for stack, stored, item in self.entries:
            bindings = item.match(name)
            if bindings is not None:
                inside = {hole: value for hole, value in bindings.items() if hole != stack.hole}
                return Item(stack, stored.fill(inside), bindings[stack.hole])
        return None

    def module(self, path: str, weight: str) -> Item | None:
        """Return which stored tensor the weight of a rule's module lies in."""
        return self.item(f"{path}.{weight}")

    def items(self, name: str, shape: Shape, count: int | None) -> dict[str, Shape] | None:
        """Return the items of a stored tensor with their shapes; None for any other tensor.

        ``count``: how many there are, which a flat stack does not show. ValueError where the shape does not fit.
        """
        for stack, stored, item in self.entries:
            bindings = stored.match(name)
            if bindings is None:
                continue
            if not stack.flat:
                number, one = shape[0] if shape else 0, shape[1:]
            elif count is None:
                raise LookupError(stack.hole)
            else:
                number, one = count, (shape[0] // count if shape and count else 0, *shape[1:])
            if number < 1 or (stack.flat and one[0] * number != shape[0]):
                raise ValueError(f"shape {tuple(shape)} is no stack of {number}")
            return {item.fill({**bindings, stack.hole: k}): one for k in range(number)}
        return None

    def stacked_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Return names and shapes as they are stored, in the order of the first item."""
        out: dict[str, Shape] = {}
        counts: dict[str, int] = {}
        for name, shape in shapes.items():
            found = self.item(name) if self.entries else None
            if found is None:
                out[name] = shape
                continue
            count = counts[found.stored] = counts.get(found.stored, 0) + 1
            out[found.stored] = (count * shape[0], *shape[1:]) if found.stack.flat else (count, *shape)
        return out

    def unstack(self, extras: Iterable[Extra], counts: Mapping[str, int]) -> list[Extra]:
        """Take stored tensors apart into the parameters that rules know.

        ``counts``: how many numbers each hole has. Raises LookupError naming the hole where a flat stack needs one,
        ValueError for a shape that is no stack.
        """
        out = []
        for extra in extras:
            hole = self.hole(extra.name)
            items = None if hole is None else self.items(extra.name, extra.value.shape, counts.get(hole))
            if items is None:
                out.append(extra)
                continue
            whole = reshape(extra.value, (len(items), *next(iter(items.values()))))
            for k, (name, shape) in enumerate(items.items()):
                path, _, parameter = name.rpartition(".")
                out.append(
                    replace(extra, path=path, parameter=parameter, value=reshape(cut(whole, 0, k, k + 1), shape))
                )
        return out

    def hole(self, name: str) -> str | None:
        """Return the hole that counts the items of a stored tensor; None for any other tensor."""
        return next((stack.hole for stack, stored, _ in self.entries if stored.match(name) is not None), None)

    def stack(self, extras: Sequence[Extra], counts: Mapping[str, int]) -> tuple[list[Extra], list[str]]:
        """Put parameters together as they are stored; also say which items are missing."""
        if not self.entries:
            return list(extras), []
        out: list[Extra] = []
        gathered: dict[tuple[str, str], dict[int, Extra]] = {}
        stacks: dict[str, Stack] = {}
        for extra in extras:
            found = self.item(extra.name)
            if found is None:
                out.append(extra)
                continue
            stacks[found.stored] = found.stack
            gathered.setdefault((found.stored, extra.kind), {})[found.number] = extra
        problems = []
        for (name, _), items in gathered.items():
            count = max(counts.get(stacks[name].hole, 0), max(items) + 1)
            missing = [k for k in range(count) if k not in items]
            if missing:
                problems.append(f"{name}: needs all {count} of its parts; number {missing[0]} is missing")
                continue
            parts = [items[k].value for k in range(count)]
            shape = parts[0].shape
            whole = join([reshape(part, (1, *shape)) for part in parts], 0)
            if stacks[name].flat:
                whole = reshape(whole, (count * shape[0], *shape[1:]))
            path, _, parameter = name.rpartition(".")
            out.append(replace(items[0], path=path, parameter=parameter, value=whole))
        return out, problems
