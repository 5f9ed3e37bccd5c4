"""Outputs in stores: staged on this machine file by file, sent when closed, decided by a marker.

See ``lorabridge.files.placeholders`` for what the marker says. Of an output only the files that are open lie on this
machine's disk, in the directory for temporary files (``TMPDIR``).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import LorabridgeError, OutputError
from . import placeholders
from .fsio import Staging
from .staging import Area
from .stores import Remote, Store


def staged(target: Path, *, digest: str, overwrite: bool, directory: bool, folders: str = "") -> Staging:
    """Return what collects and publishes an output's files, see :class:`lorabridge.files.fsio.Staging`."""
    place = placeholders.destination(target)
    if place is None:
        return Staging(target, digest=digest, overwrite=overwrite, directory=directory, folders=folders)
    return Uploading(target, place, digest=digest, overwrite=overwrite, directory=directory, folders=folders)


class Uploading(Staging):
    """Staging whose files go to a store; ``place``: the store and the output's key.

    Two runs that write one output at the same time are not kept apart: stores have no locks.
    """

    def __init__(
        self, target: Path, place: tuple[Store, str], *, digest: str, overwrite: bool, directory: bool, folders: str
    ) -> None:
        self._store, self._key = place
        if self._store.protocol == "hf":
            hint = "write to a directory and send that in one commit: hf upload REPO DIR"
            raise OutputError("every file sent to hf:// would be a commit", where=str(target), hint=hint)
        super().__init__(target, digest=digest, overwrite=overwrite, directory=directory, folders=folders)
        self._digest = digest
        self._directory = directory
        self._marker = placeholders.destination(placeholders.marker_of(target, directory=directory))
        self._old = {path for path in _files(target, directory) if placeholders.found(path) is not None}
        self._sent: dict[str, Remote] = {}
        self._begun: set[str] = set()
        self._under_way: set[str] = set()
        self._marked = False
        self._lock = threading.Lock()

    def _place(self, name: str) -> tuple[Path, str]:
        """Return the path and the key of one of the output's files."""
        if self._directory:
            return self.target / name, f"{self._key}/{name}"
        return self.target.with_name(name), f"{self._key.rpartition('/')[0]}/{name}"

    def _finished(self, area: Area, name: str, status: os.stat_result) -> None:
        with self._lock:
            if not self._marked:
                self._mark("writing")
                self._marked = True
            self._begun.add(name)
            self._under_way.add(name)
        staged, (_, key) = self.path / area.out / name, self._place(name)
        try:
            remote = self._store.put(staged, key)
        except LorabridgeError:
            self._under_way.discard(name)
            raise
        placeholders.fill(staged, remote.url)
        with self._lock:
            self._sent[name] = remote
            self._under_way.discard(name)
        super()._finished(area, name, staged.stat())

    def _mark(self, state: str) -> Remote:
        files: list[Mapping[str, object]] = [
            {"name": name, "size": self._sent[name].size} for name in sorted(self._sent)
        ]
        document = {"schema": placeholders.SCHEMA, "state": state, "run": self._digest[:12], "files": files}
        return self._store.put_bytes(f"{json.dumps(document, indent=1)}\n".encode(), self._marker_key())

    def _marker_key(self) -> str:
        if self._marker is None:
            raise ValueError(f"{self.target} is no place of a store")
        return self._marker[1]

    def commit(self) -> None:
        """Complete the output: objects of an older one that it replaces are deleted, then the marker says so."""
        super().commit()
        written = {path: self._sent[name] for name in self._sent for path, _ in [self._place(name)]}
        for path in sorted(self._old - set(written)):
            old = placeholders.destination(path)
            gone = self._directory or not path.exists()
            if old is not None and gone and not placeholders.is_marker(path):
                self._store.remove(old[1])
        mark = self._mark("committed")
        written[placeholders.marker_of(self.target, directory=self._directory)] = mark
        placeholders.replaced(self.target, written)

    def abort(self) -> None:
        """Take back what was sent, unless it has replaced older objects: then the marker keeps saying ``writing``.

        So it does where sending was interrupted: what is under way may still arrive.
        """
        published = self._published
        super().abort()
        if published or not self._marked or self._old:
            return
        with suppress(LorabridgeError):  # never hide the error that led here
            for name in sorted(self._begun):
                self._store.remove(self._place(name)[1])
            if self._under_way:
                return
            self._store.remove(self._marker_key())
        self._marked = False


def _files(target: Path, directory: bool) -> list[Path]:
    if directory:
        return [path for path in target.rglob("*") if path.is_file()] if target.is_dir() else []
    return [path for path in target.parent.glob(f"{target.name}*") if path.is_file()]
