"""Carry parameters (base weights, biases, whole trained modules) through a family table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..axes import Expr, ShapeError, reads, transpose
from ..dialects.adapter import Extra, ExtraKind
from ..sizes import SizeError
from .arrangements import Arrangement
from .completeness import CONFIG, tied_target
from .layouts import fuse_rows, split_rows
from .models import same_shape, shape_problem, slot_shape
from .rules import Buffer, Field, Rule, Slot, Tied
from .work import Work, untouched

Group = tuple[int, tuple[tuple[str, int], ...], Field, ExtraKind]


def map_extras(work: Work, extras: Sequence[Extra]) -> tuple[list[Extra], list[tuple[str, str]]]:
    """Return the parameters under their new names, and (tensor, reason) for what the table drops."""
    single = _unstacked(work, extras)
    present = {extra.name: extra for extra in single}
    gathered: dict[Group, dict[int, Extra]] = {}
    slot_of: dict[Group, Slot] = {}
    out: list[Extra] = []
    left: list[tuple[str, str]] = []
    for extra in single:
        what, bindings = work.find(extra.name, modules=False) or (None, {})
        if isinstance(what, Slot) and _fits(work, what, extra):
            key = (id(what.rule), tuple(bindings.items()), what.field, extra.kind)
            slot_of[key] = what
            gathered.setdefault(key, {})[what.face] = extra
        elif isinstance(what, Buffer):
            left += [(name, what.drop) for name in reads(extra.value)]
        elif isinstance(what, Tied):
            try:
                _map_tied(work, what, bindings, extra, present, out, left)
            except SizeError as error:
                work.complain(f"{extra.name}: {error}", CONFIG)
    for key, members in gathered.items():
        try:
            out += _convert(work, slot_of[key], dict(key[1]), members)
        except (ShapeError, SizeError) as error:
            work.fail(next(iter(members.values())).name, error)
    out += _copies_of_tied(work, present)
    return _stacked(work, out), left


def _unstacked(work: Work, extras: Sequence[Extra]) -> list[Extra]:
    stacks = work.stacks[work.source]
    out = []
    for extra in extras:
        try:
            out += stacks.unstack([extra], work.counts)
        except LookupError as error:
            work.complain(f"{extra.name}: how many {{{error.args[0]}}} it holds is not known", CONFIG)
        except ValueError as error:
            work.complain(f"{extra.name}: {error}")
    return out


def _stacked(work: Work, extras: list[Extra]) -> list[Extra]:
    try:
        made, problems = work.stacks[work.to].stack(extras, work.counts)
    except ShapeError as error:
        work.complain(f"parts of a stack differ: {error}")
        return extras
    for problem in problems:
        work.complain(problem, "a part of a stack cannot be written alone")
    return made


def _fits(work: Work, slot: Slot, extra: Extra) -> bool:
    if work.sizes is None:
        return True
    wanted, shape = slot_shape(slot, work.source, work.sizes), extra.value.shape
    if extra.kind == "trainable_tokens":
        wanted, shape = wanted[1:], shape[1:]
    if same_shape(shape, wanted):
        return True
    work.complain(shape_problem(extra.name, extra.value.shape, slot, work.source, work.sizes))
    return False


def _convert(work: Work, slot: Slot, bindings: Mapping[str, int], members: Mapping[int, Extra]) -> list[Extra]:
    """Take the parameters of one rule apart into parts with rows first, and store them as the other side does."""
    rule, first = slot.rule, next(iter(members.values()))
    rows = _Rows.of(work, rule, slot.field)
    made: list[tuple[int, Expr]] = []
    parts: dict[int, Expr] = {}
    for number, extra in members.items():
        face = rule.side(work.source).faces[number]
        whole = untouched(rule, work.source, work.to, face)
        if extra.kind == "trainable_tokens":
            made.append((0 if whole is None else whole, extra.value))
        elif whole is not None:
            made.append((whole, _restored(work, rule, slot.field, extra.value)))
        else:
            parts |= _split(work, rule, number, _turned(rows.here, extra.value), rows.axis, extra.name)
    for number, face in enumerate(rule.side(work.to).faces):
        mine = {part: parts[part] for part in face.parts if part in parts}
        if not mine:
            continue
        missing = [rule.parts[part] for part in face.parts if part not in mine]
        groups = work.groups(rule, face, first.name)
        if missing:
            work.complain(f"{first.name}: fusing needs {', '.join(missing)} as well ({rule.ref})")
        elif groups is not None:
            pieces = [_shuffled(work, rule, part, mine[part], rows.axis) for part in face.parts]
            made.append((number, _turned(rows.there, fuse_rows(pieces, groups=groups, axis=rows.axis))))
    return [_named(work, slot, number, bindings, value, first.kind) for number, value in made]


def _named(
    work: Work, slot: Slot, number: int, bindings: Mapping[str, int], value: Expr, kind: ExtraKind
) -> Extra:  # fmt: skip
    path, _, parameter = work.target(slot.rule, slot.field, number, bindings).rpartition(".")
    return Extra(path, parameter, value, kind)


@dataclass(frozen=True, slots=True)
class _Rows:
    """On which axis rows are cut, and whether a weight is transposed before (``here``) and after (``there``)."""

    axis: int
    here: bool
    there: bool

    @classmethod
    def of(cls, work: Work, rule: Rule, field: Field) -> _Rows:
        here, there = (field == "weight" and rule.side(side).order == "in out" for side in (work.source, work.to))
        return cls(1, False, False) if here and there else cls(0, here, there)


def _turned(turn: bool, value: Expr) -> Expr:
    return transpose(value) if turn else value


def _split(work: Work, rule: Rule, number: int, value: Expr, axis: int, name: str) -> dict[int, Expr]:
    face = rule.side(work.source).faces[number]
    sizes = work.rows(rule, face, {}, value.shape[axis], name)
    groups = work.groups(rule, face, name)
    if sizes is None or groups is None:
        return {}
    return dict(zip(face.parts, split_rows(value, sizes, groups=groups, axis=axis), strict=True))


def _shuffled(work: Work, rule: Rule, part: int, value: Expr, axis: int) -> Expr:
    here, there = rule.side(work.source).rows_of(part), rule.side(work.to).rows_of(part)
    if here == there:
        return value
    common = value if here is None else here.load_rows(value, axis, work.sizes)
    return common if there is None else there.store_rows(common, axis, work.sizes)


def _restored(work: Work, rule: Rule, field: Field, value: Expr) -> Expr:
    """Store a tensor whose rows stay as they are in the other side's axes."""
    if field == "bias":
        return value
    mine, theirs = rule.side(work.source), rule.side(work.to)
    if mine.order != theirs.order:
        return transpose(value)
    return _rearranged(work, mine.stored, theirs.stored, value)


