"""Cut a checkpoint for other ranks: MindSpore's rank directories along a strategy, or the shards of one checkpoint."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from .. import formats
from ..axes import Expr, read
from ..conversion import engines, plan
from ..conversion.accounts import Numeric
from ..conversion.engines import Engine, Work
from ..conversion.repository import Input, files_of, open_input, run_identity
from ..conversion.shares import InputOpener
from ..distributed.assembled import Assembled
from ..distributed.dcpsink import DcpSink, chunks
from ..distributed.layout import Layout, slices_of
from ..distributed.parallel import Sizes, strategies
from ..distributed.ranksink import RanksSink
from ..distributed.strategy import folded, read_strategy, write_strategy
from ..errors import MappingError, OutputError, UsageError, counted
from ..files.fsio import require_space
from ..files.placeholders import output_path
from ..files.uploading import staged
from ..formats.shardsink import split
from ..formats.untrusted import shown
from ..tensors import Sink, TensorSpec
from .convert_report import ConvertReport
from .whole import WholeOptions, write_whole

Progress = Callable[[int, int], None]
_FOLDERS = r"rank_\d+|strategy"
"""What an older output of the same kind holds."""
Stages = Mapping[int, Mapping[str, Layout]]


@dataclass(frozen=True, slots=True)
class ReshardOptions:
    """What a checkpoint is cut into; see ``lorabridge reshard --help``.

    ``strategies``, ``step``: about the source. ``to``: strategy files of the target; without them ``sizes`` and
    ``cuts`` make one. ``format``: container of the files; where None the ranks' get the source's. ``dcp``: write
    PyTorch's distributed checkpoint for so many ranks instead.
    """

    strategies: tuple[Path, ...] = ()
    step: str | None = None
    to: tuple[Path, ...] = ()
    sizes: Sizes | None = None
    cuts: tuple[tuple[str, int | None], ...] = ()
    format: Literal["mindspore", "safetensors"] | None = None
    dcp: int | None = None
    check_replicas: bool = True
    workers: int = 0
    dry_run: bool = False
    overwrite: bool = False
    engine: Engine = field(default_factory=Engine)


@dataclass(frozen=True, slots=True)
class ReshardReport:
    """One resharding, done or (``dry_run``) planned. ``nbytes``: of all files' tensors, replicas included."""

    source: str
    target: str
    format: str
    ranks: int
    stages: int
    tensors: int
    replicated: tuple[str, ...]
    nbytes: int
    seconds: float
    notes: tuple[str, ...]
    dry_run: bool

    def as_json(self) -> dict[str, object]:
        """Return the JSON document of ``lorabridge reshard --json``."""
        return {"schema": "lorabridge/reshard/1", **asdict(self)}

    def summary(self) -> str:
        """Return one line: what went where."""
        done = "would cut" if self.dry_run else "cut"
        into = f"{counted(self.ranks, 'rank')} in {counted(self.stages, 'stage')}"
        return f"{done} {counted(self.tensors, 'tensor')} into {into} ({self.format}) at {self.target}"


def reshard(
    source: Path | str, target: Path | str, options: ReshardOptions, *, progress: Progress | None = None
) -> ReshardReport:
    """Cut ``source``, whole or distributed, into rank directories ``target/rank_<r>`` and return what was done.

    ``target/strategy`` gets the strategy of every stage. A tensor that the strategy does not list must have one element
    and goes to every rank. With ``options.dcp`` the target is a DCP directory, every tensor cut by rows. All or
    nothing. Raises MappingError for tensors that do not fit the strategy, and whatever opening and writing raise.
    """
    started = time.perf_counter()
    given = open_input(Path(source), strategies=options.strategies, step=options.step)
    try:
        options.engine.check()
        planned, stages, whole = _plan(given, options)
        if not options.dry_run:
            _write(given, Path(output_path(target)), planned, stages, options, progress)
        devices = next((layout.devices for layouts in stages.values() for layout in layouts.values()), options.dcp or 0)
        notes = given.source.arrangement.notes if isinstance(given.source, Assembled) else ()
        return ReshardReport(
            source=str(source),
            target=str(target),
            format="torch DCP" if options.dcp else _format(given, options),
            ranks=devices * max(1, len(stages)),
            stages=max(1, len(stages)),
            tensors=len(given.source.specs),
            replicated=whole,
            nbytes=planned.nbytes,
            seconds=time.perf_counter() - started,
            notes=notes,
            dry_run=options.dry_run,
        )
    finally:
        given.source.close()


