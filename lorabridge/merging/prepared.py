"""What adapters add to a weight, made ready once for all of its blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock

import numpy as np

from ..arithmetic.deltas import Delta, Factors, Matrix, prepare
from ..arithmetic.recipe import Recipe, Update

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
    """Return the delta of each update; ``columns``: of the matrix, ``operands``: their numbers."""
    height = columns if recipe.transposed else recipe.rows
    found, at = [], 0
    for update in recipe.updates:
        mine = operands[at : at + update.operands]
        at += update.operands
        terms = list(_terms(update, mine))
        found.append(prepare(terms, height, update.scaling, exact=recipe.exact, transposed=recipe.transposed))
    return tuple(found)


def _terms(update: Update, operands: Sequence[Matrix]) -> Iterator[Factors]:
    if update.vector:
        one = np.ones((1, 1))
        yield from (Factors(b.reshape(-1, 1), one, start) for b, start in zip(operands, update.starts, strict=False))
    else:
        pairs = zip(operands[0::2], operands[1::2], update.starts, strict=False)
        yield from (Factors(b, a, start) for a, b, start in pairs)
