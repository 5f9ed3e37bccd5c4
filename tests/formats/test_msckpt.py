"""MindSpore checkpoints against the real library: the same bytes, and each reads what the other writes."""

from __future__ import annotations

import os
import struct
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore.train import serialization

from lorabridge.dtypes import BY_MINDSPORE, BY_NAME, DTYPES, DType
from lorabridge.errors import InputError, MappingError
from lorabridge.files.fsio import Staging
from lorabridge.formats import msckpt, msckptsink
from lorabridge.tensors import Extent, TensorSpec

serialization._get_available_memory = lambda: None  # 2.10 takes free memory for available memory

LOADABLE = [BY_MINDSPORE[name] for name in serialization.tensor_to_ms_type if name != "str"]


class PlainFile:
    """Stand in for ``lorabridge.files.fsio.OutFile``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writes = 0
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def allocate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        self.writes += 1
        assert os.pwrite(self._fd, data, offset) == len(data)

    def copy(self, offset: int, source: Path, start: int, length: int) -> None:
        with open(source, "rb") as file:
            file.seek(start)
            self.write(offset, file.read(length))

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self._fd, length, offset)

    def close(self) -> None:
        os.close(self._fd)


def sink_for(path: Path, *, crc: bool = False) -> msckpt.CkptSink:
    return msckpt.make_sink(lambda name: PlainFile(path.parent / name), path.name, crc=crc)


def write(path: Path, specs: Sequence[TensorSpec], bits: Mapping[str, np.ndarray], *, crc: bool = False) -> bytes:
    sink = sink_for(path, crc=crc)
    sink.begin(specs, {})
    for spec in reversed(specs):
        sink.write(spec.name, 0, bits[spec.name])
    sink.finish()
    return path.read_bytes()


def rewrite(source: Path, target: Path, *, crc: bool = False) -> bytes:
    """Read a checkpoint and write all of it again."""
    opened = msckpt.open_file(source)
    bits = {name: opened.read(name) for name in opened.specs}
    opened.close()
    return write(target, list(opened.specs.values()), bits, crc=crc)


def spec(name: str, dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, BY_NAME[dtype], shape)


def some_bits(dtype: DType, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    raw = np.random.default_rng(seed).integers(0, 256, TensorSpec("", dtype, shape).nbytes, np.uint8)
    return (raw & 1 if dtype.kind == "bool" else raw).view(dtype.carrier()).reshape(shape)


def ms_tensor(bits: np.ndarray, dtype: DType) -> ms.Tensor:
    """Make the real tensor of the given bits."""
    assert dtype.mindspore is not None
    ms_type = serialization.tensor_to_ms_type[dtype.mindspore]
    return serialization.Tensor_.convert_bytes_to_tensor(bits.tobytes(), bits.shape, ms_type)


def save_with_mindspore(path: Path, tensors: Mapping[str, ms.Tensor], **options: object) -> bytes:
    ms.save_checkpoint([{"name": n, "data": ms.Tensor(t)} for n, t in tensors.items()], str(path), **options)
    serialization._wait_async_thread_save_ckpt()
    return path.read_bytes()


@pytest.fixture
def samples() -> tuple[list[TensorSpec], dict[str, np.ndarray]]:
    """Every dtype that MindSpore loads, as matrix and as scalar, and names of every kind."""
    shapes: tuple[tuple[int, ...], ...] = ((3, 5), (), (1, 1, 2), (200,))
    specs = [TensorSpec(f"layer.{d.name}.{len(s)}", d, s) for d in LOADABLE for s in shapes]
    specs += [spec("schicht.größe.层", "float32", 2), spec("n" * 1024, "int8", 1), spec(" ", "float32", 130, 1)]
    return specs, {s.name: some_bits(s.dtype, s.shape, i) for i, s in enumerate(specs)}


@pytest.mark.parametrize("crc", [False, True])
def test_the_same_bytes_as_save_checkpoint(tmp_path: Path, samples, crc: bool) -> None:
    specs, bits = samples
    real = {s.name: ms_tensor(bits[s.name], s.dtype) for s in specs}
    theirs = save_with_mindspore(tmp_path / "theirs.ckpt", real, crc_check=crc)
    assert write(tmp_path / "ours.ckpt", specs, bits, crc=crc) == theirs
    assert msckpt.check_crc(tmp_path / "ours.ckpt") is crc


def test_reads_what_mindspore_wrote(tmp_path: Path, samples) -> None:
    specs, bits = samples
    save_with_mindspore(tmp_path / "a.ckpt", {s.name: ms_tensor(bits[s.name], s.dtype) for s in specs})
    source = msckpt.open_file(tmp_path / "a.ckpt")
    assert list(source.specs.values()) == specs
    assert (source.format, dict(source.metadata), source.crc) == ("mindspore", {}, None)
    for s in specs:
        found = source.read(s.name)
        assert found.dtype == s.dtype.carrier()
        assert found.shape == s.shape
        assert found.tobytes() == bits[s.name].tobytes()
        assert found.flags.owndata
        assert found.flags.c_contiguous
    source.close()


def test_mindspore_loads_what_we_wrote(tmp_path: Path, samples) -> None:
    specs, bits = samples
    write(tmp_path / "a.ckpt", specs, bits, crc=True)
    loaded = ms.load_checkpoint(str(tmp_path / "a.ckpt"), crc_check=True)
    assert list(loaded) == [s.name for s in specs]
    for s in specs:
        assert tuple(loaded[s.name].shape) == s.shape
        assert str(loaded[s.name].dtype) == s.dtype.mindspore
        assert loaded[s.name].get_bytes() == bits[s.name].tobytes()


def test_append_dict_values_survive_a_rewrite(tmp_path: Path) -> None:
    extra = {"epoch": 7, "loss": 0.1, "best": True, "huge": 2**63, "note": "héllo 层", "void": ""}
    theirs = tmp_path / "theirs.ckpt"
    ms.save_checkpoint(
        [{"name": "w", "data": ms.Tensor(np.eye(2, dtype=np.float32))}], str(theirs), append_dict=extra, crc_check=True
    )
    source = msckpt.open_file(theirs)
    assert {n: (s.dtype.name, s.shape) for n, s in source.specs.items()} == {
        "w": ("float32", (2, 2)),
        "epoch": ("int64", ()),
        "loss": ("float32", ()),
        "best": ("bool", ()),
        "huge": ("uint64", ()),
        "note": ("text", (7,)),
        "void": ("text", (1,)),
    }
    assert source.read("note").tobytes().decode("utf-32-le") == "héllo 层"
    assert source.read("note", (1, 3)).tobytes().decode("utf-32-le") == "él"
    assert rewrite(theirs, tmp_path / "ours.ckpt", crc=True) == theirs.read_bytes()


def test_types_that_mindspore_saves_but_cannot_load_are_read_and_not_written(tmp_path: Path) -> None:
    made = ("complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "hifloat8")
    for name in made:
        raw = bytes(range(BY_NAME[name].itemsize))
        tensor = serialization.Tensor_.convert_bytes_to_tensor(raw, (1,), getattr(ms, name))
        path = tmp_path / f"{name}.ckpt"
        save_with_mindspore(path, {"w": tensor})
        with pytest.raises(ValueError, match="failed to load"):
            ms.load_checkpoint(str(path))
        source = msckpt.open_file(path)
        assert source.specs["w"] == spec("w", name, 1)
        assert source.read("w").tobytes() == tensor.get_bytes()
        with pytest.raises(MappingError) as error:
            sink_for(tmp_path / "no.ckpt").begin([source.specs["w"]], {})
        assert "w" in error.value.where[0]
        assert "--dtype" in error.value.hint
        source.close()


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let both writers cut at 1 KiB instead of 512 MiB."""
    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)
    monkeypatch.setattr(msckptsink, "SLICE_BYTES", 1024)
    return 1024


