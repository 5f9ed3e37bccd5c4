"""One logical checkpoint over the pieces that many ranks wrote: a Source whose tensors are put together when read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..axes import Expr, Join, Read, Reshape, Slice, Zeros, byte_ranges, cut, evaluate
from ..errors import InputError, counted
from ..formats import container
from ..formats.sharded import Shards
from ..formats.untrusted import shown
from ..tensors import Extent, Source, TensorSpec
from .grid import Box
from .layout import Layout

if TYPE_CHECKING:
    from ..tensors import Bits

MAX_OPEN = 256
"""Files of ranks that stay open."""
BLOCK = 16 << 20
"""Bytes of a replica that are compared at a time."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One stored copy of a slice: the rank that holds it, and the piece's name in the physical source.

    ``expr``: what of the pieces it is, where it is not one of them as it is; ``piece`` is then its first.
    """

    rank: int
    piece: str
    expr: Expr | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """Where one logical tensor lies.

    ``expr``: the tensor over the physical pieces. ``slices``: index of the slice (an entry per axis) to the copies that
    are there, the one that is read first. ``layout``: None where no layout is known and every rank holds the whole.
    ``boxes``: of the same indices, where a slice begins in the tensor and its shape; where they have one axis and the
    tensor has more, they count its elements in row-major order. Empty where slices are no boxes. ``mesh``: for show,
    how devices cut a tensor that has no layout of equal slices.
    """

    name: str
    expr: Expr
    slices: Mapping[tuple[int, ...], tuple[Copy, ...]]
    layout: Layout | None = None
    stage: int = 0
    boxes: Mapping[tuple[int, ...], Box] = field(default_factory=dict)
    mesh: Layout | None = None


@dataclass(frozen=True, slots=True)
class Arrangement:
    """How a checkpoint lies over its ranks. ``kind``: what wrote it. ``notes``: sentences for the report."""

    kind: str
    ranks: int
    placed: Mapping[str, Placed]
    notes: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


class Pieces(Source, Protocol):
    """What ranks wrote, one tensor per piece. ``files``: where the pieces lie, known without opening any of them."""

    files: frozenset[Path]


class Assembled:
    """Read a distributed checkpoint as one; nothing is loaded before it is asked for.

    ``pieces`` holds what the ranks wrote, one tensor per piece; closing closes it. A slice of rows is read from the
    pieces that hold these rows. Everything else is as :class:`lorabridge.tensors.Source` says.
    """

    def __init__(self, path: Path, pieces: Pieces, arrangement: Arrangement) -> None:
        self.path = path
        self.format = pieces.format
        self.pieces = pieces
        self.arrangement = arrangement
        self.metadata: Mapping[str, str] = dict(arrangement.metadata)
        self.skipped = arrangement.skipped
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(name, placed.expr.dtype, placed.expr.shape) for name, placed in arrangement.placed.items()
        }

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Bits:
        """Return a tensor's bits, or those of rows [start, stop)."""
        expr = self.arrangement.placed[name].expr
        return gather(expr if rows is None else cut(expr, 0, *rows), self.pieces)

    def extents(self, name: str) -> tuple[Extent, ...]:
        """Return the byte ranges of a tensor that is cut along its first axis only, () for any other."""
        found: list[Extent] = []
        for piece, start, length in byte_ranges(self.arrangement.placed[name].expr) or ():
            held = clip(self.pieces.extents(piece), start, length)
            if not held:
                return ()
            found += held
        return tuple(found)

    def close(self) -> None:
        """Close every piece."""
        self.pieces.close()

    def replicas(self) -> Iterator[tuple[str, Copy, Copy]]:
        """Yield (tensor, copy that is read, copy that must equal it)."""
        for name, placed in self.arrangement.placed.items():
            for copies in placed.slices.values():
                for other in copies[1:]:
                    yield name, copies[0], other

    def apart(self, progress: Callable[[int], None] = lambda done: None) -> dict[tuple[str, int], list[int]]:
        """Compare every copy of a slice with the one that is read, bit for bit.

        Returns, for the tensor and the rank that is read, the ranks whose copies differ; ``progress`` is told the bytes
        compared.
        """
        apart: dict[tuple[str, int], list[int]] = {}
        for name, first, other in self.replicas():
            if first.expr is None or other.expr is None:
                equal, size = same_bits(self.pieces, first.piece, other.piece), self.pieces.specs[other.piece].nbytes
            else:
                equal = same_values(self.pieces, first.expr, other.expr)
                size = TensorSpec(other.piece, other.expr.dtype, other.expr.shape).nbytes
            if not equal:
                apart.setdefault((name, first.rank), []).append(other.rank)
            progress(size)
        return apart

    def check_replicas(self, progress: Callable[[int], None] = lambda done: None) -> None:
        """Refuse copies of a slice that differ: an InputError lists them; ``progress`` as for :meth:`apart`."""
        apart = self.apart(progress)
        if apart:
            raise disagreement(apart)


