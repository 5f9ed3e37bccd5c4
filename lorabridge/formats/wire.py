"""The wire format of MindSpore checkpoints: protobuf fields, records and trailer, found by walking over file headers.

Sources: protobuf.dev/programming-guides/encoding (proto2); mindspore 2.10, checkpoint.proto and train/serialization.py.
Fields with unknown numbers are skipped at every level, as protobuf does: MindSpore 0.1 wrote a ``model_type`` beside
the records, and padding or private data may be stored so. Groups, which no writer emits, and a single field given twice
are refused. A file cut exactly between two records is a valid, smaller checkpoint; nothing in the format tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .untrusted import MAX_METADATA, MAX_RANK

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""The wire types a field may have here."""

_SMALLEST_READ = 4 << 10
_LARGEST_READ = 1 << 20
_LONGEST_PREFIX = 20
"""Bytes of the longest field key plus the longest length or value that follows it."""

MAX_NAME = 1024
"""Characters of a parameter name that mindspore.Parameter accepts."""

MAX_RECORDS = 1_000_000
MAX_FIELDS = 1000
"""Fields of one record, and unknown fields beside the records, that the reader walks over."""

PRIVATE = 1000
"""Number of the field beside the records that holds lorabridge's own notes; MindSpore passes over it."""

TRAILER = b"crc_num"
TRAILER_BYTES = len(TRAILER) + 10


class WireError(Exception):
    """Say what is wrong with the bytes at an offset, in which tensor if that is known; the reader adds the file."""

    def __init__(self, problem: str, offset: int, tensor: str = "") -> None:
        self.problem = problem
        self.offset = offset
        self.tensor = tensor
        super().__init__(f"{problem} at byte {offset}")


def varint(value: int) -> bytes:
    """Return the minimal varint of a number in [0, 2**64)."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def delimited(number: int, length: int) -> bytes:
    """Return what precedes the content of a length-delimited field: its key and the length."""
    return varint(number << 3 | BYTES) + varint(length)


class Window:
    """See a file through a small buffer that moves with the walk.

    ``read(offset, length)`` returns fewer bytes than asked for at the end of the file. The buffer grows while the walk
    is steady and shrinks after a jump, so tensors that are walked over are not read.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        self.size = size
        self._read = read
        self._data = b""
        self._start = 0
        self._step = _SMALLEST_READ

    def bytes_at(self, offset: int, length: int) -> bytes:
        """Return exactly these bytes of the file; a WireError where it ends before."""
        at = offset - self._start
        if at < 0 or at + length > len(self._data):
            self._move(offset, length)
            at = 0
            if length > len(self._data):
                raise WireError("the file ends early", offset + len(self._data))
        return self._data[at : at + length]

    def _move(self, offset: int, length: int) -> None:
        steady = 0 <= offset - self._start <= len(self._data)
        self._step = min(2 * self._step, _LARGEST_READ) if steady else _SMALLEST_READ
        self._data = self._read(offset, min(max(length, self._step), self.size - offset))
        self._start = offset

    def varint(self, offset: int, stop: int) -> tuple[int, int]:
        """Return the unsigned 64-bit varint at ``offset`` and where it ends, which is not beyond ``stop``."""
        at = offset - self._start
        if 0 <= at < len(self._data) and offset < stop and self._data[at] < 0x80:
            return self._data[at], offset + 1
        if at < 0 or at + _LONGEST_PREFIX > len(self._data):
            self._move(offset, min(_LONGEST_PREFIX, self.size - offset))
            at = 0
        value, shift, data, last = 0, 0, self._data, min(len(self._data), at + stop - offset)
        for i in range(at, min(at + 10, last)):
            byte = data[i]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64:
                    break
                return value, offset + i + 1 - at
            shift += 7
        if last - at < 10:
            raise WireError("a number is cut off", offset)
        raise WireError("a number is longer than 64 bits", offset)

    def field(self, offset: int, stop: int) -> tuple[int, int, int, int]:
        """Read the field at ``offset`` of a message that ends at ``stop``.

        Returns (number, wire type, value, next offset); the value is a number for VARINT and the offset of the
        content, which ends at the next offset, for the other wire types.
        """
        key, at = self.varint(offset, stop)
        number, kind = key >> 3, key & 7
        if not 0 < number < 1 << 29:
            raise WireError(f"{number} is not a field number", offset)
        if kind == VARINT:
            value, after = self.varint(at, stop)
            return number, kind, value, after
        if kind == BYTES:
            length, at = self.varint(at, stop)
        elif kind in (FIXED32, FIXED64):
            length = 4 if kind == FIXED32 else 8
        else:
            raise WireError(f"field {number} has wire type {kind}", offset)
        if at + length > stop:
            holder = "the file" if stop == self.size else "the field around it"
            raise WireError(f"a field announces {length} bytes, {at + length - stop} more than {holder} holds", offset)
        return number, kind, at, at + length


@dataclass(frozen=True, slots=True)
class Crc:
    """The checksum a file states about itself: the CRC-32 of its first ``covered`` bytes."""

    value: int
    covered: int


@dataclass(frozen=True, slots=True)
class Record:
    """One slice of one tensor as the file states it: ``length`` bytes of content at ``start``, record at ``offset``."""

    tag: str
    dims: tuple[int, ...]
    type: str
    offset: int
    start: int
    length: int


