"""Combine adapters into one: the exact sum, peft's other ways, and what each costs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from ..conversion.repository import read_json
from ..conversion.selection import Selection, select
from ..dialects import naming
from ..dialects.adapter import Adapter, Extra, Json, LoraModule, Value
from ..dialects.peft_config import changes_base
from ..dialects.peft_write import of_part
from ..errors import InputError, MappingError, UsageError
from ..joined import Joined, prefixed
from ..merging.identity import BASE_KEY, base_mark
from ..names import natural_key
from ..spool import Spool
from ..tensors import Source
from .choices import dtype_named
from .combine_methods import METHODS, Maker, Part
from .combine_report import CombinedRow, CombineReport
from .publish import Origin, adapter_target, check_free, pack, publish
from .routes import named_route
from .sides import Side, bits_of, open_side
from .stated import Stated

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class CombineOptions(Stated):
    """Everything a combination can be told.

    ``weights``: (glob on module paths, one weight per adapter), the first match counts; 1 where none matches.
    ``rank``, ``energy``: of the methods that end in an SVD. ``density``, ``election``, ``seed``: see ``blend.Recipe``.
    """

    method: str = "cat"
    weights: tuple[tuple[str, tuple[float, ...]], ...] = ()
    rank: int | None = None
    energy: float | None = None
    density: float | None = None
    election: str = "total"
    seed: int = 0
    target_dialect: str | None = None
    dtype: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    workers: int = 0
    dry_run: bool = False
    overwrite: bool = False


def combine(
    sources: Sequence[Path | str],
    target: Path | str,
    options: CombineOptions | None = None,
    *,
    progress: Progress | None = None,
) -> CombineReport:
    """Combine the adapters at ``sources`` into one at ``target``.

    All or nothing. Raises MappingError for what cannot be combined (DoRA, different modules saved in full, ranks that
    the method needs equal), InputError where an input is no adapter, UsageError for options that do not go together.
    """
    started = time.perf_counter()
    options = options or CombineOptions()
    _check_options(options, len(sources))
    with ExitStack() as stack:
        sides = []
        for path in sources:
            sides.append(open_side(path, facts=options.facts))
            stack.callback(sides[-1].close)
        goal = adapter_target(
            target, [Path(p) for p in sources], default=sides[0].dialect, chosen=options.target_dialect,
            overwrite=options.overwrite, workers=options.workers,
        )  # fmt: skip
        if not options.dry_run:
            check_free(goal)
        spool = Spool()
        stack.callback(spool.close)
        inputs = {f"in{i}": side.source for i, side in enumerate(sides)}
        work = _Work(options, Joined(inputs), spool)
        options = _told(sides, options)
        config = read_json(options.config) if options.config is not None else _model_config(sides)
        adapter, rows, warnings = work.run(_ready(sides, options, naming(goal.dialect), config), progress)
        joined = Joined({**inputs, spool.key: spool})
        origin, apart = _origin(sides, options, config)
        warnings = (*warnings, *apart)
        package = pack(adapter, joined, goal, origin, dtype=dtype_named(options.dtype) if options.dtype else None)
        if not options.dry_run:
            content = hashlib.sha256(f"{spool.digest} {options!r}".encode()).hexdigest()
            publish(package, joined, goal, content=content, progress=progress)
    return CombineReport(
        tuple(side.path for side in sides), str(target), options.method, goal.dialect.name, goal.output.format,
        rows, len(package.plan.specs), package.plan.nbytes, warnings, (*work.notes(), *package.notes),
        time.perf_counter() - started, options.dry_run,
    )  # fmt: skip


def _check_options(options: CombineOptions, count: int) -> None:
    if count < 2:
        raise UsageError("combining needs two adapters or more", hint="name them all before OUT")
    if options.method not in METHODS:
        raise UsageError(f"unknown method {options.method!r}", hint=f"known: {', '.join(METHODS)}")
    method = METHODS[options.method]
    wrong = [f"{len(w)} for {pattern!r}" for pattern, w in options.weights if len(w) != count]
    if wrong:
        raise UsageError(f"there are {count} adapters, but other numbers of weights", where=wrong,
                         hint="give one weight per adapter, separated by commas")  # fmt: skip
    if method.prunes and options.density is None:
        raise UsageError(f"method {options.method} needs a density", hint="give the share that is kept: --density 0.5")
    if options.density is not None and not (method.prunes and 0 < options.density <= 1):
        raise UsageError(
            "a density goes from above 0 to 1, with the methods that prune",
            where=f"--density {options.density:g} --method {options.method}",
            hint=f"those are {', '.join(name for name, m in METHODS.items() if m.prunes)}",
        )
    if (options.rank is not None or options.energy is not None) and not method.decomposes:
        raise UsageError(
            f"method {options.method} has no rank to choose", hint="use --method svd, or resize the result"
        )


def _told(sides: Sequence[Side], options: CombineOptions) -> CombineOptions:
    """Take the table that the adapters' manifests name where none is named and they agree."""
    known = [side.kept.named for side in sides if side.kept is not None]
    families = {family for family, _ in known if family is not None}
    if options.family is not None or len(families) != 1:
        return options
    layout = {key: choice for _, choices in known for key, choice in choices.items()}
    return replace(options, family=families.pop(), layout={**layout, **options.layout})


