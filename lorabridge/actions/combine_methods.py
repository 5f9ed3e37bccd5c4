"""The methods of combining, module by module: factors stacked, blended as peft does, or decomposed anew."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..arithmetic import lowrank, svd
from ..arithmetic.blend import Election, Recipe, blend
from ..arithmetic.floats import Numbers
from ..axes import Expr, cast, cut, join, scale
from ..dialects import factors
from ..dialects.adapter import LoraModule, Scaling, Term
from ..dtypes import BY_NAME, DType, lossless
from ..errors import MappingError
from ..spool import Spool
from ..tensors import Source
from .combine_report import CombinedRow
from .sides import numbers_of


@dataclass(frozen=True, slots=True)
class Method:
    """One method: what it does to which tensors; ``says``: the note that goes with every result."""

    pruning: str = "none"
    elects: bool = False
    on: str = "factors"
    says: str = ""

    @property
    def prunes(self) -> bool:
        """The method needs a density."""
        return self.pruning != "none"

    @property
    def decomposes(self) -> bool:
        """The method ends in an SVD."""
        return self.on == "deltas"

    @property
    def blends(self) -> bool:
        """The method works on the factors element by element, so their ranks must agree."""
        return self.on == "factors"


NOT_THE_SUM = (
    "this method adds the factors, not their products, so the result is not the sum of the deltas; "
    "--method cat or svd is"
)
PRUNED = "pruning and sign election change the deltas; what is lost shows under `off the sum`"
METHODS = {
    "cat": Method(on="stack"),
    "linear": Method(says=NOT_THE_SUM),
    "svd": Method(on="deltas"),
    "ties": Method("magnitude", True, says=NOT_THE_SUM),
    "dare": Method("random", says=NOT_THE_SUM),
    "dare_linear": Method("random", says=NOT_THE_SUM),
    "dare_ties": Method("random", True, says=NOT_THE_SUM),
    "magnitude_prune": Method("magnitude", says=NOT_THE_SUM),
    "ties_svd": Method("magnitude", True, "deltas", PRUNED),
    "dare_svd": Method("random", False, "deltas", PRUNED),
    "dare_linear_svd": Method("random", False, "deltas", PRUNED),
    "dare_ties_svd": Method("random", True, "deltas", PRUNED),
    "magnitude_prune_svd": Method("magnitude", False, "deltas", PRUNED),
}
"""By peft's names (``combination_type`` of add_weighted_adapter); dare is short for dare_linear."""


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter's share of a module."""

    source: int
    module: LoraModule
    weight: float

    @property
    def factor(self) -> float:
        """What stands before ``B @ A``."""
        return self.weight * self.module.scaling.value