@pytest.mark.parametrize("count", [255, 256, 257, 512, 513, 1000])
def test_slices_are_cut_as_mindspore_cuts_them(tmp_path: Path, small_slices: int, count: int) -> None:
    bits = some_bits(BY_NAME["float32"], (count,))
    real = {"a": ms_tensor(bits, BY_NAME["float32"]), "b": ms_tensor(bits[:3], BY_NAME["float32"])}
    theirs = save_with_mindspore(tmp_path / "theirs.ckpt", real, crc_check=True)
    ours = write(
        tmp_path / "ours.ckpt",
        [spec("a", "float32", count), spec("b", "float32", 3)],
        {"a": bits, "b": bits[:3]},
        crc=True,
    )
    assert ours == theirs
    source = msckpt.open_file(tmp_path / "theirs.ckpt")
    assert [e.length for e in source.extents("a")] == [1024] * (count // 256) + [count % 256 * 4] * (count % 256 > 0)
    assert source.read("a").tobytes() == bits.tobytes()
    loaded = ms.load_checkpoint(str(tmp_path / "ours.ckpt"), crc_check=True)
    assert loaded["a"].get_bytes() == bits.tobytes()


@pytest.mark.parametrize("shape", [(1000,), (10, 100), (1, 1000), (7, 3, 100)])
def test_equal_slices_of_the_async_writer_are_joined(tmp_path: Path, small_slices: int, shape: tuple[int, ...]) -> None:
    bits = some_bits(BY_NAME["float32"], shape)
    real = {"a": ms_tensor(bits, BY_NAME["float32"]), "empty": ms.Tensor(np.zeros((0, 4), np.float32))}
    save_with_mindspore(tmp_path / "a.ckpt", real, async_save=True)
    source = msckpt.open_file(tmp_path / "a.ckpt")
    assert source.specs["a"].shape == shape
    assert source.read("a").tobytes() == bits.tobytes()
    assert (source.specs["empty"].shape, source.extents("empty")) == ((0, 4), ())
    if shape[0] > 1:
        assert len(source.extents("a")) > 2
        assert source.read("a", (1, shape[0] - 1)).tobytes() == bits[1:-1].tobytes()


def test_rows_cross_slices_that_end_inside_a_row(tmp_path: Path, small_slices: int) -> None:
    bits = some_bits(BY_NAME["bfloat16"], (50, 37))
    write(tmp_path / "a.ckpt", [spec("a", "bfloat16", 50, 37)], {"a": bits})
    source = msckpt.open_file(tmp_path / "a.ckpt")
    assert len(source.extents("a")) == 4
    for start, stop in [(0, 50), (0, 1), (13, 14), (13, 15), (49, 50), (20, 20), (50, 50)]:
        found = source.read("a", (start, stop))
        assert (found.shape, found.tobytes()) == ((stop - start, 37), bits[start:stop].tobytes())
    for rows in [(-1, 2), (3, 2), (0, 51)]:
        with pytest.raises(ValueError, match="rows"):
            source.read("a", rows)
    with pytest.raises(KeyError):
        source.read("b")


def test_blocks_and_copies_arrive_in_any_order_from_any_thread(tmp_path: Path, small_slices: int) -> None:
    bits = some_bits(BY_NAME["uint8"], (5000,))
    specs = [spec("a", "uint8", 5000), spec("b", "uint8", 5000)]
    expected = write(tmp_path / "once.ckpt", specs, {"a": bits, "b": bits})
    (tmp_path / "raw").write_bytes(b"???" + bits.tobytes())
    sink = sink_for(tmp_path / "many.ckpt")
    sink.begin(specs, {})
    jobs = [
        threading.Thread(target=sink.write, args=("a", at, bits[at : at + 700])) for at in reversed(range(0, 5000, 700))
    ]
    jobs += [
        threading.Thread(target=sink.copy, args=("b", at, Extent(tmp_path / "raw", 3 + at, min(1500, 5000 - at))))
        for at in (3000, 0, 4500, 1500)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    sink.finish()
    assert (tmp_path / "many.ckpt").read_bytes() == expected
    with pytest.raises(ValueError, match="outside"):
        sink.write("a", 4999, bits[:2])


def test_zero_size_tensors_are_kept_where_mindspore_keeps_them(tmp_path: Path) -> None:
    specs = [spec("a", "float32", 0, 4), spec("b", "int8", 3, 0), spec("c", "float16", 2, 0, 5), spec("d", "int8", 1)]
    bits = {s.name: some_bits(s.dtype, s.shape) for s in specs}
    write(tmp_path / "a.ckpt", specs, bits)
    assert list(msckpt.open_file(tmp_path / "a.ckpt").specs.values()) == specs
    loaded = ms.load_checkpoint(str(tmp_path / "a.ckpt"))
    assert {n: tuple(p.shape) for n, p in loaded.items()} == {s.name: s.shape for s in specs}


def test_a_tensor_that_ends_like_a_trailer_gets_a_real_one(tmp_path: Path) -> None:
    raw = np.frombuffer(b"x" + b"crc_num" + bytes(6) + struct.pack(">I", 5), np.uint8)
    ours = write(tmp_path / "a.ckpt", [spec("a", "uint8", 18)], {"a": raw})
    assert ours[-17:] == b"crc_num" + bytes(6) + struct.pack(">I", zlib.crc32(ours[:-17]))
    assert msckpt.check_crc(tmp_path / "a.ckpt")
    assert msckpt.open_file(tmp_path / "a.ckpt").read("a").tobytes() == raw.tobytes()
    assert ms.load_checkpoint(str(tmp_path / "a.ckpt"))["a"].asnumpy().tobytes() == raw.tobytes()
    (tmp_path / "bare.ckpt").write_bytes(ours[:-17])  # what mindspore.save_checkpoint writes and cannot load
    bare = msckpt.open_file(tmp_path / "bare.ckpt")
    assert (bare.crc, bare.read("a").tobytes()) == (None, raw.tobytes())


@pytest.mark.parametrize("crc", [False, True])
def test_a_staged_file_is_the_same_file(tmp_path: Path, samples, crc: bool) -> None:
    specs, bits = samples
    specs = [*specs, spec("end", "uint8", 17)]  # ends like a trailer, so that one is appended in both cases
    bits["end"] = np.frombuffer(b"crc_num" + bytes(10), np.uint8)
    expected = write(tmp_path / "plain.ckpt", specs, bits, crc=crc)
    target = tmp_path / "staged.ckpt"
    with Staging(target, digest="0123456789abcdef", overwrite=False, directory=False) as staging:
        sink = msckpt.make_sink(staging.create, target.name, crc=crc)
        sink.begin(specs, {})
        for s in specs:
            sink.write(s.name, 0, bits[s.name])
        sink.finish()
        staging.commit()
    assert target.read_bytes() == expected
    assert msckpt.check_crc(target)


def test_a_damaged_byte_fails_the_checksum(tmp_path: Path) -> None:
    bits = some_bits(BY_NAME["float32"], (100,))
    save_with_mindspore(tmp_path / "a.ckpt", {"w": ms_tensor(bits, BY_NAME["float32"])}, crc_check=True)
    data = bytearray((tmp_path / "a.ckpt").read_bytes())
    seen: list[tuple[int, int]] = []
    assert msckpt.check_crc(tmp_path / "a.ckpt", lambda done, total: seen.append((done, total)))
    assert seen == [(len(data) - 17, len(data) - 17)]
    data[200] ^= 1
    (tmp_path / "b.ckpt").write_bytes(data)
    crc = msckpt.open_file(tmp_path / "b.ckpt").crc
    assert crc == msckpt.Crc(struct.unpack(">I", data[-4:])[0], len(data) - 17)
    with pytest.raises(InputError, match="checksum"):
        msckpt.check_crc(tmp_path / "b.ckpt")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (spec("", "int8", 1), "name"),
        (spec("n" * 1025, "int8", 1), "name"),
        (spec("\ud800", "int8", 1), "name"),
        (spec("x", "float32", 0), "scalar"),
        (spec("x", "int8", 2**31, 0), "axis"),
        (spec("x", "int8", *[1] * 33), "axes"),
        (spec("x", "complex32", 1), "no type"),
        (spec("x", "float8_e8m0fnu", 1), "no type"),
        (spec("x", "float4", 2), "no type"),
        (spec("x", "text", 0), "string"),
        (spec("x", "text", 2, 2), "string"),
        (spec("fine", "int8", 1), "twice"),
        (spec("fine.__param_key__3", "int8", 1), "name of fine"),
    ],
)
def test_what_mindspore_cannot_load_back_is_refused_by_name(tmp_path: Path, bad: TensorSpec, words: str) -> None:
    with pytest.raises(MappingError) as error:
        sink_for(tmp_path / "a.ckpt").begin([spec("fine", "int8", 1), bad, spec("y", "complex32", 2)], {})
    assert len(error.value.where) == 2
    assert words in error.value.where[0]
    assert "--dtype" in error.value.hint
    assert not (tmp_path / "a.ckpt").exists()