def _check_names(sides: Sequence[Side], options: CombineOptions) -> None:
    """Refuse adapters in two projects' names that have no module's name in common, where no table is named."""
    first = sides[0]
    own = {module.path for module in first.adapter.modules}
    strange = [
        side for side in sides[1:]
        if side.names != first.names
        and not own & {module.path for module in side.adapter.modules}
    ]  # fmt: skip
    if strange and options.family is None:
        raise UsageError(
            "the adapters have the names of two frameworks or projects",
            where=[f"{side.path}: {side.adapter.modules[0].path}" for side in (first, *strange)],
            hint="name the table between them with --family; `lorabridge tables list` shows the known ones",
        )


def _model_config(sides: Sequence[Side]) -> Json | None:
    return next((side.given.model_config for side in sides if side.given.model_config), None)


def _origin(
    sides: Sequence[Side], options: CombineOptions, config: Json | None
) -> tuple[Origin, tuple[str, ...]]:  # fmt: skip
    """Say what the adapter was made from, and for which base where the inputs agree; also return warnings."""
    found = [(side, base_mark(side.source.metadata, where=side.path)) for side in sides]
    known = [(side, mark) for side, mark in found if mark is not None]
    weights: dict[str, str] = {}
    apart: dict[str, None] = {}
    for side, mark in known:
        if mark.side != known[0][1].side or any(weights.get(name, one) != one for name, one in mark.weights.items()):
            apart[side.path] = None
        weights |= mark.weights
    words = f"combined ({options.method}) from {', '.join(side.given.path.name for side in sides)}"
    origin = Origin(words, options.family, options.layout, config)
    if apart:
        said = f"the adapters were made for different bases: {known[0][0].path}, {', '.join(apart)}; none is recorded"
        return origin, (said,)
    if known:
        origin = replace(origin, marks={BASE_KEY: replace(known[0][1], weights=weights).as_text()})
    return origin, ()


def _ready(
    sides: Sequence[Side], options: CombineOptions, names: str, config: Json | None
) -> list[Adapter]:  # fmt: skip
    """Return the adapters in the target's names, selected, each over the joined sources."""
    way = named_route(options.told, config)
    bare = [side.path for side in sides if not side.adapter.modules]
    if bare:
        raise InputError("an input carries no LoRA factors", where=bare, hint="name adapters only")
    _check_names(sides, options)
    _refuse(sides)
    adapters = _selected([side.adapter for side in sides], options)
    carried = [way.carry(a, s.names, names) for a, s in zip(adapters, sides, strict=True)]
    return [prefixed(a, f"in{i}", s.source.specs) for i, (a, s) in enumerate(zip(carried, sides, strict=True))]


