"""Extract an adapter from what training changed: the difference of two models, matrix by matrix."""

from __future__ import annotations

import hashlib
import math
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..arithmetic import svd
from ..arithmetic.floats import values
from ..conversion.forward import dialect_named
from ..conversion.repository import framework_of
from ..dialects import naming
from ..dialects.adapter import Adapter, Extra, LoraModule, Scaling, Term
from ..dialects.blockscales import refuse_scaled
from ..errors import InputError, UsageError
from ..files.placeholders import spoken
from ..joined import Joined, prefixed
from ..merging.identity import BASE_KEY, BaseMark, weight_mark
from ..names import natural_key
from ..spool import Spool
from ..tensors import Source
from .choices import dtype_named
from .extract_changes import Changed, Changes, Pair, find_changes
from .extract_report import ExtractedRow, ExtractReport
from .publish import Origin, Target, adapter_target, check_free, pack, publish
from .routes import named_route
from .sides import Rows, Side, open_side
from .stated import Stated, Told

Progress = Callable[[int, int], None]
KEPT_BYTES = 256 << 20
"""Differences up to this many bytes stay in memory; larger ones are read again for each pass."""


@dataclass(frozen=True, slots=True)
class ExtractOptions(Stated):
    """Everything an extraction can be told.

    ``rank``, ``energy``: of each module; with both the rank is a limit. ``save``: globs on modules that go into the
    adapter whole. ``facts``: ``kind`` and ``fan_in_fan_out`` where neither names nor tables say.
    """

    rank: int | None = None
    energy: float | None = None
    seed: int = 0
    dtype: str = "float32"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    save: tuple[str, ...] = ()
    target_dialect: str | None = None
    workers: int = 0
    dry_run: bool = False
    overwrite: bool = False


def extract(
    base: Path | str,
    tuned: Path | str,
    target: Path | str,
    options: ExtractOptions,
    *,
    progress: Progress | None = None,
) -> ExtractReport:
    """Write an adapter that turns ``base`` into ``tuned``, as nearly as its rank allows, and say how nearly.

    Streams: one matrix at a time. All or nothing. Raises MappingError for changes that no adapter holds, with every
    tensor, InputError where nothing differs or an input is no whole model, UsageError for options that contradict.
    """
    started = time.perf_counter()
    _check_options(options)
    with ExitStack() as stack:
        sides = [open_side(path, config=options.config) for path in (base, tuned)]
        for side in sides:
            stack.callback(side.close)
        _check_models(sides)
        for side in sides:
            refuse_scaled(side.adapter, "be compared as numbers")
        goal = _goal(target, sides, options)
        if not options.dry_run:
            check_free(goal)
        pair = _pair(sides, goal, options)
        changes = find_changes(pair, options.include, options.exclude, options.save, options.facts)
        spool = Spool()
        stack.callback(spool.close)
        work = _Work(options, pair, spool, changes, progress)
        made = work.run()
        joined = Joined({"tuned": pair.tuned_source, spool.key: spool})
        adapter = _adapter(changes, made, sides[0], pair.tuned_source)
        package = pack(adapter, joined, goal, _origin(changes, sides, pair, options))
        if not options.dry_run:
            content = hashlib.sha256(f"{spool.digest} {options!r}".encode()).hexdigest()
            publish(package, joined, goal, content=content)
    return ExtractReport(
        str(base), str(tuned), str(target), goal.dialect.name, goal.output.format, tuple(work.rows),
        tuple(extra.name for extra in adapter.extras), changes.unchanged, changes.left_out, len(package.plan.specs),
        package.plan.nbytes, changes.warnings, package.notes, time.perf_counter() - started, options.dry_run,
    )  # fmt: skip


def _check_options(options: ExtractOptions) -> None:
    if options.rank is None and options.energy is None:
        raise UsageError("how much to keep is not said", hint="give --rank R, or --energy SHARE, for example 0.99")
    if options.rank is not None and options.rank < 1:
        raise UsageError("a rank is at least 1", where=f"--rank {options.rank}")
    if options.energy is not None and not 0 < options.energy <= 1:
        raise UsageError("an energy is a share above 0 and up to 1", where=f"--energy {options.energy:g}")


def _check_models(sides: list[Side]) -> None:
    where = [f"{side.path}: {len(side.adapter.modules)} modules have factors" for side in sides if side.adapter.modules]
    if where:
        raise InputError(
            "an input carries LoRA factors; extracting takes two whole models", where=where,
            hint="merge the adapter first, or use `lorabridge resize` on it",
        )  # fmt: skip


def _goal(target: Path | str, sides: list[Side], options: ExtractOptions) -> Target:
    framework = framework_of(Path(target)) or sides[1].dialect.framework
    default = dialect_named("peft" if framework == "torch" else "loralib-ms")
    return adapter_target(
        target, [side.given.path for side in sides], default=default, chosen=options.target_dialect,
        overwrite=options.overwrite, workers=options.workers,
    )  # fmt: skip


def _pair(sides: list[Side], goal: Target, options: ExtractOptions) -> Pair:
    """Bring both models to the target's names."""
    names = naming(goal.dialect)
    family = options.family
    crossing = [side.path for side in sides if side.names != names]
    if crossing and family is None:
        raise UsageError(
            f"a model has other names than the {goal.dialect.name} target", where=crossing,
            hint="name its table with --family, or --family identity where the names are the same",
        )  # fmt: skip
    config = next((side.given.model_config for side in reversed(sides) if side.given.model_config), None)
    way = named_route(Told(family, options.layout, options.mappings), config)
    base, tuned = (way.carry(side.adapter, side.names, names) for side in sides)
    return Pair(base, sides[0].source, tuned, sides[1].source, names, family, options.mappings, config)


