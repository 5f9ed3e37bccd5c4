"""Read factors and measure them: norms of A, B and the delta, statistics, leading values."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ..axes import Expr, evaluate, read
from ..errors import UsageError
from ..tensors import Source, TensorSpec
from .inspect_report import FactorRow, InspectedModule, NormRow, Problem, TensorRow

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..tensors import Bits

    Floats = npt.NDArray[np.float64]

Progress = Callable[[int, int], None]
LEADING = (3, 5)
"""Rows and columns of a factor that are printed."""


@dataclass(frozen=True, slots=True)
class Selected:
    """The factors of one module as expressions over the file; ``groups`` and ``conv_form`` as in LoraModule."""

    pairs: tuple[tuple[Expr, Expr], ...]
    groups: int = 1
    conv_form: str = "peft"

    @classmethod
    def of_tensors(cls, module: InspectedModule, specs: Mapping[str, TensorSpec]) -> Selected:
        """Take the complete pairs of a module that was recognised by names alone."""
        named = [(pair.a.name, pair.b.name) for pair in module.pairs]
        return cls(tuple((read(specs[a]), read(specs[b])) for a, b in named if a and b))


def with_values(
    source: Source,
    modules: tuple[InspectedModule, ...],
    factors: Sequence[Selected],
    *,
    norms: bool,
    module: str | None,
    progress: Progress | None = None,
) -> tuple[tuple[InspectedModule, ...], tuple[FactorRow, ...], list[Problem]]:
    """Return the modules with norms, the values of those that ``module`` (a path or glob) names, and problems.

    A UsageError says that ``module`` names none, with the nearest paths.
    """
    chosen = _chosen(modules, module)
    wanted = [i for i in range(len(modules)) if norms or i in chosen]
    total = sum(_nbytes(expr) for i in wanted for pair in factors[i].pairs for expr in pair)
    rows, shown, wrong, done = list(modules), [], [], 0
    for i in wanted:
        values = [(_floats(source, a), _floats(source, b)) for a, b in factors[i].pairs]
        measured = _norms(values, factors[i], modules[i].scaling)
        if norms:
            rows[i] = replace(modules[i], norms=measured)
        if measured is not None and measured.nonfinite:
            elements = sum(a.size + b.size for a, b in values)
            wrong.append(f"{modules[i].path}: {measured.nonfinite} of {elements} elements")
        if i in chosen:
            shown += _factor_rows(modules[i], values)
        done += sum(_nbytes(expr) for pair in factors[i].pairs for expr in pair)
        if progress is not None:
            progress(done, total)
    problem = Problem("factors hold NaN or infinite values", tuple(wrong), "the training diverged: use an earlier step")
    return tuple(rows), tuple(shown), [problem] if wrong else []


def _chosen(modules: Sequence[InspectedModule], pattern: str | None) -> set[int]:
    if pattern is None:
        return set()
    paths = [module.path for module in modules]
    chosen = {i for i, path in enumerate(paths) if path == pattern or fnmatchcase(path, pattern)}
    if not chosen:
        near = _nearest(pattern, paths)
        raise UsageError(
            f"no module is called {pattern!r}",
            where=near,
            hint="give a path or a glob such as '*.query'; inspect without --module lists the paths",
        )
    return chosen


def _nearest(word: str, paths: Sequence[str]) -> list[str]:
    """Return paths whose last components, as many as ``word`` has, are spelled much like it."""
    parts = word.count(".") + 1
    endings = {".".join(path.split(".")[-parts:]): path for path in reversed(paths)}
    return [endings[ending] for ending in difflib.get_close_matches(word, endings)]


def _nbytes(expr: Expr) -> int:
    return TensorSpec("", expr.dtype, expr.shape).nbytes


def _floats(source: Source, expr: Expr) -> Floats:
    """Evaluate a factor in double precision; types without arithmetic give NaN."""
    import numpy as np

    from ..arithmetic import numerics

    def bits(name: str) -> Bits:
        return source.read(name)

    found = evaluate(expr, bits, numerics.kernels("inspect", numerics.Notes(), {}))
    try:
        return numerics.values(np.ascontiguousarray(found), expr.dtype).reshape(expr.shape)
    except ValueError:
        return np.full(expr.shape, np.nan)


def _norms(values: Sequence[tuple[Floats, Floats]], chosen: Selected, scaling: float | None) -> NormRow | None:
    """Measure the pairs of one module together; the deltas of its pairs lie on disjoint rows."""
    from ..arithmetic import lowrank

    if not values:
        return None
    measured = [_norm(a) for a, _ in values], [_norm(b) for _, b in values]
    nonfinite = sum(_nonfinite(x) for pair in values for x in pair)
    blocks = [block for pair in values for block in _blocks(*pair, chosen)]
    delta = None
    if scaling is not None and all(b.shape[1] == a.shape[0] for a, b in blocks):
        delta = math.hypot(*(lowrank.norms(a, b, scaling).delta for a, b in blocks))
    return NormRow(math.hypot(*measured[0]), math.hypot(*measured[1]), delta, nonfinite)


def _norm(x: Floats) -> float:
    import numpy as np

    return float(np.linalg.norm(x.ravel()))


def _nonfinite(x: Floats) -> int:
    import numpy as np

    return int(x.size - np.count_nonzero(np.isfinite(x)))


def _blocks(a: Floats, b: Floats, chosen: Selected) -> Iterator[tuple[Floats, Floats]]:
    """Yield the matrix products whose entries are the delta's: one, or one per group of a grouped convolution.

    peft's grouped conv: B is a grouped 1x1 convolution over A's output channels (torch.nn.Conv2d(groups=g)), so the
    rows of B's group i meet the rows of A's group i only. loralib's factors multiply as matrices whatever the groups.
    """
    a, b = a.reshape(a.shape[0], -1), b.reshape(b.shape[0], -1)
    groups = chosen.groups if chosen.conv_form == "peft" else 1
    if groups == 1 or b.shape[0] % groups or a.shape[0] % groups or b.shape[1] * groups != a.shape[0]:
        yield a, b
        return
    rows, rank = b.shape[0] // groups, b.shape[1]
    for g in range(groups):
        yield a[g * rank : (g + 1) * rank], b[g * rows : (g + 1) * rows]


def _factor_rows(module: InspectedModule, values: Sequence[tuple[Floats, Floats]]) -> list[FactorRow]:
    complete = [pair for pair in module.pairs if pair.a.name and pair.b.name]
    return [
        _factor_row(module.path, factor, row, x)
        for pair, (a, b) in zip(complete, values, strict=True)
        for factor, row, x in (("lora_A", pair.a, a), ("lora_B", pair.b, b))
    ]


def _factor_row(module: str, factor: str, row: TensorRow, x: Floats) -> FactorRow:
    import numpy as np

    finite = x[np.isfinite(x)]
    some = finite if finite.size else np.array([math.nan])
    lines = x.reshape(x.shape[0], -1) if x.ndim > 1 else x.reshape(1, -1)
    return FactorRow(
        module=module,
        factor=factor,
        tensor=row.name,
        dtype=row.dtype,
        shape=row.shape,
        minimum=float(some.min()),
        maximum=float(some.max()),
        mean=float(some.mean()),
        std=float(some.std()),
        norm=_norm(finite),
        zeros=int(np.count_nonzero(x == 0)),
        nonfinite=_nonfinite(x),
        leading=tuple(tuple(float(v) for v in line[: LEADING[1]]) for line in lines[: LEADING[0]]),
    )
