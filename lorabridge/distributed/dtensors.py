"""What each rank of FSDP2 or tensor parallelism saved by itself: ``model_world_size_<w>_rank_<r>.pt`` of DTensors.

Format: torch 2.13, ``torch.save`` of a state dict of DTensors (torch/distributed/tensor: _api.py, _dtensor_spec.py,
placement_types.py; torch/distributed/device_mesh.py); the file names are verl's (verl 0.5,
utils/checkpoint/fsdp_checkpoint_manager.py). Every DTensor says the whole's shape, the rank's place in the mesh, and
per mesh axis whether it cuts a tensor axis (``Shard``) or copies (``Replicate``). Parts are of ``ceil(size / ranks)``
rows, so that the last ones may be short or empty. A ``_StridedShard`` (FSDP2 over tensor parallelism) cuts what the
later mesh axes left. FSDP1's ShardedTensors cannot be read without the processes that wrote them, and are refused.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InputError
from ..formats.torchvalues import Global, Object, Table, Tensor, call, is_count, kind
from ..formats.torchzip import TorchSource, open_tree
from ..formats.untrusted import shown
from .assembled import Arrangement, Assembled, Copy, Files, Placed, same_bits
from .grid import Box
from .layout import Layout
from .placing import Broken, Findings, Held, damaged, grouped, place_boxes, place_whole, settle

_FILE = re.compile(r"model_world_size_(\d{1,6})_rank_(\d{1,6})\.pt")
_HINT = "take the whole directory, with the files of every rank"
_TENSOR = "torch.distributed.tensor."
_OLD = "torch.distributed._tensor."
_WRAPPED = "torch._tensor._rebuild_from_type_v2"
_PARAMETER = "torch._utils._rebuild_parameter"
_DTENSORS = (f"{_TENSOR}DTensor", f"{_TENSOR}_api.DTensor", f"{_OLD}DTensor", f"{_OLD}api.DTensor")
_OBJECTS = frozenset(
    {_WRAPPED, _PARAMETER, *_DTENSORS, "torch.distributed.device_mesh.DeviceMesh"}
    | {f"torch.distributed._mesh_layout.{name}" for name in ("_MeshLayout", "_FlatLayout")}
    | {f"{_TENSOR}_dtensor_spec.{name}" for name in ("DTensorSpec", "TensorMeta", "ShardOrderEntry")}
    | {f"{_OLD}placement_types.{name}" for name in ("DTensorSpec", "TensorMeta")}
    | {
        f"{package}placement_types.{name}" for package in (_TENSOR, _OLD)
        for name in ("Shard", "Replicate", "Partial", "_Partial", "_StridedShard")
    }
)  # fmt: skip
FSDP1 = "torch.distributed._shard.sharded_tensor"


def rank_files(path: Path) -> dict[int, Path]:
    """Return the ranks' model files, by rank; none where the directory holds no such files."""
    found = {int(m[2]): file for file in path.glob("model_world_size_*.pt") if (m := _FILE.fullmatch(file.name))}
    return dict(sorted(found.items()))


@dataclass(frozen=True, slots=True)
class _Cut:
    """A placement that cuts: the mesh axis, the tensor axis, and the split factor of a strided one (0: plain)."""

    mesh: int
    axis: int
    factor: int


@dataclass(frozen=True, slots=True)
class _Local:
    """What a rank's file says of one DTensor."""

    shape: tuple[int, ...]
    place: tuple[int, ...]
    cuts: tuple[_Cut, ...]


def open_dtensors(path: Path, *, findings: Findings | None = None) -> Assembled:
    """Open the files of every rank as one checkpoint, reading their pickles only.

    What is no DTensor must be equal on every rank, and is compared. A rank whose parts another holds too may be
    missing. InputError names missing ranks, parts that do not make up their tensor, partial sums and FSDP1's tensors.
    """
    files = rank_files(path)
    worlds = {int(m[1]) for file in files.values() if (m := _FILE.fullmatch(file.name))}
    if len(worlds) > 1:
        said = ", ".join(map(str, sorted(worlds)))
        raise InputError(
            f"the directory holds the files of runs of {said} ranks", where=shown(str(path)),
            hint="leave the files of one run in it",
        )  # fmt: skip
    said_of: dict[str, dict[str, _Local]] = {}
    named = {file.name: file for file in files.values()}
    pieces = Files(path, "torch", named, lambda file: _open_rank(file, said_of), damaged=damaged(findings))
    files = {rank: file for rank, file in files.items() if file.name in pieces.held}
    try:
        return Assembled(path, pieces, _arrange(path, files, max(worlds), pieces, said_of, findings))
    except BaseException:
        pieces.close()
        raise


