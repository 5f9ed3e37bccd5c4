"""Find the storages of a torch file from before the zip format (torch.save up to 1.5, or when told so today).

The file is five pickles, one after the other, and the storages' data. The pickles hold: a magic number, the protocol
version (1001), the byte order, the saved value, the storages' keys in the order of their data. Before each storage's
data stands the number of its elements, eight bytes (torch 2.13, torch/serialization.py, _legacy_save).
"""

from __future__ import annotations

import io
from collections.abc import Container, Mapping

from ..dtypes import BY_TORCH
from ..errors import InputError
from .storedzip import Record
from .torchpickle import MAX_PICKLE, Unpickler
from .torchtable import RESAVE
from .torchvalues import PickleError, Storage, Table
from .untrusted import Region, pread_into, shown, size_of

MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e"
PROTOCOL = 1001
_FIRST = 1 << 20


def is_legacy(file: io.FileIO | Region) -> bool:
    """Say whether a file begins as ``torch.save`` did before the zip format."""
    head = bytearray(len(MAGIC))
    return pread_into(file, memoryview(head), 0) == len(MAGIC) and bytes(head) == MAGIC


def read_legacy(
    file: io.FileIO | Region, where: str, objects: Container[str] = ()
) -> tuple[dict[str, Record], Mapping[str, Storage], bool, object]:
    """Return where each storage's data lies, as if it were a record of a zip archive, and what was pickled.

    Also returned are the storages, and whether their data is big-endian. Reads the pickles, at most ``MAX_PICKLE``
    bytes in all, and eight bytes of each storage. Raises InputError for what is unsafe, damaged or of another protocol.
    """
    size, take = size_of(file), _FIRST
    while True:
        head = bytearray(min(size, take))
        del head[pread_into(file, memoryview(head), 0) :]
        try:
            start, storages, order, root, keys = _pickles(bytes(head), objects)
            break
        except PickleError as error:
            if take >= min(size, MAX_PICKLE):
                raise InputError(f"the pickle is not accepted: {error}", where=where, hint=RESAVE) from None
            take *= 2  # perhaps only cut
    return _records(file, start, storages, order, keys, where), storages, order == "big", root


def _pickles(
    head: bytes, objects: Container[str]
) -> tuple[int, Mapping[str, Storage], str, object, list[str]]:  # fmt: skip
    at = len(MAGIC)
    protocol, at = _one(head, at)
    if protocol != PROTOCOL:
        raise PickleError(f"the protocol is {protocol!r}, not {PROTOCOL}")
    system, at = _one(head, at)
    little = dict(system.items).get("little_endian") if isinstance(system, Table) else None
    if not isinstance(little, bool):
        raise PickleError("it does not say the byte order")
    unpickler = Unpickler(head[at:], objects)
    root = unpickler.load(whole=False)
    keys, end = _one(head, at + unpickler.at)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise PickleError("it does not list its storages")
    if sorted(keys) != sorted(unpickler.storages):
        raise PickleError("the storages that it lists are not those that it uses")
    return end, unpickler.storages, "little" if little else "big", root, keys


def _one(head: bytes, at: int) -> tuple[object, int]:
    unpickler = Unpickler(head[at:])
    return unpickler.load(whole=False), at + unpickler.at


def _records(
    file: io.FileIO | Region, at: int, storages: Mapping[str, Storage], order: str, keys: list[str], where: str
) -> dict[str, Record]:
    found, size = {}, size_of(file)
    for key in keys:
        storage, count = storages[key], bytearray(8)
        nbytes = storage.numel * BY_TORCH[storage.dtype].itemsize if storage.dtype in BY_TORCH else -1
        if nbytes < 0:
            raise InputError(f"a storage has the type {storage.dtype}", where=f"{where}: {shown(key)}", hint=RESAVE)
        got = pread_into(file, memoryview(count), at)
        stated = int.from_bytes(count, "big" if order == "big" else "little")
        if got != 8 or stated != storage.numel or at + 8 + nbytes > size:
            raise InputError(
                f"the data of a storage of {storage.numel} elements is not where it should be",
                where=f"{where}: storage {shown(key)}", hint="download or copy the file again",
            )  # fmt: skip
        found[f"data/{key}"] = Record(f"data/{key}", at, at + 8, nbytes, 0)
        at += 8 + nbytes
    if at != size:
        raise InputError(f"{size - at} bytes follow the last storage", where=where, hint=RESAVE)
    return found