def disagreement(apart: Mapping[tuple[str, int], Sequence[int]]) -> InputError:
    """Return the error that lists copies which differ, see :meth:`Assembled.apart`."""
    names = {name for name, _ in apart}
    return InputError(
        f"{counted(len(names), 'tensor')} differ{'s' * (len(names) == 1)} between ranks that should hold copies",
        where=[
            f"{shown(name)}: rank {rank} and rank {', '.join(map(str, others))}"
            for (name, rank), others in apart.items()
        ],
        hint="take the strategy of the run that wrote them, or a checkpoint whose ranks agree",
    )


def same_bits(source: Source, one: str, other: str) -> bool:
    """Say whether two tensors of a source have equal types, shapes and bits; memory is bounded by a few blocks."""
    import numpy as np

    specs = source.specs[one], source.specs[other]
    if (specs[0].dtype, specs[0].shape) != (specs[1].dtype, specs[1].shape):
        return False
    rows = specs[0].shape[0] if specs[0].shape else 1
    step = max(1, BLOCK * rows // max(1, specs[0].nbytes))
    if not specs[0].shape or step >= rows or specs[0].dtype.bits % 8:
        return bool(np.array_equal(source.read(one), source.read(other)))
    spans = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    return all(np.array_equal(source.read(one, span), source.read(other, span)) for span in spans)


def same_values(source: Source, one: Expr, other: Expr) -> bool:
    """Say whether two structural expressions have equal types, shapes and bits; memory is bounded by a few blocks."""
    import numpy as np

    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if not one.shape or one.dtype.bits % 8:
        return bool(np.array_equal(gather(one, source), gather(other, source)))
    row = max(1, TensorSpec("", one.dtype, one.shape[1:]).nbytes)
    step = max(1, BLOCK // row)
    spans = [(start, min(start + step, one.shape[0])) for start in range(0, one.shape[0], step)]
    return all(
        np.array_equal(gather(cut(one, 0, *span), source), gather(cut(other, 0, *span), source)) for span in spans
    )


def clip(extents: Sequence[Extent], start: int, length: int) -> list[Extent]:
    """Return the part [start, start + length) of what byte ranges hold one after another."""
    found, at = [], 0
    for extent in extents:
        low, high = max(start - at, 0), min(start + length - at, extent.length)
        if low < high:
            found.append(Extent(extent.path, extent.offset + low, high - low))
        at += extent.length
    return found


def gather(expr: Expr, source: Source) -> Bits:
    """Return the bits of a structural expression as a new C-contiguous array; only the rows that it needs are read."""
    import numpy as np

    if isinstance(expr, Read):
        return source.read(expr.name)
    out = np.empty(expr.shape, expr.dtype.carrier())
    _fill(out, expr, source)
    return out


def _fill(out: Bits, expr: Expr, source: Source) -> None:
    if isinstance(expr, Join):
        at = 0
        for part in expr.parts:
            length = part.shape[expr.axis]
            _fill(out[(slice(None),) * expr.axis + (slice(at, at + length),)], part, source)
            at += length
    elif isinstance(expr, Zeros):
        out[...] = 0
    elif isinstance(expr, Slice) and expr.axis == 0 and isinstance(expr.x, Read):
        out[...] = source.read(expr.x.name, (expr.start, expr.stop))
    elif isinstance(expr, Slice | Reshape) and not isinstance(expr.x, Read):
        bits = gather(expr.x, source)
        out[...] = evaluate(replace(expr, x=Read("", expr.x.dtype, expr.x.shape)), lambda _: bits, {})
    else:
        out[...] = evaluate(expr, source.read, {})


def home(held: Mapping[str, Mapping[str, TensorSpec]], piece: str) -> tuple[str, str]:
    """Return the file and the tensor of a piece ``<file>/<tensor>``, of which both may hold slashes; KeyError."""
    at = piece.find("/")
    while at >= 0:
        if piece[at + 1 :] in held.get(piece[:at], ()):
            return piece[:at], piece[at + 1 :]
        at = piece.find("/", at + 1)
    raise KeyError(piece)


class _PieceSpecs(Mapping[str, TensorSpec]):
    """The tensors of many files as pieces, made when asked for: there may be millions of them."""

    def __init__(self, held: Mapping[str, Mapping[str, TensorSpec]]) -> None:
        self._held = held

    def __getitem__(self, piece: str) -> TensorSpec:
        file, name = home(self._held, piece)
        spec = self._held[file][name]
        return TensorSpec(piece, spec.dtype, spec.shape)

    def __iter__(self) -> Iterator[str]:
        return (f"{file}/{name}" for file, specs in self._held.items() for name in specs)

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))


