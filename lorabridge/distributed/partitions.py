"""The parameters of one model-parallel rank out of the partitions that ZeRO cut among its data-parallel ranks.

Format: deepspeed 0.19.8, ``utils/zero_to_fp32.py`` and ``runtime/zero``. Stages 1 and 2 concatenate the parameters of a
group in the order of ``param_shapes``, each with its ``param_alignment_paddings`` behind it, and cut the result among
the ranks, without what pads the last; stage 3 cuts every parameter into ``ceil(numel / ranks)`` elements a rank.
Parameters that do not train lie in ``frozen_param_fragments``: whole in stage 2, cut like the others in stage 3, where
the module itself holds empty tensors; in stage 1 in the module alone. Buffers lie in the module; shared parameters are
stored once. As ``zero_to_fp32`` does, trained parameters are read from the fp32 masters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..axes import Expr, cut, join, read, reads, reshape
from ..dtypes import BY_NAME
from ..errors import InputError, counted
from ..formats.torchvalues import Table, Tensor, is_count, kind
from ..formats.torchzip import TorchSource, open_tree
from ..formats.untrusted import shown
from ..tensors import TensorSpec
from .assembled import Files
from .tensorrules import Universal, read_universal

OBJECTS = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    }
)
HINT = "take the whole directory that deepspeed's save_checkpoint wrote, with the files of every rank"
MASTERS = ("single_partition_of_fp32_groups", "fp32_flat_groups")
"""Where an optimizer's state keeps its fp32 masters: cut by groups (stages 1 and 2) or one by one (stage 3)."""
_MISSING = "missing:"


@dataclass(frozen=True, slots=True)
class Said:
    """What one model-parallel rank's model states say.

    Shapes of the trained parameters per group, of frozen ones, names of buffers and shared parameters, the numbers of
    data-parallel, pipeline and tensor ranks (0: not told), and how tensor ranks hold parameters.
    """

    shapes: tuple[dict[str, tuple[int, ...]], ...]
    frozen: dict[str, tuple[int, ...]]
    buffers: tuple[str, ...]
    shared: tuple[tuple[str, str], ...]
    ranks: int
    stages: int
    tensor: int
    model: int
    universal: Universal | None


def fields(value: object) -> dict[str, object]:
    """Return a mapping's entries whose keys are texts; none for what is no mapping."""
    return {k: v for k, v in value.items if isinstance(k, str)} if isinstance(value, Table) else {}


def _shapes(value: object) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, shape in fields(value).items():
        if not isinstance(shape, tuple) or not all(map(is_count, shape)):
            raise ValueError(f"the shape of {shown(name)} is {kind(shape)}")
        shapes[name] = shape
    return shapes


def read_said(path: Path) -> Said:
    """Read what a rank's model states say; InputError where they are no such file."""
    tree = open_tree(path, objects=OBJECTS)
    tree.archive.file.close()
    root = fields(tree.root)
    try:
        if "module" not in root:
            raise ValueError("it holds no module")
        groups = root.get("param_shapes")
        ranks, model = root.get("dp_world_size"), root.get("mp_world_size")
        if type(ranks) is not int or not 0 < ranks < 1 << 20:
            raise ValueError("it does not say the number of ranks")
        degrees = fields(root.get("checkpoint_parallel_dimensions"))
        sizes = [degrees.get("pp_degree"), degrees.get("tp_degree"), model]
        stages, tensor, model = (n if type(n) is int and 0 < n < 1 << 16 else 0 for n in sizes)
        buffers, shared = root.get("buffer_names"), root.get("shared_params")
        pairs = shared.items if isinstance(shared, Table) else shared if isinstance(shared, list) else []
        excluded = root.get("frozen_param_fragments") is None  # saved without the frozen ones
        return Said(
            shapes=tuple(_shapes(group) for group in groups) if isinstance(groups, list) else (),
            frozen={} if excluded else _shapes(root.get("frozen_param_shapes")),
            buffers=tuple(n for n in buffers if isinstance(n, str)) if isinstance(buffers, list) else (),
            shared=tuple((str(p[0]), str(p[1])) for p in pairs if isinstance(p, list | tuple) and len(p) == 2),
            ranks=ranks, stages=stages, tensor=tensor, model=model,
            universal=read_universal(root.get("universal_checkpoint_info")),
        )  # fmt: skip
    except ValueError as error:
        raise InputError(f"the model states are not readable: {error}", where=shown(str(path)), hint=HINT) from None


