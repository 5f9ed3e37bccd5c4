"""What a family table says, as values: rules, prefixes, layouts, stacks, ties, buffers. ``grammar`` reads TOML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ..names import Template
from ..sizes import Size
from .arrangements import Arrangement

SideName = Literal["hf", "ms"]
Order = Literal["out in", "in out"]
RuleKind = Literal["linear", "embedding", "param", "conv"]
SIDES: tuple[SideName, SideName] = ("hf", "ms")
ONE = Size.parse("1")
ZERO = Size.parse("0")

Field = Literal["module", "weight", "bias", "param"]
When = tuple[tuple[str, str], ...]


def other_side(side: SideName) -> SideName:
    """Return the opposite side."""
    return "ms" if side == "hf" else "hf"


@dataclass(frozen=True, slots=True)
class RuleRef:
    """Where a rule stands; line 0 when it could not be found in the text."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True, slots=True)
class Face:
    """One module of a side (kind "param": one parameter): which parts of the rule it holds, by position, in row order.

    ``groups``: see ``layouts.split_rows``.
    """

    template: Template
    parts: tuple[int, ...] = (0,)
    groups: Size = ONE


@dataclass(frozen=True, slots=True)
class Side:
    """How one side calls and stores what a rule is about.

    ``order``: axes of the stored base weight. ``weight``: the parameter that a LoRA delta is added to, ``bias`` the one
    beside it. ``rows``: per part, how its rows lie there (None: in the common order; empty: all are). ``stored``: the
    axes of a "param" or of a "conv" weight where they differ from the common ones.
    """

    faces: tuple[Face, ...]
    order: Order = "out in"
    weight: str = "weight"
    bias: str = "bias"
    rows: tuple[Arrangement | None, ...] = ()
    stored: Arrangement | None = None

    def rows_of(self, part: int) -> Arrangement | None:
        """Return how a part's rows lie."""
        return self.rows[part] if self.rows else None


@dataclass(frozen=True, slots=True)
class Rule:
    """One correspondence between the sides.

    ``parts`` and ``out`` go together: one entry for a rename, several where a side fuses. ``inner``: the weight's
    other axis. ``axes``: shape of a "param", kernel of a "conv". ``when``: (layout, choice) pairs that must hold.
    ``only``: the architectures that have it; empty = all. ``prefixed``: lies under the sides' prefixes. ``optional``:
    a model may be without it.
    """

    kind: RuleKind
    ref: RuleRef
    hf: Side
    ms: Side
    parts: tuple[str, ...] = ("",)
    out: tuple[Size, ...] = ()
    inner: Size | None = None
    axes: tuple[Size, ...] = ()
    bias: Literal["yes", "no", "optional"] = "no"
    when: When = ()
    only: tuple[str, ...] = ()
    prefixed: bool = True
    optional: bool = False

    def side(self, name: SideName) -> Side:
        """Return one side."""
        return self.hf if name == "hf" else self.ms

    def fused(self, name: SideName) -> bool:
        """Say whether a module of this side holds several parts."""
        return any(len(face.parts) > 1 for face in self.side(name).faces)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Every expression of the rule."""
        groups = [face.groups for side in (self.hf, self.ms) for face in side.faces]
        arranged = [a for side in (self.hf, self.ms) for a in (*side.rows, side.stored) if a is not None]
        inner = (self.inner,) if self.inner else ()
        return (*self.out, *inner, *self.axes, *groups, *(atom for a in arranged for atom in a.atoms))

    def holds(self, layout: Mapping[str, str]) -> bool:
        """Say whether the conditions do not contradict the choices made so far."""
        return all(layout.get(key, choice) == choice for key, choice in self.when)


@dataclass(frozen=True, slots=True)
class Prefix:
    """What every prefixed name of a side begins with; optional: all names of a checkpoint have it, or none.

    ``also``: other texts that checkpoints have in its place, such as that of a wrapper that was trained.
    """

    text: str = ""
    optional: bool = False
    also: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """The prefixes a checkpoint may have, the usual one first."""
        return (self.text, *self.also, "") if self.optional and self.text else (self.text, *self.also)


@dataclass(frozen=True, slots=True)
class Span:
    """The numbers an integer hole counts through: on each side from its own start, ``count`` of them or up to ``stop``.

    ``stop`` is given where both sides count alike.
    """

    hf: Size = ZERO
    ms: Size = ZERO
    stop: Size | None = None
    count: Size | None = None

    def start(self, side: SideName) -> Size:
        """Return a side's first number."""
        return self.hf if side == "hf" else self.ms

    def numbers(self, side: SideName, sizes: Mapping[str, int]) -> range:
        """Return a side's numbers; empty where a config has none; SizeError where a size has no value."""
        first = self.start(side).value(sizes, zero=True)
        if self.stop is not None:
            return range(first, max(first, self.stop.value(sizes, zero=True)))
        assert self.count is not None
        return range(first, first + self.count.value(sizes, zero=True))

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Every expression of the span."""
        return tuple(size for size in (self.hf, self.ms, self.stop, self.count) if size is not None)

    @property
    def shifted(self) -> bool:
        """The sides count from different numbers."""
        return self.hf.text != self.ms.text

    def reverse(self) -> Span:
        """Exchange the sides."""
        return replace(self, hf=self.ms, ms=self.hf)


@dataclass(frozen=True, slots=True)
class Layout:
    """A property of a checkpoint that shapes do not show. ``choices``: (choice, the versions it belongs to).

    ``told``: (field, choice, other): a field of config.json that says the choice when it is true or a number above
    zero, and otherwise the other one, where there is one.
    """

    ref: RuleRef
    name: str
    choices: tuple[tuple[str, str], ...]
    default: str | None = None
    told: tuple[str, str, str | None] | None = None


@dataclass(frozen=True, slots=True)
class Stack:
    """One stored tensor of a side that is many parameters of rules, one after another along its first axis.

    ``item``: the full name of one of them, with the hole ``hole`` that ``stored`` lacks. ``flat``: the first axis of
    the items is joined to it, so that a stack of matrices is a matrix.
    """

    ref: RuleRef
    owner: SideName
    stored: Template
    item: Template
    hole: str
    flat: bool = False
    when: When = ()
    prefixed: bool = True


@dataclass(frozen=True, slots=True)
class Tied:
    """A parameter that equals another, ``to``, which ``owner`` (the side that ties them) keeps anyway.

    A side without a template does not store it: it is dropped on the way there, after a check that it is equal.
    """

    ref: RuleRef
    hf: Template | None
    ms: Template | None
    to: Template
    owner: SideName = "hf"
    when: When = ()

    def side(self, name: SideName) -> Template | None:
        """Return one side."""
        return self.hf if name == "hf" else self.ms


@dataclass(frozen=True, slots=True)
class Buffer:
    """A tensor that is not carried, and why."""

    ref: RuleRef
    hf: Template | None
    ms: Template | None
    drop: str
    prefixed: bool = True
    when: When = ()

    def side(self, name: SideName) -> Template | None:
        """Return one side."""
        return self.hf if name == "hf" else self.ms


@dataclass(frozen=True, slots=True)
class Refused:
    """A config without a model on the ms side: a field (a list counts its entries, none is 0) beyond a number."""

    ref: RuleRef
    config: str
    over: int | None
    under: int | None
    why: str

    def meets(self, value: int) -> bool:
        """Say whether a field's value is one that is refused."""
        return (self.over is not None and value > self.over) or (self.under is not None and value < self.under)


