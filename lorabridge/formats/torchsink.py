"""Write torch zip checkpoints that torch.load(weights_only=True) reads, memory-mapped or not."""

from __future__ import annotations

import dataclasses
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np

from ..errors import LorabridgeError, MappingError
from ..tensors import Extent, Sink, TensorSpec
from . import marks
from .ranges import Piece
from .storedzip import BLOCK, Record, combine_crc, descriptor, directory, local_header, place
from .torchvalues import STORAGE_OF
from .untrusted import MAX_NAME, shown

if TYPE_CHECKING:
    from ..files.fsio import OutFile
    from ..tensors import Bits

_VERSION = b"3\n"


def make_sink(create: Callable[[str], OutFile], filename: str) -> Sink:
    """Return a sink that writes one torch zip checkpoint through ``create(filename)``.

    The file is laid out as torch 2.13 lays out ``torch.save(dict_of_tensors, filename)``: the same records at the same
    offsets, one storage per tensor. Only the optional ``.data/serialization_id`` record is missing. The bytes depend on
    the tensors, the marks (see ``marks``) and the file's name (its stem is the archive's top folder), on nothing else.
    """
    return _TorchSink(create, filename)


def make_tensor_sink(create: Callable[[str], OutFile]) -> Sink:
    """Return a sink that writes what ``torch.save`` makes of one tensor that stands by itself."""
    return _TorchSink(create, "archive", bare=True)


