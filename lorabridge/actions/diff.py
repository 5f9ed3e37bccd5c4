"""Say in what two checkpoints differ: tensor by tensor, or delta by delta where their factors are others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from .. import floats
from ..axes import Expr
from ..dialects.adapter import Adapter, Extra, Facts, LoraModule
from ..dtypes import DType
from ..errors import MappingError
from ..floats import Bits
from ..names import natural_key
from ..selection import Selection, select, tensors_of
from ..tensors import Source
from . import bounds
from .diff_report import DeltaRow, DiffReport, TensorRow
from .sides import Route, Rows, Side, open_side
from .thin import Thin, difference, thin

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class DiffOptions:
    """Everything a comparison can be told.

    ``tolerance``: relative Frobenius error up to which a tensor or a delta counts as the same; None: tensors must be
    equal bit for bit, and deltas of different factorizations to within the rounding of their factors.
    """

    tolerance: float | None = None
    source_dialect: str | None = None
    target_dialect: str | None = None
    family: str | None = None
    config: Path | None = None
    layout: Mapping[str, str] = field(default_factory=dict)
    mappings: Path | None = None
    facts: Facts = field(default_factory=Facts)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


def diff(
    first: Path | str, second: Path | str, options: DiffOptions | None = None, *, progress: Progress | None = None
) -> DiffReport:
    """Compare two checkpoints by content, whatever containers and dialects hold them.

    Names are those of ``second``. Where two adapters hold a module in factors of other shapes or with another scaling,
    their deltas are compared in the thin space. Raises InputError and MappingError as a conversion of either would.
    """
    started = time.perf_counter()
    options = options or DiffOptions()
    with ExitStack() as stack:
        one = open_side(first, dialect=options.source_dialect, config=options.config, facts=options.facts)
        stack.callback(one.close)
        two = open_side(second, dialect=options.target_dialect, config=options.config, facts=options.facts)
        stack.callback(two.close)
        mine, theirs, unselected = _common(one, two, options)
        work = _Work(mine, one.source, theirs, two.source, options, progress)
        tensors, deltas = work.run()
    left_out = [(f"A: {name}", why) for name, why in one.adapter.left_out]
    left_out += [(f"B: {name}", why) for name, why in two.adapter.left_out]
    return DiffReport(
        one.path, two.path, (one.dialect.name, two.dialect.name), (one.source.format, two.source.format),
        tensors, deltas, tuple(left_out), unselected, time.perf_counter() - started,
    )  # fmt: skip


def _common(one: Side, two: Side, options: DiffOptions) -> tuple[Adapter, Adapter, int]:
    """Return both contents in the second's names, selected, and how many tensors the selection leaves."""
    config = next((side.given.model_config for side in (one, two) if side.given.model_config), None)
    route = Route(options.family, options.layout, options.mappings, config)
    wanted = Selection(options.include, options.exclude)
    carried = route.carry(one.adapter, one.dialect.framework, two.dialect.framework)
    mine, gone = select(carried, wanted)
    theirs, also = select(two.adapter, wanted)
    return mine, theirs, max(len(gone), len(also))


