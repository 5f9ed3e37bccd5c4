"""How the modules of an adapter are called where a file flattens their names, as sd-scripts and ComfyUI do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import MappingError, counted
from .flattened_tables import (
    COMPONENTS,
    DOTTED,
    PIPELINES,
    Axes,
    Pipeline,
    counterpart,
    entries,
    flatten,
    pipeline_named,
)


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


def _spelled(pipeline: Pipeline, path: str, axes: Axes, dotted: bool) -> tuple[str, str] | None:
    """Return (name, "") or, where the original code holds several modules in one, (that one's name, the table)."""
    component, _, rest = path.partition(".")
    for number, part in enumerate(pipeline.parts):
        if part.component != component:
            continue
        for entry in entries(part.table):
            bindings = entry.slot.template.match(rest) if entry.side == "hf" else None
            if bindings is not None and entry.fits(axes):
                side = "hf" if number else "ms" if dotted else pipeline.written
                written = entry if side == "hf" else counterpart(part.table, entry, side)
                prefix, template = (
                    (DOTTED[part.prefix], written.slot.template) if dotted else (part.prefix, written.flat)
                )
                return prefix + template.fill(bindings), part.table if side == "ms" and entry.shared else ""
    return None
