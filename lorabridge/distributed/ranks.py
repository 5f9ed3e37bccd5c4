"""MindSpore's rank directories, ``rank_<r>/*.ckpt|.safetensors``, with the strategy of the run that wrote them.

Layouts: mindspore 2.10 (ModelCheckpoint, transform_checkpoints) and MindFormers (``checkpoint/rank_<r>`` beside
``strategy/``). Rank r holds stage ``r // devices``; which slice of a parameter it holds, the strategy says. With
``remove_redundancy`` a slice lies on one rank of those that train it, so it is looked up on all of them. Differences
from mindspore's own transform, where that is wrong: parameters that the strategy does not list must be equal on every
rank (it passes on rank 0's slice), names may hold a minus sign, and the last step is never chosen by its spelling.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..axes import ShapeError
from ..errors import InputError, UsageError, counted
from ..formats import FORMATS, identify
from ..formats.untrusted import shown
from ..tensors import TensorSpec
from .assembled import Arrangement, Assembled, Copy, Files, Placed
from .embeddings import Holes, place_embedding
from .grid import Box
from .layout import Layout, assemble
from .placing import Broken, Findings, damaged, grouped, place_whole, settle
from .strategy import Strategy, fitted, read_strategy

_RANK = re.compile(r"rank_(\d{1,7})")
_STEP = re.compile(r"-(\d+_\d+)$")


def is_rank_directory(path: Path) -> bool:
    """Say whether a directory holds ``rank_<r>`` directories."""
    return path.is_dir() and any(_RANK.fullmatch(p.name) for p in path.iterdir() if p.is_dir())


def open_ranks(
    path: Path, *, strategies: Sequence[Path] = (), step: str | None = None, findings: Findings | None = None
) -> Assembled:
    """Open rank directories as one checkpoint, reading headers only (and what no strategy lists, to compare it).

    ``strategies``: see :func:`.strategy.read_strategy`; none: the ``strategy`` directory inside or
    beside ``path``, else every rank must hold the same whole tensors. ``step``: ``EPOCH_STEP``, where the
    directories hold several checkpoints. InputError names what is missing, disagrees or does not fit.
    """
    files = _rank_files(path, step)
    found = list(strategies) or _strategies_near(path)
    try:
        strategy = read_strategy(found) if found else None
    except InputError as error:
        settle(error, findings)
        strategy = None
    format = _one_format(list(files.values()), findings)
    names = {f"rank_{rank}/{file.name}": file for rank, file in files.items()}
    pieces = Files(path, format, names, damaged=damaged(findings))
    try:
        ranks = {rank: f"rank_{rank}/{file.name}" for rank, file in files.items()}
        ranks = {rank: name for rank, name in ranks.items() if name in pieces.held}
        arrangement = _Arranging(pieces, ranks, strategy, findings).arrange()
        return Assembled(path, pieces, arrangement)
    except BaseException:
        pieces.close()
        raise


def _strategies_near(path: Path) -> list[Path]:
    near = [p for p in (path / "strategy", path.parent / "strategy") if p.is_dir()]
    return near[:1]


def _rank_files(path: Path, step: str | None) -> dict[int, Path]:
    """Return the checkpoint of every rank directory, by rank."""
    folders = {int(m[1]): p for p in path.iterdir() if p.is_dir() and (m := _RANK.fullmatch(p.name))}
    suffixes = {suffix for _, known in FORMATS.values() for suffix in known}
    files: dict[int, Path] = {}
    empty, several = [], {}
    for rank, folder in sorted(folders.items()):
        held = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in suffixes]
        if step is not None:
            held = [p for p in held if (m := _STEP.search(p.stem)) and m[1] == step]
        if len(held) == 1:
            files[rank] = held[0]
        elif held:
            several[folder] = held
        else:
            empty.append(folder)
    if several:
        steps = sorted({m[1] for held in several.values() for p in held if (m := _STEP.search(p.stem))}, key=_numbers)
        raise UsageError(
            "rank directories hold several checkpoints",
            where=[
                f"{shown(str(folder))}: {', '.join(shown(p.name) for p in held)}" for folder, held in several.items()
            ],
            hint=f"choose one with --step: {', '.join(steps)}" if steps else "leave one checkpoint in each directory",
        )
    if not files:
        said = f" of step {step}" if step else ""
        raise InputError(
            f"no rank directory holds a checkpoint{said}", where=[shown(str(p)) for p in empty],
            hint="name the directory that holds rank_0, rank_1 ...",
        )  # fmt: skip
    return files


def _numbers(step: str) -> tuple[int, ...]:
    return tuple(int(part) for part in step.split("_"))


def _one_format(files: Sequence[Path], findings: Findings | None) -> str:
    kinds = {file: identify(file) for file in files}
    counts = Counter(kind.format for kind in kinds.values() if kind.format not in (None, "sharded"))
    format = counts.most_common(1)[0][0] if counts else None
    if format is None or counts[format] < len(files):
        error = InputError(
            "the ranks' files are not checkpoints of one container",
            where=[f"{shown(str(file))}: {kind.title}" for file, kind in kinds.items()],
            hint="repair or remove what is no checkpoint",
        )
        if format is None:
            raise error
        settle(error, findings)
    return format


@dataclass
class _Arranging:
    """The work of finding every slice; ``problems`` collects what is wrong, so that all of it is said at once."""

    pieces: Files
    ranks: Mapping[int, str]
    strategy: Strategy | None
    findings: Findings | None = None
    problems: list[str] = field(default_factory=list)
    unsaved: list[str] = field(default_factory=list)
    stood_in: dict[int, set[int]] = field(default_factory=dict)

    def arrange(self) -> Arrangement:
        placed: dict[str, Placed] = {}
        if self.strategy is not None:
            self._check_world(self.strategy)
            for stage, layouts in self.strategy.stages.items():
                for name, layout in layouts.items():
                    self._add(placed, self._sliced(stage, name, layout))
        self._whole(placed)
        if self.problems:
            error = InputError(
                f"the ranks do not make up one checkpoint ({counted(len(self.problems), 'problem')})",
                where=self.problems,
                hint="give every rank's file and the strategy of the run that wrote them",
            )
            settle(error, self.findings)
        order = {name: None for file in self.ranks.values() for name in self.pieces.held[file]}
        devices = self.strategy.devices * len(self.strategy.stages) if self.strategy else len(self.ranks)
        return Arrangement(
            kind="mindspore ranks",
            ranks=devices,
            placed={name: placed[name] for name in order if name in placed},
            notes=tuple(self._notes(devices)),
            metadata=self._metadata(),
        )

    def _metadata(self) -> dict[str, str]:
        """Return what every file says alike, without what is about one rank's file."""
        stated = [self.pieces.stated[file] for file in self.ranks.values()]
        common = dict(stated[0])
        for other in stated[1:]:
            common = {key: value for key, value in common.items() if other.get(key) == value}
        common.pop("remove_redundancy", None)
        return common

    def _notes(self, devices: int) -> list[str]:
        notes = []
        absent = [rank for rank in range(devices) if rank not in self.ranks]
        for rank in absent:
            others = ", ".join(map(str, sorted(self.stood_in.get(rank, ()))))
            whole = "" if self.problems else "; nothing is lost with it"
            said = f"; its slices were read from rank {others}" if others and not self.problems else whole
            notes.append(f"rank {rank} is missing{said}")
        if self.unsaved:
            some = ", ".join(self.unsaved[:4]) + (" ..." if len(self.unsaved) > 4 else "")
            notes.append(f"{counted(len(self.unsaved), 'parameter')} of the strategy that no rank saved: {some}")
        return notes

    def _check_world(self, strategy: Strategy) -> None:
        devices = strategy.devices * len(strategy.stages)
        beyond = [str(rank) for rank in self.ranks if rank >= devices]
        if beyond:
            stages = counted(len(strategy.stages), "stage")
            self.problems.append(
                f"{', '.join(map(str, strategy.paths))}: is of {stages} of {strategy.devices} devices; "
                f"there is rank {', '.join(beyond)}"
            )
        for stage in strategy.stages:
            first = stage * strategy.devices
            if not any(rank in self.ranks for rank in range(first, first + strategy.devices)):
                self.problems.append(
                    f"stage {stage}: none of its ranks {first} to {first + strategy.devices - 1} is there"
                )

    def _add(self, placed: dict[str, Placed], found: Placed | None) -> None:
        """Keep a tensor; one that several stages hold must be the same on each."""
        if found is None:
            return
        known = placed.setdefault(found.name, found)
        if known is found:
            return
        if (known.expr.dtype, known.expr.shape) != (found.expr.dtype, found.expr.shape):
            self.problems.append(
                f"{shown(found.name)}: {known.expr.shape} on stage {known.stage}, {found.expr.shape} on {found.stage}"
            )
        elif known.layout is not None and found.layout is not None and known.layout.cuts == found.layout.cuts:
            both = {index: (*copies, *found.slices.get(index, ())) for index, copies in known.slices.items()}
            placed[found.name] = replace(known, slices=both)
        else:
            self.problems.append(f"{shown(found.name)}: cut differently on stages {known.stage} and {found.stage}")

    def _sliced(self, stage: int, name: str, layout: Layout) -> Placed | None:
        assert self.strategy is not None
        first = stage * self.strategy.devices
        members = range(first, first + self.strategy.devices)
        files = {rank: self.ranks[rank] for rank in members if rank in self.ranks}
        held = {r: spec for r, file in files.items() if (spec := self.pieces.held[file].get(name)) is not None}
        if not held:
            absent = [rank for rank in members if rank not in self.ranks]
            if any(all(first + rank in self.ranks for rank in ranks) for ranks in layout.holders().values()):
                self.unsaved.append(name)  # a slice that all its ranks would have to hold is on none of them
            elif len(absent) < len(members):  # a whole stage is said once
                self.problems.append(f"{shown(name)}: on no rank that is there; rank {_listed(absent)} is missing")
            return None
        if layout.rows or layout.field:
            return self._embedding(stage, name, layout, held, first)
        shapes = {(spec.dtype, spec.shape) for spec in held.values()}
        if len(shapes) > 1:
            said = ", ".join(f"rank {rank} {spec.dtype} {spec.shape}" for rank, spec in held.items())
            self._break(name, f"slices differ in type or shape: {said}", held, stage)
            return None
        ((_, local),) = shapes
        fits = fitted(layout, local)
        if fits is None or fits.problem():
            whole = f", which cuts a tensor of shape {layout.shape}" if layout.shape else ""
            self._break(name, f"slices of shape {local} are not of the strategy's layout{whole}", held, stage)
            return None
        return self._put_together(stage, name, fits, held, first)

    def _embedding(
        self, stage: int, name: str, layout: Layout, held: Mapping[int, TensorSpec], first: int
    ) -> Placed | None:
        """Put a parameter of unequal slices together."""
        pieces = {r - first: (f"{self.ranks[r]}/{name}", self.pieces.piece(self.ranks[r], name)) for r in held}
        try:
            if len({expr.dtype for _, expr in pieces.values()}) > 1:
                raise ValueError("slices differ in type")
            return place_embedding(name, layout, pieces, first, stage)
        except Holes as holes:
            lost = sorted({rank for ranks in holes.missing.values() for rank in ranks})
            self.problems.append(f"{shown(name)}: {holes}: rank {_listed(lost)}")
            if self.findings is not None:
                dtype = next(iter(held.values())).dtype
                self.findings.broken[name] = Broken(
                    name, dtype, holes.shape, holes.held, str(holes), holes.missing, layout, stage
                )
        except (ValueError, ShapeError) as error:
            self._break(name, str(error), held, stage)
        return None

    def _break(self, name: str, problem: str, held: Mapping[int, TensorSpec], stage: int) -> None:
        """Note what is wrong with a tensor, and the ranks' own tensors of its name."""
        self.problems.append(f"{shown(name)}: {problem}")
        if self.findings is not None:
            copies = ((Copy(rank, f"{self.ranks[rank]}/{name}"), spec) for rank, spec in held.items())
            own = grouped((((0,) * len(spec.shape), spec.shape), copy) for copy, spec in copies)
            dtype = next((spec.dtype for spec in held.values()), None)
            self.findings.broken[name] = Broken(name, dtype, None, own, problem, stage=stage)

    def _put_together(
        self, stage: int, name: str, layout: Layout, held: Mapping[int, TensorSpec], first: int
    ) -> Placed | None:
        spec = next(iter(held.values()))
        if len(held) == layout.devices:
            slices: Mapping[tuple[int, ...], tuple[Copy, ...]] = _AllThere(name, self.ranks, layout, first)
            reads = {i: self.pieces.piece(self.ranks[first + ranks[0]], name) for i, ranks in layout.holders().items()}
            boxes = {index: _box(index, spec.shape) for index in reads}
            return Placed(name, assemble(reads, layout.fractions), slices, layout, stage, boxes)
        slices = {}
        lost: dict[tuple[int, ...], tuple[int, ...]] = {}
        for index, holders in layout.holders().items():
            ranks = [first + rank for rank in holders]
            there = [rank for rank in ranks if rank in held]
            if not there:
                place = f"slice {list(index)} of {list(layout.fractions)}"
                self.problems.append(
                    f"{shown(name)}: {place} lies on rank {_listed(ranks)}, and is on none that is there"
                )
                lost[index] = tuple(ranks)
                continue
            slices[index] = tuple(Copy(rank, f"{self.ranks[rank]}/{name}") for rank in there)
            for rank in ranks:
                if rank not in self.ranks:
                    self.stood_in.setdefault(rank, set()).add(there[0])
        boxes = {index: _box(index, spec.shape) for index in (*slices, *lost)}
        if lost:
            if self.findings is not None:
                self.findings.broken[name] = Broken(
                    name, spec.dtype, layout.whole_shape(spec.shape), {boxes[i]: c for i, c in slices.items()},
                    f"{counted(len(lost), 'slice')} of {len(boxes)} on no rank that is there",
                    {boxes[index]: ranks for index, ranks in lost.items()}, layout, stage,
                )  # fmt: skip
            return None
        reads = {index: self.pieces.piece(self.ranks[c[0].rank], name) for index, c in slices.items()}
        return Placed(name, assemble(reads, layout.fractions), slices, layout, stage, boxes)

    def _whole(self, placed: dict[str, Placed]) -> None:
        """Take what no strategy lists from one rank, where all that hold it agree."""
        holders: dict[str, list[int]] = {}
        for rank, file in self.ranks.items():
            for name in self.pieces.held[file]:
                if name not in placed:
                    holders.setdefault(name, []).append(rank)
        listed = {name for layouts in (self.strategy.stages.values() if self.strategy else ()) for name in layouts}
        cure = (
            "the strategy does not list it (by default strategies hold trainable parameters only)"
            if self.strategy
            else "give --strategy"
        )
        for name, ranks in holders.items():
            if name in listed:
                continue  # its problem is said already
            copies = tuple(Copy(rank, f"{self.ranks[rank]}/{name}") for rank in ranks)
            stage = ranks[0] // self.strategy.devices if self.strategy else 0
            try:
                placed[name] = replace(place_whole(name, copies, self.pieces), stage=stage)
            except ValueError as error:
                self._break(name, f"{error}; {cure}", {c.rank: self.pieces.specs[c.piece] for c in copies}, stage)


class _AllThere(Mapping[tuple[int, ...], tuple[Copy, ...]]):
    """The copies of every slice of a tensor that all ranks of its stage hold, made when asked for."""

    def __init__(self, name: str, ranks: Mapping[int, str], layout: Layout, first: int) -> None:
        self._name, self._ranks, self._holders, self._first = name, ranks, layout.holders(), first

    def __getitem__(self, index: tuple[int, ...]) -> tuple[Copy, ...]:
        ranks = (self._first + rank for rank in self._holders[index])
        return tuple(Copy(rank, f"{self._ranks[rank]}/{self._name}") for rank in ranks)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)


def _box(index: Sequence[int], local: Sequence[int]) -> Box:
    return tuple(i * n for i, n in zip(index, local, strict=True)), tuple(local)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
