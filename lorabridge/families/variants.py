"""Which of a table's variants a checkpoint follows, and what its names belong to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from ..errors import MappingError, UsageError
from ..names import Template
from .rules import SIDES, Buffer, Rule, SideName, Slot, Stack, Table, Tied, When, other_side, slots, slots_of

Shape = tuple[int, ...]
Owner = Slot | Stack | Tied | Buffer


@dataclass(frozen=True, slots=True)
class Hit:
    """A name that fits a template: what it belongs to, and its prefix (None where the template takes none)."""

    what: Owner
    bindings: Mapping[str, int]
    prefix: str | None

    @property
    def when(self) -> When:
        """Layout choices that this reading implies."""
        return self.what.rule.when if isinstance(self.what, Slot) else self.what.when


class Index:
    """Every template of one side of a table, found by a name's first and last segment and its number of dots."""

    def __init__(self, table: Table, side: SideName, prefixes: Iterable[str]) -> None:
        self._buckets: dict[tuple[str, str, int], list[tuple[Template, Owner, str | None]]] = {}
        prefixes = tuple(prefixes)
        for slot in slots(table, side):
            self._add(slot.template, slot, prefixes if slot.rule.prefixed else ())
        for stack in table.stacks:
            if stack.owner == side:
                self._add(stack.stored, stack, prefixes if stack.prefixed else ())
        for tied in table.tied:
            self._add(tied.side(side), tied, ())
        for buffer in table.buffers:
            self._add(buffer.side(side), buffer, prefixes if buffer.prefixed else ())

    def _add(self, template: Template | None, what: Owner, prefixes: tuple[str, ...]) -> None:
        if template is None:
            return
        for prefix in prefixes or (None,):
            full = template.between(prefix or "")
            whole = len(full.pieces) == 1
            first, dot, _ = full.head.partition(".")
            _, last_dot, last = full.tail.rpartition(".")
            key = (first if whole or dot else "", last if whole or last_dot else "", _dots(full))
            self._buckets.setdefault(key, []).append((full, what, prefix))

    def find(self, name: str) -> list[Hit]:
        """Return every reading of a name."""
        first, last, dots = name.partition(".")[0], name.rpartition(".")[2], name.count(".")
        hits = []
        for key in product((first, ""), (last, ""), (dots, -1)):
            for template, what, prefix in self._buckets.get(key, ()):
                bindings = template.match(name)
                if bindings is not None:
                    hits.append(Hit(what, bindings, prefix))
        return hits


def _dots(template: Template) -> int:
    """Return how many dots every matching name has; -1 where options differ in it."""
    dots = 0
    for piece in template.pieces:
        found = {text.count(".") for text in ((piece,) if isinstance(piece, str) else piece.options or ("",))}
        if len(found) > 1:
            return -1
        dots += found.pop()
    return dots


@dataclass(frozen=True, slots=True)
class Variant:
    """Which of a table's variants a checkpoint follows."""

    hf_prefix: str
    ms_prefix: str
    layout: Mapping[str, str]

    def prefix(self, side: SideName) -> str:
        """Return one side's prefix."""
        return self.hf_prefix if side == "hf" else self.ms_prefix

    def name(self, slot: Slot, side: SideName, bindings: Mapping[str, int]) -> str:
        """Return the full name of a slot's parameter or module."""
        return (self.prefix(side) if slot.rule.prefixed else "") + slot.template.fill(bindings)

    def holds(self, when: When) -> bool:
        """Say whether conditions do not contradict the choices."""
        return all(self.layout.get(key, choice) == choice for key, choice in when)


@dataclass
class Evidence:
    """What names say about layouts: ``implied``: choice by layout, with a name that says so; ``open``: what remains
    possible for a layout where names leave several. ``prefixes``: those that names have, each with one of them."""

    implied: dict[str, dict[str, str]] = field(default_factory=dict)
    open: dict[str, set[str]] = field(default_factory=dict)
    prefixes: dict[str, str] = field(default_factory=dict)

    def take(self, key: str, choices: set[str], name: str) -> None:
        """Note the choices under which one name can be read."""
        if "" in choices:  # some reading holds whatever the layout is
            self.open.setdefault(key, choices)
        elif len(choices) == 1:
            self.implied.setdefault(key, {}).setdefault(next(iter(choices)), name)
        else:
            before = self.open.get(key, choices)
            self.open[key] = choices if "" in before else before & choices or choices


