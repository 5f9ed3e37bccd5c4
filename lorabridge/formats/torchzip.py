"""Read torch checkpoints (.bin, .pt, .pth) without torch and without trusting them: zip archives, and the form before.

A file may be what ``torch.save`` makes of

- a mapping of names to tensors or parameters (a state_dict). Other values beside the tensors are not tensors' data:
  they are listed in ``skipped``, as is everything else that is left out;
- a training checkpoint: a mapping in which exactly one value is such a mapping ({"state_dict": ..., "optimizer":
  ..., "epoch": 3}). That one is used, the other entries are listed in ``skipped``. Where several would do, or tensors
  stand beside one, the file is refused with the choices, and ``key`` chooses: an entry's name, or "" for the top.

Attributes of an OrderedDict (the module versions in ``_metadata``), ``requires_grad`` and devices are not read.

Checksums: the pickle's is always checked. A tensor's is checked when ``read`` reads a whole record, as it does for
contiguous tensors that own their storage; :func:`verify_crc` checks every record.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import BY_TORCH
from ..errors import InputError
from ..tensors import Extent, TensorSpec
from . import marks
from .sniff import identify, refusal
from .storedzip import BLOCK, Record, check_crc, read_directory, record_bytes
from .torchlegacy import is_legacy, read_legacy
from .torchpickle import MAX_PICKLE, Unpickler
from .torchsink import make_sink
from .torchtable import RESAVE, choose, collect
from .torchvalues import PickleError, Storage, Tensor
from .untrusted import (
    MAX_METADATA,
    MAX_RANK,
    Region,
    open_regular,
    pread_into,
    shown,
    size_of,
    start_of,
)

if TYPE_CHECKING:
    from ..tensors import Bits

__all__ = ["NAME", "SUFFIXES", "TorchSource", "Tree", "make_sink", "open_file", "open_tree", "verify_crc"]

NAME = "torch"
SUFFIXES = (".bin", ".pt", ".pth")
MAX_EXPANDED = 2**30
"""Bytes of a tensor that repeats elements of a smaller storage."""

_SMALL = {".format_version", ".storage_alignment", "version", "byteorder", ".data/serialization_id"}
_SCRIPT = ("constants.pkl", "code/")


class TorchSource:
    """Read one torch zip checkpoint; see ``lorabridge.tensors.Source`` for the methods.

    ``skipped`` lists (name, reason) of everything in the file that is no tensor of the chosen mapping.
    """

    def __init__(
        self,
        file: io.FileIO | Region,
        path: Path,
        tensors: Mapping[str, Tensor],
        records: Mapping[str, Record],
        *,
        big_endian: bool,
        skipped: tuple[tuple[str, str], ...],
        metadata: Mapping[str, str],
    ) -> None:
        self.format = NAME
        self.path = path
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, BY_TORCH[tensor.dtype], tensor.shape) for name, tensor in tensors.items()
        }
        self.metadata: Mapping[str, str] = metadata
        self.skipped = skipped
        self.records = records
        self._file = file
        self._tensors = tensors
        self._big_endian = big_endian

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Bits:
        """Return the bits of a tensor, or of rows [start, stop) of its first axis, C-contiguous and little-endian.

        Raises KeyError for an unknown name, ValueError for rows outside the shape, InputError when the file ends early
        or a checksum differs.
        """
        tensor, spec = self._tensors[name], self.specs[name]
        record = self.records[f"data/{tensor.storage.key}"]
        shape, offset = tensor.shape, tensor.offset
        if rows is not None:
            if not shape or not 0 <= rows[0] <= rows[1] <= shape[0]:
                raise ValueError(f"rows {rows} are outside the shape {shape} of {name}")
            offset += rows[0] * tensor.stride[0]
            shape = (rows[1] - rows[0], *shape[1:])
        carrier = spec.dtype.carrier()
        if math.prod(shape) == 0:
            return np.empty(shape, carrier)
        width = carrier.itemsize
        if _contiguous(shape, tensor.stride):
            bits = np.empty(shape, carrier)
            self._fill(name, bits, record, offset * width)
        else:
            span = np.empty(_reach(shape, tensor.stride) + 1, carrier)
            self._fill(name, span, record, offset * width)
            strides = tuple(step * width for step in tensor.stride)
            bits = np.array(np.lib.stride_tricks.as_strided(span, shape, strides), order="C")
        return _swapped(bits, spec) if self._big_endian else bits

    def extents(self, name: str) -> tuple[Extent, ...]:
        """Return the tensor's byte range; () where it must be read because it is strided, empty or big-endian."""
        tensor, spec = self._tensors[name], self.specs[name]
        swapped = self._big_endian and spec.dtype.itemsize > 1
        if swapped or not spec.nbytes or not _contiguous(tensor.shape, tensor.stride):
            return ()
        record = self.records[f"data/{tensor.storage.key}"]
        at = start_of(self._file) + record.offset + tensor.offset * spec.dtype.itemsize
        return (Extent(self.path, at, spec.nbytes),)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _fill(self, name: str, bits: Bits, record: Record, offset: int) -> None:
        view = bits.reshape(-1).view(np.uint8).data
        if pread_into(self._file, view, record.offset + offset) != len(view):
            raise InputError("the file changed or ended early", where=f"{shown(str(self.path))}: {shown(name)}")
        if len(view) == record.size:
            check_crc(zlib.crc32(view), self.path, record)


