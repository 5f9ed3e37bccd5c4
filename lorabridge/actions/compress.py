"""Decide, from the data, to which rank each module's factors can be compressed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from .. import lowrank, numerics
from ..axes import Expr, evaluate
from ..dialects import factors
from ..dialects.adapter import Content, Dialect
from ..errors import UsageError
from ..forward import Settings, forward
from ..tensors import Source

if TYPE_CHECKING:
    from ..tensors import Bits


def ranks(
    text: str, content: Content, origin: Dialect, goal: Dialect, settings: Settings, source: Source
) -> Mapping[str, int]:
    """Return target module path to rank for ``--compress``.

    ``text`` is a whole number (the rank itself) or a number below 1 (the relative Frobenius error of each module's
    delta that is allowed; the smallest rank within it is taken). Raises UsageError otherwise.
    """
    rank, tolerance = parse(text)
    made = forward(content, origin, goal, settings)
    chosen = {}
    for module in made.adapter.modules:
        ready = factors.single_pair(module, goal.name)
        term = ready.terms[0]
        if rank is not None:
            chosen[module.path] = min(rank, term.rank)
            continue
        a, b = (_values(expr, source) for expr in (term.a, term.b))
        chosen[module.path], _ = lowrank.rank_for(a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1), tolerance)
    return chosen


def parse(text: str) -> tuple[int | None, float]:
    """Read a rank or a tolerance."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if number >= 1 and number == int(number):
        return int(number), 0.0
    if 0 <= number < 1:
        return None, number
    raise UsageError(
        f"cannot read --compress {text!r}", hint="give a rank (8) or a relative error below 1 (1e-6; 0 keeps all)"
    )


def _values(expr: Expr, source: Source) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    def read(name: str) -> Bits:
        return source.read(name)

    bits = evaluate(expr, read, numerics.kernels("", numerics.Notes(), {}))
    return numerics.values(np.ascontiguousarray(bits), expr.dtype)
