"""Flattened module names: ``lora_unet_down_blocks_0_attentions_0_proj_in`` and the module that it stands for.

sd-scripts and LyCORIS write a module's path with ``_`` in the place of every dot, behind a prefix that names the part
of the pipeline. Dots cannot be told from underscores again, so a name is looked up, never taken apart: in the names of
the base model's own files, or in the family tables of the pipelines below. There a name is read in either naming,
diffusers' or the original code's, and means diffusers' module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from ..errors import SHOWN, MappingError, UsageError, counted
from ..names import Template
from ..sizes import ANY, SizeError

if TYPE_CHECKING:
    from ..families.rules import Slot

SideName = Literal["hf", "ms"]
Axes = tuple[int | None, ...] | None
"""(output, input, *kernel) of a module's weight as far as its factors show them; None where they do not."""


@dataclass(frozen=True, slots=True)
class Part:
    """One network of a pipeline: the prefix of its flattened names, its name in diffusers, its family table."""

    prefix: str
    component: str
    table: str


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline whose tables ship. ``written``: the side of the first part's table whose names sd-scripts flattens.

    ``version``: what sd-scripts writes as ``ss_base_model_version``, "" where that is not known.
    """

    name: str
    parts: tuple[Part, ...]
    written: SideName
    version: str


def _sd3(table: str) -> tuple[Part, ...]:
    return (
        Part("lora_unet_", "transformer", table),
        Part("lora_te1_", "text_encoder", "clip_text"),
        Part("lora_te2_", "text_encoder_2", "clip_text"),
        Part("lora_te3_", "text_encoder_3", "t5_encoder"),
    )


_SDXL = (
    Part("lora_unet_", "unet", "sdxl"),
    Part("lora_te1_", "text_encoder", "clip_text"),
    Part("lora_te2_", "text_encoder_2", "clip_text"),
)
_FLUX = (
    Part("lora_unet_", "transformer", "flux"),
    Part("lora_te1_", "text_encoder", "clip_text"),
    Part("lora_te3_", "text_encoder_2", "t5_encoder"),
)
_SD15, _SD21 = (
    (Part("lora_unet_", "unet", table), Part("lora_te_", "text_encoder", "clip_text")) for table in ("sd15", "sd21")
)
PIPELINES = (
    Pipeline("sd15", _SD15, "hf", "sd_v1"),
    Pipeline("sd21", _SD21, "hf", "sd_v2"),
    Pipeline("sdxl", _SDXL, "ms", "sdxl_base_v1-0"),
    Pipeline("sd3", _sd3("sd3"), "ms", ""),
    Pipeline("sd35_medium", _sd3("sd35_medium"), "ms", ""),
    Pipeline("sd35_large", _sd3("sd35_large"), "ms", ""),
    Pipeline("flux", _FLUX, "ms", "flux1"),
    Pipeline("hunyuan_video", (Part("lora_unet_", "transformer", "hunyuan_video"),), "ms", ""),
    Pipeline("wan", (Part("lora_unet_", "transformer", "wan"),), "ms", ""),
)
DOTTED = {
    "lora_unet_": "diffusion_model.",
    "lora_te_": "text_encoders.clip_l.transformer.",
    "lora_te1_": "text_encoders.clip_l.transformer.",
    "lora_te2_": "text_encoders.clip_g.transformer.",
    "lora_te3_": "text_encoders.t5xxl.transformer.",
}
"""What ComfyUI puts before a part's own names, which keep their dots, instead of each prefix."""
PREFIXES = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lycoris_")
"""How flattened names begin: sd-scripts of 2026-02, and LyCORIS 4.1.3 for networks of any kind."""


