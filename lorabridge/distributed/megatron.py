"""Megatron-LM's checkpoints of one file per model-parallel rank: ``iter_*/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt``.

Format: megatron-core 0.16.1 (training/checkpointing.py, get_checkpoint_name; tensor_parallel/layers.py). A file holds
the rank's own model under ``model`` (``model0``, ``model1`` ... with virtual stages), layers numbered from zero in
every stage. Nothing in it says how a tensor was cut: column-parallel layers are cut by rows, row-parallel ones by
columns, both known by their names; what is neither must be known to be whole and equal on all ranks. A gated
``linear_fc1`` holds the rank's gate rows before its up rows, so that the halves are regrouped. The vocabulary keeps its
padding. Megatron's newer ``torch_dist`` checkpoints are DCP directories; see :mod:`.dcp`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..axes import Expr, ShapeError, cut, join, read
from ..errors import InputError
from ..formats.torchvalues import Object, Table, Tensor, kind
from ..formats.torchzip import TorchSource, open_tree
from ..formats.untrusted import MAX_TENSORS, read_word, shown
from .assembled import Arrangement, Assembled, Copy, Files, Placed
from .grid import Box
from .placing import Broken, Findings, damaged, grouped, place_whole, settle
from .tensorrules import gated, named_axis

LATEST = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_(\d{1,12})")
_RANK = re.compile(r"mp_rank_(\d{2,5})(?:_(\d{3,5}))?(?:_(\d{3,5}))?")
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_MODEL = re.compile(r"model(\d{0,3})")
_HINT = "take the whole iteration, with the files of every rank"
_LAYER = re.compile(r"(^|.*\.)layers\.(\d{1,6})\.")
_EXPERT = re.compile(r"(.*\.local_experts\.)(\d{1,6})(\..*)|(.*\.experts\.linear_fc[12]\.(?:weight|bias))(\d{1,6})()")
_SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
_EXPERT_TENSOR = "expert_tensor_parallel_size"
_Place = tuple[int, int, int]
"""Tensor, pipeline and expert rank."""


class _Inert:
    """Names that stay names: the file's arguments and random states mention classes that are not looked up."""

    def __contains__(self, name: object) -> bool:
        known = ("megatron.", "argparse.Namespace", "signal.Signals", "types.SimpleNamespace", "_io.BytesIO")
        return isinstance(name, str) and name.startswith(known)


def iteration(path: Path, step: str | None = None) -> Path | None:
    """Return the iteration that a directory of Megatron's ``iter_*`` names as its latest, or ``step``; None for others.

    InputError where there is no such iteration.
    """
    numbered = {int(m[1]): p for p in path.glob("iter_*") if p.is_dir() and (m := _ITERATION.fullmatch(p.name))}
    if not numbered:
        return None
    latest = path / LATEST
    if step is None and latest.is_file():
        step = read_word(latest)
    if step is None and len(numbered) == 1:
        return next(iter(numbered.values()))
    if step is None or not step.isdecimal() or int(step) not in numbered:
        raise InputError(
            f"there is no iteration {shown(step)}" if step else f"{LATEST} is missing",
            where=shown(str(path)), hint=f"choose one with --step: {', '.join(map(str, sorted(numbered)))}",
        )  # fmt: skip
    return numbered[int(step)]


def is_megatron(path: Path) -> bool:
    """Say whether a directory holds ``mp_rank_*`` directories with Megatron's files."""
    return any(_file(folder) is not None for folder in path.glob("mp_rank_*") if _RANK.fullmatch(folder.name))


def _file(folder: Path) -> Path | None:
    return next((folder / name for name in _FILES if (folder / name).is_file()), None)


@dataclass(frozen=True, slots=True)
class _Held:
    """What one rank's file says: sizes of the run by argument, and why entries of the model are left out."""

    sizes: Mapping[str, int]
    skipped: tuple[tuple[str, str], ...]


