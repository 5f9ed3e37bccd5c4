"""Estimate what an adapter's file does not say from what merging it did to a base model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..arithmetic.floats import Numbers, values
from ..axes import Expr, cut, read, reshape
from ..conversion.repository import open_input
from ..dialects.adapter import Adapter, Extra, Fact, Facts, LoraModule
from ..dialects.pairs import weight_names
from ..errors import InputError, LorabridgeError, MappingError
from ..families import tables
from ..families.rules import SideName
from ..merging.landing import home_of
from ..tensors import Source
from . import bounds
from .inspect import family_candidates
from .inspect_pairs import loose_pairs
from .recover_fit import Fit, Reading, fit, readings
from .recover_report import RecoveredRow, RecoverReport, suggest
from .routes import Route, named_route, route
from .sides import Rows, Side, numbers_of, open_side
from .stated import Stated
from .thin import thin

Progress = Callable[[int, int], None]
UNSTATED = 0.577215664901532860
"""Stands in for an alpha that nothing states; no training uses it."""
ENOUGH = 0.02
"""Relative residual that merging in the weights' own type may leave (bfloat16 has 2**-8), whatever rounds besides."""
SIGNIFICANT = 10.0
"""Standard errors that a scaling must be away from zero."""
PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class RecoverOptions(Stated):
    """Everything an estimation can be told; ``facts`` are taken as known."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """One module of the adapter: its factors, and the scaling that is known of it (None where none is)."""

    path: str
    weight: str
    rank: int
    known: float | None
    module: LoraModule | None
    a: Expr
    b: Expr


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight of two models of one layout, as a change; ``scale``: norm of what rounding to its type may change."""

    name: str
    before: Rows
    after: Rows

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored shape."""
        return self.after.expr.shape

    def changes(self) -> Iterator[tuple[int, Numbers]]:
        """Yield (first row, change) as rows of a matrix."""
        for first, last in self.after.spans():
            new = values(self.after.take(first, last), self.after.expr.dtype).reshape(last - first, -1)
            old = values(self.before.take(first, last), self.before.expr.dtype).reshape(last - first, -1)
            yield first, new - old

    def sizes(self) -> tuple[float, float]:
        """Return the norm of the change, and the most that one rounding of the weight adds to it."""
        change = size = 0.0
        for first, block in self.changes():
            change += float(np.vdot(block, block))
            new = values(self.after.take(first, first + block.shape[0]), self.after.expr.dtype)
            size += float(np.vdot(new, new))
        return math.sqrt(change), bounds.roundoff(self.after.expr.dtype) * math.sqrt(size)


def recover(
    base: Path | str,
    merged: Path | str,
    adapter: Path | str,
    options: RecoverOptions | None = None,
    *,
    progress: Progress | None = None,
) -> RecoverReport:
    """Estimate scaling, ``enable_lora``, storage order and merged state of an adapter, with residuals.

    ``merged`` is ``base`` with the adapter merged by whatever tool. Raises InputError where an input is of another
    kind, MappingError where no module of the adapter is in the models.
    """
    started = time.perf_counter()
    options = options or RecoverOptions()
    unstated = Facts((Fact("*", "alpha", UNSTATED), Fact("*", "merged", False), Fact("*", "as", "lora")))
    stand_in = options.facts.then(unstated)
    with ExitStack() as stack:
        models: list[Side] = []
        for path in (base, merged):
            models.append(open_side(path, facts=stand_in, role=("BASE", "MERGED")[len(models)]))
            stack.callback(models[-1].close)
        given, source, names, unknowns, own, side = _unknowns(adapter, options, stand_in, models[0], stack)
        way = _way(models, side, options)
        before, after = (_parameters(way.carry(m.adapter, m.names, names)) for m in models)
        if side is not None:
            unknowns = _spelled(unknowns, side, {name: extra.value.shape for name, extra in before.items()},
                                _tables(way, models[0], options))  # fmt: skip
        work = _Work(before, models[0].source, after, models[1].source, own, source)
        rows = []
        for done, one in enumerate(unknowns):
            rows.append(work.row(one))
            if progress is not None:
                progress(done + 1, len(unknowns))
    if all(row.weight == "" for row in rows):
        raise MappingError(
            "no module of the adapter is in the models",
            where=[row.path for row in rows],
            hint="check the inputs, and --family where the frameworks differ",
        )
    return RecoverReport(
        str(base), str(merged), given, tuple(rows), suggest(rows), time.perf_counter() - started
    )  # fmt: skip


def _way(models: Sequence[Side], adapter: Side | None, options: RecoverOptions) -> Route:
    """Return the route from the models' names to the adapter's: of a file that no dialect reads only what is named."""
    told = options.told
    if adapter is not None:
        other = next((m for m in models if m.names != adapter.names), models[0])
        return route(other, adapter, models, adapter.kept, told)
    return named_route(told, next((side.given.model_config for side in models if side.given.model_config), None))


def _tables(way: Route, base: Side, options: RecoverOptions) -> Iterator[tables.Table]:
    """Yield the table that is named or that leads to the adapter's names, else those that know the base's names."""
    if way.table is not None and not way.table.identity:
        yield way.table
        return
    for family in family_candidates(base.given, base.dialect, mappings=options.mappings):
        yield tables.load_family(family, options.mappings)


def _spelled(
    unknowns: Sequence[Unknown], side: Side, shapes: Mapping[str, tuple[int, ...]], known: Iterable[tables.Table]
) -> list[Unknown]:  # fmt: skip
    """Give experts that the adapter names as one tensor the names of models that store them one by one."""
    lost = [one for one in unknowns if one.module and one.module.stack and not home_of(one.module, shapes)]
    if not lost:
        return list(unknowns)
    alone = replace(side.adapter, modules=tuple(one.module for one in lost if one.module), extras=())
    for table in known:
        sides: SideName = "hf" if side.names == "hf" else "ms"
        try:
            made = tables.respell(table, alone, side=sides, like=shapes)
        except LorabridgeError:
            continue
        if any(home_of(module, shapes) for module in made.modules):
            kept = [one for one in unknowns if one not in lost]
            return [*kept, *(_known(module) for module in made.modules)]
    return list(unknowns)


def _unknowns(
    path: Path | str, options: RecoverOptions, stand_in: Facts, base: Side, stack: ExitStack
) -> tuple[str, Source, str, list[Unknown], dict[str, Expr], Side | None]:
    """Return the adapter's modules as far as its file tells: parsed where a dialect can, else by their names alone."""
    try:
        side = open_side(path, config=options.config, facts=stand_in, role="ADAPTER", base=base)
    except MappingError as error:
        given = open_input(Path(path), config=options.config)
        stack.callback(given.source.close)
        pairs = [pair for pair in loose_pairs(given.source.specs) if all((pair.pairs[0].a.name, pair.pairs[0].b.name))]
        if not pairs:
            raise error
        facts = options.facts.then(given.stated)
        specs = given.source.specs
        found = []
        for pair in pairs:
            a, b = (read(specs[name]) for name in (pair.pairs[0].a.name, pair.pairs[0].b.name))
            bare = pair.path.removeprefix(PREFIX)
            rank = b.shape[1] if len(b.shape) > 1 else a.shape[0]
            found.append(Unknown(bare, "weight", rank, _stated(facts, bare, rank), None, a, b))
        names = "ms" if given.source.format == "mindspore" else "hf"
        paired = {half.name for pair in pairs for half in (pair.pairs[0].a, pair.pairs[0].b)}
        rest = {name.removeprefix(PREFIX): read(spec) for name, spec in specs.items() if name not in paired}
        return str(path), given.source, names, found, rest, None
    stack.callback(side.close)
    side = side.part_of(base)
    if not side.adapter.modules:
        raise InputError("the third input carries no LoRA factors", where=str(path), hint="name BASE MERGED ADAPTER")
    found = [_known(module) for module in side.adapter.modules]
    own = {extra.name: extra.value for extra in side.adapter.extras}
    return side.path, side.source, side.names, found, own, side