def _arrange(
    path: Path, files: Mapping[int, Path], world: int, pieces: Files, said_of: Mapping[str, Mapping[str, _Local]],
    findings: Findings | None,
) -> Arrangement:  # fmt: skip
    names = {name: None for file in files.values() for name in pieces.held[file.name]}
    placed: dict[str, Placed] = {}
    problems: list[str] = []
    for name in names:
        held = {rank: f"{file.name}/{name}" for rank, file in files.items() if name in pieces.held[file.name]}
        copies = tuple(Copy(rank, piece) for rank, piece in held.items())
        locals_ = {r: said_of[files[r].name][name] for r in held if name in said_of[files[r].name]}
        boxes: list[Held] = []
        layout = None
        lost: dict[Box, tuple[int, ...]] = {}
        try:
            if not locals_:
                placed[name] = place_whole(name, copies, pieces)
                continue
            if len(locals_) < len(held):
                raise ValueError("it is a DTensor on some ranks only")
            boxes, layout, lost = _boxes(locals_, held, world)
            found = place_boxes(name, next(iter(locals_.values())).shape, boxes, pieces)
            if layout.devices < world:  # a mesh of some of the run's axes: along the others there must be copies
                _compare(found, pieces)
            placed[name] = replace(found, mesh=layout)
        except ValueError as error:
            problems.append(f"{shown(name)}: {error}")
            if findings is not None:
                shape = next(iter(locals_.values())).shape if boxes else None
                own = [(((0,) * len(s.shape), s.shape), c) for c in copies for s in [pieces.specs[c.piece]]]
                dtype = pieces.specs[copies[0].piece].dtype
                findings.broken[name] = Broken(name, dtype, shape, grouped(boxes or own), str(error), lost, layout)
    absent = [rank for rank in range(world) if rank not in files]
    if problems:
        gone = [f"rank {rank}: model_world_size_{world}_rank_{rank}.pt is missing" for rank in absent]
        said = "the ranks do not make up one checkpoint"
        settle(InputError(said, where=[*gone, *problems], hint=_HINT), findings)
    notes = [f"rank {rank} is missing; others hold its parts" for rank in absent]
    return Arrangement("torch DTensors of every rank", world, placed, tuple(notes))


def _compare(placed: Placed, pieces: Files) -> None:
    for copies in placed.slices.values():
        for copy in copies[1:]:
            if not same_bits(pieces, copies[0].piece, copy.piece):
                raise ValueError(
                    f"differs between rank {copies[0].rank} and rank {copy.rank}, whose DTensors say the same place"
                )


def _boxes(
    locals_: Mapping[int, _Local], held: Mapping[int, str], world: int
) -> tuple[list[Held], Layout, dict[Box, tuple[int, ...]]]:
    """Return which box of the tensor every rank holds, and the boxes that ranks which are not there held alone."""
    first = next(iter(locals_.values()))
    if any((local.shape, local.cuts, len(local.place)) != (first.shape, first.cuts, len(first.place))
           for local in locals_.values()):  # fmt: skip
        raise ValueError("the ranks say different shapes or placements")
    sizes = tuple(1 + max(local.place[axis] for local in locals_.values()) for axis in range(len(first.place)))
    if len(sizes) == 1 and world % sizes[0]:
        sizes = (world,)  # the last ranks are not there
    devices = math.prod(sizes)
    if devices > world or world % devices:
        raise ValueError(f"it lies on a mesh of {list(sizes)}, and the run had {world} ranks")
    order = _order(first.cuts, sizes)
    boxes = [(_box(first, local.place, order, sizes), Copy(rank, held[rank])) for rank, local in locals_.items()]
    known = {box for box, _ in boxes}
    lost: dict[Box, tuple[int, ...]] = {}
    for number, place in enumerate(itertools.product(*map(range, sizes))):
        box = _box(first, place, order, sizes)
        if box not in known and 0 not in box[1]:
            lost[box] = (*lost.get(box, ()), *((number,) if devices == world else ()))
    cuts = tuple(tuple(cut.mesh for cut in order if cut.axis == axis) for axis in range(len(first.shape)))
    return boxes, Layout(sizes, cuts, 0, first.shape), lost


