"""The way back: plan the inverse of the conversion that a manifest describes, and confirm that it applies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..arithmetic import numerics, products
from ..axes import Compute, Expr, Read, children, evaluate, reads
from ..dialects.adapter import Content, Facts, Json, Value
from ..errors import LorabridgeError
from ..manifest import Manifest
from ..tensors import TensorSpec
from . import plan
from .forward import Forward, Settings, dialect_named, forward, settings_from

if TYPE_CHECKING:
    from ..tensors import Bits, Source


@dataclass(frozen=True, slots=True)
class WayBack:
    """Outputs that restore the manifest's source, or the reason why they cannot be trusted.

    ``exact``: the outputs are the source's bits. ``residues``: what ``unscale`` needs, per tensor of the file.
    """

    outputs: tuple[tuple[str, Expr], ...]
    exact: bool
    reason: str
    residues: Mapping[str, bytes]


def replan(manifest: Manifest, *, mappings: Path | None) -> tuple[Forward, plan.Plan]:
    """Build the forward conversion of a manifest again, from its own description of the source."""
    side, content = manifest.source, _content(manifest)
    settings = settings_from(
        manifest.options, mappings=mappings, model_config=manifest.model_config, target_facts=manifest.chosen
    )
    made = forward(content, dialect_named(side.dialect), dialect_named(manifest.target.dialect), settings)
    unused = [*made.unused, *((name, "not selected") for name in made.unselected)]
    return made, plan.build(content.specs, made.outputs, unused, seed=seed(manifest.target.dialect))


def seed(dialect: str) -> str:
    """Return what a plan's digest depends on beside tensors and expressions."""
    return f"lorabridge plan 1 to {dialect}"


def way_back(source: Source, manifest: Manifest, *, mappings: Path | None) -> WayBack:
    """Plan the return to a manifest's source.

    The return is exact when the forward plan built again is the recorded one, every source tensor is determined
    by the file, and (where the file holds zeros or copies that say nothing) running forward from the restored
    tensors gives the file's bits. Otherwise ``outputs`` is empty and ``reason`` says which of these failed: the file is
    then read as any other of its dialect.
    """
    if not manifest.describes(source.specs):
        return _not("the manifest describes other tensors than the file holds")
    try:
        made, there = replan(manifest, mappings=mappings)
    except LorabridgeError as error:
        return _not(f"the conversion cannot be planned again: {error.problem}")
    if there.digest != manifest.plan:
        return _not(f"lorabridge {manifest.version} planned the conversion differently")
    inverse, numbers = there.inverse(), manifest.stated.read("value")
    if inverse.lost:
        return _not(f"{len(inverse.lost)} tensors were rounded on the way here, first {inverse.lost[0]}")
    scaled = {name for name, expr in there.outputs().items() if _kernels(expr) & {"scale"}}
    if any(_digest(source.read(name)) != manifest.digests.get(name) for name in scaled):
        return _not("factors that were scaled have changed since")
    if (inverse.redundant or scaled) and not _confirmed(source, there, inverse.exprs, manifest.residues):
        return _not("the file's values have changed since, in places that the source has no room for")
    exprs = {**inverse.exprs, **{name: inverse.exprs[other] for name, other in made.ties if other in inverse.exprs}}
    exprs |= {s.name: expr for s in manifest.source.specs if s.name not in exprs and (expr := _stated(s, numbers))}
    order = [s.name for s in manifest.source.specs if s.name in exprs]
    return WayBack(tuple((name, exprs[name]) for name in order), True, "", manifest.residues)


def _stated(spec: TensorSpec, numbers: Mapping[str, Value]) -> Expr | None:
    """Return a tensor of one element whose number the manifest holds."""
    value = numbers.get(spec.name)
    return products.constant(value, spec.dtype, spec.shape) if isinstance(value, int | float) else None


def restored_config(manifest: Manifest) -> Json | None:
    """Return the source's config; where only a part was selected, the one that its dialect gives that part.

    peft fails to load a config that names whole modules which the file lacks.
    """
    side = manifest.source
    chosen = settings_from(manifest.options, mappings=None, model_config=None, target_facts=Facts()).selection
    if not chosen or side.config is None:
        return side.config
    dialect = dialect_named(side.dialect)
    return forward(_content(manifest), dialect, dialect, Settings(selection=chosen)).config


def _content(manifest: Manifest) -> Content:
    side = manifest.source
    metadata = {**side.metadata, "container": side.format}
    return Content({s.name: s for s in side.specs}, metadata, side.config, manifest.stated, side.file)


def _not(reason: str) -> WayBack:
    return WayBack((), False, reason, {})


def _kernels(expr: Expr) -> set[str]:
    own = {expr.kernel} if isinstance(expr, Compute) else set()
    return own.union(*(_kernels(child) for child in children(expr)))


def _digest(bits: Bits) -> str:
    return hashlib.sha256(np.ascontiguousarray(bits).data).hexdigest()


def _confirmed(
    source: Source, there: plan.Plan, inverse: Mapping[str, Expr], residues: Mapping[str, bytes]
) -> bool:  # fmt: skip
    """Run the conversion forward from the restored tensors and compare with the file."""
    notes = numerics.Notes()

    def restored(wanted: str) -> Bits:
        back = inverse[wanted]
        return evaluate(back, source.read, numerics.kernels(residue_key(back), notes, residues))

    for name, expr in there.outputs().items():
        if isinstance(expr, Read) and inverse[expr.name] == Read(name, expr.dtype, expr.shape):
            continue  # the same bytes by construction
        made = evaluate(expr, restored, numerics.kernels(name, notes, {}))
        if made.tobytes() != source.read(name).tobytes():
            return False
    return True


def residue_key(expr: Expr) -> str:
    """Return the one tensor that an inverse with arithmetic reads: its residue is the one that applies."""
    return next(iter(reads(expr)), "")
