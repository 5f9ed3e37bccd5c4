"""DeepSpeed's ZeRO checkpoints: fp32 masters put together from the partitions of every rank, without deepspeed.

Format: deepspeed 0.19.8, ``utils/zero_to_fp32.py`` and ``runtime/zero``. ``<tag>/`` holds model states
(``mp_rank_00_model_states.pt``; stage 3: ``zero_pp_rank_<r>_mp_rank_00_model_states.pt``) and optimizer states
(``[bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt``); ``latest`` names the tag. Stages 1 and 2 concatenate the
parameters of a group in the order of ``param_shapes`` and cut the result among the ranks; stage 3 cuts every parameter
into ``ceil(numel / ranks)`` elements a rank. Parameters that do not train lie in ``frozen_param_fragments``: whole in
stages 1 and 2, cut like the others in stage 3, where the 16-bit module itself holds empty tensors. Buffers lie in the
module; shared parameters are stored once. As ``zero_to_fp32`` does, trained parameters are read from the fp32 masters.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from ..axes import Expr, ShapeError, cut, join, reads, reshape
from ..errors import InputError, counted
from ..formats.torchvalues import Object, Table, Tensor, kind
from ..formats.torchzip import TorchSource, open_tree
from ..formats.untrusted import shown
from .assembled import Arrangement, Assembled, Copy, Files, Placed

_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{2,6})_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{2,6})_model_states\.pt")
_OBJECTS = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
_HINT = "take the whole directory that deepspeed's save_checkpoint wrote, with the files of every rank"
_MASTERS = {"single_partition_of_fp32_groups": "flat", "fp32_flat_groups": "each"}
"""Where an optimizer's state keeps its fp32 masters, and whether groups or single parameters are cut."""


def zero_directory(path: Path, step: str | None = None) -> Path | None:
    """Return the directory of a tag: ``path`` itself, or what ``latest`` (or ``step``, a tag) names in it; or None."""
    if any(_MODEL.fullmatch(p.name) for p in path.glob("*_model_states.pt")):
        return path
    latest = path / "latest"
    tag = step or (latest.read_text("utf-8", errors="replace")[:256].strip() if latest.is_file() else "")
    inside = path / tag
    if not tag or "/" in tag or tag in (".", "..") or not any(inside.glob("*_model_states.pt")):
        return None
    return inside


@dataclass(frozen=True, slots=True)
class _Said:
    """What the model states of rank 0 say of the whole: shapes per group, frozen ones, buffers and shared names."""

    shapes: tuple[dict[str, tuple[int, ...]], ...]
    frozen: dict[str, tuple[int, ...]]
    buffers: tuple[str, ...]
    shared: tuple[tuple[str, str], ...]
    ranks: int


def open_zero(path: Path) -> Assembled:
    """Open a ZeRO checkpoint as one, reading the archives' pickles only.

    Trained parameters and, where they were saved, frozen ones and buffers, under the module's own names. InputError
    for missing ranks, model parallelism, paddings between parameters, and partitions that do not hold what they should.
    """
    models, optimizers = _found(path, _MODEL), _found(path, _OPTIMIZER)
    first = models.get(0)
    if first is None or not optimizers:
        raise InputError("model or optimizer states are missing", where=shown(str(path)), hint=_HINT)
    said = _said(first)
    absent = [rank for rank in range(said.ranks) if rank not in optimizers or (len(models) > 1 and rank not in models)]
    if absent or len(optimizers) > said.ranks:
        listed = ", ".join(map(str, absent)) or f"{len(optimizers)} instead of {said.ranks}"
        raise InputError(f"states of ranks are missing or too many: {listed}", where=shown(str(path)), hint=_HINT)
    files = {file.name: file for file in (*models.values(), *optimizers.values())}
    pieces = Files(path, "torch", files, _open_states)
    try:
        work = _Zero(
            pieces,
            said,
            [models[rank].name for rank in sorted(models)],
            [optimizers[rank].name for rank in range(said.ranks)],
        )
        return Assembled(path, pieces, Arrangement(f"deepspeed ZeRO-{work.stage}", said.ranks, work.place()))
    except BaseException:
        pieces.close()
        raise