@dataclass(frozen=True, slots=True)
class Extras:
    """What a rank's states hold beside tensors. ``paddings``: behind every parameter of every group."""

    paddings: tuple[tuple[int, ...], ...]
    others: tuple[str, ...]


def open_states(path: Path, extras: dict[str, Extras]) -> TorchSource:
    """Open one rank's states, or the file of a pipeline's layer, with the tensors that matter under plain names."""
    tree = open_tree(path, objects=OBJECTS)
    root = fields(tree.root)
    tensors: dict[str, Tensor] = {}
    others: list[str] = []
    layer = path.name.startswith("layer_")
    frozen = {} if layer else fields(root.get("frozen_param_fragments"))
    for part, held in (("module", root if layer else fields(root.get("module"))), ("frozen_param_fragments", frozen)):
        for name, value in held.items():
            if isinstance(value, Tensor):
                tensors[f"{part}.{name}"] = value
            elif value is not None:
                others.append(name)
    state = fields(root.get("optimizer_state_dict"))
    for key in MASTERS:
        flats = state.get(key)
        for number, value in enumerate(flats if isinstance(flats, list) else []):
            if isinstance(value, Tensor):
                tensors[f"{key}.{number}"] = value
    try:
        extras[path.name] = Extras(_paddings(state.get("param_alignment_paddings")), tuple(others))
    except ValueError as error:
        tree.archive.file.close()
        raise InputError(f"the optimizer states are not readable: {error}", where=shown(str(path)), hint=HINT) from None
    return tree.source(tensors)


def _paddings(value: object) -> tuple[tuple[int, ...], ...]:
    """Read the numbers of elements behind each parameter of each group; none where nothing is said."""
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(group, list) and all(map(is_count, group)) for group in value):
        return tuple(tuple(group) for group in value)
    raise ValueError(f"param_alignment_paddings is {kind(value)}")


def missing(expr: Expr) -> tuple[int, ...]:
    """Return the data-parallel ranks whose files an expression would need and that are not there."""
    return tuple(int(n.removeprefix(_MISSING)) for n in reads(expr) if n.startswith(_MISSING))


