"""Plan the ways back from a merged model, to its base or on to another adapter; note what a merge keeps for them.

All of it is a function of headers and of the adapters' factors; the model's tensors are not read, but for the
parameters that a merge replaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..arithmetic import recipe as recipes
from ..arithmetic.floats import Bits
from ..arithmetic.recipe import Recipe, recipe_of
from ..axes import Compute, Expr, Join, Kernel, Read, Reshape, Slice, evaluate, join, reads, reshape, substitute
from ..dialects.adapter import Adapter, Extra
from ..errors import MappingError
from ..tensors import Source
from .planning import Merged
from .undo import Kept, Recorder, UndoFile, block_rows, matrix
from .unmerge_kernel import KEPT, RESTORE, additive, fingerprint, in_blocks

_HELD = "\0restored/"
ANOTHER = "give the adapter that was merged, in the form in which it was; several in their order"


@dataclass(frozen=True, slots=True)
class Traces:
    """What a merge does to a base's parameters, by name.

    ``nodes``: weights that get a delta; ``replaced``: others whose value changes, before and after; ``lost``: those
    that the merged model does not have in the base's type and shape; ``added``: what only the merged model has.
    """

    nodes: Mapping[str, Compute]
    replaced: Mapping[str, tuple[Expr, Expr]]
    lost: Mapping[str, Expr]
    added: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Restored:
    """The base as expressions over the merged model and the adapters.

    ``nodes``: weights that are restored, before they are cut; ``away``: how many of their updates are taken away.
    """

    model: Adapter
    nodes: Mapping[str, Compute] = field(default_factory=dict)
    away: Mapping[str, int] = field(default_factory=dict)


def traces(base: Adapter, model: Adapter) -> Traces:
    """Compare a base with the merged model that was planned from it."""
    old = {extra.name: extra.value for extra in base.extras}
    new = {extra.name: extra.value for extra in model.extras}
    nodes: dict[str, Compute] = {}
    replaced: dict[str, tuple[Expr, Expr]] = {}
    lost: dict[str, Expr] = {}
    for name, before in old.items():
        after = new.get(name)
        if after is None or (after.dtype, after.shape) != (before.dtype, before.shape):
            lost[name] = before
        elif (node := _node(after)) is not None and _plain(node.args[0]) == _plain(before):
            nodes[name] = node
        elif after != before:
            replaced[name] = before, after
    return Traces(nodes, replaced, lost, tuple(name for name in new if name not in old))


def _plain(expr: Expr) -> Expr:
    while isinstance(expr, Reshape):
        expr = expr.x
    return expr


def _node(expr: Expr) -> Compute | None:
    inner = _plain(expr)
    return inner if isinstance(inner, Compute) and recipes.is_merge(inner) else None


def keep_others(recorder: Recorder, found: Traces, source: Source, kernels: Mapping[str, Kernel]) -> None:
    """Note what a merge replaces: as a residue where the merged model has the same type and shape, else raw."""
    for name, (before, after) in found.replaced.items():
        recorder.expect(name, before.dtype, before.shape, "near")
        for start, stop in _spans(before):
            bits = [rows(expr, start, stop, source, kernels).reshape(stop - start, -1) for expr in (before, after)]
            recorder.take(name, start, bits[0], bits[1], None)
    for name, before in found.lost.items():
        recorder.expect(name, before.dtype, before.shape, "raw")
        for start, stop in _spans(before):
            recorder.keep(name, start, rows(before, start, stop, source, kernels))


def _spans(expr: Expr) -> Iterator[tuple[int, int]]:
    count, step = matrix(expr.shape)[0], block_rows(expr.shape, expr.dtype)
    return ((start, min(start + step, count)) for start in range(0, count, step))


def rows(expr: Expr, start: int, stop: int, source: Source, kernels: Mapping[str, Kernel]) -> Bits:
    """Return rows [start, stop) of an expression's bits, reading only these rows where that is possible."""
    if isinstance(expr, Read) and expr.shape:
        return source.read(expr.name, (start, stop))
    if isinstance(expr, Slice) and expr.axis == 0:
        return rows(expr.x, expr.start + start, expr.start + stop, source, kernels)
    if isinstance(expr, Join) and expr.axis == 0:
        return np.concatenate(list(_joined(expr, start, stop, source, kernels)))
    if isinstance(expr, Reshape) and expr.shape and expr.x.shape[:1] == expr.shape[:1]:
        return rows(expr.x, start, stop, source, kernels).reshape(stop - start, *expr.shape[1:])
    if isinstance(expr, Compute) and expr.kernel == "cast":
        part = replace(expr, shape=(stop - start, *expr.shape[1:]))
        return kernels[expr.kernel](part, [rows(expr.args[0], start, stop, source, kernels)])
    made = recipes.rows_of(expr, start, stop)
    if made is not None:
        operands = [evaluate(arg, source.read, kernels) for arg in made.args[1:]]
        return kernels[made.kernel](made, [rows(made.args[0], 0, stop - start, source, kernels), *operands])
    whole = evaluate(expr, source.read, kernels)
    return np.ascontiguousarray(whole[start:stop] if expr.shape else whole)


