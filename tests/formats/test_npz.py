"""numpy's .npz archives, both ways, with numpy as the judge."""

from __future__ import annotations

import io
import threading
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from disk_files import into
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lorabridge.dtypes import BY_NAME
from lorabridge.errors import InputError, MappingError
from lorabridge.formats import identify, make_sink, npz, open_source
from lorabridge.tensors import Extent, TensorSpec

TYPES = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32",
         "float64", "complex64", "complex128"]  # fmt: skip


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    out = {f"base_model.model.{t}.weight": (rng.standard_normal((5, 3)) * 9).astype(t) for t in TYPES}
    out["scalar"] = np.float32(2.5).reshape(())
    out["empty"] = np.zeros((0, 4), np.float16)
    out["columns"] = np.asfortranarray(rng.standard_normal((6, 7)))
    out["ünicode/part"] = np.arange(24, dtype="<i4").reshape(2, 3, 4)
    return out


def write(path: Path, data: dict[str, np.ndarray]) -> bytes:
    sink = make_sink("npz", into(path.parent), path.name)  # type: ignore[arg-type]
    specs = [TensorSpec(n, BY_NAME[v.dtype.name], v.shape) for n, v in data.items()]
    sink.begin(specs, {})
    jobs = []
    for name, value in data.items():
        raw = np.frombuffer(value.tobytes(), np.uint8)
        jobs += [threading.Thread(target=sink.write, args=(name, i, raw[i : i + 7])) for i in range(0, len(raw), 7)]
    for job in reversed(jobs):
        job.start()
    for job in jobs:
        job.join()
    sink.finish()
    return path.read_bytes()


def test_what_numpy_saves_is_read(tmp_path: Path) -> None:
    data = arrays()
    np.savez(tmp_path / "a.npz", **data)
    source = open_source(tmp_path / "a.npz")
    assert source.format == "npz"
    assert list(source.specs) == list(data)
    for name, value in data.items():
        bits = source.read(name)
        assert bits.flags.c_contiguous
        assert (bits.shape, bits.tobytes()) == (value.shape, value.tobytes())
        assert source.specs[name].dtype.name == value.dtype.name
        if value.ndim and value.shape[0] > 3:
            assert source.read(name, (1, 3)).tobytes() == value[1:3].tobytes()
        extents = source.extents(name)
        if extents:
            raw = (tmp_path / "a.npz").read_bytes()
            assert raw[extents[0].offset : extents[0].offset + extents[0].length] == value.tobytes()
    assert source.extents("columns") == ()
    source.close()


def test_numpy_reads_what_is_written(tmp_path: Path) -> None:
    data = arrays()
    write(tmp_path / "a.npz", data)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as loaded:
        assert list(loaded) == list(data)
        for name, value in data.items():
            assert loaded[name].dtype == value.dtype
            assert loaded[name].tobytes() == value.tobytes()
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert archive.testzip() is None
    source = open_source(tmp_path / "a.npz")
    assert all(source.read(name).tobytes() == value.tobytes() for name, value in data.items())


@settings(deadline=None, max_examples=40)
@given(
    value=hnp.arrays(
        st.sampled_from([np.dtype(t) for t in TYPES]), hnp.array_shapes(min_dims=0, max_dims=5, min_side=0)
    )
)
def test_headers_are_numpys_own(value: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, value)
    ours = npz.npy_header(TensorSpec("a", BY_NAME[value.dtype.name], value.shape))
    assert np.lib.format.read_array(io.BytesIO(ours + value.tobytes())).tobytes() == value.tobytes()
    assert len(ours) % 64 == 0


def test_ranges_are_copied(tmp_path: Path) -> None:
    value = np.arange(1000, dtype=np.float32)
    (tmp_path / "raw").write_bytes(b"--" + value.tobytes())
    sink = make_sink("npz", into(tmp_path), "a.npz")  # type: ignore[arg-type]
    sink.begin([TensorSpec("a", BY_NAME["float32"], (1000,))], {})
    sink.copy("a", 1600, Extent(tmp_path / "raw", 1602, 2400))
    sink.copy("a", 0, Extent(tmp_path / "raw", 2, 1600))
    with pytest.raises(ValueError, match="outside"):
        sink.write("a", 3999, np.zeros(2, np.uint8))
    sink.finish()
    assert np.load(tmp_path / "a.npz")["a"].tobytes() == value.tobytes()


