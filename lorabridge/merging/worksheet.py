"""A merge in the making: the model's parameters as they stand, and what is said about them so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..axes import Expr
from ..dialects.adapter import Adapter, Value
from .landing import Landing, Place


@dataclass(frozen=True, slots=True)
class Addition:
    """One adapter in the base's names: ``weight`` multiplies its deltas, ``label`` names it in messages."""

    adapter: Adapter
    weight: float = 1.0
    label: str = "the adapter"


@dataclass
class Worksheet:
    """What merging works on.

    ``values``: parameters in file order. ``config``: a copy of the model's, to be changed. ``places``: what is added to
    which parameter. ``tokens``: rows that replace others: (parameter, indices, rows). ``shared``: parameters that are
    to equal another one. ``homes``: where a base parameter is found whose layer was repeated.
    """

    values: dict[str, Expr]
    config: dict[str, Value] | None
    places: dict[str, list[Place]] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    tokens: list[tuple[str, list[int], Expr]] = field(default_factory=list)
    shared: dict[str, str] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    homes: dict[str, str] = field(default_factory=dict)
    landing: Landing = field(default_factory=Landing)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter."""
        return {name: value.shape for name, value in self.values.items()}
