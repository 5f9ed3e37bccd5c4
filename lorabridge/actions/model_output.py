"""Write a whole model that was computed: its names, its place, and everything or nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from .. import formats, manifest
from ..conversion import engines, plan
from ..conversion.accounts import Arithmetic
from ..conversion.forward import Forward, Settings, dialect_named, forward
from ..conversion.repository import MODEL_CONFIG, Output, files_of, framework_of, plan_output, run_identity
from ..conversion.shares import InputOpener, JoinedOpener
from ..dialects.adapter import Adapter, Content, Dialect, Facts, Json, Written
from ..errors import MappingError, OutputError, UsageError
from ..files.fsio import require_space
from ..files.uploading import staged
from ..merging.kernel import Merger
from ..merging.planning import Merged
from .inspect import family_candidates
from .merge_inputs import BASE, MergeOptions, Opened

Progress = Callable[[int, int], None]


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


class Described(TypedDict):
    """What reports say about a model that is written: where and as what, how much of it, what stays out."""

    target: str
    target_format: str
    target_dialect: str
    tensors: int
    nbytes: int
    left_out: tuple[tuple[str, str], ...]
    digest: str


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What is to be written where, planned and not yet run.

    ``goal``: the names it gets; ``config``: the model's config.json; ``metadata``: what the container is to say;
    ``record``: the manifest of a model that holds an adapter; ``carried``: files beside the weights with their bytes;
    ``resumable``: plan and inputs decide every byte, so that a killed run can be taken up.
    """

    given: Opened
    goal: Dialect
    output: Output
    plan: plan.Plan
    notes: tuple[str, ...]
    shard_size: int | None
    config: Json | None
    metadata: Mapping[str, str]
    record: manifest.Manifest | None = None
    carried: Mapping[Path, bytes] = field(default_factory=dict)
    resumable: bool = False

    def described(self) -> Described:
        """Return what every report says about it."""
        return {
            "target": str(self.output.target),
            "target_format": self.output.format,
            "target_dialect": self.goal.name,
            "tensors": len(self.plan.specs),
            "nbytes": self.plan.nbytes,
            "left_out": tuple(self.plan.unused),
            "digest": self.plan.digest,
        }


def goal_of(origin: Dialect, target: Path | str, options: MergeOptions) -> Dialect:
    """Return whose names a model gets: as told, else the base's own, else those of the target's container."""
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


def place_of(given: Opened, goal: Dialect, target: Path | str, options: MergeOptions) -> tuple[Output, int | None]:
    """Return where a model goes and how large its shards are; OutputError on or inside an input."""
    output = plan_output(target, framework=goal.framework, adapter=False)
    place = output.target.resolve()
    for one in (given.base, *given.adapters):
        source = one.path.resolve()
        if place == source or source in place.parents:
            raise OutputError("the output lies on or inside an input", where=str(output.target), hint="write elsewhere")
    if options.max_shard_size is not None and not output.directory:
        raise UsageError("--max-shard-size needs a directory", where=str(output.target), hint="end OUT with a slash")
    size = options.max_shard_size
    if size is None and output.directory and output.format == "safetensors":
        size = _shard_size(given)
    return output, size


def _shard_size(given: Opened) -> int | None:
    """Return the size of the base's own shards, rounded up to MB; None where it is one file."""
    sizes: dict[Path, int] = {}
    for name, spec in given.base.source.specs.items():
        for path in {extent.path for extent in given.base.source.extents(name)}:
            sizes[path] = sizes.get(path, 0) + spec.nbytes
    return -(-max(sizes.values()) // 10**6) * 10**6 if len(sizes) > 1 else None


def renamed(given: Opened, merged: Merged, goal: Dialect, options: MergeOptions) -> Forward:
    """Carry a model that is expressions over the inputs to the names of ``goal``."""
    origin = _Model(given.origin.name, given.origin.framework, merged.model)
    if goal.framework != given.origin.framework and options.family is None:
        raise UsageError(
            "a full model needs a family table to be renamed",
            where=f"fitting families: {', '.join(family_candidates(given.base, given.origin)) or 'none'}",
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


def check_finite(merger: Merger) -> None:
    """Raise MappingError where merged weights are not finite, or do not fit their type, that were so before."""
    broken = {name: change.broken for name, change in merger.changes.items() if change.broken}
    if broken:
        raise MappingError(
            f"{sum(broken.values())} merged weights are not finite or do not fit their type",
            where=[f"{name}: {count}" for name, count in broken.items()],
            hint="check the adapter's factors and alpha with `lorabridge inspect`",
        )


def write(
    model: ModelOutput, options: MergeOptions, arithmetic: Arithmetic, before_commit: Callable[[], None],
    progress: Progress | None,
) -> None:  # fmt: skip
    """Write a planned model; ``before_commit`` may still refuse it."""
    output, framework = model.output, model.goal.framework
    sidecar = None if output.directory else manifest.sidecar(output.target)
    if sidecar is not None and sidecar.exists() and not options.overwrite:
        raise OutputError("the output's manifest exists", where=str(sidecar), hint="move it away or pass --overwrite")
    require_space(output.target.parent, model.plan.nbytes + (model.plan.nbytes >> 6))
    files = _beside(model)
    given = (model.given.base, *model.given.adapters)
    opener = JoinedOpener(
        tuple((label, InputOpener.of(one.path)) for label, one in zip((BASE, *model.given.labels), given, strict=True))
    )
    with staged(
        output.target, digest=_identity(model), overwrite=options.overwrite, directory=output.directory
    ) as staging:
        sink = formats.make_sink(
            output.format, staging.create, output.file, max_shard_size=model.shard_size,
            flavour="ms" if framework == "mindspore" else "hf", crc=options.crc,
        )  # fmt: skip
        engines.run(
            model.plan, model.given.joined, sink, engine=options.engine,
            work=engines.Work(opener, staging.path, output.format), arithmetic=arithmetic,
            metadata={"format": "ms" if framework == "mindspore" else "pt", **model.metadata},
            workers=options.workers, progress=progress,
        )  # fmt: skip
        for name, raw in files.items():
            file = staging.create(name)
            file.write(0, raw)
            file.close()
        if sidecar is not None and sidecar.name not in files:
            staging.drop(sidecar.name)
        before_commit()
        staging.commit()


def _beside(model: ModelOutput) -> dict[str, bytes]:
    """Return the files that are published with the weights, by name."""
    files = {path.name: raw for path, raw in model.carried.items()}
    if model.output.directory and model.goal.name == "hf" and model.config is not None:
        files[MODEL_CONFIG] = (json.dumps(dict(model.config), indent=2, sort_keys=True) + "\n").encode()
    if model.record is not None:
        name = "lorabridge.json" if model.output.directory else manifest.sidecar(model.output.target).name
        files[name] = manifest.dumps(model.record).encode()
    return files


def _identity(model: ModelOutput) -> str:
    """Return a digest of everything that decides the output: the plan, and which source files there are now.

    What an undo file restores depends on files that are checked while it runs: such a run is like no other.
    """
    if not model.resumable:
        return hashlib.sha256(model.plan.digest.encode() + os.urandom(16)).hexdigest()
    said = [f"{key} {text}" for key, text in sorted(model.metadata.items())]
    sources = [one.source for one in (model.given.base, *model.given.adapters)]
    files = {path for source in sources for path in (source.path, *files_of(source))}
    return run_identity([model.plan.digest, *said], files)