def open_file(path: Path, *, key: str | None = None) -> TorchSource:
    """Open a torch zip checkpoint, reading its directory and its pickle but no tensor.

    ``key`` names the entry of a training checkpoint that holds the tensors ("" for the top mapping); None finds it.
    Raises InputError for anything that is not such a file, unsafe, damaged or ambiguous, StorageError when the system
    refuses.
    """
    path = Path(path)
    file = open_regular(path)
    try:
        return _open(file, path, key)
    except BaseException as error:
        file.close()
        if isinstance(error, InputError) and (found := identify(path)).format != NAME:
            raise refusal(path, found) from None
        raise


@dataclass(frozen=True, slots=True)
class Tree:
    """Everything that one ``torch.save`` wrote, as the stand-ins of ``torchvalues``."""

    root: object
    path: Path
    archive: Archive

    def source(self, tensors: Mapping[str, Tensor]) -> TorchSource:
        """Return some of its tensors under names of the caller's; closing it closes the file.

        InputError for tensors that do not fit their storages.
        """
        _check_views(tensors, shown(str(self.path)))
        archive = self.archive
        return TorchSource(
            archive.file, self.path, tensors, archive.records, big_endian=archive.big_endian, skipped=(), metadata={}
        )


def open_tree(path: Path, *, region: tuple[int, int] | None = None, objects: Container[str] = ()) -> Tree:
    """Read the pickle of a torch archive, whatever it holds; no tensor is read.

    ``region``: first byte and length of the archive inside the file. ``objects``: classes whose instances are kept, see
    :class:`.torchpickle.Unpickler`. Raises InputError for anything that is not such an archive, unsafe or damaged. The
    file stays open for ``Tree.source``; ``Tree.archive.file`` closes it.
    """
    file = open_regular(path)
    try:
        part = Region(file, *region) if region else file
        if region and (min(region) < 0 or sum(region) > size_of(file)):
            raise InputError("the file ends before a part that is said to be in it", where=shown(str(path)))
        archive, root = _read(part, path, objects)
        return Tree(root, path, archive)
    except BaseException:
        file.close()
        raise


def verify_crc(source: TorchSource, *, progress: Callable[[int, int], None] | None = None) -> None:
    """Read every record of the archive and compare its CRC-32 with the stored one.

    ``progress`` is called with bytes done and bytes in all. Raises InputError listing the records that differ; a record
    stored without a checksum (zero) cannot differ.
    """
    total = sum(record.size for record in source.records.values())
    done, bad = 0, []
    with open_regular(source.path) as file:
        buffer = memoryview(bytearray(BLOCK))
        for record in source.records.values():
            crc, at = 0, 0
            while at < record.size:
                block = buffer[: min(BLOCK, record.size - at)]
                if pread_into(file, block, record.offset + at) != len(block):
                    raise InputError(
                        "the file changed or ended early", where=f"{shown(str(source.path))}: {record.name}"
                    )
                crc, at = zlib.crc32(block, crc), at + len(block)
                done += len(block)
                if progress:
                    progress(done, total)
            if record.crc not in (0, crc):
                bad.append(f"{shown(str(source.path))}: {record.name}")
    if bad:
        raise InputError("stored checksums differ from the data", where=bad, hint="download or copy the file again")


@dataclass(frozen=True, slots=True)
class Archive:
    """An open torch archive: its records, the storages its pickle mentions, and the byte order of its data."""

    file: io.FileIO | Region
    records: Mapping[str, Record]
    storages: Mapping[str, Storage]
    big_endian: bool


def _read(file: io.FileIO | Region, path: Path, objects: Container[str] = ()) -> tuple[Archive, object]:
    """Check an archive and interpret its pickle; returns the archive and what was pickled."""
    where = shown(str(path))
    if is_legacy(file):
        records, storages, big_endian, root = read_legacy(file, where, objects)
        return Archive(file, records, storages, big_endian), root
    _, records = read_directory(file, path)
    if any(name.startswith(_SCRIPT) for name in records):
        raise InputError("this is a TorchScript archive, which holds code", where=where, hint=RESAVE)
    known = {*_SMALL, "data.pkl", marks.RECORD}
    odd = [name for name in records if name not in known and not _is_storage(name)]
    missing = [name for name in ("data.pkl", "version") if name not in records]
    if odd or missing:
        places = [
            *(f"{where}: {shown(name)} is unexpected" for name in odd),
            *(f"{where}: no {name}" for name in missing),
        ]
        raise InputError("the archive does not hold what torch.save writes", where=places, hint=RESAVE)
    big_endian = _versions(file, path, records)
    if records["data.pkl"].size > MAX_PICKLE:
        raise InputError(f"data.pkl has {records['data.pkl'].size} bytes, more than {MAX_PICKLE}", where=where)
    unpickler = Unpickler(record_bytes(file, path, records["data.pkl"]), objects)
    try:
        root = unpickler.load()
    except PickleError as error:
        raise InputError(f"the pickle is not accepted: {error}", where=f"{where}: data.pkl", hint=RESAVE) from None
    _check_storages(unpickler.storages, records, where)
    return Archive(file, records, unpickler.storages, big_endian), root


