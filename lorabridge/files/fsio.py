"""Files that are written beside their target and published all at once.

The order is fsync(file), fsync(directory), rename, fsync(parent); it follows restic's ``local.Save``, with PostgreSQL's
rule that a failed fsync is never tried again. Every call that changes a disk is in ``lorabridge.files.syscalls``.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from pickle import PickleBuffer
from types import TracebackType
from typing import TYPE_CHECKING, cast

from ..errors import OutputError, StorageError
from . import placeholders
from .inputs import Inputs
from .staging import ASIDE, Area, Header, StagingArea, find_staging, remove_staging, staging_path, try_lock
from .syscalls import (
    DIRECTORY,
    allocate,
    calls,
    exchange,
    lookup,
    make_folder,
    refusals,
    remove_tree,
    rename_new,
    sync,
    write_all,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from ..tensors import Bits

__all__ = ["OutFile", "Staging", "StagingArea", "find_staging", "remove_staging", "require_space"]

_EXISTS = "the output exists already"


class OutFile:
    """One file being written in a staging area; every method but ``close`` may be called from any thread.

    ``path``: where it is staged. All methods raise StorageError when the operating system refuses.
    """

    def __init__(self, path: Path, fd: int, inputs: Inputs, done: Callable[[os.stat_result], None]) -> None:
        self.path = path
        self._fd = fd
        self._inputs = inputs
        self._done = done
        self._size = 0

    @property
    def closed(self) -> bool:
        """Whether the file is no longer open for writing."""
        return self._fd < 0

    def allocate(self, size: int) -> None:
        """Reserve ``size`` bytes and make the file that long."""
        self._size = size
        with refusals(self.path, size):
            allocate(self._fd, size)

    def write(self, offset: int, data: Buffer | Bits) -> None:
        """Write the bytes of a C-contiguous buffer at ``offset``."""
        view = memoryview(cast("Buffer", data))
        if not view.c_contiguous:
            raise ValueError("the buffer is not C-contiguous")
        with refusals(self.path, self._size):
            write_all(self._fd, PickleBuffer(view).raw(), offset)

    def copy(self, offset: int, source: Path, start: int, length: int) -> None:
        """Copy bytes [start, start + length) of another file to ``offset``; an InputError when it is shorter."""
        with refusals(self.path, self._size):
            self._inputs.copy(source, start, self._fd, offset, length)

    def read(self, offset: int, length: int) -> bytes:
        """Read back what was written; fewer bytes at the end of the file."""
        parts = []
        with refusals(self.path):
            while length and (data := os.pread(self._fd, length, offset)):
                parts.append(data)
                offset, length = offset + len(data), length - len(data)
        return b"".join(parts)

    def close(self) -> None:
        """Flush the file to disk and note it as finished; closing twice is harmless."""
        if self.closed:
            return
        with refusals(self.path, self._size):
            try:
                sync(self._fd)
                status = os.fstat(self._fd)
            finally:
                self.discard()
            self._done(status)

    def discard(self) -> None:
        """Close without flushing: the file will not be published."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Staging:
    """Collect the files of one output and publish them together; leaving the block without ``commit`` removes them.

    ``target``: a file, published with its companions, or a directory. ``digest``: hexadecimal, over everything that
    decides the output's bytes, the identity (size, mtime) of the source files included: a killed run is resumed when
    it is equal. ``overwrite``: an existing output is replaced in one step; ``folders``: pattern of the directories
    inside that go with it, where these hold files only. Raises OutputError, before anything is written, when the target
    exists, is a link, has no parent directory or is being written by another run.
    """

    def __init__(self, target: Path, *, digest: str, overwrite: bool, directory: bool, folders: str = "") -> None:
        if len(digest) < 12 or digest.strip("0123456789abcdef"):
            raise ValueError(f"{digest!r} is not a hexadecimal digest of 12 digits or more")
        self.target = Path(target)
        self.path = staging_path(self.target, digest)
        self._header = Header(self.target.name, digest, directory)
        self._overwrite = overwrite
        self._replaced = re.compile(folders)
        self._area: Area | None = None
        self._out = -1
        self._inputs = Inputs()
        self._files: dict[str, OutFile | None] = {}
        self._dropped: set[str] = set()
        self._published = False
        if self.target.name in ("", ".."):
            raise OutputError("the output has no name of its own", where=str(target), hint="name a file or directory")
        if not self.target.parent.is_dir():
            raise OutputError(
                "the output's directory does not exist", where=str(self.target.parent), hint="create it first"
            )
        if not self.path.is_dir():
            self._refuse(self.target.name)

    def __enter__(self) -> Staging:
        with refusals(self.path):
            self._area = Area(self.path)
            try:
                self._area.begin(self._header)
                self._refuse(self.target.name)
                self._out = os.open(self._area.out, DIRECTORY | os.O_NOFOLLOW, dir_fd=self._area.dir)
            except BaseException:
                self.abort()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abort()

    def _refuse(self, name: str) -> bool:
        """Say whether a name beside the target is taken; an OutputError when it must not be replaced."""
        path = self.target.parent / name
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            return False
        directory = self._header.directory
        if stat.S_ISLNK(mode):
            raise OutputError("the output is a symbolic link", where=str(path), hint="name the file it points to")
        if not (stat.S_ISDIR(mode) if directory else stat.S_ISREG(mode)):
            kind = "directory" if directory else "regular file"
            raise OutputError(f"the output exists and is not a {kind}", where=str(path), hint="choose another name")
        if not self._overwrite:
            raise OutputError(_EXISTS, where=str(path), hint="choose another name or pass --overwrite")
        if directory and any(not self._replaced.fullmatch(one.name) or _folders_in(one) for one in _folders_in(path)):
            raise OutputError(
                "the directory to be replaced holds other directories",
                where=str(path),
                hint="remove it yourself or choose another name",
            )
        return True

    def _opened(self) -> Area:
        if self._area is None:
            raise ValueError("the staging area is not open")
        return self._area

    def finished(self, name: str) -> bool:
        """Say whether a killed run of the same digest left this file complete; it is then published as it is."""
        area = self._opened()
        record = area.records.get(name)
        if name not in self._files and record is not None and record.matches(lookup(self._out, name)):
            self._files[name] = None
        return name in self._files and self._files[name] is None

    def create(self, name: str) -> OutFile:
        """Start a file: the target's own name or a companion's beside it, or any name inside a directory.

        Inside a directory ``folder/name`` is one too. Raises OutputError when a companion exists and may not be
        replaced; ValueError when ``name`` is no plain name or was created before.
        """
        area = self._opened()
        parts = name.split("/")
        plain = all(part not in ("", ".", "..") for part in parts) and len(parts) <= 1 + self._header.directory
        if not plain or "\0" in name or self._files.get(name) is not None:
            raise ValueError(f"{name!r} is not a new plain file name")
        if not self._header.directory:
            self._refuse(name)
        path = self.path / area.out / name
        with refusals(path):
            make_folder(self._out, name)
            if lookup(self._out, name) is not None:
                calls.unlink(name, dir_fd=self._out)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            done = partial(self._finished, area, name)
            file = OutFile(path, calls.open(name, flags, 0o666, dir_fd=self._out), self._inputs, done)
        self._files[name] = file
        return file

    def _finished(self, area: Area, name: str, status: os.stat_result) -> None:
        """Note that a file is closed and on disk."""
        area.record(name, status)

    def drop(self, name: str) -> None:
        """Take an old companion away when the new output, which has none of that name, is published."""
        if name in self._files or name == self.target.name:
            raise ValueError(f"{name!r} is part of the output")
        self._dropped.add(name)

    def commit(self) -> None:
        """Publish every file, durably; afterwards the staging area is gone.

        Raises OutputError when another run published first, ValueError when a file is still open or the target's own
        file is missing. After an error from the last fsync the new output is in place but may not survive a power cut.
        """
        area = self._opened()
        still = [name for name, file in self._files.items() if file is not None and not file.closed]
        if still or (not self._header.directory and self.target.name not in self._files):
            raise ValueError(f"not closed: {still[:3]}" if still else f"{self.target.name!r} was not created")
        self._inputs.close()
        with refusals(self.target):
            self._verify(area)
            for folder in self._folders():
                with area.opened(f"{area.out}/{folder}") as inner:
                    sync(self._out if inner is None else inner)
            sync(self._out)
            sync(area.dir)
            _wait_for_turn(area.parent)
            try:
                self._publish(area)
            except FileExistsError:
                hint = "choose another name or pass --overwrite"
                raise OutputError(_EXISTS, where=str(self.target), hint=hint) from None
            self._published = True
            sync(area.parent)
        with suppress(OSError):
            fcntl.flock(area.parent, fcntl.LOCK_UN)
        self._area = None
        os.close(self._out)
        with suppress(OSError, StorageError):  # the output is whole; `lorabridge clean` takes what could not be deleted
            area.remove(settled=True)

    def _verify(self, area: Area) -> None:
        """Make sure that exactly this run's files are staged (locks may lie) and delete strays of an earlier one."""
        staged = lookup(area.dir, area.out)
        ours = staged is not None and staged.st_ino == os.fstat(self._out).st_ino
        for name in self._files:
            status = lookup(self._out, name)
            record = area.records.get(name)
            ours = ours and status is not None and record is not None and record.inode == status.st_ino
            ours = ours and status is not None and record is not None and record.size == status.st_size
        if not ours:
            raise OutputError("another run has taken over the staging directory", where=str(self.path))
        for name in sorted(os.listdir(self._out)):
            if name not in self._files and name not in self._folders():
                remove_tree(self._out, name)
        for folder in self._folders():
            for name in sorted(os.listdir(self.path / area.out / folder)):
                if f"{folder}/{name}" not in self._files:
                    remove_tree(self._out, f"{folder}/{name}")

    def _folders(self) -> list[str]:
        return sorted({name.partition("/")[0] for name in self._files if "/" in name})

    def _publish(self, area: Area) -> None:
        main = self.target.name
        exists = self._refuse(main)
        if self._header.directory:
            if not exists:
                rename_new(area.dir, area.out, area.parent, main)
            elif not exchange(area.dir, area.out, area.parent, main):
                _set_aside(area, [main])
                rename_new(area.dir, area.out, area.parent, main)
            return
        companions = sorted(set(self._files) - {main})
        old = [name for name in sorted({*companions, *self._dropped}) if self._refuse(name)]
        if old:
            status = lookup(area.parent, main)
            if status is not None:
                area.record(main, status, replaced=True)
            _set_aside(area, old)
        # No moment shows a file beside another's companion: a new file follows its companions, and an old file
        # loses its own before it is replaced.
        for name in [main, *companions] if exists else [*companions, main]:
            if name == main and exists:
                calls.rename(name, name, src_dir_fd=self._out, dst_dir_fd=area.parent)
            else:
                rename_new(self._out, name, area.parent, name)
        for name in self._files:
            status = lookup(area.parent, name)
            if status is None or status.st_ino != area.records[name].inode:
                raise OutputError("another run has written over this output", where=str(self.target.parent / name))

    def abort(self) -> None:
        """Close and delete everything that was staged; harmless after ``commit`` and when called twice."""
        for file in self._files.values():
            if file is not None:
                with suppress(OSError):
                    file.discard()
        self._inputs.close()
        area, self._area = self._area, None
        if area is None:
            return
        if self._out >= 0:
            os.close(self._out)
        with suppress(OSError):  # never hide the error that led here; `lorabridge clean` takes what is left
            if self._published:
                area.close()
            else:
                area.remove()


