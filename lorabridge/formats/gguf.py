"""GGUF files (llama.cpp), versions 2 and 3, little-endian: unquantized tensors, read lazily and written as version 3.

Layout: ``GGUF``, u32 version, u64 tensors, u64 pairs; pairs of key, type and value; tensors with name, axes (the
fastest first, so reversed here), type and offset; then the data, aligned. Source: ggml's docs/gguf.md and gguf 0.19.

Values that are no strings stand in ``metadata`` with their type in front: ``f32:16.0``, ``u32:2``, ``[str]:["a"]``.
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..dtypes import BY_NAME, DType
from ..errors import InputError, MappingError
from ..tensors import Extent, TensorSpec
from .ranges import Piece
from .sniff import identify, refusal
from .untrusted import MAX_HEADER, MAX_TENSORS, open_regular, pread_into, shown, size_of

if TYPE_CHECKING:
    from ..files.fsio import OutFile
    from ..tensors import Bits

NAME = "gguf"
SUFFIXES = (".gguf",)
MAGIC = b"GGUF"
ALIGNMENT = 32
MAX_PAIRS = 100_000
MAX_NAME = 63
"""Bytes of a tensor's name (GGML_MAX_NAME, less its end)."""
MAX_AXES = 4
KEPT_ITEMS = 10_000
"""Items of an array that metadata keeps; a vocabulary has more."""
TYPES = {0: "float32", 1: "float16", 24: "int8", 25: "int16", 26: "int32", 27: "int64", 28: "float64", 30: "bfloat16"}
_CODES = {name: code for code, name in TYPES.items()}
_SCALARS = {
    0: ("u8", "<B"), 1: ("i8", "<b"), 2: ("u16", "<H"), 3: ("i16", "<h"), 4: ("u32", "<I"), 5: ("i32", "<i"),
    6: ("f32", "<f"), 7: ("bool", "<?"), 10: ("u64", "<Q"), 11: ("i64", "<q"), 12: ("f64", "<d"),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_BY_WORD = {**{word: code for code, (word, _) in _SCALARS.items()}, "str": _STRING}
_DAMAGED = "download the file again, or make it again with llama.cpp's converter"


class _Damaged(ValueError):
    """Say in one clause what is wrong."""


@dataclass
class _Header:
    """Walk over the bytes of a header."""

    data: bytes
    at: int = 0

    def take(self, form: str) -> int | float | bool:
        """Read one number."""
        size = struct.calcsize(form)
        if self.at + size > len(self.data):
            raise _Damaged("the header is cut off, or larger than is accepted")
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += size
        found: int | float | bool = value
        return found

    def count(self, form: str, limit: int, what: str) -> int:
        """Read a number of things."""
        value = int(self.take(form))
        if value > limit:
            raise _Damaged(f"{value} {what} are more than is accepted")
        return value

    def text(self) -> str:
        """Read a string."""
        length = self.count("<Q", len(self.data) - self.at, "bytes of a string")
        raw = self.data[self.at : self.at + length]
        if len(raw) < length:
            raise _Damaged("the header is cut off")
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise _Damaged("a string is not UTF-8") from None

    def value(self) -> str:
        """Read a typed value as metadata spells it."""
        kind = int(self.take("<I"))
        if kind == _STRING:
            text = self.text()
            return f"str:{text}" if _typed(text) else text
        if kind == _ARRAY:
            inner = int(self.take("<I"))
            length = self.count("<Q", len(self.data), "items of an array")
            word = "str" if inner == _STRING else _scalar(inner)[0]
            items = [self.text() if inner == _STRING else self.take(_scalar(inner)[1]) for _ in range(length)]
            kept = json.dumps(items) if length <= KEPT_ITEMS else f"({length} items)"
            return f"[{word}]:{kept}"
        word, form = _scalar(kind)
        value = self.take(form)
        return f"{word}:{str(value).lower() if word == 'bool' else repr(value)}"


def _scalar(kind: int) -> tuple[str, str]:
    if kind not in _SCALARS:
        raise _Damaged(f"{kind} is no type of a value")
    return _SCALARS[kind]


def _typed(text: str) -> bool:
    word, colon, _ = text.partition(":")
    return bool(colon) and (word in _BY_WORD or (word[:1] == "[" and word[1:-1] in _BY_WORD))


class GgufSource:
    """Read one GGUF file; see ``lorabridge.tensors.Source``."""

    def __init__(
        self, file: io.FileIO, path: Path, specs: Mapping[str, TensorSpec], starts: Mapping[str, int],
        metadata: Mapping[str, str],
    ) -> None:  # fmt: skip
        self.format = NAME
        self.path = path
        self.specs = specs
        self.metadata = metadata
        self._file = file
        self._starts = starts

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Bits:
        """Return the bits of a tensor, or of rows [start, stop) of its first axis."""
        import numpy as np

        spec, start, shape = self.specs[name], self._starts[name], self.specs[name].shape
        if rows is not None:
            if not shape or not 0 <= rows[0] <= rows[1] <= shape[0]:
                raise ValueError(f"rows {rows} are outside the shape {shape} of {name}")
            start += rows[0] * math.prod(shape[1:]) * spec.dtype.itemsize
            shape = (rows[1] - rows[0], *shape[1:])
        bits = np.empty(shape, spec.dtype.carrier())
        view = bits.reshape(-1).view(np.uint8).data
        if pread_into(self._file, view, start) != len(view):
            raise InputError("the file changed or ended early", where=f"{shown(str(self.path))}: {shown(name)}")
        return bits

    def extents(self, name: str) -> tuple[Extent, ...]:
        """Return the tensor's byte range."""
        return (Extent(self.path, self._starts[name], self.specs[name].nbytes),)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_file(path: Path) -> GgufSource:
    """Open a file by its header. InputError for what is damaged, quantized, big-endian or of another version."""
    path = Path(path)
    file = open_regular(path)
    try:
        return _open(file, path)
    except _Damaged as error:
        file.close()
        if (found := identify(path)).name != NAME:
            raise refusal(path, found) from None
        raise InputError(f"the GGUF file is damaged: {error}", where=shown(str(path)), hint=_DAMAGED) from None
    except BaseException:
        file.close()
        raise


def _open(file: io.FileIO, path: Path) -> GgufSource:
    size = size_of(file)
    data = bytearray(min(size, MAX_HEADER))
    pread_into(file, memoryview(data), 0)
    header = _Header(bytes(data))
    if header.data[:4] != MAGIC:
        raise _Damaged("it does not begin with GGUF")
    header.at = 4
    version = int(header.take("<I"))
    if version not in (2, 3):
        big = version and not version & 0xFFFF
        raise _Damaged("it is big-endian" if big else f"version {version} is none that is read (2 and 3)")
    tensors = header.count("<Q", MAX_TENSORS, "tensors")
    metadata: dict[str, str] = {}
    for _ in range(header.count("<Q", MAX_PAIRS, "pairs")):
        key = header.text()
        if key in metadata:
            raise _Damaged(f"the key {shown(key)} occurs twice")
        metadata[key] = header.value()
    rows = [_tensor(header) for _ in range(tensors)]
    alignment = _alignment(metadata)
    base = -(-header.at // alignment) * alignment
    return GgufSource(file, path, *_checked(rows, base, alignment, size, path), metadata)


def _alignment(metadata: Mapping[str, str]) -> int:
    word, _, text = metadata.get("general.alignment", f"u32:{ALIGNMENT}").partition(":")
    value = int(text) if word == "u32" else 0
    if value < 8 or value & (value - 1) or value > 1 << 20:
        raise _Damaged("general.alignment is no power of two from 8 on")
    return value


def _tensor(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    name = header.text()
    axes = header.count("<I", MAX_AXES, "axes")
    shape = tuple(header.count("<Q", 1 << 62, "elements") for _ in range(axes))[::-1]
    return name, shape, int(header.take("<I")), int(header.take("<Q"))


def _checked(
    rows: Sequence[tuple[str, tuple[int, ...], int, int]], base: int, alignment: int, size: int, path: Path
) -> tuple[dict[str, TensorSpec], dict[str, int]]:
    specs: dict[str, TensorSpec] = {}
    starts: dict[str, int] = {}
    quantized = [f"{shown(str(path))}: {shown(name)}" for name, _, kind, _ in rows if kind not in TYPES]
    if quantized:
        raise InputError(
            "the file holds quantized tensors, which are not what was trained",
            where=quantized, hint="take the file that it was made from, or one of type F32, F16 or BF16",
        )  # fmt: skip
    end = base
    for name, shape, kind, offset in sorted(rows, key=lambda row: row[3]):
        spec = TensorSpec(name, BY_NAME[TYPES[kind]], shape)
        start = base + offset
        if name in specs or not name:
            raise _Damaged(f"the name {shown(name)} is empty or occurs twice")
        if offset % alignment or start < end or start + spec.nbytes > size:
            raise _Damaged(f"the data of {shown(name)} lies where it cannot")
        specs[name], starts[name], end = spec, start, start + spec.nbytes
    ordered = [row[0] for row in rows]
    return {name: specs[name] for name in ordered}, starts


def make_sink(create: Callable[[str], OutFile], filename: str) -> GgufSink:
    """Return a sink that writes one GGUF file of version 3."""
    return GgufSink(create, filename)


class GgufSink:
    """Write a GGUF file; see ``lorabridge.tensors.Sink``. Metadata becomes its pairs, all but the key ``format``."""

    def __init__(self, create: Callable[[str], OutFile], filename: str) -> None:
        self._create = create
        self._filename = filename
        self._starts: dict[str, tuple[int, int]] = {}

    def begin(self, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        """Write the header; a MappingError lists what ggml cannot hold."""
        _check(specs)
        pairs = {key: value for key, value in metadata.items() if key not in ("format", "general.alignment")}
        head = bytearray(MAGIC + struct.pack("<IQQ", 3, len(specs), len(pairs)))
        for key, value in pairs.items():
            head += _text(key) + _value(value)
        offset, rows = 0, bytearray()
        for spec in specs:
            rows += _text(spec.name) + struct.pack("<I", len(spec.shape))
            rows += b"".join(struct.pack("<Q", axis) for axis in reversed(spec.shape))
            rows += struct.pack("<IQ", _CODES[spec.dtype.name], offset)
            self._starts[spec.name] = (offset, spec.nbytes)
            offset += -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
        head += rows
        head += bytes(-len(head) % ALIGNMENT)
        self._starts = {name: (len(head) + start, length) for name, (start, length) in self._starts.items()}
        self._out = self._create(self._filename)
        self._out.allocate(len(head) + offset)
        self._out.write(0, bytes(head))

    def write(self, name: str, offset: int, block: Bits) -> None:
        """Write a block at a byte offset inside the tensor's buffer."""
        import numpy as np

        data = block.reshape(-1).view(np.uint8).data
        self._out.write(self._position(name, offset, len(data)), data)

    def copy(self, name: str, offset: int, extent: Extent) -> None:
        """Copy a file range to a byte offset inside the tensor's buffer."""
        self._out.copy(self._position(name, offset, extent.length), extent.path, extent.offset, extent.length)

    checked = False

    def ranges(self, name: str) -> tuple[Extent, ...]:
        """Return where the staged file holds the tensor, see ``formats.ranges``."""
        return (Extent(self._out.path, *self._starts[name]),)

    def settle(self, name: str, pieces: Sequence[Piece] = ()) -> None:
        """Take note of nothing: what another process wrote lies in its place."""

    def finish(self) -> None:
        """Flush and close."""
        self._out.close()

    def _position(self, name: str, offset: int, length: int) -> int:
        start, size = self._starts[name]
        if not 0 <= offset <= offset + length <= size:
            raise ValueError(f"bytes {offset} to {offset + length} are outside {name}")
        return start + offset


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(text: str) -> bytes:
    """Encode a value from its spelling in metadata."""
    word, _, rest = text.partition(":")
    if not _typed(text):
        return struct.pack("<I", _STRING) + _text(text)
    if word == "str":
        return struct.pack("<I", _STRING) + _text(rest)
    if word[0] == "[":
        inner = _BY_WORD[word[1:-1]]
        items = json.loads(rest)
        body = b"".join(_text(item) if inner == _STRING else struct.pack(_SCALARS[inner][1], item) for item in items)
        return struct.pack("<IIQ", _ARRAY, inner, len(items)) + body
    code = _BY_WORD[word]
    number: int | float | bool = rest == "true" if word == "bool" else float(rest) if word[0] == "f" else int(rest)
    return struct.pack("<I", code) + struct.pack(_SCALARS[code][1], number)


def _check(specs: Sequence[TensorSpec]) -> None:
    wrong = [(spec.name, why) for spec in specs if (why := _misfit(spec, spec.dtype))]
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            wrong.append((spec.name, "the name is used twice"))
        seen.add(spec.name)
    if wrong or not specs:
        raise MappingError(
            "tensors cannot be held by a GGUF file",
            where=[f"{shown(name)}: {why}" for name, why in wrong],
            hint="cast them with --dtype, or choose another container",
        )


def _misfit(spec: TensorSpec, dtype: DType) -> str:
    if dtype.name not in _CODES:
        return f"ggml has no type {dtype}"
    if not 0 < len(spec.name.encode(errors="replace")) <= MAX_NAME:
        return f"a name has 1 to {MAX_NAME} bytes"
    if not 1 <= len(spec.shape) <= MAX_AXES or not spec.size:
        return f"shape {list(spec.shape)} has no elements, or not 1 to {MAX_AXES} axes"
    return ""
