"""PyTorch's distributed checkpoints (DCP): ``.metadata`` and ``__<rank>_<n>.distcp``, without torch.

Format: torch 2.13, torch/distributed/checkpoint (metadata.py, filesystem.py). ``.metadata`` is a pickle of
dataclasses, which is read by the same interpreter as every torch file here: names are compared with a literal list and
never resolved. A tensor is a set of chunks, offset and shape each; a chunk is a ``torch.save`` archive of its own at an
offset of a ``.distcp`` file, and it may be empty. FSDP1, FSDP2 and HSDP write this, and Megatron's ``torch_dist``.

Megatron (core 0.16.1, ``torch_dist``, told by its ``metadata.json``) stacks the layers of a stack along a leading axis,
``decoder.layers.mlp.linear_fc1.weight``: they are given out one by one, as ``decoder.layers.3.mlp.linear_fc1.weight``.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..axes import cut, read, reshape
from ..dtypes import BY_TORCH, DType
from ..errors import InputError, counted
from ..formats.torchpickle import MAX_PICKLE, Unpickler
from ..formats.torchvalues import Global, Object, PickleError, Table, Tensor, is_count, kind
from ..formats.torchzip import TorchSource, open_tree
from ..formats.untrusted import MAX_TENSORS, parse_json, read_small, shown
from ..tensors import Extent, TensorSpec
from .assembled import Arrangement, Assembled, Copy, Placed
from .grid import Box, assemble_boxes
from .placing import Broken, Findings, Held, grouped, settle, unfit_files

if TYPE_CHECKING:
    from ..tensors import Bits

METADATA = ".metadata"
_PACKAGE = "torch.distributed.checkpoint."
_OBJECTS = frozenset(
    {f"{_PACKAGE}metadata.{name}" for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )} | {f"{_PACKAGE}filesystem._StorageInfo", "torch.Size"}
    # Megatron keeps the plans of every rank in the metadata
    | {f"{_PACKAGE}planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")}
    | {f"megatron.core.dist_checkpointing.strategies.torch.{name}" for name in ("MCoreMetadata", "MCoreSavePlan")}
)  # fmt: skip
_HINT = "take the whole directory that torch.distributed.checkpoint wrote"
_STACK = re.compile(r"((?:.*\.)?layers\.)(?!\d)(.+)")
TRAINING = re.compile(r"(?:chained_\d+\.)?(?:optimizer|opt_param_scheduler|rng_state|rerun_state_machine_state)\b")
MAX_LAYERS = 4096
"""Layers of a stack."""
OPEN = 64
"""Archives of chunks that are kept open."""


def is_dcp(path: Path) -> bool:
    """Say whether a directory is a distributed checkpoint of PyTorch."""
    return (path / METADATA).is_file()


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where one chunk's archive lies."""

    file: str
    offset: int
    length: int


def open_dcp(path: Path, *, findings: Findings | None = None) -> Assembled:
    """Open a distributed checkpoint of PyTorch as one, reading ``.metadata`` only.

    Where the state holds a model beside an optimizer, as ``{"model": ..., "optim": ...}``, the model's tensors are
    taken under their own names and the rest is listed in ``skipped``. InputError lists every tensor with a missing,
    lapping or misshapen chunk, and missing files.
    """
    where = shown(str(path / METADATA))
    try:
        tensors, others, stored, paths = _metadata(_load(path / METADATA))
    except PickleError as error:
        raise InputError(f"the metadata is not accepted: {error}", where=where, hint=_HINT) from None
    unfit = unfit_files(path, (s.file for s in stored.values()))
    if unfit:
        gone = [f"{shown(str(path / file))}: {why}" for file, why in unfit.items()]
        said = f"{counted(len(gone), 'file')} of the checkpoint cannot be read"
        settle(InputError(said, where=gone, hint=_HINT), findings)
        stored = {key: place for key, place in stored.items() if place.file not in unfit}
    names, skipped = _model(tensors, paths)
    stacked = is_stacked(path)
    skipped += [(name, "extra state" if "_extra_state" in name else "not a tensor") for name in others]
    specs: dict[str, TensorSpec] = {}
    homes: dict[str, _Stored] = {}
    placed: dict[str, Placed] = {}
    problems: list[str] = []
    for fqn, name in names.items():
        if stacked and TRAINING.match(fqn):
            skipped.append((fqn, "training state"))
            continue
        dtype, shape, boxes = tensors[fqn]
        held = _held(fqn, dtype, boxes, stored, specs, homes)
        there = {box[0] for box, _ in held}
        lost = [box for box in boxes if 0 not in box[1] and box[0] not in there]
        try:
            if lost:
                raise ValueError(f"the chunk at {list(lost[0][0])} is in no file")
            expr = assemble_boxes({box: read(specs[copy.piece]) for box, copy in held}, shape, dtype)
            copies = {box[0]: (copy,) for box, copy in held}
            whole = Placed(name, expr, copies, boxes={box[0]: box for box, _ in held})
            placed |= {one.name: one for one in (unstacked(whole) if stacked else [whole])}
        except ValueError as error:
            problems.append(f"{shown(fqn)}: {error}")
            if findings is not None:
                missing: dict[Box, tuple[int, ...]] = dict.fromkeys(lost, ())
                findings.broken[name] = Broken(name, dtype, shape, grouped(held), str(error), missing)
    if problems:
        settle(InputError("the chunks do not make up the tensors", where=problems, hint=_HINT), findings)
    ranks = 1 + max((_rank(s.file) for s in stored.values()), default=0)
    kind_ = "megatron torch_dist" if stacked else "torch DCP"
    return Assembled(path, _Chunks(path, specs, homes), Arrangement(kind_, ranks, placed, skipped=tuple(skipped)))


