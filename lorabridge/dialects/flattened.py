"""Flattened module names: ``lora_unet_down_blocks_0_attentions_0_proj_in`` and the module that it stands for.

sd-scripts and LyCORIS write a module's path with ``_`` in the place of every dot, behind a prefix that names the part
of the pipeline. Dots cannot be told from underscores again, so a name is looked up, never taken apart: in the names of
the base model's own files, or in the family tables of known pipelines. There a name is read in either naming,
diffusers' or the original code's, and means diffusers' module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from ..errors import SHOWN, MappingError, counted
from .flattened_tables import (
    COMPONENTS,
    DOTTED,
    PIPELINES,
    Axes,
    Pipeline,
    counterpart,
    entries,
    flatten,
    meant,
    pipeline_named,
)


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


def _places(pipeline: Pipeline, name: str, axes: Axes) -> Iterator[Place]:
    for part in pipeline.parts:
        dotted = name.startswith(DOTTED[part.prefix])
        if not dotted and not name.startswith(part.prefix):
            continue
        rest = name.removeprefix(DOTTED[part.prefix] if dotted else part.prefix)
        for entry in entries(part.table):
            bindings = (entry.slot.template if dotted else entry.flat).match(rest)
            if bindings is None or not entry.fits(axes):
                continue
            fused = entry.shared and entry.side == "ms"
            plain = entry if fused else counterpart(part.table, entry, "hf")
            path = (entry if entry.side == "hf" else plain).slot.template.fill(bindings)
            means = tuple(f"{part.component}.{other.fill(bindings)}" for other in meant(part.table, entry))
            yield Place(f"{part.component}.{path}", entry.kernel, part.table if fused else "", means)


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
