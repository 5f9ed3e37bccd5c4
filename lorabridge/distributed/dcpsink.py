"""Write PyTorch's distributed checkpoints (DCP): ``__<rank>_0.distcp`` and ``.metadata``, which torch loads.

Format: torch 2.13, as ``dcp.py`` describes it. Every tensor is cut along its first axis as FSDP cuts it; each chunk is
an archive of ``torch.save`` inside the file of its rank. The metadata's pickle is written opcode by opcode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from ..axes import Expr, cut, read
from ..formats.ranges import Piece, ranged
from ..formats.torchsink import make_tensor_sink, pickled_integer, pickled_integers, pickled_name, pickled_text
from ..tensors import Extent, Sink, TensorSpec
from .dcp import METADATA

if TYPE_CHECKING:
    from pathlib import Path

    from ..files.fsio import OutFile
    from ..tensors import Bits

_PACKAGE = "torch.distributed.checkpoint."
_VERSION = "1.0.0"


def chunks(specs: Mapping[str, TensorSpec], ranks: int) -> list[tuple[str, Expr]]:
    """Return every rank's rows of every tensor as ``<rank>/<name>``: ``ceil(rows / ranks)`` each, as FSDP cuts them.

    A scalar goes to the first rank; ranks without rows hold nothing of a tensor.
    """
    outputs: list[tuple[str, Expr]] = []
    for name, spec in specs.items():
        if not spec.shape:
            outputs.append((f"0/{name}", read(spec)))
            continue
        rows = spec.shape[0]
        share = max(1, -(-rows // ranks))
        for rank, start in enumerate(range(0, max(rows, 1), share)):
            outputs.append((f"{rank}/{name}", cut(read(spec), 0, start, min(start + share, rows))))
    return outputs


class _Part:
    """The place of one archive in a rank's file; it stands for a file of its own."""

    def __init__(self) -> None:
        self.size = 0
        self.start = 0
        self.file: OutFile | None = None

    def allocate(self, size: int) -> None:
        """Note how many bytes the archive takes."""
        self.size = size

    def _held(self) -> OutFile:
        if self.file is None:
            raise ValueError("the rank's file is not open yet")
        return self.file

    @property
    def path(self) -> Path:
        """Where the rank's file is staged."""
        return self._held().path

    def write(self, offset: int, data: object) -> None:
        """Write inside the archive's place."""
        self._held().write(self.start + offset, data)  # type: ignore[arg-type]

    def copy(self, offset: int, source: Path, start: int, length: int) -> None:
        """Copy into the archive's place."""
        self._held().copy(self.start + offset, source, start, length)

    def read(self, offset: int, length: int) -> bytes:
        """Read back from the archive's place."""
        return self._held().read(self.start + offset, length)

    def close(self) -> None:
        """Leave the rank's file open: it holds other archives."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    name: str
    rank: int
    offset: tuple[int, ...]
    spec: TensorSpec
    part: _Part
    sink: Sink


class DcpSink:
    """A sink whose tensors are called ``<rank>/<name>``, the rows of a tensor in the order of the ranks."""

    def __init__(self, create: Callable[[str], OutFile]) -> None:
        self._create = create
        self._chunks: dict[str, _Chunk] = {}
        self._files: list[OutFile] = []

    def begin(self, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        """Lay out every rank's file; a MappingError names a tensor that torch cannot hold."""
        rows: dict[str, int] = {}
        for spec in specs:
            rank, _, name = spec.name.partition("/")
            at = rows.get(name, 0)
            rows[name] = at + (spec.shape[0] if spec.shape else 0)
            part = _Part()
            sink = make_tensor_sink(lambda _, part=part: cast("OutFile", part))  # type: ignore[misc]
            sink.begin([replace(spec, name=name)], {})
            offset = (at, *(0,) * (len(spec.shape) - 1)) if spec.shape else ()
            self._chunks[spec.name] = _Chunk(name, int(rank), offset, spec, part, sink)
        for number in sorted({chunk.rank for chunk in self._chunks.values()}):
            self._place(number)

    def _place(self, rank: int) -> None:
        parts = [chunk.part for chunk in self._chunks.values() if chunk.rank == rank]
        at = 0
        for part in parts:
            part.start, at = at, at + part.size
        file = self._create(f"__{rank}_0.distcp")
        file.allocate(at)
        for part in parts:
            part.file = file
        self._files.append(file)

    def write(self, name: str, offset: int, block: Bits) -> None:
        """Write a block to its rank's archive."""
        chunk = self._chunks[name]
        chunk.sink.write(chunk.name, offset, block)

    def copy(self, name: str, offset: int, extent: Extent) -> None:
        """Copy a file range to its rank's archive."""
        chunk = self._chunks[name]
        chunk.sink.copy(chunk.name, offset, extent)

    checked = True

    def ranges(self, name: str) -> tuple[Extent, ...]:
        """Return where its rank's file holds the chunk, see ``formats.ranges``."""
        chunk = self._chunks[name]
        held = ranged(chunk.sink, "torch").ranges(chunk.name)
        return tuple(replace(extent, offset=chunk.part.start + extent.offset) for extent in held)

    def settle(self, name: str, pieces: Sequence[Piece] = ()) -> None:
        """Count a chunk as written by others."""
        chunk = self._chunks[name]
        ranged(chunk.sink, "torch").settle(chunk.name, pieces)

    def finish(self) -> None:
        """Finish every archive, then write the metadata."""
        for chunk in self._chunks.values():
            chunk.sink.finish()
        for file in self._files:
            file.close()
        data = _metadata(list(self._chunks.values()))
        out = self._create(METADATA)
        out.allocate(len(data))
        out.write(0, data)
        out.close()


