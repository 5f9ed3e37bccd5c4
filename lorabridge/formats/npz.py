"""numpy ``.npz`` archives: a zip of one stored ``.npy`` member per tensor, read lazily by their headers and written.

Format: numpy 1.26, ``numpy/lib/format.py`` (versions 1.0 to 3.0 of the header) and ``numpy.savez``. Nothing is
unpickled: object arrays are refused, and so are compressed members, whose unpacked size is anybody's guess. numpy knows
neither bfloat16 nor fp8; arrays of these are saved as nameless bytes (``V2``), which are refused too.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import struct
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import BY_NAME, DType
from ..errors import InputError, LorabridgeError, MappingError
from ..tensors import Extent, TensorSpec
from .ranges import Piece
from .sniff import identify, refusal
from .storedzip import BLOCK, Record, check_crc, combine_crc, descriptor, directory, local_header, place, read_records
from .untrusted import MAX_NAME, MAX_RANK, open_regular, pread_into, shown

if TYPE_CHECKING:
    from ..files.fsio import OutFile
    from ..tensors import Bits

NAME = "npz"
SUFFIXES = (".npz",)
MAGIC = b"\x93NUMPY"
MAX_NPY_HEADER = 10_000
"""Bytes of a header that numpy itself accepts (``max_header_size``)."""
_SUFFIX = ".npy"
_KINDS = {
    "b1": "bool", "u1": "uint8", "i1": "int8", "u2": "uint16", "i2": "int16", "u4": "uint32", "i4": "int32",
    "u8": "uint64", "i8": "int64", "f2": "float16", "f4": "float32", "f8": "float64", "c8": "complex64",
    "c16": "complex128",
}  # fmt: skip
_DESCR = {name: f"{'|' if code in ('b1', 'u1', 'i1') else '<'}{code}" for code, name in _KINDS.items()}
_RESAVE = "save the arrays with numpy.savez (not savez_compressed), or as safetensors"


@dataclass(frozen=True, slots=True)
class _Member:
    """One array: its record, where its data begins, and whether the first axis is the fastest."""

    record: Record
    start: int
    fortran: bool


class NpzSource:
    """Read one .npz archive; see ``lorabridge.tensors.Source``."""

    def __init__(
        self, file: io.FileIO, path: Path, specs: Mapping[str, TensorSpec], members: Mapping[str, _Member]
    ) -> None:
        self.format = NAME
        self.path = path
        self.specs = specs
        self.metadata: Mapping[str, str] = {}
        self._file = file
        self._members = members

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Bits:
        """Return the bits of a tensor, or of rows [start, stop) of its first axis; a whole one's CRC-32 is checked."""
        spec, member = self.specs[name], self._members[name]
        shape = spec.shape
        if rows is not None and (not shape or not 0 <= rows[0] <= rows[1] <= shape[0]):
            raise ValueError(f"rows {rows} are outside the shape {shape} of {name}")
        if rows is None or member.fortran:
            whole = self._whole(name, member, spec)
            return whole if rows is None else np.ascontiguousarray(whole[rows[0] : rows[1]])
        bits = np.empty((rows[1] - rows[0], *shape[1:]), spec.dtype.carrier())
        step = spec.nbytes // shape[0] if shape[0] else 0
        self._fill(name, bits.reshape(-1).view(np.uint8).data, member.start + rows[0] * step)
        return bits

    def _whole(self, name: str, member: _Member, spec: TensorSpec) -> Bits:
        raw = np.empty(member.record.size, np.uint8)
        self._fill(name, raw.data, member.record.offset)
        check_crc(zlib.crc32(raw.data), self.path, member.record)
        flat = np.empty(spec.size, spec.dtype.carrier())
        flat.view(np.uint8)[:] = raw[member.start - member.record.offset :]
        if member.fortran:
            return np.ascontiguousarray(flat.reshape(spec.shape[::-1]).transpose())
        return flat.reshape(spec.shape)

    def _fill(self, name: str, view: memoryview, offset: int) -> None:
        if pread_into(self._file, view, offset) != len(view):
            raise InputError("the file changed or ended early", where=f"{shown(str(self.path))}: {shown(name)}")

    def extents(self, name: str) -> tuple[Extent, ...]:
        """Return the tensor's byte range; () where it must be read because it is stored column by column, or empty."""
        member, spec = self._members[name], self.specs[name]
        return () if member.fortran or not spec.nbytes else (Extent(self.path, member.start, spec.nbytes),)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_file(path: Path) -> NpzSource:
    """Open an archive, reading its directory and the headers of its members.

    Raises InputError for anything that is no such archive, damaged, compressed, or that holds arrays of objects, of
    strings or of types that numpy cannot name.
    """
    path = Path(path)
    file = open_regular(path)
    try:
        return _open(file, path)
    except BaseException as error:
        file.close()
        if isinstance(error, InputError) and (found := identify(path)).name != NAME:
            raise refusal(path, found) from None
        raise


