"""The system calls that change a disk, and the few compositions of them that the package writes with."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ..errors import InputError, StorageError

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
BLOCK = 1 << 20
PAGE = 4096
"""Bytes per read where the kernel cannot copy by itself."""
CHUNK = 64 << 20
"""Most bytes per call, so that signals and other threads get their turn (Linux stops at 2 GiB - 4 KiB anyway)."""
SMALL = 64 << 10
"""Below this a read and a write cost less than setting up a copy in the kernel."""
NOREPLACE, EXCHANGE = 1, 2
_WRITE = 2
"""SYNC_FILE_RANGE_WRITE: begin writing, wait for nothing."""

UNSUPPORTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY})
NO_KERNEL_COPY = UNSUPPORTED | {errno.EXDEV, errno.EPERM, errno.EBADF, errno.ETXTBSY}


def _renameat2(source: str, target: str, source_dir: int, target_dir: int, flags: int) -> None:
    import ctypes

    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    paths = os.fsencode(source), os.fsencode(target)
    if function(source_dir, ctypes.c_char_p(paths[0]), target_dir, ctypes.c_char_p(paths[1]), ctypes.c_uint(flags)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


class Calls:
    """The table of calls: nothing else in the package changes a disk, so tests fail or die at each entry."""

    open = staticmethod(os.open)
    mkdir = staticmethod(os.mkdir)
    fallocate = staticmethod(os.posix_fallocate)
    ftruncate = staticmethod(os.ftruncate)
    pwrite = staticmethod(os.pwrite)
    copy_file_range = staticmethod(os.copy_file_range)
    fsync = staticmethod(os.fsync)
    rename = staticmethod(os.rename)
    renameat2 = staticmethod(_renameat2)
    link = staticmethod(os.link)
    unlink = staticmethod(os.unlink)
    rmdir = staticmethod(os.rmdir)


calls = Calls()


@contextmanager
def refusals(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn what the operating system refuses into a StorageError that names ``path``.

    ``needed``: bytes the output takes, for the hint when the disk is full.
    """
    try:
        yield
    except OSError as error:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            size = f"{needed:,} bytes are needed in all; " if needed else ""
            hint = f"{size}free some space or write to another file system"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "check the permissions, or write elsewhere"
        elif error.errno == errno.ENAMETOOLONG:
            hint = "choose a shorter name"
        problem = f"the operating system refused: {(error.strerror or str(error)).lower()}"
        raise StorageError(problem, where=str(path), hint=hint) from error


def sync(fd: int) -> None:
    """Flush a file or directory to disk, once: after a failed fsync the kernel forgets what it could not write."""
    try:
        calls.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def allocate(fd: int, size: int) -> None:
    """Reserve ``size`` bytes of disk, or only set the length where the file system cannot reserve."""
    if size == 0:
        return
    try:
        calls.fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        calls.ftruncate(fd, size)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write every byte; a call that writes fewer than asked is continued."""
    while data:
        done = calls.pwrite(fd, data[:CHUNK], offset)
        if done <= 0:
            raise OSError(errno.EIO, "a write made no progress")
        _hurry(fd, offset, done)
        data = data[done:]
        offset += done


def _hurry(fd: int, offset: int, length: int) -> None:
    """Let the kernel begin to move what was written to the disk, so that the last fsync has little to wait for.

    A hint, for large blocks: without it the kernel collects gigabytes first. What goes wrong, fsync reports.
    """
    if length >= BLOCK and (hint := _writeback()) is not None:
        hint(fd, offset, length, _WRITE)


@cache
def _writeback() -> Callable[[int, int, int, int], object] | None:
    import ctypes

    hint = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if hint is not None:
        hint.argtypes = ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint
    return hint


def copy_range(source: int, start: int, target: int, offset: int, length: int, origin: Path) -> None:
    """Copy bytes between files; an InputError when the source ends early.

    In the kernel where both ranges lie alike in their pages: elsewhere it moves page by page, which was measured to
    take longer than reading and writing blocks that stay in the processor's cache.
    """
    end = start + length
    while end - start > SMALL and (start - offset) % PAGE == 0:
        try:
            done = calls.copy_file_range(source, target, min(end - start, CHUNK), start, offset)
        except OSError as error:
            if error.errno not in NO_KERNEL_COPY:
                raise
            break
        if done == 0:  # the end of the file, or a file system whose files the kernel cannot copy: reading tells
            break
        _hurry(target, offset, done)
        start += done
        offset += done
    block = memoryview(bytearray(min(end - start, BLOCK)))
    while start < end:
        done = os.preadv(source, [block[: end - start]], start)
        if done == 0:
            problem = f"the file ends at byte {start:,}, {end - start:,} bytes earlier than its header promises"
            raise InputError(problem, where=str(origin), hint="do not change input files during a run")
        write_all(target, block[:done], offset)
        start += done
        offset += done


def lookup(directory: int, name: str) -> os.stat_result | None:
    """Return the status of a directory's entry itself (a link is not followed), or None."""
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def rename_new(source_dir: int, source: str, target_dir: int, target: str) -> None:
    """Rename without replacing anything; FileExistsError when the new name is taken."""
    try:
        return calls.renameat2(source, target, source_dir, target_dir, NOREPLACE)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    try:
        calls.link(source, target, src_dir_fd=source_dir, dst_dir_fd=target_dir, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # a directory, or a file system without hard links: look, then rename
        if lookup(target_dir, target) is not None:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target) from None
        calls.rename(source, target, src_dir_fd=source_dir, dst_dir_fd=target_dir)
        return None
    calls.unlink(source, dir_fd=source_dir)


def exchange(source_dir: int, source: str, target_dir: int, target: str) -> bool:
    """Swap two names in one step; False where the kernel or the file system cannot."""
    try:
        calls.renameat2(source, target, source_dir, target_dir, EXCHANGE)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return False
    return True


def make_folder(directory: int, name: str | None) -> None:
    """Make the folder that a name of the form ``folder/file`` lies in, if it has one and that is not there yet."""
    folder, slash, _ = (name or "").rpartition("/")
    if slash and lookup(directory, folder) is None:
        with suppress(FileExistsError):
            calls.mkdir(folder, 0o777, dir_fd=directory)


def remove_tree(directory: int, name: str) -> None:
    """Remove an entry with all below it, following no link; a missing entry is no error."""
    status = lookup(directory, name)
    if status is None:
        return
    if not stat.S_ISDIR(status.st_mode):
        calls.unlink(name, dir_fd=directory)
        return
    inner = os.open(name, DIRECTORY | os.O_NOFOLLOW, dir_fd=directory)
    try:
        for entry in sorted(os.listdir(inner)):
            remove_tree(inner, entry)
    finally:
        os.close(inner)
    calls.rmdir(name, dir_fd=directory)
