"""Bring an adapter to the other spelling of its own side: there and back again through the table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..dialects.adapter import Adapter
from .mapping import map_adapter
from .rules import SideName, Table, other_side
from .variants import Evidence, Shape, evidence_of


def respell(
    table: Table,
    adapter: Adapter,
    *,
    side: SideName,
    like: Iterable[str] | Mapping[str, Shape],
    sizes: Mapping[str, int] | None = None,
    layout: Mapping[str, str] | None = None,
) -> Adapter:
    """Rename an adapter's modules as ``like`` spells them: names of a checkpoint on the same side.

    Transformers 5 holds experts in one tensor and saves them one by one; peft's adapters name what it holds. How the
    rows lie on the other side does not matter, so any layout of it will do; ``layout`` counts where names do not tell.
    Exact, as every conversion is. Raises as :func:`map_adapter` does.
    """
    paths = [module.path for module in adapter.modules] + [extra.name for extra in adapter.extras]
    shown = [_shown(evidence_of(table, names, side=side, layout={})) for names in (paths, like)]
    given = {key: choice for key, choice in (layout or {}).items() if not any(key in said for said in shown)}
    mine = evidence_of(table, paths, side=side, layout=given)
    theirs = evidence_of(table, like, side=side, layout=given)
    there = _chosen(table, given, mine)
    back = there | {key: choice for key, choice in _shown(theirs).items() if key not in given}
    if len(theirs.prefixes) == 1:
        back[f"{side}_prefix"] = next(iter(theirs.prefixes))
    turned = map_adapter(table, adapter, to=other_side(side), sizes=sizes, layout=there)
    return map_adapter(table, turned, to=side, sizes=sizes, layout=back)


def relaid(
    table: Table, adapter: Adapter, *, side: SideName, sizes: Mapping[str, int] | None, layout: Mapping[str, str]
) -> Adapter:
    """Spell an adapter as other choices of its own side's layouts have it, such as experts one by one or in one tensor.

    ``layout``: the choices of the result; what the adapter's names do not say of its own is the first possible one.
    Raises as :func:`map_adapter` does.
    """
    paths = [module.path for module in adapter.modules] + [extra.name for extra in adapter.extras]
    there = _chosen(table, {}, evidence_of(table, paths, side=side, layout={}))
    turned = map_adapter(table, adapter, to=other_side(side), sizes=sizes, layout=there)
    return map_adapter(table, turned, to=side, sizes=sizes, layout=there | dict(layout))


def _shown(evidence: Evidence) -> dict[str, str]:
    """Return the choices that names show: those that some name has alone, and the only ones that all can have."""
    alone = {key: choices - {""} for key, choices in evidence.open.items()}
    only = {key: next(iter(choices)) for key, choices in alone.items() if len(choices) == 1}
    return only | {key: next(iter(said)) for key, said in evidence.implied.items()}


def _chosen(table: Table, given: Mapping[str, str], evidence: Evidence) -> dict[str, str]:
    """Return a choice for every layout that names leave open, the first possible one in the table's order."""
    chosen = dict(given)
    for entry in table.layouts:
        if entry.name in evidence.implied:
            chosen.setdefault(entry.name, next(iter(evidence.implied[entry.name])))
        elif entry.name in evidence.open:
            possible = [choice for choice, _ in entry.choices if choice in evidence.open[entry.name]]
            chosen.setdefault(entry.name, possible[0] if possible else entry.choices[0][0])
    return chosen