def open_megatron(path: Path, *, findings: Findings | None = None) -> Assembled:
    """Open an iteration of one file per model-parallel rank as one checkpoint, reading pickles only.

    The model alone, layers under their numbers in the whole model; optimizer and random states are not read. What all
    ranks must share is compared. InputError names missing ranks, tensors that no rule tells how to put together, and
    those that differ where they must not.
    """
    said: dict[str, _Held] = {}
    found = {f"{folder.name}/{file.name}": file for folder in sorted(path.glob("mp_rank_*"))
             if _RANK.fullmatch(folder.name) and (file := _file(folder)) is not None}  # fmt: skip
    pieces = Files(path, "torch", found, lambda file: _open_rank(file, said), damaged=damaged(findings))
    try:
        sizes = _sizes(said.values())
        places = {_place(file.partition("/")[0], sizes): file for file in found if file in pieces.held}
        work = _Megatron(path, pieces, dict(sorted(places.items())), sizes, findings)
        placed = work.place()
        skipped = next((held.skipped for held in said.values()), ())
        sizes_ = zip(("TP", "PP", "EP"), work.shape, strict=True)
        name = " ".join(["megatron", *(f"{letters}{size}" for letters, size in sizes_ if size > 1)])
        left = (("optimizer and random states", "training state"), *skipped)
        return Assembled(path, pieces, Arrangement(name, len(places), placed, skipped=left))
    except BaseException:
        pieces.close()
        raise


def _sizes(said: Iterable[_Held]) -> dict[str, int]:
    """Return how many ranks of each kind the run had, as far as its arguments are in the files."""
    found: dict[str, int] = {}
    for held in said:
        for key, value in held.sizes.items():
            if found.setdefault(key, value) != value:
                raise InputError(f"the ranks' files say {key} {found[key]} and {value}", hint=_HINT)
    return found


def _place(folder: str, sizes: Mapping[str, int]) -> _Place:
    match = _RANK.fullmatch(folder)
    assert match is not None
    tp, second, third = int(match[1]), match[2], match[3]
    if third is None and second is not None and sizes.get(_SIZES[1]) == 1 and sizes.get(_SIZES[2], 1) > 1:
        return tp, 0, int(second)
    return tp, int(second or 0), int(third or 0)


def _open_rank(path: Path, said: dict[str, _Held]) -> TorchSource:
    """Open one rank's model, chunk c's tensors as ``<c>:<name>``."""
    tree = open_tree(path, objects=_Inert())
    try:
        root = _fields(tree.root)
        models = {int(m[1] or 0): v for k, v in root.items() if (m := _MODEL.fullmatch(k)) and isinstance(v, Table)}
        if not models:
            raise ValueError("it holds no model")
        tensors: dict[str, Tensor] = {}
        skipped: list[tuple[str, str]] = []
        for chunk, model in models.items():
            for name, value in _flat(model, 8):
                if len(tensors) + len(skipped) > MAX_TENSORS:
                    raise ValueError(f"its model has more than {MAX_TENSORS} entries")
                if isinstance(value, Tensor) and not name.endswith("_extra_state"):
                    tensors[f"{chunk}:{name}"] = value
                else:
                    skipped.append((name, f"{kind(value)}, no tensor of the model"))
    except ValueError as error:
        tree.archive.file.close()
        raise InputError(f"it is no checkpoint of Megatron: {error}", where=shown(str(path)), hint=_HINT) from None
    stated = _fields(getattr(root.get("args"), "state", None))
    sizes = {key: n for key in (*_SIZES, _EXPERT_TENSOR) if type(n := stated.get(key)) is int and 0 < n < 1 << 16}
    said[str(path)] = _Held(sizes, tuple(skipped))
    return tree.source(tensors)


def _fields(value: object) -> dict[str, object]:
    state = value.state if isinstance(value, Object) else value
    return {k: v for k, v in state.items if isinstance(k, str)} if isinstance(state, Table) else {}


def _flat(table: Table, depth: int) -> Iterator[tuple[str, object]]:
    """Yield the entries of nested mappings under names joined by dots; each name once."""
    for name, value in table.items:
        if not isinstance(name, str):
            raise ValueError(f"a name of the model is {kind(name)}")
        if isinstance(value, Table) and value.items:
            if not depth:
                raise ValueError("its model nests too deep")
            yield from ((f"{name}.{inner}", held) for inner, held in _flat(value, depth - 1))
        else:
            yield name, value