def _rearranged(work: Work, here: Arrangement | None, there: Arrangement | None, value: Expr) -> Expr:
    if here == there:
        return value
    common = value if here is None else here.load(value, work.sizes)
    return common if there is None else there.store(common, work.sizes)


def _map_tied(
    work: Work, tied: Tied, bindings: Mapping[str, int], extra: Extra, present: Mapping[str, Extra], out: list[Extra],
    left: list[tuple[str, str]],
) -> None:  # fmt: skip
    target = tied.side(work.to)
    to = tied_target(work.table, tied, work.source, work.variant)
    if target is not None:
        path, _, parameter = target.fill(work.moved(bindings)).rpartition(".")
        out.append(Extra(path, parameter, extra.value, extra.kind))
    elif to in present:
        left += [(name, f"tied: equal to {to}") for name in reads(extra.value)]
    else:
        work.complain(
            f"{extra.name}: has no {work.to} counterpart of its own, and {to} is not here to compare ({tied.ref})"
        )


def _copies_of_tied(work: Work, present: Mapping[str, Extra]) -> list[Extra]:
    """Write a tied parameter that the source leaves out where the target keeps it apart."""
    copies = []
    for tied in work.table.tied:
        mine, target = tied.side(work.source), tied.side(work.to)
        chosen = all(work.variant.layout.get(key) == choice for key, choice in tied.when)
        if work.source != tied.owner or mine is None or target is None or not chosen:
            continue
        to = present.get(tied_target(work.table, tied, work.source, work.variant))
        if to is None or to.kind != "base" or any(mine.match(name) is not None for name in present):
            continue
        for bindings in work.every(target):
            path, _, parameter = target.fill(bindings).rpartition(".")
            copies.append(Extra(path, parameter, to.value, "base"))
    return copies