@dataclass(frozen=True, slots=True)
class Place:
    """The module that a flattened name stands for.

    ``path``: in diffusers' naming, the component before it; where one module of the original code is several of
    diffusers', the original path, and ``fused`` names the table that splits it. ``kernel``: of its weight, () for a
    linear layer; None where nobody says. ``means``: the modules of diffusers that it is, all of them.
    """

    path: str
    kernel: tuple[int, ...] | None = None
    fused: str = ""
    means: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Entry:
    """One module template of one side of a table, flattened and as it is."""

    flat: Template
    slot: Slot
    side: SideName

    @property
    def kernel(self) -> tuple[int, ...]:
        """The weight's kernel, () for a linear layer."""
        return tuple(axis.value({}) for axis in self.slot.rule.axes)

    @property
    def shared(self) -> bool:
        """The rule has several parts: one naming holds in one module, or in another order, what the other has."""
        return len(self.slot.rule.parts) > 1

    def fits(self, axes: Axes) -> bool:
        """Compare the axes of factors with those that the table knows without a config.

        A kernel of ones may be missing on either side; a flattened input (None) may hide any.
        """
        if axes is None:
            return True
        known, given = self.axes(), tuple(axes)
        kernels = self.kernel, tuple(n for n in given[2:] if n is not None)
        if given[1] is not None and kernels[0] != kernels[1] and {*kernels[0], *kernels[1]} != {1}:
            return False
        return known is None or all(k in (ANY, a) or a is None for k, a in zip(known, given[:2], strict=True))

    def axes(self) -> tuple[int, int] | None:
        """Return the weight's output and input lengths; None where they depend on a config."""
        from ..families.models import slot_shape

        try:
            out, inner, *_ = slot_shape(replace(self.slot, field="weight"), self.side, {})
        except SizeError:
            return None
        return out, inner


def pipeline_named(name: str) -> Pipeline:
    """Return a pipeline; UsageError for a name that is none and no path of files."""
    for pipeline in PIPELINES:
        if pipeline.name == name:
            return pipeline
    known = ", ".join(pipeline.name for pipeline in PIPELINES)
    raise UsageError(
        f"{name!r} is no model whose names are known", hint=f"give --names-of one of {known}, or the path of a model"
    )


def flatten(path: str) -> str:
    """Return a module's path with underscores for dots."""
    return path.replace(".", "_")


def prefix_of(name: str) -> str:
    """Return how a flattened name begins; "" where it is none."""
    return next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")


def resolve(names: Mapping[str, Axes], only: str | None, where: str) -> tuple[dict[str, Place], tuple[str, ...]]:
    """Find the module of every flattened name: (name to place, the pipelines that it holds for).

    ``names``: name to the axes that its factors show. ``only``: one pipeline's name. Raises MappingError for names
    that no pipeline has, and for names that two pipelines, or two modules of one, can mean.
    """
    pipelines = (pipeline_named(only),) if only else PIPELINES
    found = {p.name: {name: set(_places(p, name, axes)) for name, axes in names.items()} for p in pipelines}
    whole = {pipeline: places for pipeline, places in found.items() if all(places.values())}
    if not whole:
        raise _unknown(found, names, where)
    readings = {
        pipeline: {n: sorted(" and ".join(p.means) for p in places[n]) for n in names}
        for pipeline, places in whole.items()
    }
    first, *others = readings
    if any(readings[other] != readings[first] for other in others) or any(len(r) > 1 for r in readings[first].values()):
        raise _ambiguous(readings, where)
    return {name: next(iter(places)) for name, places in whole[first].items()}, tuple(whole)


def known(names: Iterable[str]) -> bool:
    """Say whether a pipeline of those that are known has modules of all these names, whatever their shapes."""
    names = list(names)
    return any(all(any(True for _ in _places(p, name, None)) for name in names) for p in PIPELINES)