class Maker:
    """Make the modules of a combination; computed factors go to the spool."""

    def __init__(
        self, method: Method, source: Source, spool: Spool, *, rank: int | None, energy: float | None,
        density: float | None, election: str, seed: int, dtype: DType | None,
    ) -> None:  # fmt: skip
        self._method = method
        self._source = source
        self._spool = spool
        self._rank = rank
        self._energy = energy
        pruning = method.pruning
        vote: Election = "frequency" if election == "frequency" else "total"
        assert pruning in ("none", "magnitude", "random")
        self._recipe = Recipe(pruning, method.elects, 1.0 if density is None else density, vote, seed)  # type: ignore[arg-type]
        self._dtype = dtype

    def make(self, parts: Sequence[Part]) -> tuple[LoraModule, CombinedRow]:
        """Return the combined module over the joined sources, and its row."""
        if any(not math.isfinite(part.factor) for part in parts):
            raise MappingError("a weight or scaling is not finite", where=parts[0].module.path, hint="check --weights")
        if self._method.on == "stack":
            module, apart = stacked(parts)
        elif self._method.on == "factors":
            module, apart = self._blended(parts)
        else:
            module, apart = self._decomposed(parts)
        row = CombinedRow(
            module.path, module.kind, tuple(part.source for part in parts),
            tuple(part.module.scaling.rank for part in parts), tuple(part.weight for part in parts),
            module.scaling.rank, module.scaling.value, apart,
        )  # fmt: skip
        return module, row

    def _blended(self, parts: Sequence[Part]) -> tuple[LoraModule, float | None]:
        """Blend A and B apart: each gets the root of the weight times the scaling, A its sign (peft 0.21)."""
        first = parts[0].module
        roots = np.array([math.sqrt(abs(part.factor)) for part in parts])
        signs = np.array([1.0 if part.factor >= 0 else -1.0 for part in parts])
        terms, apart = [], 0.0
        for i, like in enumerate(first.terms):
            a = np.stack([self._numbers(part.module.terms[i].a, first.path) for part in parts])
            b = np.stack([self._numbers(part.module.terms[i].b, first.path) for part in parts])
            made_a = blend(a, roots * signs, self._recipe, key=f"{first.path}/{i}/A")
            made_b = blend(b, roots, self._recipe, key=f"{first.path}/{i}/B")
            apart = max(apart, _apart(a, b, [part.factor for part in parts], made_a, made_b, first))
            terms.append(self._kept(f"{first.path}/{first.weight}/{i}", like, made_a, made_b, parts))
        return replace(first, terms=tuple(terms), scaling=Scaling(float(first.scaling.rank), first.scaling.rank)), apart

    def _decomposed(self, parts: Sequence[Part]) -> tuple[LoraModule, float | None]:
        """Add the deltas, pruned or not, and take the best factors of a rank: by default the largest there is."""
        singles = [replace(part, module=_plain(part.module)) for part in parts]
        first = singles[0].module
        factors.refuse_grouped([part.module for part in singles])
        pairs = [self._matrices(part.module) for part in singles]
        a = np.concatenate([pair[0] for pair in pairs])
        b = np.concatenate([pair[1] * part.factor for pair, part in zip(pairs, singles, strict=True)], axis=1)
        most = max(part.module.terms[0].rank for part in singles)
        wanted = self._rank if self._rank is not None else None if self._energy is not None else most
        if self._method.pruning == "none":
            rank = wanted if wanted is not None else len(a)
            if self._energy is not None:
                rank = min(rank, lowrank.rank_for(a, b, math.sqrt(max(0.0, 1 - self._energy)))[0])
            small_a, small_b = lowrank.compress(a, b, max(1, min(rank, len(a), *a.shape[1:], b.shape[0])))
        else:
            deltas = np.stack([
                part.module.scaling.value * (pair[1] @ pair[0]) for pair, part in zip(pairs, singles, strict=True)
            ])  # fmt: skip
            mixed = blend(deltas, np.array([p.weight for p in singles]), self._recipe, key=f"{first.path}/delta")
            shape = (mixed.shape[0], mixed.shape[1])
            found = svd.factorize(_whole(mixed), shape, rank=wanted, energy=self._energy, seed=self._recipe.seed)
            small_a, small_b = found.a, found.b
        rank = small_a.shape[0]
        like = first.terms[0]
        shaped = (
            small_a.reshape(rank, *like.a.shape[1:]), small_b.reshape(first.out, rank, *like.b.shape[2:]),
        )  # fmt: skip
        term = self._kept(f"{first.path}/{first.weight}", like, *shaped, singles)
        made = replace(first, terms=(term,), scaling=Scaling(float(rank), rank))
        return made, _distance(a, b, small_a, small_b)

    def _kept(self, name: str, like: Term, a: Numbers, b: Numbers, parts: Sequence[Part]) -> Term:
        a_type, b_type = (
            self._dtype or widest([getattr(t, side).dtype for p in parts for t in p.module.terms], name)
            for side in ("a", "b")
        )
        made = [
            self._spool.put(f"{name}/{side}", x, dtype, where=name)
            for side, x, dtype in (("A", a, a_type), ("B", b, b_type))
        ]
        return Term(made[0], made[1], like.start, like.stop)

    def _numbers(self, expr: Expr, path: str) -> Numbers:
        found = numbers_of(expr, self._source)
        if not np.isfinite(found).all():
            raise MappingError("factors hold NaN or infinite values", where=path, hint="use an earlier step")
        return found

    def _matrices(self, module: LoraModule) -> tuple[Numbers, Numbers]:
        (term,) = module.terms
        a, b = (self._numbers(expr, module.path) for expr in (term.a, term.b))
        return a.reshape(term.rank, -1), b.reshape(-1, term.rank)


