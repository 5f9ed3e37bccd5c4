"""What a family table says about a whole checkpoint: its variant, its names and shapes, its family, what it lacks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

from ..errors import MappingError, UsageError
from ..names import Template, natural_key
from ..sizes import ANY, SizeError, config_integer
from .proofs import check_sizes
from .rules import Buffer, Rule, SideName, Slot, Table, Tied, other_side, slots

Shape = tuple[int, ...]
Sizes = Mapping[str, int]
_MOST_NAMES = 1_000_000
_SIDES: tuple[SideName, SideName] = ("hf", "ms")


@dataclass(frozen=True, slots=True)
class Hit:
    """A name that fits a template: what it belongs to, and its prefix (None where the template takes none)."""

    what: Slot | Tied | Buffer
    bindings: Mapping[str, int]
    prefix: str | None

    @property
    def when(self) -> tuple[tuple[str, str], ...]:
        """Layout choices that this reading implies."""
        if isinstance(self.what, Slot):
            return self.what.rule.when
        return self.what.when if isinstance(self.what, Tied) else ()


class Index:
    """Every template of one side of a table, found by a name's first and last segment."""

    def __init__(self, table: Table, side: SideName, prefixes: Iterable[str]) -> None:
        self._buckets: dict[tuple[str, str], list[tuple[Template, Slot | Tied | Buffer, str | None]]] = {}
        prefixes = tuple(prefixes)
        for slot in slots(table, side):
            self._add(slot.template, slot, prefixes if slot.rule.prefixed else ())
        for tied in table.tied:
            self._add(tied.side(side), tied, ())
        for buffer in table.buffers:
            self._add(buffer.side(side), buffer, prefixes if buffer.prefixed else ())

    def _add(self, template: Template | None, what: Slot | Tied | Buffer, prefixes: tuple[str, ...]) -> None:
        if template is None:
            return
        for prefix in prefixes or (None,):
            full = template.between(prefix or "")
            whole = len(full.pieces) == 1
            first, dot, _ = full.head.partition(".")
            _, last_dot, last = full.tail.rpartition(".")
            key = (first if whole or dot else "", last if whole or last_dot else "")
            self._buckets.setdefault(key, []).append((full, what, prefix))

    def find(self, name: str) -> list[Hit]:
        """Return every reading of a name."""
        first, last = name.partition(".")[0], name.rpartition(".")[2]
        hits = []
        for key in ((first, last), (first, ""), ("", last), ("", "")):
            for template, what, prefix in self._buckets.get(key, ()):
                bindings = template.match(name)
                if bindings is not None:
                    hits.append(Hit(what, bindings, prefix))
        return hits


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


def resolve(table: Table, names: Iterable[str], *, side: SideName, layout: Mapping[str, str]) -> Variant:
    """Find the variant of a checkpoint from its names on ``side`` and the user's choices.

    ``layout`` holds declared layouts and ``hf_prefix``/``ms_prefix`` (``""`` or the table's text). A UsageError names
    an unknown or missing choice and lists the choices; a MappingError a checkpoint that mixes two variants.
    """
    prefixes = {name: _prefixes(table, name, layout) for name in _SIDES}
    given = _given(table, layout)
    index = Index(table, side, prefixes[side])
    seen: dict[str, str] = {}
    implied: dict[str, dict[str, str]] = {}
    open_choices: set[str] = set()
    for name in names:
        hits = [hit for hit in index.find(name) if all(given.get(key, c) == c for key, c in hit.when)]
        seen.update({hit.prefix: name for hit in hits if hit.prefix is not None})
        for key in {key for hit in hits for key, _ in hit.when}:
            choices = {dict(hit.when).get(key, "") for hit in hits}
            if len(choices) == 1:
                implied.setdefault(key, {}).setdefault(choices.pop(), name)
            else:
                open_choices.add(key)
    if len(seen) > 1:
        raise MappingError(
            f"the checkpoint mixes names with and without the prefix {table.prefix(side).text!r}", where=seen.values()
        )
    chosen = _choose(table, given, implied, open_choices)
    theirs = prefixes[other_side(side)]
    mine = next(iter(seen), prefixes[side][0])
    found = {side: mine, other_side(side): mine if table.alike and mine in theirs else theirs[0]}
    return Variant(found["hf"], found["ms"], chosen)


