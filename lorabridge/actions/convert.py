"""Convert an adapter or a whole checkpoint into another container, dialect and family of names."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import __version__, dialects, execute, formats, manifest, numerics, plan, wayback
from ..axes import Expr, reads
from ..dialects.adapter import Dialect, Facts, Json
from ..dtypes import ALIASES, BY_NAME, DType
from ..errors import MappingError, OutputError, UsageError
from ..forward import Settings, dialect_named, forward, options_text
from ..fsio import Staging, require_space
from ..repository import ADAPTER_CONFIG, MODEL_CONFIG, Framework, Input, Output, framework_of, open_input, plan_output
from ..selection import Selection
from . import compress
from .convert_report import ConvertReport, ModuleRow, RoundingRow

Progress = Callable[[int, int], None]
DIGEST_LIMIT = 1 << 30
"""Outputs up to this many bytes get per-tensor digests in their manifest; larger models would wait for them."""


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """Everything a conversion can be told; see ``lorabridge convert --help`` for the meaning of each."""

    source_dialect: str | None = None
    target_dialect: str | None = None
    family: str | None = None
    config: Path | None = None
    layout: Mapping[str, str] = field(default_factory=dict)
    mappings: Path | None = None
    facts: Facts = Facts()
    dtype: str | None = None
    on_overflow: str = "error"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: str | None = None
    compress: str | None = None
    adapter_only: bool = False
    max_shard_size: int | None = None
    crc: bool = False
    workers: int = 0
    dry_run: bool = False
    overwrite: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion that is planned and not yet run."""

    source_dialect: Dialect
    target_dialect: Dialect
    family: str
    output: Output
    plan: plan.Plan
    metadata: Mapping[str, str]
    config: Json | None
    manifest: manifest.Manifest | None
    residues: Mapping[str, bytes]
    modules: tuple[ModuleRow, ...]
    unselected: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def convert(
    source: Path | str, target: Path | str, options: ConvertOptions = ConvertOptions(), *, progress: Progress | None = None
) -> ConvertReport:  # fmt: skip
    """Convert ``source`` to ``target`` and return what was done.

    All or nothing: on any error nothing appears at the target. Raises InputError (malformed source), MappingError
    (a tensor or a property has no place in the target), OutputError (the target exists), StorageError, UsageError.
    """
    started = time.perf_counter()
    given = open_input(Path(source), config=options.config)
    try:
        job = plan_conversion(given, target, options)
        notes = numerics.Notes()
        if not options.dry_run:
            run(job, given, options, notes, progress)
        return _report(job, given, options, notes, time.perf_counter() - started)
    finally:
        given.source.close()


def plan_conversion(given: Input, target: Path | str, options: ConvertOptions) -> Job:
    """Decide dialects, names and steps from headers alone."""
    kept = given.manifest if given.manifest is not None and given.manifest.describes(given.source.specs) else None
    warnings = (
        [] if kept is not None or given.manifest is None else ["the manifest beside describes other tensors: ignored"]
    )
    facts = options.facts.then(given.stated).then(kept.facts if kept else Facts())
    content = given.content(facts)
    origin = _source_dialect(given, kept, facts, options)
    goal = _target_dialect(origin, kept, Path(target), options)
    family = options.family or (kept.options.get("family") if kept and origin.framework != goal.framework else None)
    output = plan_output(Path(target) if not str(target).endswith("/") else target, framework=goal.framework,
                         adapter=goal.name not in ("hf", "ms"))  # fmt: skip
    if str(target).endswith("/"):
        output = replace(output, target=Path(target))
    if options.max_shard_size is not None and not output.directory:
        raise UsageError("--max-shard-size needs a directory", where=str(target), hint="end DST with a slash")
    _check_places(given, output)
    if kept is not None and goal.name == kept.source.dialect and _returns(options, kept, family):
        back = wayback.way_back(given.source, kept, mappings=options.mappings)
        if back.exact:
            return _return_job(given, kept, back, origin, goal, output, tuple(warnings))
        warnings.append(f"not restored from the manifest: {back.reason}; read as any {origin.name} file instead")
    settings = _settings(given, options, family, kept)
    if origin.framework != goal.framework and family is None and goal.name in ("hf", "ms"):
        raise UsageError(
            "a full model needs a family table to be renamed",
            where=f"fitting families: {', '.join(_families(given, origin, options)) or 'none'}",
            hint="pass --family NAME, or --family identity to keep every name",
        )
    if options.compress:
        settings = replace(settings, compress=compress.ranks(options.compress, content, origin, goal, settings,
                                                             given.source))  # fmt: skip
    made = forward(content, origin, goal, settings)
    unused = [*made.unused, *((name, "not selected") for name in made.unselected)]
    planned = plan.build(content.specs, made.outputs, unused, seed=wayback.seed(goal.name))
    target_side = manifest.Side(output.format, goal.name, output.file, planned.specs, {}, made.config)
    source_side = manifest.Side(given.source.format, origin.name, given.source.path.name,
                                tuple(content.specs.values()), _own_metadata(given), content.config)  # fmt: skip
    record = manifest.Manifest(__version__, source_side, target_side, options_text(settings), facts, options.facts,
                               made.facts, planned.digest, model_config=given.model_config)  # fmt: skip
    notes = list(made.notes)
    if origin.framework != goal.framework and family is None:
        fitting = [name for name in _families(given, origin, options) if name != "identity"]
        notes += [f"module paths are unchanged; --family {name} gives MindFormers' names" for name in fitting[:1]]
    return Job(
        origin, goal, settings.family, output, planned, _container_metadata(goal, output, record), made.config, record,
        {}, tuple(ModuleRow.of(module) for module in made.adapter.modules), made.unselected,
        (*warnings, *made.adapter.warnings), tuple(notes),
    )  # fmt: skip