class _Holes(ValueError):
    """Parts of a tensor that are on no rank that is there, by box."""

    def __init__(
        self, problem: str, shape: tuple[int, ...], held: dict[Box, tuple[Copy, ...]], lost: dict[Box, tuple[int, ...]]
    ) -> None:
        super().__init__(problem)
        self.shape, self.held, self.lost = shape, held, lost


@dataclass
class _Megatron:
    """The work of finding every tensor. ``places``: the file of every rank."""

    path: Path
    pieces: Files
    places: Mapping[_Place, str]
    sizes: Mapping[str, int]
    findings: Findings | None
    problems: list[str] = field(default_factory=list)

    @property
    def shape(self) -> _Place:
        """How many tensor, pipeline and expert ranks there are."""
        said = [self.sizes.get(key, 0) for key in _SIZES]
        tp, pp, ep = (max(n, 1 + max(place[i] for place in self.places)) for i, n in enumerate(said))
        return tp, pp, ep

    def place(self) -> dict[str, Placed]:
        """Return every tensor of the model under its name in the whole."""
        tp, pp, ep = self.shape
        for p, t, e in itertools.product(range(pp), range(tp), range(ep)):
            if (t, p, e) not in self.places:
                of = f"tensor rank {t}, pipeline rank {p}" + (f", expert rank {e}" if ep > 1 else "")
                self.problems.append(f"{of}: its file is missing")
        held: dict[str, dict[_Place, str]] = {}
        for place, names in self._named().items():
            for name, piece in names.items():
                held.setdefault(name, {})[place] = piece
        placed: dict[str, Placed] = {}
        for name, where in held.items():
            try:
                placed[name] = self._one(name, where, held)
            except (ValueError, ShapeError) as error:
                self.problems.append(f"{shown(name)}: {error}")
                if self.findings is not None:
                    copies = [Copy(self._rank(p), piece) for p, piece in where.items()]
                    own = [(((0,) * len(s.shape), s.shape), c) for c in copies for s in [self.pieces.specs[c.piece]]]
                    dtype = self.pieces.specs[copies[0].piece].dtype
                    broken = Broken(name, dtype, None, grouped(own), str(error))
                    if isinstance(error, _Holes):
                        broken = Broken(name, dtype, error.shape, error.held, str(error), error.lost)
                    self.findings.broken[name] = broken
        if self.problems:
            settle(InputError("the ranks do not make up one model", where=self.problems, hint=_HINT), self.findings)
        return placed

    def _rank(self, place: _Place) -> int:
        """Number the ranks as Megatron does where nothing else is parallel: tensor ranks first, stages last."""
        tp, _, ep = self.shape
        return (place[1] * ep + place[2]) * tp + place[0]

    def _named(self) -> dict[_Place, dict[str, str]]:
        """Return every rank's pieces under names whose layers and experts count through the whole model."""
        offsets: dict[str, int] = {}
        found: dict[_Place, dict[str, str]] = {place: {} for place in self.places}
        chunks = {place: self._chunks(file) for place, file in self.places.items()}
        _, pp, ep = self.shape
        for chunk in range(1 + max(number for held in chunks.values() for number in held)):
            for stage in range(pp):
                deepest: dict[str, int] = {}
                for place in (p for p in self.places if p[1] == stage):
                    for name, piece in chunks[place].get(chunk, {}).items():
                        known = self._whole_name(name, place, offsets, deepest, ep, chunks[place][chunk])
                        found[place][known] = piece
                for prefix, count in deepest.items():
                    offsets[prefix] = offsets.get(prefix, 0) + count
        return found

    def _chunks(self, file: str) -> dict[int, dict[str, str]]:
        chunks: dict[int, dict[str, str]] = {}
        for name in self.pieces.held[file]:
            number, _, own = name.partition(":")
            chunks.setdefault(int(number), {})[own] = f"{file}/{name}"
        return chunks

    def _whole_name(
        self, name: str, place: _Place, offsets: Mapping[str, int], deepest: dict[str, int], ep: int,
        beside: Mapping[str, str],
    ) -> str:  # fmt: skip
        match = _LAYER.match(name)
        if match is not None:
            prefix, layer = match[1], int(match[2])
            deepest[prefix] = max(deepest.get(prefix, 0), layer + 1)
            name = f"{prefix}layers.{layer + offsets.get(prefix, 0)}.{name[match.end() :]}"
        expert = _EXPERT.fullmatch(name) if ep > 1 else None
        if expert is not None:
            head, number, tail = (part for part in expert.groups() if part is not None)
            count = 1 + max(int(m[2] or m[5]) for n in beside if (m := _EXPERT.fullmatch(n)))
            name = f"{head}{place[2] * count + int(number)}{tail}"
        return name

    def _one(self, name: str, where: Mapping[_Place, str], held: Mapping[str, Mapping[_Place, str]]) -> Placed:
        """Put one tensor together from what tensor ranks hold; ranks of other stages and experts hold copies."""
        tp = self.shape[0]
        by_rank = [[Copy(self._rank(p), piece) for p, piece in where.items() if p[0] == t] for t in range(tp)]
        absent = [str(t) for t, copies in enumerate(by_rank) if not copies]
        everything = tuple(copy for copies in by_rank for copy in copies)
        rule = self._axis(name, len(self.pieces.specs[everything[0].piece].shape)) if tp > 1 else None
        if rule is None:
            return place_whole(name, everything, self.pieces)
        if absent:
            raise self._gone(rule, where, by_rank, f"tensor rank {', '.join(absent)} does not hold it")
        parts = [read(self.pieces.specs[copies[0].piece]) for copies in by_rank]
        halves = 2 if rule == 0 and self._gated(name, parts, where, held) else 1
        exprs: list[Expr] = []
        slices: dict[tuple[int, ...], tuple[Copy, ...]] = {}
        boxes: dict[tuple[int, ...], Box] = {}
        at = 0
        for half in range(halves):
            for copies, part in zip(by_rank, parts, strict=True):
                size = part.shape[rule] // halves
                expr = cut(part, rule, half * size, (half + 1) * size)
                start = tuple(at if axis == rule else 0 for axis in range(len(part.shape)))
                exprs.append(expr)
                slices[start], boxes[start] = tuple(copies), (start, expr.shape)
                at += size
        return Placed(name, join(exprs, rule), slices, boxes=boxes)

    def _gone(self, rule: int, where: Mapping[_Place, str], by_rank: Sequence[Sequence[Copy]], problem: str) -> _Holes:
        """Tell what tensor ranks that are not there held, if they held as much as the others."""
        shape = list(self.pieces.specs[next(iter(where.values()))].shape)
        _, stage, expert = next(iter(where))
        held: dict[Box, tuple[Copy, ...]] = {}
        lost: dict[Box, tuple[int, ...]] = {}
        for tensor, copies in enumerate(by_rank):
            start = tuple(tensor * size if axis == rule else 0 for axis, size in enumerate(shape))
            box = start, tuple(shape)
            if copies:
                held[box] = tuple(copies)
            else:
                lost[box] = (self._rank((tensor, stage, expert)),)
        shape[rule] *= len(by_rank)
        return _Holes(problem, tuple(shape), held, lost)

    def _axis(self, name: str, axes: int) -> int | None:
        """Return the axis along which tensor parallelism cut a parameter; None where every rank holds the whole."""
        if ".experts." in name and self.sizes.get(_EXPERT_TENSOR, self.shape[0]) != self.shape[0]:
            said = f"experts over {self.sizes[_EXPERT_TENSOR]} tensor ranks beside layers over {self.shape[0]}"
            raise ValueError(f"{said} are not supported; save as torch_dist")
        return named_axis(name, axes)

    def _gated(
        self, name: str, parts: Sequence[Expr], where: Mapping[_Place, str], held: Mapping[str, Mapping[_Place, str]]
    ) -> bool:
        """Say whether a first layer holds gate and up rows: it has twice as many as the second has columns."""
        place = next(iter(where))

        def columns_of(twin: str) -> int | None:
            piece = held.get(twin, {}).get(place)
            return self.pieces.specs[piece].shape[-1] if piece is not None else None

        return gated(name, parts[0].shape[0], columns_of)