def _joined(expr: Join, start: int, stop: int, source: Source, kernels: Mapping[str, Kernel]) -> Iterator[Bits]:
    at = 0
    for part in expr.parts:
        low, high = max(start - at, 0), min(stop - at, part.shape[0])
        if low < high:
            yield rows(part, low, high, source, kernels)
        at += part.shape[0]


def restore(model: Adapter, landed: Merged, undo: UndoFile, source: Source) -> Restored:
    """Return the base that a merge recorded.

    ``model``: the merged model in the base's names; ``landed``: the same with the adapters merged into it again, which
    says where they lie. Raises MappingError where model or adapters are not those of the merge.
    """
    values = {extra.name: extra.value for extra in model.extras}
    nodes = traces(model, landed.model).nodes
    added = _texts(undo.facts.get("added"))
    strange = [name for name in nodes if name not in undo.tensors and name not in added]
    problems = [f"{name}: the adapter adds to it, the merge did not" for name in strange]
    left_out = list(landed.model.left_out)
    away, found = dict[str, int](), dict[str, Compute]()
    for name in added:
        if name in values:
            left_out += [(read, "added by the merge") for read in reads(values.pop(name))]
    for name, kept in undo.tensors.items():
        value = values.get(name)
        if kept.mode == "raw":
            left_out += [(read, "replaced by what the undo file holds") for read in reads(value)] if value else []
            values[name] = _from_file(kept)
            continue
        problem = _misfit(kept, value, nodes.get(name), source)
        if problem or value is None:
            problems.append(f"{name}: {problem}")
            continue
        found[name] = nodes[name] if kept.mode == "delta" else _bare(kept, value)
        away[name] = len(recipe_of(found[name])[0].updates)
        values[name] = reshape(in_blocks(found[name]), value.shape)
    if problems:
        raise MappingError("the undo file is not that of this merged model and adapter", where=problems, hint=ANOTHER)
    return Restored(_with(model, values, left_out + _spare(landed)), found, away)


def _spare(landed: Merged) -> list[tuple[str, str]]:
    """Give a reason for what the merge read and the way back may not."""
    return [(name, "not needed on the way back") for extra in landed.model.extras for name in reads(extra.value)]


def _misfit(kept: Kept, value: Expr | None, node: Compute | None, source: Source) -> str:
    if value is None:
        return "the merged model does not have it"
    if value.dtype != kept.dtype or np.prod(value.shape) != np.prod(kept.shape):
        return f"is {value.dtype} {value.shape}, was {kept.dtype} {kept.shape}"
    if kept.delta and (node is None or fingerprint(node, source) != kept.delta):
        return "another delta was merged into it"
    return ""


def _bare(kept: Kept, value: Expr) -> Compute:
    """Return a node that adds nothing: the residue is against the merged bits themselves."""
    return recipes.node(Recipe(kept.name, (), kept.matrix[0]), reshape(value, kept.matrix), ())


def _from_file(kept: Kept) -> Expr:
    parts: list[Expr] = []
    for number, (start, stop) in enumerate(kept.spans()):
        params = (("name", kept.name), ("number", number))
        parts.append(Compute(KEPT, (), params, "", kept.dtype, (stop - start, kept.matrix[1])))
    return reshape(join(parts, 0), kept.shape)


def _texts(value: object) -> tuple[str, ...]:
    return tuple(str(text) for text in value) if isinstance(value, list) else ()


def _with(model: Adapter, values: Mapping[str, Expr], left_out: Sequence[tuple[str, str]]) -> Adapter:
    extras = []
    for name, value in values.items():
        path, _, parameter = name.rpartition(".")
        extras.append(Extra(path, parameter, value, "base"))
    used = {read for value in values.values() for read in reads(value)}
    reasons = {name: why for name, why in reversed(left_out) if name not in used and not name.startswith(_HELD)}
    return replace(model, extras=tuple(extras), left_out=tuple(reasons.items()), merged=False)


