"""Zip archives of stored (never compressed) records, laid out as torch.save lays them out, read strictly.

Format: PKWARE APPNOTE.TXT 6.3.10 sections 4.3.7 to 4.3.16; the alignment padding, the data descriptors and the rules
for zip64 are those of the zip writer in torch 2.13, so that offsets computed by torch (``mmap``, fake tensors) hold.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import InputError
from .untrusted import MAX_NAME, MAX_TENSORS, Region, pread_into, shown, size_of

ALIGNMENT = 64
BLOCK = 4 * 2**20
MAX_DIRECTORY = 256 * 2**20
"""Bytes of a central directory that is accepted."""

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR = struct.Struct("<IIQI")
_LOCAL_SIGNATURE = 0x04034B50
_CENTRAL_SIGNATURE = 0x02014B50
_DESCRIPTOR_SIGNATURE = 0x08074B50
_DESCRIPTOR, _UTF8 = 0x0008, 0x0800
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Record:
    """Name one stored record: its local header's offset, its data's offset and size in bytes, its CRC-32."""

    name: str
    header: int
    offset: int
    size: int
    crc: int


class _Damaged(ValueError):
    """Say in one clause what a zip archive has wrong."""


def read_directory(file: io.FileIO | Region, path: Path) -> tuple[str, dict[str, Record]]:
    """Return the top folder and the records by their name below it, in directory order.

    Everything between the first byte and the last is accounted for: local headers that agree with the directory,
    data, data descriptors, directory, end records. Raises InputError for anything else: compression, encryption,
    several top folders, repeated or unsafe names, overlaps, holes, zip64 fields that contradict each other, comments.
    """
    records = read_records(file, path)
    try:
        return _top(records)
    except _Damaged as error:
        raise _unsafe(error, path) from None


def read_records(file: io.FileIO | Region, path: Path) -> list[Record]:
    """Return the records under their full names; otherwise as :func:`read_directory`, without a top folder."""
    try:
        size = size_of(file)
        start, length, count = _end(file, size)
        listed = list(_entries(_pread(file, start, length), count))
        return _locate(file, listed, start)
    except _Damaged as error:
        raise _unsafe(error, path) from None


def _unsafe(error: _Damaged, path: Path) -> InputError:
    return InputError(
        f"the zip archive is damaged or unsafe: {error}",
        where=shown(str(path)),
        hint="download or save it again; torch.save and numpy.savez write archives that pass",
    )


def record_bytes(file: io.FileIO | Region, path: Path, record: Record) -> bytes:
    """Return a small record's bytes after checking its CRC-32.

    Raises InputError when the file ends early or the checksum differs.
    """
    try:
        data = _pread(file, record.offset, record.size)
    except _Damaged as error:
        raise InputError(str(error), where=f"{shown(str(path))}: {record.name}") from None
    check_crc(zlib.crc32(data), path, record)
    return data


def check_crc(crc: int, path: Path, record: Record) -> None:
    """Raise InputError unless a record's CRC-32 is the stored one.

    A stored zero means that none was computed (``torch.serialization.set_crc32_options(False)``) and passes.
    """
    if record.crc not in (0, crc):
        raise InputError(
            f"the checksum of the data is {crc:08x}, the directory says {record.crc:08x}",
            where=f"{shown(str(path))}: {record.name}",
            hint="the file is corrupt: download or copy it again",
        )


def _pread(file: io.FileIO | Region, offset: int, length: int) -> bytes:
    data = bytearray(length)
    if pread_into(file, memoryview(data), offset) != length:
        raise _Damaged("the file ends early")
    return bytes(data)


def _end(file: io.FileIO | Region, size: int) -> tuple[int, int, int]:
    """Return the directory's offset and length and the number of its entries."""
    if size < _END.size:
        raise _Damaged("the file ends early")
    tail = _pread(file, max(0, size - 98), min(size, 98)).rjust(98, b"\0")
    signature, disk, disk0, here, total, length, start, comment = _END.unpack_from(tail, 76)
    if signature != 0x06054B50:
        raise _Damaged("it does not end in an end-of-directory record")
    if disk or disk0 or comment or here != total:
        raise _Damaged("the end-of-directory record speaks of several disks or holds a comment")
    end = size - 22
    locator, disk, at, disks = _LOCATOR.unpack_from(tail, 56)
    if locator == 0x07064B50:
        end = size - 98
        fields = _END64.unpack_from(tail)
        if disk or disks > 1 or at != end or fields[:2] != (0x06064B50, 44) or fields[4:6] != (0, 0):
            raise _Damaged("the zip64 end record is not where or what it should be")
        for short, long, limit in ((here, fields[6], _MAX16), (total, fields[7], _MAX16), (length, fields[8], _MAX32)):
            if short not in (long, limit):
                raise _Damaged("the zip64 end record contradicts the short one")
        if start not in (fields[9], _MAX32) or fields[6] != fields[7]:
            raise _Damaged("the zip64 end record contradicts the short one")
        total, length, start = fields[7:]
    if start + length != end:
        raise _Damaged("the directory does not end where the end record begins")
    if length > MAX_DIRECTORY or not 0 < total <= MAX_TENSORS + 100 or total * 47 > length:
        raise _Damaged(f"a directory of {total} entries in {length} bytes is not accepted")
    return start, length, total


