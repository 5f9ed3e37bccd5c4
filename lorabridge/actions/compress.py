"""Decide, from the data, to which rank each module's factors can be compressed, and measure what that costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..arithmetic import lowrank, numerics
from ..arithmetic.lowrank import Matrix
from ..axes import Expr, evaluate
from ..conversion.forward import Settings, forward
from ..dialects import factors
from ..dialects.adapter import Content, Dialect, Json, LoraModule
from ..dialects.peft_config import changes_base
from ..errors import MappingError, UsageError
from ..tensors import Source

if TYPE_CHECKING:
    from ..tensors import Bits


@dataclass(frozen=True, slots=True)
class CompressedRow:
    """What compression did to one module: its rank before and after, both of a pair's matrices.

    ``error``: Frobenius norm of the change of the delta relative to the delta's, the rounding to the factors' type
    included.
    """

    path: str
    before: int
    after: int
    error: float


def refuse_changed_base(config: Json, where: str) -> None:
    """Refuse factors that belong to a base which was changed along with them: another rank would change it anew."""
    init = changes_base(config)
    if init:
        raise MappingError(
            f"init_lora_weights={init!r} ties the factors to their rank: it changes the base weights as it loads",
            where=where,
            hint="convert it to plain LoRA in peft first (path_initial_model_for_weight_conversion)",
        )


def ranks(
    text: str, content: Content, origin: Dialect, goal: Dialect, settings: Settings, source: Source
) -> tuple[Mapping[str, int], Sequence[LoraModule]]:
    """Return target module path to rank for ``--compress``, and the modules as single pairs, not yet compressed.

    ``text`` is a whole number (the rank itself) or a number below 1 (the relative Frobenius error of each module's
    delta that is allowed; the smallest rank within it is taken). Raises UsageError otherwise.
    """
    rank, tolerance = parse(text)
    made = forward(content, origin, goal, settings)
    refuse_changed_base(made.adapter.config, content.path)
    pairs = [factors.single_pair(module, goal.name) for module in made.adapter.modules]
    factors.refuse_grouped(pairs)
    chosen = {}
    for module in pairs:
        if rank is not None:
            chosen[module.path] = min(rank, module.terms[0].rank)
        else:
            chosen[module.path], _ = lowrank.rank_for(*_matrices(module, source), tolerance)
    return chosen, pairs


def measured(before: Sequence[LoraModule], after: Sequence[LoraModule], source: Source) -> tuple[CompressedRow, ...]:
    """Compare the delta of every module whose rank fell with what it was; module by module, never forming a delta."""
    small = {module.path: module for module in after}
    rows = []
    for module in before:
        fell = module.scaling.rank, small[module.path].scaling.rank
        if fell[0] != fell[1]:
            (a, b), (c, d) = _matrices(module, source), _matrices(small[module.path], source)
            whole = _norm(lowrank.singular_values(a, b))
            change = _norm(lowrank.singular_values(np.vstack([a, c]), np.hstack([b, -d])))
            rows.append(CompressedRow(module.path, *fell, change / whole if whole else change))
    return tuple(rows)


def parse(text: str) -> tuple[int | None, float]:
    """Read a rank or a tolerance."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if 1 <= number < math.inf and number == int(number):
        return int(number), 0.0
    if 0 <= number < 1:
        return None, number
    raise UsageError(
        f"cannot read --compress {text!r}", hint="give a rank (8) or a relative error below 1 (1e-6; 0 keeps all)"
    )


def _matrices(module: LoraModule, source: Source) -> tuple[Matrix, Matrix]:
    """Return a pair's factors as matrices ``a[rank, in]`` and ``b[out, rank]`` in double precision."""
    (term,) = module.terms
    a, b = (_values(expr, source) for expr in (term.a, term.b))
    return a.reshape(term.rank, -1), b.reshape(-1, term.rank)


def _values(expr: Expr, source: Source) -> Matrix:
    def read(name: str) -> Bits:
        return source.read(name)

    bits = evaluate(expr, read, numerics.kernels("", numerics.Notes(), {}))
    return numerics.values(np.ascontiguousarray(bits), expr.dtype)


def _norm(singular: Matrix) -> float:
    return math.hypot(*singular.tolist())
