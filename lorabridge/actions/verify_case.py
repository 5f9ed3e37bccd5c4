"""Decide what two files are to each other, before anything is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UsageError
from ..manifest import Manifest
from .merge_record import recipe_of
from .routes import Route, route
from .sides import Side
from .verify_inputs import VerifyOptions
from .verify_record import Recorded, holds_adapters, recorded
from .verify_report import RELATIONS, Relation

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Case:
    """Two files and their relation.

    ``first`` and ``second`` are SRC and DST, or the other way round where DST is what SRC was converted from, and
    where SRC is the merged checkpoint: the second's names count. ``kept``: the manifest of the conversion from first
    to second. ``route``: from the first's names to the second's. ``record``: what was merged into the first to make the
    second, as the second's manifest says.
    """

    relation: Relation
    first: Side
    second: Side
    base: Side | None
    kept: Manifest | None
    route: Route
    warnings: tuple[str, ...]
    record: Recorded | None = None

    @property
    def weight(self) -> float:
        """What the adapter's deltas were multiplied by, as the merged file's manifest says; 1 where it says nothing."""
        known = recipe_of(self.second.kept, self.second.path) if self.relation == "merge" else None
        return known.weights[0] if known is not None and len(known.weights) == 1 else 1.0

    def compared(self) -> tuple[str, ...]:
        """Return sentences on what is held against what."""
        first, second = self.first, self.second
        lines = [f"{first.role} and {second.role} are {RELATIONS[self.relation]}"]
        if self.kept is not None:
            by = f"by lorabridge {self.kept.version}"
            lines[0] = (
                f"{second.role} says that it was converted from {self.kept.source.file} {by}; that is {first.role}"
            )
        if self.record is not None:
            lines[0] = (
                f"{second.role} says that it is {self.record.recipe.base} with {self.record.sentence()} merged into it"
            )
        if self.route.table is not None and not self.route.table.identity:
            lines.append(f"names of the two files meet in the table {self.route.family}")
        elif first.names != second.names and self.record is None:
            lines.append("modules are compared under equal names")
        if self.weight != 1:
            lines.append(f"the deltas count {self.weight:g} times, as {second.role}'s manifest says")
        if self.base is not None:
            lines.append(f"base weights: {self.base.given.path}")
        return tuple(lines)


def decide(source: Side, target: Side, base: Side | None, options: VerifyOptions) -> Case:
    """Say what the files are to each other; UsageError where a base is needed or nothing fits."""
    warnings = [f"{one.role}: {text}" for one in (source, target, base) if one for text in one.adapter.warnings]
    first, second, kept = source, target, None
    if _came_from(target, source):
        kept = target.kept
    elif _came_from(source, target):
        first, second, kept = target, source, source.kept
    else:
        warnings += [
            f"{one.role}'s manifest describes a conversion from {one.kept.source.file}, which is not {other.role}"
            for one, other in ((source, target), (target, source))
            if one.kept is not None
            and not one.kept.made
            and source.is_adapter == target.is_adapter
            and one.dialect != other.dialect
        ]
    relation: Relation = "conversion" if kept is not None else "adapters"
    if kept is None and not (source.is_adapter and target.is_adapter):
        relation = "merge" if source.is_adapter or target.is_adapter else "models"
    if relation == "models" and holds_adapters(source) != holds_adapters(target):
        first, second = (source, target) if holds_adapters(target) else (target, source)
        known = recorded(first, second)
        return Case("record", first, second, None, None, Route(), tuple(dict.fromkeys(warnings)), known)
    if relation == "merge":
        if base is None:
            raise UsageError(
                f"{source.role if source.is_adapter else target.role} is an adapter and the other file a whole model",
                where=[str(source.given.path), str(target.given.path)],
                hint="to check that the one was merged into the other, give the model without it: --base BASE",
            )
        if base.is_adapter:
            raise UsageError("--base is an adapter", where=str(base.given.path), hint="give the model without adapter")
        first, second = (source, target) if source.is_adapter else (target, source)
        first = first.part_of(base)
    others = [base] if base is not None else []
    chosen = route(_named_otherwise(first, second, base, relation), second, others, _naming(kept, second, first, base),
                   options.told)  # fmt: skip
    return Case(relation, first, second, base, kept, chosen, tuple(dict.fromkeys(warnings)))


def _naming(kept: Manifest | None, *sides: Side | None) -> Manifest | None:
    """Return the manifest that names a table: that of the conversion between the files, else that of one of them."""
    known = [kept, *(side.kept for side in sides if side is not None)]
    return next((one for one in known if one is not None and one.named[0] not in (None, "identity")), kept)


def _named_otherwise(first: Side, second: Side, base: Side | None, relation: Relation) -> Side:
    """Return the file whose names decide the table: of a merge, the base's, which are all of the model's."""
    if relation == "merge" and base is not None and base.names != second.names:
        return base
    return first


def _came_from(made: Side, origin: Side) -> bool:
    """Say whether a file's manifest describes a conversion of the other file."""
    if made.kept is None or made.kept.made:
        return False
    return {spec.name: spec for spec in made.kept.source.specs} == dict(origin.source.specs)
