"""Convert an adapter or a whole checkpoint into another container, dialect and family of names."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import __version__, formats, manifest
from ..arithmetic import numerics
from ..axes import Expr, reads
from ..conversion import engines, execute, plan, wayback
from ..conversion.accounts import Numeric
from ..conversion.forward import BASE_NAME, Forward, forward, options_text
from ..conversion.repository import ADAPTER_CONFIG, MODEL_CONFIG, Input, files_of, open_input, run_identity
from ..conversion.shares import InputOpener
from ..dialects import CONFIGURED, PIPELINES
from ..dialects.adapter import CARRIED, DIRECTORY, TITLE, Facts, Json, LoraModule
from ..dialects.deltas import COUNTERPARTS
from ..dialects.diffusers_write import METADATA
from ..dialects.mindformers_config import config_files
from ..distributed.assembled import Assembled
from ..errors import MappingError, OutputError, UsageError
from ..files.fsio import require_space
from ..files.placeholders import spoken
from ..files.uploading import staged
from ..formats.encrypted import Encryption
from ..tensors import marks
from . import compress, returning
from .choices import Choice, ConvertOptions, choose, encryption, settings_for
from .convert_report import ConvertReport, ModuleRow, RoundingRow

Progress = Callable[[int, int], None]
SHOWN = 4
"""How many of the tensors that are not restored a warning names."""
DIGEST_LIMIT = 1 << 30
"""Outputs up to this many bytes get per-tensor digests in their manifest; larger models would wait for them."""


@dataclass(frozen=True, slots=True)
class Job:
    """A conversion that is planned and not yet run; ``stated``: what the restored source does not say itself."""

    choice: Choice
    plan: plan.Plan
    metadata: Mapping[str, str]
    config: Json | None
    manifest: manifest.Manifest | None
    residues: Mapping[str, bytes]
    modules: tuple[ModuleRow, ...]
    compressed: tuple[compress.CompressedRow, ...]
    unselected: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)
    stated: Facts = field(default_factory=Facts)


def convert(
    source: Path | str, target: Path | str, options: ConvertOptions | None = None, *, progress: Progress | None = None
) -> ConvertReport:
    """Convert ``source`` to ``target`` and return what was done.

    All or nothing: on any error nothing appears at the target. Raises InputError (malformed source), MappingError
    (a tensor or a property has no place in the target), OutputError (the target exists), StorageError, UsageError.
    """
    started = time.perf_counter()
    options = options or ConvertOptions()
    given = open_input(Path(source), config=options.config, strategies=options.strategies, step=options.step)
    try:
        return convert_opened(given, target, options, progress=progress, started=started)
    finally:
        given.source.close()


def convert_opened(
    given: Input, target: Path | str, options: ConvertOptions, *, progress: Progress | None, started: float
) -> ConvertReport:
    """Convert what is open already; see :func:`convert`. ``started``: of the clock ``time.perf_counter``."""
    sealed = encryption(options)
    options.engine.check()
    job = plan_conversion(given, target, options)
    notes = numerics.Notes()
    if not options.dry_run:
        run(job, given, options, notes, progress, sealed)
    return _report(job, given, options, notes, time.perf_counter() - started)


def plan_conversion(given: Input, target: Path | str, options: ConvertOptions) -> Job:
    """Decide dialects, names and steps from headers alone."""
    choice = choose(given, target, options)
    undone = returning.steps(options, choice)
    if undone:
        other = returning.contradiction(given, options, undone)
        back = wayback.WayBack((), False, other, {})
        if not other:
            back = returning.way(given.source, undone, mappings=options.mappings)
        if back.exact:
            return _with_base(_return_job(given, choice, undone[-1], back), options)
        reason = f"not restored from the manifest: {back.reason}; read as any {choice.origin.name} file instead"
        choice = replace(choice, warnings=(*choice.warnings, reason))
        try:
            return _forward_job(given, choice, options)
        except MappingError as error:
            raise MappingError(error.problem, where=(reason, *error.where), hint=error.hint) from error
    return _forward_job(given, choice, options)


def _return_job(given: Input, choice: Choice, kept: manifest.Manifest, back: wayback.WayBack) -> Job:
    used = {name for _, expr in back.outputs for name in reads(expr)}
    copies = [(name, "a copy, confirmed equal") for name in given.source.specs if name not in used]
    planned = plan.build(given.source.specs, back.outputs, copies, seed=wayback.seed(choice.goal.name))
    restored = {name for name, _ in back.outputs}
    absent = [spec.name for spec in kept.source.specs if spec.name not in restored]
    warnings = choice.warnings
    if absent:
        some = ", ".join(absent[:SHOWN]) + (" ..." if len(absent) > SHOWN else "")
        said = f"{len(absent)} tensors were left out on the way here and are not restored: {some}"
        warnings = (*warnings, said)
    same_container = choice.output.format == kept.source.format
    metadata = dict(kept.source.metadata) if same_container else marks(kept.source.metadata)
    config = wayback.restored_config(kept)
    record = returning.record_of(kept, planned, choice, config)
    return Job(
        choice=choice,
        plan=planned,
        metadata={**metadata, **_manifest_within(choice, kept.earlier and record)},
        config=config,
        manifest=record,
        stated=kept.stated,
        residues=back.residues,
        modules=(),
        compressed=(),
        unselected=(),
        warnings=warnings,
        notes=("restored bit for bit from the manifest",),
        files=config_files(config) if choice.goal.framework == "mindspore" else {},
    )


def _with_base(job: Job, options: ConvertOptions) -> Job:
    """Let what is restored call its base as the options do; UsageError where it has no place for the name."""
    if options.base_name is None:
        return job
    if not job.config or BASE_NAME not in job.config:
        raise UsageError(
            "what is restored has no place for the base model's name", where=f"--base-name {options.base_name}",
            hint="leave --base-name out",
        )  # fmt: skip
    return replace(job, config={**job.config, BASE_NAME: options.base_name})


def _forward_job(given: Input, choice: Choice, options: ConvertOptions) -> Job:
    content = given.content(choice.facts)
    settings = settings_for(given, choice, options)
    whole: Sequence[LoraModule] = ()
    if options.compress:
        found, whole = compress.ranks(options.compress, content, choice.origin, choice.goal, settings, given.source)
        settings = replace(settings, compress=found)
    made = forward(content, choice.origin, choice.goal, settings)
    _check_ties(given, made.ties)
    _check_metadata(choice, made)
    unused = [*made.unused, *((name, "not selected") for name in made.unselected)]
    planned = plan.build(content.specs, made.outputs, unused, seed=wayback.seed(choice.goal.name))
    record = _record(given, choice, made, planned, options_text(settings))
    if choice.kept is not None and not options.facts.entries and choice.origin.name == choice.goal.name:
        record = returning.continued(choice.kept, planned, choice.output) or record
    notes = [*made.notes, *(given.source.arrangement.notes if isinstance(given.source, Assembled) else ())]
    if choice.crosses and choice.family is None and choice.goal.name not in PIPELINES:
        notes.append(
            "module paths are unchanged; --family gives another project's names (lorabridge inspect names tables)"
        )
    if choice.goal.name == "peft" and choice.output.directory and not (made.config or {}).get(BASE_NAME):
        notes.append("adapter_config.json names no base model: --base-name fills it in, which publishing needs")
    return Job(
        choice=choice,
        plan=planned,
        metadata={**made.metadata, **_container_metadata(given, choice, record)},
        config=made.config,
        manifest=record,
        residues={},
        modules=tuple(ModuleRow.of(module) for module in made.modules),
        compressed=compress.measured(whole, made.adapter.modules, given.source),
        unselected=made.unselected,
        warnings=(*choice.warnings, *made.adapter.warnings),
        notes=tuple(notes),
        files=made.files,
    )


def _record(
    given: Input, choice: Choice, made: Forward, planned: plan.Plan, options: Mapping[str, str]
) -> manifest.Manifest:  # fmt: skip
    """Describe the conversion for the way back."""
    source = manifest.Side(
        given.source.format,
        choice.origin.name,
        given.source.path.name,
        tuple(given.source.specs.values()),
        {k: v for k, v in given.source.metadata.items() if k != manifest.METADATA_KEY},
        given.adapter_config,
    )
    target = manifest.Side(choice.output.format, choice.goal.name, choice.output.file, planned.specs, {}, made.config)
    return manifest.Manifest(
        __version__, source, target, options, choice.facts, choice.chosen, made.facts, planned.digest,
        model_config=given.model_config,
        earlier=choice.kept if choice.origin.framework == choice.goal.framework else None,
    )  # fmt: skip


def _container_metadata(given: Input, choice: Choice, record: manifest.Manifest) -> dict[str, str]:
    """Return what the container says beside the tensors; a lone safetensors file also carries its manifest there."""
    ours = choice.goal.framework == "mindspore" and choice.goal.name != "mindone-peft"  # peft in torch loads it as well
    return {"format": "ms" if ours else "pt", **marks(given.source.metadata), **_manifest_within(choice, record)}


def _manifest_within(choice: Choice, record: manifest.Manifest | None) -> dict[str, str]:
    if record is None or choice.output.format != "safetensors" or choice.output.directory:
        return {}
    return {manifest.METADATA_KEY: manifest.dumps(record, data=False, indent=None)}


def _check_metadata(choice: Choice, made: Forward) -> None:
    """Refuse to lose what a dialect says in safetensors metadata only."""
    if METADATA in made.metadata and choice.output.format != "safetensors":
        raise MappingError(
            "alpha would be in the metadata of a safetensors file, and this container has none",
            where=str(choice.output.target),
            hint="write .safetensors, or multiply alpha into the factors with --alpha-in weights",
        )


def _check_ties(given: Input, ties: Sequence[tuple[str, str]]) -> None:
    """Compare what a table leaves out as tied with what it must equal, bit for bit."""
    apart = [f"{name} differs from {other}" for name, other in ties if not _same_bits(given, name, other)]
    if apart:
        raise MappingError(
            "a head that the target ties to the embedding is not tied in the source",
            where=apart,
            hint="the target's network has no parameter for it; leave it out with --exclude if that is what you want",
        )


def _same_bits(given: Input, name: str, other: str) -> bool:
    specs = given.source.specs[name], given.source.specs[other]
    if (specs[0].dtype, specs[0].shape) != (specs[1].dtype, specs[1].shape):
        return False
    count = specs[0].shape[0] if specs[0].shape else 1
    step = max(1, (16 << 20) * count // max(1, specs[0].nbytes))
    spans = [(i, min(i + step, count)) for i in range(0, count, step)] if specs[0].shape else [None]
    return all(given.source.read(name, s).tobytes() == given.source.read(other, s).tobytes() for s in spans)


def run(
    job: Job, given: Input, options: ConvertOptions, notes: numerics.Notes, progress: Progress | None,
    sealed: Encryption | None = None,
) -> None:  # fmt: skip
    """Execute a planned conversion and publish its files together."""
    output = job.choice.output
    sidecar = None if output.directory else manifest.sidecar(output.target)
    if sidecar is not None and sidecar.exists() and not output.target.exists() and not options.overwrite:
        raise OutputError("the output's manifest exists", where=str(sidecar), hint="move it away or pass --overwrite")
    _check_stored_checksums(given)
    if options.check_replicas and isinstance(given.source, Assembled):
        given.source.check_replicas()
    require_space(output.target.parent, job.plan.nbytes + (job.plan.nbytes >> 6))
    keys = {name: wayback.residue_key(expr) for name, expr in _named(job.plan)} if job.residues else {}
    opener = InputOpener.of(given.path, options.strategies, options.step)
    with staged(
        output.target,
        digest=_identity(given, job.plan, sealed),
        overwrite=options.overwrite,
        directory=output.directory,
    ) as staging:
        sink = formats.make_sink(
            output.format, staging.create, output.file, max_shard_size=options.max_shard_size,
            flavour="ms" if job.choice.goal.framework == "mindspore" else "hf", crc=options.crc,
            encryption=sealed,
        )  # fmt: skip
        outcome = engines.run(
            job.plan, given.source, sink, engine=options.engine,
            work=engines.Work(opener, staging.path, output.format), arithmetic=Numeric(notes, job.residues, keys),
            metadata=job.metadata, workers=options.workers, progress=progress,
            digests=job.manifest is not None and job.plan.nbytes <= DIGEST_LIMIT and _is_adapter(job),
        )  # fmt: skip
        companions = _companions(job, given, outcome.digests, notes)
        for name, text in companions.items():
            file = staging.create(name)
            file.write(0, text.encode())
            file.close()
        if sidecar is not None and sidecar.name not in companions:
            staging.drop(sidecar.name)
        staging.commit()


def _is_adapter(job: Job) -> bool:
    return bool(job.modules) or job.choice.goal.name in COUNTERPARTS


def _check_stored_checksums(given: Input) -> None:
    """Check the CRC trailer that a .ckpt may carry; refuse a file that does not agree with its own."""
    if getattr(given.source, "crc", None) is not None:
        from ..formats import msckpt

        msckpt.check_crc(given.source.path)


def _identity(given: Input, planned: plan.Plan, sealed: Encryption | None) -> str:
    """Return a digest of everything that decides the output: plan, key, and which source files there are now."""
    key = [f"{sealed.mode} {sealed.key.fingerprint()}"] if sealed is not None else []
    return run_identity([planned.digest, *key], files_of(given.source) | {given.source.path})


def _named(planned: plan.Plan) -> list[tuple[str, Expr]]:
    return list(planned.outputs().items())


def _companions(
    job: Job, given: Input, digests: Mapping[str, str], notes: numerics.Notes
) -> dict[str, str]:  # fmt: skip
    """Return the files that are published with the weights, by name: configs in a directory, the manifest."""
    files = {}
    if job.choice.output.directory and job.config is not None and job.choice.goal.name in CONFIGURED:
        files[ADAPTER_CONFIG] = json.dumps(dict(job.config), indent=2, sort_keys=True)
    if job.choice.output.directory:
        files |= {name: _placed(text, job.choice.output.target) for name, text in job.files.items()}
    if job.choice.output.directory and job.choice.goal.name == "hf" and given.model_config is not None:
        files[MODEL_CONFIG] = json.dumps(_model_config(job, given.model_config), indent=2, sort_keys=True) + "\n"
    if job.manifest is not None:
        kept = job.manifest
        record = replace(kept, digests=digests or kept.digests, residues={**kept.residues, **notes.residues})
        beside = record.residues or manifest.METADATA_KEY not in job.metadata
        if job.choice.output.directory:
            files["lorabridge.json"] = manifest.dumps(record)
        elif beside:
            files[manifest.sidecar(Path(job.choice.output.file)).name] = manifest.dumps(record)
    elif job.stated.entries:
        sidecar = (
            "lorabridge.json" if job.choice.output.directory else manifest.sidecar(Path(job.choice.output.file)).name
        )
        files[sidecar] = manifest.facts_text(job.stated)
    return files


def _model_config(job: Job, config: Json) -> dict[str, object]:
    """Return a model's config for what is written: no float8 quantization where no weight is float8."""
    said = config.get("quantization_config")
    float8 = any(expr.dtype.name.startswith("float8") for expr in job.plan.outputs().values())
    widened = isinstance(said, Mapping) and said.get("quant_method") == "fp8" and not float8
    return {key: value for key, value in config.items() if not (widened and key == "quantization_config")}


