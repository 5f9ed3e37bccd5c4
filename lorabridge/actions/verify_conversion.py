"""Hold two files against the conversion between them: planned again, run forward and backward, bit for bit."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..arithmetic import numerics
from ..arithmetic.floats import Bits
from ..axes import Expr, Kernel, Read, evaluate, reads
from ..conversion import plan, wayback
from ..conversion.blocks import blocks
from ..conversion.forward import Forward, dialect_named, forward, settings_from
from ..dialects.adapter import Facts
from ..errors import LorabridgeError
from ..manifest import Manifest, facts_json
from ..tensors import Source
from .sides import Side
from .verify_inputs import VerifyOptions
from .verify_report import Check

Step = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Replanned:
    """The conversion of a file as it is now: ``made`` and ``plan``, and what was checked while planning."""

    made: Forward
    plan: plan.Plan
    checks: tuple[Check, ...]


def replan(origin: Side, kept: Manifest, options: VerifyOptions) -> Replanned | Check:
    """Plan the conversion that a manifest describes for a file as it lies there; a failed check where that fails.

    The file's own config and facts count, so that an alpha changed since is seen; what it does not say is taken from
    the manifest.
    """
    try:
        _, recorded = wayback.replan(kept, mappings=options.mappings)
        model = origin.given.model_config if origin.given.model_config is not None else kept.model_config
        settings = settings_from(
            kept.options, mappings=options.mappings, model_config=model, target_facts=kept.chosen
        )  # fmt: skip
        content = replace(origin.content, facts=origin.content.facts.then(kept.stated))
        if content.config is None:
            content = replace(content, config=kept.source.config)
        goal = dialect_named(kept.target.dialect)
        made = forward(content, dialect_named(kept.source.dialect), goal, settings)
        unused = [*made.unused, *((name, "not selected") for name in made.unselected)]
        planned = plan.build(content.specs, made.outputs, unused, seed=wayback.seed(goal.name))
    except LorabridgeError as error:
        return Check("the conversion can be planned again", False, error.problem, error.where)
    return Replanned(made, planned, (_digest(planned, recorded, kept), *_said(made, kept), _accounted(planned)))


def _digest(planned: plan.Plan, recorded: plan.Plan, kept: Manifest) -> Check:
    if planned.digest == kept.plan:
        return Check("plan", True, f"planned again, its digest {kept.plan[:12]} is the recorded one")
    if planned.digest == recorded.digest:
        return Check("plan", False, f"lorabridge {kept.version} planned this conversion differently")
    return Check("plan", False, "the source as it is now leads to another plan than the one that was run")


def _said(made: Forward, kept: Manifest) -> list[Check]:
    """Compare the facts and the config that the conversion gives its target now with those recorded."""
    mine, theirs = (sorted(map(repr, facts_json(facts))) for facts in (made.facts, kept.facts))
    where = tuple(row for row in [*mine, *theirs] if (row in mine) != (row in theirs))
    checks = [Check("facts about the target", not where, f"{len(theirs)} recorded", where)]
    now, then = dict(made.config or {}), dict(kept.target.config or {})
    changed = tuple(sorted(key for key in now.keys() | then.keys() if now.get(key) != then.get(key)))
    return [*checks, Check("config of the target", not changed, f"{len(then)} fields recorded", changed)]


def _accounted(planned: plan.Plan) -> Check:
    used = Counter(name for step in planned.steps for name in step.reads)
    twice = [name for name, count in used.items() if count > 1]
    reasons = dict.fromkeys(why for _, why in planned.unused)
    left = f", {len(planned.unused)} left out ({'; '.join(reasons)})" if planned.unused else ""
    text = f"{len(planned.sources)} source tensors: {len(used)} consumed, each by one step{left}"
    return Check("every source tensor is accounted for", not twice, text, tuple(twice))


def run_forward(
    outputs: plan.Plan, origin: Source, made: Source, step: Step, own: Mapping[str, Kernel] | None = None
) -> tuple[Check, Check]:
    """Compute every output from the source again, block by block, and compare it with the file's bytes.

    ``own``: kernels beside those of conversions. Returns the checks of the names and types, and of the bits.
    """
    expected = {spec.name: spec for spec in outputs.specs}
    there = made.specs
    odd = [f"{name}: missing" for name in expected if name not in there]
    odd += [f"{name}: nothing in the source makes it" for name in there if name not in expected]
    shared = [name for name in expected if name in there]
    odd += [
        f"{name}: {spec.dtype} {list(spec.shape)}, must be {expected[name].dtype} {list(expected[name].shape)}"
        for name in shared
        if (spec := there[name]) != expected[name]
    ]
    names = Check("every target tensor is produced", not odd, f"{len(there)} tensors", tuple(odd))
    notes = numerics.Notes()
    wrong: list[str] = []
    for work in outputs.steps:
        cache: dict[str, Bits] = {}

        def source(name: str, cache: dict[str, Bits] = cache) -> Bits:
            if name not in cache:
                cache[name] = origin.read(name)
            return cache[name]

        for name, expr in work.writes:
            if name in there and there[name] == expected[name]:
                kernels = {**numerics.kernels(name, notes, {}), **(own or {})}
                problem = _compare(name, expr, source, kernels, made)
                wrong += [problem] if problem else []
                step(expected[name].nbytes)
    return names, Check(
        "forward: SRC's bits make DST's", not wrong, f"{len(shared) - len(wrong)} tensors equal", tuple(wrong)
    )


def _compare(name: str, expr: Expr, source: Callable[[str], Bits], kernels: Mapping[str, Kernel], made: Source) -> str:
    """Return where one output differs from the file; empty where no bit does."""
    found = np.ascontiguousarray(made.read(name)).reshape(-1)
    at = off = 0
    first: int | None = None
    for block in blocks(expr, source, kernels):
        flat = np.ascontiguousarray(block).reshape(-1)
        other = found[at : at + flat.size]
        if flat.tobytes() != other.tobytes():
            apart = np.flatnonzero(flat != other)
            off += apart.size
            first = at + int(apart[0]) if first is None else first
        at += flat.size
    if first is None:
        return ""
    index = tuple(int(i) for i in np.unravel_index(first, expr.shape)) if expr.shape else ()
    return f"{name}: {off} of {at} elements differ, first {list(index)}"


def run_backward(planned: plan.Plan, origin: Source, made: Source, residues: Mapping[str, bytes], step: Step) -> Check:
    """Compute every source tensor that the outputs determine, and compare it with the source's bytes."""
    inverse = planned.inverse()
    outputs, notes = planned.outputs(), numerics.Notes()
    wrong: list[str] = []
    for name, expr in inverse.exprs.items():
        if any(made.specs.get(target) is None for target in reads(expr)):
            wrong.append(f"{name}: its target tensors are missing")
            continue
        copied = isinstance(expr, Read) and isinstance(outputs[expr.name], Read)
        if not copied:  # of copies the forward check has compared the bytes already
            found = evaluate(expr, made.read, numerics.kernels(wayback.residue_key(expr), notes, residues))
            if found.tobytes() != origin.read(name).tobytes():
                wrong.append(f"{name}: does not come back bit for bit")
        step(planned.sources[name].nbytes)
    lost = f"; {len(inverse.lost)} were rounded or compressed and are not determined" if inverse.lost else ""
    return Check(
        "backward: DST's bits make SRC's", not wrong, f"{len(inverse.exprs)} tensors restored{lost}", tuple(wrong)
    )


