"""What a verification reads: two checkpoints and a base, each with its dialect, and one set of names for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..arithmetic import numerics
from ..arithmetic.floats import Bits, Numbers
from ..axes import Expr, evaluate
from ..conversion.repository import Input, open_input
from ..dialects.adapter import Adapter, Content, Dialect, Facts, Json
from ..errors import MappingError, UsageError
from ..families import tables
from ..manifest import Manifest
from ..tensors import Source
from .choices import source_dialect
from .inspect import family_candidates
from .verify_report import ComparedFile


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """Everything a verification can be told.

    ``depths``: those asked for by name; where none is, *tensors* and *layers* if possible. ``model``: depth *model*
    too, which runs whole networks. ``facts`` say what the files do not;
    what a file, its config or its manifest says outranks them. ``seed``: of the random inputs and bases.
    """

    base: Path | None = None
    depths: tuple[str, ...] = ()
    model: bool = False
    source_dialect: str | None = None
    target_dialect: str | None = None
    family: str | None = None
    config: Path | None = None
    layout: Mapping[str, str] = field(default_factory=dict)
    mappings: Path | None = None
    facts: Facts = field(default_factory=Facts)
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Opened:
    """One checkpoint, read as its dialect; ``kept`` is its manifest where that describes it."""

    role: str
    given: Input
    dialect: Dialect
    kept: Manifest | None
    content: Content
    adapter: Adapter

    @property
    def source(self) -> Source:
        """The tensors."""
        return self.given.source

    @property
    def is_adapter(self) -> bool:
        """The checkpoint carries LoRA factors."""
        return bool(self.adapter.modules)

    def describe(self) -> ComparedFile:
        """Return what the report says about the file."""
        specs = self.source.specs.values()
        nbytes = sum(spec.nbytes for spec in specs)
        return ComparedFile(
            self.role, str(self.given.path), self.source.format, self.dialect.name, self.dialect.framework,
            len(specs), nbytes,
        )  # fmt: skip


def open_side(role: str, path: Path, options: VerifyOptions) -> Opened:
    """Open one checkpoint and read its headers; errors are those of a conversion of the same file."""
    given = open_input(path, config=options.config if role == "SRC" else None)
    try:
        kept = given.manifest if given.manifest is not None and given.manifest.describes(given.source.specs) else None
        facts = given.stated.then(kept.facts if kept else Facts()).then(options.facts)
        content = given.content(facts)
        chosen = {"SRC": options.source_dialect, "DST": options.target_dialect}.get(role)
        dialect = source_dialect(given, kept, facts, chosen)
        return Opened(role, given, dialect, kept, content, dialect.parse(content))
    except BaseException:
        given.source.close()
        raise


@dataclass(frozen=True, slots=True)
class Route:
    """The table that leads from one framework's names to the other's, with its sizes and layout."""

    family: str
    table: tables.Table | None
    layout: Mapping[str, str]
    sizes: Mapping[str, int] | None

    def carry(self, adapter: Adapter, origin: Dialect, goal: Dialect) -> Adapter:
        """Return an adapter or a whole model in the names of ``goal``'s framework; MappingError where one has none."""
        if self.table is None or origin.framework == goal.framework:
            return adapter
        to = "ms" if goal.framework == "mindspore" else "hf"
        return tables.map_adapter(self.table, adapter, to=to, sizes=self.sizes, layout=self.layout)  # type: ignore[arg-type]


def route(
    first: Opened, second: Opened, others: Sequence[Opened], kept: Manifest | None, options: VerifyOptions
) -> Route:  # fmt: skip
    """Choose the table between two files: as told, as the manifest of their conversion says, none where names agree,
    else the one that fits.

    Raises UsageError when several tables or none lead from the names of one file to those of the other.
    """
    everyone = (first, second, *others)
    if len({one.dialect.framework for one in everyone}) == 1:
        return Route("identity", None, {}, None)
    layout = dict(options.layout)
    if kept is not None and not layout:
        layout = {k.removeprefix("layout."): v for k, v in kept.options.items() if k.startswith("layout.")}
    config = next((one.given.model_config for one in everyone if one.given.model_config is not None), None)
    family = options.family or (kept.options.get("family") if kept is not None else None)
    if family is not None:
        return _route(family, layout, config, options)
    if first.dialect.framework == second.dialect.framework or _agree(first, second):
        return _route("identity", layout, config, options)
    return _fitting(first, second, layout, config, options)


def _route(family: str, layout: Mapping[str, str], config: Json | None, options: VerifyOptions) -> Route:
    known = tables.load_tables(options.mappings)
    if family not in known:
        raise MappingError(
            f"no table for the family {family!r}",
            where=f"known families: {', '.join(sorted(known))}",
            hint="pick one with --family, or give your own table with --mappings DIR",
        )
    table = known[family]
    told = tables.layout_from_config(table, config) if config else {}
    sizes = tables.sizes_from_config(table, config) if config else None
    return Route(family, table, {**told, **layout}, sizes)


def _agree(first: Opened, second: Opened) -> bool:
    """Say whether names correspond as they are; a whole model has the modules of an adapter and more."""
    mine, theirs = _names(first.adapter, second), _names(second.adapter, first)
    return mine == theirs or (first.is_adapter != second.is_adapter and mine <= theirs)


def _names(adapter: Adapter, other: Opened) -> set[str]:
    """Return module paths, or the parameters' names where both checkpoints are whole models."""
    if adapter.modules:
        return {module.path for module in adapter.modules}
    return {extra.path if other.is_adapter else extra.name for extra in adapter.extras}


def _fitting(
    first: Opened, second: Opened, layout: Mapping[str, str], config: Json | None, options: VerifyOptions
) -> Route:
    """Try the tables that know the first file's names; take the one that gives most of the second file's."""
    wanted = _names(second.adapter, first)
    reasons: list[str] = []
    scores: list[tuple[int, Route]] = []
    for family in family_candidates(first.given, first.dialect, mappings=options.mappings):
        found = _route(family, layout, config, options)
        try:
            common = wanted & _names(found.carry(first.adapter, first.dialect, second.dialect), second)
        except (MappingError, UsageError) as error:
            reasons.append(f"{family}: {error.problem} ({error.hint})" if error.hint else f"{family}: {error.problem}")
            continue
        if common:
            scores.append((len(common), found))
    best = [found for score, found in scores if score == max(score for score, _ in scores)]
    if len(best) == 1:
        return best[0]
    if not best and wanted & _names(first.adapter, second):
        return _route("identity", layout, config, options)  # some names agree: the comparison lists those that do not
    raise UsageError(
        "several tables lead from SRC's names to DST's" if best else "no table leads from SRC's names to DST's",
        where=[found.family for found in best] or reasons or [next(iter(sorted(_names(first.adapter, second))), "")],
        hint="choose one with --family NAME; `lorabridge tables list` shows them",
    )


def bits_of(expr: Expr, source: Source) -> Bits:
    """Return the bits of an expression over a file, C-contiguous."""

    def read(name: str) -> Bits:
        return source.read(name)

    return np.ascontiguousarray(evaluate(expr, read, numerics.kernels("", numerics.Notes(), {}))).reshape(expr.shape)


def numbers_of(expr: Expr, source: Source) -> Numbers:
    """Return the values of an expression over a file as float64, exactly; MappingError for types without arithmetic."""
    try:
        return numerics.values(bits_of(expr, source), expr.dtype)
    except ValueError as error:
        raise MappingError(f"factors cannot be compared: {error}", where=str(source.path)) from error
