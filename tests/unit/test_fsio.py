"""Writing one file, the staging area around it, resuming, and clearing what killed runs left."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from lorabridge.actions.clean import clean
from lorabridge.errors import InputError, OutputError, StorageError
from lorabridge.files import syscalls
from lorabridge.files.fsio import OutFile, Staging, find_staging, remove_staging, require_space

DIGEST = "0123456789abcdef" * 4
OTHER = "f" * 64


def staging(target: Path, *, digest: str = DIGEST, overwrite: bool = False, directory: bool = False) -> Staging:
    return Staging(target, digest=digest, overwrite=overwrite, directory=directory)


def put(area: Staging, name: str, data: bytes) -> None:
    file = area.create(name)
    file.allocate(len(data))
    file.write(0, data)
    file.close()


def leave(target: Path, files: dict[str, bytes], *, directory: bool = True, digest: str = DIGEST) -> Path:
    """Write files in a child that is then killed before it commits; return the staging directory."""
    child = os.fork()
    if child == 0:
        with staging(target, digest=digest, overwrite=True, directory=directory) as area:
            for name, data in files.items():
                put(area, name, data)
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    return staging(target, digest=digest, overwrite=True, directory=directory).path


@pytest.fixture
def file(tmp_path):
    with staging(tmp_path / "out") as area:
        yield area.create("out")


# one file


@pytest.mark.parametrize(
    "data",
    [
        b"bytes",
        bytearray(b"bytearray"),
        memoryview(b"xabcx")[1:4],
        np.arange(12, dtype="<u2").reshape(3, 4),
        np.array(7, "<u4"),
        np.zeros((0, 5), "<u4"),
        np.frombuffer(b"0123456789abcdef" * 2, "V16"),
    ],
    ids=["bytes", "bytearray", "memoryview", "matrix", "0-d", "empty", "void"],
)
def test_any_contiguous_buffer_is_written(file: OutFile, data):
    raw = data.tobytes() if hasattr(data, "tobytes") else bytes(data)
    file.write(3, data)
    assert file.read(3, len(raw) + 10) == raw


def test_a_strided_buffer_is_refused(file: OutFile):
    with pytest.raises(ValueError, match="contiguous"):
        file.write(0, np.arange(12).reshape(3, 4).T)


def test_short_writes_are_continued(file: OutFile, monkeypatch):
    def short(fd, data, offset):
        return os.pwrite(fd, data[: max(1, len(data) // 3)], offset)

    monkeypatch.setattr(syscalls.Calls, "pwrite", staticmethod(short))
    data = np.random.default_rng(0).integers(0, 256, 10_000, np.uint8)
    file.write(5, data)
    assert file.read(5, 10_000) == data.tobytes()


def test_a_write_without_progress_is_an_error_not_a_loop(file: OutFile, monkeypatch):
    monkeypatch.setattr(syscalls.Calls, "pwrite", staticmethod(lambda *args: 0))
    with pytest.raises(StorageError, match="no progress"):
        file.write(0, b"abc")


def test_long_writes_and_copies_are_cut_below_the_kernels_limit(file: OutFile, tmp_path, monkeypatch):
    sizes = []

    def pwrite(fd, data, offset):
        sizes.append(len(data))
        return os.pwrite(fd, data, offset)

    def copy_file_range(source, target, count, *offsets):
        sizes.append(count)
        return os.copy_file_range(source, target, count, *offsets)

    monkeypatch.setattr(syscalls.Calls, "pwrite", staticmethod(pwrite))
    monkeypatch.setattr(syscalls.Calls, "copy_file_range", staticmethod(copy_file_range))
    monkeypatch.setattr(syscalls, "CHUNK", 100_000)
    data = os.urandom(350_001)
    (tmp_path / "in").write_bytes(data)
    file.write(0, data)
    file.copy(400_000, tmp_path / "in", 0, len(data))
    assert max(sizes) == 100_000
    assert file.read(0, 350_001) == file.read(400_000, 350_001) == data


def test_offsets_beyond_four_gibibytes_work(file: OutFile, tmp_path):
    with open(tmp_path / "in", "wb") as sparse:
        sparse.seek(5 << 30)
        sparse.write(b"far away" * 20_000)
    file.copy((4 << 30) + 1, tmp_path / "in", 5 << 30, 160_000)
    file.write((6 << 30) - 3, b"end")
    assert file.read((4 << 30) + 1, 160_000) == b"far away" * 20_000
    assert file.read((6 << 30) - 3, 10) == b"end"


@pytest.mark.parametrize("fault", [None, errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, 0])
def test_copies_fall_back_to_reading_where_the_kernel_cannot(file: OutFile, tmp_path, monkeypatch, fault):
    data = os.urandom(300_000)
    (tmp_path / "in").write_bytes(data)

    def refuse(*args):
        if fault:
            raise OSError(fault, "no")
        return 0  # what file systems without page cache answer

    if fault is not None:
        monkeypatch.setattr(syscalls.Calls, "copy_file_range", staticmethod(refuse))
        monkeypatch.setattr(syscalls, "BLOCK", 7001)
    file.copy(10, tmp_path / "in", 17, 250_000)
    file.copy(260_010, tmp_path / "in", 5, 9)
    assert file.read(10, 250_000) == data[17:250_017]
    assert file.read(260_010, 9) == data[5:14]


@pytest.mark.parametrize("length", [100, 200_000])
def test_a_source_shorter_than_promised_is_an_input_error(file: OutFile, tmp_path, length):
    (tmp_path / "in").write_bytes(bytes(length - 1))
    with pytest.raises(InputError, match="1 bytes earlier") as caught:
        file.copy(0, tmp_path / "in", 0, length)
    assert caught.value.where == (str(tmp_path / "in"),)
    with pytest.raises(InputError, match="cannot be opened"):
        file.copy(0, tmp_path / "missing", 0, 1)


def test_many_sources_and_threads_share_few_descriptors(tmp_path):
    sources = []
    for i in range(200):
        sources.append(tmp_path / f"in{i:03}")
        sources[-1].write_bytes(bytes([i]) * 1000)
    before = len(os.listdir("/proc/self/fd"))
    with staging(tmp_path / "out") as area:
        file = area.create("out")
        file.allocate(200_000)

        def work(numbers):
            for i in numbers:
                file.copy(1000 * i, sources[i], 0, 1000)

        threads = [threading.Thread(target=work, args=(range(k, 200, 4),)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(os.listdir("/proc/self/fd")) - before < 45
        file.close()
        area.commit()
    assert (tmp_path / "out").read_bytes() == b"".join(bytes([i]) * 1000 for i in range(200))
    assert len(os.listdir("/proc/self/fd")) == before


def test_allocation_falls_back_to_setting_the_length(file: OutFile, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(syscalls.Calls, "fallocate", staticmethod(unsupported))
    file.allocate(5000)
    assert file.path.stat().st_size == 5000
    file.allocate(0)


def test_a_full_disk_says_how_much_is_needed(file: OutFile, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(syscalls.Calls, "fallocate", staticmethod(full))
    with pytest.raises(StorageError, match="no space left") as caught:
        file.allocate(123_456)
    assert "123,456 bytes" in caught.value.hint
    assert caught.value.where == (str(file.path),)


@pytest.mark.parametrize("fault", [errno.EINVAL, errno.EOPNOTSUPP])
def test_file_systems_without_fsync_are_tolerated(file: OutFile, monkeypatch, fault):
    def unsupported(fd):
        raise OSError(fault, "no")

    monkeypatch.setattr(syscalls.Calls, "fsync", staticmethod(unsupported))
    file.close()
    file.close()
    assert file.closed


# refusals


def test_an_existing_output_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "out").write_bytes(b"old")
    (tmp_path / "dir").mkdir()
    for target, directory in ((tmp_path / "out", False), (tmp_path / "dir", True)):
        with pytest.raises(OutputError, match="exists") as caught:
            staging(target, directory=directory)
        assert "--overwrite" in caught.value.hint
    assert sorted(os.listdir(tmp_path)) == ["dir", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("directory", [False, True])
def test_links_are_never_written_through(tmp_path, overwrite, directory):
    (tmp_path / "real").mkdir() if directory else (tmp_path / "real").write_bytes(b"keep")
    for name, to in (("out", "real"), ("broken", "nowhere")):
        (tmp_path / name).symlink_to(tmp_path / to)
        with pytest.raises(OutputError, match="symbolic link"):
            staging(tmp_path / name, overwrite=overwrite, directory=directory)


def test_a_link_in_place_of_the_staging_directory_or_its_parts_is_refused(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    area = staging(tmp_path / "out")
    area.path.symlink_to(elsewhere)
    with pytest.raises(StorageError):
        area.__enter__()
    area.path.unlink()
    area.path.mkdir()
    (area.path / "journal").symlink_to(elsewhere / "file")
    with pytest.raises(StorageError):
        staging(tmp_path / "out").__enter__()
    assert os.listdir(elsewhere) == []


def test_what_cannot_be_replaced_is_refused_even_with_overwrite(tmp_path):
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "inner").mkdir()
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    for name, directory, problem in (
        ("dir", False, "not a regular file"),
        ("file", True, "not a directory"),
        ("fifo", False, "not a regular file"),
        ("dir", True, "holds other directories"),
    ):
        with pytest.raises(OutputError, match=problem):
            staging(tmp_path / name, overwrite=True, directory=directory)


def test_targets_without_a_place_or_a_name_are_refused(tmp_path):
    with pytest.raises(OutputError, match="directory does not exist"):
        staging(tmp_path / "missing" / "out")
    for path in (Path("/"), Path("."), tmp_path / ".."):
        with pytest.raises(OutputError, match="no name"):
            staging(path)
    with pytest.raises(ValueError, match="hexadecimal"):
        staging(tmp_path / "out", digest="short")


def test_a_second_run_to_the_same_output_is_refused_while_the_first_runs(tmp_path):
    with staging(tmp_path / "out") as first:
        with pytest.raises(OutputError, match="another run"), staging(tmp_path / "out"):
            pass
        put(first, "out", b"first")
        first.commit()
    assert (tmp_path / "out").read_bytes() == b"first"


def test_an_output_that_appears_during_the_run_is_not_replaced(tmp_path):
    with staging(tmp_path / "out") as area:
        put(area, "out", b"mine")
        (tmp_path / "out").write_bytes(b"theirs")
        with pytest.raises(OutputError, match="exists"):
            area.commit()
    assert (tmp_path / "out").read_bytes() == b"theirs"
    assert os.listdir(tmp_path) == ["out"]


def test_an_existing_companion_is_refused_when_it_is_created(tmp_path):
    (tmp_path / "out.json").write_bytes(b"old")
    with pytest.raises(OutputError, match="exists") as caught, staging(tmp_path / "out") as area:
        area.create("out.json")
    assert str(tmp_path / "out.json") in caught.value.where
    assert os.listdir(tmp_path) == ["out.json"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/abs", "a\0b", "out"])
def test_only_new_plain_names_are_created(tmp_path, name):
    with staging(tmp_path / "out") as area:
        area.create("out")
        with pytest.raises(ValueError, match="plain file name"):
            area.create(name)


def test_commit_asks_for_closed_files_and_the_targets_own(tmp_path):
    with staging(tmp_path / "out") as area:
        put(area, "out.json", b"{}")
        with pytest.raises(ValueError, match="not created"):
            area.commit()
        file = area.create("out")
        with pytest.raises(ValueError, match="not closed"):
            area.commit()
        file.close()
        area.commit()
    assert sorted(os.listdir(tmp_path)) == ["out", "out.json"]


def test_leaving_without_commit_removes_everything(tmp_path):
    def fail():
        with staging(tmp_path / "out") as area:
            put(area, "out", b"x")
            area.create("open")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with staging(tmp_path / "dir", directory=True) as area:
        put(area, "a", b"x")
    assert os.listdir(tmp_path) == []


# publishing


def test_an_overwritten_directory_is_replaced_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-00003-of-00003").write_bytes(b"stale shard")
    with staging(tmp_path / "out", overwrite=True, directory=True) as area:
        put(area, "model", b"new")
        area.commit()
    assert os.listdir(tmp_path / "out") == ["model"]
    assert os.listdir(tmp_path) == ["out"]


def test_a_dropped_companion_goes_with_the_old_file(tmp_path):
    (tmp_path / "out").write_bytes(b"old")
    (tmp_path / "out.json").write_bytes(b"of old")
    with staging(tmp_path / "out", overwrite=True) as area:
        put(area, "out", b"new")
        area.drop("out.json")
        area.drop("never.there")
        area.commit()
    assert os.listdir(tmp_path) == ["out"]


def test_files_in_folders_are_published_with_their_directory(tmp_path):
    with staging(tmp_path / "out", directory=True) as area:
        put(area, "rank_0/net", b"first")
        put(area, "rank_1/net", b"second")
        put(area, "config", b"third")
        for name in ("a/b/c", "/net", "rank_0/..", "rank_0/", "../net"):
            with pytest.raises(ValueError, match="not a new plain file name"):
                area.create(name)
        inside = next(area.path.glob("out-*"))
        (inside / "rank_1" / "stray").write_bytes(b"")
        (inside / "strays").mkdir()
        area.commit()
    found = {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"out/rank_0/net": b"first", "out/rank_1/net": b"second", "out/config": b"third"}
    assert not (tmp_path / "out" / "strays").exists()
    with staging(tmp_path / "lone") as area, pytest.raises(ValueError, match="not a new plain file name"):
        area.create("folder/lone")


def test_a_resumed_run_keeps_finished_files_in_folders(tmp_path):
    place = leave(tmp_path / "out", {"rank_0/a": b"first", "rank_1/a": b"second"})
    inode = next(place.glob("out-*/rank_0/a")).stat().st_ino
    with staging(tmp_path / "out", directory=True) as area:
        assert area.finished("rank_0/a")
        put(area, "rank_1/b", b"third")
        area.commit()
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").glob("*/*")) == [
        "rank_0/a",
        "rank_1/b",
    ]
    assert (tmp_path / "out" / "rank_0" / "a").stat().st_ino == inode


@pytest.mark.parametrize("name", ["a b", "-rf", "é\N{SNOWMAN}", "\udcff", "x" * 255, ".hidden", "new\nline"])
@pytest.mark.parametrize("directory", [False, True])
def test_unusual_names_work(tmp_path, monkeypatch, name, directory):
    monkeypatch.chdir(tmp_path)
    for overwrite in (False, True):
        with staging(Path(name), overwrite=overwrite, directory=directory) as area:
            assert len(find_staging(tmp_path)) == 1
            put(area, "inner" if directory else name, b"x")
            area.commit()
    assert os.listdir(tmp_path) == [name]


# resuming


def test_a_resumed_run_keeps_finished_files(tmp_path):
    place = leave(tmp_path / "out", {"a": b"first", "b": b"second"})
    inode = next(place.glob("out-*/a")).stat().st_ino
    with staging(tmp_path / "out", directory=True) as area:
        assert area.finished("a")
        assert area.finished("a")
        assert not area.finished("c")
        put(area, "c", b"third")
        area.commit()
    assert sorted(os.listdir(tmp_path / "out")) == ["a", "c"]  # b was not asked for: it is not part of this output
    assert (tmp_path / "out" / "a").stat().st_ino == inode


def test_an_unfinished_file_is_not_kept(tmp_path):
    child = os.fork()
    if child == 0:
        with staging(tmp_path / "out", directory=True) as area:
            area.create("a").write(0, b"half")
            os._exit(0)
    os.waitpid(child, 0)
    with staging(tmp_path / "out", directory=True) as area:
        assert not area.finished("a")
        put(area, "a", b"whole")
        assert not area.finished("a")
        area.commit()
    assert (tmp_path / "out" / "a").read_bytes() == b"whole"


@pytest.mark.parametrize("damage", ["content", "replaced", "link", "gone", "journal", "torn", "other digest"])
def test_a_staged_file_that_changed_is_written_again(tmp_path, damage):
    place = leave(tmp_path / "out", {"a": b"first", "b": b"second"})
    staged, journal = next(place.glob("out-*/b")), place / "journal"
    if damage == "content":
        staged.write_bytes(b"SECOND")
    elif damage == "replaced":
        status = staged.stat()
        staged.with_name("x").write_bytes(b"SECOND")
        os.utime(staged.with_name("x"), ns=(status.st_atime_ns, status.st_mtime_ns))
        staged.with_name("x").rename(staged)
    elif damage == "link":
        staged.rename(tmp_path / "moved")
        staged.symlink_to(tmp_path / "moved")
    elif damage == "gone":
        staged.unlink()
    elif damage == "torn":
        journal.write_bytes(journal.read_bytes()[:-5])
    elif damage == "journal":
        journal.write_bytes(b"\0" * 100)
    else:  # the name holds twelve digits of the digest only
        journal.write_bytes(journal.read_bytes().replace(DIGEST.encode(), (DIGEST[:12] + "0" * 52).encode()))
    with staging(tmp_path / "out", directory=True) as area:
        assert area.finished("a") == (damage not in ("journal", "other digest"))
        assert not area.finished("b")
        for name, data in (("a", b"first"), ("b", b"second")):
            if not area.finished(name):
                put(area, name, data)
        area.commit()
    assert (tmp_path / "out" / "a").read_bytes() == b"first"
    assert (tmp_path / "out" / "b").read_bytes() == b"second"
    assert not find_staging(tmp_path)


def test_a_run_of_another_digest_starts_anew(tmp_path):
    leave(tmp_path / "out", {"a": b"first"})
    with staging(tmp_path / "out", digest=OTHER, directory=True) as area:
        assert not area.finished("a")


# what killed runs left


def test_clean_removes_what_no_run_holds(tmp_path):
    left = leave(tmp_path / "one", {"a": bytes(1000)})
    (tmp_path / ".x.lorabridge-xyz.partial").mkdir()  # not a digest: not ours
    (tmp_path / ".y.lorabridge-0123456789ab.partial").write_bytes(b"not a directory")
    kept = sorted(os.listdir(tmp_path))
    with staging(tmp_path / "two", directory=True) as live:
        found = find_staging(tmp_path)
        assert [(area.path, area.held) for area in found] == [(left, False), (live.path, True)]
        assert found[0].size >= 1000
        assert 0 <= found[0].age < 60
        report = clean(tmp_path, dry_run=True)
        assert ([a.path for a in report.removed], [a.path for a in report.held]) == ([left], [live.path])
        assert left.is_dir()
        report = clean(tmp_path, dry_run=False)
        assert ([a.path for a in report.removed], [a.path for a in report.held]) == ([left], [live.path])
        assert report.nbytes >= 1000
        with pytest.raises(OutputError, match="another run"):
            remove_staging(live.path)
        put(live, "a", b"x")
        live.commit()
    assert sorted([*os.listdir(tmp_path), left.name]) == sorted([*kept, "two"])
    assert not remove_staging(left)


def test_clean_refuses_what_is_not_its_own(tmp_path):
    with pytest.raises(InputError, match="not a directory"):
        clean(tmp_path / "missing", dry_run=True)
    with pytest.raises(OutputError, match="not a staging directory"):
        remove_staging(tmp_path)


def test_clean_follows_no_links(tmp_path):
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "file").write_bytes(b"x")
    left = leave(tmp_path / "out", {"a": b"x"})
    (next(left.glob("out-*")) / "link").symlink_to(keep)
    (left / "aside").symlink_to(keep)
    with pytest.raises(StorageError):  # a link where a directory of its own belongs
        clean(tmp_path, dry_run=False)
    (left / "aside").unlink()
    clean(tmp_path, dry_run=False)
    assert os.listdir(tmp_path) == ["keep"]
    assert os.listdir(keep) == ["file"]


def test_space_is_checked_where_the_output_will_be(tmp_path):
    require_space(tmp_path / "not" / "there" / "yet", 1000)
    with pytest.raises(StorageError, match=r"takes 1,000,000,000,000,000,000 bytes and [\d,]+ are free"):
        require_space(tmp_path / "not" / "there" / "yet", 10**18)
