"""Merge adapters into a base model: one pass, one rounding, a complete model directory."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import __version__, formats, manifest
from ..arithmetic import numerics
from ..axes import Expr, computes, reads
from ..conversion import execute, plan
from ..conversion.forward import Forward, Settings, dialect_named, forward
from ..conversion.repository import MODEL_CONFIG, Output, framework_of, plan_output
from ..dialects.adapter import Adapter, Content, Dialect, Facts, Written
from ..errors import MappingError, OutputError, UsageError
from ..files.fsio import Staging, require_space
from ..joined import Joined, prefixed
from ..merging.kernel import Merger, Seen
from ..merging.planning import Merged
from ..merging.planning import merge as merge_headers
from . import merge_inputs
from .companions import carried_files
from .merge_inputs import MERGED_KEY, MergeOptions, Opened
from .merge_report import MergedRow, MergeReport, overall

__all__ = ["MergeOptions", "merge", "plan_merge"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class MergeJob:
    """A merge that is planned and not yet run."""

    given: Opened
    merged: Merged
    goal: Dialect
    output: Output
    plan: plan.Plan
    notes: tuple[str, ...]
    shard_size: int | None


Watch = Callable[[MergeJob], tuple[Seen, Callable[[], None]]]


@dataclass(frozen=True, slots=True)
class _Model:
    """A model that was made, in the place of the dialect that would read one."""

    name: str
    framework: str
    model: Adapter = field(repr=False)

    def detect(self, content: Content) -> str | None:
        """Claim nothing."""
        return None

    def parse(self, content: Content) -> Adapter:
        """Return the model."""
        return self.model

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Write nothing: the model is only read."""
        raise NotImplementedError


def merge(
    base: Path | str, adapters: Sequence[Path | str], target: Path | str, options: MergeOptions | None = None, *,
    progress: Progress | None = None, watch: Watch | None = None,
) -> MergeReport:  # fmt: skip
    """Merge adapters into ``base``, write the model to ``target`` and return what was done.

    ``watch`` is called with the plan; it returns what is called with every block of every merged weight, before and
    after (see ``merger.Seen``), and what is called before the model is published. All or nothing: on any error nothing
    appears at the target. Raises InputError (malformed input), MappingError (a module that does not land, results that
    are not finite, a merged base), OutputError, StorageError, UsageError.
    """
    started = time.perf_counter()
    options = options or MergeOptions()
    with merge_inputs.opened(Path(base), [Path(adapter) for adapter in adapters], options) as given:
        job = plan_merge(given, target, options)
        seen, before_commit = (None, None) if watch is None or options.dry_run else watch(job)
        merger, notes = Merger(seen), numerics.Notes()
        carried, stay = carried_files(given.base, [one.path for one in given.adapters], job.output.directory)
        if not options.dry_run:
            _run(job, options, merger, notes, carried, progress, before_commit)
        changes = merger.changes
        total = overall(changes)
        warnings = list(job.merged.warnings)
        if total.odd:
            odd = [name for name, change in changes.items() if change.odd]
            warnings.append(f"{total.odd} weights were not finite and are kept as they are, first in {odd[0]}")
        return MergeReport(
            base=str(given.base.path),
            adapters=tuple(str(one.path) for one in given.adapters),
            target=str(job.output.target),
            target_format=job.output.format,
            target_dialect=job.goal.name,
            merged=job.merged.parameters,
            replaced=job.merged.replaced,
            tensors=len(job.plan.specs),
            nbytes=job.plan.nbytes,
            seconds=time.perf_counter() - started,
            rows=tuple(MergedRow.of(name, change) for name, change in changes.items()),
            vanished=total.vanished / max(1, total.reached),
            error=total.error,
            left_out=tuple(job.plan.unused),
            carried=tuple(sorted(path.name for path in carried)),
            not_carried=tuple(path.name for path in stay),
            warnings=tuple(warnings),
            notes=job.notes,
            digest=job.plan.digest,
            dry_run=options.dry_run,
        )