def _placed(text: str, target: Path) -> str:
    """Fill in where the output directory lies."""
    place = target.resolve()
    for token, value in ((DIRECTORY, str(place)), (TITLE, place.name)):
        text = text.replace(token, json.dumps(value, ensure_ascii=False)[1:-1])
    return text


def _left_out(job: Job) -> tuple[tuple[str, str], ...]:
    unselected = set(job.unselected)
    return tuple(row for row in job.plan.unused if row[0] not in unselected and row[1] != CARRIED)


def _encryption_notes(given: Input, options: ConvertOptions) -> tuple[str, ...]:
    if options.encrypt:
        return ("the manifest beside is not encrypted: it holds names, shapes, settings and digests",)
    if getattr(given.source, "encryption", ""):
        return ("the source is encrypted and the output is not; --encrypt MODE encrypts a .ckpt",)
    return ()


def _report(
    job: Job, given: Input, options: ConvertOptions, notes: numerics.Notes, seconds: float
) -> ConvertReport:  # fmt: skip
    return ConvertReport(
        source=spoken(str(given.path)),
        target=spoken(str(job.choice.output.target)),
        source_format=given.source.format,
        target_format=job.choice.output.format,
        source_dialect=job.choice.origin.name,
        target_dialect=job.choice.goal.name,
        family=job.choice.family or "identity",
        modules=job.modules,
        tensors=len(job.plan.specs),
        tensors_read=len({name for _, expr in _named(job.plan) for name in reads(expr)}),
        nbytes=job.plan.nbytes,
        steps=len(job.plan.steps),
        peak_bytes=job.plan.peak_bytes(options.workers or execute.default_workers()),
        seconds=seconds,
        left_out=(*_left_out(job), *getattr(given.source, "skipped", ())),
        unselected=job.unselected,
        not_carried=tuple(path.name for path in given.companions),
        warnings=job.warnings,
        notes=(*job.notes, *_encryption_notes(given, options)),
        rounding=RoundingRow.rows(notes),
        compressed=job.compressed,
        digest=job.plan.digest,
        dry_run=options.dry_run,
    )
