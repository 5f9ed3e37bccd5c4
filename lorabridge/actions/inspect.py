"""Look at a checkpoint: what it is, what its adapter is made of, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .. import dialects, distributed, formats
from ..axes import Expr, ShapeError, reads
from ..conversion.forward import dialect_named
from ..conversion.repository import Input, open_input, weights_path
from ..dialects.adapter import CARRIED, Adapter, Content, Dialect, Extra, Fact, Facts, LoraModule
from ..dialects.deltas import deltas
from ..distributed.assembled import Assembled, disagreement
from ..distributed.placing import Findings
from ..errors import InputError, LorabridgeError, UsageError
from ..families import tables
from ..files.placeholders import spoken
from ..manifest import METADATA_KEY, Manifest
from ..tensors import Source, TensorSpec
from .inspect_pairs import loose_pairs
from .inspect_ranks import RanksReport, ranks_report
from .inspect_report import InspectedModule, InspectReport, Pair, Problem, TensorRow
from .inspect_values import Progress, Selected, with_values

UNSTATED = Facts()
UNKNOWN_ALPHA = 0.577215664901532860
"""Stands in for an alpha that nothing states, so that everything else can still be shown."""


def inspect(
    path: Path | str,
    *,
    config: Path | None = None,
    norms: bool = False,
    module: str | None = None,
    facts: Facts = UNSTATED,
    dialect: str | None = None,
    mappings: Path | None = None,
    strategies: Sequence[Path] = (),
    step: str | None = None,
    slices: str | None = None,
    check_replicas: bool = False,
    progress: Progress | None = None,
) -> InspectReport:
    """Describe a checkpoint from its headers, without failing on what is wrong with it.

    What a conversion would refuse becomes a problem in the report. ``norms`` reads the factors and adds norms;
    ``module`` (a path or a glob) adds the values of the factors of these modules. ``facts`` and ``dialect`` say what
    the file does not. A directory that ranks wrote is described even where they do not make up one checkpoint;
    ``strategies`` and ``step`` are about it, ``slices`` (a name or a glob) lists who holds which slice of these
    tensors, and ``check_replicas`` reads every copy and compares it. Raises InputError only where the file itself
    cannot be read, UsageError where ``module``, ``slices`` or
    ``dialect`` names nothing.
    """
    problems: list[Problem] = []
    given, findings = _open(Path(path), config, problems, strategies, step)
    try:
        ranks = _ranks(given, findings, problems, slices=slices, compare=check_replicas)
        told = problems if given.source.specs or not findings.broken else []  # that nothing is whole is said already
        guess = _guess(given, facts.then(given.stated), dialect, told)
        adapter = _parse(guess.origin, guess.content, told)
        modules = tuple(_row(m) for m in adapter.modules) if adapter else loose_pairs(guess.content.specs)
        read = _factors(adapter, modules, guess.content.specs)
        modules, factors, wrong = with_values(
            given.source, modules, read, norms=norms, module=module, progress=progress
        )
        families = _families(given, guess.origin, adapter, "", mappings)
        found = _describe(given, guess, adapter, modules, (*problems, *wrong))
        return replace(found, families=tuple(families), factors=factors, ranks=ranks)
    finally:
        given.source.close()


def family_candidates(
    given: Input, origin: Dialect, *, project: str = "", mappings: Path | None = None
) -> list[str]:  # fmt: skip
    """Return the family tables that know every name of a checkpoint, those for its config's model_type first.

    Tables lead between Hugging Face's names and MindSpore's, or those of a ``project`` of ``dialects.NAMES``. A
    checkpoint that cannot be parsed as ``origin`` has none. An InputError names a malformed table in ``mappings``.
    """
    facts = given.stated.then(given.manifest.facts) if given.manifest is not None else given.stated
    adapter = _parse(origin, given.content(facts), [])
    return _families(given, origin, adapter, project, mappings)


def _families(
    given: Input, origin: Dialect, adapter: Adapter | None, project: str, mappings: Path | None
) -> list[str]:  # fmt: skip
    if adapter is None:
        return []
    own = dialects.naming(origin)
    project = project or (own if own not in ("hf", "ms") else "")
    known = tables.load_tables(mappings)
    names = [*(module.path for module in adapter.modules), *(extra.name for extra in adapter.extras)]
    known = {family: table for family, table in known.items() if dialects.project_of(family) == project}
    fitting = tables.detect_family(known, names, "hf" if own == "hf" else "ms")
    model_type = (given.model_config or {}).get("model_type")
    return sorted(fitting, key=lambda family: model_type not in known[family].model_types)


def _open(
    path: Path, config: Path | None, problems: list[Problem], strategies: Sequence[Path], step: str | None
) -> tuple[Input, Findings]:
    """Open an input; a broken config or manifest beside readable weights becomes a problem, as do ranks' gaps."""
    findings = Findings()
    try:
        return open_input(path, config=config, strategies=strategies, step=step), findings
    except InputError as error:
        source: Source | None = distributed.open_distributed(path, strategies=strategies, step=step, findings=findings)
        if source is None:
            source = formats.open_source(weights_path(path))
        problems.extend(map(Problem.of, findings.errors or [error]))
        return Input(path, source, None, None, "", None, UNSTATED, ()), findings


