"""Where a sink's tensors lie in its files, for writers in other processes that know nothing of the container."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..errors import StorageError, UsageError
from ..files.syscalls import calls, copy_range, refusals, sync, write_all
from ..tensors import Extent, Sink, TensorSpec
from .untrusted import refused_by_system

if TYPE_CHECKING:
    from ..tensors import Bits

_OPEN = 32
"""Files of each kind that are kept open."""


@runtime_checkable
class Ranged(Protocol):
    """A sink whose files need no more than each tensor's bytes at fixed places: no checksum passes over them."""

    def ranges(self, name: str) -> tuple[Extent, ...]:
        """Return, after ``begin``, the ranges of the staged files whose concatenation is the tensor's buffer."""
        ...

    def settle(self, name: str) -> None:
        """Count a tensor as written whole: another process has put all its bytes into its ranges."""
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
    a StorageError names one that this machine does not see. ``finish`` flushes all to disk.
    """

    def __init__(self, places: Mapping[str, tuple[Extent, ...]]) -> None:
        self._places = places
        self._outputs: dict[Path, int] = {}
        self._inputs: dict[Path, int] = {}

    def begin(self, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        """Do nothing: the other process has written the headers."""

    def write(self, name: str, offset: int, block: Bits) -> None:
        """Write a C-contiguous block at a byte offset of the tensor."""
        import numpy as np

        data = block.reshape(-1).view(np.uint8).data
        for path, at, first, length in self._pieces(name, offset, len(data)):
            fd = self._output(path)
            with refusals(path):
                write_all(fd, data[first : first + length], at)

    def copy(self, name: str, offset: int, extent: Extent) -> None:
        """Copy a file range to a byte offset of the tensor."""
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
