"""The staging directory of one output: its lock, its journal, and what to do with one that a killed run left.

``.NAME.lorabridge-DIGEST.partial`` lies beside the target and holds ``out-TOKEN/`` (what will be published),
``aside/`` (what a publication replaces, while it runs) and ``journal``: one JSON line for the output, then one for each
file that is complete and on disk. The journal is also the lock. The lock only advises: where a file system's locks lie,
a run that takes over first renames what it found, so that the other one cannot publish it any more.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import OutputError
from .syscalls import DIRECTORY, calls, lookup, make_folder, refusals, remove_tree, rename_new, sync, write_all

OUT, ASIDE, JOURNAL, GONE = "out-", "aside", "journal", "gone-"
LONGEST = 200
"""Bytes of a target's name that its staging directory repeats; longer names are hashed (file systems allow 255)."""
_PATTERN = re.compile(r"\.(.+)\.lorabridge-([0-9a-f]{12})\.partial", re.DOTALL)
_JOURNAL_LIMIT = 256 << 20
_ATTEMPTS, _PROBES = 100, 5


@dataclass(frozen=True, slots=True)
class Header:
    """First line of the journal: which output this is. ``digest`` covers everything that decides its bytes."""

    name: str
    digest: str
    directory: bool


@dataclass(frozen=True, slots=True)
class Record:
    """A file that is complete and on disk, as it looked then."""

    file: str
    size: int
    mtime_ns: int
    inode: int

    def matches(self, status: os.stat_result | None) -> bool:
        """Say whether a directory's entry is still this file."""
        if status is None or not stat.S_ISREG(status.st_mode):
            return False
        return (status.st_size, status.st_mtime_ns, status.st_ino) == (self.size, self.mtime_ns, self.inode)


@dataclass(frozen=True, slots=True)
class StagingArea:
    """A staging directory that was found: its size in bytes, its age in seconds, and whether a run holds it."""

    path: Path
    size: int
    age: float
    held: bool


def staging_path(target: Path, digest: str) -> Path:
    """Return where the output of this name and digest is staged."""
    name = target.name
    if len(os.fsencode(name)) > LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return target.parent / f".{name}.lorabridge-{digest[:12]}.partial"


