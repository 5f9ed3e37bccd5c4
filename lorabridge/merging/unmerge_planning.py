"""Plan the ways back from a merged model, to its base or on to another adapter; note what a merge keeps for them.

All of it is a function of headers and of the adapters' factors; the model's tensors are not read, but for the
parameters that a merge replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np

from ..arithmetic import recipe as recipes
from ..arithmetic.recipe import Recipe, recipe_of
from ..axes import Compute, Expr, Join, Kernel, Read, Reshape, join, reads, reshape, substitute
from ..dialects.adapter import Adapter, Extra, Value
from ..errors import MappingError, counted
from ..names import natural_key
from ..tensors import Source
from .planning import Merged
from .reading import rows, spans
from .repetition import origin
from .ties import EMBEDDINGS, HEAD
from .undo import Kept, Recorder, UndoFile
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
    ``left``: what stays as it is in the merged model, each with the reason, which is empty where that was asked for.
    """

    model: Adapter
    nodes: Mapping[str, Compute] = field(default_factory=dict)
    away: Mapping[str, int] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)


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


def at_home(base: Adapter, homes: Mapping[str, str]) -> Adapter:
    """Return a base whose parameters are called as in the merged model, where layers were repeated."""
    return _called(base, lambda name: homes.get(name, name)) if homes else base


def as_base(restored: Restored, ranges: Value, label: str) -> Restored:
    """Return a restored base whose layers are numbered as before they were repeated; further copies are dropped."""
    names = {extra.name: origin(extra.name, ranges, label) for extra in restored.model.extras}
    copies = [extra for extra in restored.model.extras if not names[extra.name]]
    gone = [(name, "a copy of another layer") for extra in copies for name in reads(extra.value)]
    kept = replace(restored.model, extras=tuple(extra for extra in restored.model.extras if names[extra.name]))
    model = _called(kept, lambda name: names[name])
    nodes = {names[name]: node for name, node in restored.nodes.items() if names[name]}
    ordered = {e.name: e.value for e in sorted(model.extras, key=lambda extra: natural_key(extra.name))}
    return replace(restored, model=_with(model, ordered, [*restored.model.left_out, *gone]), nodes=nodes)


def _called(model: Adapter, name_of: Callable[[str], str]) -> Adapter:
    extras = []
    for extra in model.extras:
        path, _, parameter = name_of(extra.name).rpartition(".")
        extras.append(replace(extra, path=path, parameter=parameter))
    return replace(model, extras=tuple(extras))


def nodes_of(model: Adapter) -> dict[str, Compute]:
    """Return the weights of a merged model that get a delta, by name."""
    found = ((extra.name, _node(extra.value)) for extra in model.extras)
    return {name: node for name, node in found if node is not None}


def _node(expr: Expr) -> Compute | None:
    inner = _plain(expr)
    return inner if isinstance(inner, Compute) and recipes.is_merge(inner) else None


def keep_others(recorder: Recorder, found: Traces, source: Source, kernels: Mapping[str, Kernel]) -> None:
    """Note what a merge replaces: as a residue where the merged model has the same type and shape, else raw."""
    for name, (before, after) in found.replaced.items():
        recorder.expect(name, before.dtype, before.shape, "near")
        for start, stop in spans(before):
            bits = [rows(expr, start, stop, source, kernels).reshape(stop - start, -1) for expr in (before, after)]
            recorder.take(name, start, bits[0], bits[1], None)
    for name, before in found.lost.items():
        recorder.expect(name, before.dtype, before.shape, "raw")
        for start, stop in spans(before):
            recorder.keep(name, start, rows(before, start, stop, source, kernels))


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


