"""What is proved of a family table when it loads, before any checkpoint is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from ..axes import ShapeError
from ..names import Template
from ..sizes import ANY, SizeError
from .rules import SIDES, Layout, Rule, RuleRef, SideName, Slot, Span, Table, When, slots

Claim = tuple[Template, RuleRef, When]


def prove(table: Table) -> list[str]:
    """Return every law of a reversible table that this one breaks, each with its line; empty when it holds.

    The laws: all templates of a rule have the same holes, with equally many options; on each side no two rules
    that can hold together fit one name, under any of the prefixes; parts divide by groups; every size, hole, layout
    and choice that is used is declared; every drop has a reason; a tie points at a mapped parameter;
    ``table.reverse().reverse() == table``.
    """
    parts = (_identity, _sizes, _layouts, _ties, _buffers, _stacks)
    problems = list(chain.from_iterable(part(table) for part in parts))
    for rule in table.rules:
        problems += [f"{rule.ref}: {problem}" for problem in _rule(table, rule)]
    if not problems:
        problems = list(chain(_overlaps(table, "hf"), _overlaps(table, "ms")))
    if table.reverse().reverse() != table:
        problems.append(f"{table.file}: reversing twice does not give the table back")
    return problems


def _identity(table: Table) -> Iterator[str]:
    if not table.family.replace("-", "_").isidentifier():
        yield f"{table.file}: family {table.family[:40]!r} is not a plain word"
    content = table.rules or table.tied or table.buffers or table.layouts or table.sizes or table.holes
    if table.identity and (content or table.hf_prefix.text or table.ms_prefix.text):
        yield f"{table.file}: an identity table has no rules, sizes or prefixes"
    if table.alike and table.hf_prefix != table.ms_prefix:
        yield f"{table.file}: alike = true, but the two prefixes are not the same"
    for prefix in (table.hf_prefix, table.ms_prefix):
        if len(set(prefix.answers)) < len(prefix.answers):
            yield f"{table.file}: a prefix is given twice"
    if not table.identity and not table.rules:
        yield f"{table.file}: the table has no rules"


def _rule(table: Table, rule: Rule) -> Iterator[str]:
    templates = [face.template for side in SIDES for face in rule.side(side).faces]
    for template in templates[1:]:
        if template.holes != templates[0].holes:
            yield (
                f"{template} has the holes {_holes(template)} and {templates[0]} has {_holes(templates[0])}; "
                "both sides need the same holes with equally many options"
            )
    counted = {name for name, _ in table.holes}
    for name, options in templates[0].holes.items():
        if not options and name not in counted:
            yield f"integer hole {{{name}}} is not in [holes]"
        if options and name in counted:
            yield f"hole {{{name}}} has options here and numbers in [holes]"
    declared = {name for name, _ in table.sizes}
    for size in rule.sizes:
        for field in size.fields:
            if field not in declared:
                yield f"{field!r} in {size.text!r} is not in [sizes]"
    if any(len(face.parts) > 1 for side in SIDES for face in rule.side(side).faces) and any(s.free for s in rule.out):
        yield "the parts of a fused module need sizes, not '?'"
    yield from _groups(rule)
    for key, choice in rule.when:
        yield from _choice(table.layouts, key, choice)


def _groups(rule: Rule) -> Iterator[str]:
    """Compare what is constant; sizes that come from a config are compared when it is read."""
    for face in (face for side in SIDES for face in rule.side(side).faces):
        try:
            groups = 0 if face.groups.fields else face.groups.value({})
            for part in face.parts:
                size = rule.out[part] if rule.out else None
                if groups and size is not None and not size.fields and not size.free and size.value({}) % groups:
                    yield f"part {rule.parts[part]!r} has {size} rows, which do not divide by groups = {groups}"
        except SizeError as error:
            yield str(error)


def _holes(template: Template) -> str:
    parts = [f"{{{name}}}" if not n else f"{{{name}: {n} options}}" for name, n in template.holes.items()]
    return ", ".join(parts) or "none"


def _choice(layouts: tuple[Layout, ...], key: str, choice: str) -> Iterator[str]:
    layout = next((layout for layout in layouts if layout.name == key), None)
    if layout is None:
        yield f"when names the layout {key!r}, which no [[layout]] declares"
    elif choice not in dict(layout.choices):
        yield f"layout {key!r} has no choice {choice!r}"


def _sizes(table: Table) -> Iterator[str]:
    every = {name for name, _ in table.sizes}
    known: set[str] = set()
    for name, size in table.sizes:
        yield from (
            f"{table.file}: size {name!r} uses {field!r} before its line"
            for field in size.fields
            if field in every - known - {name}
        )
        known.add(name)
        if size.free:
            yield f"{table.file}: size {name!r} has no value; write '?' in the rule"
    for name, span in table.holes:
        yield from (
            f"{table.file}: hole {name!r} counts to {field!r}, which is not in [sizes]"
            for size in span.sizes
            for field in size.fields
            if field not in every
        )


def _layouts(table: Table) -> Iterator[str]:
    seen = {"hf_prefix", "ms_prefix"}
    for layout in table.layouts:
        for choice in layout.told[1:] if layout.told is not None else ():
            if choice is not None and choice not in dict(layout.choices):
                yield f"{layout.ref}: config says {choice!r}, which is not a choice"
        if layout.name in seen:
            yield f"{layout.ref}: layout {layout.name!r} is declared twice or reserved"
        seen.add(layout.name)
        if layout.default is not None and layout.default not in dict(layout.choices):
            yield f"{layout.ref}: default {layout.default!r} is not one of the choices"


def _ties(table: Table) -> Iterator[str]:
    for tied in table.tied:
        templates = [template for template in (tied.hf, tied.ms) if template is not None]
        if tied.to.holes or any(template.holes != templates[0].holes for template in templates):
            yield f"{tied.ref}: to has no holes, and both sides have the same ones"
        for hole, options in templates[0].holes.items():
            if not options and hole not in dict(table.holes):
                yield f"{tied.ref}: integer hole {{{hole}}} is not in [holes]"
        targets = [s for s in slots(table, tied.owner) if s.field != "module" and s.template.match(tied.to.text) == {}]
        if not targets or any(len(slot.rule.parts) != 1 for slot in targets):
            yield f"{tied.ref}: to = {tied.to.text!r} is not a parameter that a rule renames"
        for key, choice in tied.when:
            yield from (f"{tied.ref}: {problem}" for problem in _choice(table.layouts, key, choice))


def _buffers(table: Table) -> Iterator[str]:
    for buffer in table.buffers:
        if not buffer.drop.strip():
            yield f"{buffer.ref}: a buffer that is dropped needs a reason"
        for key, choice in buffer.when:
            yield from (f"{buffer.ref}: {problem}" for problem in _choice(table.layouts, key, choice))


def _stacks(table: Table) -> Iterator[str]:
    """Compare stacks with the rules whose parameters they hold."""
    for stack in table.stacks:
        if stack.hole not in dict(table.holes):
            yield f"{stack.ref}: integer hole {{{stack.hole}}} is not in [holes]"
        elif table.span(stack.hole).shifted or table.span(stack.hole).hf.text != "0":
            yield f"{stack.ref}: the parts of a stack are counted from 0"
        for hole, options in stack.item.holes.items():
            if not options and hole not in dict(table.holes):
                yield f"{stack.ref}: integer hole {{{hole}}} is not in [holes]"
        held = [slot for slot in slots(table, stack.owner) if _same_names(stack.item, slot.template)]
        if not any(slot.field in ("weight", "bias", "param") for slot in held):
            yield f"{stack.ref}: item {stack.item} is no parameter of a rule"
        for key, choice in stack.when:
            yield from (f"{stack.ref}: {problem}" for problem in _choice(table.layouts, key, choice))


def _same_names(one: Template, other: Template) -> bool:
    """Say whether two templates have the same text around holes of the same kind, so that they fit the same names."""

    def shape(template: Template) -> tuple[object, ...]:
        return tuple(piece if isinstance(piece, str) else piece.options for piece in template.pieces)

    return shape(one) == shape(other)


def _overlaps(table: Table, side: SideName) -> Iterator[str]:
    """Compare every two claims on names of one side, modules with modules and parameters with parameters."""
    every = slots(table, side)
    for modules in (True, False):
        claims = [
            claim for slot in every if (slot.field == "module") == modules for claim in _claims(table, slot, side)
        ]
        if not modules:
            claims += _other_claims(table, side)
        for k, (template, ref, when) in enumerate(claims):
            for second, other, condition in claims[k + 1 :]:
                exclusive = any(dict(when).get(key, choice) != choice for key, choice in condition)
                if not exclusive and template.overlap(second) and not _apart(table, side, template, second):
                    yield f"{other}: {second} and {template} ({ref}) can fit the same {side} name"


def _apart(table: Table, side: SideName, one: Template, other: Template) -> bool:
    """Say whether two templates differ in a number that counts through spans one after the other."""
    spans = dict(table.holes)
    for mine, theirs in zip(one.pieces, other.pieces, strict=False):
        if isinstance(mine, str) or isinstance(theirs, str):
            if mine != theirs:
                return False
            continue
        both = [spans.get(hole.name) for hole in (mine, theirs)]
        if mine.options or theirs.options or None in both:
            return False
        first, second = (span for span in both if span is not None)
        if _before(table, side, first, second) or _before(table, side, second, first):
            return True
    return False


def _before(table: Table, side: SideName, one: Span, other: Span) -> bool:
    """Say whether a span ends where, or before, another begins: as expressions, along a chain of spans."""
    ends = {one.stop.text} if one.stop is not None else set()
    for _ in table.holes:
        ends |= {s.stop.text for _, s in table.holes if s.stop is not None and s.start(side).text in ends}
    return other.start(side).text in ends


def _claims(table: Table, slot: Slot, side: SideName) -> Iterator[Claim]:
    for prefix in table.prefix(side).answers if slot.rule.prefixed else ("",):
        yield slot.template.between(prefix), slot.rule.ref, slot.rule.when


def _other_claims(table: Table, side: SideName) -> Iterator[Claim]:
    for tied in table.tied:
        template = tied.side(side)
        if template is not None:
            yield template, tied.ref, tied.when
    for stack in table.stacks:
        if stack.owner == side:
            for prefix in table.prefix(side).answers if stack.prefixed else ("",):
                yield stack.stored.between(prefix), stack.ref, stack.when
    for buffer in table.buffers:
        template = buffer.side(side)
        if template is not None:
            for prefix in table.prefix(side).answers if buffer.prefixed else ("",):
                yield template.between(prefix), buffer.ref, buffer.when


def check_sizes(table: Table, sizes: Mapping[str, int], told: Mapping[str, str]) -> list[str]:
    """Return what does not fit once a config is known: sizes without a value, parts that do not divide by groups.

    Rows that are rearranged must be as many as their part has. ``told``: layouts that the config decides; rules that
    do not hold under them are passed over.
    """
    problems = []
    for rule in table.rules:
        if not rule.holds(told):
            continue
        try:
            for side in SIDES:
                problems += [f"{rule.ref}: {problem}" for problem in _misfits(rule, side, sizes)]
            for size in rule.sizes:
                size.value(sizes)
        except (SizeError, ShapeError) as error:
            problems.append(f"{rule.ref}: {error}")
    for name, span in table.holes:
        try:
            span.numbers("hf", sizes), span.numbers("ms", sizes)
        except SizeError as error:
            problems.append(f"{table.file}: hole {name!r}: {error}")
    return list(dict.fromkeys(problems))


def _misfits(rule: Rule, side: SideName, sizes: Mapping[str, int]) -> Iterator[str]:
    for face in rule.side(side).faces:
        groups = face.groups.value(sizes)
        for part in face.parts if len(face.parts) > 1 else ():
            name, size = rule.parts[part], rule.out[part]
            if size.value(sizes) % groups:
                yield (
                    f"part {name!r} has {size} = {size.value(sizes)} rows, "
                    f"which do not divide by groups = {face.groups} = {groups}"
                )
    for part, rows in enumerate(rule.side(side).rows):
        total = rule.out[part].value(sizes)
        if rows is not None and total != ANY:
            rows.lengths(sizes, total)