def test_every_dtype_is_either_loadable_or_refused(tmp_path: Path) -> None:
    for dtype in DTYPES:
        sink = sink_for(tmp_path / "a.ckpt")
        if dtype in LOADABLE or dtype.name == "text":
            sink.begin([TensorSpec("x", dtype, (2,))], {})
        else:
            with pytest.raises(MappingError):
                sink.begin([TensorSpec("x", dtype, (2,))], {})


def test_no_tensor_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="no tensor"):
        sink_for(tmp_path / "a.ckpt").begin([], {})


def test_twenty_thousand_tiny_tensors_take_few_calls_each_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [spec(f"model.layers.{i}.attention.wq.lora_A", "float32", 4, 6) for i in range(20_000)]
    block = np.zeros((4, 6), np.uint32)
    files: list[PlainFile] = []

    def create(name: str) -> PlainFile:
        files.append(PlainFile(tmp_path / name))
        return files[0]

    sink = msckpt.make_sink(create, "a.ckpt")
    sink.begin(specs, {})
    assert files[0].writes < 10
    for s in specs:
        sink.write(s.name, 0, block)
    sink.finish()
    reads: list[int] = []
    read = msckpt.FileBytes.read

    def counted(self: msckpt.FileBytes, offset: int, length: int) -> bytes:
        reads.append(length)
        return read(self, offset, length)

    monkeypatch.setattr(msckpt.FileBytes, "read", counted)
    source = msckpt.open_file(tmp_path / "a.ckpt")
    assert list(source.specs.values()) == specs
    assert 0 < len(reads) < len(specs) / 10
    assert sum(reads) < 2 * (tmp_path / "a.ckpt").stat().st_size