def _box(local: _Local, place: Sequence[int], order: Sequence[_Cut], sizes: Sequence[int]) -> Box:
    """Return the box of a tensor that lies at a place of the mesh."""
    start, shape = [0] * len(local.shape), list(local.shape)
    for cut in order:
        share = -(-shape[cut.axis] // sizes[cut.mesh])
        begin = min(place[cut.mesh] * share, shape[cut.axis])
        start[cut.axis] += begin
        shape[cut.axis] = min(share, shape[cut.axis] - begin)
    return tuple(start), tuple(shape)


def _order(cuts: Sequence[_Cut], sizes: Sequence[int]) -> list[_Cut]:
    """Return the order in which the mesh cuts: from the left, a strided shard after those to its right."""
    order = [cut for cut in cuts if not cut.factor]
    for cut in cuts:
        if not cut.factor:
            continue
        inner = [other for other in cuts if other.axis == cut.axis and other is not cut]
        parts = 1
        for other in inner:
            parts *= sizes[other.mesh]
        if parts != cut.factor or any(other.factor or other.mesh < cut.mesh for other in inner):
            raise ValueError(f"its strided shard of factor {cut.factor} is not of FSDP2 over tensor parallelism")
        order.append(cut)
    return order


def _open_rank(path: Path, said_of: dict[str, dict[str, _Local]]) -> TorchSource:
    """Open one rank's file; ``said_of`` gets what its DTensors say, by the file's name."""
    try:
        tree = open_tree(path, objects=_OBJECTS)
    except InputError as error:
        if FSDP1 not in error.problem:
            raise
        raise InputError(
            "FSDP1's ShardedTensors cannot be put together without the processes that wrote them",
            where=shown(str(path)),
            hint="save with torch.distributed.checkpoint (dcp.save), whose directory is read, or with StateDictType "
            "FULL_STATE_DICT",
        ) from None
    try:
        tensors, described = _state(tree.root)
    except ValueError as error:
        tree.archive.file.close()
        raise InputError(f"it is no state dict of tensors: {error}", where=shown(str(path)), hint=_HINT) from None
    said_of[path.name] = described
    return tree.source(tensors)


def _state(root: object) -> tuple[dict[str, Tensor], dict[str, _Local]]:
    if not isinstance(root, Table):
        raise ValueError(f"{kind(root)} stands where a mapping is expected")
    tensors: dict[str, Tensor] = {}
    described: dict[str, _Local] = {}
    for name, value in root.items:
        if not isinstance(name, str) or not name or name in tensors:
            raise ValueError(f"a name is {kind(name)}, empty or stands twice")
        while isinstance(value, Object) and value.path == _PARAMETER and value.arguments:
            value = value.arguments[0]
        if isinstance(value, Object) and value.path == _WRAPPED:
            found = _wrapped(name, value)
            value = found[0]
            if found[1] is not None:
                described[name] = found[1]
        if not isinstance(value, Tensor):
            raise ValueError(f"{shown(name)} is {kind(value)}")
        tensors[name] = value
    return tensors, described


def _wrapped(name: str, value: Object) -> tuple[object, _Local | None]:
    match value.arguments:
        case (_, Global(subtype), _, (Table() as state) | (None, Table() as state)) if subtype in _DTENSORS:
            held = _fields(state)
            try:
                return held.get("_local_tensor"), _local(held.get("_spec"))
            except ValueError as error:
                raise ValueError(f"{shown(name)}: {error}") from None
    return call(value.path, value.arguments), None


def _fields(value: object) -> dict[str, object]:
    state = value.state if isinstance(value, Object) else value
    return {k: v for k, v in state.items if isinstance(k, str)} if isinstance(state, Table) else {}


def _local(spec: object) -> _Local:
    about = _fields(spec)
    meta, placements = about.get("tensor_meta"), about.get("placements")
    shape = meta.arguments[0] if isinstance(meta, Object) and meta.arguments else None
    place = _fields(about.get("mesh")).get("_coordinate_on_dim")
    if not _counts(shape) or not _counts(place) or not isinstance(placements, tuple):
        raise ValueError("its DTensor does not say its shape, its mesh or its placements")
    assert isinstance(shape, tuple)
    assert isinstance(place, tuple | list)
    if len(placements) != len(place) or len(shape) > 32:
        raise ValueError(f"it has {len(placements)} placements on a mesh of {len(place)} axes")
    cuts = []
    for mesh, placement in enumerate(placements):
        form = placement.path.rpartition(".")[2] if isinstance(placement, Object) else kind(placement)
        state = _fields(placement)
        axis, factor = state.get("dim"), state.get("split_factor", 0)
        if form == "Replicate":
            continue
        if form not in ("Shard", "_StridedShard"):
            raise ValueError(f"its placement is {form}: partial sums are no values")
        if not isinstance(axis, int) or not 0 <= axis < len(shape) or not isinstance(factor, int) or factor < 0:
            raise ValueError("a shard names an axis that the tensor does not have")
        cuts.append(_Cut(mesh, axis, factor if form == "_StridedShard" else 0))
    return _Local(shape, tuple(place), tuple(cuts))


def _counts(value: object) -> bool:
    return isinstance(value, tuple | list) and len(value) <= 32 and all(map(is_count, value))