def _open(file: io.FileIO, path: Path) -> NpzSource:
    specs: dict[str, TensorSpec] = {}
    members: dict[str, _Member] = {}
    bad: list[str] = []
    for record in read_records(file, path):
        name = record.name.removesuffix(_SUFFIX)
        try:
            if name == record.name or not name or name in specs:
                raise ValueError("is no .npy member with a name of its own")
            dtype, shape, fortran, length = _header(file, record)
            spec = TensorSpec(name, dtype, shape)
            if spec.nbytes != record.size - length:
                raise ValueError(f"needs {spec.nbytes} bytes for {dtype} {list(shape)}, has {record.size - length}")
        except ValueError as error:
            bad.append(f"{shown(str(path))}: {shown(record.name)} {error}")
            continue
        specs[name] = spec
        members[name] = _Member(record, record.offset + length, fortran and len(shape) > 1)
    if bad:
        raise InputError("members of the archive cannot be used", where=bad, hint=_RESAVE)
    return NpzSource(file, path, specs, members)


def _header(file: io.FileIO, record: Record) -> tuple[DType, tuple[int, ...], bool, int]:
    """Read a member's header: (type, shape, column order, bytes before the data). ValueError says what is wrong."""
    head = bytearray(min(record.size, MAX_NPY_HEADER + 12))
    pread_into(file, memoryview(head), record.offset)
    if len(head) < 10 or head[:6] != MAGIC or head[6] not in (1, 2, 3) or head[7] != 0:
        raise ValueError("does not begin as an .npy array does")
    first = 10 if head[6] == 1 else 12
    length = int.from_bytes(head[8:first], "little")
    if length > MAX_NPY_HEADER or first + length > len(head):
        raise ValueError("has a header that is too long or cut off")
    try:
        fields = ast.literal_eval(bytes(head[first : first + length]).decode("utf-8" if head[6] == 3 else "latin-1"))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise ValueError("has a header that is no dictionary") from None
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise ValueError("has a header without descr, fortran_order and shape")
    shape = fields["shape"]
    if (
        not isinstance(shape, tuple)
        or len(shape) > MAX_RANK
        or not all(type(n) is int and 0 <= n < 1 << 62 for n in shape)
    ):
        raise ValueError("has a shape that is none")
    if type(fields["fortran_order"]) is not bool:
        raise ValueError("has an order that is neither true nor false")
    return _dtype(fields["descr"]), shape, fields["fortran_order"], first + length


def _dtype(descr: object) -> DType:
    if not isinstance(descr, str):
        raise ValueError("is a table of records")
    if descr[1:2] == "O":
        raise ValueError("holds Python objects, which only a pickle can")
    name = _KINDS.get(descr[1:])
    if name is None:
        raise ValueError(f"has the type {shown(descr)}, which is no number numpy can name")
    if descr[:1] == ">" and BY_NAME[name].itemsize > 1:
        raise ValueError("is big-endian")
    return BY_NAME[name]


def make_sink(create: Callable[[str], OutFile], filename: str) -> NpzSink:
    """Return a sink that writes one archive as ``numpy.load`` reads it, data aligned to 64 bytes."""
    return NpzSink(create, filename)