def _entries(data: bytes, count: int) -> Iterator[tuple[Record, int]]:
    """Walk the central directory; yields records whose data offset is still unknown, and their flags."""
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(data):
            raise _Damaged("the directory ends early")
        (signature, _made, _needed, flags, method, _time, _date, crc, packed, size, names, extras, comment, disk, _, _,
         header) = _CENTRAL.unpack_from(data, at)  # fmt: skip
        at += _CENTRAL.size
        if signature != _CENTRAL_SIGNATURE or at + names + extras > len(data):
            raise _Damaged("the directory holds something that is no entry")
        name = _name(data[at : at + names])
        extra = _extra(data[at + names : at + names + extras]).get(1)
        at += names + extras
        if method:
            raise _Damaged(f"the record {shown(name)} is compressed")
        if flags & ~(_DESCRIPTOR | _UTF8):
            raise _Damaged(f"the record {shown(name)} is encrypted or has unknown flags")
        if comment or disk:
            raise _Damaged(f"the record {shown(name)} has a comment or lies on another disk")
        wide = [field == _MAX32 for field in (size, packed, header)]
        if extra is not None or any(wide):
            if extra is None or len(extra) != 8 * sum(wide):
                raise _Damaged(f"the zip64 field of {shown(name)} does not fit its entry")
            values = iter(struct.unpack(f"<{sum(wide)}Q", extra))
            size, packed, header = (
                next(values) if long else field for long, field in zip(wide, (size, packed, header), strict=True)
            )
        if packed != size:
            raise _Damaged(f"the record {shown(name)} has two sizes")
        yield Record(name, header, 0, size, crc), flags
    if at != len(data):
        raise _Damaged("the directory is longer than its entries")


def _name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _Damaged("a record's name is not UTF-8") from None
    if len(raw) > MAX_NAME or "\\" in name or "\0" in name or {"", ".", ".."} & set(name.split("/")):
        raise _Damaged(f"the record name {shown(name)} is not a plain relative path")
    return name


def _extra(data: bytes) -> dict[int, bytes]:
    """Parse an extra field into its blocks."""
    blocks: dict[int, bytes] = {}
    at = 0
    while at < len(data):
        if at + 4 > len(data):
            raise _Damaged("an extra field ends early")
        kind, length = struct.unpack_from("<HH", data, at)
        at += 4 + length
        if at > len(data) or kind in blocks:
            raise _Damaged("an extra field ends early or repeats a block")
        blocks[kind] = data[at - length : at]
    return blocks


