"""Refuse, interrupt and race runs: the output is always whole, in this order of calls and with these modes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from runs import (
    CASES,
    DIGEST,
    Case,
    check_crashed,
    check_whole,
    content,
    count,
    found,
    prepare,
    without_renameat2,
    write,
)

from lorabridge.actions.clean import clean
from lorabridge.errors import LorabridgeError, StorageError
from lorabridge.files.fsio import Staging, find_staging


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("fault", "lasting"), [(errno.ENOSPC, False), (errno.EIO, True)], ids=["once", "from-then-on"])
def test_a_refusal_at_any_call_leaves_the_old_or_the_new_output(tmp_path, case, fault, lasting, seam):
    without_renameat2(case, seam)
    for number in range(1, count(tmp_path, case, seam) + 1):
        root = prepare(tmp_path, case, number)
        seam.reset()

        def refuse(at, name, args, number=number):
            if at == number or (lasting and at > number):
                raise OSError(fault, os.strerror(fault))

        seam.at = refuse
        error: StorageError | None = None
        try:
            write(root, case)
        except StorageError as caught:
            error = caught
        seam.at = lambda *args: None
        flushed = [what for name, what in seam.log if name == "fsync" and what in case.names]
        assert len(flushed) == len(set(flushed)), "a failed fsync was tried again"
        check_crashed(root, case)
        if error is None:
            assert found(root, case) == content(case, "new")
        else:
            assert os.strerror(fault).lower() in error.problem
            assert error.where
            assert fault != errno.ENOSPC or "free some space" in error.hint
        if not lasting and not find_staging(root):
            check_whole(root, case)
        assert len(find_staging(root)) <= 1
        clean(root, dry_run=False)
        check_whole(root, case)
        write(root, case, overwrite=True)
        assert check_whole(root, case) == "new"
        assert not find_staging(root)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_interrupt_at_any_call_clears_the_staging_area(tmp_path, case, seam):
    without_renameat2(case, seam)
    for number in range(1, count(tmp_path, case, seam) + 1):
        root = prepare(tmp_path, case, number)
        seam.reset()

        def interrupt(at, name, args, number=number):
            if at == number:
                raise KeyboardInterrupt

        seam.at = interrupt
        with pytest.raises(KeyboardInterrupt):
            write(root, case)
        seam.at = lambda *args: None
        check_crashed(root, case)
        clean(root, dry_run=False)
        check_whole(root, case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_data_is_on_disk_before_its_name(tmp_path, case, seam):
    without_renameat2(case, seam)
    root = prepare(tmp_path, case, 1)
    seam.reset()
    write(root, case)
    steps = seam.log
    syncs = {
        "out" if what.startswith("out-") else what: number
        for number, (name, what) in enumerate(steps)
        if name == "fsync"
    }
    renames = [(n, what) for n, (name, what) in enumerate(steps) if name in ("rename", "renameat2", "link")]
    arrows = [n for n, what in renames if "gone-" not in what]
    first, last = arrows[0], arrows[-1]
    staging = next(what for name, what in steps if name == "mkdir")
    for name in case.names:
        written = max(n for n, (call, what) in enumerate(steps) if what == name and call != "fsync" and n < first)
        assert written < syncs[name] < syncs["out"] < syncs[staging] < first
    assert last < syncs[root.name]
    gone = [n for n, what in renames if "gone-" in what]
    assert gone or (case.directory and not case.old)
    assert min(gone, default=len(steps)) > syncs[root.name]  # nothing old is deleted before the new name is on disk


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_modes_follow_the_umask(tmp_path, case, umask):
    before = os.umask(umask)
    try:
        root = prepare(tmp_path, case, 1)
        write(root, case)
    finally:
        os.umask(before)
    place = root / "adapter" if case.directory else root
    for name in case.names:
        assert (place / name).stat().st_mode & 0o777 == 0o666 & ~umask
    if case.directory:
        assert place.stat().st_mode & 0o777 == 0o777 & ~umask


def race(root: Path, cases: list[Case], overwrite: bool) -> list[int]:
    """Start one child per case at the same moment; 0: published, 5: OutputError, 6: StorageError."""
    ready, go = os.pipe()
    children = []
    for number, case in enumerate(cases):
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.close(go)
                os.read(ready, 1)
                (root / f"{number}").mkdir()
                write_into(root, case, f"run{number}", overwrite)
                code = 0
            except LorabridgeError as error:
                code = error.exit_code
            finally:
                os._exit(code)
        children.append(child)
    os.close(ready)
    os.close(go)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def write_into(root: Path, case: Case, version: str, overwrite: bool) -> None:
    with Staging(root / "adapter", digest=case.digest, overwrite=overwrite, directory=case.directory) as staging:
        for name, data in content(case, version).items():
            if not staging.finished(name):
                file = staging.create(name)
                file.write(0, data)
                file.close()
        staging.commit()


@pytest.mark.parametrize("same", [True, False], ids=["same-digest", "other-digests"])
@pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])
def test_of_racing_runs_one_wins_and_the_others_say_so(tmp_path, directory, same):
    for turn in range(10):
        root = tmp_path / f"{turn}"
        root.mkdir()
        cases = [Case(directory, False, digest=DIGEST if same else f"{n}" * 64) for n in range(4)]
        codes = race(root, cases, overwrite=False)
        assert sorted(codes) == [0, 5, 5, 5]
        case = cases[codes.index(0)]
        state = {k: v for k, v in found(root, case).items() if k in case.names}
        assert state == content(case, f"run{codes.index(0)}")
        assert not find_staging(root)


@pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])
def test_racing_overwrites_leave_one_whole_output(tmp_path, directory):
    for turn in range(10):
        root = tmp_path / f"{turn}"
        root.mkdir()
        cases = [Case(directory, True, digest=f"{n}" * 64) for n in range(4)]
        write_into(root, cases[0], "old", False)
        codes = race(root, cases, overwrite=True)
        assert codes == [0, 0, 0, 0]
        state = {k: v for k, v in found(root, cases[0]).items() if k in cases[0].names}
        assert state in [content(cases[0], f"run{n}") for n in range(4)]
        assert not find_staging(root)


@pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])
def test_racing_runs_never_mix_even_where_locks_lie(tmp_path, directory, monkeypatch):
    monkeypatch.setattr("lorabridge.files.staging.try_lock", lambda fd: True)
    monkeypatch.setattr("lorabridge.files.fsio.try_lock", lambda fd: True)
    for turn in range(10):
        root = tmp_path / f"{turn}"
        root.mkdir()
        cases = [Case(directory, False) for _ in range(4)]
        codes = race(root, cases, overwrite=False)
        assert set(codes) <= {0, 5, 6}
        assert codes.count(0) <= 1
        state = {k: v for k, v in found(root, cases[0]).items() if k in cases[0].names}
        assert 0 not in codes or set(state) == set(cases[0].names)
        for name, data in state.items():
            assert data in [content(cases[0], f"run{n}")[name] for n in range(4)]


def test_the_kernel_refuses_for_real(tmp_path):
    child = os.fork()
    if child == 0:
        import resource

        code = 99
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            with Staging(tmp_path / "out", digest=DIGEST, overwrite=False, directory=False) as staging:
                staging.create("out").allocate(1 << 20)
        except StorageError as error:
            code = 6 if "file too large" in error.problem else 98
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 6
    assert os.listdir(tmp_path) == []