def best_inverse(model: Adapter, landed: Merged) -> Restored:
    """Return the nearest to the base that can be computed from the merged model alone.

    Raises MappingError where a parameter was replaced or normalised: nothing in the model says what it was.
    """
    found = traces(model, landed.model)
    where = [f"{name}: the adapter replaced it" for name in (*found.replaced, *found.lost, *found.added)]
    where += [f"{name}: DoRA normalised it" for name, node in found.nodes.items() if not additive(recipe_of(node)[0])]
    if where:
        raise MappingError(
            f"{len(where)} parameters cannot be computed back from the merged model",
            where=where,
            hint="pass --undo with the file that merge --undo wrote, or take them from the base",
        )
    values = {extra.name: extra.value for extra in model.extras}
    for name, node in found.nodes.items():
        values[name] = reshape(in_blocks(node), values[name].shape)
    away = {name: len(recipe_of(node)[0].updates) for name, node in found.nodes.items()}
    return Restored(_with(model, values, [*landed.model.left_out, *_spare(landed)]), found.nodes, away)


def stand_in(model: Adapter) -> Adapter:
    """Return a model of the same parameters to plan a merge on, whose expressions :func:`onto` replaces."""
    return replace(model, extras=tuple(replace(extra, value=_held(extra)) for extra in model.extras))


def onto(restored: Restored, landed: Merged) -> Restored:
    """Put a merge that was planned on :func:`stand_in` onto the restored base, a weight in one node if it can be."""
    old = {extra.name: extra.value for extra in restored.model.extras}
    away, nodes, values = dict[str, int](), dict[str, Compute](), dict[str, Expr]()
    inner = _inner(restored)
    for extra in landed.model.extras:
        node, before = _node(extra.value), restored.nodes.get(extra.name)
        flat = None
        if node is not None and before is not None and _plain(node.args[0]) == _held(extra):
            flat = _united(before, node)
        if flat is not None and before is not None:
            away[extra.name] = len(recipe_of(before)[0].updates)
            nodes[extra.name] = flat
            values[extra.name] = reshape(in_blocks(flat), extra.value.shape)
        elif extra.value == _held(extra):
            values[extra.name] = old[extra.name]
            if before is not None:
                nodes[extra.name], away[extra.name] = before, restored.away[extra.name]
        else:
            values[extra.name] = substitute(extra.value, inner)
    gone = [(name, "replaced by the other adapter") for value in old.values() for name in reads(value)]
    left_out = [*restored.model.left_out, *landed.model.left_out, *gone]
    return Restored(_with(landed.model, values, left_out), nodes, away)


def traces_onto(restored: Restored, landed: Merged) -> Traces:
    """Compare a restored base with a merge that was planned on :func:`stand_in`."""
    found, inner = traces(stand_in(restored.model), landed.model), _inner(restored)
    replaced = {k: (substitute(old, inner), substitute(new, inner)) for k, (old, new) in found.replaced.items()}
    return replace(found, replaced=replaced, lost={k: substitute(old, inner) for k, old in found.lost.items()})


def _inner(restored: Restored) -> dict[str, Expr]:
    """Return the restored values by the names of their stand-ins, fit to stand inside a merge's node."""
    return {_HELD + extra.name: _renamed(extra.value) for extra in restored.model.extras}


def _held(extra: Extra) -> Expr:
    return Read(_HELD + extra.name, extra.value.dtype, extra.value.shape)


def _united(before: Compute, after: Compute) -> Compute | None:
    """Return one node that takes a delta away and adds another; None where their matrices differ."""
    old, new = recipe_of(before)[0], recipe_of(after)[0]
    if before.shape != after.shape or not new.by_rows:
        return None
    if old.updates and (old.transposed, old.exact) != (new.transposed, new.exact):
        return None
    return recipes.node(
        replace(new, updates=(*old.updates, *new.updates)), before.args[0], (*before.args[1:], *after.args[1:])
    )


def _renamed(expr: Expr) -> Expr:
    """Return a restored weight whose nodes are told from those of the merge around it."""
    if isinstance(expr, Reshape):
        return reshape(_renamed(expr.x), expr.shape)
    if isinstance(expr, Join):
        return join([_renamed(part) for part in expr.parts], expr.axis)
    return replace(expr, kernel=RESTORE) if isinstance(expr, Compute) and recipes.is_merge(expr) else expr
