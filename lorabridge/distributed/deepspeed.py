"""DeepSpeed's checkpoints: what ZeRO, tensor parallelism and pipelines cut put together, without deepspeed.

Format: deepspeed 0.19.8 (``runtime/engine.py``, ``runtime/pipe/module.py``, ``checkpoint/ds_to_universal.py``).
``<tag>/`` holds the model states of every model-parallel rank m (``mp_rank_<m>_model_states.pt``; ZeRO stage 3:
``zero_pp_rank_<d>_mp_rank_<m>_model_states.pt``) and the optimizer states of every data-parallel rank d of it
(``[bf16_]zero_pp_rank_<d>_mp_rank_<m>_optim_states.pt``); ``latest`` names the tag. m counts the tensor ranks of a
pipeline stage first. A PipelineModule's layers lie in files of their own, ``layer_<l>[-model_<t>]-model_states.pt``,
whose parameters are called ``<l>.<name>`` in the states. Without optimizer states the weights of the model states are
read, as they are. What tensor ranks hold is joined by :mod:`.tensorrules`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..axes import Expr, ShapeError, byte_ranges, cut, reads
from ..errors import InputError
from ..formats.untrusted import shown
from .assembled import Arrangement, Assembled, Copy, Files, Placed
from .grid import Box, assemble_boxes
from .parallel import module_axis
from .partitions import HINT, Extras, Partitions, Said, missing, open_states, read_said
from .placing import Broken, Findings, damaged, settle
from .tensorrules import NO_RULE, Block, Blocks, along, gated, halves, named_axis, whole
from .zerofiles import Listed, Shape, listed_files, rank_name

MAX_ABSENT = 4096
"""Missing files with which a checkpoint is still described."""
_TIED = re.compile(r"tied_modules\.[^.]+\.(.+)")
_CURE = (
    "train with AutoTP of deepspeed 0.19 or later, which notes how it cut, or give the network's own "
    "universal_checkpoint_info; or convert it with ds_to_universal and name the result"
)


def open_zero(path: Path, *, findings: Findings | None = None) -> Assembled:
    """Open a checkpoint of DeepSpeed as one, reading the archives' pickles only.

    Trained parameters and, where they were saved, frozen ones and buffers, under the module's own names. InputError
    for missing ranks, tensors that nothing tells how to join, experts, and partitions that do not hold what they
    should.
    """
    listed = listed_files(path)
    if not listed.models:
        where = f"{shown(str(path))}: mp_rank_00_model_states.pt"
        raise InputError("the layers' files are there without the model states", where=where, hint=HINT)
    said = {rank: read_said(next(iter(sorted(held.items())))[1]) for rank, held in sorted(listed.models.items())}
    shape = Shape.of(listed, next(iter(said.values())))
    absent = shape.absent(listed)
    if absent:
        error = InputError("states of ranks are missing or too many", where=absent, hint=_missing_hint(listed, shape))
        settle(error, findings if len(absent) <= MAX_ABSENT else None)
    extras: dict[str, Extras] = {}
    pieces = Files(path, "torch", listed.files(), lambda file: open_states(file, extras), damaged=damaged(findings))
    listed.leave_out(pieces.held)
    try:
        work = _DeepSpeed(pieces, listed, said, shape, extras, findings)
        placed = work.place()
        return Assembled(path, pieces, Arrangement(
            work.kind(), shape.model if shape.model > 1 else shape.data, placed, tuple(work.notes),
            skipped=tuple(work.skipped),
        ))  # fmt: skip
    except BaseException:
        pieces.close()
        raise


def _missing_hint(listed: Listed, shape: Shape) -> str:
    if listed.third or set(listed.models) != set(range(shape.model)):
        return HINT
    return f"{HINT}; with no optimizer states at all, the 16-bit weights of the model states are read"


_Place = tuple[int, int]
"""Pipeline stage and tensor rank."""


@dataclass(slots=True)
class _DeepSpeed:
    """The work of placing every tensor."""

    pieces: Files
    listed: Listed
    said: Mapping[int, Said]
    shape: Shape
    extras: Mapping[str, Extras]
    findings: Findings | None
    notes: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    stage: int = 0

    def kind(self) -> str:
        """Say what wrote the checkpoint."""
        parts = [f"deepspeed ZeRO-{self.stage}" if self.stage else "deepspeed"]
        parts += [f"{letters}{n}" for letters, n in (("TP", self.shape.tensor), ("PP", self.shape.stages)) if n > 1]
        many = self.stage and min(self.shape.model, self.shape.data) > 1
        return " ".join(parts) + (f", each in the partitions of {self.shape.data}" if many else "")

    def place(self) -> dict[str, Placed]:
        """Return every tensor under its name in the whole."""
        held, whole_ = self._held()
        placed: dict[str, Placed] = {}
        for name, where in held.items():
            try:
                if self.shape.model == 1:
                    placed[name] = self._alone(name, where[0, 0])
                else:
                    placed[name] = self._joined(name, where, held, name in whole_)
            except _Lost as lost:
                self.problems += [] if self.findings is not None else [f"{shown(name)}: {lost.broken.problem}"]
                self._note(lost.broken)
            except (ValueError, ShapeError) as error:
                self.problems.append(f"{shown(name)}: {error}")
                self._note(self._odd(name, where, str(error)))
        for said in self.said.values():
            for name, origin in said.shared:
                if origin in placed:
                    placed[name] = Placed(name, placed[origin].expr, placed[origin].slices, boxes=placed[origin].boxes)
                elif not self.problems and self.findings is None:
                    self.problems.append(f"{shown(name)} shares {shown(origin)}, which is not there")
        if self.problems:
            unknown = any(NO_RULE in problem for problem in self.problems)
            hint = _CURE if unknown else HINT
            settle(
                InputError("the ranks' states do not make up one model", where=self.problems, hint=hint), self.findings
            )
        return placed

    def _note(self, broken: Broken) -> None:
        if self.findings is not None:
            self.findings.broken[broken.name] = broken

    def _held(self) -> tuple[dict[str, dict[_Place, Expr]], set[str]]:
        """Return every tensor's parts by stage and tensor rank, and the names of those that no rank cuts."""
        found: dict[str, dict[_Place, Expr]] = {}
        buffers: set[str] = set()
        trained: dict[_Place, set[str]] = {}
        for rank, said in self.said.items():
            place = divmod(rank, self.shape.tensor)
            files = (self.listed.models.get(rank, {}), self.listed.optimizers.get(rank, {}))
            models, optimizers = ({d: f.name for d, f in sorted(held.items())} for held in files)
            part = Partitions(self.pieces, said, models, optimizers, self.extras, bool(self.listed.optimizers))
            self.stage = max(self.stage, part.stage)
            buffers |= set(said.buffers)
            try:
                masters = part.trained()
                both = masters | part.others(masters)
            except (ValueError, ShapeError) as error:
                self.problems.append(f"{rank_name(rank, 0, self.shape, False) or 'the partitions'}: {error}")
                continue
            trained[place] = set(masters)
            for name, expr in both.items():
                found.setdefault(name, {})[place] = expr
        if self.listed.layers:
            self._layers(found, trained)
        if not self.listed.optimizers and any(said.shapes for said in self.said.values()):
            self.notes.append("no optimizer states are there; the weights are those of the model states")
        others = {name for extra in self.extras.values() for name in extra.others}
        self.skipped += [("optimizer and training states", "training state")] if self.stage else []
        self.skipped += [(name, "not a tensor") for name in sorted(others)]
        return found, buffers

    def _layers(self, found: dict[str, dict[_Place, Expr]], trained: Mapping[_Place, set[str]]) -> None:
        """Take from a pipeline's layers what the masters lack; a tied layer's copies are the masters' already."""
        masters = {name for names in trained.values() for name in names}
        tied = {match[1]: name for name in sorted(masters) if (match := _TIED.fullmatch(name))}
        for layer, held in sorted(self.listed.layers.items()):
            for tensor, file in sorted(held.items()):
                for piece in self.pieces.held[file.name]:
                    own = piece.removeprefix("module.")
                    name = f"{layer}.{own}"
                    if name in masters:
                        continue
                    if own in tied:
                        self.skipped.append((name, f"a copy of {tied[own]}"))
                        continue
                    found.setdefault(name, {})[-1, tensor] = self.pieces.piece(file.name, piece)

    def _alone(self, name: str, expr: Expr) -> Placed:
        """Place a tensor of a run without model parallelism: its slices are runs of elements on the ranks."""
        ranks = {file.name: d for group in (self.listed.models, self.listed.optimizers)
                 for held in group.values() for d, file in held.items()}  # fmt: skip
        if gone := missing(expr):
            raise _Lost(self._runs(name, expr, ranks, gone))
        copies = [Copy(ranks.get(piece.partition("/")[0], 0), piece) for piece in reads(expr)]
        return Placed(name, expr, {(number,): (copy,) for number, copy in enumerate(copies)})

    def _runs(self, name: str, expr: Expr, ranks: Mapping[str, int], gone: Sequence[int]) -> Broken:
        held: dict[Box, tuple[Copy, ...]] = {}
        lost: dict[Box, tuple[int, ...]] = {}
        at, width = 0, expr.dtype.itemsize
        for piece, _, length in byte_ranges(expr) or ():
            box = ((at,), (length // width,))
            at += length // width
            file, _, rest = piece.partition("/")
            if rest:
                held[box] = (Copy(ranks.get(file, 0), piece),)
            else:
                lost[box] = (int(piece.rpartition(":")[2]),)
        said = f"elements of it lie on rank {', '.join(map(str, gone))}, whose states are missing"
        return Broken(name, expr.dtype, expr.shape, held, said, lost)

    def _joined(
        self, name: str, where: Mapping[_Place, Expr], held: Mapping[str, Mapping[_Place, Expr]], same: bool
    ) -> Placed:
        """Put a tensor together from what tensor ranks hold; every stage that holds it must hold the same."""
        boxes: dict[Box, list[tuple[Copy, Expr]]] = {}
        lost: dict[Box, tuple[int, ...]] = {}
        found: Blocks | None = None
        for stage in dict.fromkeys(stage for stage, _ in where):
            parts = [where.get((stage, tensor)) for tensor in range(self.shape.tensor)]
            shapes = [part.shape for part in parts if part is not None]
            known = [part.shape if part is not None else shapes[0] for part in parts]
            rule = self._rule(name, known, (stage, next(t for s, t in where if s == stage)), held, same)
            if found is not None and (found.shape, found.rows) != (rule.shape, rule.rows):
                raise ValueError(f"it has shape {list(found.shape)} on one stage, {list(rule.shape)} on another")
            found = rule
            for block in rule.blocks:
                self._fill(block, parts[block.rank], max(stage, 0), boxes, lost)
        assert found is not None
        first = next(expr for copies in boxes.values() for _, expr in copies) if boxes else next(iter(where.values()))
        filled = {box: tuple(copy for copy, _ in boxes[box]) for box in sorted(boxes)}
        if gone := {box: ranks for box, ranks in lost.items() if box not in boxes}:
            ranks = ", ".join(map(str, sorted({rank for absent in gone.values() for rank in absent})))
            said = f"states of model-parallel rank {ranks} that hold parts of it are missing"
            raise _Lost(Broken(name, first.dtype, found.shape, filled, said, gone))
        if len({expr.dtype for copies in boxes.values() for _, expr in copies}) > 1:
            raise ValueError("its parts have different element types")
        expr = assemble_boxes({box: copies[0][1] for box, copies in boxes.items()}, found.shape, first.dtype)
        expr = expr if found.rows is None else cut(expr, 0, 0, found.rows)
        stage = max(0, min(stage for stage, _ in where))
        slices = {box[0]: copies for box, copies in filled.items()}
        return Placed(name, expr, slices, stage=stage, boxes={box[0]: box for box in filled})

    def _fill(
        self, block: Block, part: Expr | None, stage: int, boxes: dict[Box, list[tuple[Copy, Expr]]],
        lost: dict[Box, tuple[int, ...]],
    ) -> None:  # fmt: skip
        rank = stage * self.shape.tensor + block.rank
        if part is None or missing(part):
            lost[block.at] = (*lost.get(block.at, ()), rank)
            return
        for axis, (start, length) in enumerate(zip(*block.inside, strict=True)):
            part = cut(part, axis, start, start + length)
        boxes.setdefault(block.at, []).append((Copy(rank, reads(part)[0], part), part))

    def _rule(
        self, name: str, shapes: Sequence[tuple[int, ...]], place: _Place,
        held: Mapping[str, Mapping[_Place, Expr]], same: bool,
    ) -> Blocks:  # fmt: skip
        """Say how the parts of tensor ranks make up a tensor."""
        if len(shapes) == 1 or same:
            return whole(shapes)
        universal = next(iter(self.said.values())).universal
        if universal is not None:
            return universal.blocks(name, shapes)
        axis = _named(name, len(shapes[0]))
        if axis is None:
            return whole(shapes)
        return halves(shapes) if axis == 0 and gated(name, shapes[0][0], _columns(held, place)) else along(shapes, axis)

    def _odd(self, name: str, where: Mapping[_Place, Expr], problem: str) -> Broken:
        own: dict[Box, tuple[Copy, ...]] = {}
        for (stage, tensor), expr in where.items():
            box = ((0,) * len(expr.shape), expr.shape)
            copy = Copy(max(stage, 0) * self.shape.tensor + tensor, next(iter(reads(expr)), ""), expr)
            own[box] = (*own.get(box, ()), copy)
        return Broken(name, next(iter(where.values())).dtype, None, own, problem)


class _Lost(Exception):
    """A tensor of which missing states held a part."""

    def __init__(self, broken: Broken) -> None:
        super().__init__(broken.problem)
        self.broken = broken


def _named(name: str, axes: int) -> int | None:
    """Return the axis of a name that Megatron's rules know, or those of unfused Hugging Face names."""
    try:
        return named_axis(name, axes)
    except ValueError:
        return module_axis(name, axes)


def _columns(held: Mapping[str, Mapping[_Place, Expr]], place: _Place) -> Callable[[str], int | None]:
    def columns_of(name: str) -> int | None:
        part = held.get(name, {}).get(place)
        return part.shape[-1] if part is not None and part.shape else None

    return columns_of
