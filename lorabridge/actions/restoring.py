"""What unmerging and switching share: a merged model in its base's names, the way back, and writing the result."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .. import formats, manifest
from ..arithmetic import numerics
from ..axes import Kernel
from ..conversion import execute, plan
from ..conversion.forward import dialect_named
from ..conversion.repository import MODEL_CONFIG, Output, plan_output
from ..dialects.adapter import Adapter, Dialect, Json
from ..errors import InputError, OutputError
from ..files.fsio import Staging, require_space
from ..joined import Joined, prefixed
from ..merging.planning import Merged
from ..merging.planning import merge as merge_headers
from ..merging.undo import UndoFile
from ..merging.unmerge_kernel import Guess, Unmerger
from ..merging.unmerge_planning import Restored, best_inverse, restore
from . import merge_inputs
from .companions import carried_files
from .merge import _check_place, _forward, _goal, _shard_size
from .merge_inputs import BASE, MergeOptions, Opened

Progress = Callable[[int, int], None]


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


@dataclass(frozen=True, slots=True)
class Writing:
    """What is to be written where: ``merged`` says that the result holds an adapter, ``metadata`` what else it says."""

    given: Opened
    goal: Dialect
    output: Output
    plan: plan.Plan
    notes: tuple[str, ...]
    shard_size: int | None
    config: Json | None
    metadata: Mapping[str, str]
    merged: bool


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
        made = _forward(alone, whole, side, options)
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
) -> Writing:  # fmt: skip
    """Plan the writing of a model that is given as expressions over the inputs."""
    goal = _goal(given.origin, target, options)
    output = plan_output(target, framework=goal.framework, adapter=False)
    _check_place(given, output, options)
    made = _forward(given, Merged(model, config, (), (), (), ()), goal, options)
    steps = plan.build(given.joined.specs, made.outputs, made.unused, seed=f"{seed} {goal.name}")
    size = options.max_shard_size
    if size is None and output.directory and output.format == "safetensors":
        size = _shard_size(given)
    return Writing(given, goal, output, steps, made.notes, size, config, metadata, merged)


def run(
    writing: Writing, options: MergeOptions, kernels: Mapping[str, Kernel], before_commit: Callable[[], None],
    progress: Progress | None,
) -> None:  # fmt: skip
    """Write the model; ``before_commit`` may still refuse it."""
    output, given = writing.output, writing.given
    sidecar = None if output.directory else manifest.sidecar(output.target)
    if sidecar is not None and sidecar.exists() and not options.overwrite:
        raise OutputError("the output's manifest exists", where=str(sidecar), hint="move it away or pass --overwrite")
    require_space(output.target.parent, writing.plan.nbytes + (writing.plan.nbytes >> 6))
    carried, _ = carried_files(given.base, [], output.directory)
    files = {path.name: raw for path, raw in carried.items()}
    if output.directory and writing.goal.name == "hf" and writing.config is not None:
        files[MODEL_CONFIG] = (json.dumps(dict(writing.config), indent=2, sort_keys=True) + "\n").encode()
    if writing.merged:
        said = {"schema": manifest.FACTS_SCHEMA, "merged": True}
        files["lorabridge.json" if sidecar is None else sidecar.name] = json.dumps(said).encode()
    with Staging(
        output.target, digest=_identity(writing), overwrite=options.overwrite, directory=output.directory
    ) as staging:
        sink = formats.make_sink(
            output.format, staging.create, output.file, max_shard_size=writing.shard_size,
            flavour="ms" if writing.goal.framework == "mindspore" else "hf", crc=options.crc,
        )  # fmt: skip
        execute.run(
            writing.plan, given.joined, sink,
            kernels=lambda name: {**numerics.kernels(name, numerics.Notes(), {}), **kernels},
            metadata={"format": "ms" if writing.goal.framework == "mindspore" else "pt", **writing.metadata},
            workers=options.workers or min(8, len(os.sched_getaffinity(0))), progress=progress,
        )  # fmt: skip
        for name, raw in files.items():
            file = staging.create(name)
            file.write(0, raw)
            file.close()
        if sidecar is not None and sidecar.name not in files:
            staging.drop(sidecar.name)
        before_commit()
        staging.commit()


def _identity(writing: Writing) -> str:
    """Return a digest of this run alone: what it restores depends on files that are checked while it runs."""
    return hashlib.sha256(writing.plan.digest.encode() + os.urandom(16)).hexdigest()


def guesses(unmerger: Unmerger) -> tuple[GuessRow, ...]:
    """Return what may be wrong, by parameter; empty where an undo file restored everything."""
    return tuple(GuessRow.of(name, guess) for name, guess in unmerger.guesses.items())


def expected_wrong(rows: Sequence[GuessRow]) -> float:
    """Return the share of all elements that is expected to differ from the base."""
    return sum(row.wrong * row.elements for row in rows) / max(1, sum(row.elements for row in rows))
