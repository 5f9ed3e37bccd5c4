"""The safetensors container: a strict reader that trusts no header, and a writer that every loader accepts.

Format: safetensors 0.8, README "Format" and tensor.rs; what MindSpore's own reader needs beyond it:
mindspore 2.10, parallel/transform_safetensors.py (``read_metadata``) and train/serialization.py.
"""

from __future__ import annotations

import io
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..dtypes import BY_SAFETENSORS, DType
from ..errors import InputError, LorabridgeError, MappingError
from ..tensors import Extent, TensorSpec
from .ranges import Piece
from .untrusted import (
    MAX_HEADER,
    MAX_METADATA,
    MAX_NAME,
    MAX_RANK,
    MAX_TENSORS,
    open_regular,
    parse_json,
    pread_into,
    shown,
    size_of,
)

if TYPE_CHECKING:
    from ..files.fsio import OutFile
    from ..tensors import Bits

NAME = "safetensors"
SUFFIXES: tuple[str, ...] = (".safetensors",)

Flavour = Literal["hf", "ms"]

_PREFIX = 8
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_MINDSPORE = frozenset({"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F16", "BF16", "F32", "F64"})
_DAMAGED = "download or make the file again"


class SafetensorsSource:
    """Read one safetensors file; ``specs`` is in the order of the data, whatever the header's order."""

    format = NAME

    def __init__(self, path: Path, file: io.FileIO, header: Header) -> None:
        self.path = path
        self.specs: Mapping[str, TensorSpec] = header.specs
        self.metadata: Mapping[str, str] = header.metadata
        self._begins = header.begins
        self._file = file

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Bits:
        """Return a tensor's bits, or those of rows [start, stop); see :class:`lorabridge.tensors.Source`.

        ValueError when the rows are no interval of the first axis, or no whole bytes for types below a byte.
        """
        spec = self.specs[name]
        shape, offset, length = _interval(spec, rows)
        out = np.empty(length, np.uint8) if spec.dtype.bits % 8 else np.empty(shape, spec.dtype.carrier())
        view = out.reshape(-1).view(np.uint8).data
        if pread_into(self._file, view, self._begins[name] + offset) != length:
            raise InputError(
                "the file ended early: it changed since it was opened",
                where=f"{shown(str(self.path))}: {shown(name)}",
                hint="leave the input alone while it is being read",
            )
        return out

    def extents(self, name: str) -> tuple[Extent, ...]:
        """Return the one byte range that holds the tensor, () for a tensor without elements."""
        length = self.specs[name].nbytes
        return (Extent(self.path, self._begins[name], length),) if length else ()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(frozen=True, slots=True)
class Header:
    """Hold what a header says, checked: specs in data order, absolute offsets, metadata."""

    specs: dict[str, TensorSpec]
    begins: dict[str, int]
    metadata: dict[str, str]


def open_file(path: Path) -> SafetensorsSource:
    """Open a safetensors file and check its whole header against its size, reading no tensor.

    Raises InputError naming every tensor that is wrong: offsets that overlap, leave holes or miss the end of the
    file, shapes that do not fill them, unknown element types, repeated names, and anything above the limits.
    """
    path = Path(path)
    file = open_regular(path)
    try:
        return SafetensorsSource(path, file, _read_header(path, file))
    except BaseException:
        file.close()
        raise


def _read_header(path: Path, file: io.FileIO) -> Header:
    size = size_of(file)
    prefix = bytearray(_PREFIX)
    if pread_into(file, memoryview(prefix), 0) < _PREFIX:
        raise _bad(path, f"it has {size} bytes, the length of the header alone takes {_PREFIX}")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        raise _bad(path, f"its header claims {length} bytes, more than the {MAX_HEADER} that are allowed")
    if _PREFIX + length > size:
        raise _bad(path, f"its header claims {length} bytes, {size - _PREFIX} follow")
    raw = bytearray(length)
    if pread_into(file, memoryview(raw), _PREFIX) != length or not raw.startswith(b"{"):
        raise _bad(path, "its header does not begin with '{'")
    try:
        header = parse_json(bytes(raw))
    except ValueError as error:
        raise _bad(path, f"its header is malformed: {error}") from None
    if not isinstance(header, dict):
        raise _bad(path, "its header is no JSON object")
    metadata = _metadata(path, header.pop(_METADATA, {}))
    return _tensors(path, header, metadata, _PREFIX + length, size)