def plan_merge(given: Opened, target: Path | str, options: MergeOptions) -> MergeJob:
    """Decide everything from headers: where each module lands, the target's names, the steps."""
    base = prefixed(given.origin.parse(given.base.content()), merge_inputs.BASE, given.base.source.specs)
    merged = merge_headers(
        base, merge_inputs.additions(given, base, options), config=given.base.model_config, exact=options.exact,
        residual_base=options.residual_base,
    )  # fmt: skip
    goal = _goal(given.origin, target, options)
    output = plan_output(target, framework=goal.framework, adapter=False)
    _check_place(given, output, options)
    made = _forward(given, merged, goal, options)
    _check_ties(given, made)
    planned = plan.build(given.joined.specs, made.outputs, made.unused, seed=f"merge {goal.name}")
    size = options.max_shard_size
    if size is None and output.directory and output.format == "safetensors":
        size = _shard_size(given)
    return MergeJob(given, merged, goal, output, planned, (*merged.notes, *made.notes), size)


def _goal(origin: Dialect, target: Path | str, options: MergeOptions) -> Dialect:
    decided = framework_of(target)
    if options.target_dialect:
        goal = dialect_named(options.target_dialect)
        if goal.name not in ("hf", "ms"):
            raise UsageError("a merged model is no adapter", where=goal.name, hint="choose --to hf or --to ms")
        if decided is not None and decided != goal.framework:
            raise UsageError(f"{goal.name!r} models are {goal.framework} files", where=str(target), hint="change one")
        return goal
    if decided is None or decided == origin.framework:
        return origin
    return dialect_named("ms" if decided == "mindspore" else "hf")


def _forward(given: Opened, merged: Merged, goal: Dialect, options: MergeOptions) -> Forward:
    """Carry the merged model to the target's names."""
    origin = _Model(given.origin.name, given.origin.framework, merged.model)
    if goal.framework != given.origin.framework and options.family is None:
        raise UsageError(
            "a full model needs a family table to be renamed",
            hint="pass --family NAME, or --family identity to keep every name",
        )
    content = Content(given.joined.specs, {"container": given.base.source.format}, None, Facts(), str(given.base.path))
    settings = Settings(
        family=options.family or "identity",
        layout=options.layout if goal.framework != given.origin.framework else {},
        mappings=options.mappings,
        model_config=merged.config,
    )
    return forward(content, origin, goal, settings)  # type: ignore[arg-type]


def _check_ties(given: Opened, made: Forward) -> None:
    """Refuse a target that ties what the merge, or the base itself, does not."""
    values = {extra.name: extra.value for extra in made.adapter.extras}
    written = {name for value in values.values() if computes(value) for name in _reads_weight(value)}
    apart = []
    for name, other in made.ties:
        merged = name in written or other in written
        if merged or not _same_bits(given.joined, name, other):
            apart.append(f"{name.partition('/')[2]} differs from {other.partition('/')[2]}")
    if apart:
        raise MappingError(
            "a head that the target ties to the embedding is not tied after the merge",
            where=apart,
            hint="write the names of the base's own framework, whose config can untie them",
        )