def stacked(parts: Sequence[Part]) -> tuple[LoraModule, float | None]:
    """Return the sum of the deltas: A stacked along the rank, B beside each other; no data is read.

    The weights go into the scaling where they and the scalings have one product. Otherwise they go into B: exactly as
    powers of two, else rounded once in at least float32, and the second result is None.
    """
    modules = [part.module for part in parts]
    intervals = [[(term.start, term.stop) for term in module.terms] for module in modules]
    if any(rows != intervals[0] for rows in intervals) or len({module.conv_form for module in modules}) > 1:
        modules = [_plain(module) for module in modules]
    first = modules[0]
    total = sum(module.scaling.rank for module in modules)
    values = {part.factor for part in parts}
    alpha = factors.exact_alpha(next(iter(values)), total) if len(values) == 1 else None
    scaling = Scaling(float(total), total) if alpha is None else Scaling(alpha, total)
    weights = [part.factor / scaling.value if alpha is None else 1.0 for part in parts]
    rounds = any(math.frexp(abs(w))[0] != 0.5 for w in weights)
    terms = []
    for rows in zip(*(module.terms for module in modules), strict=True):
        a_type = widest([term.a.dtype for term in rows], first.path)
        b_type = widest([*(term.b.dtype for term in rows), *([BY_NAME["float32"]] if rounds else [])], first.path)
        a = _along_rank([cast(term.a, a_type) for term in rows], first)
        b = join([scale(term.b, w, b_type) for term, w in zip(rows, weights, strict=True)], 1)
        terms.append(Term(a, b, rows[0].start, rows[0].stop))
    return replace(first, terms=tuple(terms), scaling=scaling), None if rounds else 0.0


def _along_rank(parts: Sequence[Expr], module: LoraModule) -> Expr:
    """Stack A's; a grouped convolution's rank is shared out among its groups, so each group's share is stacked."""
    groups = module.groups if module.kind.startswith("conv") and module.conv_form == "peft" else 1
    shares = [(part, part.shape[0] // groups) for part in parts]
    return join([cut(part, 0, g * n, (g + 1) * n) for g in range(groups) for part, n in shares], 0)


def _plain(module: LoraModule) -> LoraModule:
    """Return the module as one pair of factors in peft's form; the scaling keeps its value."""
    unit = factors.single_pair(replace(module, scaling=Scaling(1.0, 1)), "peft") if not module.plain else module
    unit = factors.conv_to_peft(unit)
    rank = unit.terms[0].rank
    alpha = factors.exact_alpha(module.scaling.value, rank)
    return replace(unit, scaling=Scaling(module.scaling.value * rank if alpha is None else alpha, rank))


def widest(types: Sequence[DType], where: str) -> DType:
    """Return the type that holds every value of the others; float32 for bfloat16 with float16."""
    names = dict.fromkeys(types)
    for candidate in (*names, BY_NAME["float32"], BY_NAME["float64"]):
        if all(lossless(dtype, candidate) for dtype in names):
            return candidate
    raise MappingError(
        f"factors of types {', '.join(map(str, names))} have no common type", where=where, hint="convert with --dtype"
    )


def _apart(
    a: Numbers, b: Numbers, weights: Sequence[float], made_a: Numbers, made_b: Numbers, module: LoraModule
) -> float:
    """Return how far a blended pair is from the sum, relative to it; grouped convolutions are taken group by group."""
    groups = module.groups if module.kind.startswith("conv") and module.conv_form == "peft" else 1
    worst, rank, rows = 0.0, a.shape[1] // groups, b.shape[1] // groups
    for g in range(groups):
        flat_a = [x[g * rank : (g + 1) * rank].reshape(rank, -1) for x in (*a, made_a)]
        flat_b = [x[g * rows : (g + 1) * rows].reshape(rows, -1) for x in (*b, made_b)]
        left = np.concatenate([w * x for w, x in zip(weights, flat_b[:-1], strict=True)], axis=1)
        worst = max(worst, _distance(np.concatenate(flat_a[:-1]), left, flat_a[-1], flat_b[-1]))
    return worst


def _distance(a: Numbers, b: Numbers, other_a: Numbers, other_b: Numbers) -> float:
    """Return the norm of ``other_b @ other_a - b @ a`` relative to that of ``b @ a``."""
    whole = math.hypot(*lowrank.singular_values(a, b).tolist())
    stacked_a, stacked_b = np.concatenate([a, other_a]), np.concatenate([b, -other_b], axis=1)
    apart = math.hypot(*lowrank.singular_values(stacked_a, stacked_b).tolist())
    return apart / whole if whole else apart


def _whole(matrix: Numbers) -> svd.Blocks:
    def blocks() -> Iterator[tuple[int, svd.Rows]]:
        yield 0, matrix

    return blocks