def layout_from_config(table: Table, config: Mapping[str, object]) -> dict[str, str]:
    """Return the choices that a model's config.json makes."""
    told = [(entry.name, *entry.told) for entry in table.layouts if entry.told is not None]
    return {name: choice for name, field, choice in told if config.get(field) is True}


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
            names = ", ".join([*known, "hf_prefix", "ms_prefix"])
            raise UsageError(f"{table.family} has no layout {key!r}", hint=f"known are {names}")
        if choice not in known[key]:
            raise UsageError(f"layout {key} has no choice {choice!r}", hint=_choices(table, key))
    return given


def _choices(table: Table, key: str) -> str:
    entry = next(entry for entry in table.layouts if entry.name == key)
    return "choose " + ", or ".join(f"--layout {key}={choice} ({versions})" for choice, versions in entry.choices)


def _choose(
    table: Table, given: Mapping[str, str], implied: Mapping[str, Mapping[str, str]], open_choices: Iterable[str]
) -> dict[str, str]:
    chosen = dict(given)
    for key, evidence in implied.items():
        if len(evidence) > 1:
            raise MappingError(
                f"the checkpoint mixes layouts of {key}", where=[f"{n}: {c}" for c, n in evidence.items()]
            )
        chosen.setdefault(key, next(iter(evidence)))
    for key in sorted(set(open_choices) - set(chosen)):
        default = next(entry.default for entry in table.layouts if entry.name == key)
        if default is None:
            raise UsageError(f"the names do not tell which {key} is meant", hint=_choices(table, key))
        chosen[key] = default
    return chosen


def sizes_from_config(table: Table, config: Mapping[str, object]) -> dict[str, int]:
    """Return the table's sizes for a model's config.json; a MappingError lists every field that is missing or odd."""
    sizes: dict[str, int] = {}
    problems = []
    for name, size in table.sizes:
        try:
            sizes[name] = size.value(lambda field: sizes.get(field) or config_integer(config, field))
        except SizeError as error:
            problems.append(f"{table.file}: size {name!r}: {error}")
    problems = problems or check_sizes(table, sizes)
    if problems:
        raise MappingError(
            f"the config does not fit the table {table.family}", where=problems,
            hint="give the config.json of the model that the checkpoint belongs to",
        )  # fmt: skip
    return sizes


def slot_shape(slot: Slot, side: SideName, sizes: Sizes) -> Shape:
    """Return the shape of a parameter on one side; a SizeError where a size has no value."""
    rule = slot.rule
    if slot.field == "param":
        return tuple(axis.value(sizes) for axis in rule.axes)
    out = sum(size.value(sizes) for size in rule.out) if rule.fused(side) else rule.out[slot.part].value(sizes)
    if slot.field == "bias" or rule.inner is None:
        return (out,)
    inner = rule.inner.value(sizes)
    return (out, inner) if rule.side(side).order == "out in" else (inner, out)


def names(
    table: Table, sizes: Sizes, side: SideName, *, layout: Mapping[str, str] | None = None, architecture: str = ""
) -> dict[str, Shape]:
    """Return every parameter name and shape of a full model on one side, in the table's order.

    An axis that may have any length is -1. Parameters that only some architectures have are included when
    ``architecture`` (a class name of transformers, as in config.json) is one of them. Ties and buffers are not
    listed. A UsageError names a layout that is needed.
    """
    variant = resolve(table, (), side=side, layout=layout or {})
    counts = {hole: size.value(sizes) for hole, size in table.holes}
    out = {}
    for slot in slots(table, side):
        if slot.field == "module" or (slot.rule.only and architecture not in slot.rule.only):
            continue
        if not slot.rule.holds(variant.layout) or slot.optional:
            continue
        for key, _ in slot.rule.when:
            if key not in variant.layout:
                raise UsageError(f"the names depend on {key}", hint=_choices(table, key))
        for name in _fill(slot, side, variant, counts):
            out[name] = slot_shape(slot, side, sizes)
    return out