class Area:
    """A staging directory whose lock this process holds.

    Opening creates it unless ``create`` is false (then FileNotFoundError says that it is gone). An OutputError says
    that another run holds it or that it belongs to another user; other refusals are OSErrors.
    """

    def __init__(self, path: Path, *, create: bool = True) -> None:
        self.path = path
        self.out = OUT + _token()
        self.header: Header | None = None
        self.records: dict[str, Record] = {}
        self.replaced: Record | None = None
        self._append = threading.Lock()
        self.parent = os.open(path.parent, DIRECTORY)
        try:
            self.dir, self._journal = self._lock(create)
        except BaseException:
            os.close(self.parent)
            raise
        self._end = self._load()

    def _lock(self, create: bool) -> tuple[int, int]:
        for attempt in range(_ATTEMPTS):
            made = False
            if create:
                with suppress(FileExistsError):
                    calls.mkdir(self.path.name, 0o700, dir_fd=self.parent)
                    made = True
            fds: list[int] = []
            try:
                fds.append(os.open(self.path.name, DIRECTORY | os.O_NOFOLLOW, dir_fd=self.parent))
                if not made and os.fstat(fds[0]).st_uid != os.geteuid():
                    raise OutputError("the staging directory belongs to another user", where=str(self.path))
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                fds.append(calls.open(JOURNAL, flags, 0o600, dir_fd=fds[0]))
                if not try_lock(fds[1]):
                    if attempt >= _PROBES:
                        break
                    time.sleep(0.02)  # `find_staging` holds a lock for a moment to try it
                    continue
                status = lookup(fds[0], JOURNAL)
                if status is not None and status.st_ino == os.fstat(fds[1]).st_ino:
                    locked, fds = fds, []
                    return locked[0], locked[1]
            except FileNotFoundError:  # the run that held it ended and took it away
                if not create:
                    raise
            finally:
                _close(fds)
        raise OutputError("another run is writing this output", where=str(self.path), hint="wait for it to end")

    def _load(self) -> int:
        """Read the journal up to its last whole line and return where that ends."""
        size = min(os.fstat(self._journal).st_size, _JOURNAL_LIMIT)
        text = os.pread(self._journal, size, 0)
        end = 0
        try:
            for number, line in enumerate(text.split(b"\n")[:-1]):
                entry = json.loads(line)
                if number == 0:
                    self.header = Header(str(entry["name"]), str(entry["digest"]), bool(entry["directory"]))
                else:
                    record = Record(entry["file"], entry["size"], entry["mtime_ns"], entry["inode"])
                    if entry["replaced"]:
                        self.replaced = record
                    else:
                        self.records[record.file] = record
                end += len(line) + 1
        except (ValueError, KeyError, TypeError, RecursionError):  # torn by a crash: what follows is void
            pass
        return end

    def _line(self, entry: Mapping[str, object], *, durable: bool) -> None:
        line = json.dumps(entry).encode() + b"\n"
        with self._append:
            write_all(self._journal, memoryview(line), self._end)
            if durable:
                sync(self._journal)
            self._end += len(line)

    def begin(self, header: Header) -> None:
        """Make the area ready for a run: keep finished files of the same output, clear all else."""
        self.settle()
        if self.header != header:
            self.records, self.replaced, self._end = {}, None, 0
        old = self._outs()
        calls.mkdir(self.out, 0o777, dir_fd=self.dir)
        with self.opened(self.out) as new:
            for name in old:
                taken = OUT + _token()
                self._rename(name, taken)
                with self.opened(taken) as out:
                    for record in self.records.values():
                        if out is not None and new is not None and record.matches(lookup(out, record.file)):
                            make_folder(new, record.file)
                            calls.rename(record.file, record.file, src_dir_fd=out, dst_dir_fd=new)
        self._clear(keep=self.out)
        calls.ftruncate(self._journal, self._end)
        if self.header != header:
            self._line(asdict(header), durable=False)
            self.header = header

    def _outs(self) -> list[str]:
        return sorted(name for name in os.listdir(self.dir) if name.startswith(OUT))

    def _rename(self, old: str, new: str) -> None:
        with suppress(FileNotFoundError):
            calls.rename(old, new, src_dir_fd=self.dir, dst_dir_fd=self.dir)

    def record(self, name: str, status: os.stat_result, *, replaced: bool = False) -> None:
        """Note that a file is complete and on disk, or (``replaced``) which file the publication will replace."""
        record = Record(name, status.st_size, status.st_mtime_ns, status.st_ino)
        self._line({**asdict(record), "replaced": replaced}, durable=True)
        if replaced:
            self.replaced = record
        else:
            self.records[name] = record

    def settle(self) -> None:
        """Complete or undo a publication that was cut short, so that the old or the new output stands whole.

        A file counts as published once it has its own name; until then its companions go back to where they were.
        """
        if self.header is None:
            return
        main = self.records.get(self.header.name)
        published = main is not None and main.matches(lookup(self.parent, main.file))
        for name in () if self.header.directory else self._outs():
            with self.opened(name) as out:
                for record in self.records.values():
                    if out is not None and record is not main:
                        self._settle_companion(record, out, published)
        old = lookup(self.parent, self.header.name)
        if published or not (old is None or self.header.directory or (self.replaced and self.replaced.matches(old))):
            return  # what was set aside belongs to a file that is no more
        with self.opened(ASIDE) as aside:
            if aside is not None:
                for name in sorted(os.listdir(aside)):
                    with suppress(FileExistsError):
                        rename_new(aside, name, self.parent, name)

    def _settle_companion(self, record: Record, out: int, published: bool) -> None:
        staged = record.matches(lookup(out, record.file))
        visible = record.matches(lookup(self.parent, record.file))
        if published and staged and not visible:
            with suppress(FileExistsError):
                rename_new(out, record.file, self.parent, record.file)
        elif visible and staged and not published:  # two links to one file, where renaming is link and unlink
            calls.unlink(record.file, dir_fd=self.parent)
        elif visible and not published:
            calls.rename(record.file, record.file, src_dir_fd=self.parent, dst_dir_fd=out)

    @contextmanager
    def opened(self, name: str) -> Iterator[int | None]:
        """Open a directory of the area for the length of a block; None where there is none."""
        try:
            fd = os.open(name, DIRECTORY | os.O_NOFOLLOW, dir_fd=self.dir)
        except FileNotFoundError:
            yield None
            return
        try:
            yield fd
        finally:
            os.close(fd)

    def _clear(self, keep: str = "") -> None:
        for name in sorted(os.listdir(self.dir)):
            if name not in (JOURNAL, keep):
                gone = GONE + _token()
                self._rename(name, gone)
                remove_tree(self.dir, gone)

    def remove(self, *, settled: bool = False) -> None:
        """Settle, delete the area and let its lock go."""
        try:
            if not settled:
                self.settle()
            self._clear()
            calls.unlink(JOURNAL, dir_fd=self.dir)
            try:
                calls.rmdir(self.path.name, dir_fd=self.parent)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):  # else the next run has taken it over
                    raise
        finally:
            self.close()

    def close(self) -> None:
        """Let the lock go and leave the files."""
        _close([self._journal, self.dir, self.parent])


def _token() -> str:
    return os.urandom(6).hex()


def _close(fds: list[int]) -> None:
    for fd in fds:
        with suppress(OSError):
            os.close(fd)


def try_lock(fd: int) -> bool:
    """Take an exclusive lock without waiting; where the file system has no locks every caller gets it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def find_staging(directory: Path) -> list[StagingArea]:
    """List the staging directories that lie directly in a directory, by name.

    One whose lock cannot be tried (another user's, a read-only file system) counts as held.
    """
    found = []
    with refusals(directory):
        for name in sorted(os.listdir(directory)):
            path = directory / name
            if _PATTERN.fullmatch(name) and not path.is_symlink() and path.is_dir():
                with suppress(FileNotFoundError):
                    found.append(_survey(path))
    return found


def _survey(path: Path) -> StagingArea:
    newest, size = path.lstat().st_mtime, 0
    for folder, _, files in os.walk(path):
        for name in files:
            status = os.lstat(os.path.join(folder, name))
            newest, size = max(newest, status.st_mtime), size + status.st_size
    return StagingArea(path, size, max(0.0, time.time() - newest), _held(path / JOURNAL))


def _held(journal: Path) -> bool:
    try:
        fd = os.open(journal, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        return not try_lock(fd)
    finally:
        os.close(fd)


def remove_staging(path: Path) -> bool:
    """Delete a staging directory that no run holds, after putting back what a killed publication set aside.

    False when it is gone already. Raises OutputError when a run holds it, StorageError when the system refuses.
    """
    if not _PATTERN.fullmatch(path.name):
        raise OutputError("not a staging directory of lorabridge", where=str(path))
    with refusals(path):
        try:
            Area(path, create=False).remove()
        except FileNotFoundError:
            return False
    return True
