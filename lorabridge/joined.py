"""Several sources as one: the tensors of each under a key, so that one plan can read a base and its adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .axes import Compute, Expr, Join, Read, Zeros
from .tensors import Extent, Source, TensorSpec

if TYPE_CHECKING:
    from .tensors import Bits


class Joined:
    """Read from several sources: ``key/name`` is the tensor ``name`` of the source under ``key``.

    Sources may grow after they were joined. Keys hold no slash. Closing closes every source.
    """

    format = "joined"

    def __init__(self, parts: Mapping[str, Source]) -> None:
        if any("/" in key for key in parts):
            raise ValueError("a key holds a slash")
        self._parts = dict(parts)
        self.path = Path(".")
        self.metadata: Mapping[str, str] = {}

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor, under its joined name."""
        return {
            f"{key}/{name}": replace(spec, name=f"{key}/{name}")
            for key, source in self._parts.items()
            for name, spec in source.specs.items()
        }

    def _find(self, name: str) -> tuple[Source, str]:
        key, _, inner = name.partition("/")
        return self._parts[key], inner

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Bits:
        """Return the bits of a tensor, or of rows of its first axis."""
        source, inner = self._find(name)
        return source.read(inner, rows)

    def extents(self, name: str) -> tuple[Extent, ...]:
        """Return where the tensor's bytes lie."""
        source, inner = self._find(name)
        return source.extents(inner)

    def close(self) -> None:
        """Close every source."""
        for source in self._parts.values():
            source.close()


def under(key: str, expr: Expr) -> Expr:
    """Return an expression over one source as the same expression over the joined ones."""
    if isinstance(expr, Read):
        return replace(expr, name=f"{key}/{expr.name}")
    if isinstance(expr, Zeros):
        return expr
    if isinstance(expr, Join):
        return replace(expr, parts=tuple(under(key, part) for part in expr.parts))
    if isinstance(expr, Compute):
        return replace(expr, args=tuple(under(key, arg) for arg in expr.args))
    return replace(expr, x=under(key, expr.x))