def _folders_in(directory: Path | os.DirEntry[str]) -> list[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        return [entry for entry in entries if entry.is_dir(follow_symlinks=False)]


def _set_aside(area: Area, names: list[str]) -> None:
    with suppress(FileExistsError):
        calls.mkdir(ASIDE, 0o700, dir_fd=area.dir)
    aside = os.open(ASIDE, DIRECTORY | os.O_NOFOLLOW, dir_fd=area.dir)
    try:
        for name in names:
            calls.rename(name, name, src_dir_fd=area.parent, dst_dir_fd=aside)
    finally:
        os.close(aside)


def _wait_for_turn(parent: int) -> None:
    """Let runs that publish into one directory do so one after another, as long as none takes ten seconds."""
    for _ in range(200):
        if try_lock(parent):
            return
        time.sleep(0.05)


def require_space(path: Path, nbytes: int) -> None:
    """Raise a StorageError when the file system that holds ``path`` (or will) has fewer than ``nbytes`` free.

    Of what goes to a store only the files that are being written take space here; how many these are is not known.
    """
    if placeholders.destination(path / "any") is not None:
        return
    place = path
    while not place.is_dir() and place != place.parent:
        place = place.parent
    with refusals(place):
        status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    if status.f_blocks and free < nbytes:
        raise StorageError(
            f"the output takes {nbytes:,} bytes and {free:,} are free",
            where=str(place),
            hint="free some space or write to another file system",
        )