def _plan(given: Input, options: ReshardOptions) -> tuple[plan.Plan, Stages, tuple[str, ...]]:
    """Return the plan, the target's layouts, and the names of what every rank holds."""
    stages: Stages = {}
    whole: tuple[str, ...] = ()
    specs = dict(sorted(given.source.specs.items(), key=_numbered))  # stages leave tensors in another order
    if options.dcp is not None:
        outputs = chunks(specs, _dcp_ranks(options))
    else:
        stages = _stages(given, specs, options)
        outputs, whole = _cut(specs, stages)
    return plan.build(given.source.specs, outputs, seed="reshard"), stages, whole


def _numbered(item: tuple[str, object]) -> list[tuple[int, str]]:
    """Return what sorts names by the numbers in them: layer 2 before layer 10."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d{1,18})", item[0])]


def _dcp_ranks(options: ReshardOptions) -> int:
    if options.to or options.sizes is not None or options.cuts or options.format is not None or (options.dcp or 0) < 1:
        raise UsageError(
            "a DCP checkpoint is cut by rows, and by nothing else", hint="give the number of its ranks alone: --dcp N"
        )
    return options.dcp or 1


def _format(given: Input, options: ReshardOptions) -> str:
    return options.format or (
        given.source.format if given.source.format in ("mindspore", "safetensors") else "mindspore"
    )


def _stages(
    given: Input, specs: Mapping[str, TensorSpec], options: ReshardOptions
) -> dict[int, dict[str, Layout]]:  # fmt: skip
    """Return the layouts of the target's stages, as told or made from sizes, fitted to the tensors."""
    if bool(options.to) == (options.sizes is not None):
        raise UsageError(
            "the target's layout is not said" if not options.to else "the target's layout is said twice",
            hint="give --strategy NEW, or sizes: --tp, --pp, --opt-shard",
        )
    if options.sizes is not None:
        placed = given.source.arrangement.placed if isinstance(given.source, Assembled) else {}
        known = {name: p.layout for name, p in placed.items() if p.layout is not None}
        return strategies(specs, options.sizes, options.cuts, known)
    found: dict[int, dict[str, Layout]] = {}
    problems = []
    for stage, layouts in read_strategy(options.to).stages.items():
        found[stage] = {}
        for name, layout in layouts.items():
            if name not in specs:
                continue
            shape = specs[name].shape
            fits = folded(layout, shape)
            if fits is None:
                problems.append(f"{shown(name)}: shape {list(shape)} cannot be cut as the strategy says")
            else:
                found[stage][name] = fits
    if problems:
        raise MappingError("the strategy does not fit the tensors", where=problems, hint="take that of the same model")
    if not any(found.values()):
        raise MappingError(
            "the strategy lists none of the tensors",
            where=", ".join(map(str, options.to)),
            hint="take the strategy of the network that will load the ranks",
        )
    return found


def _cut(specs: Mapping[str, TensorSpec], stages: Stages) -> tuple[list[tuple[str, Expr]], tuple[str, ...]]:
    """Return every rank's slices as ``rank_<r>/<name>``, and the names of what every rank holds."""
    listed = {name for layouts in stages.values() for name in layouts}
    large = [name for name, spec in specs.items() if name not in listed and spec.size != 1]
    if large:
        raise MappingError(
            "the strategy does not list these tensors",
            where=[f"{shown(name)} {list(specs[name].shape)}" for name in large],
            hint="save the strategy with all parameters, not the trainable ones only; or leave the tensors out",
        )
    whole = tuple(name for name in specs if name not in listed)
    devices = next(layout.devices for layouts in stages.values() for layout in layouts.values())
    outputs: list[tuple[str, Expr]] = []
    for number, stage in enumerate(sorted(stages)):
        held: dict[str, Sequence[Expr]] = {}
        for name, spec in specs.items():
            if name in stages[stage]:
                held[name] = slices_of(read(spec), stages[stage][name])
            elif name not in listed:
                held[name] = (read(spec),) * devices
        for rank in range(devices):
            folder = f"rank_{number * devices + rank}"
            outputs += ((f"{folder}/{name}", exprs[rank]) for name, exprs in held.items())
    return outputs, whole