def _metadata(path: Path, value: object) -> dict[str, str]:
    if value is None:  # as mlx 0.32 writes; safetensors reads it as none
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _bad(path, f"its {_METADATA} does not map strings to strings")
    try:
        size = sum(len(key.encode()) + len(text.encode()) for key, text in value.items())
    except UnicodeEncodeError:
        raise _bad(path, f"its {_METADATA} holds a lone surrogate") from None
    if size > MAX_METADATA:
        raise _bad(path, f"its {_METADATA} holds {size} bytes, more than the {MAX_METADATA} that are allowed")
    return value


def _tensors(path: Path, entries: dict[str, object], metadata: dict[str, str], start: int, size: int) -> Header:
    """Check every entry by itself, then that the tensors tile the data from its first byte to its last."""
    if len(entries) > MAX_TENSORS:
        raise _bad(path, f"it holds {len(entries)} tensors, more than the {MAX_TENSORS} that are allowed")
    issues: list[str] = []
    found: list[tuple[int, int, TensorSpec]] = []
    for name, entry in entries.items():
        try:
            found.append(_entry(name, entry))
        except ValueError as error:
            issues.append(f"{shown(str(path))}: {shown(name)}: {error}")
    if not issues:
        found.sort(key=lambda item: item[:2])
        at = 0
        for begin, end, spec in found:
            if begin != at:
                what = "a hole" if begin > at else "an overlap"
                issues.append(f"{shown(str(path))}: {shown(spec.name)}: begins at {begin}, {what}: {at} comes next")
            at = max(at, end)
        if not issues and at != size - start:
            raise _bad(path, f"its tensors take {at} bytes, {size - start} follow the header")
    if issues:
        raise InputError("the header of the safetensors file is malformed", where=issues, hint=_DAMAGED)
    specs = {spec.name: spec for _, _, spec in found}
    return Header(specs, {spec.name: start + begin for begin, _, spec in found}, metadata)


