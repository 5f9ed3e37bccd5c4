"""What unmerging and switching share: a merged model in its base's names, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict

from ..conversion import plan
from ..conversion.forward import dialect_named
from ..dialects.adapter import Adapter, Dialect, Json, Value
from ..errors import InputError
from ..joined import Joined, prefixed
from ..merging.identity import MERGED_KEY, MergedMark, merged_mark
from ..merging.planning import Addition, Merged
from ..merging.planning import merge as merge_headers
from ..merging.repetition import shortened
from ..merging.twins import comparing
from ..merging.undo import UndoFile
from ..merging.unmerge_kernel import Guess, Unmerger
from ..merging.unmerge_planning import Restored, as_base, best_inverse, nodes_of, restore, tied_again
from . import merge_inputs
from .base_check import check_held, left_over
from .companions import carried_files
from .merge_inputs import BASE, MergeOptions, Opened
from .merge_record import record
from .model_output import ModelOutput, goal_of, place_of, renamed


@dataclass(frozen=True, slots=True)
class GuessRow:
    """What the best inverse of one parameter may have got wrong.

    ``blurred``: share of the elements of which rounding lost bits; the others are right. ``wrong``: share that is
    expected to differ from the base. ``error``: the largest possible error.
    """

    parameter: str
    elements: int
    blurred: float
    wrong: float
    error: float

    @classmethod
    def of(cls, name: str, guess: Guess) -> GuessRow:
        """Turn counts into shares."""
        size = max(1, guess.elements)
        return cls(name, guess.elements, guess.blurred / size, guess.wrong / size, guess.largest)


class Described(TypedDict):
    """What reports say about a way back: from where, by what, whether to the bit, and which parameters went it."""

    merged: str
    undo: str
    exact: bool
    restored: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Way:
    """A merged model in its base's names, and the way back from it.

    ``given``: the inputs, the base's side as their origin. ``config``: that of the base, where it is known. ``left``:
    marks that the base is to keep, where it was itself a merged model. ``nodes``: the weights that have a delta.
    """

    given: Opened
    restored: Restored
    undo: UndoFile | None
    config: Json | None
    left: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    nodes: frozenset[str] = frozenset()

    def described(self) -> Described:
        """Return what every report says about it."""
        return {
            "merged": str(self.given.base.path),
            "undo": "" if self.undo is None else str(self.undo.path),
            "exact": self.undo is not None,
            "restored": tuple(self.restored.nodes if self.undo is None else self.undo.tensors),
        }


def open_undo(path: Path | str | None) -> UndoFile | None:
    """Read an undo file through and check it."""
    return None if path is None else UndoFile(Path(path))


def recorded(options: MergeOptions, undo: UndoFile | None, adapters: int) -> MergeOptions:
    """Return the options with what the undo file says about the merge; an InputError for another number of adapters."""
    if undo is None:
        return replace(options, onto_merged=True)
    weights, family = undo.facts.get("weights"), undo.facts.get("family")
    if not isinstance(weights, list) or not all(isinstance(w, int | float) for w in weights):
        raise InputError("the undo file does not say what was merged", where=str(undo.path))
    if len(weights) != adapters:
        raise InputError(
            f"{len(weights)} adapters were merged, {adapters} are given",
            where=[str(undo.path), f"merged: {', '.join(map(str, _texts(undo.facts.get('adapters'))))}"],
            hint="give every --adapter, in the order of the merge",
        )
    return replace(
        options, onto_merged=True, weights=tuple(float(w) for w in weights), exact=undo.facts.get("exact") is True,
        family=options.family or (str(family) if family else None),
    )  # fmt: skip


def _texts(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def way_back(given: Opened, options: MergeOptions, undo: UndoFile | None, *, partial: bool = False) -> Way:
    """Plan the way from a merged model (``given.base``) back to its base; ``given.adapters``: what was merged.

    ``partial``: what cannot be computed back without an undo file may stay as it is. Raises MappingError where model,
    adapters and undo file do not belong together, or where nothing but an undo file could say what a parameter was.
    """
    held = merged_mark(given.base.source.metadata, where=str(given.base.path))
    model = prefixed(given.origin.parse(given.base.content()), BASE, given.base.source.specs)
    side = _side(given, options, undo, held)
    if side.name != given.origin.name:
        whole = Merged(model, given.base.model_config, (), (), (), ())
        alone = replace(given, joined=Joined({BASE: given.base.source}))
        made = renamed(alone, whole, side, options)
        model, given = replace(made.adapter, left_out=made.unused), replace(given, origin=side)
    additions, ranges, label = _once(merge_inputs.additions(given, model, options))
    landed = merge_headers(
        model, additions, config=given.base.model_config, exact=options.exact, residual_base=True,
        same=comparing(given.joined),
    )  # fmt: skip
    config, warnings = given.base.model_config, tuple[str, ...]()
    if undo is not None:
        restored, stored = restore(model, landed, undo, given.joined), undo.facts.get("config")
        config = stored if isinstance(stored, dict) else config
        said = undo.facts.get("marks")
        left = {str(key): str(text) for key, text in said.items()} if isinstance(said, dict) else {}
    else:
        nodes = nodes_of(landed.model)
        warnings = check_held(given, model, nodes, options)
        restored = best_inverse(model, landed, leave=options.leave, partial=partial)
        rest = left_over(held, restored.nodes, given)
        left = {} if rest is None else {MERGED_KEY: rest.as_text()}
        restored, embedding = tied_again(restored, model, held.added if held is not None else ())
        config = {**config, "tie_word_embeddings": True} if embedding and config is not None else config
    if ranges:
        restored = as_base(restored, ranges, label)
        config = shortened(config, ranges, label) if undo is None and config is not None else config
    return Way(given, restored, undo, config, left, warnings, frozenset(nodes_of(landed.model)))


def _side(given: Opened, options: MergeOptions, undo: UndoFile | None, held: MergedMark | None) -> Dialect:
    """Return in whose names the merge was made; the file's own where a table to others is not named."""
    if undo is not None:
        return dialect_named(str(undo.facts["side"])) if "side" in undo.facts else given.origin
    if held is None or held.side not in ("hf", "ms") or options.family is None:
        return given.origin
    return dialect_named(held.side)