def resolve(
    table: Table, names: Iterable[str] | Mapping[str, Shape], *, side: SideName, layout: Mapping[str, str]
) -> Variant:
    """Find the variant of a checkpoint from its names on ``side`` and the user's choices.

    ``names``: with shapes, the number of axes tells stacks apart too. ``layout`` holds declared layouts and
    ``hf_prefix``/``ms_prefix`` (``""`` or the table's text). A UsageError names an unknown or missing choice and lists
    the choices; a MappingError a checkpoint that mixes two variants.
    """
    evidence = evidence_of(table, names, side=side, layout=layout)
    seen, given = evidence.prefixes, _given(table, layout)
    if len(seen) > 1:
        raise MappingError(
            f"the checkpoint mixes names with and without the prefix {table.prefix(side).text!r}", where=seen.values()
        )
    chosen = _choose(table, given, evidence)
    theirs = _prefixes(table, other_side(side), layout)
    mine = next(iter(seen), _prefixes(table, side, layout)[0])
    found = {side: mine, other_side(side): mine if table.alike and mine in theirs else theirs[0]}
    return Variant(found["hf"], found["ms"], chosen)


def evidence_of(
    table: Table, names: Iterable[str] | Mapping[str, Shape], *, side: SideName, layout: Mapping[str, str]
) -> Evidence:
    """Say what names tell about prefixes and layouts, the given choices considered; see :func:`resolve`."""
    given = _given(table, layout)
    index = Index(table, side, _prefixes(table, side, layout))
    shapes = names if isinstance(names, Mapping) else {}
    beyond = _beyond(table, side)
    evidence = Evidence()
    for name in names:
        hits = [hit for hit in index.find(name) if all(given.get(key, c) == c for key, c in hit.when)]
        hits = [hit for hit in hits if _rank_fits(hit, shapes.get(name))]
        evidence.prefixes.update({hit.prefix: name for hit in hits if hit.prefix is not None})
        readings = [_reading(hit, beyond, given) for hit in hits]
        for key in {key for reading in readings for key in reading}:
            evidence.take(key, {choice for reading in readings for choice in reading.get(key, ("",))}, name)
    return evidence


def _reading(hit: Hit, beyond: Mapping[int, Mapping[str, set[str]]], given: Mapping[str, str]) -> dict[str, set[str]]:
    """Return the choices under which a name can be read so, by layout."""
    found = {
        key: {c for c in choices if given.get(key, c) == c} for key, choices in beyond.get(_source(hit), {}).items()
    }
    return {key: choices for key, choices in found.items() if choices} | {key: {choice} for key, choice in hit.when}


def _source(hit: Hit) -> int:
    """Name what a parameter belongs to; factors of adapters do not depend on how weights are stacked."""
    if isinstance(hit.what, Slot):
        return 0 if hit.what.field == "module" else id(hit.what.rule)
    return id(hit.what)


def _rank_fits(hit: Hit, shape: Shape | None) -> bool:
    """Compare a stack's number of axes with a tensor's: that tells a stack of matrices from a flat one."""
    if shape is None or not isinstance(hit.what, Stack):
        return True
    return hit.what.flat == (len(shape) == 2) or len(shape) == 1


def _beyond(table: Table, side: SideName) -> dict[int, dict[str, set[str]]]:
    """Return, by rule and stack of ``side``, the layouts that its parameters depend on, with their choices.

    These are what decides how the other side stacks them; and for a stack, which of its items' rules holds: "" where
    one does whatever the choice is.
    """
    said: dict[int, list[dict[str, set[str]]]] = {}
    for rule in table.rules if table.stacks else ():
        theirs = [pair for stack in stacks_of(table, rule, other_side(side)) for pair in stack.when]
        mine = stacks_of(table, rule, side)
        for what in (rule, *mine):
            row: dict[str, set[str]] = {}
            for key, choice in (*theirs, *(rule.when if mine else ())):
                row.setdefault(key, set()).add(choice)
            said.setdefault(id(what), []).append(row)
    return {
        what: {key: {choice for row in rows for choice in row.get(key, ("",))} for row in rows for key in row}
        for what, rows in said.items()
    }


