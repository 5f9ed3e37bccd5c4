"""Hold fingerprints against the files at hand: is this the base of that adapter, is this adapter in that model."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..axes import Compute, Expr
from ..conversion.forward import dialect_named
from ..conversion.repository import Input, read_json
from ..dialects.adapter import Adapter
from ..errors import LorabridgeError, MappingError
from ..files import placeholders
from ..formats.untrusted import MAX_HEADER, read_small
from ..joined import Joined
from ..merging.identity import (
    BaseMark,
    MergedMark,
    aligned,
    base_mark,
    delta_mark,
    merged_mark,
    overall,
    weight_mark,
)
from ..merging.planning import Merged
from .merge_inputs import BASE, MergeOptions, Opened, named_by
from .model_output import renamed

UNMERGED_KEY = "lorabridge.unmerged"
"""Key of a container's metadata that says that a model is not the base but near to it."""
MINDFORMERS = "mindformers_adapter_config.json"
ITERATION = "iteration_"
_HEAD = re.compile(r"(?:For[A-Z]|LMHead|Model|PreTrained).*$|DoubleHeads.*$")
"""What follows the kind of network in the name of a class of transformers."""
WEIGHT_FILES = ("config.json", "model.safetensors.index.json", "metadata.json", "common.json")


@dataclass(frozen=True, slots=True)
class Compared:
    """Fingerprints of one adapter's base beside those of the base at hand: by name, (recorded, found)."""

    mark: BaseMark
    pairs: Mapping[str, tuple[str, str]]

    @property
    def comparable(self) -> list[str]:
        """Names of the weights whose type is the recorded one."""
        return [name for name, (then, now) in self.pairs.items() if then.split(" ")[0] == now.split(" ")[0]]

    @property
    def wrong(self) -> list[str]:
        """Names of the weights that are others than the recorded ones."""
        return [name for name in self.comparable if self.pairs[name][0] != self.pairs[name][1]]


def check_bases(given: Opened, base: Adapter, options: MergeOptions) -> tuple[str, ...]:
    """Refuse adapters whose files record another base than this one; return warnings about what cannot be checked.

    ``base``: in its own names, over ``given.joined``. A model that was merged is compared as it was before, as far as
    its own record goes. Raises MappingError with both digests unless ``options.any_base``.
    """
    held = merged_mark(given.base.source.metadata, where=str(given.base.path))
    where: list[str] = []
    hints: dict[str, None] = {}
    warnings: list[str] = []
    for one in given.adapters:
        mark = base_mark(one.source.metadata, where=str(one.path))
        if mark is not None:
            found = _compared(mark, given, base, held, named_by(options, one, given.base))
            where += _differences(one, given, found)
            warnings += _unchecked(one, found)
        theirs, problem = _mindformers(one, given)
        where += problem
        warnings += _other_class(one, given)
        if placeholders.destination(given.base.path) is not None and _manifest_of(one.path) is not None:
            warnings.append(f"{given.base.path}: MindFormers' fingerprint holds file times, which stores do not keep")
        if theirs:
            hints["MindFormers' fingerprint holds file times: a copy of the right base differs from it too"] = None
    if where and not options.any_base:
        hints["give the base that the adapter was made for; with --any-base the result may be worth nothing"] = None
        raise MappingError("this is not the base that the adapter records", where=where, hint="; ".join(hints))
    if UNMERGED_KEY in given.base.source.metadata:
        warnings.append(f"{given.base.path} is the best inverse of a merge, not the base itself")
    return (*warnings, *(f"--any-base: {line}" for line in where))


def _other_class(one: Input, given: Opened) -> list[str]:
    """Warn of an adapter that peft made for another kind of network; other heads of one network are no other kind."""
    mapping = (one.adapter_config or {}).get("auto_mapping")
    made_for = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    known = (given.base.model_config or {}).get("architectures")
    if not isinstance(made_for, str) or not isinstance(known, list):
        return []
    kinds = [_HEAD.sub("", name) for name in known if isinstance(name, str)]
    if not kinds or _HEAD.sub("", made_for) in kinds:
        return []
    return [f"{one.path} was made for a {made_for}, {given.base.path} is a {', '.join(map(str, known))}"]


def _compared(
    mark: BaseMark, given: Opened, base: Adapter, held: MergedMark | None, options: MergeOptions
) -> Compared:  # fmt: skip
    values = _on_side(given, base, mark.side, options)
    known = held.weights if held is not None and held.side == mark.side else {}
    pairs = {}
    for name, own in aligned(mark.weights, {**known, **values}).items():
        row = known.get(own)
        found = row[0] if row else weight_mark(values[own], given.joined)
        if found:
            pairs[name] = mark.weights[name], found
    return Compared(mark, pairs)


