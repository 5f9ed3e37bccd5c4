"""Files and objects of stores that others are copied from."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from ..errors import InputError
from . import placeholders
from .stores import Remote
from .syscalls import copy_range, write_all

REMOTE_BLOCK = 8 << 20
"""Bytes of one request where an object of a store is copied."""
_OPEN_INPUTS = 32


class Inputs:
    """Source files kept open between copies: the first few; the others are opened each time."""

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()

    def copy(self, source: Path, start: int, target: int, offset: int, length: int) -> None:
        """Copy bytes [start, start + length) of a file or an object to ``offset`` of the descriptor ``target``.

        An InputError when the source is shorter; OSError when the system refuses to write.
        """
        remote = placeholders.readable(source)
        if remote is not None:
            return _copy_object(remote, start, target, offset, length)
        with self._lock:
            fd = self._fds.get(source)
            kept = fd is not None or len(self._fds) < _OPEN_INPUTS
            if fd is None:
                fd = _open_input(source)
                if kept:
                    self._fds[source] = fd
        try:
            copy_range(fd, start, target, offset, length, source)
        finally:
            if not kept:
                os.close(fd)

    def close(self) -> None:
        """Close every file that is open."""
        while self._fds:
            os.close(self._fds.popitem()[1])


def _copy_object(remote: Remote, start: int, target: int, offset: int, length: int) -> None:
    """Copy a range of an object into a file; an InputError when the object ends early."""
    if start + length > remote.size:
        early = start + length - remote.size
        problem = f"the object ends at byte {remote.size:,}, {early:,} bytes earlier than its header promises"
        raise InputError(problem, where=remote.url, hint="do not change input files during a run")
    for done in range(0, length, REMOTE_BLOCK):
        data = remote.fetch(start + done, min(REMOTE_BLOCK, length - done))
        write_all(target, memoryview(data), offset + done)


def _open_input(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        problem = f"the input cannot be opened: {(error.strerror or str(error)).lower()}"
        raise InputError(problem, where=str(path), hint="do not change input files during a run") from error
