"""Return to where a file came from: over one manifest or several, unless what the options say contradicts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..arithmetic import numerics
from ..arithmetic.floats import Bits
from ..axes import Expr, Read, evaluate, substitute
from ..conversion import wayback
from ..conversion.plan import Plan
from ..conversion.repository import Input, Output
from ..conversion.wayback import WayBack
from ..dialects.adapter import Fact, Facts, Json
from ..dialects.mindformers_config import read_config
from ..errors import LorabridgeError, UsageError
from ..families import tables
from ..manifest import Manifest
from ..tensors import Extent, Source, TensorSpec
from .choices import Choice, ConvertOptions

IDLE = frozenset({"base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"})
"""Fields of a peft config that may differ: they do not say what the tensors mean."""


def steps(options: ConvertOptions, choice: Choice) -> tuple[Manifest, ...]:
    """Return the conversions to undo, the last one first; none where more is asked for than to go back."""
    asks = (options.dtype, options.include, options.exclude, options.layers, options.compress, options.adapter_only)
    if choice.kept is None or any(asks):
        return ()
    undone = tuple(step for step in choice.kept.chain() if not step.made)
    place = next((i for i, step in enumerate(undone) if step.source.dialect == choice.goal.name), None)
    if place is None:
        return ()
    undone = undone[: place + 1]
    families = {step.options.get("family", "identity") for step in undone}
    if options.family is not None and options.family not in families:
        return ()
    return undone if all(_said(fact, undone) for fact in options.facts.entries) else ()


def _said(fact: Fact, undone: Sequence[Manifest]) -> bool:
    """Say whether a manifest states the same, of every module."""
    stated = [entry for step in undone for facts in (step.facts, step.stated) for entry in facts.entries]
    same = [entry.value for entry in stated if entry.field == fact.field]
    return fact.pattern == "*" and bool(same) and all(value == fact.value for value in same)


def contradiction(given: Input, options: ConvertOptions, undone: Sequence[Manifest]) -> str:
    """Say what of --config is otherwise in the manifests; "" where nothing is. UsageError for another --layout."""
    recorded = {key: choice for step in undone for key, choice in step.layout.items()}
    other = [f"{key}={choice}, the manifest says {recorded.get(key, 'nothing of it')}"
             for key, choice in options.layout.items() if recorded.get(key) != choice]  # fmt: skip
    if other:
        raise UsageError(
            "--layout contradicts the manifest of the file", where=other,
            hint="leave it out; or, if the manifest is wrong, move it away and pass flags",
        )  # fmt: skip
    if options.config is None:
        return ""
    if given.config_from == str(options.config):
        sides = [undone[-1].source.config, undone[0].target.config]
        found = [_other_adapter(given, config) for config in sides if config]
    else:
        found = [_other_model(given, step, options.mappings) for step in undone]
    return next((f"--config and the manifest differ in {fields}" for fields in found if fields), "")


def _other_adapter(given: Input, recorded: Json) -> str:
    mine = given.adapter_config or {}
    if "peft_type" in mine and "peft_type" in recorded:
        shared = (mine.keys() & recorded.keys()) - IDLE
        return ", ".join(sorted(key for key in shared if _plain(mine[key]) != _plain(recorded[key])))
    one, two = read_config(mine), read_config(recorded)
    if one is None or two is None:
        return ""
    pairs = {"rank": (one.rank, two.rank), "alpha": (one.alpha, two.alpha)}
    return ", ".join(key for key, (a, b) in pairs.items() if None not in (a, b) and a != b)


def _plain(value: object) -> object:
    """Return a value of a config in which the order of a list of names does not count."""
    return sorted(map(str, value)) if isinstance(value, list) else value


def _other_model(given: Input, step: Manifest, mappings: Path | None) -> str:
    """Name the sizes and layouts in which a model's config differs from the one that a conversion used."""
    family = step.options.get("family", "identity")
    if step.model_config is None or given.model_config is None or family == "identity":
        return ""
    if given.model_config.get("model_type") != step.model_config.get("model_type"):
        return "model_type"
    table = tables.load_family(family, mappings)
    try:
        sizes = [tables.sizes_from_config(table, config) for config in (given.model_config, step.model_config)]
    except LorabridgeError as error:
        return error.problem
    layouts = [tables.layout_from_config(table, config) for config in (given.model_config, step.model_config)]
    (mine, theirs) = ({**one, **two} for one, two in zip(sizes, layouts, strict=True))
    return ", ".join(sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)))