def _stated(facts: Facts, path: str, rank: int) -> float | None:
    alpha = facts.get(path, "alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not rank:
        return None
    return float(alpha) / (math.sqrt(rank) if facts.get(path, "use_rslora") is True else rank)


def _known(module: LoraModule) -> Unknown:
    known = None if module.scaling.alpha == UNSTATED else module.scaling.value
    term = module.terms[0]
    return Unknown(module.path, module.weight, module.scaling.rank, known, module, term.a, term.b)


def _parameters(adapter: Adapter) -> dict[str, Extra]:
    return {extra.name: extra for extra in adapter.extras}


class _Work:
    """One estimation: finds each module's weight in the models and fits its readings."""

    def __init__(
        self, before: Mapping[str, Extra], before_file: Source, after: Mapping[str, Extra], after_file: Source,
        own: Mapping[str, Expr], own_file: Source,
    ) -> None:  # fmt: skip
        self._before, self._before_file = before, before_file
        self._after, self._after_file = after, after_file
        self._own, self._file = own, own_file

    def row(self, one: Unknown) -> RecoveredRow:
        """Estimate one module."""
        row = RecoveredRow(one.path, "", one.rank, False, known=one.known)
        name = self._find(one)
        if name is None:
            return replace(row, note="no weight of this name in both models")
        x, y = (_item(one.module, name, model[name].value) for model in (self._before, self._after))
        if x.shape != y.shape or x.dtype.kind != "float" or y.dtype.kind != "float":
            return replace(row, weight=name, note=f"{x.dtype} {list(x.shape)} in BASE, {y.dtype} {list(y.shape)}")
        weight = Weight(name, Rows(x, self._before_file), Rows(y, self._after_file))
        row = replace(row, weight=name)
        if one.module is not None and one.module.magnitude is not None:
            return replace(row, note="DoRA: its merged weight is no sum, and peft stores its scaling")
        change, noise = weight.sizes()
        if not math.isfinite(change):
            return replace(row, note="NaN or infinite values")
        if change == 0.0:
            return replace(row, fits=one.known is not None, times=0, note="the weight did not change: not merged")
        found = self._fits(one, weight)
        if not found:
            return replace(row, note=f"no reading of the factors gives {list(weight.shape)}, or they are zero")
        best = min(found, key=lambda item: item.residual)
        return self._judged(row, one, best, found, weight, noise / change)

    def _find(self, one: Unknown) -> str | None:
        """Return the weight's name: as it stands, or the only one that ends so."""
        common = self._before.keys() & self._after.keys()
        if one.module is not None and one.module.stack is not None:
            return home_of(one.module, common) or None
        names = list(weight_names(one.path, one.weight))
        exact = [name for name in names if name in common]
        if exact:
            return exact[0]
        ends = [name for name in common for ending in names if name.endswith(f".{ending}")]
        return ends[0] if len(ends) == 1 else None

    def _fits(self, one: Unknown, weight: Weight) -> list[Fit]:
        shape = weight.shape
        flat = (shape[0], math.prod(shape[1:]))
        found = [fit(reading, weight.changes, flat) for reading in self._readings(one, shape)]
        return [item for item in found if item is not None]

    def _readings(self, one: Unknown, shape: tuple[int, ...]) -> list[Reading]:
        module = one.module
        if module is None or (module.plain and not module.kind.startswith("conv")):
            a, b = numbers_of(one.a, self._file), numbers_of(one.b, self._file)
            if not (np.isfinite(a).all() and np.isfinite(b).all()):
                return []
            return list(readings(a, b, shape))
        try:
            delta = thin(module, self._file)
        except LorabridgeError:
            return []
        if not delta.finite:
            return []
        if len(shape) == 2:
            return [replace(reading, rank=one.rank) for reading in readings(delta.a, delta.b, shape)]
        fits = (delta.b.shape[0], delta.a.shape[1]) == (shape[0], math.prod(shape[1:]))
        return [Reading((delta.b,), (delta.a,), one.rank)] if fits else []

    def _judged(
        self, row: RecoveredRow, one: Unknown, best: Fit, found: Sequence[Fit], weight: Weight, noise: float
    ) -> RecoveredRow:  # fmt: skip
        """Say whether the best fit explains the change, and what follows from it."""
        sure = abs(best.scaling) > SIGNIFICANT * best.error
        fits = sure and best.residual <= max(ENOUGH, 1.1 * noise)
        times, note = None, best.reading.note
        if one.known:
            ratio, error = best.scaling / one.known, best.error / abs(one.known)
            near = round(ratio)
            if abs(ratio - near) <= max(4 * error, 0.02) and 0 <= near <= 2:
                times = near
            else:
                note = f"{ratio:.6g} times the stated scaling{_reason(ratio, one.rank)}"
        if not fits:
            note = f"not explained: at best {100 * best.residual:.3g} % of the change remain"
        square = len(weight.shape) == 2 and weight.shape[0] == weight.shape[1]
        other = [item.residual for item in found if item.reading.turned != best.reading.turned]
        embedding = one.module is not None and one.module.kind == "embedding"
        two = len(weight.shape) == 2 and not embedding
        return replace(
            row, rank=best.reading.rank, fits=fits, scaling=best.scaling, error=best.error, residual=best.residual,
            noise=noise, times=times if fits else None, enable_lora=best.mask if best.reading.slots > 1 else None,
            fan_in_fan_out=best.reading.turned if two else None, other=min(other) if other and square else None,
            merged=self._merged_in_file(one, best, weight) if fits else None, note=note,
        )  # fmt: skip

    def _merged_in_file(self, one: Unknown, best: Fit, weight: Weight) -> int | None:
        """Say how often the delta is in the weight that the adapter's own file holds; None where it holds none."""
        own = next((self._own[name] for name in weight_names(one.path, one.weight) if name in self._own), None)
        if own is None or own.shape != weight.shape or own.dtype.kind != "float":
            return None
        mine = Weight(weight.name, weight.before, Rows(own, self._file))
        found = fit(best.reading, mine.changes, (weight.shape[0], math.prod(weight.shape[1:])))
        return 0 if found is None else round(found.scaling / best.scaling)


def _item(module: LoraModule | None, name: str, value: Expr) -> Expr:
    """Return one expert's matrix of a stored tensor that holds them all; any other weight as it is."""
    stack = None if module is None else module.stack
    if stack is None or name != stack.parameter:
        return value
    if len(value.shape) == 3:
        return reshape(cut(value, 0, stack.number, stack.number + 1), value.shape[1:])
    rows = value.shape[0] // (stack.count or 1)
    return cut(value, 0, stack.number * rows, (stack.number + 1) * rows)


def _reason(ratio: float, rank: int) -> str:
    root = math.sqrt(rank)
    if rank > 1 and (abs(ratio - root) < 0.02 * root or abs(ratio * root - 1) < 0.02):
        return ", as if rsLoRA were read wrong"
    return ""