def _refuse(sides: Sequence[Side]) -> None:
    where = []
    for side in sides:
        init = changes_base(side.adapter.config)
        if init:
            where.append(f"{side.path}: init_lora_weights={init!r} changes the base weights as it loads")
        if side.adapter.merged:
            where.append(f"{side.path}: its base weights already hold the delta")
        for module in side.adapter.modules:
            if module.magnitude is not None:
                where.append(f"{side.path}: {module.path}: DoRA's magnitude makes the change no sum")
            if module.lora_bias is not None:
                where.append(f"{side.path}: {module.path}: has a bias on B")
    if where:
        raise MappingError(
            "these adapters are more than a delta that could be added", where=where,
            hint="merge one after the other into the base instead, or leave modules out with --exclude",
        )  # fmt: skip


def _selected(adapters: Sequence[Adapter], options: CombineOptions) -> list[Adapter]:
    """Apply --include and --exclude to each adapter; a pattern must match something in one of them."""

    def hits(pattern: str, adapter: Adapter) -> bool:
        names = [m.path for m in adapter.modules] + [n for e in adapter.extras for n in (e.path, e.name)]
        return any(fnmatchcase(name, pattern) for name in names)

    patterns = (*options.include, *options.exclude)
    idle = [repr(p) for p in patterns if not any(hits(p, adapter) for adapter in adapters)]
    if idle:
        raise MappingError("a selection matches no module", where=idle, hint="`lorabridge inspect` lists the paths")
    found = []
    for adapter in adapters:
        mine = Selection(
            tuple(p for p in options.include if hits(p, adapter)), tuple(p for p in options.exclude if hits(p, adapter))
        )
        if options.include and not mine.include:
            found.append(replace(of_part(adapter), modules=(), extras=()))
            continue
        chosen, gone = select(adapter, mine)
        found.append(of_part(chosen) if gone else chosen)
    return found


class _Work:
    """One combination: goes through the modules and collects what the report says."""

    def __init__(self, options: CombineOptions, source: Source, spool: Spool) -> None:
        self._options = options
        self._source = source
        self._maker = Maker(
            METHODS[options.method], source, spool, rank=options.rank, energy=options.energy,
            density=options.density, election=options.election, seed=options.seed,
            dtype=dtype_named(options.dtype) if options.dtype else None,
        )  # fmt: skip

    def run(
        self, adapters: Sequence[Adapter], progress: Progress | None
    ) -> tuple[Adapter, tuple[CombinedRow, ...], tuple[str, ...]]:
        groups = list(self._groups(adapters))
        _check_alike(groups)
        if METHODS[self._options.method].blends:
            _check_ranks(groups, self._options.method)
        modules, rows = [], []
        for done, parts in enumerate(groups):
            module, row = self._maker.make(parts)
            modules.append(module)
            rows.append(row)
            if progress is not None:
                progress(done + 1, len(groups))
        extras = _extras(adapters, self._source)
        config, warnings = _config(adapters)
        combined = Adapter(tuple(modules), extras, config)
        return combined, tuple(rows), warnings

    def notes(self) -> tuple[str, ...]:
        return (METHODS[self._options.method].says,) if METHODS[self._options.method].says else ()

    def _groups(self, adapters: Sequence[Adapter]) -> Iterator[list[Part]]:
        """Yield what each module is made of, in natural order of the paths."""
        found: dict[tuple[str, str], list[Part]] = {}
        for i, adapter in enumerate(adapters):
            for module in adapter.modules:
                weight = next((w[i] for p, w in self._options.weights if fnmatchcase(module.path, p)), 1.0)
                found.setdefault((module.path, module.weight), []).append(Part(i, module, weight))
        idle = [p for p, _ in self._options.weights if not any(fnmatchcase(path, p) for path, _ in found)]
        if idle:
            raise MappingError("weights are given for modules that no adapter has", where=[repr(p) for p in idle],
                               hint="patterns are globs on module paths; `lorabridge inspect` lists them")  # fmt: skip
        for key in sorted(found, key=lambda key: natural_key(key[0])):
            yield found[key]