def best_inverse(
    model: Adapter, landed: Merged, *, leave: Sequence[str] = (), partial: bool = False
) -> Restored:  # fmt: skip
    """Return the nearest to the base that can be computed from the merged model alone.

    ``leave``: globs on parameters that stay as they are in the merged model. A parameter that was replaced or
    normalised, of which nothing in the model says what it was, stays as well where ``partial`` is set, else it is a
    MappingError; so is a model from which nothing at all can be taken out, or that is not that of the merge.
    """
    found = traces(model, landed.model)
    left = tuple(extra.name for extra in model.extras if any(fnmatchcase(extra.name, pattern) for pattern in leave))
    idle = [repr(glob) for glob in leave if not any(fnmatchcase(extra.name, glob) for extra in model.extras)]
    if idle:
        raise MappingError("--leave matches no parameter", where=idle, hint="`lorabridge inspect` lists the names")
    nodes = {name: node for name, node in found.nodes.items() if name not in left}
    copies, brought = _copies(found, nodes, landed.model), _brought(found)
    known = {*copies, *brought, *left}
    gone = {name: _gone(*pair) for name, pair in found.replaced.items() if name not in known}
    gone |= {name: _NORMS for name, node in nodes.items() if not additive(recipe_of(node)[0])}
    nodes = {name: node for name, node in nodes.items() if name not in gone}
    odd = [f"{name}: the merged model has it in another shape than the adapter" for name in found.lost]
    odd += [f"{name}: the adapter brings it, the merged model does not have it" for name in found.added]
    where = [*(f"{name}: {why}" for name, why in gone.items()), *odd]
    if odd or (gone and not (partial and (nodes or brought))):
        raise MappingError(
            f"{counted(len(where), 'parameter')} cannot be computed back from the merged model",
            where=where,
            hint="pass --undo with the file that merge --undo wrote, or take them from the base; --leave GLOB keeps "
            "some as they are in the merged model",
        )
    values = {extra.name: extra.value for extra in model.extras}
    for name, node in nodes.items():
        values[name] = reshape(in_blocks(node), values[name].shape)
    for name, other in copies.items():
        values[name] = values[other]
    values |= {name: value for name, value in brought.items() if name not in left}
    away = {name: len(recipe_of(node)[0].updates) for name, node in nodes.items()}
    kept = {name: "" for name in left if name in found.nodes or name in found.replaced} | gone
    return Restored(_with(model, values, [*landed.model.left_out, *_spare(landed)]), nodes, away, kept)


_NORMS = "DoRA normalised it, and the norm of each of its outputs in the base is gone"


def _copies(found: Traces, nodes: Mapping[str, Compute], merged: Adapter) -> dict[str, str]:
    """Return which replaced parameters are copies of a merged weight: a head that stays tied."""
    by_value = {extra.value: extra.name for extra in merged.extras if extra.name in nodes}
    return {name: by_value[after] for name, (_, after) in found.replaced.items() if after in by_value}


def _brought(found: Traces) -> dict[str, Expr]:
    """Return replaced weights that the adapter itself has as they were before its delta (saved embedding layers)."""
    out = {}
    for name, (before, after) in found.replaced.items():
        node = _node(after)
        if node is not None and not set(reads(before)) & set(reads(node.args[0])):
            out[name] = reshape(node.args[0], before.shape)
    return out


def _gone(before: Expr, after: Expr) -> str:
    if isinstance(after, Join) and set(reads(before)) & set(reads(after)):
        return "rows of it were replaced by trained ones"
    return "the adapter replaced it"


def tied_again(restored: Restored, model: Adapter, held: Sequence[str]) -> tuple[Restored, str]:
    """Take back a head that the merge untied from its embedding; also return the embedding's name, empty if none.

    ``model``: the merged model; ``held``: the parameters that the merge added. Where only one of the two got a delta,
    the other one is the base's matrix, bit for bit.
    """
    embedding = next((extra.name for extra in model.extras if extra.name.endswith(EMBEDDINGS)), "")
    merged = {extra.name: extra.value for extra in model.extras}
    if HEAD not in held or HEAD not in merged or not embedding:
        return restored, ""
    values = {extra.name: extra.value for extra in restored.model.extras}
    head = values.pop(HEAD)
    gone = [(name, "of a head that is tied again") for name in reads(head)]
    nodes = dict(restored.nodes)
    gone += [(name, "not needed on the way back") for node in nodes.values() for name in reads(node)]
    if head == merged[HEAD]:
        gone += [(name, "the head's copy is the base's matrix") for name in reads(merged[embedding])]
        values[embedding] = merged[HEAD]
        nodes.pop(embedding, None)
    nodes.pop(HEAD, None)
    away = {name: count for name, count in restored.away.items() if name in nodes}
    made = _with(restored.model, values, [*restored.model.left_out, *gone])
    return replace(restored, model=made, nodes=nodes, away=away), embedding


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
        same = before is not None and recipe_of(before)[0].name == extra.name
        if node is not None and before is not None and same and _plain(node.args[0]) == _held(extra):
            flat = _united(before, node)
        if flat is not None and before is not None:
            away[extra.name] = len(recipe_of(before)[0].updates)
            nodes[extra.name] = flat
            values[extra.name] = reshape(in_blocks(flat), extra.value.shape)
        elif extra.value == _held(extra) and (same or before is None):
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