def _locate(file: io.FileIO | Region, listed: Sequence[tuple[Record, int]], end: int) -> list[Record]:
    """Check the local headers, fill in the data offsets and prove that the records tile the file up to ``end``."""
    order = sorted(range(len(listed)), key=lambda i: listed[i][0].header)
    starts = [*(listed[i][0].header for i in order), end]
    if starts[0] != 0 or starts[-2] >= end:
        raise _Damaged("its records do not lie between its beginning and its directory")
    found = [record for record, _ in listed]
    for i, following in zip(order, starts[1:], strict=True):
        record, flags = listed[i]
        data = _local(file, record, flags, following)
        gap = following - data - record.size
        if gap < 0:
            raise _Damaged(f"the record {shown(record.name)} overlaps what follows it")
        if flags & _DESCRIPTOR and gap in (16, 24):
            form = "<IIII" if gap == 16 else "<IIQQ"
            if gap == 16 and record.size > _MAX32:
                raise _Damaged(f"the data descriptor of {shown(record.name)} is too short")
            expected = struct.pack(form, _DESCRIPTOR_SIGNATURE, record.crc, record.size, record.size)
            if _pread(file, following - gap, gap) != expected:
                raise _Damaged(f"the data descriptor of {shown(record.name)} contradicts the directory")
        elif gap or flags & _DESCRIPTOR:
            raise _Damaged(f"there are {gap} unexpected bytes after the record {shown(record.name)}")
        found[i] = Record(record.name, record.header, data, record.size, record.crc)
    return found


def _local(file: io.FileIO | Region, record: Record, flags: int, limit: int) -> int:
    """Check one local header against the directory and return the offset of the data."""
    name = record.name.encode()
    length = _LOCAL.size + len(name)
    head = _pread(file, record.header, max(0, min(length + 160, limit - record.header)))
    if len(head) < length:
        raise _Damaged(f"the local header of {shown(record.name)} overlaps what follows it")
    signature, _needed, local_flags, method, _time, _date, crc, packed, size, names, extras = _LOCAL.unpack_from(head)
    if (signature, local_flags, method, names) != (_LOCAL_SIGNATURE, flags, 0, len(name)) or head[30:length] != name:
        raise _Damaged(f"the local header of {shown(record.name)} contradicts the directory")
    data: int = record.header + length + extras
    if data > limit:
        raise _Damaged(f"the local header of {shown(record.name)} overlaps what follows it")
    extra = head[length : length + extras] if length + extras <= len(head) else _pread(file, data - extras, extras)
    long = _extra(extra).get(1, b"")
    values = set(struct.unpack(f"<{len(long) // 8}Q", long[: len(long) & ~7]))
    if len(long) % 8 or not values <= {0, record.size, record.header}:
        raise _Damaged(f"the zip64 field of {shown(record.name)} contradicts the directory")
    later = {0} if flags & _DESCRIPTOR else set()  # with a data descriptor the header may leave these open
    sizes = {record.size, *later, *([_MAX32] if record.size in values else [])}
    if crc not in {record.crc, *later} or packed not in sizes or size not in sizes:
        raise _Damaged(f"the local header of {shown(record.name)} contradicts the directory")
    return data


def _top(records: Sequence[Record]) -> tuple[str, dict[str, Record]]:
    """Split off the one top folder and index the records by the rest of their names."""
    top = records[0].name.partition("/")[0]
    found: dict[str, Record] = {}
    for record in records:
        folder, _, name = record.name.partition("/")
        if folder != top or not name:
            raise _Damaged(f"the record {shown(record.name)} is outside the folder {shown(top)}")
        if name in found:
            raise _Damaged(f"the record {shown(record.name)} occurs twice")
        found[name] = record
    return top, found


