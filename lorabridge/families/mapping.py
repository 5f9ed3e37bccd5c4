"""Carry an adapter or a full model through a family table: names, row layouts and storage orders, never data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..axes import Expr, ShapeError, Zeros, reshape, zeros
from ..dialects.adapter import Adapter, LoraModule, ModuleKind, StackItem
from ..errors import UsageError
from ..names import natural_key
from ..sizes import ANY, SizeError
from .arrangements import Arrangement
from .layouts import fuse_rows, split_rows
from .models import slot_shape
from .parameters import map_extras
from .rules import Face, Rule, SideName, Slot, Table, other_side
from .terms import fuse_terms, rearrange_terms, split_terms
from .variants import resolve
from .work import MERGE, Work, untouched

_KINDS: dict[int, ModuleKind] = {1: "conv1d", 2: "conv2d", 3: "conv3d"}

Parts = dict[int, LoraModule]
"""By part of a rule: a module that has the part's rows alone."""


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
    shapes = {module.path: () for module in adapter.modules} | {e.name: e.value.shape for e in adapter.extras}
    try:
        variant = resolve(table, shapes, side=source, layout=layout or {})
    except UsageError as error:
        if sizes is None and any(_needs_sizes(rule) for rule in table.rules) and error.hint:
            hint = f"{error.hint}; row layouts also need the model's sizes: --config config.json"
            raise UsageError(error.problem, where=error.where, hint=hint) from error
        raise
    work = Work.of(table, source, to, variant, sizes)
    modules = _map_modules(work, adapter.modules)
    extras, left = map_extras(work, adapter.extras)
    work.finish(list(shapes))
    modules.sort(key=lambda module: natural_key(module.path))
    extras.sort(key=lambda extra: natural_key(extra.name))
    return replace(adapter, modules=tuple(modules), extras=tuple(extras), left_out=(*adapter.left_out, *left))


def _needs_sizes(rule: Rule) -> bool:
    return any(face.groups.fields for side in (rule.hf, rule.ms) for face in side.faces)


def _map_modules(work: Work, modules: Iterable[LoraModule]) -> list[LoraModule]:
    gathered: dict[tuple[int, tuple[tuple[str, int], ...]], dict[int, LoraModule]] = {}
    rules: dict[int, Rule] = {}
    for module in modules:
        slot, bindings = work.find(module.path, modules=True) or (None, {})
        if not isinstance(slot, Slot) or not _module_fits(work, slot, module):
            continue
        rules[id(slot.rule)] = slot.rule
        members = gathered.setdefault((id(slot.rule), tuple(bindings.items())), {})
        if slot.face in members:
            work.complain(f"{module.path}: appears twice")
        members[slot.face] = module
    out: list[LoraModule] = []
    for (rule_id, bindings_), members in gathered.items():
        try:
            out += _convert(work, rules[rule_id], dict(bindings_), members)
        except (ShapeError, SizeError) as error:
            work.fail(next(iter(members.values())).path, error)
    return out


def _module_fits(work: Work, slot: Slot, module: LoraModule) -> bool:
    rule, face = slot.rule, slot.rule.side(work.source)
    kind = "conv" if module.kind.startswith("conv") else module.kind
    if kind != rule.kind:
        work.complain(f"{module.path}: is {module.kind}, but {rule.ref} maps {rule.kind}")
        return False
    if module.weight not in ("weight", face.weight):
        work.complain(f"{module.path}: adapts {module.weight}, but {rule.ref} maps {face.weight}")
        return False
    if work.sizes is None:
        return True
    before = len(work.problems)
    wanted = slot_shape(replace(slot, field="bias"), work.source, work.sizes)[0]
    inner = rule.inner.value(work.sizes) if rule.inner else 0
    if wanted not in (module.out, ANY):
        said = " + ".join(rule.out[part].text for part in face.faces[slot.face].parts)
        work.complain(f"{module.path}: {module.out} rows, but {said} = {wanted} ({rule.ref})")
    for term in module.terms[:1]:
        if module.conv_form == "peft" and inner not in (term.a.shape[1], ANY):
            work.complain(f"{module.path}: input of {term.a.shape[1]}, but {rule.inner} = {inner} ({rule.ref})")
    return len(work.problems) == before


def _convert(
    work: Work, rule: Rule, bindings: Mapping[str, int], members: Mapping[int, LoraModule]
) -> list[LoraModule]:  # fmt: skip
    """Take the modules of one rule apart into parts, and put the parts together as the other side has them."""
    theirs = rule.side(work.to)
    made: list[tuple[int, LoraModule]] = []
    parts: Parts = {}
    for number, module in members.items():
        face = rule.side(work.source).faces[number]
        whole = untouched(rule, work.source, work.to, face)
        if whole is not None:
            made.append((whole, module))
            continue
        split = _split(work, rule, face, module)
        parts |= {part: _shuffled(work, rule, part, piece) for part, piece in split.items()}
    for number, face in enumerate(theirs.faces):
        mine = {part: parts[part] for part in face.parts if part in parts}
        if len(face.parts) == 1 and mine:
            made.append((number, mine[face.parts[0]]))
        elif mine:
            made += [(number, fused) for fused in _fuse(work, rule, face, mine)]
    return [_named(work, rule, number, bindings, module) for number, module in made]


def _named(work: Work, rule: Rule, number: int, bindings: Mapping[str, int], module: LoraModule) -> LoraModule:
    face = rule.side(work.to)
    stored = face.order == "in out" if rule.kind == "linear" else None
    path = work.target(rule, "module", number, bindings)
    item = work.stacks[work.to].module(path, face.weight)
    stack = None if item is None else StackItem(item.stored, item.number, work.counts.get(item.stack.hole))
    if rule.kind == "conv":
        module = _kernel(work, rule, module)
    return replace(module, path=path, fan_in_fan_out=stored, weight=face.weight, stack=stack)