class _Work:
    """One extraction: goes through the changed matrices and keeps their factors in the spool."""

    def __init__(
        self, options: ExtractOptions, pair: Pair, spool: Spool, changes: Changes, progress: Progress | None
    ) -> None:  # fmt: skip
        self._options = options
        self._pair = pair
        self._spool = spool
        self._changes = changes
        self._progress = progress
        self._dtype = dtype_named(options.dtype)
        self.rows: list[ExtractedRow] = []

    def run(self) -> tuple[LoraModule, ...]:
        """Factorize every changed matrix."""
        changed = sorted(self._changes.matrices, key=lambda one: natural_key(one.name))
        total, done, made = sum(math.prod(one.tuned.shape) for one in changed), 0, []
        for one in changed:
            made.append(self._module(one))
            done += math.prod(one.tuned.shape)
            if self._progress is not None:
                self._progress(done, total)
        return tuple(made)

    def _module(self, one: Changed) -> LoraModule:
        blocks, shape = _difference(one, self._pair)
        seed = self._options.seed + zlib.crc32(one.path.encode())
        found = svd.factorize(blocks, shape, rank=self._options.rank, energy=self._options.energy, seed=seed)
        a, b = (found.b.T, found.a.T) if one.turned else (found.a, found.b)
        kernel = one.tuned.shape[2:] if one.kind.startswith("conv") else ()
        inner = (found.rank, one.tuned.shape[1], *kernel) if kernel else (found.rank, a.shape[1])
        outer = (b.shape[0], found.rank, *(1 for _ in kernel))
        exprs = [
            self._spool.put(f"{one.path}/{side}", np.ascontiguousarray(x).reshape(form), self._dtype, where=one.name)
            for side, x, form in (("A", a, inner), ("B", b, outer))
        ]
        small = [values(self._spool.read(f"{one.path}/{side}"), self._dtype).reshape(x.shape)
                 for side, x in (("A", a), ("B", b))]  # fmt: skip
        left, right = (small[0].T, small[1].T) if one.turned else (small[1], small[0])
        rest = svd.residual(blocks, np.ascontiguousarray(right), np.ascontiguousarray(left))
        share = 1.0 - (rest / found.total) ** 2 if found.total else 1.0
        self.rows.append(
            ExtractedRow(one.path, one.kind, tuple(one.tuned.shape), found.rank, found.total, rest, share)
        )  # fmt: skip
        return LoraModule(
            one.path, one.kind, b.shape[0], (Term(exprs[0], exprs[1], 0, b.shape[0]),),
            Scaling(float(found.rank), found.rank), weight=one.parameter if one.kind == "linear" else "weight",
            fan_in_fan_out=one.turned if one.kind == "linear" else None, kernel_size=kernel,
        )  # fmt: skip


def _difference(one: Changed, pair: Pair) -> tuple[svd.Blocks, tuple[int, int]]:
    """Return the difference as a matrix, in memory where it is small enough."""
    rows = one.tuned.shape[0]
    shape = (rows, math.prod(one.tuned.shape[1:]))
    before, after = Rows(one.base, pair.base_source), Rows(one.tuned, pair.tuned_source)
    narrow = max(one.base.dtype.bits, one.tuned.dtype.bits) <= 16

    def read() -> Iterator[tuple[int, svd.Rows]]:
        for first, last in after.spans():
            new = values(after.take(first, last), one.tuned.dtype).reshape(last - first, -1)
            old = values(before.take(first, last), one.base.dtype).reshape(last - first, -1)
            block = new - old
            if not np.isfinite(block).all():
                raise InputError(
                    "weights are not finite, or their difference is not", where=one.name,
                    hint="leave the module out with --exclude, or use an earlier step of the training",
                )  # fmt: skip
            yield first, block.astype(np.float32) if narrow else block

    if shape[0] * shape[1] * (4 if narrow else 8) > KEPT_BYTES:
        return read, shape
    kept = list(read())
    return (lambda: iter(kept)), shape


def _origin(changes: Changes, sides: list[Side], pair: Pair, options: ExtractOptions) -> Origin:
    """Say what the adapter was made from, and which base it is for."""
    base, tuned = (side.given.path.name for side in sides)
    weights = {one.name: weight_mark(one.base, pair.base_source) for one in changes.matrices}
    mark = BaseMark(pair.names, base, weights)
    words = f"extracted from {tuned} and {base}"
    return Origin(words, options.family, options.layout, pair.config, {BASE_KEY: mark.as_text()})


def _adapter(changes: Changes, made: tuple[LoraModule, ...], base: Side, tuned: Source) -> Adapter:
    """Put the factors, and what goes beside them, together over the joined sources."""
    beside: tuple[Extra, ...] = tuple(sorted(changes.extras, key=lambda extra: natural_key(extra.name)))
    lifted = prefixed(Adapter((), beside), "tuned", tuned.specs)
    return replace(lifted, modules=made, config={"base_model_name_or_path": spoken(base.path)} if made else {})
