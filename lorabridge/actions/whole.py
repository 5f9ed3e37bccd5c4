"""Write every tensor of a checkpoint under the name it has: into one file, or into shards with an index."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from .. import formats
from ..axes import read
from ..conversion import engines, execute, plan
from ..conversion.accounts import Numeric
from ..conversion.engines import Engine, Work
from ..conversion.repository import Framework, Input, files_of, plan_output, run_identity
from ..conversion.shares import InputOpener
from ..distributed.assembled import Assembled
from ..errors import OutputError, UsageError
from ..files.fsio import Staging, require_space
from ..files.placeholders import spoken
from ..files.uploading import staged
from ..formats.shardsink import ShardedSink
from ..tensors import Sink, Source
from .convert_report import ConvertReport

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class WholeOptions:
    """How a checkpoint is written; see ``lorabridge reassemble --help``.

    ``container``: of a directory's files. ``strategies`` and ``step``: what the source was opened with, for an
    ``engine`` that opens it again elsewhere.
    """

    max_shard_size: int | None = None
    crc: bool = False
    check_replicas: bool = True
    workers: int = 0
    dry_run: bool = False
    overwrite: bool = False
    strategies: tuple[Path, ...] = ()
    step: str | None = None
    engine: Engine = field(default_factory=Engine)
    container: Literal["mindspore", "safetensors"] | None = None


def _plan(source: Source) -> plan.Plan:
    return plan.build(source.specs, [(name, read(spec)) for name, spec in source.specs.items()], seed="whole")


def framework_of_source(given: Input) -> Framework:
    """Return the framework whose names an input has, by its container and what its metadata say."""
    source = given.source
    return "mindspore" if source.format == "mindspore" or source.metadata.get("format") == "ms" else "torch"


def write_whole(
    given: Input, target: Path | str, options: WholeOptions, *, progress: Progress | None, started: float
) -> ConvertReport:
    """Write an open input, training state and all; nothing is renamed, interpreted or left out.

    All or nothing. ``started``: of the clock ``time.perf_counter``. Raises what opening and writing raise.
    """
    framework = framework_of_source(given)
    output = plan_output(target, framework=framework, adapter=False)
    if options.container is not None:
        suffix = ".ckpt" if options.container == "mindspore" else ".safetensors"
        output = replace(output, file=f"model{suffix}", format=options.container)
    place, source = output.target.resolve(), given.path.resolve()
    if place == source or source in place.parents:
        raise OutputError("the output lies on or inside the input", where=str(target), hint="write elsewhere")
    if options.max_shard_size is not None and not output.directory:
        raise UsageError("--max-shard-size needs a directory", where=str(target), hint="end DST with a slash")
    options.engine.check()
    planned = _plan(given.source)
    if not options.dry_run:
        if options.check_replicas and isinstance(given.source, Assembled):
            given.source.check_replicas()
        require_space(output.target.parent, planned.nbytes + (planned.nbytes >> 6))
        said = f"{output.format} {options.max_shard_size} {options.crc}"
        digest = run_identity([planned.digest, said], files_of(given.source))
        with staged(
            output.target.absolute(), digest=digest, overwrite=options.overwrite, directory=output.directory
        ) as staging:
            sink = formats.make_sink(
                output.format, staging.create, output.file, max_shard_size=options.max_shard_size,
                flavour="ms" if framework == "mindspore" else "hf", crc=options.crc,
            )  # fmt: skip
            opener = InputOpener.of(given.path, options.strategies, options.step)
            engines.run(
                _left(planned, sink, staging), given.source, sink, engine=options.engine, arithmetic=Numeric(),
                work=Work(opener, staging.path, output.format),
                metadata={"format": "ms" if framework == "mindspore" else "pt"},
                workers=options.workers, progress=progress,
            )  # fmt: skip
            staging.commit()
    return _report(
        given, spoken(str(output.target)), output.format, framework, planned, options, time.perf_counter() - started
    )


def _left(planned: plan.Plan, sink: Sink, staging: Staging) -> plan.Plan:
    """Return what is to be written yet: all, or what a killed run's finished shards do not hold."""
    if not isinstance(sink, ShardedSink):
        return planned
    done = sink.resume(planned.specs, staging.finished)
    specs = tuple(spec for spec in planned.specs if spec.name not in done)
    steps = tuple(step for step in planned.steps if any(name not in done for name, _ in step.writes))
    return replace(planned, specs=specs, steps=steps)


def _report(
    given: Input, target: str, format: str, framework: Framework, planned: plan.Plan, options: WholeOptions,
    seconds: float,
) -> ConvertReport:  # fmt: skip
    dialect = "ms" if framework == "mindspore" else "hf"
    return ConvertReport(
        source=spoken(str(given.path)),
        target=target,
        source_format=given.source.format,
        target_format=format,
        source_dialect=dialect,
        target_dialect=dialect,
        family="identity",
        modules=(),
        tensors=len(planned.specs),
        tensors_read=len(planned.specs),
        nbytes=planned.nbytes,
        steps=len(planned.steps),
        peak_bytes=planned.peak_bytes(options.workers or execute.default_workers()),
        seconds=seconds,
        left_out=tuple(getattr(given.source, "skipped", ())),
        unselected=(),
        not_carried=tuple(path.name for path in given.companions),
        warnings=(),
        notes=given.source.arrangement.notes if isinstance(given.source, Assembled) else (),
        rounding=(),
        compressed=(),
        digest=planned.digest,
        dry_run=options.dry_run,
    )
