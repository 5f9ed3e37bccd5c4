"""A seam over the table of system calls: log them, fail at one, or die at one."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from lorabridge.files import syscalls

NAMES = [name for name in vars(syscalls.Calls) if not name.startswith("_")]


class Seam:
    """Every call of ``syscalls.Calls``, numbered from 1; ``at`` is called before the call runs."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.at: Callable[[int, str, tuple], None] = lambda number, name, args: None

    def __len__(self) -> int:
        return len(self.log)

    def wrap(self, name: str, call: Callable) -> Callable:
        def seam(*args, **options):
            self.log.append((name, describe(name, args)))
            self.at(len(self.log), name, args)
            return call(*args, **options)

        return seam

    def reset(self) -> None:
        self.__init__()


def describe(name: str, args: tuple) -> str:
    if name in ("fallocate", "ftruncate", "pwrite", "fsync"):
        return os.path.basename(os.readlink(f"/proc/self/fd/{args[0]}"))
    if name == "copy_file_range":
        return os.path.basename(os.readlink(f"/proc/self/fd/{args[1]}"))
    if name in ("rename", "renameat2", "link"):
        return f"{args[0]} -> {args[1]}"
    return str(args[0])


@pytest.fixture
def seam(monkeypatch) -> Seam:
    seam = Seam()
    for name in NAMES:
        # A process that dies loses nothing from the page cache, so that here fsync need only be counted.
        call = os.fstat if name == "fsync" else getattr(syscalls.Calls, name)
        monkeypatch.setattr(syscalls.Calls, name, staticmethod(seam.wrap(name, call)))
    return seam
