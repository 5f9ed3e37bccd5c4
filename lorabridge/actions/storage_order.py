"""Say how square weights are stored, which shapes do not show: as the family's table says, or all tables that fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..dialects.adapter import Adapter, LoraModule
from ..errors import MappingError
from ..families import tables
from ..families.rules import SideName, Slot, Table
from ..families.variants import Index

HINT = "name the model's table with --family, or say how they are stored with --fan-in-fan-out"


@dataclass(frozen=True, slots=True)
class Named:
    """Whose names a model has: ``family`` and ``layout`` as told, and the ``model_type`` of its config."""

    side: SideName
    family: str | None = None
    layout: Mapping[str, str] = field(default_factory=dict)
    mappings: Path | None = None
    model_type: object = None


def oriented(adapter: Adapter, parameters: Iterable[str], named: Named) -> Adapter:
    """Set ``fan_in_fan_out`` of linear modules that have none, where tables say it and some weight is square.

    ``parameters``: names of the model that the adapter belongs to, in which the modules' paths are. What no table knows
    is left as it is. Raises MappingError where tables that fit store a square weight differently.
    """
    if not any(_silent(module) and _square(module) for module in adapter.modules):
        return adapter
    paths = [module.path for module in adapter.modules if _silent(module)]
    fitting = _fitting(paths, list(parameters), named)
    said = orders(fitting.values(), paths, named)
    torn = [m.path for m in adapter.modules if _silent(m) and _square(m) and len(said[m.path]) > 1]
    if torn:
        raise MappingError(
            f"the tables that fit ({', '.join(sorted(fitting))}) store square weights differently",
            where=torn,
            hint=HINT,
        )
    modules = tuple(
        replace(module, fan_in_fan_out=next(iter(said[module.path])))
        if _silent(module) and len(said[module.path]) == 1
        else module
        for module in adapter.modules
    )
    return replace(adapter, modules=modules)


def orders(known: Iterable[Table], paths: Iterable[str], named: Named) -> dict[str, set[bool]]:
    """Return, by path of a linear module, whether its weight is stored ``[in, out]``: every answer that tables give."""
    found: dict[str, set[bool]] = {path: set() for path in paths}
    for table in known:
        index = Index(table, named.side, table.prefix(named.side).answers)
        for path, answers in found.items():
            for hit in index.find(path):
                slot = hit.what
                if isinstance(slot, Slot) and slot.rule.kind == "linear" and slot.rule.holds(named.layout):
                    answers.add(slot.rule.side(named.side).order == "in out")
    return found


def _fitting(paths: list[str], parameters: list[str], named: Named) -> dict[str, Table]:
    if named.family is not None:
        table = tables.load_family(named.family, named.mappings)
        return {} if table.identity else {named.family: table}
    known = tables.load_tables(named.mappings)
    names = tables.detect_family(known, parameters, named.side) or tables.detect_family(known, paths, named.side)
    typed = [name for name in names if named.model_type in known[name].model_types]
    return {name: known[name] for name in typed or names}


def _silent(module: LoraModule) -> bool:
    return module.kind == "linear" and module.stack is None and module.fan_in_fan_out is None


def _square(module: LoraModule) -> bool:
    return module.out == module.terms[0].a.shape[-1]