def stacks_of(table: Table, rule: Rule, side: SideName) -> list[Stack]:
    """Return the stacks that hold a rule's parameters on a side."""
    items = [slot.template for slot in slots_of(rule, side) if slot.field != "module"]
    return [s for s in table.stacks if s.owner == side and any(s.item.overlap(item) for item in items)]


def layout_from_config(table: Table, config: Mapping[str, object]) -> dict[str, str]:
    """Return the choices that a model's config.json makes; none where there is no config."""
    found = {}
    for entry in table.layouts if config else ():
        name, choice, other = entry.told or ("", None, None)
        said = choice if _is_set(config.get(name)) else other
        if said is not None:
            found[entry.name] = said
    return found


def _is_set(value: object) -> bool:
    return value is True or (isinstance(value, int) and value > 0)


def _prefixes(table: Table, side: SideName, layout: Mapping[str, str]) -> tuple[str, ...]:
    answers = table.prefix(side).answers
    wanted = layout.get(f"{side}_prefix")
    if wanted is None:
        return answers
    if wanted not in answers:
        raise UsageError(
            f"{table.family} names have no {side} prefix {wanted!r}",
            hint=f"--layout {side}_prefix= takes {' or '.join(repr(a) for a in answers)}",
        )
    return (wanted,)


def _given(table: Table, layout: Mapping[str, str]) -> dict[str, str]:
    known = {entry.name: dict(entry.choices) for entry in table.layouts}
    given = {key: choice for key, choice in layout.items() if key not in ("hf_prefix", "ms_prefix")}
    for key, choice in given.items():
        if key not in known:
            names = [f"{name}={'|'.join(choices)}" for name, choices in known.items()]
            names += [f"{side}_prefix" for side in SIDES if table.prefix(side).text]
            raise UsageError(
                f"{table.family} has no layout {key!r}",
                hint=f"--layout takes {', '.join(names)}" if names else "leave out --layout: it has none",
            )
        if choice not in known[key]:
            raise UsageError(f"layout {key} has no choice {choice!r}", hint=choices_text(table, key))
    return given


def choices_text(table: Table, key: str, among: Iterable[str] = ()) -> str:
    """Spell a layout's choices as a hint; ``among``: only these."""
    listed = _listed(table, key, among)
    return "choose " + ", or ".join(f"--layout {key}={choice} ({versions})" for choice, versions in listed)


def missing_choice(table: Table, said: str, missing: Mapping[str, Iterable[str]]) -> UsageError:
    """Return the error that asks for every layout that is needed and not known, with the choices that are left.

    ``said``: what does not tell them, as ``the names do not tell``.
    """
    keys = list(missing)
    if len(keys) == 1:
        return UsageError(f"{said} which {keys[0]} is meant", hint=choices_text(table, keys[0], missing[keys[0]]))
    listed = {key: _listed(table, key, missing[key]) for key in keys}
    flags = " ".join(f"--layout {key}={'|'.join(choice for choice, _ in rows)}" for key, rows in listed.items())
    return UsageError(
        f"{said} which {', '.join(keys[:-1])} and {keys[-1]} are meant",
        where=[f"--layout {key}={choice}: {versions}" for key in keys for choice, versions in listed[key]],
        hint=f"add, with one value of each: {flags}",
    )


def _listed(table: Table, key: str, among: Iterable[str]) -> Sequence[tuple[str, str]]:
    entry = next(entry for entry in table.layouts if entry.name == key)
    return [row for row in entry.choices if row[0] in set(among)] or entry.choices


def _choose(table: Table, given: Mapping[str, str], evidence: Evidence) -> dict[str, str]:
    chosen = dict(given)
    for key, said in evidence.implied.items():
        if len(said) > 1:
            raise MappingError(f"the checkpoint mixes layouts of {key}", where=[f"{n}: {c}" for c, n in said.items()])
        chosen.setdefault(key, next(iter(said)))
    missing: dict[str, set[str]] = {}
    for key in sorted(set(evidence.open) - set(chosen)):
        default = next(entry.default for entry in table.layouts if entry.name == key)
        if default is None or not evidence.open[key] & {default, ""}:
            missing[key] = evidence.open[key]
        else:
            chosen[key] = default
    if missing:
        raise missing_choice(table, "the names do not tell", missing)
    return chosen