def place(top: str, sizes: Sequence[tuple[str, int]]) -> tuple[list[Record], int, int]:
    """Lay records out below a top folder, if any: (records with CRC 0, the directory's offset, the file's size)."""
    records, at, listing = [], 0, 0
    for name, size in sizes:
        full = f"{top}/{name}" if top else name
        header = at
        data = header + len(local_header(full, header, size))
        records.append(Record(full, header, data, size, 0))
        at = data + size + len(descriptor(records[-1]))
        listing += len(_central(records[-1]))
    return records, at, at + listing + _END64.size + _LOCATOR.size + _END.size


def local_header(name: str, header: int, size: int) -> bytes:
    """Encode a local header, padded so that the data after it is aligned to 64 bytes."""
    raw = name.encode()
    extra = b""
    if size >= _MAX32:
        extra += struct.pack("<QQ", size, size)
    if header >= _MAX32:
        extra += struct.pack("<Q", header)
    if extra:
        extra = struct.pack("<HH", 1, len(extra)) + extra
    padding = -(header + _LOCAL.size + len(raw) + len(extra) + 4) % ALIGNMENT
    extra += b"FB" + struct.pack("<H", padding) + b"Z" * padding
    flags = _UTF8 | (_DESCRIPTOR if size else 0)
    return _LOCAL.pack(_LOCAL_SIGNATURE, 0, flags, 0, 0, 0, 0, 0, 0, len(raw), len(extra)) + raw + extra


def descriptor(record: Record) -> bytes:
    """Encode what follows a record's data: its CRC-32 and size; nothing follows an empty record."""
    if not record.size:
        return b""
    form = "<IIQQ" if record.size >= _MAX32 or record.header >= _MAX32 else "<IIII"
    return struct.pack(form, _DESCRIPTOR_SIGNATURE, record.crc, record.size, record.size)


def _central(record: Record) -> bytes:
    raw = record.name.encode()
    extra = struct.pack("<QQ", record.size, record.size) if record.size >= _MAX32 else b""
    if record.header >= _MAX32:
        extra += struct.pack("<Q", record.header)
    if extra:
        extra = struct.pack("<HH", 1, len(extra)) + extra
    size, header = min(record.size, _MAX32), min(record.header, _MAX32)
    flags = _UTF8 | (_DESCRIPTOR if record.size else 0)
    fields = (
        _CENTRAL_SIGNATURE,
        0,
        0,
        flags,
        0,
        0,
        0,
        record.crc,
        size,
        size,
        len(raw),
        len(extra),
        0,
        0,
        0,
        0,
        header,
    )
    return _CENTRAL.pack(*fields) + raw + extra


def directory(records: Sequence[Record], start: int) -> bytes:
    """Encode the central directory that begins at ``start`` and the end records, zip64 ones always as torch does."""
    listing = b"".join(map(_central, records))
    count, length = len(records), len(listing)
    end = _END64.pack(0x06064B50, 44, 0x031E, 0x2D, 0, 0, count, count, length, start)
    end += _LOCATOR.pack(0x07064B50, 0, start + length, 1)
    short = min(count, _MAX16)
    return listing + end + _END.pack(0x06054B50, 0, 0, short, short, min(length, _MAX32), min(start, _MAX32), 0)


def combine_crc(first: int, second: int, length: int) -> int:
    """Return the CRC-32 of two blocks joined, from their CRCs and the second block's length.

    Multiplies by x^(8 length) modulo the CRC polynomial, as ``crc32_combine`` of zlib 1.2.12 does.
    """
    return _multiply(_power(length), first) ^ second if first else second


def _multiply(a: int, b: int) -> int:
    """Multiply polynomials over GF(2) modulo the CRC-32 polynomial, bits reflected."""
    bit, product = 1 << 31, 0
    while bit:
        if a & bit:
            product ^= b
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
        bit >>= 1
    return product


@lru_cache(maxsize=256)
def _power(length: int) -> int:
    """Return x^(8 length) modulo the CRC-32 polynomial."""
    result, square = 1 << 31, 1 << 23  # 1 and x^8
    while length:
        if length & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        length >>= 1
    return result
