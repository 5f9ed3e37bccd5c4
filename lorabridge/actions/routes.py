"""The way from one project's names to another's: a table that is named, told by a manifest, or found to fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..dialects.adapter import Adapter, Json
from ..errors import MappingError, UsageError
from ..families import tables
from ..manifest import Manifest
from .inspect import family_candidates
from .sides import Side
from .stated import Told


@dataclass(frozen=True, slots=True)
class Route:
    """The table that leads from one project's names to another's, with its sizes and layout; None keeps names."""

    family: str = "identity"
    table: tables.Table | None = None
    layout: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int] | None = None

    def carry(self, adapter: Adapter, names: str, to: str) -> Adapter:
        """Bring an adapter or a whole model from one project's names to another's (see ``dialects.naming``).

        MappingError where a name has none there.
        """
        if self.table is None or names == to:
            return adapter
        side = "hf" if to == "hf" else "ms"
        return tables.map_adapter(self.table, adapter, to=side, sizes=self.sizes, layout=self.layout)  # type: ignore[arg-type]


def named_route(told: Told, config: Json | None) -> Route:
    """Return the route through a table that is named, or none; ``config``: the model's config.json.

    Raises MappingError for an unknown family.
    """
    if told.family is None:
        return Route()
    table = tables.load_family(told.family, told.mappings)
    layout = tables.layout_from_config(table, config) if config else {}
    sizes = tables.sizes_from_config(table, config) if config else None
    return Route(told.family, table, {**layout, **told.layout}, sizes)


def route(first: Side, second: Side, others: Sequence[Side], kept: Manifest | None, told: Told) -> Route:
    """Choose the table between two files: as told, as the manifest of their conversion says, none where names agree,
    else the one that fits.

    Raises UsageError when several tables or none lead from the names of one file to those of the other.
    """
    everyone = (first, second, *others)
    if len({one.names for one in everyone}) == 1:
        return Route()
    layout = dict(told.layout)
    named, choices = (None, {}) if kept is None else kept.named
    if told.family in (None, named):
        layout = {**choices, **layout}  # choices that are told outrank those of the manifest
    config = next((one.given.model_config for one in everyone if one.given.model_config is not None), None)
    family = told.family or named
    if family is not None:
        return named_route(Told(family, layout, told.mappings), config)
    if first.names == second.names or _agree(first, second):
        return named_route(Told("identity", layout, told.mappings), config)
    return _fitting(first, second, layout, config, told.mappings)


def _agree(first: Side, second: Side) -> bool:
    """Say whether names correspond as they are; a whole model has the modules of an adapter and more."""
    mine, theirs = _names(first.adapter, second), _names(second.adapter, first)
    return mine == theirs or (first.is_adapter != second.is_adapter and mine <= theirs)


def _names(adapter: Adapter, other: Side) -> set[str]:
    """Return module paths, or the parameters' names where both checkpoints are whole models."""
    if adapter.modules:
        return {module.path for module in adapter.modules}
    return {extra.path if other.is_adapter else extra.name for extra in adapter.extras}


def _fitting(
    first: Side, second: Side, layout: Mapping[str, str], config: Json | None, mappings: Path | None
) -> Route:  # fmt: skip
    """Try the tables that know the first file's names; take the one that gives most of the second file's."""
    wanted = _names(second.adapter, first)
    reasons: list[str] = []
    undecided: list[str] = []
    scores: list[tuple[int, Route]] = []
    project = next((side.names for side in (first, second) if side.names not in ("hf", "ms")), "")
    for family in family_candidates(first.given, first.dialect, project=project, mappings=mappings):
        try:
            found = named_route(Told(family, layout, mappings), config)
            carried = found.carry(first.adapter, first.names, second.names)
        except (MappingError, UsageError) as error:
            reasons.append(f"{family}: {error.problem} ({error.hint})" if error.hint else f"{family}: {error.problem}")
            undecided += [family] if project and "--config" in error.hint else []
            continue
        if common := wanted & _names(carried, second):
            scores.append((len(common), found))
    best = [found for score, found in scores if score == max(score for score, _ in scores)]
    if len(best) == 1 and not undecided:
        return best[0]
    best = best if not undecided else [found for _, found in scores]
    if not best and wanted & _names(first.adapter, second):
        return named_route(Told("identity", layout, mappings), config)  # the comparison lists the names that differ
    here, there = first.role or first.path, second.role or second.path
    some = "several tables lead" if best or undecided else "no table leads"
    raise UsageError(
        f"{some} from {here}'s names to {there}'s",
        where=[*(found.family for found in best), *undecided]
        or reasons
        or [next(iter(sorted(_names(first.adapter, second))), "")],
        hint="choose one with --family NAME (with --config where it needs sizes), or --family identity to keep every "
        "name; `lorabridge tables list` shows them",
    )
