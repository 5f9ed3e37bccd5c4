"""Paths for what lies in stores: placeholders under a private temporary directory, by the names the store gives.

Whoever looks at paths (what lies beside a file, what a directory holds) stays as it is, and no byte is read before it
is needed. Whoever opens a file asks :func:`readable` first and reads ranges of the object itself; a placeholder that
is read by mistake is one line of text, which is no checkpoint. Messages call placeholders by the store's names.

Stores have no rename, so an output there cannot appear all at once. An object ``lorabridge-commit.json`` in the
output's directory (``<file>.lorabridge-commit.json`` beside a file) decides: it says ``writing`` before the first
object is sent and ``committed`` after the last, and what is not committed is not read.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from .. import errors
from . import stores
from .staging import try_lock
from .stores import Remote, Store

MARKER = "lorabridge-commit.json"
SCHEMA = "lorabridge/commit/1"
WORKERS = 8
"""Threads that read a store at the same time where nothing says."""
MOST = 100_000
"""Objects that are listed below one name."""
_URL = re.compile(r"(?P<protocol>[a-z][a-z0-9+.-]+):/{1,2}(?P<key>[^/].*)", re.DOTALL)
_LOCAL = ("file", "local")
_PREFIX, _LOCK = "lorabridge-remote-", "lock"


class _Placed:
    """The placeholders of this process and what they stand for."""

    def __init__(self) -> None:
        self.objects: dict[str, Remote] = {}
        self.bases: dict[str, str] = {}
        self.lock = threading.RLock()
        self._root = ""

    def path(self, store: Store, key: str) -> Path:
        """Return where an object's placeholder lies, whether or not it is there."""
        if not self._root:
            self._root = _new_root()
            errors.speak_with(spoken)
        parts = key.split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise errors.UsageError("a name in a store has empty or dotted parts", where=store.url(key))
        base = Path(self._root, store.protocol)
        self.bases[f"{base}/"] = store.protocol
        return base.joinpath(*parts)

    def add(self, remote: Remote) -> None:
        path = self.path(remote.store, remote.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(path, remote.url)
        self.objects[str(path)] = remote

    def forget(self, path: Path) -> None:
        """Let go what is at a path and below it."""
        for name in [name for name in self.objects if name == str(path) or name.startswith(f"{path}/")]:
            del self.objects[name]
        if path.is_dir():
            import shutil

            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


_PLACED = _Placed()


def _new_root() -> str:
    """Make the directory of this process, which goes when the process ends, and take away those of killed ones."""
    import shutil
    import tempfile

    root = os.path.realpath(tempfile.mkdtemp(prefix=_PREFIX))
    lock = os.open(f"{root}/{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)  # held until the process ends
    try_lock(lock)
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for left in Path(root).parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError):
            fd = os.open(left, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            if os.fstat(fd).st_uid == os.geteuid() and try_lock(fd):
                shutil.rmtree(left.parent, ignore_errors=True)
            os.close(fd)
    return root


def fill(path: Path, url: str) -> None:
    """Make a file the placeholder of an object; the file itself stays the same one."""
    with path.open("w", encoding="utf-8") as file:
        file.write(f"This file stands for {url}.\n")


def is_remote(location: Path | str) -> bool:
    """Say whether a location names a store; of its two slashes ``pathlib`` leaves one, which is understood too."""
    found = _URL.fullmatch(str(location))
    return found is not None and found["protocol"] not in _LOCAL


def input_path(location: Path | str) -> Path:
    """Return a location as a path; what lies in a store under that name, below and beside it gets placeholders.

    Local paths are returned as they are, ``file://`` as the path it names. That nothing is there is no error here.
    UsageError for a protocol that nobody knows or whose package is not installed, StorageError where the store refuses.
    """
    found = _URL.fullmatch(str(location))
    if found is None:
        return Path(str(location).removeprefix("file://"))
    store, key = stores.store(found["protocol"]), found["key"].rstrip("/")
    with _PLACED.lock:
        path = _PLACED.path(store, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        held = store.entries(key)
        if len(held) > MOST:
            raise errors.InputError(
                f"more than {MOST:,} objects lie there", where=store.url(key), hint="name a smaller part of it"
            )
        for remote in held.values():
            _PLACED.add(remote)
    return path


def output_path(target: Path | str) -> Path | str:
    """Return a target's location as :func:`input_path` does; a slash at the end, which asks for a directory, stays.

    What an upload left there that never ended is not seen: it is written over.
    """
    if not is_remote(target):
        return target
    path = input_path(target)
    for marker, covered in ((path / MARKER, [path]), (_beside(path), _of_file(path))):
        remote = found(marker)
        if remote is not None and _state(remote) != "committed":
            for one in [*covered, marker]:
                _PLACED.forget(one)
    return f"{path}/" if str(target).endswith("/") else path


def _of_file(path: Path) -> list[Path]:
    return [path, *path.parent.glob(f"{path.name}.*")]


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{MARKER}")


def marker_of(target: Path, *, directory: bool) -> Path:
    """Return where the marker of an output lies."""
    return target / MARKER if directory else _beside(target)


def is_marker(path: Path) -> bool:
    """Say whether a file is the marker of an output."""
    return path.name == MARKER or path.name.endswith(f".{MARKER}")


def found(path: Path | str) -> Remote | None:
    """Return the object that a path stands for, None for a file of this machine."""
    return _PLACED.objects.get(str(path)) if _PLACED.objects else None


def any_placed() -> bool:
    """Say whether anything of a store takes part in this process."""
    return bool(_PLACED.bases)


def readable(path: Path | str) -> Remote | None:
    """Return what :func:`found` does; an InputError where the output that the object belongs to was never completed."""
    remote = found(path)
    if remote is not None and not is_marker(Path(path)):
        home = Path(path)
        for marker in (_beside(home), *(parent / MARKER for parent in list(home.parents)[:3])):
            mark = found(marker)
            if mark is not None and _state(mark) != "committed":
                raise errors.InputError(
                    "the upload of this output was never completed", where=[str(path), f"see {marker}"],
                    hint="run the command that wrote it again, with the same target",
                )  # fmt: skip
    return remote


@lru_cache(maxsize=1024)
def _state(marker: Remote) -> str:
    data = marker.fetch(0, min(marker.size, 1 << 20))
    try:
        raw = json.loads(data)
        return str(raw["state"]) if raw["schema"] == SCHEMA else "unknown"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "unknown"


def destination(path: Path) -> tuple[Store, str] | None:
    """Return the store and the key that a path among the placeholders belongs to, None for a path of this machine."""
    for base, protocol in _PLACED.bases.items():
        if str(path).startswith(base):
            return stores.store(protocol), str(path)[len(base) :]
    return None


def looked_at(location: Path | str) -> Path:
    """Return a location as :func:`input_path` does, also where it is already a path among the placeholders."""
    place = destination(Path(location))
    return input_path(location if place is None else place[0].url(place[1]))


def spoken(text: str) -> str:
    """Return a text in which placeholders have the names that users know."""
    for base, protocol in _PLACED.bases.items():
        text = text.replace(base, f"{protocol}://")
    return text


def replaced(target: Path, written: dict[Path, Remote]) -> None:
    """Count objects as written: their placeholders are in place at ``target`` now, and of older ones none is left."""
    with _PLACED.lock:
        for name in [name for name in _PLACED.objects if name.startswith(f"{target}/") and not Path(name).exists()]:
            del _PLACED.objects[name]
        for path, remote in written.items():
            if not path.exists():
                fill(path, remote.url)
            _PLACED.objects[str(path)] = remote