def _check_alike(groups: Sequence[Sequence[Part]]) -> None:
    """Refuse modules that are not the same layer in every adapter."""

    def layer(module: LoraModule) -> tuple[object, ...]:
        return module.kind, module.out, module.terms[0].a.shape[1:], module.groups, module.kernel_size

    wrong = []
    for parts in groups:
        kinds = {layer(part.module) for part in parts}
        orders = {part.module.fan_in_fan_out for part in parts} - {None}
        if len(kinds) > 1 and len({part.module.conv_form for part in parts}) == 1:
            wrong.append(f"{parts[0].module.path}: {' and '.join(_shape(part.module) for part in parts)}")
        elif len(orders) > 1:
            wrong.append(f"{parts[0].module.path}: base weights stored [in, out] and [out, in]")
    if wrong:
        raise MappingError("the adapters belong to different models", where=wrong, hint="check the inputs")


def _shape(module: LoraModule) -> str:
    return f"{module.kind} [{module.out}, {', '.join(str(n) for n in module.terms[0].a.shape[1:])}]"


def _check_ranks(groups: Sequence[Sequence[Part]], method: str) -> None:
    def ranks(module: LoraModule) -> tuple[tuple[int, int, int], ...]:
        return tuple((term.rank, term.start, term.stop) for term in module.terms)

    wrong = [
        f"{parts[0].module.path}: ranks {', '.join(str(part.module.terms[0].rank) for part in parts)}"
        for parts in groups
        if len({ranks(part.module) for part in parts}) > 1 or len({part.module.conv_form for part in parts}) > 1
    ]
    if wrong:
        raise MappingError(
            f"method {method} works on factors of one rank", where=wrong,
            hint="use --method cat or svd, or a method that ends in _svd",
        )  # fmt: skip


def _extras(adapters: Sequence[Adapter], source: Source) -> tuple[Extra, ...]:
    """Carry what lies beside the factors; what several adapters have must be the same bits."""
    found: dict[tuple[str, str], Extra] = {}
    apart: list[str] = []
    for adapter in adapters:
        for extra in adapter.extras:
            kept = found.setdefault((extra.kind, extra.name), extra)
            same = kept is extra or (
                (kept.value.dtype, kept.value.shape) == (extra.value.dtype, extra.value.shape)
                and bits_of(kept.value, source).tobytes() == bits_of(extra.value, source).tobytes()
            )
            if not same and extra.name not in apart:
                apart.append(extra.name)
    if apart:
        raise MappingError(
            "the adapters hold different values for tensors that have no weighted sum", where=apart,
            hint="leave them out with --exclude, for example --exclude 'classifier*'",
        )  # fmt: skip
    return tuple(found.values())


def _config(adapters: Sequence[Adapter]) -> tuple[dict[str, Value], tuple[str, ...]]:
    """Return the first config there is, and warnings where the others differ in what counts."""
    configs = [adapter.config for adapter in adapters if adapter.config]
    if not configs:
        return {}, ()
    warnings, tokens = [], {repr(c.get("trainable_token_indices")) for c in configs}
    if len(tokens) > 1:
        raise MappingError("the adapters train different token rows", where=sorted(tokens), hint="use --exclude")
    bases = dict.fromkeys(str(c["base_model_name_or_path"]) for c in configs if c.get("base_model_name_or_path"))
    if len(bases) > 1:
        warnings.append(f"the adapters name different base models: {', '.join(bases)}")
    config = dict(configs[0])
    saved = [c["modules_to_save"] for c in configs if isinstance(c.get("modules_to_save"), list)]
    if saved:
        names = [name for part in saved if isinstance(part, list) for name in part]
        config["modules_to_save"] = list(dict.fromkeys(n for n in names if isinstance(n, str)))
    return config, tuple(warnings)
