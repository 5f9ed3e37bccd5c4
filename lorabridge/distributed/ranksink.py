"""Write many ranks' files at once: every tensor goes to the files of the ranks that hold a slice of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..formats.ranges import Piece, ranged
from ..tensors import Extent, Sink, TensorSpec

if TYPE_CHECKING:
    from ..files.fsio import OutFile
    from ..formats import Container
    from ..tensors import Bits


class RanksSink:
    """A sink whose tensors are called ``<folder>/<name>``: a file in each folder, with the tensors of that folder.

    Every file is finished with its last byte. ``filename``: the file's name inside its folder. ``options``: for the
    container's own sink.
    """

    def __init__(
        self,
        module: Container,
        create: Callable[[str], OutFile],
        filename: str,
        *,
        options: Mapping[str, object] | None = None,
    ) -> None:
        self._module = module
        self._create = create
        self._filename = filename
        self._options = dict(options or {})
        self._sinks: dict[str, Sink] = {}
        self._missing: dict[str, int] = {}
        self._lock = threading.Lock()

    def begin(self, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        """Lay out every folder's file; a MappingError names a tensor that cannot be held."""
        inside: dict[str, list[TensorSpec]] = {}
        for spec in specs:
            folder, _, name = spec.name.partition("/")
            inside.setdefault(folder, []).append(replace(spec, name=name))
        for folder, held in inside.items():
            sink = self._module.make_sink(self._in(folder), self._filename, **self._options)
            sink.begin(held, metadata)
            self._sinks[folder] = sink
            self._missing[folder] = sum(spec.nbytes for spec in held)

    def _in(self, folder: str) -> Callable[[str], OutFile]:
        return lambda name: self._create(f"{folder}/{name}")

    def write(self, name: str, offset: int, block: Bits) -> None:
        """Write a block to the folder of the tensor."""
        folder, _, own = name.partition("/")
        self._sinks[folder].write(own, offset, block)
        self._count(folder, block.nbytes)

    def copy(self, name: str, offset: int, extent: Extent) -> None:
        """Copy a file range to the folder of the tensor."""
        folder, _, own = name.partition("/")
        self._sinks[folder].copy(own, offset, extent)
        self._count(folder, extent.length)

    checked = False

    def ranges(self, name: str) -> tuple[Extent, ...]:
        """Return where the folder's file holds the tensor, see ``formats.ranges``."""
        folder, _, own = name.partition("/")
        return ranged(self._sinks[folder], self._module.NAME).ranges(own)

    def settle(self, name: str, pieces: Sequence[Piece] = ()) -> None:
        """Count a tensor as written by another process."""
        folder, _, own = name.partition("/")
        sink = ranged(self._sinks[folder], self._module.NAME)
        length = sum(extent.length for extent in sink.ranges(own))
        sink.settle(own)
        self._count(folder, length)

    def finish(self) -> None:
        """Finish the files that are still open."""
        for folder in list(self._missing):
            self._missing.pop(folder)
            self._sinks[folder].finish()

    def _count(self, folder: str, length: int) -> None:
        with self._lock:
            self._missing[folder] -= length
            done = length > 0 and self._missing[folder] == 0
            if done:
                self._missing.pop(folder)
        if done:
            self._sinks[folder].finish()
