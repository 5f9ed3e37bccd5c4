"""MindSpore ``.ckpt`` files, read and written without MindSpore and without protobuf.

A checkpoint is a row of records without header or index, each a protobuf message ``Checkpoint { value = 1 { tag = 1,
tensor = 2 { dims = 1, tensor_type = 2, tensor_content = 3 } } }``. A tensor above 512 MiB is a run of records with the
same tag, dims and type. ``crc_check=True`` appends ``crc_num`` and ten big-endian bytes.
Source of the format: mindspore 2.10, train/serialization.py; its bytes are unchanged since 2.7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ..dtypes import BY_MINDSPORE, BY_NAME
from ..errors import InputError
from ..tensors import Extent, TensorSpec
from . import marks
from .encrypted import DecryptedFile, mode_of
from .keys import needed
from .msckptsink import RETRY, crc32_of, make_sink
from .sniff import identify
from .untrusted import open_regular, pread_into, shown, size_of, stamp_of
from .wire import Crc, Record, Window, WireError, walk

if TYPE_CHECKING:
    from ..tensors import Bits

__all__ = ["NAME", "SUFFIXES", "CkptSource", "Crc", "check_crc", "make_sink", "open_file"]

NAME = "mindspore"
SUFFIXES = (".ckpt",)

_TEXT = BY_NAME["text"]

# MindNLP 0.4.1 stores repr(dtype) instead of str(dtype): "mindspore.float32" for "Float32".
_BY_TYPE = {
    **BY_MINDSPORE,
    **{f"mindspore.{name.lower()}": dtype for name, dtype in BY_MINDSPORE.items() if dtype != _TEXT},
    **{f"mindspore.{dtype.name}": dtype for dtype in BY_MINDSPORE.values() if dtype != _TEXT},
    "mindspore.bool_": BY_NAME["bool"],
}


class FileBytes:
    """A file as a row of bytes, read by offset from any thread."""

    def __init__(self, path: Path) -> None:
        self._file = open_regular(path)
        self.size = size_of(self._file)

    def read(self, offset: int, length: int) -> bytes:
        """Return these bytes; fewer at the end."""
        data = bytearray(max(0, min(length, self.size - offset)))
        return bytes(data[: pread_into(self._file, memoryview(data), offset)])

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill a byte buffer and return how many bytes were there."""
        return pread_into(self._file, view, offset)

    def stamp(self) -> tuple[int, int | str]:
        """Return what changes when the file does: its size and time."""
        return stamp_of(self._file)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class CkptSource:
    """Read a MindSpore checkpoint; see ``lorabridge.tensors.Source``.

    ``crc`` is the checksum that the file states, not yet compared with the data (see ``check_crc``). ``encryption``
    names the mode of an encrypted file, whose bytes ``plain`` decrypts as they are read.
    """

    format: str = NAME

    def __init__(
        self,
        path: Path,
        plain: FileBytes | DecryptedFile,
        specs: Mapping[str, TensorSpec],
        parts: Mapping[str, tuple[Extent, ...]],
        crc: Crc | None,
        metadata: Mapping[str, str],
    ) -> None:
        self.path = path
        self.specs = specs
        self.metadata: Mapping[str, str] = metadata
        self.crc = crc
        self.plain = plain
        self.encryption = plain.mode if isinstance(plain, DecryptedFile) else ""
        self._parts = parts
        self._stamp = plain.stamp()

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
                if self.plain.read_into(out[done : done + want], part.offset + skip) < want:
                    raise InputError("the file ended early", where=_place(self.path, name), hint=RETRY)
                done += want
            at += part.length
        if self.plain.stamp() != self._stamp:
            raise InputError("the file changed while it was read", where=_place(self.path, name), hint=RETRY)

    def extents(self, name: str) -> tuple[Extent, ...]:
        """Return one byte range per slice that is not empty; () in an encrypted file, which must be read."""
        return () if self.encryption else self._parts[name]

    def close(self) -> None:
        """Close the file."""
        self.plain.close()


def _place(path: Path, name: str) -> str:
    return f"{shown(str(path))}: tensor {shown(name)}"


def open_file(path: Path) -> CkptSource:
    """Index a checkpoint by its record headers, without reading any tensor.

    An encrypted file needs a key (see ``keys``) and is decrypted in memory, once to index it and again as it is read.
    Raises InputError for anything but well-formed records whose content fits their shape, for a missing or wrong key,
    and for what has no counterpart elsewhere: MapParameter (hash table), ``random_op`` records, strategy files.
    """
    path = Path(path)
    plain = _bytes_of(path)
    try:
        said: dict[str, str] = {}
        records, crc = walk(
            Window(plain.read, plain.size), lambda raw: said.update(marks.decode(raw, where=shown(str(path))))
        )
        specs, parts = _assemble(path, records)
        return CkptSource(path, plain, specs, parts, crc, said)
    except WireError as error:
        plain.close()
        if isinstance(plain, DecryptedFile):
            raise plain.misfit(first=plain.mode != "aes-gcm") from None
        kind = identify(path)
        if kind.format != NAME and kind.name != "unknown":
            problem = f"a MindSpore checkpoint is needed, this is {kind.title}"
            raise InputError(problem, where=shown(str(path)), hint=kind.cure or "name a .ckpt of weights") from None
        hint = "fetch or save the file again: it is damaged, cut off, or no MindSpore checkpoint"
        place = _place(path, error.tensor) if error.tensor else shown(str(path))
        raise InputError(error.problem, where=f"{place}, byte {error.offset}", hint=hint) from None
    except BaseException:
        plain.close()
        raise


def _bytes_of(path: Path) -> FileBytes | DecryptedFile:
    """Open a file as it is, or decrypting it where its first bytes say that it is encrypted."""
    plain = FileBytes(path)
    mode = mode_of(plain.read(0, 4))
    if mode is None:
        return plain
    plain.close()
    return DecryptedFile(path, needed(f"the checkpoint is encrypted with {mode.upper()}", shown(str(path))))


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
        value = crc32_of(path, source.plain.read, crc.covered, progress)
    finally:
        source.close()
    if value != crc.value:
        problem = f"the data's checksum is {value:#010x}, the file states {crc.value:#010x}"
        raise InputError(problem, where=shown(str(path)), hint=_DAMAGED)
    return True