def _write(
    given: Input, target: Path, planned: plan.Plan, stages: Stages, options: ReshardOptions, progress: Progress | None
) -> None:  # fmt: skip
    if options.check_replicas and isinstance(given.source, Assembled):
        given.source.check_replicas()
    if given.path.resolve() in (target.resolve(), *target.resolve().parents):
        raise OutputError("the output lies on or inside the input", where=str(target), hint="write elsewhere")
    if target.resolve() in given.path.resolve().parents:
        raise OutputError("the input lies inside the output", where=str(target), hint="write elsewhere")
    require_space(target.parent, planned.nbytes + (planned.nbytes >> 6))
    format = "dcp" if options.dcp else _format(given, options)
    suffix = ".ckpt" if format == "mindspore" else ".safetensors"
    known: Mapping[str, object] = {"flavour": "ms"} if format == "safetensors" else {}
    with staged(
        target.absolute(), digest=_identity(given, planned, format), overwrite=options.overwrite, directory=True,
        folders=_FOLDERS,
    ) as staging:  # fmt: skip
        sink: Sink = DcpSink(staging.create)
        if options.dcp is None:
            sink = RanksSink(formats.container(format), staging.create, f"checkpoint{suffix}", options=known)
        opener = InputOpener.of(given.path, options.strategies, options.step)
        engines.run(
            planned, given.source, sink, engine=options.engine, arithmetic=Numeric(),
            work=Work(opener, staging.path, "PyTorch's DCP" if options.dcp else format), metadata={"format": "ms"},
            workers=options.workers, progress=progress,
        )  # fmt: skip
        for number, stage in enumerate(sorted(stages)):
            file = staging.create(f"strategy/strategy_{number}.ckpt")
            file.write(0, write_strategy(number, stages[stage]))
            file.close()
        staging.commit()


def _identity(given: Input, planned: plan.Plan, format: str) -> str:
    return run_identity([planned.digest, format], files_of(given.source))


def reshard_files(
    source: Path | str,
    target: Path | str,
    options: ReshardOptions,
    *,
    shards: int | None = None,
    max_size: int | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write ``source``, whole or distributed, as one checkpoint in several files with an index.

    ``shards``: how many files at most, as evenly as the tensors allow; ``max_size``: bytes of tensors per file. Names
    stay as they are. Of ``options`` only what is about the source, the writing and the files' container counts.
    """
    started = time.perf_counter()
    given = open_input(Path(source), strategies=options.strategies, step=options.step)
    try:
        specs = tuple(given.source.specs.values())
        size = max_size if max_size is not None else _size_for(specs, shards or 1)
        kept = WholeOptions(
            size, check_replicas=options.check_replicas, workers=options.workers, dry_run=options.dry_run,
            overwrite=options.overwrite, strategies=options.strategies, step=options.step, engine=options.engine,
            container=options.format,
        )  # fmt: skip
        return write_whole(given, f"{str(target).rstrip('/')}/", kept, progress=progress, started=started)
    finally:
        given.source.close()


def _size_for(specs: Sequence[TensorSpec], shards: int) -> int:
    """Return the smallest shard size that cuts tensors into at most so many shards."""
    low, high = max(1, max((spec.nbytes for spec in specs), default=1)), sum(spec.nbytes for spec in specs) or 1
    high = max(low, high)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(split(specs, middle)) <= shards else (middle + 1, high)
    return low
