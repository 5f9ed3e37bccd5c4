"""What a family table says, as values: rules, prefixes, layouts, ties and buffers. Reading TOML is ``tables``' work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ..names import Template
from ..sizes import Size

SideName = Literal["hf", "ms"]
Order = Literal["out in", "in out"]
RuleKind = Literal["linear", "embedding", "param"]
ONE = Size.parse("1")

Field = Literal["module", "weight", "bias", "param"]


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
class Side:
    """How one side calls a rule's modules (kind "param": parameters).

    ``templates``: one, or one per part in row order. ``order``: axes of the stored base weight.
    ``weight``: the parameter that a LoRA delta is added to.
    """

    templates: tuple[Template, ...]
    order: Order = "out in"
    weight: str = "weight"


@dataclass(frozen=True, slots=True)
class Rule:
    """One correspondence between the sides.

    ``parts`` and ``out`` go together: one entry for a rename, several where one side fuses. ``inner``: the weight's
    other axis. ``axes``: shape of a "param". ``groups``: see ``layouts.split_rows``. ``when``: (layout, choice) pairs
    that must hold. ``only``: the architectures that have it; empty = all. ``prefixed``: lies under the sides' prefixes.
    ``optional``: a model may be without it.
    """

    kind: RuleKind
    ref: RuleRef
    hf: Side
    ms: Side
    parts: tuple[str, ...]
    out: tuple[Size, ...] = ()
    inner: Size | None = None
    axes: tuple[Size, ...] = ()
    bias: Literal["yes", "no", "optional"] = "no"
    groups: Size = ONE
    when: tuple[tuple[str, str], ...] = ()
    only: tuple[str, ...] = ()
    prefixed: bool = True
    optional: bool = False

    def side(self, name: SideName) -> Side:
        """Return one side."""
        return self.hf if name == "hf" else self.ms

    def fused(self, name: SideName) -> bool:
        """Say whether this side holds several parts in one module."""
        return len(self.side(name).templates) < len(self.parts)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Every expression of the rule."""
        return (*self.out, *((self.inner,) if self.inner else ()), *self.axes, self.groups)

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
class Layout:
    """A property of a checkpoint that shapes do not show. ``choices``: (choice, the versions it belongs to).

    ``told``: (field, choice): a field of config.json that, when it is true, says the choice.
    """

    ref: RuleRef
    name: str
    choices: tuple[tuple[str, str], ...]
    default: str | None = None
    told: tuple[str, str] | None = None


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
    when: tuple[tuple[str, str], ...] = ()

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

    def side(self, name: SideName) -> Template | None:
        """Return one side."""
        return self.hf if name == "hf" else self.ms


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
    holes: tuple[tuple[str, Size], ...] = ()
    hf_prefix: Prefix = Prefix()
    ms_prefix: Prefix = Prefix()
    alike: bool = False
    layouts: tuple[Layout, ...] = ()
    rules: tuple[Rule, ...] = ()
    tied: tuple[Tied, ...] = ()
    buffers: tuple[Buffer, ...] = ()
    identity: bool = False

    def prefix(self, side: SideName) -> Prefix:
        """Return one side's prefix."""
        return self.hf_prefix if side == "hf" else self.ms_prefix

    def reverse(self) -> Table:
        """Return the table with its sides exchanged; reversing twice gives the table back."""
        return replace(
            self,
            hf_prefix=self.ms_prefix,
            ms_prefix=self.hf_prefix,
            rules=tuple(replace(rule, hf=rule.ms, ms=rule.hf) for rule in self.rules),
            tied=tuple(replace(t, hf=t.ms, ms=t.hf, owner=other_side(t.owner)) for t in self.tied),
            buffers=tuple(replace(b, hf=b.ms, ms=b.hf) for b in self.buffers),
        )


@dataclass(frozen=True, slots=True)
class Slot:
    """One kind of name on one side: a module, or a parameter, of one part of a rule. ``template`` has no prefix yet."""

    template: Template
    rule: Rule
    part: int
    field: Field

    @property
    def optional(self) -> bool:
        """A complete model may be without it."""
        return self.rule.optional or (self.field == "bias" and self.rule.bias == "optional")


def slots(table: Table, side: SideName) -> tuple[Slot, ...]:
    """Return every module and parameter template of a side, in the table's order."""
    out = []
    for rule in table.rules:
        face = rule.side(side)
        for part, template in enumerate(face.templates):
            if rule.kind == "param":
                out.append(Slot(template, rule, part, "param"))
                continue
            out.append(Slot(template, rule, part, "module"))
            out.append(Slot(template.between("", f".{face.weight}"), rule, part, "weight"))
            if rule.bias != "no":
                out.append(Slot(template.between("", ".bias"), rule, part, "bias"))
    return tuple(out)
