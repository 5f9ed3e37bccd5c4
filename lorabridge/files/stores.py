"""Objects of stores (s3://, obs://, hf:// ...), read by ranges and written whole through fsspec.

Options of a store (endpoint, keys) are fsspec's own: the environment variables and files that
https://filesystem-spec.readthedocs.io/en/latest/features.html#configuration describes. ``obs://`` is Huawei Cloud's
store through its S3 interface; its options are those of s3fs under fsspec's name ``obs``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, LorabridgeError, StorageError, UsageError, first_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

BLOCK = 1 << 20
"""Bytes that a small read fetches and keeps, so that headers and lists of records cost few requests."""
KEPT = 64
"""Blocks that are kept, of all files together."""
PART = 16 << 20
"""Least bytes of a part where a store takes large objects in parts (S3: at most 10,000 of them)."""
PARTS = 9_000
TOGETHER = 4
"""Parts of one object that are sent at the same time; each takes memory."""

_PACKAGES = {"s3": "s3fs", "obs": "s3fs", "hf": "huggingface_hub"}
_SETTINGS = {"hf": "HF_ENDPOINT, HF_TOKEN"}
_VERSIONS = ("ETag", "blob_id", "sha", "md5", "etag", "LastModified", "last_modified", "created", "mtime")
"""What stores call that which changes when an object is written again; the first that a store has counts."""


@dataclass(frozen=True, slots=True)
class Store:
    """One kind of store with its options; ``files`` is fsspec's view of it."""

    protocol: str
    files: AbstractFileSystem = field(compare=False, repr=False)

    def url(self, key: str) -> str:
        """Return an object's name as a user writes it."""
        return f"{self.protocol}://{key}"

    @contextmanager
    def asked(self, key: str) -> Iterator[None]:
        """Turn what a store answers instead of bytes into an InputError (nothing is there) or a StorageError."""
        try:
            yield
        except LorabridgeError:
            raise
        except FileNotFoundError as error:
            hint = "check the name, and the store's endpoint"
            raise InputError("no such object", where=self.url(key), hint=hint) from error
        except Exception as error:  # every store has classes of its own, most of them no OSError
            name = f"FSSPEC_{self.protocol.upper()}"
            told = _SETTINGS.get(self.protocol, f"{name}_ENDPOINT_URL, {name}_KEY ...")
            hint = f"check the network, the keys and the endpoint ({told})"
            raise StorageError(f"the store refused: {_named(error)}", where=self.url(key), hint=hint) from error

    def entries(self, key: str) -> dict[str, Remote]:
        """Return the objects of this name, below it and beside it, by key; as they are now."""
        self.files.invalidate_cache()
        parent = key.rpartition("/")[0]
        with self.asked(key):
            infos: dict[str, Mapping[str, Any]] = dict(self._children(parent)) if parent else {}
            infos.update(self.files.find(key, detail=True))
        files = [(n.lstrip("/"), i) for n, i in infos.items() if i.get("type") == "file" and not n.endswith("/")]
        return {name: self._remote(name, info) for name, info in files}

    def _children(self, parent: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
        try:
            for info in self.files.ls(parent, detail=True):
                yield info["name"], info
        except (FileNotFoundError, NotImplementedError, PermissionError, ValueError):
            return  # nothing is there yet, or only what is named may be read: a hub lists no one's repositories

    def object(self, key: str) -> Remote | None:
        """Return what is under a name now, None where nothing is."""
        self.files.invalidate_cache()
        try:
            with self.asked(key):
                return self._remote(key, self.files.info(key))
        except InputError:
            return None

    def _remote(self, key: str, info: Mapping[str, Any]) -> Remote:
        size = info.get("size")
        if not isinstance(size, int):
            hint = "download it and name the file"
            raise InputError("the store does not say how large the object is", where=self.url(key), hint=hint)
        return Remote(self, key, size, next((str(info[name]) for name in _VERSIONS if info.get(name)), ""))

    def put(self, path: Path, key: str) -> Remote:
        """Send a file and return what the store then has; a StorageError where that is not as long as the file."""
        size = path.stat().st_size
        options: dict[str, Any] = {}
        if self.protocol in ("s3", "obs"):
            options = {"chunksize": max(PART, -(-size // PARTS)), "max_concurrency": TOGETHER}
        with self.asked(key):
            self.files.put_file(str(path), key, **options)
        return self._arrived(key, size)

    def put_bytes(self, data: bytes, key: str) -> Remote:
        """Send bytes as an object; else as :meth:`put`."""
        with self.asked(key):
            self.files.pipe_file(key, data)
        return self._arrived(key, len(data))

    def _arrived(self, key: str, size: int) -> Remote:
        remote = self.object(key)
        if remote is None or remote.size != size:
            held = "nothing" if remote is None else f"{remote.size:,} bytes"
            raise StorageError(f"{size:,} bytes were sent and the store has {held}", where=self.url(key))
        return remote

    def remove(self, key: str) -> None:
        """Delete an object; that it is gone already is no error."""
        self.files.invalidate_cache()
        with self.asked(key):
            if self.files.exists(key):
                self.files.rm_file(key)


@dataclass(frozen=True, slots=True)
class Remote:
    """One object: where it lies, its size in bytes, and what changes when it is written again."""

    store: Store
    key: str
    size: int
    version: str

    @property
    def url(self) -> str:
        """The object's name as a user writes it."""
        return self.store.url(self.key)

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill a byte buffer from an offset and return how many bytes were there; safe from any thread."""
        wanted = max(0, min(len(view), self.size - offset))
        if wanted > BLOCK:
            view[:wanted] = self.fetch(offset, wanted)
            return wanted
        done = 0
        while done < wanted:
            number, skip = divmod(offset + done, BLOCK)
            part = _block(self, number)[skip : skip + wanted - done]
            view[done : done + len(part)] = part
            done += len(part)
        return done

    def fetch(self, offset: int, length: int) -> bytes:
        """Ask the store for a range; an InputError where it sends another number of bytes."""
        with self.store.asked(self.key):
            data: bytes = self.store.files.cat_file(self.key, start=offset, end=offset + length)
        if len(data) != length:
            problem = f"the store sent {len(data):,} bytes where {length:,} were asked for, from byte {offset:,}"
            raise InputError(problem, where=self.url, hint="do not change input files during a run")
        return data

    @property
    def identity(self) -> tuple[str, str, int, str]:
        """What tells the object from another or changed one: protocol, key, size, version."""
        return self.store.protocol, self.key, self.size, self.version


@lru_cache(maxsize=KEPT)
def _block(remote: Remote, number: int) -> bytes:
    start = number * BLOCK
    return remote.fetch(start, min(BLOCK, remote.size - start))


@cache
def store(protocol: str) -> Store:
    """Return the store behind a protocol; UsageError where nobody knows it or its package is not installed."""
    if protocol in ("http", "https", "ftp"):
        hint = "download the files and name them; s3://, obs:// and hf:// are read where they lie"
        raise UsageError("web addresses are not read: they do not say what lies beside a file", hint=hint)
    for needed in dict.fromkeys(("fsspec", _PACKAGES.get(protocol, "fsspec"))):
        if needed not in sys.modules and find_spec(needed) is None:
            hint = "pip install 'lorabridge[remote]'"
            raise UsageError(f"{needed} not installed", where=f"{protocol}://", hint=hint)
    import fsspec

    try:
        if protocol == "obs":
            return Store(protocol, fsspec.filesystem("s3", **fsspec.config.conf.get("obs", {})))
        return Store(protocol, fsspec.filesystem(protocol))
    except (ValueError, ImportError) as error:
        raise UsageError(
            f"no store is known by that name: {_named(error)}", where=f"{protocol}://",
            hint="s3://, obs:// and hf:// come with 'lorabridge[remote]', others with the package that fsspec names",
        ) from error  # fmt: skip


def _named(error: BaseException) -> str:
    text = first_line(error)[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
