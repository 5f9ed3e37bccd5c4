"""The undo file of a merge: what rounding lost, so that unmerging gives the base's bits back.

Layout: 16 bytes of magic; the header's length (8 bytes, little-endian); the header, JSON in UTF-8; the blocks of all
tensors in the header's order; the sha256 of everything before it. A tensor is a matrix of rows, cut into blocks of
``rows`` rows each; a block is a residue (``lorabridge.arithmetic.residue``), or for "raw" tensors zlib data. Digests of
a tensor are the sha256 of the sha256 of its blocks, so that blocks may be made and checked in any order.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from threading import Lock
from typing import IO, Literal, cast

import numpy as np

from .. import __version__
from ..arithmetic.entropy import MalformedError
from ..arithmetic.floats import Bits, Numbers
from ..arithmetic.residue import Delta, Extract, extract, pack, pieces, restore
from ..conversion import tasks
from ..dtypes import BY_NAME, DType
from ..errors import DifferentError, InputError, OutputError
from ..files.uploading import staged
from ..formats.untrusted import open_regular, parse_json, size_of

MAGIC = b"lorabridge undo\n"
SCHEMA = "lorabridge/undo/1"
BLOCK = tasks.MERGED
"""Bytes of a block, except where one row is longer: what one task of a merge makes."""
MAX_HEADER = 256 << 20
_LENGTH = struct.Struct("<Q")
_DIGEST = hashlib.sha256().digest_size

Mode = Literal["delta", "near", "raw"]
"""How a tensor comes back: from the merged one less the delta; from the merged one as it is; from the file alone."""
Json = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Kept:
    """One tensor of an undo file; ``sizes``: bytes of its blocks.

    ``base``, ``merged``: its digests in hexadecimal; ``delta``: that of what was added, as the merge identifies it.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    mode: Mode
    rows: int
    sizes: tuple[int, ...]
    base: str
    merged: str
    delta: str

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns."""
        return matrix(self.shape)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield the rows of each block."""
        count = self.matrix[0]
        return ((start, min(start + self.rows, count)) for start in range(0, count, self.rows))


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return rows and columns of a tensor: its first axis, and the others together."""
    return (shape[0], math.prod(shape[1:])) if shape else (1, 1)


def block_rows(shape: Sequence[int], dtype: DType) -> int:
    """Return how many rows a block has."""
    return max(1, BLOCK // max(1, matrix(shape)[1] * dtype.itemsize))


@dataclass
class _Block:
    """A block while its rows arrive: in order they are digested at once, others wait."""

    stop: int
    at: int
    waiting: dict[int, tuple[Extract, bytes, bytes, int]] = field(default_factory=dict)
    parts: list[Extract] = field(default_factory=list)
    base: hashlib._Hash = field(default_factory=hashlib.sha256)
    merged: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, start: int, stop: int, part: Extract, base: bytes, merged: bytes) -> bool:
        """Take rows [start, stop) and say whether the block is complete."""
        self.waiting[start] = (part, base, merged, stop)
        while self.at in self.waiting:
            part, base, merged, self.at = self.waiting.pop(self.at)
            self.parts.append(part)
            self.base.update(base)
            self.merged.update(merged)
        return self.at == self.stop


@dataclass
class _Taken:
    dtype: DType
    shape: tuple[int, ...]
    mode: Mode
    delta: str
    step: int
    open: dict[int, _Block] = field(default_factory=dict)
    done: dict[int, tuple[int, int, bytes, bytes]] = field(default_factory=dict)


class Recorder:
    """Collect residues during a merge and write the undo file; ``take`` may be called from any thread, in any order.

    The file does not depend on the order. Compressed blocks wait in an unnamed temporary file beside the target.
    """

    def __init__(self, target: Path) -> None:
        self.target = Path(target)
        if not self.target.parent.is_dir():
            raise OutputError("the undo file's directory does not exist", where=str(self.target.parent))
        self._lock = Lock()
        self._tensors: dict[str, _Taken] = {}
        self._spool: IO[bytes] = tempfile.TemporaryFile(dir=self.target.parent)  # noqa: SIM115  closed by close()
        self._end = 0

    def close(self) -> None:
        """Give the temporary file back."""
        self._spool.close()

    def expect(self, name: str, dtype: DType, shape: tuple[int, ...], mode: Mode, *, delta: str = "") -> None:
        """Announce a tensor whose rows will all be noted; ``delta``: identifies what is added."""
        with self._lock:
            self._tensors[name] = _Taken(dtype, shape, mode, delta, block_rows(shape, dtype))

    def take(self, name: str, start: int, base: Bits, merged: Bits, delta: Numbers | None) -> None:
        """Note rows from ``start`` on: bits before and after, ``[rows, columns]``; ``delta``: what was added, or None.

        Together the calls of a name cover each row once.
        """
        kept, rows = self._tensors[name], len(base)
        for number in range(start // kept.step, -(-(start + rows) // kept.step)):
            low, high = max(start, number * kept.step), min(start + rows, (number + 1) * kept.step)
            for first, last in pieces((high - low, base.shape[1])):
                part = slice(low + first - start, low + last - start)
                self._take(kept, number, low + first, base[part], merged[part], None if delta is None else delta[part])

    def _take(
        self, kept: _Taken, number: int, start: int, base: Bits, merged: Bits, delta: Numbers | None
    ) -> None:  # fmt: skip
        found = extract(base, merged, delta if kept.mode == "delta" else None, kept.dtype)
        given = base.tobytes(), merged.tobytes()
        with self._lock:
            if number not in kept.open:
                stop = min((number + 1) * kept.step, matrix(kept.shape)[0])
                kept.open[number] = _Block(stop, number * kept.step)
            block = kept.open[number]
            if not block.add(start, start + len(base), found, *given):
                return
            del kept.open[number]
        self._keep(kept, number, pack(block.parts), block.base.digest(), block.merged.digest())

    def _keep(self, kept: _Taken, number: int, data: bytes, base: bytes, merged: bytes) -> None:
        with self._lock:
            self._spool.seek(self._end)
            self._spool.write(data)
            kept.done[number] = (self._end, len(data), base, merged)
            self._end += len(data)

    def keep(self, name: str, start: int, base: Bits) -> None:
        """Note rows of a "raw" tensor, which the merged file does not have in this type and shape: a whole block."""
        kept, raw = self._tensors[name], base.tobytes()
        self._keep(kept, start // kept.step, zlib.compress(raw, 6), hashlib.sha256(raw).digest(), b"")

    def write(self, facts: Json, *, overwrite: bool) -> int:
        """Write and publish the file; return its bytes. ``facts``: what identifies the merge, as JSON."""
        tensors, order = [], []
        for name, kept in sorted(self._tensors.items()):
            blocks = [kept.done[number] for number in sorted(kept.done)]
            if kept.open or len(blocks) != -(-matrix(kept.shape)[0] // kept.step):
                raise ValueError(f"rows of {name} were not noted")
            entry = Kept(
                name, kept.dtype, kept.shape, kept.mode, kept.step, tuple(size for _, size, _, _ in blocks),
                _joined(base for _, _, base, _ in blocks),
                "" if kept.mode == "raw" else _joined(merged for _, _, _, merged in blocks),
                kept.delta,
            )  # fmt: skip
            tensors.append(_entry(entry))
            order += [(at, size) for at, size, _, _ in blocks]
        document = {"schema": SCHEMA, "version": __version__, **facts, "tensors": tensors}
        header = json.dumps(document, sort_keys=True).encode()
        return self._write(MAGIC + _LENGTH.pack(len(header)) + header, order, overwrite)

    def _write(self, head: bytes, order: Sequence[tuple[int, int]], overwrite: bool) -> int:
        digest = hashlib.sha256(head)
        identity = hashlib.sha256(head + os.urandom(16)).hexdigest()
        with staged(self.target, digest=identity, overwrite=overwrite, directory=False) as staging:
            file = staging.create(self.target.name)
            file.write(0, head)
            at = len(head)
            for start, size in order:
                self._spool.seek(start)
                data = self._spool.read(size)
                digest.update(data)
                file.write(at, data)
                at += size
            file.write(at, digest.digest())
            file.close()
            staging.commit()
        return at + _DIGEST


def _joined(digests: Iterator[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _entry(kept: Kept) -> dict[str, object]:
    return {
        "name": kept.name, "dtype": kept.dtype.name, "shape": list(kept.shape), "mode": kept.mode, "rows": kept.rows,
        "sizes": list(kept.sizes), "base": kept.base, "merged": kept.merged,
        "delta": kept.delta,
    }  # fmt: skip


class UndoFile:
    """An undo file that was read through once and is whole: its ``facts``, and its ``tensors`` by name.

    Opening raises InputError for a file that is truncated, changed or of another kind. Reading is thread-safe.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        raw = open_regular(self.path)
        with BufferedReader(raw) as file:
            size = size_of(raw)
            header = _header(file, size, str(path))
        facts, self.tensors, self._offsets = _parsed(header, size, str(path))
        self.facts: Json = facts

    def restore(self, name: str, number: int, merged: Bits | None, delta: Delta | None) -> Bits:
        """Return the base's bits of one block, ``[rows, columns]``.

        ``merged``: the merged bits of these rows (not for "raw"); ``delta(start, stop)``: rows of what was added,
        counted from the block's first. Raises InputError where the block is not that of these bits and this delta.
        """
        kept = self.tensors[name]
        start, stop = list(kept.spans())[number]
        shape = (stop - start, kept.matrix[1])
        with BufferedReader(open_regular(self.path)) as file:
            file.seek(self._offsets[name][number])
            data = file.read(kept.sizes[number])
        try:
            if kept.mode == "raw":
                return _inflated(data, shape, kept.dtype)
            if merged is None:
                raise ValueError(f"{name} is restored from its merged bits")
            return restore(data, merged.reshape(shape), delta if kept.mode == "delta" else None, kept.dtype)
        except MalformedError as error:
            raise InputError(
                "the undo file is not that of this merged tensor and adapter",
                where=[str(self.path), f"{name} ({error})"],
                hint="give the merged file as it was written, and the adapter that was merged",
            ) from error


