"""Carry an adapter or a full model through a family table: names, row layouts and storage orders, never data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import TypeVar

from ..axes import Expr, ShapeError, Zeros, reads, transpose, zeros
from ..dialects.adapter import Adapter, Extra, ExtraKind, LoraModule
from ..errors import SHOWN, MappingError, UsageError
from ..names import natural_key
from ..sizes import ANY, SizeError
from .layouts import fuse_rows, split_rows
from .models import Index, Variant, resolve, same_shape, shape_problem, slot_shape, tied_target
from .rules import Buffer, Field, Rule, SideName, Slot, Table, Tied, other_side, slots
from .terms import fuse_terms, split_terms

_CONFIG = "give the model's configuration with --config config.json"
_MERGE = "merge the adapter into the base model first"

Group = tuple[int, tuple[tuple[str, int], ...], Field, ExtraKind]
Member = TypeVar("Member")


def map_adapter(
    table: Table,
    adapter: Adapter,
    *,
    to: SideName,
    sizes: Mapping[str, int] | None = None,
    layout: Mapping[str, str] | None = None,
) -> Adapter:
    """Rename every module and parameter of an adapter, or of a full model, from the other side to ``to``.

    ``sizes``: from :func:`sizes_from_config`; every shape is compared with them, and uneven parts need them.
    ``layout``: choices that names do not show, see :func:`resolve`. Modules and extras come back in natural order of
    their new names. Raises MappingError listing every tensor without a rule or with a shape that contradicts the
    sizes, UsageError for a missing or unknown layout choice.
    """
    if table.identity:
        if layout:
            raise UsageError(
                "the identity table has no layouts", where=list(layout), hint="leave out --layout, or pass --family"
            )
        return adapter
    source = other_side(to)
    given = [module.path for module in adapter.modules] + [extra.name for extra in adapter.extras]
    variant = resolve(table, given, side=source, layout=layout or {})
    targets = {(id(slot.rule), slot.field, slot.part): slot for slot in slots(table, to)}
    work = _Work(table, source, to, variant, sizes, targets)
    modules = _map_modules(work, adapter.modules)
    extras, left = _map_extras(work, adapter.extras)
    work.finish(given)
    modules.sort(key=lambda module: natural_key(module.path))
    extras.sort(key=lambda extra: natural_key(extra.name))
    return replace(adapter, modules=tuple(modules), extras=tuple(extras), left_out=(*adapter.left_out, *left))


@dataclass(frozen=True, slots=True)
class _Work:
    """One run of a table, and what went wrong so far."""

    table: Table
    source: SideName
    to: SideName
    variant: Variant
    sizes: Mapping[str, int] | None
    targets: Mapping[tuple[int, Field, int], Slot]
    problems: list[str] = field(default_factory=list)
    hints: dict[str, None] = field(default_factory=dict)

    def complain(self, problem: str, hint: str = "") -> None:
        self.problems.append(problem)
        if hint:
            self.hints[hint] = None

    def unmapped(self, name: str) -> None:
        near = ""
        if len(self.problems) < SHOWN:
            known = [str(slot.template) for slot in slots(self.table, self.source)]
            plain = ".".join("{i}" if part.isdigit() else part for part in name[:300].split("."))
            near = next(iter(get_close_matches(plain, known, 1, 0.5)), "")
        self.complain(f"{name}: no rule in {self.table.file}" + (f" (nearest: {near})" if near else ""))

    def target(self, slot: Slot, part: int, bindings: Mapping[str, int]) -> str:
        """Return the name on the target side; a fused side has one template for all parts."""
        like = self.targets[id(slot.rule), slot.field, 0 if slot.rule.fused(self.to) else part]
        return self.variant.name(like, self.to, bindings)

    def part_sizes(self, rule: Rule, known: Mapping[int, int], total: int | None, where: str) -> list[int] | None:
        """Return the rows of each part from the config, or from shapes when the rule says that all are equal."""
        if self.sizes is not None:
            return [size.value(self.sizes) for size in rule.out]
        equal = len({size.text for size in rule.out}) == 1
        if equal and total is not None and total % len(rule.parts) == 0:
            return [total // len(rule.parts)] * len(rule.parts)
        if equal and len(set(known.values())) == 1:
            return list(known.values())[:1] * len(rule.parts)
        if len(known) == len(rule.parts) and not equal:
            return [known[part] for part in range(len(rule.parts))]
        needed = dict.fromkeys(name for size in rule.out for name in size.fields)
        self.complain(f"{where}: the rows of its parts need {', '.join(needed)} ({rule.ref})", _CONFIG)
        return None

    def groups(self, rule: Rule, where: str) -> int | None:
        if not rule.groups.fields or self.sizes is not None:
            return rule.groups.value(self.sizes or {})
        self.complain(f"{where}: its row layout needs {', '.join(rule.groups.fields)} ({rule.ref})", _CONFIG)
        return None

    def finish(self, given: Sequence[str]) -> None:
        if not self.problems:
            return
        problem = f"{len(self.problems)} of {len(given)} names do not fit the table {self.table.family}"
        there = Index(self.table, self.to, self.table.prefix(self.to).answers)
        if all(there.find(name) for name in given):
            problem = f"every name is already on the {self.to} side of the table {self.table.family}"
            self.hints["convert in the other direction, or use --family identity to keep the names"] = None
        raise MappingError(
            problem, where=self.problems, hint="; ".join(self.hints) or f"lorabridge tables show {self.table.family}"
        )


def _find(work: _Work, index: Index, name: str, modules: bool) -> tuple[Slot | Tied | Buffer, Mapping[str, int]] | None:
    """Return what a name belongs to; the load-time proofs leave at most one reading under the chosen variant."""
    for hit in index.find(name):
        is_module = isinstance(hit.what, Slot) and hit.what.field == "module"
        if is_module == modules and all(work.variant.layout.get(key, c) == c for key, c in hit.when):
            return hit.what, hit.bindings
    return None


def _index(work: _Work) -> Index:
    return Index(work.table, work.source, (work.variant.prefix(work.source),))


def _map_modules(work: _Work, modules: Iterable[LoraModule]) -> list[LoraModule]:
    index = _index(work)
    gathered: dict[Group, dict[int, tuple[Slot, LoraModule]]] = {}
    for module in modules:
        slot, bindings = _find(work, index, module.path, modules=True) or (None, {})
        if not isinstance(slot, Slot):
            work.unmapped(module.path)
            continue
        if not _module_fits(work, slot, module, bindings):
            continue
        members = gathered.setdefault((id(slot.rule), tuple(bindings.items()), "module", "base"), {})
        if slot.part in members:
            work.complain(f"{module.path}: appears twice")
        members[slot.part] = slot, module
    out: list[LoraModule] = []
    for (_, bindings_, _, _), members in gathered.items():
        slot = next(iter(members.values()))[0]
        try:
            out += _convert(work, slot, dict(bindings_), {part: module for part, (_, module) in members.items()})
        except (ShapeError, SizeError) as error:
            work.complain(f"{next(iter(members.values()))[1].path}: {error}")
    return out


def _module_fits(work: _Work, slot: Slot, module: LoraModule, bindings: Mapping[str, int]) -> bool:
    rule, face = slot.rule, slot.rule.side(work.source)
    if module.kind != rule.kind:
        work.complain(f"{module.path}: is {module.kind}, but {rule.ref} maps {rule.kind}")
        return False
    if module.weight not in ("weight", face.weight):
        work.complain(f"{module.path}: adapts {module.weight}, but {rule.ref} maps {face.weight}")
        return False
    if work.sizes is None:
        return True
    before = len(work.problems)
    _counts_fit(work, module.path, bindings)
    wanted = slot_shape(replace(slot, field="bias"), work.source, work.sizes)[0]
    inner = rule.inner.value(work.sizes) if rule.inner else 0
    if wanted not in (module.out, ANY):
        said = " + ".join(size.text for size in (rule.out if rule.fused(work.source) else [rule.out[slot.part]]))
        work.complain(f"{module.path}: {module.out} rows, but {said} = {wanted} ({rule.ref})")
    for term in module.terms[:1]:
        if inner not in (term.a.shape[1], ANY):
            work.complain(f"{module.path}: input of {term.a.shape[1]}, but {rule.inner} = {inner} ({rule.ref})")
    return len(work.problems) == before


def _counts_fit(work: _Work, name: str, bindings: Mapping[str, int]) -> None:
    for hole, size in work.table.holes:
        count = size.value(work.sizes or {}) if hole in bindings else 0
        if hole in bindings and bindings[hole] >= count:
            work.complain(f"{name}: number {bindings[hole]}, but {size} = {count} in the config")


def _convert(
    work: _Work, slot: Slot, bindings: Mapping[str, int], members: Mapping[int, LoraModule]
) -> list[LoraModule]:
    rule = slot.rule
    face = rule.side(work.to)
    stored = face.order == "in out" if rule.kind == "linear" else None
    if len(rule.parts) == 1:
        made = [(0, members[0])]
    elif rule.fused(work.source):
        made = _split(work, rule, members[0])
    else:
        made = _fuse(work, rule, members)
    return [
        replace(module, path=work.target(slot, part, bindings), fan_in_fan_out=stored, weight=face.weight)
        for part, module in made
    ]


def _split(work: _Work, rule: Rule, module: LoraModule) -> list[tuple[int, LoraModule]]:
    sizes = work.part_sizes(rule, {}, module.out, module.path)
    groups = work.groups(rule, module.path)
    if sizes is None or groups is None:
        return []
    terms = split_terms(module.terms, sizes, groups=groups)
    magnitudes = split_rows(module.magnitude, sizes, groups=groups) if module.magnitude is not None else None
    biases = split_rows(module.lora_bias, sizes, groups=groups) if module.lora_bias is not None else None
    out = []
    for part, size in enumerate(sizes):
        bias = biases[part] if biases is not None and not isinstance(biases[part], Zeros) else None
        magnitude = magnitudes[part] if magnitudes is not None else None
        if terms[part]:
            out.append((part, replace(module, out=size, terms=terms[part], magnitude=magnitude, lora_bias=bias)))
        elif bias is not None or magnitude is not None:
            work.complain(f"{module.path}: part {rule.parts[part]!r} has a bias or magnitude but no factors", _MERGE)
    return out


def _fuse(work: _Work, rule: Rule, members: Mapping[int, LoraModule]) -> list[tuple[int, LoraModule]]:
    first = members[min(members)]
    sizes = work.part_sizes(rule, {part: module.out for part, module in members.items()}, None, first.path)
    groups = work.groups(rule, first.path)
    if sizes is None or groups is None or not _alike(work, rule, members):
        return []
    out = sum(sizes)
    terms = fuse_terms({part: members[part].terms for part in sorted(members)}, sizes, groups=groups)
    magnitudes = [m.magnitude for part in sorted(members) if (m := members[part]).magnitude is not None]
    given = [m.lora_bias for m in members.values() if m.lora_bias is not None]
    biases = [
        bias if part in members and (bias := members[part].lora_bias) is not None else zeros(given[0].dtype, (size,))
        for part, size in enumerate(sizes)
        if given
    ]
    fused = replace(
        first,
        out=out,
        terms=terms,
        magnitude=fuse_rows(magnitudes, groups=groups) if magnitudes else None,
        lora_bias=fuse_rows(biases, groups=groups) if biases else None,
    )
    return [(0, fused)]


def _alike(work: _Work, rule: Rule, members: Mapping[int, LoraModule]) -> bool:
    """Check that one fused module can say what its parts say; the factors themselves may differ."""
    before = len(work.problems)
    paths = ", ".join(members[part].path for part in sorted(members))
    if len({(module.scaling.value, module.scaling.rslora) for module in members.values()}) > 1:
        said = ", ".join(f"{members[part].scaling.value:g}" for part in sorted(members))
        work.complain(
            f"{paths}: scalings {said} differ under one module",
            "write the adapter with one alpha and rank for these modules, or merge it into the base model first",
        )
    with_magnitude = [part for part, module in members.items() if module.magnitude is not None]
    if with_magnitude and len(with_magnitude) < len(rule.parts):
        work.complain(f"{paths}: DoRA needs a magnitude for each of {', '.join(rule.parts)}", _MERGE)
    return len(work.problems) == before


def _map_extras(work: _Work, extras: Sequence[Extra]) -> tuple[list[Extra], list[tuple[str, str]]]:
    index = _index(work)
    present = {extra.name: extra for extra in extras}
    gathered: dict[Group, dict[int, tuple[Slot, Extra]]] = {}
    out: list[Extra] = []
    left: list[tuple[str, str]] = []
    for extra in extras:
        found = _find(work, index, extra.name, modules=False)
        if found is None:
            work.unmapped(extra.name)
        elif isinstance(found[0], Slot):
            slot, bindings = found[0], found[1]
            if not _extra_fits(work, slot, extra, bindings):
                continue
            key = (id(slot.rule), tuple(bindings.items()), slot.field, extra.kind)
            gathered.setdefault(key, {})[slot.part] = slot, extra
        elif isinstance(found[0], Buffer):
            left += [(name, found[0].drop) for name in reads(extra.value)]
        else:
            _map_tied(work, found[0], extra, present, out, left)
    for (_, bindings_, _, _), members in gathered.items():
        slot = next(iter(members.values()))[0]
        try:
            out += _convert_extra(work, slot, dict(bindings_), {part: extra for part, (_, extra) in members.items()})
        except (ShapeError, SizeError) as error:
            work.complain(f"{next(iter(members.values()))[1].name}: {error}")
    out += _copies_of_tied(work, present)
    return out, left


def _extra_fits(work: _Work, slot: Slot, extra: Extra, bindings: Mapping[str, int]) -> bool:
    if work.sizes is None:
        return True
    before = len(work.problems)
    _counts_fit(work, extra.name, bindings)
    wanted, shape = slot_shape(slot, work.source, work.sizes), extra.value.shape
    if extra.kind == "trainable_tokens":
        wanted, shape = wanted[1:], shape[1:]
    if not same_shape(shape, wanted):
        work.complain(shape_problem(extra.name, extra.value.shape, slot, work.source, work.sizes))
    return len(work.problems) == before


def _convert_extra(work: _Work, slot: Slot, bindings: Mapping[str, int], members: Mapping[int, Extra]) -> list[Extra]:
    rule, first = slot.rule, next(iter(members.values()))
    axis = 1 if slot.field == "weight" and rule.side(work.source).order == "in out" else 0
    turned = slot.field == "weight" and rule.hf.order != rule.ms.order

    def turn(value: Expr) -> Expr:
        return transpose(value) if turned else value

    def named(part: int, value: Expr) -> Extra:
        path, _, parameter = work.target(slot, part, bindings).rpartition(".")
        return Extra(path, parameter, value, first.kind)

    if len(rule.parts) == 1:
        return [named(0, turn(first.value))]
    groups = work.groups(rule, first.name)
    if rule.fused(work.source):
        sizes = work.part_sizes(rule, {}, first.value.shape[axis], first.name)
        if sizes is None or groups is None:
            return []
        value = turn(first.value)
        parts = split_rows(value, sizes, groups=groups, axis=1 - axis if turned else axis)
        return [named(part, piece) for part, piece in enumerate(parts)]
    missing = [rule.parts[part] for part in range(len(rule.parts)) if part not in members]
    if missing:
        work.complain(f"{first.name}: fusing needs {', '.join(missing)} as well ({rule.ref})")
    if missing or groups is None:
        return []
    parts = tuple(members[part].value for part in range(len(rule.parts)))
    return [named(0, turn(fuse_rows(parts, groups=groups, axis=axis)))]


def _map_tied(
    work: _Work, tied: Tied, extra: Extra, present: Mapping[str, Extra], out: list[Extra], left: list[tuple[str, str]]
) -> None:
    target = tied.side(work.to)
    to = tied_target(work.table, tied, work.source, work.variant)
    if target is not None:
        path, _, parameter = target.text.rpartition(".")
        out.append(Extra(path, parameter, extra.value, extra.kind))
    elif to in present:
        left += [(name, f"tied: equal to {to}") for name in reads(extra.value)]
    else:
        work.complain(
            f"{extra.name}: has no {work.to} counterpart of its own, and {to} is not here to compare ({tied.ref})"
        )


def _copies_of_tied(work: _Work, present: Mapping[str, Extra]) -> list[Extra]:
    """Write a tied parameter that the source leaves out where the target keeps it apart."""
    copies = []
    for tied in work.table.tied:
        mine, target = tied.side(work.source), tied.side(work.to)
        chosen = all(work.variant.layout.get(key) == choice for key, choice in tied.when)
        if work.source != tied.owner or mine is None or target is None or mine.text in present or not chosen:
            continue
        to = present.get(tied_target(work.table, tied, work.source, work.variant))
        if to is not None and to.kind == "base":
            path, _, parameter = target.text.rpartition(".")
            copies.append(Extra(path, parameter, to.value, "base"))
    return copies