@dataclass(frozen=True, slots=True)
class Table:
    """The correspondence of one model family's Hugging Face names and one MindSpore project's names.

    ``sizes``: in order, each over config fields and earlier sizes. ``holes``: how far an integer hole counts.
    ``identity``: no rules, every path stays as it is. ``alike``: both sides have the same prefix, or both none.
    """

    family: str
    file: str
    model_types: tuple[str, ...] = ()
    sizes: tuple[tuple[str, Size], ...] = ()
    holes: tuple[tuple[str, Span], ...] = ()
    hf_prefix: Prefix = Prefix()
    ms_prefix: Prefix = Prefix()
    alike: bool = False
    layouts: tuple[Layout, ...] = ()
    rules: tuple[Rule, ...] = ()
    stacks: tuple[Stack, ...] = ()
    tied: tuple[Tied, ...] = ()
    buffers: tuple[Buffer, ...] = ()
    refused: tuple[Refused, ...] = ()
    identity: bool = False

    def prefix(self, side: SideName) -> Prefix:
        """Return one side's prefix."""
        return self.hf_prefix if side == "hf" else self.ms_prefix

    def span(self, hole: str) -> Span:
        """Return what an integer hole counts through."""
        return dict(self.holes)[hole]

    def reverse(self) -> Table:
        """Return the table with its sides exchanged; reversing twice gives the table back."""
        return replace(
            self,
            hf_prefix=self.ms_prefix,
            ms_prefix=self.hf_prefix,
            holes=tuple((name, span.reverse()) for name, span in self.holes),
            rules=tuple(replace(rule, hf=rule.ms, ms=rule.hf) for rule in self.rules),
            stacks=tuple(replace(s, owner=other_side(s.owner)) for s in self.stacks),
            tied=tuple(replace(t, hf=t.ms, ms=t.hf, owner=other_side(t.owner)) for t in self.tied),
            buffers=tuple(replace(b, hf=b.ms, ms=b.hf) for b in self.buffers),
        )


@dataclass(frozen=True, slots=True)
class Slot:
    """One kind of name on one side: a module, or a parameter, of one face of a rule. ``template`` has no prefix yet."""

    template: Template
    rule: Rule
    face: int
    field: Field

    @property
    def optional(self) -> bool:
        """A complete model may be without it."""
        return self.rule.optional or (self.field == "bias" and self.rule.bias == "optional")


def slots(table: Table, side: SideName) -> tuple[Slot, ...]:
    """Return every module and parameter template of a side, in the table's order."""
    return tuple(slot for rule in table.rules for slot in slots_of(rule, side))


def slots_of(rule: Rule, side: SideName) -> list[Slot]:
    """Return one rule's slots on a side."""
    out = []
    face = rule.side(side)
    for k, module in enumerate(face.faces):
        if rule.kind == "param":
            out.append(Slot(module.template, rule, k, "param"))
            continue
        out.append(Slot(module.template, rule, k, "module"))
        out.append(Slot(module.template.between("", f".{face.weight}"), rule, k, "weight"))
        if rule.bias != "no":
            out.append(Slot(module.template.between("", f".{face.bias}"), rule, k, "bias"))
    return out