def _once(additions: Sequence[Addition]) -> tuple[list[Addition], Value, str]:
    """Return additions that repeat no layers, which the model has already; and how it was done, and by which."""
    ranges: Value = None
    label, out = "", []
    for addition in additions:
        own = addition.adapter.config
        if own.get("layer_replication"):
            ranges, label = own["layer_replication"], addition.label
            own = {key: value for key, value in own.items() if key != "layer_replication"}
        out.append(replace(addition, adapter=replace(addition.adapter, config=own)))
    return out, ranges, label


def planned(
    given: Opened, model: Adapter, config: Json | None, target: Path | str, options: MergeOptions, *,
    metadata: Mapping[str, str], merged: bool, seed: str,
) -> ModelOutput:  # fmt: skip
    """Plan the writing of a model that is given as expressions over the inputs."""
    goal = goal_of(given.origin, target, options)
    output, shard_size = place_of(given, goal, target, options)
    named = merge_inputs.named_by(options, given.base, *given.adapters)
    made = renamed(given, Merged(model, config, (), (), (), ()), goal, named)
    steps = plan.build(given.joined.specs, made.outputs, made.unused, seed=f"{seed} {goal.name}")
    carried, _ = carried_files(given.base, [], output.directory)
    kept = record(given, output, goal, named, steps, config) if merged else None
    return ModelOutput(given, goal, output, steps, made.notes, shard_size, config, metadata, kept, carried)


def guesses(unmerger: Unmerger) -> tuple[GuessRow, ...]:
    """Return what may be wrong, by parameter; empty where an undo file restored everything."""
    return tuple(GuessRow.of(name, guess) for name, guess in unmerger.guesses.items())


def expected_wrong(rows: Sequence[GuessRow]) -> float:
    """Return the share of all elements that is expected to differ from the base."""
    return sum(row.wrong * row.elements for row in rows) / max(1, sum(row.elements for row in rows))
