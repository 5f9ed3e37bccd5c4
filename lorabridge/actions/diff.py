"""Say in what two checkpoints differ: tensor by tensor, or delta by delta where their factors are others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..arithmetic import floats
from ..arithmetic.floats import Bits
from ..axes import Expr
from ..conversion.selection import Selection, select, tensors_of
from ..dialects.adapter import Adapter, Extra, LoraModule
from ..dtypes import DType
from ..errors import MappingError, UsageError
from ..names import natural_key
from ..tensors import Source
from . import bounds
from .diff_report import DeltaRow, DiffReport, TensorRow
from .routes import route
from .sides import Rows, Side, open_side
from .stated import Stated
from .thin import Thin, difference, thin

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class DiffOptions(Stated):
    """Everything a comparison can be told.

    ``tolerance``: relative Frobenius error up to which a tensor or a delta counts as the same; None: tensors must be
    equal bit for bit, and deltas of different factorizations to within the rounding of their factors.
    """

    tolerance: float | None = None
    source_dialect: str | None = None
    target_dialect: str | None = None
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
        one = open_side(first, dialect=options.source_dialect, config=options.config, facts=options.facts, role="A")
        stack.callback(one.close)
        two = open_side(second, dialect=options.target_dialect, config=options.config, facts=options.facts, role="B")
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
    _check_kinds(one, two)
    known = [side.kept for side in (two, one) if side.kept is not None]
    kept = next((one for one in known if one.options.get("family", "identity") != "identity"), None)
    way = route(one, two, (), kept, options.told)
    wanted = Selection(options.include, options.exclude)
    carried = way.carry(one.adapter, one.names, two.names)
    mine, gone = select(carried, wanted)
    theirs, also = select(two.adapter, wanted)
    return mine, theirs, max(len(gone), len(also))


def _check_kinds(one: Side, two: Side) -> None:
    """Refuse an adapter beside a whole model, unless the adapter's file holds base weights too."""
    if one.is_adapter == two.is_adapter:
        return
    adapter, model = (one, two) if one.is_adapter else (two, one)
    if not any(extra.kind == "base" for extra in adapter.adapter.extras):
        raise UsageError(
            f"{adapter.role} is an adapter and {model.role} a whole model", where=[adapter.path, model.path],
            hint="`lorabridge verify ADAPTER MERGED --base BASE` checks a merge, `lorabridge recover` estimates one",
        )  # fmt: skip


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
        mine, theirs = Rows(one, self._first_file), Rows(two, self._second_file)
        count = _Count(one.dtype, two.dtype)
        for first, last in theirs.spans():  # most tensors are equal, and bytes are the fastest to compare
            old, new = mine.take(first, last), theirs.take(first, last)
            self._step(new.nbytes)
            count.elements += new.size
            count.equal &= one.dtype == two.dtype and np.array_equal(_bytes(old), _bytes(new))
        if not count.equal:
            for first, last in theirs.spans():
                count.add(mine.take(first, last), theirs.take(first, last))
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
    """What one tensor's blocks amount to; ``equal``: no byte differs."""

    old_type: DType
    new_type: DType
    equal: bool = True
    elements: int = 0
    differing: int = 0
    max_abs: float = 0.0
    ulps: int = 0
    square: float = 0.0
    old_size: float = 0.0
    new_size: float = 0.0

    @property
    def numeric(self) -> bool:
        """Both types have arithmetic."""
        return all(d.numpy is not None and d.kind in ("float", "int", "uint", "bool") for d in self.types)

    @property
    def types(self) -> tuple[DType, DType]:
        """Both types."""
        return self.old_type, self.new_type

    def add(self, old: Bits, new: Bits) -> None:
        """Count a block of a tensor that differs somewhere."""
        if not self.numeric:
            same = self.old_type == self.new_type and old.dtype.kind == "u"
            self.differing += int(np.count_nonzero(old != new)) if same else new.size
            return
        x, y = floats.values(old, self.old_type), floats.values(new, self.new_type)
        with np.errstate(invalid="ignore", over="ignore"):
            gap = y - x
        if self.old_type == self.new_type:
            self.differing += int(np.count_nonzero(old != new))
            if self.new_type.kind == "float":
                self.ulps = max(self.ulps, most_ulps(old, new))
        else:
            self.differing += int(np.count_nonzero(~((x == y) | (np.isnan(x) & np.isnan(y)))))
        if not np.isfinite(gap).all():
            both = (x == y) | (np.isnan(x) & np.isnan(y))
            gap = np.where(both, 0.0, np.where(np.isfinite(gap), gap, np.inf))
            x, y = (np.where(np.isfinite(z), z, 0.0) for z in (x, y))
        self.max_abs = max(self.max_abs, float(np.max(gap, initial=0.0)), -float(np.min(gap, initial=0.0)))
        self.square += _square(gap)
        self.old_size += _square(x)
        self.new_size += _square(y)

    def row(self, row: TensorRow, tolerance: float | None) -> TensorRow:
        """Return the row with the counts, and whether the tensor counts as the same."""
        types = self.old_type == self.new_type
        if self.equal:
            return replace(row, same=True, elements=self.elements, max_abs=0.0, ulps=0, relative=0.0)
        size = max(self.old_size, self.new_size)
        relative = math.sqrt(self.square / size) if size else math.inf if self.square else 0.0
        note = "" if types else f"{row.dtypes[0]} in A, {row.dtypes[1]} in B"
        note += ", equal values" if note and self.differing == 0 else ""
        return replace(
            row, same=tolerance is not None and self.numeric and relative <= tolerance, elements=self.elements,
            differing=self.differing, max_abs=self.max_abs if self.numeric else None,
            ulps=self.ulps if types and self.numeric and self.new_type.kind == "float" else None,
            relative=relative if self.numeric else None, note=note,
        )  # fmt: skip


def _bytes(bits: Bits) -> Bits:
    return bits if bits.dtype.kind == "u" else np.ascontiguousarray(bits).view(np.uint8)


def _square(x: floats.Numbers) -> float:
    flat = x.reshape(-1)
    return float(np.vdot(flat, flat))


def most_ulps(old: Bits, new: Bits) -> int:
    """Return the most floats of a type that lie between two elements; both zeros are one place.

    ``old`` and ``new``: bits of one type with a sign bit on top.
    """
    if old.itemsize == 8:
        one, two = _places64(old), _places64(new)
        return int(np.max(np.maximum(one, two) - np.minimum(one, two), initial=0))
    shift = 8 * old.itemsize - 1
    places = []
    for bits in (old, new):
        found = np.ascontiguousarray(bits).view(f"i{bits.itemsize}").astype(np.int64)
        negative = np.right_shift(found, shift)  # all ones where the sign is set: fold those around zero
        places.append((found & ~negative) - (found & negative & ((1 << shift) - 1)))
    return int(np.max(np.abs(places[0] - places[1]), initial=0))


def _places64(bits: Bits) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    wide = np.ascontiguousarray(bits).view(np.uint64)
    sign, middle = np.uint64(1 << 63), np.uint64(1 << 63)
    size = wide & ~sign
    return np.where(wide & sign != 0, middle - size, middle + size)