_Tensors = dict[str, tuple[DType, tuple[int, ...], list[Box]]]
_Places = dict[tuple[str, tuple[int, ...]], _Stored]


def _held(
    fqn: str, dtype: DType, boxes: list[Box], stored: _Places, specs: dict[str, TensorSpec], homes: dict[str, _Stored]
) -> list[Held]:
    """Return the chunks of a tensor that are in a file; notes each chunk's spec and place."""
    found: list[Held] = []
    for offset, size in boxes:
        home = stored.get((fqn, offset))
        if 0 in size or home is None:
            continue
        piece = f"{fqn}@{','.join(map(str, offset))}"
        specs[piece] = TensorSpec(piece, dtype, size)
        homes[piece] = home
        found.append(((offset, size), Copy(_rank(home.file), piece)))
    return found


def is_stacked(path: Path) -> bool:
    """Say whether Megatron wrote a directory, which stacks layers."""
    about = path / "metadata.json"
    if not about.is_file():
        return False
    data, _ = read_small(about, 1 << 16)
    try:
        root = parse_json(data)
    except ValueError:
        return False
    return isinstance(root, dict) and root.get("sharded_backend") == "torch_dist"


def unstacked(whole: Placed) -> list[Placed]:
    """Return the layers of a stacked tensor one by one, and any other tensor as it is."""
    match = _STACK.fullmatch(whole.name)
    if match is None or not whole.expr.shape or not whole.expr.shape[0]:
        return [whole]
    if whole.expr.shape[0] > MAX_LAYERS:
        raise ValueError(f"it stacks {whole.expr.shape[0]} layers, more than {MAX_LAYERS}")
    layers = []
    for layer in range(whole.expr.shape[0]):
        expr = cut(whole.expr, 0, layer, layer + 1)
        inside = {at: box for at, box in whole.boxes.items() if box[0][0] <= layer < box[0][0] + box[1][0]}
        slices = {at[1:]: whole.slices[at] for at in inside}
        boxes = {at[1:]: (start[1:], size[1:]) for at, (start, size) in inside.items()}
        name = f"{match[1]}{layer}.{match[2]}"
        layers.append(Placed(name, reshape(expr, expr.shape[1:]), slices, boxes=boxes))
    return layers


def _rank(file: str) -> int:
    """Return the rank in ``__<rank>_<n>.distcp``; 0 where the name has another form."""
    digits = file.rpartition("/")[2].removeprefix("__").partition("_")[0]
    return int(digits) if digits.isdigit() and len(digits) < 8 else 0


