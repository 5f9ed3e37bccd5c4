"""MindSpore ``.ckpt`` files, read and written without MindSpore and without protobuf.

A checkpoint is a row of records without header or index, each a protobuf message ``Checkpoint { value = 1 { tag = 1,
tensor = 2 { dims = 1, tensor_type = 2, tensor_content = 3 } } }``. A tensor above 512 MiB is a run of records with the
same tag, dims and type. ``crc_check=True`` appends ``crc_num`` and ten big-endian bytes.
Source of the format: mindspore 2.10, train/serialization.py; its bytes are unchanged since 2.7.
"""

from __future__ import annotations

import io
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ..dtypes import BY_MINDSPORE, BY_NAME
from ..errors import InputError, MappingError
from ..tensors import Extent, TensorSpec
from .sniff import identify
from .untrusted import MAX_RANK, open_regular, pread_into, shown
from .wire import MAX_NAME, TRAILER, TRAILER_BYTES, Crc, Record, Window, WireError, record_header, walk

if TYPE_CHECKING:
    from ..files.fsio import OutFile
    from ..tensors import Bits

NAME = "mindspore"
SUFFIXES = (".ckpt",)

SLICE_BYTES = 512 << 20
"""Bytes of content after which the writer starts the next record of a tensor, as mindspore.save_checkpoint does."""

_BLOCK = 8 << 20
_GAP = 4 << 10
_TEXT = BY_NAME["text"]

# MindNLP 0.4.1 stores repr(dtype) instead of str(dtype): "mindspore.float32" for "Float32".
_BY_TYPE = {
    **BY_MINDSPORE,
    **{f"mindspore.{name.lower()}": dtype for name, dtype in BY_MINDSPORE.items() if dtype != _TEXT},
    **{f"mindspore.{dtype.name}": dtype for dtype in BY_MINDSPORE.values() if dtype != _TEXT},
    "mindspore.bool_": BY_NAME["bool"],
}