def resolve_in(
    names: Iterable[str], modules: Mapping[str, Mapping[str, tuple[int, ...]]], where: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Find the module of every flattened name among a base model's own: name to (path, the weight's shape).

    ``modules``: component ("unet", "text_encoder" ..., "" for a network by itself) to module paths and shapes; the
    component stands before the path. Raises MappingError listing the names that no module has or several have.
    """
    known: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for component, shapes in modules.items():
        for path, shape in shapes.items():
            for prefix in COMPONENTS.get(component, ("lycoris_", "lora_unet_")):
                whole = f"{component}.{path}" if component else path
                known.setdefault(prefix + flatten(path), []).append((whole, shape))
                if prefix in DOTTED:
                    known.setdefault(DOTTED[prefix] + path, []).append((whole, shape))
    names = list(names)
    lost, twice = [name for name in names if name not in known], [n for n in names if len(known.get(n, ())) > 1]
    if lost:
        rows = []
        for number, name in enumerate(lost):
            near = get_close_matches(name, known, 1, 0.6) if number < SHOWN else []
            rows.append(f"{name} (nearest: {near[0]})" if near else name)
        raise MappingError(
            f"{len(lost)} of {counted(len(names), 'name')} not found among the modules of the base model",
            where=[*rows, f"in {where}"],
            hint="give the base that the adapter was trained on with --names-of",
        )
    if twice:
        raise MappingError(
            f"{counted(len(twice), 'name')} can stand for several modules of the base model",
            where=[f"{name}: {' or '.join(path for path, _ in known[name])}" for name in twice],
            hint="rename the modules of the adapter to one of them",
        )
    return {name: known[name][0] for name in names}


COMPONENTS = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_", "lora_te3_"),
    "text_encoder_3": ("lora_te3_",),
}
"""The prefixes under which a component's modules can stand; Flux' second text encoder is sd-scripts' third."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """How the modules of an adapter are called in a file.

    ``names``: path to flattened name. ``fused``: path to the table through which it has to go first, because the
    original code holds it in one module with others. ``pipeline``: which one the modules belong to. ``dotted``: names
    keep their dots, as ComfyUI has them.
    """

    names: Mapping[str, str]
    fused: Mapping[str, str]
    pipeline: Pipeline | None
    dotted: bool = False

    def named(self, table: str, path: str) -> str:
        """Return the name of a module of a table's original side."""
        assert self.pipeline is not None
        prefix = next(part.prefix for part in self.pipeline.parts if part.table == table)
        return DOTTED[prefix] + path if self.dotted else prefix + flatten(path)


def spell(paths: Mapping[str, Axes], only: str | None, *, dotted: bool = False) -> Spelling:
    """Return sd-scripts' names for modules in diffusers' naming; exactly those it gives the pipeline's modules.

    ``paths``: path, the component before it, to the axes of its weight. ``dotted``: the original code's names with
    their dots. Modules of no known pipeline keep their own path, flattened. Raises MappingError where two pipelines
    spell the modules differently, or names coincide.
    """
    pipelines = (pipeline_named(only),) if only else PIPELINES
    spelled = {p.name: {path: _spelled(p, path, axes, dotted) for path, axes in paths.items()} for p in pipelines}
    whole = {
        name: {path: said for path, said in found.items() if said is not None}
        for name, found in spelled.items()
        if None not in found.values()
    }
    if not whole and only:
        lost = [path for path, said in spelled[only].items() if said is None]
        raise MappingError(
            f"{len(lost)} of {counted(len(paths), 'module')} not found in {only}",
            where=lost,
            hint="correct --names-of, or leave it out",
        )
    if len({tuple(name for name, _ in found.values()) for found in whole.values()}) > 1:
        raise MappingError(
            f"the modules can belong to {' or '.join(whole)}, which sd-scripts spells differently",
            where=[
                f"{path}: {' or '.join(dict.fromkeys(found[path][0] for found in whole.values()))}" for path in paths
            ],
            hint="say which with --names-of",
        )
    found = next(iter(whole.values()), None) or {path: (_plain(path), "") for path in paths}
    names = {path: name for path, (name, table) in found.items() if not table}
    _refuse_twins(names)
    owner = pipeline_named(next(iter(whole))) if whole else None
    return Spelling(names, {path: table for path, (_, table) in found.items() if table}, owner, dotted)


def _plain(path: str) -> str:
    component, _, rest = path.partition(".")
    prefixes = COMPONENTS.get(component)
    if prefixes is None:
        return "lycoris_" + flatten(path)
    return prefixes[0] + flatten(rest)


def _refuse_twins(names: Mapping[str, str]) -> None:
    owners: dict[str, list[str]] = {}
    for path, name in names.items():
        owners.setdefault(name, []).append(path)
    twins = [f"{' and '.join(paths)}: {name}" for name, paths in owners.items() if len(paths) > 1]
    if twins:
        raise MappingError(
            "different modules have one flattened name", where=twins, hint="leave one of them out with --exclude"
        )


@lru_cache(maxsize=16)
def _entries(table: str) -> tuple[_Entry, ...]:
    """Return the modules with weights that LoRA adapts, of both sides of a shipped table."""
    from ..families.rules import slots
    from ..families.tables import load_family

    loaded = load_family(table)
    sides: tuple[SideName, SideName] = ("hf", "ms")
    return tuple(
        _Entry(Template.parse(flatten(slot.template.text)), slot, side)
        for side in sides
        for slot in slots(loaded, side)
        if slot.field == "module" and slot.rule.kind in ("linear", "conv")
    )