class _Work:
    """One comparison: goes through modules, then through the tensors beside them."""

    def __init__(
        self, first: Adapter, first_file: Source, second: Adapter, second_file: Source, options: DiffOptions,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self._first, self._first_file = first, first_file
        self._second, self._second_file = second, second_file
        self._tolerance = options.tolerance
        self._progress = progress
        self._done = 0
        names = set(tensors_of(second.modules, second.extras))
        self._total = sum(spec.nbytes for name, spec in second_file.specs.items() if name in names) or 1

    def run(self) -> tuple[tuple[TensorRow, ...], tuple[DeltaRow, ...]]:
        """Return the rows of everything, equal or not."""
        rows = [*self._modules(), *self._extras()]
        if self._progress is not None:
            self._progress(self._total, self._total)
        tensors = tuple(row for row in rows if isinstance(row, TensorRow))
        return tensors, tuple(row for row in rows if isinstance(row, DeltaRow))

    def _modules(self) -> Iterator[TensorRow | DeltaRow]:
        mine = {(m.path, _weight(m)): m for m in self._first.modules}
        theirs = {(m.path, _weight(m)): m for m in self._second.modules}
        for key in sorted(mine.keys() | theirs.keys(), key=lambda key: natural_key(key[0])):
            one, two = mine.get(key), theirs.get(key)
            if one is None or two is None:
                yield DeltaRow(key[0], False, note=f"only {'B' if one is None else 'A'} has factors for it")
                continue
            yield from self._pair(one, two)

    def _pair(self, one: LoraModule, two: LoraModule) -> Iterator[TensorRow | DeltaRow]:
        if _same_form(one, two):
            for i, (x, y) in enumerate(zip(one.terms, two.terms, strict=True)):
                at = f"[{i}]" if len(one.terms) > 1 else ""
                yield self._tensor(f"{one.path}.lora_A{at}", x.a, y.a)
                yield self._tensor(f"{one.path}.lora_B{at}", x.b, y.b)
        else:
            yield self._delta(one, two)
        beside = ("magnitude", one.magnitude, two.magnitude), ("bias of B", one.lora_bias, two.lora_bias)
        for what, mine, theirs in beside:
            if mine is not None or theirs is not None:
                yield self._either(f"{one.path}: {what}", mine, theirs)

    def _delta(self, one: LoraModule, two: LoraModule) -> DeltaRow:
        row = DeltaRow(one.path, False, (one.scaling.rank, two.scaling.rank), (one.scaling.value, two.scaling.value))
        if one.kind != two.kind:
            return replace(row, note=f"{one.kind} in A, {two.kind} in B")
        try:
            x, y = thin(one, self._first_file), thin(two, self._second_file)
        except MappingError as error:
            return replace(row, note=error.problem)
        self._step(sum(term.a.dtype.bits * (x.a.size + x.b.size) // 8 for term in two.terms[:1]))
        if (x.b.shape[0], x.a.shape[1]) != (y.b.shape[0], y.a.shape[1]):
            return replace(row, note=f"[{x.b.shape[0]}, {x.a.shape[1]}] in A, [{y.b.shape[0]}, {y.a.shape[1]}] in B")
        if not (x.finite and y.finite):
            return replace(row, note="NaN or infinite values")
        found = difference(x, y)
        largest = max(found.first, found.second)
        relative = found.apart / largest if largest else 0.0
        allowed = self._tolerance if self._tolerance is not None else _rounding(x, y, largest)
        return replace(
            row, same=relative <= allowed, norms=(found.first, found.second), apart=relative, allowed=allowed,
            cosine=found.cosine, note="" if one.scaling.value == two.scaling.value else "another scaling",
        )  # fmt: skip

    def _extras(self) -> Iterator[TensorRow]:
        mine, theirs = ({_key(e): e for e in side.extras} for side in (self._first, self._second))
        for key in sorted(mine.keys() | theirs.keys(), key=lambda key: natural_key(key[0])):
            one, two = mine.get(key), theirs.get(key)
            yield self._either(key[0], one.value if one else None, two.value if two else None)

    def _either(self, name: str, one: Expr | None, two: Expr | None) -> TensorRow:
        if one is not None and two is not None:
            return self._tensor(name, one, two)
        found = one if one is not None else two
        assert found is not None
        missing = "B" if two is None else "A"
        return TensorRow(name, False, (found.dtype.name,) * 2, found.shape, note=f"{missing} does not have it")

    def _tensor(self, name: str, one: Expr, two: Expr) -> TensorRow:
        row = TensorRow(name, False, (one.dtype.name, two.dtype.name), two.shape)
        if one.shape != two.shape:
            return replace(row, note=f"{list(one.shape)} in A, {list(two.shape)} in B")
        count = _Count()
        mine, theirs = Rows(one, self._first_file), Rows(two, self._second_file)
        for first, last in theirs.spans():
            block = theirs.take(first, last)
            count.add(mine.take(first, last), one.dtype, block, two.dtype)
            self._step(block.nbytes)
        return count.row(row, self._tolerance)

    def _step(self, nbytes: int) -> None:
        self._done = min(self._done + nbytes, self._total)
        if self._progress is not None:
            self._progress(self._done, self._total)


def _weight(module: LoraModule) -> str:
    """Name the weight; what only says that a layer is an embedding is its kind."""
    return "weight" if module.kind == "embedding" else module.weight


def _key(extra: Extra) -> tuple[str, bool]:
    return extra.name, extra.kind == "trainable_tokens"


def _same_form(one: LoraModule, two: LoraModule) -> bool:
    """Say whether the factors can be compared one by one: same blocks, shapes, form and scaling."""
    if (one.kind, one.conv_form, one.groups, one.scaling.value) != (two.kind, two.conv_form, two.groups,
                                                                   two.scaling.value):  # fmt: skip
        return False
    shapes = [[(t.start, t.stop, t.a.shape, t.b.shape) for t in module.terms] for module in (one, two)]
    return shapes[0] == shapes[1]


def _rounding(x: Thin, y: Thin, largest: float) -> float:
    """Return the relative error that rounding both factors of both deltas once, and our own arithmetic, may cause."""
    if not largest:
        return 0.0
    u = [max((bounds.roundoff(t) for t in (d.a_type, d.b_type) if t is not None), default=2.0**-8) for d in (x, y)]
    noise = bounds.qr_noise(x.b.shape[0], x.a.shape[1], x.a.shape[0] + y.a.shape[0])
    reach = max(2 * roundoff * d.reach() for roundoff, d in zip(u, (x, y), strict=True))
    return (reach + noise * (x.reach() + y.reach())) / largest


@dataclass
class _Count:
    """What one tensor's blocks amount to."""

    differing: int = 0
    elements: int = 0
    max_abs: float = 0.0
    ulps: int | None = 0
    square: float = 0.0
    size: float = 0.0
    values_known: bool = True

    def add(self, old: Bits, old_type: DType, new: Bits, new_type: DType) -> None:
        """Count a block."""
        self.elements += new.size
        same_type = old_type == new_type
        if same_type and old.tobytes() == new.tobytes():
            if new_type.kind == "float" and new_type.numpy:
                self.size += _square(floats.values(new, new_type))
            return
        if not (_numeric(old_type) and _numeric(new_type)):
            self.values_known = False
            self.differing += int((old != new).sum()) if same_type and old.dtype.kind == "u" else new.size
            return
        x, y = floats.values(old, old_type), floats.values(new, new_type)
        if same_type:
            off = np.ascontiguousarray(old) != np.ascontiguousarray(new)
        else:
            off = ~((x == y) | (np.isnan(x) & np.isnan(y)))
        self.differing += int(off.sum())
        with np.errstate(invalid="ignore"):
            gap = np.abs(y - x)[off]
        gap = np.where(np.isnan(gap), np.inf, gap)
        self.max_abs = max(self.max_abs, float(np.max(gap, initial=0.0)))
        self.square += float(np.sum(gap**2))
        self.size += max(_square(x), _square(y))
        if same_type and new_type.kind == "float" and self.ulps is not None:
            steps = _ordered(old[off]), _ordered(new[off])
            self.ulps = max(self.ulps, int(np.max(np.maximum(*steps) - np.minimum(*steps), initial=0)))
        else:
            self.ulps = None

    def row(self, row: TensorRow, tolerance: float | None) -> TensorRow:
        """Return the row with the counts, and whether the tensor counts as the same."""
        types = row.dtypes[0] == row.dtypes[1]
        equal = self.differing == 0
        relative = (self.square / self.size) ** 0.5 if self.size else 0.0 if equal else float("inf")
        same = equal and types
        if tolerance is not None and self.values_known:
            same = relative <= tolerance
        note = "" if types else f"{row.dtypes[0]} in A, {row.dtypes[1]} in B" + (", equal values" if equal else "")
        measured = self.values_known
        return replace(
            row, same=same, elements=self.elements, differing=self.differing,
            max_abs=self.max_abs if measured else None, ulps=self.ulps if measured and types else None,
            relative=relative if measured else None, note=note,
        )  # fmt: skip


def _numeric(dtype: DType) -> bool:
    return dtype.numpy is not None and dtype.kind in ("float", "int", "uint", "bool")


def _square(x: floats.Numbers) -> float:
    found = x[np.isfinite(x)]
    return float(np.vdot(found, found))


def _ordered(bits: Bits) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    """Return the place of each float among all floats of its type, as unsigned integers that keep the order."""
    wide = np.ascontiguousarray(bits).astype(np.uint64)
    sign = np.uint64(1 << (8 * bits.itemsize - 1))
    size = wide & (sign - np.uint64(1))
    middle = np.uint64(1 << 63)
    return np.where(wide & sign != 0, middle - size, middle + size)