class Files:
    """The tensors of many files of one container, each called ``<file>/<tensor>``; few files are open at a time.

    ``open_file``: opens one of them, where that is not what the container's own reader does.

    ``specs`` are read from every header when it is made, so that a file that is damaged is found at once. With a list
    for what is wrong with them, damaged files are left out of ``held``.
    """

    def __init__(
        self, path: Path, format: str, files: Mapping[str, Path], open_file: Callable[[Path], Source] | None = None,
        *, damaged: list[InputError] | None = None,
    ) -> None:  # fmt: skip
        self.path = path
        self.format = format
        self.files = frozenset(files.values())
        self._shards = Shards(open_file or container(format).open_file, files, most=MAX_OPEN)
        self._extents: dict[str, dict[str, tuple[Extent, ...]]] = {}
        self.held: dict[str, Mapping[str, TensorSpec]] = {}
        """The tensors of each file, under their own names."""
        self.stated: dict[str, Mapping[str, str]] = {}
        """The metadata of each file."""
        try:
            for file in files:
                try:
                    with self._shards.use(file) as shard:
                        self.held[file], self.stated[file] = shard.specs, shard.metadata
                except InputError as error:
                    if damaged is None:
                        raise
                    damaged.append(error)
            if files and not self.held:
                raise InputError("no file can be read", where=[shown(str(path))], hint="take them from the run again")
        except BaseException:
            self._shards.close()
            raise
        self.specs: Mapping[str, TensorSpec] = _PieceSpecs(self.held)
        self.metadata: Mapping[str, str] = {}

    def piece(self, file: str, name: str) -> Expr:
        """Stand for one file's tensor."""
        spec = self.held[file][name]
        return Read(f"{file}/{name}", spec.dtype, spec.shape)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Bits:
        """Return a piece's bits, or those of rows [start, stop)."""
        file, own = home(self.held, name)
        with self._shards.use(file) as shard:
            return shard.read(own, rows)

    def extents(self, name: str) -> tuple[Extent, ...]:
        """Return the byte ranges of a piece; those of its whole file are kept, since headers take longer to read."""
        file, own = home(self.held, name)
        if file not in self._extents:
            with self._shards.use(file) as shard:
                self._extents[file] = {one: shard.extents(one) for one in self.held[file]}
        return self._extents[file][own]

    def close(self) -> None:
        """Close every file."""
        self._shards.close()