def _found(path: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Return the states by data-parallel rank; InputError where there is model parallelism."""
    found: dict[int, Path] = {}
    for file in sorted(path.iterdir()):
        match = pattern.fullmatch(file.name)
        if match is None:
            continue
        if int(match[2]):
            raise InputError(
                "the run had model parallelism, which is not supported for ZeRO checkpoints",
                where=shown(str(file)),
                hint="merge it with deepspeed's own zero_to_fp32.py",
            )
        found[int(match[1] or 0)] = file
    return found


def _fields(value: object) -> dict[str, object]:
    return {k: v for k, v in value.items if isinstance(k, str)} if isinstance(value, Table) else {}


def _shapes(value: object) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, shape in _fields(value).items():
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"the shape of {shown(name)} is {kind(shape)}")
        shapes[name] = shape
    return shapes


def _said(path: Path) -> _Said:
    tree = open_tree(path, objects=_OBJECTS)
    tree.archive.file.close()
    root = _fields(tree.root)
    try:
        groups = root.get("param_shapes")
        if not isinstance(groups, list) or "module" not in root:
            raise ValueError("it has no param_shapes and module: it is not of a ZeRO run")
        ranks = root.get("dp_world_size")
        if type(ranks) is not int or not 0 < ranks < 1 << 20:
            raise ValueError("it does not say the number of ranks")
        buffers = root.get("buffer_names")
        shared = root.get("shared_params")
        pairs = shared.items if isinstance(shared, Table) else shared if isinstance(shared, list) else []
        said = _Said(
            shapes=tuple(_shapes(group) for group in groups),
            frozen=_shapes(root.get("frozen_param_shapes")),
            buffers=tuple(n for n in buffers if isinstance(n, str)) if isinstance(buffers, list) else (),
            shared=tuple((str(p[0]), str(p[1])) for p in pairs if isinstance(p, list | tuple) and len(p) == 2),
            ranks=ranks,
        )
        if root.get("frozen_param_fragments") is None and said.frozen:
            said = _Said(said.shapes, {}, said.buffers, said.shared, said.ranks)  # saved without the frozen ones
        return said
    except ValueError as error:
        raise InputError(f"the model states are not readable: {error}", where=shown(str(path)), hint=_HINT) from None


def _open_states(path: Path) -> TorchSource:
    """Open one rank's states with the tensors that matter under plain names."""
    tree = open_tree(path, objects=_OBJECTS)
    root = _fields(tree.root)
    tensors: dict[str, Tensor] = {}
    for part in ("module", "frozen_param_fragments"):
        tensors |= {f"{part}.{n}": v for n, v in _fields(root.get(part)).items() if isinstance(v, Tensor)}
    state = _fields(root.get("optimizer_state_dict"))
    for key in _MASTERS:
        held = state.get(key)
        for number, value in enumerate(held if isinstance(held, list) else []):
            if isinstance(value, Tensor):
                tensors[f"{key}.{number}"] = value
    padded = _nonzero(state.get("param_alignment_paddings"))
    if padded:
        tree.archive.file.close()
        raise InputError(
            "its parameters are padded one by one, which is not supported", where=shown(str(path)),
            hint="merge it with deepspeed's own zero_to_fp32.py",
        )  # fmt: skip
    return tree.source(tensors)


def _nonzero(value: object) -> bool:
    """Say whether anything but zeros lies in nested lists and mappings, whatever they share or hold of themselves."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Object) or (isinstance(one, int | float) and one != 0):
            return True
        if isinstance(one, list | tuple | Table) and id(one) not in seen:
            seen.add(id(one))
            waiting += [held for _, held in one.items] if isinstance(one, Table) else one
    return False


@dataclass(frozen=True, slots=True)
class _Zero:
    """The work of placing every parameter. ``models``, ``optimizers``: the ranks' files, in order."""

    pieces: Files
    said: _Said
    models: list[str]
    optimizers: list[str]

    @property
    def stage(self) -> int:
        """3 where every parameter is cut by itself, 2 where groups are (stage 1 looks alike)."""
        return 3 if "fp32_flat_groups.0" in self.pieces.held[self.optimizers[0]] else 2

    def place(self) -> dict[str, Placed]:
        placed: dict[str, Placed] = {}
        problems: list[str] = []
        flats = self._masters(problems)
        if not problems:
            try:
                for name, expr in (self._each(flats) if self.stage == 3 else self._grouped(flats)).items():
                    placed[name] = self._placed(name, expr)
                for name, shape in self.said.frozen.items():
                    placed[name] = self._placed(name, self._frozen(name, shape))
                for name in self.said.buffers:
                    placed[name] = self._placed(name, self._of(self.models[0], f"module.{name}"))
            except (ValueError, ShapeError) as error:
                problems.append(str(error))
        for name, origin in self.said.shared:
            if origin in placed:
                placed[name] = Placed(name, placed[origin].expr, placed[origin].slices)
            elif not problems:
                problems.append(f"{shown(name)} shares {shown(origin)}, which is not there")
        if problems:
            raise InputError("the partitions do not make up the parameters", where=problems, hint=_HINT)
        return placed

    def _placed(self, name: str, expr: Expr) -> Placed:
        ranks = {file: rank for rank, file in enumerate(self.optimizers)}
        copies = [Copy(ranks.get(piece.partition("/")[0], 0), piece) for piece in reads(expr)]
        return Placed(name, expr, {(number,): (copy,) for number, copy in enumerate(copies)})

    def _of(self, file: str, name: str) -> Expr:
        if name not in self.pieces.held[file]:
            raise ValueError(f"{shown(file)}: no {shown(name)}")
        return self.pieces.piece(file, name)

    def _masters(self, problems: list[str]) -> list[list[Expr]]:
        """Return each rank's flat fp32 tensors, a list per group."""
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        found = []
        for file in self.optimizers:
            names = [name for name in self.pieces.held[file] if name.startswith(f"{key}.")]
            flats = [self.pieces.piece(file, f"{key}.{number}") for number in range(len(names))]
            if not flats or any(len(flat.shape) != 1 for flat in flats):
                problems.append(f"{shown(file)}: it holds no flat {key}")
            found.append(flats)
        if not problems and any(len(flats) != len(found[0]) for flats in found):
            problems.append(f"the ranks hold different numbers of {key}")
        return found

    def _grouped(self, flats: list[list[Expr]]) -> dict[str, Expr]:
        """Cut the parameters out of each group's ranks one after another (stages 1 and 2)."""
        found: dict[str, Expr] = {}
        if len(flats[0]) != len(self.said.shapes):
            raise ValueError(f"{len(flats[0])} groups of masters and {len(self.said.shapes)} of shapes")
        for number, shapes in enumerate(self.said.shapes):
            whole, at = join([rank[number] for rank in flats]), 0
            need = sum(math.prod(shape) for shape in shapes.values())
            slack = whole.shape[0] - need
            if not 0 <= slack < max(2 * self.said.ranks, 1 + need):
                raise ValueError(f"group {number} holds {whole.shape[0]} elements, its parameters need {need}")
            for name, shape in shapes.items():
                size = math.prod(shape)
                found[name] = reshape(cut(whole, 0, at, at + size), shape)
                at += size
        return found

    def _each(self, flats: list[list[Expr]]) -> dict[str, Expr]:
        """Cut every parameter out of all ranks (stage 3)."""
        found: dict[str, Expr] = {}
        ranks, at = [join(groups) for groups in flats], 0
        shapes = {name: shape for group in self.said.shapes for name, shape in group.items()}
        need = sum(-(-math.prod(shape) // len(ranks)) for shape in shapes.values())
        if any(flat.shape[0] < need for flat in ranks):
            raise ValueError(f"a rank holds fewer than the {counted(need, 'element')} of its parameters")
        for name, shape in shapes.items():
            share = -(-math.prod(shape) // len(ranks))
            parts = [cut(flat, 0, at, at + share) for flat in ranks]
            found[name] = reshape(cut(join(parts), 0, 0, math.prod(shape)), shape)
            at += share
        return found

    def _frozen(self, name: str, shape: tuple[int, ...]) -> Expr:
        key = f"frozen_param_fragments.{name}"
        if self.stage == 2:
            return reshape(self._of(self.models[0], key), shape)
        parts = [self._of(file, key) for file in self.models]
        whole = join([reshape(part, (math.prod(part.shape),)) for part in parts])
        return reshape(cut(whole, 0, 0, math.prod(shape)), shape)
