"""The torch zip container against torch itself and against Python's zipfile."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import tempfile
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from disk_files import DiskFile, into
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge.dtypes import BY_TORCH, DTYPES
from lorabridge.errors import InputError, LorabridgeError, MappingError
from lorabridge.formats import storedzip
from lorabridge.formats.torchzip import NAME, SUFFIXES, TorchSource, make_sink, open_file, verify_crc
from lorabridge.formats.untrusted import open_regular
from lorabridge.tensors import Extent, TensorSpec

ALL = sorted(BY_TORCH)


def noise(name: str, count: int) -> torch.Tensor:
    """Random bits of a torch dtype: NaN payloads, infinities and subnormals included."""
    dtype = getattr(torch, name)
    if count == 0:
        return torch.empty(0, dtype=dtype)
    data = np.random.default_rng(count).integers(0, 256, count * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(data % 2 if name == "bool" else data).view(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's C-order bytes as torch lays them out."""
    flat = tensor.detach().contiguous().clone().reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # a single element may keep an odd stride
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def saved(value: object, path: Path, **options: object) -> TorchSource:
    torch.save(value, path, **options)  # type: ignore[arg-type]
    return open_file(path)


def repacked(source: Path, target: Path, **changes: bytes) -> Path:
    """Rewrite an archive with Python's zipfile, some records changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            name = info.filename.partition("/")[2]
            new.writestr(f"archive/{name}", changes.get(name, old.read(info)))
    return target


def written(directory: Path, tensors: dict[TensorSpec, bytes], name: str = "out.pt") -> Path:
    sink = make_sink(into(directory), name)
    sink.begin(list(tensors), {"format": "pt"})
    for spec, data in tensors.items():
        sink.write(spec.name, 0, np.frombuffer(data, spec.dtype.carrier()))
    sink.finish()
    return directory / name


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.pt"


def test_the_module_names_itself() -> None:
    assert (NAME, SUFFIXES) == ("torch", (".bin", ".pt", ".pth"))


# Reading what torch.save writes


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_every_dtype_that_torch_has(path: Path, protocol: int) -> None:
    tensors = {name: noise(name, 24).reshape(2, 3, 4) for name in ALL}
    source = saved(tensors, path, pickle_protocol=protocol)
    assert list(source.specs) == ALL
    for name, tensor in tensors.items():
        spec = source.specs[name]
        assert (spec.dtype, spec.shape) == (BY_TORCH[name], (2, 3, 4))
        read = source.read(name)
        assert read.dtype == spec.dtype.carrier()
        assert read.tobytes() == bits(tensor)
        assert source.read(name, (1, 2)).tobytes() == bits(tensor[1:])
    assert (source.format, source.path, source.metadata, source.skipped) == ("torch", path, {}, ())


def test_no_numeric_dtype_of_torch_is_unknown() -> None:
    found = {str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype)}
    sub_byte = {f"{sign}int{n}" for sign in ("", "u") for n in range(1, 8)}
    assert found - set(BY_TORCH) - sub_byte <= {"qint8", "quint8", "qint32", "quint4x2", "quint2x4"} | {
        "bits1x8", "bits2x4", "bits4x2", "bits8", "bits16",
    }  # fmt: skip


def views() -> dict[str, torch.Tensor]:
    base = torch.arange(60, dtype=torch.float32)
    return {
        "whole": base,
        "matrix": base.reshape(6, 10),
        "transposed": base.reshape(6, 10).T,
        "rows": base.reshape(6, 10)[2:4],
        "columns": base.reshape(6, 10)[:, 2:4],
        "stepped": base[3::7],
        "permuted": base.reshape(3, 4, 5).permute(2, 0, 1),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.randn(3, 1).expand(3, 4),
        "expanded scalar": torch.tensor(2.5).expand(2, 3),
        "windows": base.as_strided((5, 6), (3, 1), 2),
        "scalar": torch.tensor(7.0),
        "scalar view": base[5],
        "empty": torch.zeros(0),
        "empty rows": torch.zeros(0, 5),
        "empty columns": torch.zeros(5, 0, 2),
        "empty tail": base[60:],
        "ones": torch.zeros(1, 1, 1),
        "odd strides": torch.zeros(4).as_strided((1, 4), (99, 1)),
    }


def test_reads_views_of_shared_and_padded_storages(path: Path) -> None:
    tensors = views()
    source = saved(tensors, path)
    for name, tensor in tensors.items():
        read = source.read(name)
        assert (read.shape, read.tobytes()) == (tuple(tensor.shape), bits(tensor)), name
        assert read.flags.c_contiguous
        assert read.flags.writeable
        for start in range(tensor.shape[0] if tensor.dim() else 0):
            part = source.read(name, (start, start + 2) if start + 2 <= tensor.shape[0] else (start, start))
            assert part.tobytes() == bits(tensor[start : start + part.shape[0]]), name


def test_extents_are_the_bytes_of_contiguous_tensors(path: Path) -> None:
    tensors = views()
    source = saved(tensors, path)
    data = path.read_bytes()
    for name, tensor in tensors.items():
        extents = source.extents(name)
        if tensor.is_contiguous() and tensor.numel():
            (extent,) = extents
            assert extent.path == path
            assert data[extent.offset : extent.offset + extent.length] == bits(tensor), name
        else:
            assert extents == ()


@st.composite
def strided(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    stride = [draw(st.integers(0, 9)) for _ in shape]
    offset = draw(st.integers(0, 7))
    reach = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if math.prod(shape) else 0
    base = noise(draw(st.sampled_from(["float32", "bfloat16", "uint64", "complex128", "bool"])), max(reach, 0) + 1)
    return base.as_strided(shape, stride, offset if math.prod(shape) else 0)


@given(strided(), st.data())
@settings(deadline=None, max_examples=80)
def test_any_strided_view_reads_as_torch_reads_it(tensor: torch.Tensor, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        source = saved({"t": tensor}, Path(directory) / "x.pt")
        assert source.read("t").tobytes() == bits(tensor)
        if tensor.dim():
            start = data.draw(st.integers(0, tensor.shape[0]))
            stop = data.draw(st.integers(start, tensor.shape[0]))
            assert source.read("t", (start, stop)).tobytes() == bits(tensor[start:stop])
        source.close()


def test_reads_parameters_buffers_and_tensors_with_attributes(path: Path) -> None:
    parameter = torch.nn.Parameter(torch.randn(2, 3))
    marked = torch.nn.Parameter(torch.randn(2))
    marked.note = "kept by torch, not by us"  # type: ignore[attr-defined]
    plain = torch.randn(3)
    plain.note = [1]  # type: ignore[attr-defined]
    tensors = {"p": parameter, "m": marked, "t": plain, "b": torch.nn.Buffer(torch.randn(4)), "tied": parameter}
    source = saved(tensors, path)
    for name, tensor in tensors.items():
        assert source.read(name).tobytes() == bits(tensor)
    assert source.extents("p") == source.extents("tied")


def test_reads_a_state_dict_with_its_metadata_attribute(path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    source = saved(net.state_dict(), path)
    assert list(source.specs) == list(net.state_dict())
    assert all(source.read(name).tobytes() == bits(tensor) for name, tensor in net.state_dict().items())
    assert source.skipped == ()


def test_finds_the_state_dict_of_a_training_checkpoint_and_lists_the_rest(path: Path) -> None:
    net = torch.nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    checkpoint = {
        "state_dict": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "best": 0.5,
        "args": {"lr": 1e-3, "device": torch.device("cpu"), "dtype": torch.float16, "seen": {1, 2}},
        "counter": Counter("aab"),
        "scheduler": None,
        "rng": [torch.get_rng_state()],
        "score": np.float64(2.0),
        7: True,
    }
    source = saved(checkpoint, path)
    assert list(source.specs) == ["weight", "bias"]
    assert source.read("weight").tobytes() == bits(net.weight)
    assert dict(source.skipped) == {
        "optimizer": "a mapping of 2 entries",
        "epoch": "an integer",
        "best": "a number",
        "args": "a mapping of 4 entries",
        "counter": "an object of collections.Counter",
        "scheduler": "None",
        "rng": "a list of 1 values",
        "score": "an object of numpy.core.multiarray.scalar",
        "7": "a truth value",
    }


@pytest.mark.parametrize("key", ["model", "module", "state_dict", "anything"])
def test_the_name_of_the_nested_mapping_does_not_matter(path: Path, key: str) -> None:
    source = saved({"step": 1, key: {"w": torch.ones(2), "version": "1"}}, path)
    assert list(source.specs) == ["w"]
    assert source.skipped == (("step", "an integer"), (f"{key}.version", "a string"))


def test_lists_what_is_no_tensor_in_a_flat_mapping(path: Path) -> None:
    source = saved({"w": torch.ones(2), "epoch": 3, "name": "x", "raw": torch.ones(2).untyped_storage()}, path)
    assert list(source.specs) == ["w"]
    assert source.skipped == (("epoch", "an integer"), ("name", "a string"), ("raw", "a bare storage"))


def test_several_candidates_are_refused_with_the_choices_and_key_chooses(path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}, "rng": torch.zeros(1)}, path)
    with pytest.raises(InputError) as caught:
        open_file(path)
    assert [choice in caught.value.text() for choice in ("model,", "ema,", "the top mapping,")] == [True] * 3
    assert open_file(path, key="ema").read("w").tobytes() == bytes(8)
    assert list(open_file(path, key="").specs) == ["rng"]
    with pytest.raises(InputError, match="no mapping"):
        open_file(path, key="other")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (torch.ones(2), "holds a tensor"),
        ([torch.ones(2)], "holds a list of 1 values"),
        ({"epoch": 3}, "no mapping of names to tensors"),
        ({"a": {"b": {"w": torch.ones(1)}}}, "no mapping of names to tensors"),
        ({"w": torch.ones(2), 3: torch.ones(1)}, "a key is an integer"),
        ({"w": torch.ones(2), "": torch.ones(1)}, "'' is no name"),
        ({"w": torch.ones(2), "n" * 5000: torch.ones(1)}, "is no name"),
        ({"w": torch.ones(1, 2).to_sparse()}, "w is a sparse tensor"),
        ({"w": torch.zeros(2, device="meta")}, "w is a meta tensor"),
        ({"w": torch.ones(2, dtype=torch.complex64).conj()}, "w is a conjugated or negated view"),
        ({"w": torch.ones(2, dtype=torch.complex64).conj().imag}, "w is a conjugated or negated view"),
        ({"w": torch.nested.nested_tensor([torch.ones(2), torch.ones(1)])}, "w is a nested tensor"),
        ({"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "w is a quantized tensor"),
    ],
)
def test_what_is_no_mapping_of_dense_tensors_is_refused_by_name(path: Path, value: object, problem: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, path)
    with pytest.raises(InputError) as caught:
        open_file(path)
    assert problem in caught.value.text()
    assert str(path) in caught.value.text()


def test_an_unsupported_tensor_beside_the_chosen_mapping_is_only_listed(path: Path) -> None:
    source = saved({"model": {"w": torch.ones(2)}, "sparse": [torch.ones(1, 2).to_sparse()]}, path)
    assert source.skipped == (("sparse", "a list of 1 values"),)


def test_an_empty_mapping_is_an_empty_source(path: Path) -> None:
    assert saved({}, path).specs == {}


def test_torchscript_files_are_refused_by_name(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(InputError, match="TorchScript"):
        open_file(path)
    np.savez(path.with_suffix(".npz"), w=np.ones(2))
    with pytest.raises(InputError, match="npz"):
        open_file(path.with_suffix(".npz"))


# Byte order, checksums


def test_big_endian_archives_are_swapped_element_by_element(path: Path, tmp_path: Path) -> None:
    tensors = {name: noise(name, 6).reshape(2, 3) for name in ALL}
    tensors["float32 T"] = noise("float32", 6).reshape(2, 3).T
    torch.save(tensors, path)
    changes = {"byteorder": b"big"}
    for i, tensor in enumerate(tensors.values()):
        width = tensor.dtype.itemsize // (2 if tensor.is_complex() else 1)
        whole = np.asarray(tensor.untyped_storage().tolist(), np.uint8).tobytes()
        changes[f"data/{i}"] = np.frombuffer(whole, f"u{width}").byteswap().tobytes()
    big = repacked(path, tmp_path / "big.pt", **changes)
    source, judge = open_file(big), torch.load(big, weights_only=True)
    for name, tensor in tensors.items():
        assert source.read(name).tobytes() == bits(tensor), name
        assert source.extents(name) == () or tensor.dtype.itemsize == 1
        # torch 2.13 does not swap untyped storages, which it uses for the newer types
        if not name.startswith(("uint16", "uint32", "uint64", "complex32")):
            assert bits(judge[name]) == bits(tensor), name


def test_archives_repacked_by_zipfile_are_read(path: Path, tmp_path: Path) -> None:
    torch.save({"w": torch.arange(5.0)}, path)
    source = open_file(repacked(path, tmp_path / "y.pt"))
    assert source.read("w").tobytes() == bits(torch.arange(5.0))
    verify_crc(source)


def test_a_changed_payload_is_noticed_by_read_and_by_verify(path: Path) -> None:
    source = saved({"a": torch.arange(100.0), "t": torch.arange(6.0).reshape(2, 3).T}, path)
    verify_crc(source)
    for name in source.specs:
        record = source.records["data/" + str(list(source.specs).index(name))]
        for at in (0, record.size // 2, record.size - 1):
            data = bytearray(path.read_bytes())
            data[record.offset + at] ^= 16
            path.write_bytes(data)
            damaged = open_file(path)
            with pytest.raises(InputError, match="checksum"):
                damaged.read(name)
            with pytest.raises(InputError) as caught:
                verify_crc(damaged)
            assert caught.value.where == (f"{path}: {record.name}",)
            data[record.offset + at] ^= 16
            path.write_bytes(data)
    verify_crc(open_file(path))


def test_archives_without_checksums_are_read(path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        source = saved({"w": torch.arange(5.0)}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert source.records["data/0"].crc == 0
    assert source.read("w").tobytes() == bits(torch.arange(5.0))
    verify_crc(source)


def test_verify_reports_progress(path: Path) -> None:
    steps: list[tuple[int, int]] = []
    verify_crc(saved({"w": torch.zeros(10)}, path), progress=lambda done, total: steps.append((done, total)))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] == steps[-1][1]


def test_a_file_that_shrinks_after_opening_is_an_error(path: Path) -> None:
    source = saved({"w": torch.zeros(1000)}, path)
    os.truncate(path, 500)
    with pytest.raises(InputError, match="ended early"):
        source.read("w")


def test_unknown_names_and_rows_are_programming_errors(path: Path) -> None:
    source = saved({"w": torch.zeros(3, 2), "s": torch.tensor(1)}, path)
    with pytest.raises(KeyError):
        source.read("v")
    for name, rows in (("w", (2, 4)), ("w", (-1, 2)), ("w", (2, 1)), ("s", (0, 1))):
        with pytest.raises(ValueError, match="rows"):
            source.read(name, rows)


# Writing


def specimens() -> dict[TensorSpec, bytes]:
    shapes = [(2, 3), (), (0,), (4, 0, 2), (1, 1, 1, 1, 1), (300,), (70000,)]
    made = {}
    for dtype in (d for d in DTYPES if d.torch):
        for shape in shapes:
            spec = TensorSpec(f"{dtype}.{'x'.join(map(str, shape))}é\n", dtype, shape)
            made[spec] = bits(noise(str(dtype.torch), spec.size))
    return made


def test_torch_loads_every_dtype_and_shape_bit_for_bit(tmp_path: Path) -> None:
    tensors = specimens()
    path = written(tmp_path, tensors)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    for options in ({}, {"mmap": True}):
        loaded = torch.load(path, weights_only=True, **options)
        assert list(loaded) == [spec.name for spec in tensors]
        for spec, data in tensors.items():
            tensor = loaded[spec.name]
            assert (tensor.dtype, tuple(tensor.shape)) == (getattr(torch, str(spec.dtype.torch)), spec.shape)
            assert tensor.is_contiguous()
            assert not tensor.requires_grad
            assert bits(tensor) == data
    source = open_file(path)
    verify_crc(source)
    assert list(source.specs.values()) == list(tensors)
    assert all(source.read(spec.name).tobytes() == data for spec, data in tensors.items())


def test_strides_and_module_loading_are_those_of_torch(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 1), torch.nn.Linear(3, 0))
    tensors = {
        TensorSpec(name, BY_TORCH["float32"], tuple(tensor.shape)): bits(tensor)
        for name, tensor in net.state_dict().items()
    }
    loaded = torch.load(written(tmp_path, tensors), weights_only=True)
    assert {n: t.stride() for n, t in loaded.items()} == {n: t.stride() for n, t in net.state_dict().items()}
    twin = torch.nn.Sequential(torch.nn.Conv1d(2, 3, 1), torch.nn.Linear(3, 0))
    assert str(twin.load_state_dict(loaded)) == "<All keys matched successfully>"
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_torch_computes_the_offsets_of_our_records(tmp_path: Path) -> None:
    from torch.utils.serialization import config

    path = written(tmp_path, specimens())
    records = open_file(path).records
    with config.patch({"load.calculate_storage_offsets": True}):  # trusts the layout instead of reading headers
        loaded = torch.load(path, weights_only=True, mmap=True)
    for i, (spec, data) in enumerate(specimens().items()):
        assert records[f"data/{i}"].offset % 64 == 0
        assert bits(loaded[spec.name]) == data


def layout(path: Path) -> Iterator[tuple[bytes, bytes]]:
    """Pair the structural bytes of a file of torch with those we would write for the same records."""
    raw = path.open("rb")
    with open_regular(path) as file:
        top, found = storedzip.read_directory(file, path)
    placed, start, total = storedzip.place(top, [(name, record.size) for name, record in found.items()])
    assert total == path.stat().st_size
    for mine, record in zip(placed, found.values(), strict=True):
        assert dataclasses.replace(mine, crc=record.crc) == record
        raw.seek(record.offset + record.size)
        after = storedzip.descriptor(record)
        yield raw.read(len(after)), after
        if record.size < 2**32 - 1:  # torch leaves one of the two sizes zero in the local zip64 field
            raw.seek(record.header)
            yield (
                raw.read(record.offset - record.header),
                storedzip.local_header(record.name, record.header, record.size),
            )
    raw.seek(start)
    yield raw.read(), storedzip.directory(list(found.values()), start)


def test_our_layout_is_that_of_torch(path: Path) -> None:
    torch.save({"a": torch.zeros(3), "e": torch.zeros(0), "b": torch.zeros(1000)}, path)
    assert all(theirs == ours for theirs, ours in layout(path))


def test_our_layout_is_that_of_torch_beyond_4_gib(path: Path) -> None:
    tensors = {"a": torch.empty(2**30 + 5), "b": torch.zeros(3), "c": torch.empty(2**30), "d": torch.zeros(0)}
    with torch.serialization.skip_data():  # reserves the space without touching it: the file is sparse
        torch.save(tensors, path)
    assert path.stat().st_size > 2**33
    assert all(theirs == ours for theirs, ours in layout(path))
    source = open_file(path)
    assert source.extents("c")[0].offset > 2**32
    assert source.read("c", (2**30 - 3, 2**30)).tobytes() == bytes(12)
    assert source.read("b").tobytes() == bytes(12)


def test_more_than_65535_records_are_listed(tmp_path: Path) -> None:
    records, start, total = storedzip.place("x", [(f"data/{i}", 0) for i in range(66000)])
    data = b"".join(storedzip.local_header(record.name, record.header, 0) for record in records)
    data += storedzip.directory(records, start)
    assert len(data) == total
    (tmp_path / "x").write_bytes(data)
    assert len(zipfile.ZipFile(io.BytesIO(data)).namelist()) == 66000
    with open_regular(tmp_path / "x") as file:
        assert len(storedzip.read_directory(file, tmp_path / "x")[1]) == 66000


def test_bytes_do_not_depend_on_order_blocks_threads_or_metadata(tmp_path: Path) -> None:
    tensors = specimens()
    whole = written(tmp_path, tensors, "w.pt").read_bytes()
    (tmp_path / "blocks").mkdir()
    sink = make_sink(into(tmp_path / "blocks"), "w.pt")
    sink.begin(list(tensors), {"anything": "else"})
    jobs = []
    for spec, data in tensors.items():
        carrier = spec.dtype.carrier()
        step = 999 * carrier.itemsize
        for at in range(0, len(data), step):
            jobs.append((spec.name, at, np.frombuffer(data[at : at + step], carrier)))
    np.random.default_rng(0).shuffle(jobs)  # type: ignore[arg-type]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: sink.write(*job), jobs))
    sink.finish()
    assert (tmp_path / "blocks" / "w.pt").read_bytes() == whole


def test_copied_ranges_get_their_checksums(tmp_path: Path) -> None:
    data = np.random.default_rng(1).bytes(9 * 2**20)
    (tmp_path / "source").write_bytes(data)
    spec = TensorSpec("w", BY_TORCH["float32"], (9 * 2**18,))
    sink = make_sink(into(tmp_path), "c.bin")
    sink.begin([spec], {})
    sink.copy("w", 2**20, Extent(tmp_path / "source", 2**20, 8 * 2**20))
    sink.copy("w", 0, Extent(tmp_path / "source", 0, 2**20))
    sink.finish()
    verify_crc(open_file(tmp_path / "c.bin"))
    assert zipfile.ZipFile(tmp_path / "c.bin").testzip() is None
    assert bits(torch.load(tmp_path / "c.bin", weights_only=True)["w"]) == data


def test_a_tensor_not_written_exactly_once_fails_the_run(tmp_path: Path) -> None:
    spec = TensorSpec("w", BY_TORCH["uint8"], (10,))
    for i, pieces in enumerate([[], [(0, 9)], [(1, 9)], [(0, 5), (6, 4)], [(0, 6), (5, 5)], [(0, 10), (0, 10)]]):
        sink = make_sink(into(tmp_path), f"{i}.pt")
        sink.begin([spec], {})
        for offset, length in pieces:
            sink.write("w", offset, np.zeros(length, np.uint8))
        with pytest.raises(LorabridgeError, match="exactly once"):
            sink.finish()
    with pytest.raises(ValueError, match="outside"):
        sink.write("w", 5, np.zeros(6, np.uint8))


def test_what_torch_cannot_hold_is_refused_before_a_file_exists(tmp_path: Path) -> None:
    impossible = [TensorSpec(d.name, d, (2,)) for d in DTYPES if d.torch is None]
    sink = make_sink(into(tmp_path), "x.pt")
    with pytest.raises(MappingError) as caught:
        sink.begin(impossible, {})
    assert len(caught.value.where) == len(impossible) > 0
    good = TensorSpec("w", BY_TORCH["uint8"], (1,))
    for bad in ("", "w", "\ud800", "n" * 4097):
        with pytest.raises(MappingError):
            sink.begin([good, TensorSpec(bad, BY_TORCH["uint8"], (1,))], {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["adapter_model.bin", "a.b.pt", "...", ".pt", "no suffix", "ü\\x.pth", "\udcff.pt"])
def test_any_file_name_gives_a_readable_archive(name: str, tmp_path: Path) -> None:
    spec = TensorSpec("w", BY_TORCH["uint8"], (1,))
    sink = make_sink(lambda _: DiskFile(tmp_path / "file"), name)
    sink.begin([spec], {})
    sink.write("w", 0, np.ones(1, np.uint8))
    sink.finish()
    assert open_file(tmp_path / "file").read("w").tobytes() == b"\1"
    assert torch.load(tmp_path / "file", weights_only=True)["w"].tolist() == [1]


def test_an_empty_checkpoint_round_trips(tmp_path: Path) -> None:
    path = written(tmp_path, {})
    assert torch.load(path, weights_only=True) == {}
    assert open_file(path).specs == {}


@pytest.mark.parametrize("size", [255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**40, 2**62])
def test_large_sizes_are_pickled_as_integers(size: int, tmp_path: Path) -> None:
    spec = TensorSpec("w", BY_TORCH["uint8"], (0, size))
    path = written(tmp_path, {spec: b""})
    assert tuple(torch.load(path, weights_only=True)["w"].shape) == (0, size)
    assert open_file(path).specs["w"] == spec


@given(st.binary(max_size=300), st.binary(max_size=300))
@settings(deadline=None, max_examples=50)
def test_checksums_of_blocks_combine(first: bytes, second: bytes) -> None:
    from zlib import crc32

    assert storedzip.combine_crc(crc32(first), crc32(second), len(second)) == crc32(first + second)


def test_ordered_dicts_of_ordered_dicts_are_read(path: Path) -> None:
    source = saved(OrderedDict(model=OrderedDict(w=torch.ones(2)), step=1), path)
    assert list(source.specs) == ["w"]
