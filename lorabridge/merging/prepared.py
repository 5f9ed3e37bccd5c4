"""What adapters add to a weight, made ready once for all of its blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import TypeVar

import numpy as np

from ..arithmetic.deltas import Delta, Factors, Matrix, Part, Rest, prepare
from ..arithmetic.recipe import Recipe, Update

_T = TypeVar("_T", Part, Rest)

READY = 4
"""How many weights' deltas stay ready; blocks of one weight follow each other."""


@dataclass
class _Entry:
    making: Lock = field(default_factory=Lock)
    deltas: tuple[Delta, ...] | None = None


class Prepared:
    """Deltas made ready, the last few of them; any thread may ask, and waits for none but those that it asks for."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._ready: OrderedDict[Hashable, _Entry] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], tuple[Delta, ...]]) -> tuple[Delta, ...]:
        """Return what was made for a key, or make it."""
        with self._lock:
            entry = self._ready.setdefault(key, _Entry())
            self._ready.move_to_end(key)
            while len(self._ready) > READY:
                self._ready.popitem(last=False)
        with entry.making:
            if entry.deltas is None:
                entry.deltas = make()
            return entry.deltas


def deltas_of(recipe: Recipe, columns: int, operands: Sequence[Matrix]) -> tuple[Delta, ...]:
    """Return the deltas to add, in this order; ``columns``: of the matrix, ``operands``: the updates' numbers.

    Updates of different items of a stack do not meet; those of one scaling are one delta.
    """
    exact = recipe.exact or any(update.magnitude for update in recipe.updates)  # residues cannot be added afterwards
    found: list[Delta] = []
    stacked: list[_Stacked] = []
    last: dict[int, int] = {}
    at = 0
    for update in recipe.updates:
        mine = operands[at : at + update.operands]
        at += update.operands
        first, rows = update.item or (0, recipe.rows)
        height = columns if recipe.transposed else rows
        delta = prepare(list(_terms(update, mine)), height, update.scaling, exact=exact, transposed=recipe.transposed)
        if update.item is None:
            found.append(delta)
            continue
        after = last.get(first, -1)
        place = next((k for k, s in enumerate(stacked) if k > after and s.scaling == delta.scaling), len(stacked))
        if place == len(stacked):
            stacked.append(_Stacked(delta.scaling))
        stacked[place].items.append((first, delta))
        last[first] = place
    return (*found, *(stack.whole((recipe.rows, columns)) for stack in stacked))


@dataclass
class _Stacked:
    """Deltas on different rows, with one scaling."""

    scaling: float
    items: list[tuple[int, Delta]] = field(default_factory=list)

    def whole(self, shape: tuple[int, int]) -> Delta:
        """Return them as one delta of the whole matrix."""
        parts = [_moved(part, first) for first, delta in self.items for part in delta.parts]
        rest = [_moved(part, first) for first, delta in self.items for part in delta.rest]
        bound, doubt = (float(np.max([getattr(delta, name) for _, delta in self.items])) for name in ("bound", "doubt"))
        return Delta(shape, tuple(parts), self.scaling, False, tuple(rest), bound, doubt)


def _moved(part: _T, first: int) -> _T:
    """Return a product on rows that lie ``first`` further down."""
    return replace(part, rows=(part.rows[0] + first, part.rows[1] + first))


def _terms(update: Update, operands: Sequence[Matrix]) -> Iterator[Factors]:
    if update.vector:
        one = np.ones((1, 1))
        yield from (Factors(b.reshape(-1, 1), one, start) for b, start in zip(operands, update.starts, strict=False))
    else:
        pairs = zip(operands[0::2], operands[1::2], update.starts, strict=False)
        yield from (Factors(b, a, start) for a, b, start in pairs)
