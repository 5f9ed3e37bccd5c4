"""Where a sink's tensors lie in its files, for writers in other processes that know nothing of the container."""

from __future__ import annotations

import os
import platform
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..errors import InputError, StorageError, UsageError
from ..files.syscalls import calls, copy_range, refusals, sync, write_all
from ..tensors import Extent, Sink, TensorSpec
from .untrusted import refused_by_system

if TYPE_CHECKING:
    from ..tensors import Bits

Piece = tuple[int, int, int]
"""A part of a tensor's buffer: offset, length, CRC-32."""
_OPEN = 32
"""Files of each kind that are kept open."""
_BLOCK = 1 << 20


@runtime_checkable
class Ranged(Protocol):
    """A sink whose files need no more than each tensor's bytes at fixed places, and perhaps their CRC-32."""

    @property
    def checked(self) -> bool:
        """The file holds checksums of the tensors: whoever writes one tells the pieces to ``settle``."""
        ...

    def ranges(self, name: str) -> tuple[Extent, ...]:
        """Return, after ``begin``, the ranges of the staged files whose concatenation is the tensor's buffer."""
        ...

    def settle(self, name: str, pieces: Sequence[Piece] = ()) -> None:
        """Count a tensor as written whole: others have put all its bytes, ``pieces`` one by one, into its ranges."""
        ...


def ranged(sink: Sink, format: str) -> Ranged:
    """Return the sink if others can write into its files; a UsageError names the container that does not allow it."""
    if isinstance(sink, Ranged):
        return sink
    raise UsageError(
        f"{format} files cannot be written by several machines",
        hint="write .safetensors or .ckpt, or use --engine process",
    )


class PlacedSink:
    """Write tensors into files that another process has laid out; see :class:`lorabridge.tensors.Sink`.

    ``places``: per tensor what :meth:`Ranged.ranges` said there. The files are opened for writing only and never made:
    a StorageError names one that this machine does not see. ``finish`` flushes all to disk. With ``checked``,
    ``pieces`` has what was written of each tensor.
    """

    def __init__(self, places: Mapping[str, tuple[Extent, ...]], *, checked: bool = False) -> None:
        self.pieces: dict[str, list[Piece]] = {}
        self._checked = checked
        self._places = places
        self._outputs: dict[Path, int] = {}
        self._inputs: dict[Path, int] = {}

    def begin(self, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        """Do nothing: the other process has written the headers."""

    def write(self, name: str, offset: int, block: Bits) -> None:
        """Write a C-contiguous block at a byte offset of the tensor."""
        import numpy as np

        self._put(name, offset, block.reshape(-1).view(np.uint8).data)

    def _put(self, name: str, offset: int, data: memoryview) -> None:
        for path, at, first, length in self._pieces(name, offset, len(data)):
            fd = self._output(path)
            with refusals(path):
                write_all(fd, data[first : first + length], at)
        if self._checked:
            self.pieces.setdefault(name, []).append((offset, len(data), zlib.crc32(data)))

    def copy(self, name: str, offset: int, extent: Extent) -> None:
        """Copy a file range to a byte offset of the tensor; block by block where a checksum is wanted."""
        if self._checked:
            block = memoryview(bytearray(min(extent.length, _BLOCK)))
            for start in range(0, extent.length, _BLOCK):
                part = block[: min(_BLOCK, extent.length - start)]
                _read(self._input(extent.path), part, extent.offset + start, extent.path)
                self._put(name, offset + start, part)
            return
        for path, at, first, length in self._pieces(name, offset, extent.length):
            source, target = self._input(extent.path), self._output(path)
            with refusals(path):
                copy_range(source, extent.offset + first, target, at, length, extent.path)

    def finish(self) -> None:
        """Flush every file to disk and close it."""
        try:
            for path, fd in self._outputs.items():
                with refusals(path):
                    sync(fd)
        finally:
            self.close()

    def close(self) -> None:
        """Close without flushing; closing twice is harmless."""
        for opened in (self._outputs, self._inputs):
            while opened:
                os.close(opened.popitem()[1])

    def _output(self, path: Path) -> int:
        if path not in self._outputs:
            if len(self._outputs) >= _OPEN:
                self.finish()
            try:
                self._outputs[path] = calls.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError as error:
                raise StorageError(
                    f"machine {platform.node()} does not see the output's files",
                    where=str(path),
                    hint="write to a file system that every machine of the cluster mounts under the same path",
                ) from error
            except OSError:
                with refusals(path):
                    raise
        return self._outputs[path]

    def _input(self, path: Path) -> int:
        if path not in self._inputs:
            while len(self._inputs) >= _OPEN:
                os.close(self._inputs.popitem()[1])
            try:
                self._inputs[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                raise refused_by_system(error, path) from error
        return self._inputs[path]

    def _pieces(self, name: str, offset: int, length: int) -> Iterator[tuple[Path, int, int, int]]:
        """Yield (file, offset in it, first byte of the block, length) for each range that a block touches."""
        size = sum(extent.length for extent in self._places[name])
        if not 0 <= offset <= offset + length <= size:
            raise ValueError(f"bytes {offset}:{offset + length} are outside the {size} bytes of {name}")
        at = 0
        for extent in self._places[name]:
            low, high = max(offset, at), min(offset + length, at + extent.length)
            if low < high:
                yield extent.path, extent.offset + low - at, low - offset, high - low
            at += extent.length


def _read(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill a buffer from a file; an InputError when it ends early."""
    while view:
        with refusals(path):
            done = os.preadv(fd, [view], offset)
        if done == 0:
            problem = f"the file ends at byte {offset:,}, earlier than its header promises"
            raise InputError(problem, where=str(path), hint="do not change input files during a run")
        view, offset = view[done:], offset + done