def _same_bits(source: Joined, name: str, other: str) -> bool:
    first, second = source.specs[name], source.specs[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    count = first.shape[0]
    step = max(1, (16 << 20) * count // max(1, first.nbytes))
    spans = [(i, min(i + step, count)) for i in range(0, count, step)]
    return all(source.read(name, span).tobytes() == source.read(other, span).tobytes() for span in spans)


def _reads_weight(value: Expr) -> list[str]:
    return [name for name in reads(value) if name.startswith(f"{merge_inputs.BASE}/")]


def _check_place(given: Opened, output: Output, options: MergeOptions) -> None:
    target = output.target.resolve()
    for one in (given.base, *given.adapters):
        source = one.path.resolve()
        if target == source or source in target.parents:
            raise OutputError("the output lies on or inside an input", where=str(output.target), hint="write elsewhere")
    if options.max_shard_size is not None and not output.directory:
        raise UsageError("--max-shard-size needs a directory", where=str(output.target), hint="end OUT with a slash")


def _shard_size(given: Opened) -> int | None:
    """Return the size of the base's own shards, rounded up to MB; None where it is one file."""
    sizes: dict[Path, int] = {}
    for name, spec in given.base.source.specs.items():
        for path in {extent.path for extent in given.base.source.extents(name)}:
            sizes[path] = sizes.get(path, 0) + spec.nbytes
    return -(-max(sizes.values()) // 10**6) * 10**6 if len(sizes) > 1 else None


def _run(
    job: MergeJob, options: MergeOptions, merger: Merger, notes: numerics.Notes, carried: Mapping[Path, bytes],
    progress: Progress | None, before_commit: Callable[[], None] | None,
) -> None:  # fmt: skip
    output = job.output
    sidecar = None if output.directory else manifest.sidecar(output.target)
    if sidecar is not None and sidecar.exists() and not options.overwrite:
        raise OutputError("the output's manifest exists", where=str(sidecar), hint="move it away or pass --overwrite")
    require_space(output.target.parent, job.plan.nbytes + (job.plan.nbytes >> 6))
    record = _record(job, options)
    digest = _identity(job)
    with Staging(output.target, digest=digest, overwrite=options.overwrite, directory=output.directory) as staging:
        sink = formats.make_sink(
            output.format, staging.create, output.file, max_shard_size=job.shard_size,
            flavour="ms" if job.goal.framework == "mindspore" else "hf", crc=options.crc,
        )  # fmt: skip
        execute.run(
            job.plan, job.given.joined, sink,
            kernels=lambda name: {**numerics.kernels(name, notes, {}), **merger.kernels()},
            metadata={"format": "ms" if job.goal.framework == "mindspore" else "pt", MERGED_KEY: record},
            workers=options.workers or min(8, len(os.sched_getaffinity(0))), progress=progress,
        )  # fmt: skip
        _check_finite(merger)
        files = {path.name: raw for path, raw in carried.items()}
        if output.directory and job.goal.name == "hf" and job.merged.config is not None:
            files[MODEL_CONFIG] = (json.dumps(dict(job.merged.config), indent=2, sort_keys=True) + "\n").encode()
        said = {"schema": manifest.FACTS_SCHEMA, "merged": True}
        files["lorabridge.json" if sidecar is None else sidecar.name] = json.dumps(said).encode()
        for name, raw in files.items():
            file = staging.create(name)
            file.write(0, raw)
            file.close()
        if before_commit is not None:
            before_commit()
        staging.commit()


def _check_finite(merger: Merger) -> None:
    broken = {name: change.broken for name, change in merger.changes.items() if change.broken}
    if broken:
        raise MappingError(
            f"{sum(broken.values())} merged weights are not finite or do not fit their type",
            where=[f"{name}: {count}" for name, count in broken.items()],
            hint="check the adapter's factors and alpha with `lorabridge inspect`",
        )


def _record(job: MergeJob, options: MergeOptions) -> str:
    """Say in the container's metadata what was merged."""
    weights = options.weights or (1.0,) * len(job.given.adapters)
    rows = [
        {"adapter": one.path.name, "weight": weight, "tensors": len(one.source.specs)}
        for one, weight in zip(job.given.adapters, weights, strict=True)
    ]
    return json.dumps({"version": __version__, "base": job.given.base.path.name, "adapters": rows}, sort_keys=True)


def _identity(job: MergeJob) -> str:
    """Return a digest of everything that decides the output: the plan, and which source files there are now."""
    digest = hashlib.sha256(job.plan.digest.encode())
    paths = {e.path for name in job.given.joined.specs for e in job.given.joined.extents(name)}
    for path in sorted(paths | {one.source.path for one in (job.given.base, *job.given.adapters)}):
        status = path.stat()
        digest.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()