def _fill(slot: Slot, side: SideName, variant: Variant, counts: Mapping[str, int]) -> Iterator[str]:
    holes = slot.template.holes
    ranges = [range(options or counts.get(hole, 0)) for hole, options in holes.items()]
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

    Without ``sizes`` the number of layers is taken from the names, so that gaps are found, and shapes are not compared.
    Without ``architecture`` a part that only some architectures have may be there or not, but not by half.
    """
    if table.identity:
        return Completeness()
    variant = resolve(table, shapes, side=side, layout=layout or {})
    index = Index(table, side, (variant.prefix(side),))
    hits = {name: [hit for hit in index.find(name) if _fits(hit, variant)] for name in shapes}
    counts = _counts(table, hits, sizes)
    missing: list[str] = []
    wanted: dict[str, Slot] = {}
    for rule in table.rules:
        mine = {
            name: slot
            for slot in slots_of(table, rule, side)
            if slot.field != "module" and rule.holds(variant.layout)
            for name in _fill(slot, side, variant, counts)
        }
        if rule.only and (architecture not in rule.only if architecture else not any(name in shapes for name in mine)):
            continue
        wanted |= mine
        missing += [n for n, slot in mine.items() if n not in shapes and not slot.optional]
    ignored = {n for n, found in hits.items() if any(not isinstance(hit.what, Slot) for hit in found)}
    unexpected = sorted((n for n in shapes if n not in wanted and n not in ignored), key=natural_key)
    wrong = []
    for name, slot in wanted.items():
        if sizes and name in shapes and not same_shape(shapes[name], slot_shape(slot, side, sizes)):
            wrong.append(shape_problem(name, shapes[name], slot, side, sizes))
    return Completeness(tuple(missing), tuple(unexpected), tuple(wrong))


def slots_of(table: Table, rule: Rule, side: SideName) -> list[Slot]:
    """Return one rule's slots."""
    return [slot for slot in slots(table, side) if slot.rule is rule]


def _fits(hit: Hit, variant: Variant) -> bool:
    return all(variant.layout.get(key, choice) == choice for key, choice in hit.when)


def _counts(table: Table, hits: Mapping[str, list[Hit]], sizes: Sizes | None) -> dict[str, int]:
    if sizes:
        return {hole: size.value(sizes) for hole, size in table.holes}
    counts = dict.fromkeys((hole for hole, _ in table.holes), 0)
    for found in hits.values():
        for hit in found:
            for hole, value in hit.bindings.items():
                if hole in counts:
                    counts[hole] = max(counts[hole], value + 1)
    for hole, count in counts.items():
        if count > len(hits):
            raise MappingError(f"{count} times {{{hole}}} in a checkpoint of {len(hits)} tensors", where=table.file)
    return counts


def same_shape(shape: Shape, wanted: Shape) -> bool:
    """Compare shapes; ANY in ``wanted`` is equal to every length."""
    return len(shape) == len(wanted) and all(w in (n, ANY) for n, w in zip(shape, wanted, strict=True))


def shape_problem(name: str, shape: Shape, slot: Slot, side: SideName, sizes: Sizes) -> str:
    """Say which size a shape contradicts, with both numbers."""
    wanted = slot_shape(slot, side, sizes)
    rule = slot.rule
    rows = " + ".join(s.text for s in rule.out) if rule.fused(side) else rule.out[slot.part].text if rule.out else ""
    inner = rule.inner.text if rule.inner else ""
    labels = [axis.text for axis in rule.axes] or (
        [rows, inner] if rule.side(side).order == "out in" else [inner, rows]
    )
    if slot.field == "bias":
        labels = [rows]
    said = ", ".join(f"{label} = {number}" for label, number in zip(labels, wanted, strict=True))
    return f"{name}: shape {tuple(shape)}, but {said} ({rule.ref})"


def tied_target(table: Table, tied: Tied, side: SideName, variant: Variant) -> str:
    """Return the name, on either side, of the parameter that a tied one equals."""
    for mine in slots(table, tied.owner):
        bindings = mine.template.match(tied.to.text) if mine.field != "module" else None
        if bindings is not None and mine.rule.holds(variant.layout):
            theirs = next(slot for slot in slots_of(table, mine.rule, side) if slot.field == mine.field)
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
        holds = all(variant.layout.get(key, choice) == choice for key, choice in tied.when)
        if template is not None and template.text in present and holds and tied.side(other_side(side)) is None:
            checks.append((template.text, tied_target(table, tied, side, variant)))
    return checks
