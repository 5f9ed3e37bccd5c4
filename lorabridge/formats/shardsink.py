"""Write sharded sets over any container, cut, named and indexed as Hugging Face does.

Formats: transformers 5, modeling_utils.save_pretrained, for the index; huggingface_hub 2, serialization/_base.py, for
where a set is cut.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from ..errors import UsageError
from ..tensors import Extent, Sink, TensorSpec
from .ranges import Piece, ranged

if TYPE_CHECKING:
    from ..files.fsio import OutFile
    from ..tensors import Bits
    from . import Container


def split(specs: Sequence[TensorSpec], max_shard_size: int) -> list[list[TensorSpec]]:
    """Cut tensors into shards of at most ``max_shard_size`` bytes, in order; a larger tensor gets one to itself.

    The cut is huggingface_hub's (``split_state_dict_into_shards_factory``), so that the same model gives the same set.
    """
    shards: list[list[TensorSpec]] = []
    current: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if spec.nbytes > max_shard_size:
            shards.append([spec])
            continue
        if size + spec.nbytes > max_shard_size:
            shards.append(current)
            current, size = [], 0
        current.append(spec)
        size += spec.nbytes
    return [*shards, current] if current or not shards else shards


def main_file(specs: Sequence[TensorSpec], filename: str, max_shard_size: int | None) -> str:
    """Return the file that stands for a written checkpoint: its index where the set is cut, else ``filename``."""
    cut = max_shard_size is not None and len(split(specs, max_shard_size)) > 1
    return f"{filename}.index.json" if cut else filename


class _Nowhere:
    """Take the place of an output file while a layout is only being checked."""

    def allocate(self, size: int) -> None: ...

    def write(self, offset: int, data: object) -> None: ...

    def close(self) -> None: ...


class ShardedSink:
    """Write shards named ``model-00001-of-00005.safetensors`` and their index; a plain file where one is enough.

    Every shard's layout is checked at the start; its file is created with its first byte and closed with its last.
    Metadata goes to the first shard whole, to the others only as far as ``format``.
    """

    def __init__(
        self,
        module: Container,
        create: Callable[[str], OutFile],
        filename: str,
        *,
        max_shard_size: int,
        options: Mapping[str, object] | None = None,
    ) -> None:
        if max_shard_size <= 0:
            raise UsageError(f"shards of {max_shard_size} bytes are too small", hint="give a positive size")
        self._module = module
        self._create = create
        self._filename = filename
        self._max_shard_size = max_shard_size
        self._options = dict(options or {})
        self._parts: list[_Part] = []
        self._homes: dict[str, _Part] = {}
        self._lock = threading.Lock()
        self._whole: Sequence[TensorSpec] | None = None
        self._kept: frozenset[str] = frozenset()

    def resume(self, specs: Sequence[TensorSpec], finished: Callable[[str], bool]) -> frozenset[str]:
        """Take a set up that a killed run began: shards of which ``finished`` says so stay as they are.

        ``specs``: all tensors of the set; returns the names of those that are written already. ``begin`` is then given
        the others, and nothing else may be written.
        """
        self._whole = specs
        named = self._named(specs)
        self._kept = frozenset(filename for filename, _ in named if finished(filename))
        return frozenset(spec.name for filename, part in named if filename in self._kept for spec in part)

    def _named(self, specs: Sequence[TensorSpec]) -> list[tuple[str, Sequence[TensorSpec]]]:
        """Return the shards of a set: file name and tensors."""
        cut = split(specs, self._max_shard_size)
        stem, suffix = os.path.splitext(self._filename)
        return [
            (f"{stem}-{number:05d}-of-{len(cut):05d}{suffix}" if len(cut) > 1 else self._filename, part)
            for number, part in enumerate(cut, 1)
        ]

    def begin(self, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        """Cut the set and check every shard's layout; a MappingError names a tensor that cannot be held."""
        for number, (filename, part) in enumerate(self._named(specs if self._whole is None else self._whole), 1):
            pairs = dict(metadata) if number == 1 else {k: v for k, v in metadata.items() if k == "format"}
            check = self._module.make_sink(lambda _: cast("OutFile", _Nowhere()), filename, **self._options)
            check.begin(part, pairs)
            self._parts.append(_Part(filename, part, pairs))
            self._parts[-1].finished = filename in self._kept
        self._homes = {spec.name: part for part in self._parts for spec in part.specs}

    def write(self, name: str, offset: int, block: Bits) -> None:
        """Write a block to the shard of the tensor."""
        part = self._homes[name]
        self._begun(part).write(name, offset, block)
        self._count(part, block.nbytes)

    def copy(self, name: str, offset: int, extent: Extent) -> None:
        """Copy a file range to the shard of the tensor."""
        part = self._homes[name]
        self._begun(part).copy(name, offset, extent)
        self._count(part, extent.length)

    def ranges(self, name: str) -> tuple[Extent, ...]:
        """Return where the tensor's shard holds it, see ``formats.ranges``; the shard's file is made for it."""
        return ranged(self._begun(self._homes[name]), self._module.NAME).ranges(name)

    @property
    def checked(self) -> bool:
        """What the shards' container says."""
        sink = self._module.make_sink(lambda _: cast("OutFile", _Nowhere()), self._filename, **self._options)
        return ranged(sink, self._module.NAME).checked

    def settle(self, name: str, pieces: Sequence[Piece] = ()) -> None:
        """Count a tensor as written by another process."""
        part = self._homes[name]
        ranged(self._begun(part), self._module.NAME).settle(name, pieces)
        self._count(part, sum(extent.length for extent in self.ranges(name)))

    def finish(self) -> None:
        """Finish the shards that are still open, then write the index."""
        for part in self._parts:
            if not part.finished:
                self._begun(part).finish()
                part.finished = True
        if len(self._parts) < 2:
            return
        homes = {name: part.filename for name, part in self._homes.items()}
        total = sum(spec.nbytes for part in self._parts for spec in part.specs)
        index = {"metadata": {"total_size": total}, "weight_map": homes}
        data = (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()
        out = self._create(f"{self._filename}.index.json")
        out.allocate(len(data))
        out.write(0, data)
        out.close()

    def _begun(self, part: _Part) -> Sink:
        with self._lock:
            if part.sink is None:
                sink = self._module.make_sink(self._create, part.filename, **self._options)
                sink.begin(part.specs, part.metadata)
                part.sink = sink
            return part.sink

    def _count(self, part: _Part, length: int) -> None:
        """Finish a shard with its last byte, so that few files are open at a time."""
        with self._lock:
            part.missing -= length
            done = length > 0 and part.missing == 0 and not part.finished
            part.finished = part.finished or done
        if done and part.sink is not None:
            part.sink.finish()


class _Part:
    """One shard that is being written."""

    def __init__(self, filename: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        self.filename = filename
        self.specs = specs
        self.metadata = metadata
        self.missing = sum(spec.nbytes for spec in specs)
        self.sink: Sink | None = None
        self.finished = False