def _metadata(held: Sequence[_Chunk]) -> bytes:
    tensors: dict[str, list[_Chunk]] = {}
    for chunk in held:
        tensors.setdefault(chunk.name, []).append(chunk)
    return b"".join([
        b"\x80\x02",
        _object("metadata.Metadata", {
            "state_dict_metadata": _dict((pickled_text(name), _tensor(parts)) for name, parts in tensors.items()),
            "planner_data": _dict((pickled_text(name), pickled_text(name) + b"\x85") for name in tensors),
            "storage_data": _dict(_stored(number, c) for parts in tensors.values() for number, c in enumerate(parts)),
            "storage_meta": b"N",
            "version": pickled_text(_VERSION),
        }),
        b".",
    ])  # fmt: skip


def _tensor(parts: Sequence[_Chunk]) -> bytes:
    first = parts[0].spec
    rows = sum(part.spec.shape[0] for part in parts) if first.shape else 0
    shape = (rows, *first.shape[1:]) if first.shape else ()
    layout = pickled_name("torch.serialization._get_layout") + pickled_text("torch.strided") + b"\x85R"
    memory = pickled_name(f"{_PACKAGE}metadata._MEM_FORMAT_ENCODING") + pickled_integer(0) + b"\x85R"
    state = b"(" + pickled_name(f"torch.{first.dtype.torch}") + layout + b"\x89" + memory + b"\x89t"
    properties = pickled_name(f"{_PACKAGE}metadata.TensorProperties") + b")\x81" + state + b"b"
    listed = b"".join(
        _object("metadata.ChunkStorageMetadata", {"offsets": _size(part.offset), "sizes": _size(part.spec.shape)})
        for part in parts
    )
    return _object(
        "metadata.TensorStorageMetadata",
        {"properties": properties, "size": _size(shape), "chunks": b"](" + listed + b"e"},
    )


def _stored(number: int, chunk: _Chunk) -> tuple[bytes, bytes]:
    index = _object(
        "metadata.MetadataIndex",
        {"fqn": pickled_text(chunk.name), "offset": _size(chunk.offset), "index": pickled_integer(number)},
    )
    info = {
        "relative_path": pickled_text(f"__{chunk.rank}_0.distcp"),
        "offset": pickled_integer(chunk.part.start),
        "length": pickled_integer(chunk.part.size),
        "transform_descriptors": b"N",
    }
    return index, _object("filesystem._StorageInfo", info)


def _object(name: str, state: Mapping[str, bytes]) -> bytes:
    held = _dict((pickled_text(key), value) for key, value in state.items())
    return pickled_name(_PACKAGE + name) + b")\x81" + held + b"b"


def _dict(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def _size(shape: tuple[int, ...]) -> bytes:
    return pickled_name("torch.Size") + pickled_integers(shape) + b"\x85R"
