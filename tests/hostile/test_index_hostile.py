"""Broken and malicious index files: no path leaves the directory, nothing blocks, names agree both ways."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lorabridge.errors import InputError
from lorabridge.formats import open_source

GOOD = "model-00001-of-00001.safetensors"
REVISION = "0" * 40


def save(path: Path, *names: str) -> Path:
    safetensors.torch.save_file({name: torch.ones(2) for name in names}, path)
    return path


def index(directory: Path, weights: object, name: str = "model.safetensors.index.json") -> Path:
    text = weights if isinstance(weights, bytes) else json.dumps({"metadata": {}, "weight_map": weights}).encode()
    (directory / name).write_bytes(text)
    return directory / name


@pytest.mark.parametrize(
    "value",
    [
        "../out.safetensors",
        "/etc/passwd",
        "a/../" + GOOD,
        "./" + GOOD,
        "sub/" + GOOD,
        "sub\\" + GOOD,
        "..\\out.safetensors",
        "C:" + GOOD,
        "C:\\" + GOOD,
        "\\\\server\\share\\x",
        "//server/share/x",
        GOOD + "\0",
        "\0",
        GOOD + "/",
        GOOD + ".",
        GOOD + " ",
        " " + GOOD,
        GOOD + ":stream",
        "%2e%2e%2fout.safetensors",
        "file:///etc/passwd",
        "NUL",
        "con.safetensors",
        "",
        ".",
        "..",
        "x" * 300,
        "\x1b[31m" + GOOD,
        "\u202e" + GOOD,
        "\ud800",
        "*.safetensors",
        7,
        None,
        [GOOD],
        {"file": GOOD},
        True,
    ],
)
def test_a_value_that_is_no_plain_file_name_is_refused(value: object, tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "sub").mkdir(parents=True)
    save(tmp_path / "out.safetensors", "w")
    save(work / GOOD, "w")
    save(work / "sub" / GOOD, "w")
    with pytest.raises(InputError) as caught:
        open_source(index(work, {"w": value}))
    assert str(work) in caught.value.where[0]
    assert all(place.isprintable() for place in caught.value.where)
    assert caught.value.hint


def test_every_bad_value_is_listed(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        open_source(index(tmp_path, {f"w{i}": f"../{i}" for i in range(20)}))
    assert len(caught.value.where) == 20


@pytest.mark.parametrize(
    "text",
    [
        b'{"weight_map"',
        b'{"weight_map": {}}',
        b'{"weight_map": []}',
        b'{"weight_map": null}',
        b'{"metadata": {}, "weight_map_": {}}',
        b'{"weight_map": {"w": "a", "w": "a"}}',
        b'{"weight_map": {"w": "a", "\\u0077": "a"}}',
        b'{"weight_map": {"w": "a"}, "weight_map": {"w": "a"}}',
        b'{"metadata": {"total_size": NaN}, "weight_map": {"w": "a"}}',
        b'{"metadata": {"total_size": ' + b"9" * 5000 + b'}, "weight_map": {"w": "a"}}',
        b'{"metadata": ' + b"[" * 100_000 + b"]" * 100_000 + b', "weight_map": {"w": "a"}}',
        b"[" * 100_000,
        b'{"weight_map": {"\xff": "a"}}',
        b"[]",
        b"{}",
        b"null",
    ],
)
def test_an_index_that_is_malformed_is_refused(text: bytes, tmp_path: Path) -> None:
    save(tmp_path / "a", "w")
    with pytest.raises(InputError):
        open_source(index(tmp_path, text))


def test_truncating_an_index_anywhere_is_refused(tmp_path: Path) -> None:
    save(tmp_path / GOOD, "w")
    path = index(tmp_path, {"w": GOOD})
    assert set(open_source(path).specs) == {"w"}
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            open_source(path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", "a")
    with pytest.raises(InputError, match="missing") as caught:
        open_source(index(tmp_path, {"a": "a.safetensors", "b": "b.safetensors", "c": "c.safetensors"}))
    assert [Path(place.split(": ")[0]).name for place in caught.value.where] == ["b.safetensors", "c.safetensors"]


def test_index_and_headers_agree_both_ways(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", "a", "extra")
    save(tmp_path / "b.safetensors", "b", "a")
    weights = {"a": "a.safetensors", "b": "b.safetensors", "gone": "b.safetensors"}
    with pytest.raises(InputError, match="disagree") as caught:
        open_source(index(tmp_path, weights))
    text = "\n".join(caught.value.where)
    assert "a.safetensors: extra: not in the index" in text
    assert "b.safetensors: a: the index places it in a.safetensors" in text  # a tensor in two shards
    assert "b.safetensors: gone: missing" in text
    assert len(caught.value.where) == 3


def test_a_shard_of_another_container_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.bin")
    with pytest.raises(InputError, match="needs safetensors shards, this is a torch zip"):
        open_source(index(tmp_path, {"w": "w.bin"}))
    save(tmp_path / "v.safetensors", "v")
    with pytest.raises(InputError, match="needs torch shards, this is a safetensors"):
        open_source(index(tmp_path, {"v": "v.safetensors", "w": "w.bin"}, "mixed.index.json"))
    with pytest.raises(InputError, match="needs torch shards, this is a safetensors"):
        open_source(index(tmp_path, {"v": "v.safetensors"}, "pytorch_model.bin.index.json"))


def test_an_index_that_lists_itself_or_another_index_is_refused(tmp_path: Path) -> None:
    index(tmp_path, {"w": "x"}, "other.index.json")
    for value in ("model.safetensors.index.json", "other.index.json"):
        with pytest.raises(InputError, match="this is an index of shards"):
            open_source(index(tmp_path, {"w": value}))


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "dangling", "loop"])
def test_a_shard_that_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    {
        "fifo": lambda: os.mkfifo(path),
        "directory": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "dangling": lambda: path.symlink_to("absent"),
        "loop": lambda: path.symlink_to(path.name),
    }[kind]()
    with pytest.raises(InputError) as caught:
        open_source(index(tmp_path, {"w": path.name}))
    assert str(path) in caught.value.where[0]


def test_a_link_inside_the_directory_is_followed_one_that_leaves_is_not(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    save(work / "real.safetensors", "w")
    (work / "w.safetensors").symlink_to("real.safetensors")
    assert set(open_source(index(work, {"w": "w.safetensors"})).specs) == {"w"}
    outside = save(tmp_path / "outside.safetensors", "w")
    for target in (Path("../outside.safetensors"), outside):
        (work / "w.safetensors").unlink()
        (work / "w.safetensors").symlink_to(target)
        with pytest.raises(InputError, match="leaves the directory"):
            open_source(index(work, {"w": "w.safetensors"}))
    (work / "w.safetensors").unlink()
    (work / "w.safetensors").symlink_to("hop.safetensors")
    (work / "hop.safetensors").symlink_to("../outside.safetensors")
    with pytest.raises(InputError, match="leaves the directory"):
        open_source(index(work, {"w": "w.safetensors"}))


@pytest.mark.parametrize("below", ["", "unet/"])
def test_a_hub_cache_of_links_to_blobs_opens(below: str, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / REVISION / below
    snapshot.mkdir(parents=True)
    up = "../../" + "../" * below.count("/")
    save(tmp_path / "blobs" / ("a" * 64), "w")
    (snapshot / "w.safetensors").symlink_to(f"{up}blobs/{'a' * 64}")
    path = index(tmp_path / "blobs", {"w": "w.safetensors"}, "b" * 40)
    (snapshot / "model.safetensors.index.json").symlink_to(f"{up}blobs/{path.name}")
    assert set(open_source(snapshot / "model.safetensors.index.json").specs) == {"w"}
    assert set(open_source(snapshot).specs) == {"w"}


def test_links_that_only_resemble_a_hub_cache_are_refused(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    secret = save(tmp_path / "secret", "w")
    save(tmp_path / "blobs" / ("a" * 64), "w")
    for folder, link in (
        ("elsewhere/rev", f"../../blobs/{'a' * 64}"),  # not below snapshots
        ("snapshots/rev", "../../blobs/not-a-hash"),
        ("snapshots/rev", "../../blobs/../secret"),
        ("snapshots/rev", "../../secret"),
        ("snapshots/rev", f"../../blobs/{'b' * 64}"),  # the blob is a link itself
        ("snapshots/rev/deep", f"../../blobs/{'a' * 64}"),
    ):
        (tmp_path / "blobs" / ("b" * 64)).unlink(missing_ok=True)
        (tmp_path / "blobs" / ("b" * 64)).symlink_to(secret)
        work = tmp_path / folder
        work.mkdir(parents=True)
        (work / "w.safetensors").symlink_to(link)
        with pytest.raises(InputError, match="missing or unsafe"):
            open_source(index(work, {"w": "w.safetensors"}))
        shutil.rmtree(tmp_path / folder.split("/")[0])


def test_a_broken_header_in_one_shard_names_that_shard(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", "a")
    data = save(tmp_path / "b.safetensors", "b").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(data[:-1])
    with pytest.raises(InputError) as caught:
        open_source(index(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"}))
    assert str(tmp_path / "b.safetensors") in caught.value.where[0]


def test_a_closed_set_leaves_no_descriptors(tmp_path: Path) -> None:
    save(tmp_path / "a.safetensors", "a")
    save(tmp_path / "b.safetensors", "b")
    before = len(os.listdir("/proc/self/fd"))
    open_source(index(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})).close()
    with pytest.raises(InputError):
        open_source(index(tmp_path, {"a": "a.safetensors", "c": "b.safetensors"}))
    assert len(os.listdir("/proc/self/fd")) == before