def npy(descr: object = "<f4", shape: object = (2,), order: object = False, data: bytes = bytes(8)) -> bytes:
    text = repr({"descr": descr, "fortran_order": order, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def archive(path: Path, *members: bytes, names: tuple[str, ...] = (), compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for number, member in enumerate(members):
            file.writestr(names[number] if names else f"m{number}.npy", member)
    return path


@pytest.mark.parametrize(
    ("member", "words"),
    [
        (npy("|O"), "Python objects"),
        (npy("<U4"), "no number"),
        (npy("<V2"), "no number"),
        (npy([("a", "<f4")]), "table of records"),
        (npy(">f4"), "big-endian"),
        (npy(shape=(3,)), "needs 12 bytes"),
        (npy(shape=(1 << 62, 1 << 62)), "shape that is none"),
        (npy(shape=(1 << 40, 1 << 40)), "needs"),
        (npy(shape=(-2,)), "shape that is none"),
        (npy(shape=(True, 2)), "shape that is none"),
        (npy(shape=[2]), "shape that is none"),
        (npy(order=1), "order"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "too long or cut off"),
        (b"\x93NUMPY\x01\x00\x08\x00{[[[[[[[", "no dictionary"),
        (b"\x93NUMPY\x04\x00" + bytes(20), "does not begin"),
        (b"hello", "does not begin"),
        (b"\x93NUMPY\x01\x00\x09\x00__import__('os').system('touch x')", "no dictionary"),
    ],
)
def test_what_is_no_plain_array_is_refused(tmp_path: Path, member: bytes, words: str) -> None:
    path = archive(tmp_path / "a.npz", npy(), member)
    with pytest.raises(InputError, match=words) as error:
        npz.open_file(path)
    assert "m1.npy" in error.value.text()


def test_compressed_damaged_and_odd_archives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="compressed"):
        npz.open_file(archive(tmp_path / "a.npz", npy(), compression=zipfile.ZIP_DEFLATED))
    with pytest.raises(InputError, match=r"no \.npy member"):
        npz.open_file(archive(tmp_path / "b.npz", npy(), b"x", names=("a.npy", "readme.txt")))
    with pytest.raises(InputError, match="plain relative path"):
        npz.open_file(archive(tmp_path / "c.npz", npy(), names=("../a.npy",)))
    np.savez(tmp_path / "d.npz", a=np.arange(100.0))
    raw = bytearray((tmp_path / "d.npz").read_bytes())
    raw[400] ^= 1
    (tmp_path / "d.npz").write_bytes(raw)
    with pytest.raises(InputError, match="checksum"):
        npz.open_file(tmp_path / "d.npz").read("a")
    (tmp_path / "e.npz").write_bytes(raw[:-30])
    with pytest.raises(InputError):
        npz.open_file(tmp_path / "e.npz")
    assert identify(tmp_path / "d.npz").format == "npz"


def test_numpys_bfloat16_is_refused_both_ways(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", w=np.ones(3, ml_dtypes.bfloat16))
    with pytest.raises(InputError, match="no number"):
        open_source(tmp_path / "a.npz")
    sink = make_sink("npz", into(tmp_path), "b.npz")  # type: ignore[arg-type]
    with pytest.raises(MappingError, match="numpy has no such type"):
        sink.begin([TensorSpec("w", BY_NAME["bfloat16"], (3,))], {})


@pytest.mark.parametrize("name", ["", "a//b", "../a", "a\\b", "\ud800"])
def test_names_that_no_member_can_have_are_refused(tmp_path: Path, name: str) -> None:
    sink = make_sink("npz", into(tmp_path), "b.npz")  # type: ignore[arg-type]
    with pytest.raises(MappingError, match="names"):
        sink.begin([TensorSpec(name, BY_NAME["float32"], (3,))], {})