class _TorchSink:
    def __init__(self, create: Callable[[str], OutFile], filename: str, *, bare: bool = False) -> None:
        self._bare = bare
        self._create = create
        self._filename = filename
        self._lock = threading.Lock()
        self._pieces: dict[str, list[Piece]] = {}
        self._records: list[Record] = []
        self._contents: list[bytes | None] = []
        self._tensors: dict[str, Record] = {}
        self._directory = 0

    def begin(self, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        """Fix the layout and reserve the space; of ``metadata`` only marks are written, in a record of their own.

        Raises MappingError for tensors that torch cannot hold and for names that are empty, repeated or no text.
        """
        _check(specs)
        before = {
            "data.pkl": dump(specs, bare=self._bare),
            ".format_version": b"1",
            ".storage_alignment": b"64",
            "byteorder": b"little",
        }
        sizes = [(name, len(content)) for name, content in before.items()]
        sizes += [(f"data/{i}", spec.nbytes) for i, spec in enumerate(specs)]
        after = {"version": _VERSION}
        if said := marks.encode(metadata):
            after[marks.RECORD] = said
        sizes += [(name, len(content)) for name, content in after.items()]
        top = PurePath(self._filename).stem.replace("\\", "_").strip(".") or "archive"
        self._records, self._directory, total = place(top.encode(errors="replace").decode(), sizes)
        self._contents = [*before.values(), *[None] * len(specs), *after.values()]
        self._tensors = dict(zip((spec.name for spec in specs), self._records[len(before) :], strict=False))
        self._pieces = {spec.name: [] for spec in specs}
        self._out = self._create(self._filename)
        self._out.allocate(total)

    def write(self, name: str, offset: int, block: Bits) -> None:
        """Write a C-contiguous block at a byte offset inside the tensor's buffer."""
        data = block.reshape(-1).view(np.uint8).data
        at = self._position(name, offset, len(data))
        self._out.write(at, data)
        self._note(name, (offset, len(data), zlib.crc32(data)))

    def copy(self, name: str, offset: int, extent: Extent) -> None:
        """Copy a file range to a byte offset inside the tensor's buffer and read it back for its checksum."""
        at = self._position(name, offset, extent.length)
        self._out.copy(at, extent.path, extent.offset, extent.length)
        crc = 0
        for start in range(0, extent.length, BLOCK):
            crc = zlib.crc32(self._out.read(at + start, min(BLOCK, extent.length - start)), crc)
        self._note(name, (offset, extent.length, crc))

    checked = True

    def ranges(self, name: str) -> tuple[Extent, ...]:
        """Return where the staged file holds the tensor, see ``formats.ranges``."""
        record = self._tensors[name]
        return (Extent(self._out.path, record.offset, record.size),)

    def settle(self, name: str, pieces: Sequence[Piece] = ()) -> None:
        """Count a tensor as written by others."""
        for piece in pieces:
            self._note(name, piece)

    def finish(self) -> None:
        """Write the headers, the pickle, the checksums and the directory and flush the file to disk.

        Raises LorabridgeError when the blocks written do not cover each tensor exactly once.
        """
        crcs = {
            self._tensors[name].header: _join(name, self._tensors[name], pieces)
            for name, pieces in self._pieces.items()
        }
        start, run = 0, bytearray()  # what lies between two tensors goes to disk in one write
        for i, (record, content) in enumerate(zip(self._records, self._contents, strict=True)):
            run += local_header(record.name, record.header, record.size)
            crc = crcs[record.header] if content is None else zlib.crc32(content)
            record = self._records[i] = dataclasses.replace(record, crc=crc)
            if content is None:
                self._out.write(start, bytes(run))
                start, run = record.offset + record.size, bytearray()
            run += (content or b"") + descriptor(record)
        self._out.write(start, bytes(run) + directory(self._records, self._directory))
        self._out.close()

    def _position(self, name: str, offset: int, length: int) -> int:
        record = self._tensors[name]
        if not 0 <= offset <= offset + length <= record.size:
            raise ValueError(f"bytes {offset} to {offset + length} are outside {name}, which has {record.size}")
        return record.offset + offset

    def _note(self, name: str, piece: Piece) -> None:
        with self._lock:
            self._pieces[name].append(piece)


def _join(name: str, record: Record, pieces: Iterable[Piece]) -> int:
    """Return a tensor's CRC-32 from those of its pieces."""
    ordered = sorted(pieces)
    ends = [0, *(offset + length for offset, length, _ in ordered)]
    if ends[-1] != record.size or any(end != piece[0] for end, piece in zip(ends, ordered, strict=False)):
        raise LorabridgeError("a tensor was not written exactly once", where=shown(name), hint="report this as a bug")
    return reduce(lambda crc, piece: combine_crc(crc, piece[2], piece[1]), ordered, 0)


def _check(specs: Sequence[TensorSpec]) -> None:
    unknown = [f"{shown(spec.name)}: {spec.dtype}" for spec in specs if spec.dtype.torch is None]
    if unknown:
        raise MappingError(
            "torch has no such element type", where=unknown, hint="choose another with --dtype or another container"
        )
    seen: set[str] = set()
    bad = []
    for spec in specs:
        if spec.name in seen or not spec.name or not _ispickled_text(spec.name):
            bad.append(shown(spec.name))
        seen.add(spec.name)
    if bad:
        raise MappingError("tensor names are empty, repeated, too long or no text", where=bad, hint="rename them")


def _ispickled_text(name: str) -> bool:
    try:
        return len(name.encode()) <= MAX_NAME
    except UnicodeEncodeError:
        return False


def dump(specs: Sequence[TensorSpec], *, bare: bool = False) -> bytes:
    """Pickle, with protocol 2, a dict of contiguous tensors on the CPU over the records data/0, data/1, ...

    ``bare``: the one tensor by itself, without a dict around it.
    The calls are those that torch 2.13 writes: ``_rebuild_tensor_v2`` for element types that have a storage class of
    their own, ``_rebuild_tensor_v3`` over an untyped storage for the others (``torch/_tensor.py``).
    """
    memo: dict[bytes, bytes] = {}

    def once(code: bytes) -> bytes:
        if code in memo:
            return memo[code]
        index = len(memo)
        memo[code] = b"h" + bytes([index])  # fewer than 256 distinct names exist
        return code + b"q" + bytes([index])

    parts = [b"\x80\x02" if bare else b"\x80\x02}("]
    for i, spec in enumerate(specs):
        storage = STORAGE_OF.get(str(spec.dtype.torch))
        numel = spec.size if storage else spec.nbytes
        parts += [
            b"" if bare else pickled_text(spec.name),
            once(pickled_name(f"torch._utils._rebuild_tensor_v{2 if storage else 3}")),
            b"((",
            once(pickled_text("storage")),
            once(pickled_name(storage or "torch.storage.UntypedStorage")),
            pickled_text(str(i)),
            once(pickled_text("cpu")),
            pickled_integer(numel) + b"tQ" + pickled_integer(0),
            pickled_integers(spec.shape),
            pickled_integers(_strides(spec.shape)) + b"\x89",
            once(pickled_name("collections.OrderedDict")) + b")R",
            b"" if storage else once(pickled_name(f"torch.{spec.dtype.torch}")),
            b"tR",
        ]
    return b"".join([*parts, b"." if bare else b"u."])


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides torch gives a contiguous tensor of this shape."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(length, 1)
    return tuple(reversed(strides))


def pickled_text(text: str) -> bytes:
    """Return the opcodes that push a string."""
    raw = text.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def pickled_name(path: str) -> bytes:
    """Return the opcode that names a class or a function."""
    module, _, name = path.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def pickled_integer(value: int) -> bytes:
    """Return the opcode that pushes an integer that is not negative."""
    if value < 256:
        return b"K" + bytes([value])
    if value < 65536:
        return b"M" + struct.pack("<H", value)
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def pickled_integers(values: tuple[int, ...]) -> bytes:
    """Return the opcodes that push a tuple of integers."""
    inner = b"".join(map(pickled_integer, values))
    if len(values) > 3:
        return b"(" + inner + b"t"
    return inner + (b")", b"\x85", b"\x86", b"\x87")[len(values)]