def _on_side(given: Opened, base: Adapter, side: str, options: MergeOptions) -> Mapping[str, Expr]:
    """Return the base's parameters in the names of a side; none where no table leads there."""
    if side == given.origin.name:
        return {extra.name: extra.value for extra in base.extras}
    if side not in ("hf", "ms") or options.family in (None, "identity"):
        return {}
    alone = replace(given, joined=Joined({BASE: given.base.source}))
    whole = Merged(base, given.base.model_config, (), (), (), ())
    try:
        made = renamed(alone, whole, dialect_named(side), options)
    except LorabridgeError:
        return {}  # not whole, or without the sizes that the table needs: then it is not compared
    return {extra.name: extra.value for extra in made.adapter.extras}


def _differences(one: Input, given: Opened, found: Compared) -> list[str]:
    wrong = found.wrong
    if not wrong:
        return []
    then, now = (overall((name, found.pairs[name][i]) for name in found.comparable) for i in (0, 1))
    return [
        f"{one.path}: records {then}, made for {found.mark.file}",
        f"{given.base.path}: has {now}; {len(wrong)} of {len(found.comparable)} weights differ, first {wrong[0]}",
    ]


def _unchecked(one: Input, found: Compared) -> list[str]:
    """Say why the record of an adapter could not be compared, wholly or in part."""
    if found.wrong or len(found.comparable) == len(found.mark.weights):
        return []
    if not found.pairs:
        return [f"{one.path} records its base ({found.mark.file}) in other names: not compared"]
    other = next((name for name in found.pairs if name not in found.comparable), "")
    if not other:
        return []  # what the base does not have is for landing to refuse
    then, now = (mark.split(" ")[0] for mark in found.pairs[other])
    return [f"{one.path} records its base ({found.mark.file}) in {then}, this one is {now}: not compared"]


def _mindformers(one: Input, given: Opened) -> tuple[str, list[str]]:
    """Compare the fingerprint that MindFormers keeps beside an adapter; returns it, and what is wrong."""
    path = _manifest_of(one.path)
    recorded = read_json(path).get("base_fingerprint") if path is not None else None
    if not isinstance(recorded, str):
        return "", []
    base = given.base.path
    if placeholders.destination(base) is not None:
        return "", []
    found = mindformers_fingerprint(base)
    other = given.base.source.path if base.is_dir() else base.parent  # the file inside, the directory around
    if recorded in (found, mindformers_fingerprint(other)):
        return recorded, []
    return recorded, [f"{path}: records {recorded}", f"{base}: has {found}"]


def _manifest_of(adapter: Path) -> Path | None:
    """Return MindFormers' record of an adapter: in its directory, or in that of which it is an iteration."""
    folder = adapter if adapter.is_dir() else adapter.parent
    places = [folder, folder.parent] if folder.name.startswith(ITERATION) else [folder]
    return next((place / MINDFORMERS for place in places if (place / MINDFORMERS).is_file()), None)


def mindformers_fingerprint(base: Path) -> str:
    """Return what MindFormers 2.1.0 (checkpoint/utils.py) records of a base checkpoint.

    Names, sizes and modification times of its safetensors files, and the bytes of its configs and indexes. A file is
    its name, size and time.
    """
    digest = hashlib.sha256()
    if base.is_file():
        _add_status(digest, base, base.name)
        return digest.hexdigest()
    for root, folders, files in os.walk(base):
        folders.sort()
        for name in sorted(files):
            path = Path(root) / name
            if name in WEIGHT_FILES:
                digest.update(str(path.relative_to(base)).encode())
                digest.update(read_small(path, MAX_HEADER)[0])
            elif name.endswith(".safetensors"):
                _add_status(digest, path, str(path.relative_to(base)))
    return digest.hexdigest()


def _add_status(digest: hashlib._Hash, path: Path, name: str) -> None:
    status = path.stat()
    digest.update(f"{name}{status.st_size}{status.st_mtime_ns}".encode())