class NpzSink:
    """Write an .npz archive; see ``lorabridge.tensors.Sink``. It has no place for metadata."""

    def __init__(self, create: Callable[[str], OutFile], filename: str) -> None:
        self._create = create
        self._filename = filename
        self._lock = threading.Lock()
        self._heads: dict[str, bytes] = {}
        self._records: dict[str, Record] = {}
        self._pieces: dict[str, list[tuple[int, int, int]]] = {}
        self._directory = 0

    def begin(self, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        """Fix the layout; a MappingError lists tensors that numpy cannot hold and names that no member can have."""
        _check(specs)
        self._heads = {spec.name: npy_header(spec) for spec in specs}
        sizes = [(spec.name + _SUFFIX, len(self._heads[spec.name]) + spec.nbytes) for spec in specs]
        records, self._directory, total = place("", sizes)
        self._records = dict(zip(self._heads, records, strict=True))
        self._pieces = {spec.name: [] for spec in specs}
        self._out = self._create(self._filename)
        self._out.allocate(total)

    def write(self, name: str, offset: int, block: Bits) -> None:
        """Write a block at a byte offset inside the tensor's buffer."""
        data = block.reshape(-1).view(np.uint8).data
        self._out.write(self._position(name, offset, len(data)), data)
        self._note(name, offset, len(data), zlib.crc32(data))

    def copy(self, name: str, offset: int, extent: Extent) -> None:
        """Copy a file range to a byte offset inside the tensor's buffer and read it back for its checksum."""
        at = self._position(name, offset, extent.length)
        self._out.copy(at, extent.path, extent.offset, extent.length)
        crc = 0
        for start in range(0, extent.length, BLOCK):
            crc = zlib.crc32(self._out.read(at + start, min(BLOCK, extent.length - start)), crc)
        self._note(name, offset, extent.length, crc)

    checked = True

    def ranges(self, name: str) -> tuple[Extent, ...]:
        """Return where the staged file holds the tensor, see ``formats.ranges``."""
        record, head = self._records[name], len(self._heads[name])
        return (Extent(self._out.path, record.offset + head, record.size - head),)

    def settle(self, name: str, pieces: Sequence[Piece] = ()) -> None:
        """Count a tensor as written by others."""
        for piece in pieces:
            self._note(name, *piece)

    def finish(self) -> None:
        """Write headers, checksums and the directory. LorabridgeError when a tensor is not covered exactly once."""
        records = []
        for name, record in self._records.items():
            head = self._heads[name]
            record = dataclasses.replace(record, crc=self._crc(name, zlib.crc32(head), record.size - len(head)))
            self._out.write(record.header, local_header(record.name, record.header, record.size) + head)
            self._out.write(record.offset + record.size, descriptor(record))
            records.append(record)
        self._out.write(self._directory, directory(records, self._directory))
        self._out.close()

    def _crc(self, name: str, crc: int, nbytes: int) -> int:
        at = 0
        for offset, length, part in sorted(self._pieces[name]):
            if offset != at:
                break
            crc, at = combine_crc(crc, part, length), at + length
        if at != nbytes:
            raise LorabridgeError(
                "a tensor was not written exactly once", where=shown(name), hint="report this as a bug"
            )
        return crc

    def _position(self, name: str, offset: int, length: int) -> int:
        record, head = self._records[name], len(self._heads[name])
        if not 0 <= offset <= offset + length <= record.size - head:
            raise ValueError(f"bytes {offset} to {offset + length} are outside {name}")
        return record.offset + head + offset

    def _note(self, name: str, offset: int, length: int, crc: int) -> None:
        with self._lock:
            self._pieces[name].append((offset, length, crc))


def npy_header(spec: TensorSpec) -> bytes:
    """Return what precedes the data of an array, padded to a multiple of 64 bytes as numpy does."""
    text = f"{{'descr': {_DESCR[spec.dtype.name]!r}, 'fortran_order': False, 'shape': {spec.shape!r}, }}".encode()
    text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
    return MAGIC + b"\x01\x00" + struct.pack("<H", len(text)) + text


def _check(specs: Sequence[TensorSpec]) -> None:
    unknown = [f"{shown(spec.name)}: {spec.dtype}" for spec in specs if spec.dtype.name not in _DESCR]
    if unknown:
        raise MappingError("numpy has no such type", where=unknown, hint="choose another with --dtype")
    seen: set[str] = set()
    bad = []
    for spec in specs:
        parts = spec.name.split("/")
        raw = spec.name.encode(errors="replace")
        if (
            spec.name in seen
            or {"", ".", ".."} & set(parts)
            or "\\" in spec.name
            or "\0" in spec.name
            or len(raw) + len(_SUFFIX) > MAX_NAME
            or raw.decode() != spec.name
        ):
            bad.append(shown(spec.name))
        seen.add(spec.name)
    if bad or not specs:
        raise MappingError("tensor names are empty, repeated, too long or no text", where=bad, hint="rename them")