def recorded_digests(made: Source, kept: Manifest, step: Step) -> Check | None:
    """Compare the file's tensors with the digests in its manifest; None where it has none."""
    if not kept.digests:
        return None
    wrong = []
    for name, digest in kept.digests.items():
        if name in made.specs:
            bits = np.ascontiguousarray(made.read(name))
            if hashlib.sha256(bits.data).hexdigest() != digest:
                wrong.append(name)
            step(made.specs[name].nbytes)
        else:
            wrong.append(f"{name}: missing")
    return Check("recorded checksums", not wrong, f"sha256 of {len(kept.digests)} tensors", tuple(wrong))


def plain_plan(first: Side, second: Side, family: str, layout: Mapping[str, str], options: VerifyOptions) -> Replanned:
    """Plan the conversion between two whole models that no manifest describes; MappingError where a table refuses."""
    settings = settings_from(
        {"family": family, **{f"layout.{key}": value for key, value in layout.items()}},
        mappings=options.mappings,
        model_config=first.given.model_config or second.given.model_config,
        target_facts=Facts(),
    )
    made = forward(first.content, first.dialect, second.dialect, settings)
    planned = plan.build(first.content.specs, made.outputs, made.unused, seed=wayback.seed(second.dialect.name))
    return Replanned(made, planned, (_accounted(planned),))


def tied(planned: Replanned, origin: Source) -> Check | None:
    """Check that what a table leaves out as tied is equal to what it is tied to; None where nothing is."""
    if not planned.made.ties:
        return None
    wrong = tuple(
        f"{name} differs from {other}"
        for name, other in planned.made.ties
        if origin.read(name).tobytes() != origin.read(other).tobytes()
    )
    return Check("tied parameters are equal", not wrong, f"{len(planned.made.ties)} left out", wrong)