def _kernel(work: Work, rule: Rule, module: LoraModule) -> LoraModule:
    """Give conv factors the target's kernel axes; loralib's matrices have none, but count on the kernel's side."""
    mine, theirs = rule.side(work.source).stored, rule.side(work.to).stored
    before, after = (len(side.axes) - 2 if side is not None else len(rule.axes) for side in (mine, theirs))
    if before == after:
        return module
    if module.conv_form == "loralib":
        work.complain(f"{module.path}: loralib's factors of a {before}-dimensional kernel are none of {after}", MERGE)
        return module
    kernel = module.kernel_size
    spread = kernel if mine is None else mine.lengths_of_stored((1, 1, *kernel), work.sizes)[2:]
    spread = spread if theirs is None else _stored_kernel(theirs, spread)
    terms = tuple(
        replace(t, a=reshape(t.a, (*t.a.shape[:2], *spread)), b=reshape(t.b, (*t.b.shape[:2], *(1,) * after)))
        for t in module.terms
    )
    magnitude = module.magnitude
    if magnitude is not None:
        magnitude = reshape(magnitude, (1, module.out, *(1,) * after))
    return replace(module, kind=_KINDS[after], terms=terms, magnitude=magnitude, kernel_size=spread)


def _stored_kernel(theirs: Arrangement, kernel: Sequence[int]) -> tuple[int, ...]:
    lengths = (1, 1, *kernel)
    found = []
    for axis in theirs.axes[2:]:
        total = 1
        for atom in axis:
            total *= lengths[atom]
        found.append(total)
    return tuple(found)


def _split(work: Work, rule: Rule, face: Face, module: LoraModule) -> Parts:
    if len(face.parts) == 1:
        return {face.parts[0]: module}
    sizes = work.rows(rule, face, {}, module.out, module.path)
    groups = work.groups(rule, face, module.path)
    if sizes is None or groups is None:
        return {}
    terms = split_terms(module.terms, sizes, groups=groups)
    magnitudes = split_rows(module.magnitude, sizes, groups=groups) if module.magnitude is not None else None
    biases = split_rows(module.lora_bias, sizes, groups=groups) if module.lora_bias is not None else None
    out: Parts = {}
    for k, (part, size) in enumerate(zip(face.parts, sizes, strict=True)):
        bias = biases[k] if biases is not None and not isinstance(biases[k], Zeros) else None
        magnitude = magnitudes[k] if magnitudes is not None else None
        if terms[k]:
            out[part] = replace(module, out=size, terms=terms[k], magnitude=magnitude, lora_bias=bias)
        elif bias is not None or magnitude is not None:
            work.complain(f"{module.path}: part {rule.parts[part]!r} has a bias or magnitude but no factors", MERGE)
    return out


def _shuffled(work: Work, rule: Rule, part: int, module: LoraModule) -> LoraModule:
    """Bring a part's rows from the source's order to the target's."""
    here, there = rule.side(work.source).rows_of(part), rule.side(work.to).rows_of(part)
    if here == there:
        return module

    def turn(x: Expr) -> Expr:
        common = x if here is None else here.load_rows(x, 0, work.sizes)
        return common if there is None else there.store_rows(common, 0, work.sizes)

    return replace(
        module,
        terms=rearrange_terms(module.terms, module.out, turn),
        magnitude=None if module.magnitude is None else turn(module.magnitude),
        lora_bias=None if module.lora_bias is None else turn(module.lora_bias),
    )


def _fuse(work: Work, rule: Rule, face: Face, members: Parts) -> list[LoraModule]:
    first = members[min(members)]
    sizes = work.rows(rule, face, {part: module.out for part, module in members.items()}, None, first.path)
    groups = work.groups(rule, face, first.path)
    if sizes is None or groups is None or not _alike(work, rule, face, members):
        return []
    ordered = [part for part in face.parts if part in members]
    places = {part: face.parts.index(part) for part in ordered}
    terms = fuse_terms({places[part]: members[part].terms for part in ordered}, sizes, groups=groups)
    magnitudes = [m.magnitude for part in ordered if (m := members[part]).magnitude is not None]
    given = [m.lora_bias for m in members.values() if m.lora_bias is not None]
    biases = [
        bias if part in members and (bias := members[part].lora_bias) is not None else zeros(given[0].dtype, (size,))
        for part, size in zip(face.parts, sizes, strict=True)
        if given
    ]
    fused = replace(
        first,
        out=sum(sizes),
        terms=terms,
        magnitude=fuse_rows(magnitudes, groups=groups) if magnitudes else None,
        lora_bias=fuse_rows(biases, groups=groups) if biases else None,
    )
    return [fused]


def _alike(work: Work, rule: Rule, face: Face, members: Parts) -> bool:
    """Check that one fused module can say what its parts say; the factors themselves may differ."""
    before = len(work.problems)
    paths = ", ".join(dict.fromkeys(members[part].path for part in sorted(members)))
    if len({(module.scaling.value, module.scaling.rslora) for module in members.values()}) > 1:
        said = ", ".join(f"{members[part].scaling.value:g}" for part in sorted(members))
        work.complain(
            f"{paths}: scalings {said} differ under one module",
            "write the adapter with one alpha and rank for these modules, or merge it into the base model first",
        )
    with_magnitude = [part for part, module in members.items() if module.magnitude is not None]
    if with_magnitude and len(with_magnitude) < len(face.parts):
        work.complain(f"{paths}: DoRA needs a magnitude for each of {', '.join(rule.parts)}", MERGE)
    return len(work.problems) == before
