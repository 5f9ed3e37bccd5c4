"""Rules for files from strangers: limits, strict JSON, opening without blocking, names fit to print."""

from __future__ import annotations

import io
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError, StorageError
from ..files import placeholders
from ..files.stores import Remote

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_HEADER = 100_000_000
"""Bytes of a safetensors header (safetensors 0.8, tensor.rs MAX_HEADER_SIZE) and of an index file."""
MAX_TENSORS = 2_000_000
MAX_NAME = 4096
"""UTF-8 bytes of a tensor name."""
MAX_RANK = 32
MAX_METADATA = 16 * 2**20
"""UTF-8 bytes of all metadata keys and values; a conversion manifest may travel there."""

SHOWN_NAME = 200


def shown(name: str) -> str:
    """Return a name fit for a message: escaped where it could steer a terminal, shortened where it is long."""
    text = name if len(name) <= SHOWN_NAME else f"{name[:SHOWN_NAME]}... ({len(name)} characters)"
    return text if text.isprintable() and text and text == text.strip() else ascii(text)


def file_kind(mode: int) -> str:
    """Return the kind of a file that is not regular, from ``st_mode``."""
    kinds = (
        (stat.S_ISDIR, "directory"),
        (stat.S_ISFIFO, "fifo"),
        (stat.S_ISSOCK, "socket"),
        (stat.S_ISCHR, "device"),
        (stat.S_ISBLK, "device"),
    )
    return next((name for test, name in kinds if test(mode)), "special file")


def refused_by_system(error: OSError, path: Path) -> InputError | StorageError:
    """Return the error for a file that could not be opened."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return InputError("no such file or directory", where=shown(str(path)), hint="check the path")
    reason = os.strerror(error.errno) if error.errno else str(error)
    return StorageError(f"the file cannot be read: {reason.lower()}", where=shown(str(path)))


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file for reading, following symbolic links, without ever blocking on a pipe or a device.

    A placeholder is opened as the object of a store that it stands for, a :class:`RemoteFile`. Raises InputError when
    the path is missing or no regular file, StorageError when the system or the store refuses.
    """
    remote = placeholders.readable(path)
    if remote is not None:
        return RemoteFile(path, remote)
    try:
        mode = os.stat(path).st_mode  # before opening: a device may act on being opened
        if stat.S_ISREG(mode):
            file = io.FileIO(path, "rb", opener=_opened)
            mode = os.fstat(file.fileno()).st_mode
            if stat.S_ISREG(mode):
                return file
            file.close()
    except OSError as error:
        raise refused_by_system(error, path) from error
    except ValueError as error:
        raise InputError("the path holds a NUL character", where=shown(str(path)), hint="check the path") from error
    raise InputError(
        f"a checkpoint file is needed, this is a {file_kind(mode)}",
        where=shown(str(path)),
        hint="name a regular file",
    )


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)  # should it have become a pipe or a terminal


class RemoteFile(io.FileIO):
    """An object of a store, opened: read it with :func:`pread_into`, or from one end to the other as a raw file.

    It has no file descriptor: asking for one is an error, since the placeholder's holds other bytes.
    """

    def __init__(self, path: Path, remote: Remote) -> None:
        super().__init__(path, "rb")
        self.remote = remote
        self._at = 0

    def fileno(self) -> int:
        """Raise ``io.UnsupportedOperation``."""
        raise io.UnsupportedOperation(f"{self.remote.url} has no file descriptor")

    def readinto(self, buffer: Buffer, /) -> int:
        """Fill a buffer from where reading stands."""
        count = self.remote.read_into(memoryview(buffer).cast("B"), self._at)
        self._at += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to another offset."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.remote.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        """Return where reading stands."""
        return self._at


@dataclass(frozen=True, slots=True)
class Region:
    """A part of an open file, ``size`` bytes from ``start``, that is read as if it were a file of its own."""

    file: io.FileIO
    start: int
    size: int

    def close(self) -> None:
        """Close the file that it is a part of."""
        self.file.close()


def size_of(file: io.FileIO | Region) -> int:
    """Return the number of bytes of a file or of a region."""
    if isinstance(file, RemoteFile):
        return file.remote.size
    return file.size if isinstance(file, Region) else os.fstat(file.fileno()).st_size


def stamp_of(file: io.FileIO) -> tuple[int, int | str]:
    """Return what changes when an open file does: its size and time; an object that is open is always the same one."""
    if isinstance(file, RemoteFile):
        return file.remote.size, file.remote.version
    info = os.fstat(file.fileno())
    return info.st_size, info.st_mtime_ns


def start_of(file: io.FileIO | Region) -> int:
    """Return where a region begins in its file; a file begins at 0."""
    return file.start if isinstance(file, Region) else 0


def pread_into(file: io.FileIO | Region, view: memoryview, offset: int) -> int:
    """Fill a byte buffer from a file offset and return how many bytes were there.

    Raises StorageError when the system refuses, ValueError when the file is closed.
    """
    done = 0
    if isinstance(file, Region):
        view, offset, file = view[: max(0, file.size - offset)], file.start + offset, file.file
    if isinstance(file, RemoteFile):
        if file.closed:
            raise ValueError("I/O operation on closed file")
        return file.remote.read_into(view, offset)
    while done < len(view):
        try:
            count = os.preadv(file.fileno(), [view[done:]], offset + done)
        except OSError as error:
            raise refused_by_system(error, Path(os.fsdecode(file.name))) from error
        if count == 0:
            break
        done += count
    return done


def read_small(path: Path, limit: int) -> tuple[bytes, int]:
    """Return a regular file's bytes and its size; nothing is read of one that is larger than ``limit``.

    Raises as :func:`open_regular` does.
    """
    with open_regular(path) as file:
        size = size_of(file)
        data = bytearray(size if size <= limit else 0)
        del data[pread_into(file, memoryview(data), 0) :]
    return bytes(data), size


def read_word(path: Path) -> str:
    """Return the one word that a small text file holds (``latest`` and its like); empty where the file is no such one.

    Raises as :func:`open_regular` does.
    """
    return read_small(path, 4096)[0].decode("utf-8", errors="replace").strip()[:256]


def parse_json(data: bytes) -> object:
    """Parse JSON strictly: UTF-8, no duplicate keys, no NaN or infinities, bounded nesting and object count.

    Raises ValueError, whose text is one clause, for everything that is wrong.
    """
    count = 0

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal count
        count += 1
        if count > MAX_TENSORS + 2:
            raise ValueError(f"it holds more than {MAX_TENSORS} objects")
        made = dict(items)
        if len(made) != len(items):
            raise ValueError(f"the key {shown(_repeated(items))} occurs twice")
        return made

    def constant(text: str) -> object:
        raise ValueError(f"it holds the constant {text}")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg.lower()} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _repeated(items: list[tuple[str, object]]) -> str:
    seen: set[str] = set()
    for key, _ in items:
        if key in seen:
            return key
        seen.add(key)
    return ""