# mindspore 2.10 saves these and then fails in load_checkpoint (serialization.py, tensor_to_ms_type).
_UNLOADABLE = frozenset({"complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "hifloat8"})


class CkptSource:
    """Read a MindSpore checkpoint; see ``lorabridge.tensors.Source``.

    ``crc`` is the checksum that the file states, not yet compared with the data (see ``check_crc``).
    """

    format: str = NAME

    def __init__(
        self,
        path: Path,
        file: io.FileIO,
        specs: Mapping[str, TensorSpec],
        parts: Mapping[str, tuple[Extent, ...]],
        crc: Crc | None,
    ) -> None:
        self.path = path
        self.specs = specs
        self.metadata: Mapping[str, str] = {}
        self.crc = crc
        self._file = file
        self._parts = parts
        self._state = _state(file)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Bits:
        """Return the bits of a tensor, or of rows [start, stop) of its first axis, reading nothing else."""
        import numpy as np

        spec = self.specs[name]
        shape, first = spec.shape, 0
        if rows is not None:
            start, stop = rows
            if not shape or not 0 <= start <= stop <= shape[0]:
                raise ValueError(f"rows {start}:{stop} are outside shape {shape} of {name}")
            shape = (stop - start, *shape[1:])
            first = start * math.prod(shape[1:]) * spec.dtype.itemsize
        out = np.empty(shape, spec.dtype.carrier())
        self._fill(name, out.reshape(-1).view(np.uint8).data, first)
        return out

    def _fill(self, name: str, out: memoryview, first: int) -> None:
        done = at = 0
        for part in self._parts[name]:
            skip = max(first + done - at, 0)
            want = min(part.length - skip, len(out) - done)
            if want > 0:
                if pread_into(self._file, out[done : done + want], part.offset + skip) < want:
                    raise InputError("the file ended early", where=_place(self.path, name), hint=_RETRY)
                done += want
            at += part.length
        if _state(self._file) != self._state:
            raise InputError("the file changed while it was read", where=_place(self.path, name), hint=_RETRY)

    def extents(self, name: str) -> tuple[Extent, ...]:
        """Return one byte range per slice that is not empty."""
        return self._parts[name]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


_RETRY = "let whatever writes this file finish, then run again"


def _state(file: io.FileIO) -> tuple[int, int]:
    info = os.fstat(file.fileno())
    return info.st_size, info.st_mtime_ns


def _place(path: Path, name: str) -> str:
    return f"{shown(str(path))}: tensor {shown(name)}"


def open_file(path: Path) -> CkptSource:
    """Index a checkpoint by its record headers, without reading any tensor.

    Raises InputError for anything but well-formed records whose content fits their shape, and for what has no
    counterpart elsewhere: MapParameter (hash table) and ``random_op`` records, encrypted files, strategy files.
    """
    path = Path(path)
    file = open_regular(path)
    try:
        window = Window(lambda offset, length: os.pread(file.fileno(), length, offset), os.fstat(file.fileno()).st_size)
        records, crc = walk(window)
        specs, parts = _assemble(path, records)
        return CkptSource(path, file, specs, parts, crc)
    except WireError as error:
        file.close()
        kind = identify(path)
        if kind.format != NAME and kind.name != "unknown":
            problem = f"a MindSpore checkpoint is needed, this is {kind.title}"
            raise InputError(problem, where=shown(str(path)), hint=kind.cure or "name a .ckpt of weights") from None
        hint = "fetch or save the file again: it is damaged, cut off, or no MindSpore checkpoint"
        place = _place(path, error.tensor) if error.tensor else shown(str(path))
        raise InputError(error.problem, where=f"{place}, byte {error.offset}", hint=hint) from None
    except BaseException:
        file.close()
        raise


def _assemble(path: Path, records: Sequence[Record]) -> tuple[dict[str, TensorSpec], dict[str, tuple[Extent, ...]]]:
    specs: dict[str, TensorSpec] = {}
    parts: dict[str, tuple[Extent, ...]] = {}
    wrong: list[tuple[str, str]] = []
    for tag, run in groupby(records, key=lambda record: record.tag):
        slices = list(run)
        try:
            if tag in parts:
                raise WireError("the name is used twice", slices[0].offset)
            parts[tag] = tuple(Extent(path, r.start, r.length) for r in slices if r.length)
            specs[tag] = _spec(tag, slices)
        except WireError as error:
            wrong.append((error.problem, f"{_place(path, tag)}, byte {error.offset}"))
    if len(wrong) == 1:
        raise InputError(wrong[0][0], where=wrong[0][1], hint=_DAMAGED)
    if wrong:
        where = [f"{place}: {problem}" for problem, place in wrong]
        raise InputError(f"{len(wrong)} tensors contradict themselves", where=where, hint=_DAMAGED)
    return specs, parts


_DAMAGED = "fetch or save the checkpoint again"


def _spec(tag: str, slices: Sequence[Record]) -> TensorSpec:
    """Check that the slices of one tensor agree and hold what its shape needs."""
    first, lengths = slices[0], [record.length for record in slices]
    held = sum(lengths)
    if first.type == "random_op":
        raise WireError("this is the random state of MindSpore 2.2 to 2.4, not a tensor: save without it", first.offset)
    if first.type not in _BY_TYPE:
        raise WireError(f"its type {shown(first.type)} is not known", first.offset)
    dtype = _BY_TYPE[first.type]
    if any((record.dims, _BY_TYPE.get(record.type)) != (first.dims, dtype) for record in slices):
        raise WireError("its slices differ in shape or type", first.offset)
    shape = first.dims
    if dtype == _TEXT:
        if shape not in ((), (0,)) or held % 4:
            raise WireError(f"a text has shape {shape} and {held} bytes", first.offset)
        shape = (held // 4,)
    elif shape == (0,) and held:
        shape = ()  # MindSpore up to 2.1 wrote a scalar with the dims [0]
    if math.prod(dim for dim in shape if dim) * dtype.itemsize >> 63:
        raise WireError(f"shape {shape} is too large", first.offset)
    spec = TensorSpec(tag, dtype, shape)
    need = spec.nbytes
    if len(slices) > 1 and (dtype == _TEXT or all(length >= need for length in lengths)):
        raise WireError(f"the name is used {len(slices)} times", slices[1].offset)
    if held != need:
        lack = "a slice is missing or cut" if held < need else "there is a slice too many"
        what = f"; {lack}" if len(slices) > 1 else ""
        raise WireError(f"{dtype} of shape {shape} needs {need} bytes, the file holds {held}{what}", first.offset)
    if any(later > earlier for earlier, later in pairwise(lengths)):
        raise WireError("its slices are in another order than any MindSpore writes them", first.offset)
    return spec


def check_crc(path: Path, progress: Callable[[int, int], None] | None = None) -> bool:
    """Compare a checkpoint's data with the checksum it states; False where it states none.

    Reads the whole file. ``progress`` is called with (bytes done, bytes in all). An InputError says that they differ.
    """
    source = open_file(path)
    try:
        crc = source.crc
        if crc is None:
            return False
        value = _crc32(path, lambda at, length: os.pread(source._file.fileno(), length, at), crc.covered, progress)
    finally:
        source.close()
    if value != crc.value:
        problem = f"the data's checksum is {value:#010x}, the file states {crc.value:#010x}"
        raise InputError(problem, where=shown(str(path)), hint=_DAMAGED)
    return True


def _crc32(
    path: Path, read: Callable[[int, int], bytes], size: int, progress: Callable[[int, int], None] | None = None
) -> int:
    value = done = 0
    while done < size:
        block = read(done, min(_BLOCK, size - done))
        if not block:
            raise InputError("the file ended early", where=shown(str(path)), hint=_RETRY)
        value = zlib.crc32(block, value)
        done += len(block)
        if progress:
            progress(done, size)
    return value


def make_sink(create: Callable[[str], OutFile], filename: str, *, crc: bool = False) -> CkptSink:
    """Return a sink that writes one checkpoint file, byte for byte as mindspore.save_checkpoint would.

    ``crc``: append the CRC-32 of the file as ``crc_check=True`` does; it costs one reading of what was written.
    """
    return CkptSink(create, filename, crc=crc)


@dataclass(frozen=True, slots=True)
class _Content:
    """Where the bytes of one tensor go: file offsets of its slices, each ``step`` bytes long but the last."""

    nbytes: int
    step: int
    starts: tuple[int, ...]


class CkptSink:
    """Write a MindSpore checkpoint; see ``lorabridge.tensors.Sink``.

    The format has no place for metadata: what ``begin`` gets is not written, a manifest beside the file must carry
    it. ``begin`` may put zeros where small tensors follow, so it must precede every ``write`` and ``copy``.
    """

    def __init__(self, create: Callable[[str], OutFile], filename: str, *, crc: bool) -> None:
        self._create = create
        self._filename = filename
        self._crc = crc
        self._contents: dict[str, _Content] = {}
        self._size = 0
        self._out: OutFile | None = None

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

    def finish(self) -> None:
        """Append the checksum where it is wanted, or where the data would else be taken for one; flush and close."""
        out = self._opened()
        tail = out.read(max(self._size - TRAILER_BYTES, 0), min(self._size, TRAILER_BYTES))
        if self._crc or tail.startswith(TRAILER):  # MindSpore cuts such an end off even if it is a tensor's
            value = _crc32(out.path, out.read, self._size)
            out.write(self._size, TRAILER + value.to_bytes(TRAILER_BYTES - len(TRAILER), "big"))
        out.close()

    def _opened(self) -> OutFile:
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