@dataclass(frozen=True, slots=True)
class Partitions:
    """One model-parallel rank's files by data-parallel rank; those that are not there are missing from them.

    A parameter of which a missing rank held a part is an expression that :func:`missing` tells.
    """

    pieces: Files
    said: Said
    models: Mapping[int, str]
    optimizers: Mapping[int, str]
    extras: Mapping[str, Extras]
    expected: bool = False
    """Whether the run has optimizer states, of this rank or others."""

    @property
    def stage(self) -> int:
        """0 without partitions, 3 where every parameter is cut by itself, 2 where groups are (stage 1 looks alike)."""
        first = next(iter(self.optimizers.values()), None)
        return 0 if first is None else 3 if f"{MASTERS[1]}.0" in self.pieces.held[first] else 2

    def trained(self) -> dict[str, Expr]:
        """Return the fp32 masters; ValueError where partitions do not hold what they should."""
        if not self.optimizers and self.expected:
            held = [(name, shape) for group in self.said.shapes for name, shape in group.items()]
            return {name: reshape(self._stand_in(0, math.prod(shape)), shape) for name, shape in held}
        if not self.optimizers or not self.said.shapes:
            return {}
        return self._each(self._masters()) if self.stage == 3 else self._grouped(self._masters())

    def others(self, trained: Mapping[str, Expr]) -> dict[str, Expr]:
        """Return frozen parameters, and in stages below 3 whatever else the module holds, buffers last."""
        found = {name: self._frozen(name, shape) for name, shape in self.said.frozen.items()}
        file = next(iter(self.models.values()))
        if self.stage < 3:
            shared = {name for name, _ in self.said.shared}
            for piece in self.pieces.held[file]:
                name = piece.removeprefix("module.")
                if name != piece and name not in trained and name not in found and name not in shared:
                    found[name] = self.pieces.piece(file, piece)
            return found
        return found | {name: self._of(file, f"module.{name}") for name in self.said.buffers}

    def _of(self, file: str, name: str) -> Expr:
        if name not in self.pieces.held[file]:
            raise ValueError(f"{shown(file)}: no {shown(name)}")
        return self.pieces.piece(file, name)

    def _masters(self) -> dict[int, list[Expr]]:
        """Return the flat fp32 tensors of the ranks that are there, a list per group."""
        key = MASTERS[self.stage == 3]
        found = {}
        for rank, file in self.optimizers.items():
            count = sum(name.startswith(f"{key}.") for name in self.pieces.held[file])
            flats = [self._of(file, f"{key}.{number}") for number in range(count)]
            if not flats or any(len(flat.shape) != 1 or flat.dtype != flats[0].dtype for flat in flats):
                raise ValueError(f"{shown(file)}: it holds no flat {key}")
            found[rank] = flats
        if len({len(flats) for flats in found.values()}) > 1:
            raise ValueError(f"the ranks hold different numbers of {key}")
        return found

    def _stand_in(self, rank: int, size: int) -> Expr:
        """Stand for a missing rank's elements."""
        return read(TensorSpec(f"{_MISSING}{rank}", BY_NAME["float32"], (size,)))

    def _grouped(self, flats: dict[int, list[Expr]]) -> dict[str, Expr]:
        """Cut the parameters out of each group's ranks one after another (stages 1 and 2)."""
        found: dict[str, Expr] = {}
        groups = len(next(iter(flats.values())))
        if groups != len(self.said.shapes):
            raise ValueError(f"{groups} groups of masters and {len(self.said.shapes)} of shapes")
        said = self.extras[next(iter(self.optimizers.values()))].paddings
        for number, shapes in enumerate(self.said.shapes):
            paddings = said[number] if number < len(said) else (0,) * len(shapes)
            if len(paddings) != len(shapes):
                raise ValueError(f"{len(paddings)} paddings for the {len(shapes)} parameters of group {number}")
            need = sum(math.prod(shape) for shape in shapes.values()) + sum(paddings)
            whole = join(self._ranks_of(flats, number, need))
            last = paddings[-1] if paddings else 0
            if not -last <= whole.shape[0] - need < max(2 * self.said.ranks, 1 + need):
                raise ValueError(f"group {number} holds {whole.shape[0]} elements, its parameters need {need}")
            at = 0
            for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
                found[name] = reshape(cut(whole, 0, at, at + math.prod(shape)), shape)
                at += math.prod(shape) + padding
        return found

    def _ranks_of(self, flats: dict[int, list[Expr]], number: int, need: int) -> list[Expr]:
        """Return a group's parts in the order of the ranks; of missing ones as many elements as they must have."""
        count = self.said.ranks
        held = {rank: groups[number] for rank, groups in flats.items()}
        inner = [part.shape[0] for rank, part in held.items() if rank < count - 1]
        last = next(iter(held.values())).shape[0]
        share = max(inner) if inner else max(0, need - last) // max(1, count - 1)
        return [
            held[rank] if rank in held else self._stand_in(rank, max(0, min(share, need - rank * share)))
            for rank in range(count)
        ]

    def _each(self, flats: dict[int, list[Expr]]) -> dict[str, Expr]:
        """Cut every parameter out of all ranks (stage 3)."""
        found: dict[str, Expr] = {}
        count, at = self.said.ranks, 0
        size = next(iter(flats.values()))
        total = sum(part.shape[0] for part in size)
        ranks = [join(flats[rank]) if rank in flats else self._stand_in(rank, total) for rank in range(count)]
        shapes = {name: shape for group in self.said.shapes for name, shape in group.items()}
        need = sum(-(-math.prod(shape) // count) for shape in shapes.values())
        if any(flat.shape[0] < need for flat in ranks):
            raise ValueError(f"a rank holds fewer than the {counted(need, 'element')} of its parameters")
        for name, shape in shapes.items():
            share = -(-math.prod(shape) // count)
            parts = [cut(flat, 0, at, at + share) for flat in ranks]
            found[name] = reshape(cut(join(parts), 0, 0, math.prod(shape)), shape)
            at += share
        return found

    def _frozen(self, name: str, shape: tuple[int, ...]) -> Expr:
        key = f"frozen_param_fragments.{name}"
        if self.stage < 3:
            return reshape(self._of(next(iter(self.models.values())), key), shape)
        size, count = math.prod(shape), self.said.ranks
        share = -(-size // count)
        held = {rank: self._of(file, key) for rank, file in self.models.items()}
        dtype = next(iter(held.values())).dtype
        parts = []
        for rank in range(count):
            if rank in held:
                parts.append(reshape(held[rank], (math.prod(held[rank].shape),)))
            else:
                parts.append(read(TensorSpec(f"{_MISSING}{rank}", dtype, (share,))))
        return reshape(cut(join(parts), 0, 0, size), shape)