def _open(file: io.FileIO, path: Path, key: str | None) -> TorchSource:
    archive, root = _read(file, path)
    where, records = shown(str(path)), archive.records
    table, prefix, skipped = choose(root, where, key)
    tensors, others = collect(table, prefix, where)
    _check_views(tensors, where)
    unused = sorted({name for name in records if _is_storage(name)} - {f"data/{key}" for key in archive.storages})
    skipped += [*others, *((name, "a record that nothing refers to") for name in unused)]
    said = _marks(file, path, records)
    return TorchSource(
        file, path, tensors, records, big_endian=archive.big_endian, skipped=tuple(skipped), metadata=said
    )


def _marks(file: io.FileIO | Region, path: Path, records: Mapping[str, Record]) -> dict[str, str]:
    record = records.get(marks.RECORD)
    if record is None:
        return {}
    where = f"{shown(str(path))}: {marks.RECORD}"
    if record.size > MAX_METADATA:
        raise InputError(f"the record has {record.size} bytes, more than {MAX_METADATA}", where=where, hint=RESAVE)
    return marks.decode(record_bytes(file, path, record), where=where)


def _is_storage(name: str) -> bool:
    return name.startswith("data/") and "/" not in name[5:]


def _versions(file: io.FileIO | Region, path: Path, records: Mapping[str, Record]) -> bool:
    """Check the records that describe the archive; returns whether its data is big-endian."""
    texts: dict[str, bytes] = {}
    for name in sorted(_SMALL & set(records)):
        if records[name].size > 256:
            raise InputError(f"the record {name} is too long", where=shown(str(path)), hint=RESAVE)
        texts[name] = record_bytes(file, path, records[name])
    version = texts["version"].strip()
    # torch reads file format versions 1 to 10 (caffe2/serialize/versions.h)
    if not (version.isdigit() and len(version) <= 2 and 1 <= int(version) <= 10):
        raise InputError(f"the file format version {version!r} is unknown", where=shown(str(path)), hint=RESAVE)
    order = texts.get("byteorder", b"little")
    if order not in (b"little", b"big"):
        raise InputError(f"the byte order {order!r} is unknown", where=shown(str(path)), hint=RESAVE)
    return order == b"big"


def _check_storages(storages: Mapping[str, Storage], records: Mapping[str, Record], where: str) -> None:
    bad = []
    for key, storage in storages.items():
        record = records.get(f"data/{key}")
        dtype = BY_TORCH.get(storage.dtype)
        if record is None or not _is_storage(f"data/{key}"):
            bad.append(f"{where}: data/{shown(key)} is missing")
        elif dtype and record.size != storage.numel * dtype.itemsize:
            need = storage.numel * dtype.itemsize
            bad.append(f"{where}: data/{shown(key)} has {record.size} bytes, its storage {need}")
    if bad:
        raise InputError("the archive's records do not fit its pickle", where=bad, hint="download or save it again")


def _check_views(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that reach outside their storage or unfold it beyond measure."""
    bad = []
    for name, tensor in tensors.items():
        width = BY_TORCH[tensor.dtype].itemsize
        held = tensor.storage.numel * BY_TORCH[tensor.storage.dtype].itemsize
        size = math.prod(tensor.shape) * width
        reach = tensor.offset + _reach(tensor.shape, tensor.stride) + 1 if size else 0
        if len(tensor.shape) > MAX_RANK:
            bad.append(f"{where}: {shown(name)} has {len(tensor.shape)} axes, more than {MAX_RANK}")
        elif math.prod(max(length, 1) for length in tensor.shape) * width >= 2**63:
            bad.append(f"{where}: {shown(name)} has a shape that is too large")
        elif reach * width > held:
            bad.append(f"{where}: {shown(name)} reaches byte {reach * width} of a storage of {held}")
        elif size > max(held, MAX_EXPANDED):
            bad.append(f"{where}: {shown(name)} unfolds {held} bytes to {size}")
    if bad:
        raise InputError("tensors do not fit their storages", where=bad, hint="download or save the file again")


def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Return the index of the last element of a view that has one."""
    return sum((length - 1) * step for length, step in zip(shape, stride, strict=True))


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1:
            if step != expected:
                return False
            expected *= length
    return True


def _swapped(bits: Bits, spec: TensorSpec) -> Bits:
    """Turn big-endian elements into little-endian ones; a complex number is two numbers."""
    width = spec.dtype.itemsize // (2 if spec.dtype.kind == "complex" else 1)
    if width > 1:
        bits.reshape(-1).view(f"u{width}").byteswap(inplace=True)
    return bits