def walk(window: Window, private: Callable[[bytes], None] | None = None) -> tuple[list[Record], Crc | None]:
    """Return every record of a checkpoint, and the checksum of its trailer if it has one.

    ``private`` is called with the content of each field PRIVATE beside the records. Raises WireError for whatever is
    no sequence of complete records, and for hash tables (``maptensor``).
    """
    size, at, unknown = window.size, 0, 0
    tail = window.bytes_at(size - TRAILER_BYTES, TRAILER_BYTES) if size >= TRAILER_BYTES else b""
    records: list[Record] = []
    crc = None
    while at < size:
        # The last content may end in bytes that look like a trailer; only a record boundary makes them one.
        if at == size - TRAILER_BYTES and tail.startswith(TRAILER):
            value = int.from_bytes(tail[len(TRAILER) :], "big")
            if value >> 32:
                raise WireError(f"the checksum {value} has more than 32 bits", at)
            crc = Crc(value, at)
            break
        number, kind, start, after = window.field(at, size)
        if number == 1:
            _expect(kind, BYTES, "a record", at)
            records.append(_record(window, start, after))
        else:
            unknown += 1
            if private is not None and number == PRIVATE and kind == BYTES:  # another kind is another writer's
                if after - start > MAX_METADATA:
                    raise WireError(f"what lorabridge noted has {after - start} bytes", at)
                private(window.bytes_at(start, after - start))
        if len(records) > MAX_RECORDS or unknown > MAX_FIELDS:
            raise WireError(f"more than {MAX_RECORDS} records or {MAX_FIELDS} unknown fields", at)
        at = after
    if not records:
        raise WireError("no parameter record in this file", 0)
    return records, crc


def _expect(kind: int, wanted: int, what: str, at: int) -> None:
    if kind != wanted:
        raise WireError(f"{what} has wire type {kind} instead of {wanted}", at)


def _once(found: dict[int, tuple[int, int]], number: int, what: str, at: int, span: tuple[int, int]) -> None:
    if number in found:
        raise WireError(f"{what} is given twice", at)
    found[number] = span


def _record(window: Window, start: int, stop: int) -> Record:
    found: dict[int, tuple[int, int]] = {}
    at = start
    for _ in range(MAX_FIELDS):
        if at == stop:
            break
        number, kind, value, after = window.field(at, stop)
        if number <= 3:
            what = ("the tag", "the tensor", "the hash table")[number - 1]
            _expect(kind, BYTES, what, at)
            _once(found, number, what, at, (value, after))
        at = after
    else:
        raise WireError(f"a record has more than {MAX_FIELDS} fields", start)
    if 1 not in found:
        raise WireError("a record has no tag", start)
    tag = _tag(window, *found[1])
    if 3 in found:
        raise WireError("this is a MapParameter (hash table): save the checkpoint without it", start, tag)
    if 2 not in found:
        raise WireError("the record has no tensor", start, tag)
    try:
        return _tensor(window, tag, *found[2])
    except WireError as error:
        raise WireError(error.problem, error.offset, tag) from None


def _tag(window: Window, start: int, stop: int) -> str:
    if start == stop:
        raise WireError("a tag is empty", start)
    if stop - start > 4 * MAX_NAME:
        raise WireError(f"a tag has {stop - start} bytes, a name at most {MAX_NAME} characters", start)
    raw = window.bytes_at(start, stop - start)
    try:
        tag = raw.decode()
    except UnicodeDecodeError:
        raise WireError(f"tag {raw[:80]!r} is not UTF-8", start) from None
    if len(tag) > MAX_NAME:
        raise WireError(f"a tag has {len(tag)} characters, a name at most {MAX_NAME}", start)
    return tag


def _tensor(window: Window, tag: str, start: int, stop: int) -> Record:
    found: dict[int, tuple[int, int]] = {}
    dims: list[int] = []
    at = start
    for _ in range(MAX_FIELDS):
        if at == stop:
            break
        number, kind, value, after = window.field(at, stop)
        if number == 1:
            dims += [value] if kind == VARINT else _packed(window, kind, value, after)
            if len(dims) > MAX_RANK:
                raise WireError(f"more than {MAX_RANK} axes", at)
        elif number <= 3:
            what = "the type" if number == 2 else "the content"
            _expect(kind, BYTES, what, at)
            _once(found, number, what, at, (value, after))
        at = after
    else:
        raise WireError(f"more than {MAX_FIELDS} fields", start)
    for number, what in ((2, "type"), (3, "content")):
        if number not in found:
            raise WireError(f"it has no {what}", start)
    if any(dim >> 63 for dim in dims):
        raise WireError(f"shape {[dim - (dim >> 63 << 64) for dim in dims]} has a negative length", start)
    first, last = found[2]
    name = window.bytes_at(first, min(last - first, 100)).decode(errors="backslashreplace")
    return Record(tag, tuple(dims), name, start, found[3][0], found[3][1] - found[3][0])


def _packed(window: Window, kind: int, start: int, stop: int) -> list[int]:
    _expect(kind, BYTES, "a dimension", start)
    dims: list[int] = []
    while start < stop and len(dims) <= MAX_RANK:
        value, start = window.varint(start, stop)
        dims.append(value)
    return dims


def record_header(name: str, dims: Sequence[int], kind: str, length: int) -> bytes:
    """Return the bytes of a record before its content of ``length`` bytes: minimal varints, unpacked dims."""
    tag, text = name.encode(), kind.encode()
    tag = delimited(1, len(tag)) + tag
    fields = b"".join(b"\x08" + varint(dim) for dim in dims) + delimited(2, len(text)) + text + delimited(3, length)
    tensor = delimited(2, len(fields) + length)
    return delimited(1, len(tag) + len(tensor) + len(fields) + length) + tag + tensor + fields