def way(source: Source, undone: Sequence[Manifest], *, mappings: Path | None) -> WayBack:
    """Plan the return over several conversions; see :func:`lorabridge.conversion.wayback.way_back`."""
    back = wayback.way_back(source, undone[0], mappings=mappings)
    for step in undone[1:]:
        if not back.exact:
            return back
        before = dict(back.outputs)
        further = wayback.way_back(_Restored(source, step.target.specs, before, back.residues), step, mappings=mappings)
        if not further.exact:
            return further
        theirs = {wayback.residue_key(before[name]): raw for name, raw in further.residues.items() if name in before}
        if theirs.keys() & back.residues.keys():
            return WayBack((), False, "scalings were rounded twice on the way here", {})
        outputs = tuple((name, substitute(expr, before)) for name, expr in further.outputs)
        back = WayBack(outputs, True, "", {**back.residues, **theirs})
    return back


class _Restored:
    """A file of the way, as it was: its tensors are computed from those of the file at hand."""

    def __init__(
        self, source: Source, specs: Sequence[TensorSpec], values: Mapping[str, Expr], residues: Mapping[str, bytes]
    ) -> None:
        self.format, self.path, self.metadata = source.format, source.path, source.metadata
        self.specs: Mapping[str, TensorSpec] = {spec.name: spec for spec in specs if spec.name in values}
        self._source, self._values, self._residues = source, values, residues

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Bits:
        """Compute a tensor."""
        expr = self._values[name]
        kernels = numerics.kernels(wayback.residue_key(expr), numerics.Notes(), self._residues)
        bits = evaluate(expr, self._source.read, kernels)
        return bits if rows is None else bits[slice(*rows)]

    def extents(self, name: str) -> tuple[Extent, ...]:
        """Return nothing: no file holds the tensor."""
        return ()

    def close(self) -> None:
        """Do nothing: the source has an owner."""


def continued(kept: Manifest, planned: Plan, output: Output, *, copied: bool = True) -> Manifest | None:
    """Return a file's manifest for the same tensors in another container; None where others are written.

    ``copied``: they must be copies of the file's own tensors.
    """
    if {spec.name: spec for spec in kept.target.specs} != {spec.name: spec for spec in planned.specs}:
        return None
    outputs = planned.outputs().items()
    if copied and not all(isinstance(expr, Read) and expr.name == name for name, expr in outputs):
        return None
    return replace(kept, target=replace(kept.target, format=output.format, file=output.file, specs=planned.specs))


def record_of(kept: Manifest, planned: Plan, choice: Choice, config: Json | None) -> Manifest | None:
    """Return what travels with a restored file: its own manifest again, or its config where it lay beside a lone file.

    ``kept``: the manifest of the conversion that is undone. A file that says all by itself gets none.
    """
    if kept.earlier is not None:
        return continued(kept.earlier, planned, choice.output, copied=False)
    if choice.output.directory or config is None:
        return None
    target = replace(kept.source, format=choice.output.format, file=choice.output.file, specs=planned.specs)
    origin = replace(kept.target, format="", specs=(), metadata={}, config=None)
    return Manifest(
        kept.version, origin, replace(target, config=config), kept.options, Facts(), Facts(), kept.stated,
        planned.digest, model_config=kept.model_config,
    )  # fmt: skip