def _other(table: str, entry: _Entry, side: SideName) -> _Entry:
    """Return the same module on another side, for a rule that has one on each."""
    return next(e for e in _entries(table) if e.side == side and e.slot.rule is entry.slot.rule)


def _places(pipeline: Pipeline, name: str, axes: Axes) -> Iterator[Place]:
    for part in pipeline.parts:
        dotted = name.startswith(DOTTED[part.prefix])
        if not dotted and not name.startswith(part.prefix):
            continue
        rest = name.removeprefix(DOTTED[part.prefix] if dotted else part.prefix)
        for entry in _entries(part.table):
            bindings = (entry.slot.template if dotted else entry.flat).match(rest)
            if bindings is None or not entry.fits(axes):
                continue
            fused = entry.shared and entry.side == "ms"
            plain = entry if fused else _other(part.table, entry, "hf")
            path = (entry if entry.side == "hf" else plain).slot.template.fill(bindings)
            means = tuple(f"{part.component}.{other.fill(bindings)}" for other in _meant(part.table, entry))
            yield Place(f"{part.component}.{path}", entry.kernel, part.table if fused else "", means)


def _meant(table: str, entry: _Entry) -> tuple[Template, ...]:
    """Return diffusers' modules that one module of the original code is, or the module itself."""
    if entry.side == "hf":
        return (entry.slot.template,)
    return tuple(e.slot.template for e in _entries(table) if e.side == "hf" and e.slot.rule is entry.slot.rule)


def _spelled(pipeline: Pipeline, path: str, axes: Axes, dotted: bool) -> tuple[str, str] | None:
    """Return (name, "") or, where the original code holds several modules in one, (that one's name, the table)."""
    component, _, rest = path.partition(".")
    for number, part in enumerate(pipeline.parts):
        if part.component != component:
            continue
        for entry in _entries(part.table):
            bindings = entry.slot.template.match(rest) if entry.side == "hf" else None
            if bindings is not None and entry.fits(axes):
                side = "hf" if number else "ms" if dotted else pipeline.written
                written = entry if side == "hf" else _other(part.table, entry, side)
                prefix, template = (
                    (DOTTED[part.prefix], written.slot.template) if dotted else (part.prefix, written.flat)
                )
                return prefix + template.fill(bindings), part.table if side == "ms" and entry.shared else ""
    return None


def _unknown(found: Mapping[str, Mapping[str, set[Place]]], names: Mapping[str, Axes], where: str) -> MappingError:
    """Say which names the best fitting pipeline has no module for."""
    best = max(found, key=lambda pipeline: sum(map(bool, found[pipeline].values())))
    lost = [name for name, places in found[best].items() if not places]
    rows = []
    for name in lost:
        others = list(_places(pipeline_named(best), name, None))
        shape = names[name]
        misfit = f": {others[0].path} has another shape than {_shown(shape)}" if others and shape else ""
        rows.append(f"{name}{misfit}")
    known = ", ".join(found)
    return MappingError(
        f"{len(lost)} of {counted(len(names), 'name')} not found among the modules of {best}"
        + (f" (known pipelines: {known})" if len(found) > 1 else ""),
        where=[*rows, *([f"in {where}"] if where else [])],
        hint="give the base model's files with --names-of PATH, whose names decide",
    )


def _shown(axes: tuple[int | None, ...]) -> str:
    return " x ".join("?" if axis is None else str(axis) for axis in axes)


def _ambiguous(readings: Mapping[str, Mapping[str, list[str]]], where: str) -> MappingError:
    rows = []
    for name in next(iter(readings.values())):
        said = {pipeline: " or ".join(paths[name]) for pipeline, paths in readings.items()}
        if len(set(said.values())) > 1 or any(len(paths[name]) > 1 for paths in readings.values()):
            rows.append(f"{name}: " + ", ".join(f"{path} ({pipeline})" for pipeline, path in said.items()))
    return MappingError(
        f"{counted(len(rows), 'name')} can stand for different modules",
        where=[*rows, *([f"in {where}"] if where else [])],
        hint=f"say whose they are with --names-of: {', '.join(readings)}, or the path of the base model",
    )