def _model(tensors: _Tensors, paths: Mapping[str, tuple[object, ...]]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Choose the tensors of the model: all, or those under the key "model" where other state lies beside them."""
    roots = {paths[fqn][0] if len(paths.get(fqn, ())) > 1 else None for fqn in tensors}
    if "model" not in roots or None in roots:
        return {fqn: fqn for fqn in tensors}, []
    names, skipped = {}, []
    for fqn in tensors:
        root, *rest = paths[fqn]
        if root == "model":
            names[fqn] = ".".join(map(str, rest))
        else:
            skipped.append((fqn, f"state of {root}"))
    return names, skipped


def _load(path: Path) -> object:
    data, size = read_small(path, MAX_PICKLE)
    if size > MAX_PICKLE:
        raise PickleError(f"it has {size} bytes, more than {MAX_PICKLE}")
    return Unpickler(data, _OBJECTS).load()


def _metadata(
    root: object,
) -> tuple[_Tensors, list[str], _Places, dict[str, tuple[object, ...]]]:
    """Check the metadata's types; returns tensors, names of other values, where chunks lie, and the names' paths."""
    fields = _fields(root, "Metadata", "MCoreMetadata")
    if isinstance(reshaped := fields.get("mcore_data"), Table) and reshaped.items:
        raise PickleError("it holds tensors that Megatron reshaped for its flat optimizer, which is not supported")
    tensors: _Tensors = {}
    others: list[str] = []
    for name, about in _pairs(fields.get("state_dict_metadata")):
        if not isinstance(name, str) or name in tensors:
            raise PickleError(f"a name is {kind(name)} or stands twice")
        if isinstance(about, Object) and about.path.endswith("BytesStorageMetadata"):
            others.append(name)
        else:
            tensors[name] = _tensor(_fields(about, "TensorStorageMetadata"))
    stored: _Places = {}
    for index, info in _pairs(fields.get("storage_data")):
        at, place = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
        if place.get("transform_descriptors"):
            raise PickleError("its files are compressed or transformed, which is not supported")
        fqn, offset = at.get("fqn"), at.get("offset")
        file, start, length = place.get("relative_path"), place.get("offset"), place.get("length")
        if not isinstance(fqn, str) or not isinstance(file, str) or not _inside(file):
            raise PickleError("it names a file that does not lie beside it")
        if not isinstance(start, int) or not isinstance(length, int) or not is_count(start) or not is_count(length):
            raise PickleError("a chunk has no place in its file")
        stored[fqn, _sizes(offset) if offset is not None else ()] = _Stored(file, start, length)
    planner = fields.get("planner_data")
    paths = {
        name: keys for name, keys in _pairs(planner if isinstance(planner, Table) else Table())
        if isinstance(name, str) and isinstance(keys, tuple) and all(isinstance(key, str | int) for key in keys)
    }  # fmt: skip
    return tensors, others, stored, paths


def _inside(file: str) -> bool:
    parts = file.split("/")
    return file.isprintable() and not any(part in ("", ".", "..") for part in parts) and len(file) < 1024


def _tensor(about: Mapping[str, object]) -> tuple[DType, tuple[int, ...], list[Box]]:
    properties = about.get("properties")
    state = properties.state if isinstance(properties, Object) else None
    first = state[0] if isinstance(state, tuple) and state else None
    if isinstance(state, Table):
        first = {k: v for k, v in state.items if isinstance(k, str)}.get("dtype")
    dtype = BY_TORCH.get(first.path.removeprefix("torch.")) if isinstance(first, Global) else None
    if dtype is None:
        raise PickleError(f"a tensor's type is {kind(first)}, which is not supported")
    chunks = about.get("chunks")
    if not isinstance(chunks, list) or len(chunks) > MAX_TENSORS:
        raise PickleError("a tensor has no list of chunks")
    fields = [_fields(chunk, "ChunkStorageMetadata") for chunk in chunks]
    return dtype, _sizes(about.get("size")), [(_sizes(f.get("offsets")), _sizes(f.get("sizes"))) for f in fields]


def _sizes(value: object) -> tuple[int, ...]:
    if isinstance(value, Object) and value.path == "torch.Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, tuple) or len(value) > 32 or not all(map(is_count, value)):
        raise PickleError("a shape or an offset is no tuple of sizes")
    return value


def _fields(value: object, *names: str) -> dict[str, object]:
    """Return the attributes of an instance of one of the metadata's classes."""
    if not isinstance(value, Object) or value.path.rpartition(".")[2] not in names:
        raise PickleError(f"{kind(value)} stands where a {names[0]} is expected")
    return {key: held for key, held in _pairs(value.state) if isinstance(key, str)}


def _pairs(value: object) -> list[tuple[object, object]]:
    if not isinstance(value, Table):
        raise PickleError(f"{kind(value)} stands where a mapping is expected")
    return value.items


class _Chunks:
    """The chunks of a checkpoint as tensors; an archive is looked into when its chunk is first asked for."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec], homes: Mapping[str, _Stored]) -> None:
        self.path = path
        self.format = "torch"
        self.specs = specs
        self.metadata: Mapping[str, str] = {}
        self.files = frozenset(path / home.file for home in homes.values())
        self._homes = homes
        self._open: OrderedDict[str, TorchSource] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Bits:
        """Return a chunk's bits, or those of rows [start, stop)."""
        with self._lock:
            return self._archive(name).read("", rows)

    def extents(self, name: str) -> tuple[Extent, ...]:
        """Return the byte range of a chunk inside its file."""
        with self._lock:
            return self._archive(name).extents("")

    def close(self) -> None:
        """Close every archive that is open."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def _archive(self, name: str) -> TorchSource:
        if name not in self._open:
            home, spec = self._homes[name], self.specs[name]
            file = self.path / home.file
            tree = open_tree(file, region=(home.offset, home.length))
            root = tree.root
            if not isinstance(root, Tensor) or (BY_TORCH[root.dtype], root.shape) != (spec.dtype, spec.shape):
                tree.archive.file.close()
                raise InputError(
                    f"{kind(root)} stands where {spec.dtype} {list(spec.shape)} is expected",
                    where=f"{shown(str(file))}: {shown(name)}", hint=_HINT,
                )  # fmt: skip
            self._open[name] = tree.source({"": root})
            if len(self._open) > OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(name)
        return self._open[name]