def _entry(name: str, entry: object) -> tuple[int, int, TensorSpec]:
    """Return begin, end and spec of one header entry; ValueError says what is wrong with it."""
    check_name(name)
    if not isinstance(entry, dict) or set(entry) != _FIELDS:
        raise ValueError("the entry does not consist of dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in BY_SAFETENSORS:
        raise ValueError(f"the element type {shown(str(code)[:MAX_NAME])} is unknown")
    if not _naturals(shape):
        raise ValueError("the shape is no list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError("the data_offsets are no pair of ascending numbers")
    dtype = BY_SAFETENSORS[code]
    check_shape(dtype, shape)
    if math.prod(shape) * dtype.bits != (offsets[1] - offsets[0]) * 8:
        raise ValueError(f"the shape {shape} of {code} does not fill {offsets[1] - offsets[0]} bytes")
    return offsets[0], offsets[1], TensorSpec(name, dtype, tuple(shape))


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def check_name(name: str) -> None:
    """Raise ValueError for a name that no file may hold: empty, too long, or not encodable as UTF-8."""
    if not name:
        raise ValueError("the name is empty")
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError("the name holds a lone surrogate") from None
    if size > MAX_NAME:
        raise ValueError(f"the name has {size} bytes, more than the {MAX_NAME} that are allowed")


def check_shape(dtype: DType, shape: Sequence[int]) -> None:
    """Raise ValueError for a shape that no array can have, or that ends inside a byte."""
    if len(shape) > MAX_RANK:
        raise ValueError(f"the shape has {len(shape)} axes, more than the {MAX_RANK} that are allowed")
    if math.prod(size or 1 for size in shape) * dtype.bits >= 2**66:
        raise ValueError(f"the shape {list(shape)} is larger than any file")
    if math.prod(shape) * dtype.bits % 8:
        raise ValueError(f"the shape {list(shape)} of {dtype} ends inside a byte")


def _interval(spec: TensorSpec, rows: tuple[int, int] | None) -> tuple[tuple[int, ...], int, int]:
    """Return shape, byte offset and byte length of rows [start, stop) of a tensor, or of all of it."""
    if rows is None:
        return spec.shape, 0, spec.nbytes
    start, stop = rows
    if not spec.shape or not 0 <= start <= stop <= spec.shape[0]:
        raise ValueError(f"{spec.name} of shape {spec.shape} has no rows {rows}")
    bits = math.prod(spec.shape[1:]) * spec.dtype.bits
    if bits * start % 8 or bits * stop % 8:
        raise ValueError(f"rows {rows} of {spec.name} are no whole bytes")
    return (stop - start, *spec.shape[1:]), bits * start // 8, bits * (stop - start) // 8


def _bad(path: Path, problem: str) -> InputError:
    return InputError("the safetensors file is malformed", where=f"{shown(str(path))}: {problem}", hint=_DAMAGED)


class SafetensorsSink:
    """Write one safetensors file of a fixed layout."""

    def __init__(self, create: Callable[[str], OutFile], filename: str, flavour: Flavour) -> None:
        self._create = create
        self._filename = filename
        self._flavour = flavour
        self._out: OutFile | None = None
        self._places: dict[str, tuple[int, int]] = {}
        self._missing: dict[str, int] = {}
        self._lock = threading.Lock()

    def begin(self, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        """Create the file and write its header.

        The given order is kept when every tensor then begins at a multiple of its element width; otherwise wider
        elements come first, stable. Metadata is sorted by key. Raises MappingError for tensors the file cannot hold.
        """
        pairs = {"format": "ms" if self._flavour == "ms" else "pt", **metadata}
        _refuse(self._filename, specs, pairs, self._flavour)
        header, ends = _layout(_aligned(specs), pairs)
        if len(header) - _PREFIX > MAX_HEADER:
            problem = f"the header takes {len(header) - _PREFIX} bytes, safetensors allows {MAX_HEADER}"
            raise MappingError(problem, where=shown(self._filename), hint="write shards with --max-shard-size")
        self._places = {spec.name: (len(header) + end - spec.nbytes, spec.nbytes) for spec, end in ends}
        self._missing = {spec.name: spec.nbytes for spec in specs if spec.nbytes}
        out = self._create(self._filename)
        self._out = out
        out.allocate(len(header) + (ends[-1][1] if ends else 0))
        out.write(0, header)

    def write(self, name: str, offset: int, block: Bits) -> None:
        """Write a C-contiguous block at a byte offset of the tensor."""
        out, at = self._place(name, offset, block.nbytes)
        if block.nbytes:
            out.write(at, block.reshape(-1).view(np.uint8).data)

    def copy(self, name: str, offset: int, extent: Extent) -> None:
        """Copy a file range to a byte offset of the tensor."""
        out, at = self._place(name, offset, extent.length)
        if extent.length:
            out.copy(at, extent.path, extent.offset, extent.length)

    checked = False

    def ranges(self, name: str) -> tuple[Extent, ...]:
        """Return where the staged file holds the tensor, see ``formats.ranges``."""
        if self._out is None:
            raise RuntimeError("begin() has not run")
        return (Extent(self._out.path, *self._places[name]),)

    def settle(self, name: str, pieces: Sequence[Piece] = ()) -> None:
        """Count a tensor as written by another process."""
        with self._lock:
            self._missing.pop(name, None)

    def finish(self) -> None:
        """Flush the file. LorabridgeError when a tensor was not written whole: a defect, never the input's fault."""
        if self._out is None or self._missing:
            where = [f"{shown(self._filename)}: {shown(name)}" for name in self._missing]
            raise LorabridgeError("tensors were not written exactly once", where=where, hint="report this defect")
        self._out.close()

    def _place(self, name: str, offset: int, length: int) -> tuple[OutFile, int]:
        begin, size = self._places[name]
        if self._out is None or offset < 0 or offset + length > size:
            raise ValueError(f"{length} bytes at {offset} lie outside {name} of {size} bytes")
        if length:
            with self._lock:
                left = self._missing.pop(name, 0) - length
                if left:
                    self._missing[name] = left
        return self._out, begin + offset


def make_sink(create: Callable[[str], OutFile], filename: str, *, flavour: Flavour = "hf") -> SafetensorsSink:
    """Return a sink for one file. ``flavour`` "hf" says ``format: pt`` unless the metadata says otherwise, "ms" says
    ``format: ms`` and refuses what mindspore.load_checkpoint(format="safetensors") cannot read.
    """
    return SafetensorsSink(create, filename, flavour)


def _refuse(filename: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str], flavour: Flavour) -> None:
    """Raise one MappingError that lists every tensor this file cannot hold."""
    issues: list[str] = []
    seen: set[str] = set()
    for spec in specs:
        problem = _unfit(spec, metadata, flavour) or ("the name occurs twice" if spec.name in seen else "")
        seen.add(spec.name)
        if problem:
            issues.append(f"{shown(filename)}: {shown(spec.name)}: {problem}")
    if issues:
        reader = "MindSpore reads from safetensors" if flavour == "ms" else "safetensors holds"
        hint = "cast floating-point tensors with --dtype, leave others out with --exclude, or write another container"
        raise MappingError(f"tensors are not what {reader}", where=issues, hint=hint)
    problem = ""
    try:
        size = sum(len(key.encode()) + len(text.encode()) for key, text in metadata.items())
        problem = f"the metadata takes {size} bytes, {MAX_METADATA} are allowed" if size > MAX_METADATA else ""
    except UnicodeEncodeError:
        problem = "the metadata holds a lone surrogate"
    if problem or len(specs) > MAX_TENSORS:
        problem = problem or f"{len(specs)} tensors are more than the {MAX_TENSORS} that are allowed"
        raise MappingError(problem, where=shown(filename), hint="write less into one file")


def _unfit(spec: TensorSpec, metadata: Mapping[str, str], flavour: Flavour) -> str:
    """Say why a file cannot hold a tensor, "" when it can."""
    try:
        check_name(spec.name)
        check_shape(spec.dtype, spec.shape)
    except ValueError as error:
        return str(error)
    if spec.name == _METADATA:
        return "the name is reserved"
    if spec.dtype.safetensors is None:
        return f"safetensors has no element type {spec.dtype}"
    if flavour == "ms" and spec.dtype.safetensors not in _MINDSPORE:
        return f"MindSpore reads no {spec.dtype} from safetensors"
    if flavour == "ms" and spec.name in metadata:
        return "MindSpore takes a metadata key of this name for its element type"
    return ""


def _aligned(specs: Sequence[TensorSpec]) -> Sequence[TensorSpec]:
    """Return the specs as given if that aligns every tensor to its element width, else by descending width."""
    at = 0
    for spec in specs:
        if at % max(1, spec.dtype.bits // 8):
            return sorted(specs, key=lambda spec: -spec.dtype.bits)
        at += spec.nbytes
    return specs


def _layout(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, list[tuple[TensorSpec, int]]]:
    """Return the length-prefixed header, spelled as the safetensors library does, and each tensor's end offset."""
    header: dict[str, object] = {_METADATA: dict(sorted(metadata.items()))}
    ends: list[tuple[TensorSpec, int]] = []
    at = 0
    for spec in specs:
        entry = {"dtype": spec.dtype.safetensors, "shape": spec.shape, "data_offsets": (at, at + spec.nbytes)}
        header[spec.name] = entry
        at += spec.nbytes
        ends.append((spec, at))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_PREFIX, "little") + text, ends
