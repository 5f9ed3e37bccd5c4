"""Every kind of file is told apart by its content and named in the refusal."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import pickle
import socket
import tarfile
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorabridge.errors import InputError, LorabridgeError, StorageError, UsageError
from lorabridge.formats import FORMATS, container, format_for, identify, make_sink, open_source
from lorabridge.formats.sniff import KINDS

STATE = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}


def write_safetensors(path: Path) -> None:
    safetensors.torch.save_file(STATE, path)


def write_torch(path: Path) -> None:
    torch.save(STATE, path)


def write_legacy(path: Path) -> None:
    torch.save(STATE, path, _use_new_zipfile_serialization=False)


def write_torchscript(path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    torch.jit.save(torch.jit.trace(module, torch.ones(1, 2)), str(path))


def write_npz(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, w=np.ones(3))


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def write_empty_zip(path: Path) -> None:
    zipfile.ZipFile(path, "w").close()


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO(b""))


def save_ckpt(path: Path, **options: object) -> None:
    mindspore = pytest.importorskip("mindspore")
    target = path.with_name("m.ckpt")
    parameters = [{"name": "w", "data": mindspore.Tensor(np.ones((2, 3), np.float32))}]
    mindspore.save_checkpoint(parameters, str(target), **options)
    target.rename(path)


def write_strategy(stage: bytes) -> object:
    layout = b"\n\x0d\n\x05fc1.w\x12\x04\x08\x00\x12\x00"
    return lambda path: path.write_bytes(stage + b"\x12" + bytes([len(layout)]) + layout)


def raw(data: bytes) -> object:
    return lambda path: path.write_bytes(data)


CASES = {
    "safetensors": [write_safetensors],
    "torch": [write_torch],
    "mindspore": [
        save_ckpt,
        lambda path: save_ckpt(path, crc_check=True),
        raw(bytes.fromhex("0a140a017a120f1207466c6f61743332") + b"\x1a\x04\0\0\xe0\x40"),  # 0-d: no dims
        raw(bytes.fromhex("0a220a0177121d08041207466c6f617433321a10") + bytes(16)),
        raw(bytes.fromhex("0a080a0177120308041a00")[:9]),  # cut short inside the first record
    ],
    "mindspore-strategy": [write_strategy(b"\x08\x02"), write_strategy(b"\x08\xac\x02"), raw(b"\x08\x01")],
    "mindspore-strategy-json": [raw(b'{"current_stage":2,"parallel_layout_item":{"b":{"dev_matrix":[2,2]}}}')],
    "mindspore-group": [raw(bytes.fromhex("0a120a06342d36333031120808000801080208030a"))],
    "mindspore-aes-gcm": [lambda path: save_ckpt(path, enc_key=b"0123456789abcdef", enc_mode="AES-GCM")],
    "mindspore-aes-cbc": [lambda path: save_ckpt(path, enc_key=b"0123456789abcdef", enc_mode="AES-CBC")],
    "mindspore-sm4-cbc": [lambda path: save_ckpt(path, enc_key=b"0123456789abcdef", enc_mode="SM4-CBC")],
    "torch-legacy": [write_legacy],
    "torchscript": [write_torchscript],
    "npz": [write_npz],
    "zip": [write_zip, write_empty_zip],
    "pickle": [
        *(raw(pickle.dumps({"w": [1.0] * 9}, protocol=p)) for p in range(6)),
        raw(pickle.dumps([1, 2], protocol=0)),
    ],
    "tar": [write_tar],
    "gzip": [raw(gzip.compress(b"hello"))],
    "npy": [lambda path: np.save(path.open("wb"), np.ones(3))],
    "gguf": [raw(b"GGUF\3\0\0\0" + bytes(16))],
    "hdf5": [raw(b"\x89HDF\r\n\x1a\n" + bytes(80))],
    "json": [raw(b'{"r": 8, "lora_alpha": 16}'), raw(b"\xef\xbb\xbf [1]"), raw(b"[" * 100_000)],
    "index": [raw(b'{"metadata":{},"weight_map":{}}')],
    "html": [raw(b"\n<!DOCTYPE html><html>"), raw(b"<HTML><body>404")],
    "lfs-pointer": [raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")],
    "empty": [raw(b"")],
    "unknown": [
        raw(b"hello world, this is text"),
        raw(bytes(100)),
        raw(b"\n"),
        raw(b"\n\n\n\n\n"),
        raw(b"\x08\x08\x12\x07pytorch\x1a\x012"),  # ONNX
        raw(b"\x80"),
        raw(b"PKWARE"),
    ],
}


@pytest.mark.parametrize(("name", "number"), [(name, i) for name, makers in CASES.items() for i in range(len(makers))])
def test_content_decides_whatever_the_name_says(name: str, number: int, tmp_path: Path) -> None:
    for wrong in ("x.safetensors", "y.bin", "z.ckpt"):
        path = tmp_path / wrong
        CASES[name][number](path)  # type: ignore[operator]
        kind = identify(path)
        assert kind.name == name
        if kind.format is None:
            with pytest.raises(InputError) as caught:
                open_source(path)
            assert kind.title in caught.value.problem
            assert caught.value.where == (str(path),)
            assert caught.value.hint == kind.cure != ""


@pytest.mark.parametrize("maker", [write_safetensors, write_torch])
def test_a_wrong_suffix_does_not_matter_for_reading(maker: object, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    maker(path)  # type: ignore[operator]
    assert open_source(path).read("w").tobytes() == STATE["w"].numpy().tobytes()


def test_truncating_any_kind_never_raises_anything_but_our_errors(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for maker in (
        write_safetensors,
        write_torch,
        write_npz,
        write_tar,
        *CASES["mindspore"][2:4],
        CASES["mindspore-group"][0],
    ):
        maker(path)  # type: ignore[operator]
        data = path.read_bytes()
        for length in [*range(min(len(data), 300)), *range(300, len(data), 37)]:
            path.write_bytes(data[:length])
            assert identify(path).name in KINDS


STARTS = [
    b"",
    b"PK\3\4",
    b"PK\5\6",
    b"\x0a",
    b"\x0a\x22\x0a\1w",
    b"\x08\2\x12",
    b"\x80\2",
    b'{"weight_map"',
    b"\2" + bytes(7) + b"{}",
    b"GGUF",
]


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=60))
def test_any_bytes_are_identified_and_opened_or_refused(start: bytes, rest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(start + rest)
    assert identify(path).name in KINDS
    with suppress(InputError):
        open_source(path).close()


def test_a_truncated_torch_file_is_still_called_one(tmp_path: Path) -> None:
    write_torch(tmp_path / "x")
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-200])
    assert identify(tmp_path / "x").name == "torch"
    with pytest.raises(InputError):
        open_source(tmp_path / "x")


def test_a_zip_of_many_records_is_named_by_its_whole_directory(tmp_path: Path) -> None:
    torch.save({f"w{i}": torch.ones(1) for i in range(3000)}, tmp_path / "x")
    assert identify(tmp_path / "x").name == "torch"


def test_what_never_ends_is_named_without_being_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "sock"))
    start = time.monotonic()
    for path, name in ((tmp_path / "pipe", "fifo"), (tmp_path / "sock", "socket"), (Path("/dev/zero"), "device")):
        assert identify(path).name == name
        for reader in (open_source, *(container(format).open_file for format in FORMATS)):
            with pytest.raises(InputError, match=KINDS[name].name if reader is not open_source else KINDS[name].title):
                reader(path)
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    assert identify(tmp_path / "link").name == "fifo"
    assert time.monotonic() - start < 20
    server.close()


def test_what_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "absent", tmp_path / "dangling", tmp_path / "file" / "below", Path("a\0b")):
        with pytest.raises(InputError):
            identify(path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(LorabridgeError) as caught:
        identify(tmp_path / "loop")
    assert caught.value.exit_code == 6


def test_a_failing_disk_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write_safetensors(tmp_path / "w")
    source = open_source(tmp_path / "w")
    monkeypatch.setattr(os, "preadv", broken)
    for action in (lambda: source.read("w"), lambda: identify(tmp_path / "w")):
        with pytest.raises(StorageError, match="input/output error") as caught:
            action()
        assert caught.value.where == (str(tmp_path / "w"),)


def test_every_refused_kind_has_a_cure() -> None:
    assert [kind.name for kind in KINDS.values() if kind.format is None and not kind.cure] == []
    assert {kind.format for kind in KINDS.values()} == {None, "sharded", *FORMATS}


def test_the_registry_agrees_with_the_modules() -> None:
    for name, (_, suffixes) in FORMATS.items():
        assert name == container(name).NAME
        assert tuple(container(name).SUFFIXES) == suffixes
        for suffix in suffixes:
            assert format_for(Path(f"out{suffix}")) == name


@pytest.mark.parametrize("target", ["out", "out.npy", "out.json", "out.safetensors.d", ".ckpt"])
def test_a_target_without_a_known_suffix_lists_the_known_ones(target: str) -> None:
    with pytest.raises(UsageError) as caught:
        format_for(Path(target))
    assert all(suffix in caught.value.hint for _, suffixes in FORMATS.values() for suffix in suffixes)


def test_only_ckpt_files_have_a_checksum() -> None:
    for format in ("safetensors", "torch"):
        with pytest.raises(UsageError, match="checksum"):
            make_sink(format, lambda name: None, "x", crc=True)  # type: ignore[arg-type, return-value]


def test_a_directory_with_one_checkpoint_opens_it(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "README.md").write_text("hello")
    torch.save({}, tmp_path / "optimizer.pt")
    (tmp_path / "training_args.bin").write_bytes(pickle.dumps(1))
    (tmp_path / "strategy.ckpt").write_bytes(b"\x08\x01")
    (tmp_path / ".hidden.ckpt").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.bin")
    source = open_source(tmp_path)
    assert source.path == tmp_path / "adapter_model.safetensors"
    assert set(source.specs) == set(STATE)


def test_a_directory_with_several_checkpoints_lists_them(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors")
    write_torch(tmp_path / "b.bin")
    with pytest.raises(UsageError, match="several") as caught:
        open_source(tmp_path)
    assert caught.value.where == (str(tmp_path / "a.safetensors"), str(tmp_path / "b.bin"))


def test_a_checkpoint_beside_an_index_is_a_second_choice(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "part.safetensors")
    weights = {"weight_map": dict.fromkeys(STATE, "part.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(weights))
    assert set(open_source(tmp_path).specs) == set(STATE)
    write_torch(tmp_path / "other.pt")
    with pytest.raises(UsageError) as caught:
        open_source(tmp_path)
    assert len(caught.value.where) == 2


def test_a_directory_without_checkpoint_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no checkpoint"):
        open_source(tmp_path)