def _header(file: IO[bytes], size: int, where: str) -> bytes:
    """Check the whole file's digest and return the header's bytes."""
    hint = "copy it again from where it was written"
    start = file.read(len(MAGIC) + _LENGTH.size)
    if not start.startswith(MAGIC):
        raise InputError("this is no undo file", where=where, hint="give the file that merge --undo wrote")
    length = _LENGTH.unpack(start[len(MAGIC) :])[0] if len(start) == len(MAGIC) + _LENGTH.size else size
    if len(start) + length + _DIGEST > size:
        raise InputError("the undo file is truncated", where=where, hint=hint)
    if length > MAX_HEADER:
        raise InputError(f"the header is over {MAX_HEADER >> 20} MiB", where=where)
    header = file.read(length)
    digest = hashlib.sha256(start + header)
    left = size - len(start) - length - _DIGEST
    while left and (data := file.read(min(left, 1 << 20))):
        digest.update(data)
        left -= len(data)
    if left or file.read(_DIGEST + 1) != digest.digest():
        raise InputError("the undo file is truncated or damaged: its checksum differs", where=where, hint=hint)
    return header


def _parsed(header: bytes, size: int, where: str) -> tuple[Json, dict[str, Kept], dict[str, list[int]]]:
    try:
        raw = parse_json(header)
        if not isinstance(raw, dict):
            raise ValueError("it is no object")
        if raw.get("schema") != SCHEMA:
            raise InputError(
                f"the undo file has schema {raw.get('schema')!r}, not {SCHEMA!r}",
                where=where,
                hint="use the lorabridge version that wrote it",
            )
        tensors, offsets, at = {}, {}, len(MAGIC) + _LENGTH.size + len(header)
        for entry in raw.pop("tensors"):
            kept = _kept(entry)
            if kept.name in tensors:
                raise ValueError(f"{kept.name} repeats")
            tensors[kept.name] = kept
            offsets[kept.name] = [at + sum(kept.sizes[:i]) for i in range(len(kept.sizes))]
            at += sum(kept.sizes)
        if at + _DIGEST != size:
            raise ValueError("the blocks do not fill the file")
        return cast(Json, raw), tensors, offsets
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"the undo file's header is malformed ({error})", where=where) from error


