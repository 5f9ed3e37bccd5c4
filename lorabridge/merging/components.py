"""A pipeline's adapter on one of its networks: the component's name stands before the adapter's paths only."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ..dialects.adapter import Adapter
from ..dialects.diffusers_names import COMPONENTS
from ..errors import MappingError, counted


def of_component(adapter: Adapter, known: Collection[str], where: str) -> Adapter:
    """Take a component off every path where the base is that network by itself, as its own folder holds it.

    ``known``: the base's parameter names. The adapter stays as it is where the base's names have components too, or
    where none of its parts is the base. Raises MappingError where it adapts other networks beside: their factors have
    no place in this base.
    """
    parts = {module.path.partition(".")[0] for module in adapter.modules}
    parts |= {extra.path.partition(".")[0] for extra in adapter.extras}
    if not parts or not parts <= set(COMPONENTS) or any(name.partition(".")[0] in parts for name in known):
        return adapter
    inside = {part: [m for m in adapter.modules if m.path.startswith(f"{part}.")] for part in sorted(parts)}
    fitting = [
        part
        for part, modules in inside.items()
        if modules and all(f"{m.path.removeprefix(f'{part}.')}.{m.weight}" in known for m in modules)
    ]
    if len(fitting) != 1:
        return adapter
    (part,) = fitting
    if len(parts) > 1:
        others = [f"{other}: {counted(len(modules), 'module')}" for other, modules in inside.items() if other != part]
        raise MappingError(
            f"the base is the {part} alone, and the adapter adapts other networks of the pipeline, too",
            where=[*others, where],
            hint=f"take the part that belongs here first: lorabridge convert --include '{part}.*'",
        )
    return replace(
        adapter,
        modules=tuple(replace(m, path=m.path.removeprefix(f"{part}.")) for m in adapter.modules),
        extras=tuple(replace(e, path=e.path.removeprefix(part).removeprefix(".")) for e in adapter.extras),
    )