def _ranks(
    given: Input, findings: Findings, problems: list[Problem], *, slices: str | None, compare: bool
) -> RanksReport | None:
    """Describe how a distributed checkpoint lies; None for any other."""
    if not isinstance(given.source, Assembled):
        if slices is not None or compare:
            raise UsageError(
                "slices and copies are asked for of what is no distributed checkpoint", where=str(given.path),
                hint="leave --slices and --check-replicas out",
            )  # fmt: skip
        return None
    apart = given.source.apart() if compare else None
    if apart:
        problems.append(Problem.of(disagreement(apart)))
    return ranks_report(given.source, findings.broken, select=slices, apart=apart)


@dataclass(frozen=True, slots=True)
class _Guess:
    """Which dialect a file is read in, why, which others claim it, and the manifest that describes it."""

    origin: Dialect
    name: str | None
    why: str
    candidates: tuple[tuple[str, str], ...]
    content: Content
    kept: Manifest | None


def _guess(given: Input, facts: Facts, dialect: str | None, problems: list[Problem]) -> _Guess:
    kept = given.manifest
    if kept is not None and not kept.describes(given.source.specs):
        problems.append(Problem("the manifest describes other tensors", hint="a conversion will ignore it"))
        kept = None
    content = given.content(facts.then(kept.facts) if kept is not None else facts)
    found = tuple(dialects.detect(content)) if kept is None else ()
    if not dialect and len(found) > 1:
        where = tuple(f"{name}: {why}" for name, why in found)
        problems.append(Problem("the file fits several dialects", where, "choose one with --from"))
    chosen = (dialect, "as you say") if dialect else (kept.target.dialect, "the manifest says so") if kept else None
    chosen = chosen or (found[0] if found else None)
    if chosen is None:
        return _Guess(_whole_model(given), None, "", found, content, kept)
    return _Guess(dialect_named(chosen[0]), *chosen, found, content, kept)