def marked(
    given: Opened, nodes: Mapping[str, Compute], bases: Mapping[str, Expr | None], added: Sequence[str],
    options: MergeOptions, *, held: MergedMark | None,
) -> MergedMark:  # fmt: skip
    """Return the record of a merge: ``nodes``: what it adds to which weight; ``bases``: what these weights were.

    ``held``: the record of the model that the adapters are merged onto. A base that is None is not known.
    """
    old = held.weights if held is not None and held.side == given.origin.name else {}
    weights: dict[str, tuple[str, ...]] = dict(old)
    for name, node in nodes.items():
        base = bases.get(name)
        before = old.get(name) or ("" if base is None else weight_mark(base, given.joined),)
        weights[name] = (*before, delta_mark(node, given.joined))
    scales = options.weights or (1.0,) * len(given.adapters)
    rows = [
        {"adapter": one.path.name, "weight": scale, "tensors": len(one.source.specs)}
        for one, scale in zip(given.adapters, scales, strict=True)
    ]
    earlier, first = (held.adapters, held.base) if held is not None else ((), given.base.path.name)
    return MergedMark(given.origin.name, first, (*earlier, *rows), weights, tuple(added))


def check_not_held(mark: MergedMark, held: MergedMark | None, nodes: Mapping[str, Compute], where: str) -> None:
    """Refuse an adapter that a merged model holds already, as far as both records tell."""
    if held is None or not nodes or held.side != mark.side:
        return
    if all(mark.weights[name][-1] in held.weights.get(name, ())[1:] for name in nodes):
        raise MappingError(
            "the base holds this adapter already", where=[where, f"{len(nodes)} of {len(nodes)} deltas are the same"],
            hint="scale an adapter with --weights instead of merging it twice",
        )  # fmt: skip


def check_held(
    given: Opened, model: Adapter, nodes: Mapping[str, Compute], options: MergeOptions
) -> tuple[str, ...]:  # fmt: skip
    """Refuse to take an adapter out of a model whose record does not have it; return warnings.

    ``model``: in its base's names; ``nodes``: the deltas as they land on the model. Raises MappingError with both
    digests unless ``options.any_adapter``.
    """
    held = merged_mark(given.base.source.metadata, where=str(given.base.path))
    if held is None:
        return _not_merged(given, model, options)
    if held.side != given.origin.name or not held.weights:
        return ()
    wrong = {name: delta_mark(node, given.joined) for name, node in nodes.items()}
    wrong = {name: mark for name, mark in wrong.items() if mark not in held.weights.get(name, ())[1:]}
    if not wrong:
        return ()
    name, mark = next(iter(wrong.items()))
    there = held.weights.get(name, ())[1:]
    said = f"{name}: the model holds the delta {' and '.join(there)}" if there else f"{name}: the model holds no delta"
    where = [f"{said}, the adapter makes {mark}", f"{len(wrong)} of {len(nodes)} deltas differ"]
    if options.any_adapter:
        return tuple(f"--any-adapter: {line}" for line in where)
    raise MappingError(
        "another adapter was merged into this model", where=where,
        hint="give the adapter and the --weights of the merge; with --any-adapter the result may be worth nothing",
    )  # fmt: skip


def _not_merged(given: Opened, model: Adapter, options: MergeOptions) -> tuple[str, ...]:
    """Refuse a model that is an adapter's own base; warn where nothing says that anything was merged."""
    for one in given.adapters:
        mark = base_mark(one.source.metadata, where=str(one.path))
        found = None if mark is None else _compared(mark, given, model, None, named_by(options, one, given.base))
        if found is not None and found.comparable and not found.wrong and not options.any_adapter:
            raise MappingError(
                "nothing was merged into this model", where=[str(given.base.path), f"it is the base of {one.path}"],
                hint="name the merged model",
            )  # fmt: skip
    if UNMERGED_KEY in given.base.source.metadata:
        return (f"{given.base.path} says that an adapter was taken out of it already",)
    return (f"{given.base.path} does not say that an adapter was merged into it: if none was, the result is no base",)


def left_over(held: MergedMark | None, nodes: Mapping[str, Compute], given: Opened) -> MergedMark | None:
    """Return the record of what a model still holds when deltas are taken out of it; None where that is nothing."""
    if held is None or held.side != given.origin.name:
        return None
    weights = dict(held.weights)
    for name, node in nodes.items():
        row, mark = list(weights.get(name, ())), delta_mark(node, given.joined)
        if mark in row[1:]:
            del row[1 + row[1:].index(mark)]
        weights[name] = tuple(row)
    kept = {name: row for name, row in weights.items() if len(row) > 1}
    gone = {one.path.name for one in given.adapters}
    adapters = tuple(row for row in held.adapters if row.get("adapter") not in gone)
    return replace(held, weights=kept, adapters=adapters) if kept else None