def _source_dialect(given: Input, kept: manifest.Manifest | None, facts: Facts, options: ConvertOptions) -> Dialect:
    if options.source_dialect:
        return dialect_named(options.source_dialect)
    if kept is not None:
        return dialect_named(kept.target.dialect)
    found = dialects.detect(given.content(facts))
    if len(found) > 1:
        raise MappingError(
            "the file fits several dialects",
            where=[f"{name}: {why}" for name, why in found],
            hint="choose one with --from",
        )
    if found:
        return dialect_named(found[0][0])
    mindspore = given.source.format == "mindspore" or given.source.metadata.get("format") == "ms"
    return dialect_named("ms" if mindspore else "hf")


def _target_dialect(
    origin: Dialect, kept: manifest.Manifest | None, target: Path, options: ConvertOptions
) -> Dialect:  # fmt: skip
    if options.target_dialect:
        goal = dialect_named(options.target_dialect)
        decided = framework_of(target)
        if decided is not None and decided != goal.framework:
            raise UsageError(
                f"dialect {goal.name!r} is spelled in {goal.framework} files",
                where=str(target),
                hint="give the target another suffix, or choose another dialect with --to",
            )
        return goal
    framework: Framework = framework_of(target) or ("torch" if origin.framework == "mindspore" else "mindspore")
    if kept is not None and dialect_named(kept.source.dialect).framework == framework:
        return dialect_named(kept.source.dialect)
    if origin.framework == framework:
        return origin
    if origin.name in ("hf", "ms"):
        return dialect_named("ms" if framework == "mindspore" else "hf")
    return dialect_named("loralib-ms" if framework == "mindspore" else "peft")


def _returns(options: ConvertOptions, kept: manifest.Manifest, family: str | None) -> bool:
    """Say whether nothing is asked for that the plain return to the manifest's source would not do."""
    asks = (options.dtype, options.include, options.exclude, options.layers, options.compress, options.adapter_only,
            options.facts.entries, options.config)  # fmt: skip
    return not any(asks) and family in (None, kept.options.get("family", "identity"))


def _return_job(
    given: Input, kept: manifest.Manifest, back: wayback.WayBack, origin: Dialect, goal: Dialect, output: Output,
    warnings: tuple[str, ...],
) -> Job:  # fmt: skip
    used = {name for _, expr in back.outputs for name in reads(expr)}
    copies = [(name, "a copy, confirmed equal") for name in given.source.specs if name not in used]
    planned = plan.build(given.source.specs, back.outputs, copies, seed=wayback.seed(goal.name))
    metadata = dict(kept.source.metadata) if output.format == kept.source.format else {}
    restored = {name for name, _ in back.outputs}
    absent = [spec.name for spec in kept.source.specs if spec.name not in restored]
    if absent:
        warnings += (f"{len(absent)} tensors were left out on the way here and are not restored: {', '.join(absent)}",)
    return Job(origin, goal, kept.options.get("family", "identity"), output, planned, metadata, kept.source.config, None,
               back.residues, (), (), warnings, ("restored bit for bit from the manifest",))  # fmt: skip


def _settings(given: Input, options: ConvertOptions, family: str | None, kept: manifest.Manifest | None) -> Settings:
    layout = dict(options.layout)
    if kept is not None and not layout:
        layout = {k.removeprefix("layout."): v for k, v in kept.options.items() if k.startswith("layout.")}
    return Settings(
        family=family or "identity",
        layout=layout,
        mappings=options.mappings,
        model_config=given.model_config,
        target_facts=options.facts,
        selection=Selection(options.include, options.exclude, options.layers),
        adapter_only=options.adapter_only,
        dtype=dtype_named(options.dtype) if options.dtype else None,
        on_overflow=options.on_overflow,
    )


