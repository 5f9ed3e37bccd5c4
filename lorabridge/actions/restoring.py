"""What unmerging and switching share: a merged model in its base's names, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..conversion import plan
from ..conversion.forward import dialect_named
from ..dialects.adapter import Adapter, Json
from ..errors import InputError
from ..joined import Joined, prefixed
from ..merging.planning import Merged
from ..merging.planning import merge as merge_headers
from ..merging.undo import UndoFile
from ..merging.unmerge_kernel import Guess, Unmerger
from ..merging.unmerge_planning import Restored, best_inverse, restore
from . import merge_inputs
from .companions import carried_files
from .merge_inputs import BASE, MergeOptions, Opened
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


@dataclass(frozen=True, slots=True)
class Way:
    """A merged model in its base's names, and the way back from it.

    ``given``: the inputs, the base's side as their origin. ``config``: that of the base, where it is known.
    """

    given: Opened
    restored: Restored
    undo: UndoFile | None
    config: Json | None


def open_undo(path: Path | None) -> UndoFile | None:
    """Read an undo file through and check it."""
    return None if path is None else UndoFile(path)


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


def way_back(given: Opened, options: MergeOptions, undo: UndoFile | None) -> Way:
    """Plan the way from a merged model (``given.base``) back to its base; ``given.adapters``: what was merged.

    Raises MappingError where model, adapters and undo file do not belong together, or where nothing but an undo file
    could say what a parameter was.
    """
    model = prefixed(given.origin.parse(given.base.content()), BASE, given.base.source.specs)
    side = dialect_named(str(undo.facts["side"])) if undo is not None and "side" in undo.facts else given.origin
    if side.name != given.origin.name:
        whole = Merged(model, given.base.model_config, (), (), (), ())
        alone = replace(given, joined=Joined({BASE: given.base.source}))
        made = renamed(alone, whole, side, options)
        model, given = replace(made.adapter, left_out=made.unused), replace(given, origin=side)
    landed = merge_headers(
        model, merge_inputs.additions(given, model, options), config=given.base.model_config, exact=options.exact,
        residual_base=True,
    )  # fmt: skip
    config = given.base.model_config
    if undo is None:
        return Way(given, best_inverse(model, landed), None, config)
    stored = undo.facts.get("config")
    restored = restore(model, landed, undo, given.joined)
    return Way(given, restored, undo, stored if isinstance(stored, dict) else config)


def planned(
    given: Opened, model: Adapter, config: Json | None, target: Path | str, options: MergeOptions, *,
    metadata: Mapping[str, str], merged: bool, seed: str,
) -> ModelOutput:  # fmt: skip
    """Plan the writing of a model that is given as expressions over the inputs."""
    goal = goal_of(given.origin, target, options)
    output, shard_size = place_of(given, goal, target, options)
    made = renamed(given, Merged(model, config, (), (), (), ()), goal, options)
    steps = plan.build(given.joined.specs, made.outputs, made.unused, seed=f"{seed} {goal.name}")
    carried, _ = carried_files(given.base, [], output.directory)
    return ModelOutput(given, goal, output, steps, made.notes, shard_size, config, metadata, merged, carried)


def guesses(unmerger: Unmerger) -> tuple[GuessRow, ...]:
    """Return what may be wrong, by parameter; empty where an undo file restored everything."""
    return tuple(GuessRow.of(name, guess) for name, guess in unmerger.guesses.items())


def expected_wrong(rows: Sequence[GuessRow]) -> float:
    """Return the share of all elements that is expected to differ from the base."""
    return sum(row.wrong * row.elements for row in rows) / max(1, sum(row.elements for row in rows))