def _kept(entry: Mapping[str, object]) -> Kept:
    shape, sizes, mode, rows = entry["shape"], entry["sizes"], entry["mode"], entry["rows"]
    if not (isinstance(shape, list) and isinstance(sizes, list) and all(_natural(n) for n in (*shape, *sizes, rows))):
        raise ValueError("a tensor's numbers are not natural")
    if mode not in ("delta", "near", "raw"):
        raise ValueError(f"unknown mode {mode!r}")
    kept = Kept(
        str(entry["name"]), BY_NAME[str(entry["dtype"])], tuple(shape), mode, cast(int, rows), tuple(sizes),
        str(entry["base"]), str(entry["merged"]), str(entry["delta"]),
    )  # fmt: skip
    if kept.rows != block_rows(kept.shape, kept.dtype) or len(sizes) != -(-kept.matrix[0] // kept.rows):
        raise ValueError(f"{kept.name} has another number of blocks than rows")
    return kept


def _natural(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < 1 << 48


def _inflated(data: bytes, shape: tuple[int, int], dtype: DType) -> Bits:
    size = math.prod(shape) * dtype.itemsize
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(data, size + 1)
    except zlib.error as error:
        raise MalformedError(str(error)) from error
    if len(raw) != size or not inflate.eof:
        raise MalformedError("raw data of another length")
    return np.frombuffer(bytearray(raw), dtype.carrier()).reshape(shape)


class Checksum:
    """Digest a tensor's blocks as the undo file does, in any order and from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._blocks: dict[int, tuple[bytes, bytes]] = {}

    def add(self, number: int, base: Bits, merged: Bits | None) -> None:
        """Note one block."""
        pair = (
            hashlib.sha256(base.tobytes()).digest(),
            hashlib.sha256(b"" if merged is None else merged.tobytes()).digest(),
        )
        with self._lock:
            self._blocks[number] = pair

    def check(self, kept: Kept, where: str) -> None:
        """Compare with what was recorded; a DifferentError names which of the two differs."""
        order = [self._blocks[number] for number in sorted(self._blocks)]
        if kept.mode != "raw" and _joined(merged for _, merged in order) != kept.merged:
            raise DifferentError(
                "the merged tensor is not the one that was recorded",
                where=[where, kept.name],
                hint="give the merged file as it was written; without --undo the best inverse is computed",
            )
        if _joined(base for base, _ in order) != kept.base:
            raise DifferentError(
                "the restored tensor is not the base's",
                where=[where, kept.name],
                hint="give the adapter that was merged; without --undo the best inverse is computed",
            )
