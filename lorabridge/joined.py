"""Several sources as one, so that one plan can read a base and adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from .axes import Expr, read, substitute
from .dialects.adapter import Adapter, LoraModule
from .tensors import Extent, Source, TensorSpec

if TYPE_CHECKING:
    from .tensors import Bits


class Joined:
    """Read from several sources; tensor ``name`` of the source under ``prefix`` is called ``prefix/name``.

    Path, format and metadata are those of the first source. Closing leaves the sources open: they have owners.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        first = next(iter(sources.values()))
        self.format = first.format
        self.path = first.path
        self.metadata: Mapping[str, str] = {}
        self.sources = tuple(sources.values())
        self._owner: dict[str, tuple[Source, str]] = {}
        specs: dict[str, TensorSpec] = {}
        for prefix, source in sources.items():
            for name, spec in source.specs.items():
                specs[f"{prefix}/{name}"] = replace(spec, name=f"{prefix}/{name}")
                self._owner[f"{prefix}/{name}"] = source, name
        self.specs: Mapping[str, TensorSpec] = specs

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Bits:
        """Return the bits of a tensor, or of some of its rows."""
        source, own = self._owner[name]
        return source.read(own, rows)

    def extents(self, name: str) -> tuple[Extent, ...]:
        """Return the byte ranges of a tensor."""
        source, own = self._owner[name]
        return source.extents(own)

    def close(self) -> None:
        """Do nothing."""


def prefixed(adapter: Adapter, prefix: str, specs: Mapping[str, TensorSpec]) -> Adapter:
    """Return an adapter that reads its tensors from a joined source, where they are called ``prefix/name``.

    ``specs``: of the adapter's own source. What the adapter leaves out is named in the same way.
    """
    names = {name: read(replace(spec, name=f"{prefix}/{name}")) for name, spec in specs.items()}
    return replace(
        adapter,
        modules=tuple(_module(module, names) for module in adapter.modules),
        extras=tuple(replace(extra, value=substitute(extra.value, names)) for extra in adapter.extras),
        left_out=tuple((f"{prefix}/{name}", why) for name, why in adapter.left_out),
    )


def _module(module: LoraModule, names: Mapping[str, Expr]) -> LoraModule:
    def moved(expr: Expr | None) -> Expr | None:
        return None if expr is None else substitute(expr, names)

    terms = tuple(replace(t, a=substitute(t.a, names), b=substitute(t.b, names)) for t in module.terms)
    return replace(module, terms=terms, magnitude=moved(module.magnitude), lora_bias=moved(module.lora_bias))
