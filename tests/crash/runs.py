"""The runs that the crash tests kill or fail, and the states they may leave.

After a crash the final path holds nothing, the old output or the new one; a file may for a moment stand without its
companion, but never beside another's. After ``clean`` (or the next run) it is complete.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path

from lorabridge.files import syscalls
from lorabridge.files.fsio import Staging, find_staging

DIGEST = "0123456789abcdef" * 4
OTHER = "fedcba9876543210" * 4


@dataclass(frozen=True)
class Case:
    directory: bool
    old: bool
    renameat2: bool = True
    digest: str = DIGEST

    @property
    def names(self) -> tuple[str, str]:
        return ("model.bin", "config.json") if self.directory else ("adapter", "adapter.json")

    def __str__(self) -> str:
        kind = "directory" if self.directory else "file"
        return f"{kind}-{'overwrite' if self.old else 'new'}{'' if self.renameat2 else '-without-renameat2'}"


CASES = [Case(d, o, r) for d in (False, True) for o in (False, True) for r in (True, False)]


def content(case: Case, version: str) -> dict[str, bytes]:
    return {name: f"{version} {name}".encode() * 40 for name in case.names}


def write(root: Path, case: Case, version: str = "new", *, overwrite: bool | None = None) -> None:
    """One run as the sinks do it: allocate, write in pieces, copy a range, close, commit."""
    overwrite = case.old if overwrite is None else overwrite
    source = root.parent / f"{root.name}.source"
    with Staging(root / "adapter", digest=case.digest, overwrite=overwrite, directory=case.directory) as staging:
        for name, data in content(case, version).items():
            if staging.finished(name):
                continue
            source.write_bytes(b"?" + data)
            file = staging.create(name)
            file.allocate(len(data))
            file.write(0, data[:7])
            file.copy(7, source, 8, len(data) - 7)
            file.close()
        staging.commit()


def found(root: Path, case: Case) -> dict[str, bytes]:
    place = root / "adapter" if case.directory else root
    if not place.is_dir():
        return {}
    return {p.name: p.read_bytes() for p in place.iterdir() if p.is_file()}


def prepare(tmp_path: Path, case: Case, number: int) -> Path:
    root = tmp_path / f"{number}"
    root.mkdir()
    if case.old:
        write(root, case, "old", overwrite=False)
    return root


def check_whole(root: Path, case: Case) -> str:
    """Return which output stands, complete and alone."""
    state = found(root, case)
    for version in ("old", "new"):
        if state == content(case, version):
            return version
    assert state == {}
    return "none"


def check_crashed(root: Path, case: Case) -> None:
    """The state that a reader may see at any moment."""
    state = found(root, case)
    old, new = content(case, "old"), content(case, "new")
    if case.directory:
        # Without renameat2 the old directory is out of sight for one moment; `clean` or the next run puts it back.
        allowed = [old, new] if case.old and case.renameat2 else [old, new, {}] if case.old else [{}, new]
        assert state in allowed
        return
    main, companion = (state.get(name) for name in case.names)
    if case.old:
        assert main in (old["adapter"], new["adapter"])
        assert companion in (None, old["adapter.json"] if main == old["adapter"] else new["adapter.json"])
    else:
        assert (main, companion) in [(None, None), (None, new["adapter.json"]), (new["adapter"], new["adapter.json"])]


def without_renameat2(case: Case, seam) -> None:
    if not case.renameat2:

        def missing(*args):
            raise OSError(errno.ENOSYS, "not here")

        syscalls.Calls.renameat2 = staticmethod(seam.wrap("renameat2", missing))


def count(tmp_path: Path, case: Case, seam) -> int:
    """Return how many calls a whole run makes; ``seam.log`` then names them."""
    root = prepare(tmp_path, case, 0)
    seam.reset()
    write(root, case)
    assert check_whole(root, case) == "new"
    assert not find_staging(root)
    return len(seam)
