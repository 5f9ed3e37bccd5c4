"""Write MindSpore ``.ckpt`` files, byte for byte as mindspore.save_checkpoint does; see ``msckpt`` for the format."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..dtypes import BY_NAME
from ..errors import InputError, MappingError, UsageError
from ..tensors import Extent, TensorSpec
from . import marks
from .ranges import Piece
from .untrusted import MAX_RANK, shown
from .wire import MAX_NAME, PRIVATE, TRAILER, TRAILER_BYTES, delimited, record_header

if TYPE_CHECKING:
    from ..files.fsio import OutFile
    from ..tensors import Bits
    from .encrypted import Encryption, SealedFile

SLICE_BYTES = 512 << 20
"""Bytes of content after which the writer starts the next record of a tensor, as mindspore.save_checkpoint does."""

_BLOCK = 8 << 20
_GAP = 4 << 10
_TEXT = BY_NAME["text"]

# mindspore 2.10 saves these and then fails in load_checkpoint (serialization.py, tensor_to_ms_type).
_UNLOADABLE = frozenset({"complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "hifloat8"})


def make_sink(
    create: Callable[[str], OutFile], filename: str, *, crc: bool = False, encryption: Encryption | None = None
) -> CkptSink:
    """Return a sink that writes one checkpoint file, byte for byte as mindspore.save_checkpoint would.

    ``crc``: append the CRC-32 of the file as ``crc_check=True`` does; it costs one reading of what was written.
    ``encryption``: encrypt as ``enc_key`` and ``enc_mode`` do; UsageError with ``crc``, a pair that MindSpore writes
    and then cannot load.
    """
    if encryption is None:
        return CkptSink(create, filename, crc=crc)
    if crc:
        raise UsageError(
            "MindSpore loads no checkpoint that is encrypted and has a checksum", where=filename, hint="drop --crc"
        )
    from .encrypted import sealing

    return CkptSink(sealing(create, encryption), filename, crc=False, sealed=True)


@dataclass(frozen=True, slots=True)
class _Content:
    """Where the bytes of one tensor go: file offsets of its slices, each ``step`` bytes long but the last."""

    nbytes: int
    step: int
    starts: tuple[int, ...]


class CkptSink:
    """Write a MindSpore checkpoint; see ``lorabridge.tensors.Sink``.

    The format has no place for metadata: of what ``begin`` gets only marks are written, in a field that MindSpore
    passes over (see ``marks``); a manifest beside the file must carry the rest. ``begin`` may put zeros where small
    tensors follow, so it must precede every ``write`` and ``copy``.
    """

    def __init__(
        self, create: Callable[[str], OutFile | SealedFile], filename: str, *, crc: bool, sealed: bool = False
    ) -> None:
        self._create = create
        self._filename = filename
        self._crc = crc
        self._sealed = sealed
        self._contents: dict[str, _Content] = {}
        self._size = 0
        self._out: OutFile | SealedFile | None = None

    def begin(self, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        """Create the file with every record's header; a MappingError lists what MindSpore could not load."""
        _refuse(specs)
        headers: list[tuple[int, bytes]] = []
        at = 0
        for spec in specs:
            starts = []
            for header, length in _headers(spec):
                headers.append((at, header))
                starts.append(at + len(header))
                at = starts[-1] + length
            self._contents[spec.name] = _Content(spec.nbytes, SLICE_BYTES, tuple(starts))
        if said := marks.encode(metadata):
            headers.append((at, delimited(PRIVATE, len(said)) + said))
            at += len(headers[-1][1])
        self._size = at
        self._out = self._create(self._filename)
        self._out.allocate(at + (TRAILER_BYTES if self._crc else 0))
        for offset, block in _blocks(headers):
            self._out.write(offset, block)

    def write(self, name: str, offset: int, block: Bits) -> None:
        """Write a block at a byte offset inside the tensor's buffer."""
        import numpy as np

        out = self._opened()
        data = block.reshape(-1).view(np.uint8).data
        for at, first, length in self._pieces(name, offset, len(data)):
            out.write(at, data[first : first + length])

    def copy(self, name: str, offset: int, extent: Extent) -> None:
        """Copy a file range to a byte offset inside the tensor's buffer."""
        out = self._opened()
        for at, first, length in self._pieces(name, offset, extent.length):
            out.copy(at, extent.path, extent.offset + first, length)

    checked = False

    def ranges(self, name: str) -> tuple[Extent, ...]:
        """Return where the staged file holds the tensor, see ``formats.ranges``; a UsageError with a checksum."""
        out = self._opened()
        if self._crc or self._sealed:
            raise UsageError(
                "a .ckpt with a checksum or encryption cannot be written by several machines",
                where=shown(self._filename),
                hint="leave --crc and --encrypt out, or use --engine process",
            )
        nbytes = self._contents[name].nbytes
        return tuple(Extent(out.path, at, length) for at, _, length in self._pieces(name, 0, nbytes))

    def settle(self, name: str, pieces: Sequence[Piece] = ()) -> None:
        """Take note of nothing: what another process wrote lies in its place."""

    def finish(self) -> None:
        """Append the checksum where it is wanted, or where the data would else be taken for one; flush and close."""
        out = self._opened()
        tail = out.read(max(self._size - TRAILER_BYTES, 0), min(self._size, TRAILER_BYTES))
        if self._crc or tail.startswith(TRAILER):  # MindSpore cuts such an end off even if it is a tensor's
            value = crc32_of(out.path, out.read, self._size)
            out.write(self._size, TRAILER + value.to_bytes(TRAILER_BYTES - len(TRAILER), "big"))
        out.close()

    def _opened(self) -> OutFile | SealedFile:
        if self._out is None:
            raise RuntimeError("begin() has not run")
        return self._out

    def _pieces(self, name: str, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Yield (file offset, first byte of the block, length) for each slice that the block touches."""
        content = self._contents[name]
        if not 0 <= offset <= offset + length <= content.nbytes:
            raise ValueError(f"bytes {offset}:{offset + length} are outside the {content.nbytes} bytes of {name}")
        done = 0
        while done < length:
            part, inside = divmod(offset + done, content.step)
            take = min(content.step - inside, length - done)
            yield content.starts[part] + inside, done, take
            done += take


def _headers(spec: TensorSpec) -> Iterator[tuple[bytes, int]]:
    """Yield each record's bytes before the content, and the content's length."""
    shape = (0,) if spec.dtype == _TEXT else spec.shape
    for start in range(0, spec.nbytes or 1, SLICE_BYTES):
        length = min(SLICE_BYTES, spec.nbytes - start)
        yield record_header(spec.name, shape, spec.dtype.mindspore or "", length), length


def _blocks(headers: Sequence[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """Join headers that lie close together, with zeros between, so that many small tensors need few writes."""
    block, start = bytearray(), 0
    for offset, header in headers:
        gap = offset - start - len(block)
        if gap > _GAP or len(block) > _BLOCK:
            yield start, bytes(block)
            block, start, gap = bytearray(), offset, 0
        block += bytes(gap) + header
    yield start, bytes(block)


_BY_DTYPE = "cast floating-point tensors with --dtype (float32, float16, bfloat16), or leave them out with --exclude"
_BY_NAME = "rename the tensor, or write safetensors"
_BY_SHAPE = "leave the tensor out with --exclude, or write safetensors"


def _refuse(specs: Sequence[TensorSpec]) -> None:
    """Raise a MappingError that lists every tensor which mindspore.load_checkpoint would refuse or change."""
    if not specs:
        raise MappingError("there is no tensor to write, and MindSpore loads no empty checkpoint")
    wrong: list[tuple[str, str, str]] = []
    seen: dict[str, str] = {}
    for spec in specs:
        loaded = spec.name.split(".__param_key__")[0]  # load_checkpoint drops this suffix
        if loaded in seen:
            same = seen[loaded] == spec.name
            problem = "the name is used twice" if same else f"MindSpore gives it the name of {shown(seen[loaded])}"
            wrong.append((spec.name, problem, _BY_NAME))
        seen.setdefault(loaded, spec.name)
        problem, hint = _unloadable(spec)
        if problem:
            wrong.append((spec.name, problem, hint))
    if wrong:
        where = [f"{shown(name)}: {problem}" for name, problem, _ in wrong]
        hints = "; ".join(dict.fromkeys(hint for *_, hint in wrong))
        count = f"{len(wrong)} tensors" if len(wrong) > 1 else "a tensor"
        raise MappingError(f"{count} cannot be held by a MindSpore checkpoint", where=where, hint=hints)


def _unloadable(spec: TensorSpec) -> tuple[str, str]:
    """Return why MindSpore 2.10 could not load a tensor, and the cure; empty strings where it can."""
    if not spec.name or len(spec.name) > MAX_NAME or _is_not_utf8(spec.name):
        return f"a name is 1 to {MAX_NAME} Unicode characters, this is {len(spec.name)}", _BY_NAME
    if spec.dtype.mindspore is None:
        return f"MindSpore has no type {spec.dtype}", _BY_DTYPE
    if spec.dtype.name in _UNLOADABLE:
        return f"mindspore.load_checkpoint fails on the type {spec.dtype}", _BY_DTYPE
    if spec.dtype == _TEXT:
        fits = len(spec.shape) == 1 and 0 < spec.nbytes <= SLICE_BYTES
        return ("", "") if fits else (f"a text of shape {spec.shape} is no MindSpore string", _BY_SHAPE)
    if spec.shape == (0,):
        return "mindspore.load_checkpoint makes a scalar of shape (0,)", _BY_SHAPE
    if len(spec.shape) > MAX_RANK or any(dim >> 31 for dim in spec.shape):
        return f"shape {spec.shape} has more than {MAX_RANK} axes or an axis of 2**31 or more", _BY_SHAPE
    return "", ""


def _is_not_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False


def crc32_of(
    path: Path, read: Callable[[int, int], bytes], size: int, progress: Callable[[int, int], None] | None = None
) -> int:
    """Return the CRC-32 of the first ``size`` bytes that ``read(offset, length)`` gives; InputError where they end."""
    value = done = 0
    while done < size:
        block = read(done, min(_BLOCK, size - done))
        if not block:
            raise InputError("the file ended early", where=shown(str(path)), hint=RETRY)
        value = zlib.crc32(block, value)
        done += len(block)
        if progress:
            progress(done, size)
    return value


RETRY = "let whatever writes this file finish, then run again"