def test_opening_a_large_file_reads_its_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [spec(f"w{i}", "float32", 1 << 30) for i in range(8)]  # 4 GiB each, as holes, in 8 slices
    sink = sink_for(tmp_path / "a.ckpt")
    sink.begin(specs, {})
    read = 0
    pread = os.pread

    def counted(fd: int, length: int, offset: int) -> bytes:
        nonlocal read
        data = pread(fd, length, offset)
        read += len(data)
        return data

    monkeypatch.setattr(os, "pread", counted)
    source = msckpt.open_file(tmp_path / "a.ckpt")
    assert list(source.specs.values()) == specs
    assert len(source.extents("w0")) == 8
    assert {e.length for e in source.extents("w0")} == {512 << 20}
    assert read < 1 << 20
    assert not source.read("w7", ((1 << 30) - 5, 1 << 30)).any()


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    bits = some_bits(BY_NAME["float32"], (100,))
    path = tmp_path / "a.ckpt"
    write(path, [spec("a", "float32", 100)], {"a": bits})
    source = msckpt.open_file(path)
    os.utime(path, ns=(0, 0))
    with pytest.raises(InputError, match="changed"):
        source.read("a")
    os.truncate(path, 100)
    with pytest.raises(InputError, match="ended early"):
        source.read("a")


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple).filter(lambda shape: shape != (0,))
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(lambda n: ".__param_key__" not in n)
tensors = st.dictionaries(names, st.tuples(st.sampled_from(LOADABLE), shapes, st.integers(0, 99)), min_size=1)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors, st.booleans(), st.integers(1, 64))
def test_what_is_written_is_read_back(
    tmp_path: Path, made: dict[str, tuple[DType, tuple[int, ...], int]], crc: bool, slice_bytes: int
) -> None:
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape, _) in made.items()]
    bits = {name: some_bits(dtype, shape, seed) for name, (dtype, shape, seed) in made.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(msckptsink, "SLICE_BYTES", slice_bytes)
        write(tmp_path / "a.ckpt", specs, bits, crc=crc)
    source = msckpt.open_file(tmp_path / "a.ckpt")
    assert list(source.specs.values()) == specs
    assert (source.crc is not None) == crc
    for s in specs:
        assert source.read(s.name).tobytes() == bits[s.name].tobytes()
        parts = [Path(e.path).read_bytes()[e.offset : e.offset + e.length] for e in source.extents(s.name)]
        assert b"".join(parts) == bits[s.name].tobytes()
    source.close()