def _describe(
    given: Input,
    guess: _Guess,
    adapter: Adapter | None,
    modules: tuple[InspectedModule, ...],
    problems: tuple[Problem, ...],
) -> InspectReport:
    specs, kept = guess.content.specs, guess.kept
    contents = "adapter" if modules or (adapter and deltas(adapter)) else "model" if adapter else "unknown"
    return InspectReport(
        path=spoken(str(given.path)),
        format=given.source.format,
        contents=contents,
        dialect=guess.name or (guess.origin.name if contents == "model" else None),
        why=guess.why or ("no adapter's names" if contents == "model" else ""),
        candidates=guess.candidates,
        families=(),
        config_from=given.config_from,
        origin=_origin(kept) if kept else "",
        nbytes=sum(spec.nbytes for spec in specs.values()),
        dtypes=_dtypes(specs),
        tensors=tuple(_tensor(spec) for spec in specs.values()),
        modules=modules,
        extras=tuple(_extra(extra) for extra in adapter.extras) if adapter and contents == "adapter" else (),
        left_out=tuple(row for row in adapter.left_out if row[1] != CARRIED) if adapter else (),
        metadata=tuple((k, v) for k, v in given.source.metadata.items() if k != METADATA_KEY),
        not_carried=tuple(p.name for p in given.companions),
        warnings=adapter.warnings if adapter else (),
        problems=problems,
    )


def _whole_model(given: Input) -> Dialect:
    """Return the dialect of a file without adapter names: a model of the framework that wrote it."""
    mindspore = given.source.format == "mindspore" or given.source.metadata.get("format") == "ms"
    return dialect_named("ms" if mindspore else "hf")


def _parse(origin: Dialect, content: Content, problems: list[Problem]) -> Adapter | None:
    """Parse as a conversion would; where that fails, say why and parse what does not depend on alpha."""
    try:
        return origin.parse(content)
    except (LorabridgeError, ShapeError) as error:
        problems.append(Problem.of(error) if isinstance(error, LorabridgeError) else Problem(str(error)))
    stand_in = Facts((Fact("*", "alpha", UNKNOWN_ALPHA),))
    try:
        return origin.parse(replace(content, facts=content.facts.then(stand_in)))
    except (LorabridgeError, ShapeError):
        return None


def _row(module: LoraModule) -> InspectedModule:
    scaling = module.scaling
    known = scaling.alpha != UNKNOWN_ALPHA
    features = {
        "rslora": scaling.rslora,
        "dora": module.magnitude is not None,
        "lora_bias": module.lora_bias is not None,
        "fan_in_fan_out": bool(module.fan_in_fan_out),
        f"groups {module.groups}": module.groups != 1,
        f"{module.conv_form} factors": module.kind.startswith("conv"),
        module.weight: module.weight != "weight",
    }
    pairs = tuple(Pair(_expr(term.a), _expr(term.b), term.start, term.stop) for term in module.terms)
    return InspectedModule(
        module.path,
        module.kind,
        scaling.rank,
        scaling.alpha if known else None,
        scaling.value if known else None,
        pairs,
        tuple(name for name, on in features.items() if on),
    )


def _factors(
    adapter: Adapter | None, modules: tuple[InspectedModule, ...], specs: Mapping[str, TensorSpec]
) -> list[Selected]:
    """Return what to read for each module: its factors as expressions over the file."""
    if adapter is None:
        return [Selected.of_tensors(module, specs) for module in modules]
    return [Selected(tuple((t.a, t.b) for t in m.terms), m.groups, m.conv_form) for m in adapter.modules]


def _expr(expr: Expr) -> TensorRow:
    return TensorRow(" ".join(reads(expr)), expr.dtype.name, expr.shape)


def _extra(extra: Extra) -> TensorRow:
    return TensorRow(extra.name, extra.value.dtype.name, extra.value.shape, extra.kind)


def _tensor(spec: TensorSpec) -> TensorRow:
    return TensorRow(spec.name, spec.dtype.name, spec.shape)


def _origin(kept: Manifest) -> str:
    source = kept.source
    return source.file if kept.made else f"{source.file} ({source.dialect}, {source.format})"


def _dtypes(specs: Mapping[str, TensorSpec]) -> tuple[tuple[str, int, int], ...]:
    found: dict[str, tuple[int, int]] = {}
    for spec in specs.values():
        tensors, nbytes = found.get(spec.dtype.name, (0, 0))
        found[spec.dtype.name] = (tensors + 1, nbytes + spec.nbytes)
    return tuple((name, tensors, nbytes) for name, (tensors, nbytes) in found.items())
