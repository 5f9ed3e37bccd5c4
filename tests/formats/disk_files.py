"""Output files as sinks need them, written straight into a directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


class DiskFile:
    opened = 0
    most = 0

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        DiskFile.opened += 1
        DiskFile.most = max(DiskFile.most, DiskFile.opened)

    def allocate(self, size: int) -> None:
        os.ftruncate(self.fd, size)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        assert os.pwrite(self.fd, data, offset) == memoryview(data).nbytes

    def copy(self, offset: int, source_path: Path, start: int, length: int) -> None:
        with open(source_path, "rb") as file:
            file.seek(start)
            self.write(offset, file.read(length))

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, offset)

    def close(self) -> None:
        os.close(self.fd)
        DiskFile.opened -= 1


def into(directory: Path) -> Callable[[str], DiskFile]:
    return lambda name: DiskFile(directory / name)