def dtype_named(text: str) -> DType:
    """Return a floating-point type by its name or alias (fp16, bf16 ...)."""
    found = BY_NAME.get(ALIASES.get(text.lower(), text.lower()))
    if found is None or found.kind != "float":
        known = ", ".join(d.name for d in BY_NAME.values() if d.kind == "float")
        raise UsageError(f"unknown floating-point dtype {text!r}", hint=f"known: {known}")
    return found


def _families(given: Input, origin: Dialect, options: ConvertOptions) -> list[str]:
    from .inspect import family_candidates

    return family_candidates(given, origin, mappings=options.mappings)


def _own_metadata(given: Input) -> dict[str, str]:
    return {k: v for k, v in given.source.metadata.items() if k != manifest.METADATA_KEY}


def _container_metadata(goal: Dialect, output: Output, record: manifest.Manifest) -> dict[str, str]:
    """Return what a safetensors header says; a lone file also carries its manifest there."""
    metadata = {"format": "ms" if goal.framework == "mindspore" else "pt"}
    if output.format == "safetensors" and not output.directory:
        metadata[manifest.METADATA_KEY] = manifest.dumps(record, data=False, indent=None)
    return metadata


def _check_places(given: Input, output: Output) -> None:
    target, source = output.target.resolve(), given.path.resolve()
    if target == source or source in target.parents:
        raise OutputError("the output lies on or inside the input", where=str(output.target), hint="write elsewhere")


def run(job: Job, given: Input, options: ConvertOptions, notes: numerics.Notes, progress: Progress | None) -> None:
    """Execute a planned conversion and publish its files together."""
    output = job.output
    require_space(output.target.parent, job.plan.nbytes + (job.plan.nbytes >> 6))
    keys = {name: wayback.residue_key(expr) if job.residues else name for name, expr in _named(job.plan)}
    with Staging(
        output.target, digest=job.plan.digest, overwrite=options.overwrite, directory=output.directory
    ) as staging:
        sink = formats.make_sink(
            output.format, staging.create, output.file, max_shard_size=options.max_shard_size,
            flavour="ms" if job.target_dialect.framework == "mindspore" else "hf", crc=options.crc,
        )  # fmt: skip
        outcome = execute.run(
            job.plan, given.source, sink,
            kernels=lambda name: numerics.kernels(keys[name], notes, job.residues),
            metadata=job.metadata, workers=options.workers or _workers(), progress=progress,
            digests=job.manifest is not None and job.plan.nbytes <= DIGEST_LIMIT and bool(job.modules),
        )  # fmt: skip
        for name, text in _companions(job, given, outcome.digests, notes):
            file = staging.create(name)
            file.write(0, text.encode())
            file.close()
        staging.commit()


def _workers() -> int:
    return min(8, len(os.sched_getaffinity(0)))


def _named(planned: plan.Plan) -> list[tuple[str, Expr]]:
    return list(planned.outputs().items())


def _companions(
    job: Job, given: Input, digests: Mapping[str, str], notes: numerics.Notes
) -> list[tuple[str, str]]:  # fmt: skip
    """Return the files that are published with the weights: configs in a directory, the manifest."""
    files = []
    if job.output.directory and job.config is not None and job.target_dialect.name == "peft":
        files.append((ADAPTER_CONFIG, json.dumps(dict(job.config), indent=2, sort_keys=True)))
    if job.output.directory and job.target_dialect.name == "hf" and given.model_config is not None:
        files.append((MODEL_CONFIG, json.dumps(dict(given.model_config), indent=2, sort_keys=True) + "\n"))
    if job.manifest is not None:
        record = replace(job.manifest, digests=digests, residues=notes.residues)
        beside = job.output.format != "safetensors" or record.residues
        if job.output.directory:
            files.append(("lorabridge.json", manifest.dumps(record)))
        elif beside:
            files.append((manifest.sidecar(Path(job.output.file)).name, manifest.dumps(record)))
    return files


def _report(
    job: Job, given: Input, options: ConvertOptions, notes: numerics.Notes, seconds: float
) -> ConvertReport:  # fmt: skip
    return ConvertReport(
        source=str(given.path),
        target=str(job.output.target),
        source_format=given.source.format,
        target_format=job.output.format,
        source_dialect=job.source_dialect.name,
        target_dialect=job.target_dialect.name,
        family=job.family,
        modules=job.modules,
        tensors=len(job.plan.specs),
        tensors_read=len({name for _, expr in _named(job.plan) for name in reads(expr)}),
        nbytes=job.plan.nbytes,
        steps=len(job.plan.steps),
        peak_bytes=job.plan.peak_bytes(options.workers or _workers()),
        seconds=seconds,
        left_out=tuple(row for row in job.plan.unused if row[0] not in set(job.unselected)),
        unselected=job.unselected,
        not_carried=tuple(path.name for path in given.companions),
        warnings=job.warnings,
        notes=job.notes,
        rounding=RoundingRow.rows(notes),
        digest=job.plan.digest,
        dry_run=options.dry_run,
    )
