"""Write an adapter that was computed rather than converted: dialect, plan, container, and everything or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import __version__, formats, manifest
from ..arithmetic import numerics
from ..axes import cast, reads
from ..conversion import execute, plan
from ..conversion.forward import dialect_named
from ..conversion.repository import ADAPTER_CONFIG, Output, framework_of, plan_output, run_identity
from ..dialects import CONFIGURED
from ..dialects.adapter import Adapter, Dialect, Fact, Facts, Json, LoraModule, Written
from ..dtypes import DType
from ..errors import OutputError, UsageError
from ..files.fsio import require_space
from ..files.uploading import staged
from ..names import natural_key
from ..tensors import Source

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Target:
    """Where and how an adapter is written."""

    output: Output
    dialect: Dialect
    overwrite: bool = False
    workers: int = 0


@dataclass(frozen=True, slots=True)
class Origin:
    """What an adapter was computed from, in words, and what names its modules have.

    ``family``, ``layout``, ``model_config``: of the table that leads to the other framework's names, where one was
    named. ``marks``: what the container is to say that travels with it.
    """

    words: str
    family: str | None = None
    layout: Mapping[str, str] = field(default_factory=dict)
    model_config: Json | None = None
    marks: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Package:
    """An adapter that is ready to be written: its plan, metadata, the files beside it, its modules and notes."""

    plan: plan.Plan
    metadata: Mapping[str, str]
    companions: Mapping[str, str]
    modules: tuple[LoraModule, ...]
    notes: tuple[str, ...]


def adapter_target(
    target: Path | str,
    inputs: Sequence[Path],
    *,
    default: Dialect,
    chosen: str | None = None,
    overwrite: bool = False,
    workers: int = 0,
) -> Target:
    """Decide dialect and place from the target's path.

    The suffix decides the framework where it names one; ``default`` is the dialect where it fits. UsageError where the
    dialect and the suffix contradict each other, OutputError where the target lies on or inside an input.
    """
    decided = framework_of(target)
    goal = dialect_named(chosen) if chosen else default
    if not chosen and decided not in (None, goal.framework):
        goal = dialect_named("loralib-ms" if decided == "mindspore" else "peft")
    if decided is not None and decided != goal.framework:
        raise UsageError(
            f"dialect {goal.name!r} is spelled in {goal.framework} files",
            where=str(target),
            hint="give the target another suffix, or choose another dialect with --to",
        )
    if goal.name in ("hf", "ms"):
        raise UsageError("the output is an adapter", where=f"--to {goal.name}", hint="choose an adapter dialect")
    output = plan_output(target, framework=goal.framework, adapter=True)
    if goal.name in CONFIGURED and not output.directory:
        raise UsageError(
            f"a {goal.name} adapter is a directory: its rank and alpha stand in adapter_config.json",
            where=str(target),
            hint="name a directory, for example one that ends in a slash, or choose another dialect with --to",
        )
    place = output.target.resolve()
    for path in inputs:
        if place == path.resolve() or path.resolve() in place.parents:
            raise OutputError("the output lies on or inside the input", where=str(target), hint="write elsewhere")
    return Target(output, goal, overwrite, workers)


def check_free(target: Target) -> None:
    """Raise OutputError where the target cannot be written, before any work is done for it."""
    names = [target.output.target]
    if not target.output.directory:
        names.append(manifest.sidecar(target.output.target))
    taken = [str(path) for path in names if path.exists()]
    if taken and not target.overwrite:
        raise OutputError("the output exists already", where=taken, hint="choose another name or pass --overwrite")


def pack(
    adapter: Adapter, source: Source, target: Target, origin: Origin, *, dtype: DType | None = None
) -> Package:  # fmt: skip
    """Spell an adapter over ``source`` in the target's dialect; ``dtype`` casts floating-point tensors, once.

    The package has a manifest, so that ``convert`` of the result needs no flags that were given here.

    Tensors of ``source`` that the adapter does not read are no concern of the package: who computed it accounts for
    them. MappingError for what the dialect cannot express.
    """
    table = Fact("*", "table", origin.family or "identity")
    written = target.dialect.write(adapter, Facts((table,)))
    rows = sorted(written.tensors, key=lambda row: natural_key(row[0]))
    outputs = [(n, cast(e, dtype) if dtype is not None and e.dtype.kind == "float" else e) for n, e in rows]
    used = {name for _, expr in outputs for name in reads(expr)}
    specs = {name: spec for name, spec in source.specs.items() if name in used}
    companions = {}
    if written.config is not None and target.dialect.name in CONFIGURED:
        companions[ADAPTER_CONFIG] = json.dumps(dict(written.config), indent=2, sort_keys=True)
    planned = plan.build(specs, outputs)
    record = manifest.dumps(_manifest(planned, written, target, origin))
    framework = target.dialect.framework
    metadata = {"format": "ms" if framework == "mindspore" else "pt", **origin.marks}
    if target.output.directory:
        companions["lorabridge.json"] = record
    elif target.output.format == "safetensors":
        metadata[manifest.METADATA_KEY] = record
    else:
        companions[manifest.sidecar(target.output.target).name] = record
    return Package(planned, metadata, companions, tuple(written.modules), tuple(written.notes))


def _manifest(planned: plan.Plan, written: Written, target: Target, origin: Origin) -> manifest.Manifest:
    """Describe an adapter that was computed."""
    other = "loralib-ms" if target.dialect.framework == "torch" else "peft"
    options = {f"layout.{key}": value for key, value in origin.layout.items()}
    if origin.family is not None:
        options["family"] = origin.family
    side = manifest.Side(
        target.output.format, target.dialect.name, target.output.file, planned.specs, {}, written.config
    )
    return manifest.Manifest(
        __version__, manifest.Side("", other, origin.words, ()), side, options, Facts(), Facts(), written.facts,
        planned.digest, model_config=origin.model_config,
    )  # fmt: skip


def publish(
    package: Package, source: Source, target: Target, *, content: str, progress: Progress | None = None
) -> None:  # fmt: skip
    """Write a package and make its files visible together.

    ``content``: a digest of what was computed, so that a killed run is taken up only by one of the same content.
    """
    output, framework = target.output, target.dialect.framework
    sidecar = None if output.directory else manifest.sidecar(output.target).name
    require_space(output.target.parent, package.plan.nbytes + (package.plan.nbytes >> 6))
    notes = numerics.Notes()
    with staged(
        output.target, digest=_identity(package, source, content), overwrite=target.overwrite,
        directory=output.directory,
    ) as staging:  # fmt: skip
        sink = formats.make_sink(
            output.format, staging.create, output.file, flavour="ms" if framework == "mindspore" else "hf"
        )
        execute.run(
            package.plan, source, sink, kernels=lambda name: numerics.kernels(name, notes, {}),
            metadata=package.metadata,
            workers=target.workers or execute.default_workers(), progress=progress,
        )  # fmt: skip
        for name, text in package.companions.items():
            file = staging.create(name)
            file.write(0, text.encode())
            file.close()
        if sidecar is not None and sidecar not in package.companions:
            staging.drop(sidecar)
        staging.commit()


def _identity(package: Package, source: Source, content: str) -> str:
    names = [name for step in package.plan.steps for name in step.reads]
    beside = [f"{name} {text}" for name, text in sorted({**package.metadata, **package.companions}.items())]
    files = {extent.path for name in names for extent in source.extents(name)}
    return run_identity([package.plan.digest, content, *beside], files)
