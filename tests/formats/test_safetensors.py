"""The safetensors container against the safetensors library, torch and MindSpore."""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from disk_files import into
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge.dtypes import BY_NAME, BY_SAFETENSORS, DTYPES, DType
from lorabridge.errors import LorabridgeError, MappingError
from lorabridge.formats.safetensors import NAME, SUFFIXES, make_sink, open_file
from lorabridge.tensors import TensorSpec

ALL = sorted(BY_SAFETENSORS)
MINDSPORE = ["BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F16", "BF16", "F32", "F64"]


def noise(nbytes: int, *, boolean: bool = False) -> np.ndarray:
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)
    return data % 2 if boolean else data


def write(
    directory: Path, tensors: dict[TensorSpec, np.ndarray], metadata: dict[str, str] | None = None, **options: str
) -> Path:
    sink = make_sink(into(directory), "x.safetensors", **options)
    sink.begin(list(tensors), metadata or {})
    for spec, data in tensors.items():
        sink.write(spec.name, 0, data)
    sink.finish()
    return directory / "x.safetensors"


def bits(array: np.ndarray) -> bytes:
    return array.tobytes()


def code(dtype: DType) -> str:
    assert dtype.safetensors
    return dtype.safetensors


def test_the_module_names_itself() -> None:
    assert (NAME, SUFFIXES) == ("safetensors", (".safetensors",))


@pytest.mark.parametrize("name", [d.name for d in DTYPES if d.safetensors and d.torch])
def test_reads_every_dtype_torch_saves(name: str, tmp_path: Path) -> None:
    dtype = BY_NAME[name]
    raw = noise(6 * dtype.itemsize, boolean=name == "bool")
    tensor = torch.from_numpy(raw.copy()).view(getattr(torch, name)).reshape(2, 3)
    safetensors.torch.save_file(
        {"w": tensor, "scalar": tensor[0, 0].clone(), "none": tensor[:0].clone()}, tmp_path / "w"
    )
    source = open_file(tmp_path / "w")
    assert source.specs["w"] == TensorSpec("w", dtype, (2, 3))
    assert source.specs["scalar"].shape == ()
    assert source.specs["none"].shape == (0, 3)
    assert bits(source.read("w")) == raw.tobytes()
    assert source.read("w").dtype == dtype.carrier()
    assert bits(source.read("scalar")) == raw.tobytes()[: dtype.itemsize]
    assert source.read("none").shape == (0, 3)
    assert source.read("w").flags["C_CONTIGUOUS"]
    assert source.read("w").flags["WRITEABLE"]


@pytest.mark.parametrize("name", ALL)
def test_the_library_reads_every_dtype_we_write(name: str, tmp_path: Path) -> None:
    dtype = BY_SAFETENSORS[name]
    spec = TensorSpec("w", dtype, (4, 2))
    raw = noise(spec.nbytes, boolean=name == "BOOL")
    path = write(tmp_path, {spec: raw})
    ((found, info),) = safetensors.deserialize(path.read_bytes())
    assert (found, info["dtype"], list(info["shape"])) == ("w", name, [4, 2])
    assert bytes(info["data"]) == raw.tobytes()
    if not name.startswith("F6"):  # torch has no six-bit type
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert bits(file.get_tensor("w").view(torch.uint8).numpy()) == raw.tobytes()
    assert bits(open_file(path).read("w")) == raw.tobytes()


def test_mindspore_reads_what_we_write(tmp_path: Path) -> None:
    mindspore = pytest.importorskip("mindspore")
    mindspore.train.serialization._get_available_memory = lambda: None
    tensors: dict[TensorSpec, np.ndarray] = {}
    for name in MINDSPORE:
        for suffix, shape in (("", (2, 3)), (".scalar", ()), (".none", (0, 4))):
            spec = TensorSpec(name + suffix, BY_SAFETENSORS[name], shape)
            tensors[spec] = noise(spec.nbytes, boolean=name == "BOOL")
    path = write(tmp_path, tensors, flavour="ms")
    assert open_file(path).metadata == {"format": "ms"}
    loaded = mindspore.load_checkpoint(str(path), format="safetensors")
    assert set(loaded) == {spec.name for spec in tensors}
    for spec, raw in tensors.items():
        assert loaded[spec.name].shape == spec.shape
        assert str(loaded[spec.name].dtype).lower().replace("bool_", "bool") == spec.dtype.name
        if spec.size:
            assert bits(loaded[spec.name].asnumpy()) == raw.tobytes()


def test_reads_what_mindspore_writes(tmp_path: Path) -> None:
    mindspore = pytest.importorskip("mindspore")
    values = {
        "z": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.array(7, np.int64),
        "h": np.ones(3, np.float16),
    }
    parameters = [{"name": name, "data": mindspore.Tensor(value)} for name, value in values.items()]
    mindspore.save_checkpoint(parameters, str(tmp_path / "m.safetensors"), format="safetensors")
    source = open_file(tmp_path / "m.safetensors")
    assert source.metadata == {"format": "ms"}
    for name, value in values.items():
        assert source.specs[name].shape == value.shape
        assert bits(source.read(name)) == value.tobytes()


def test_copying_a_library_file_gives_the_same_bytes(tmp_path: Path) -> None:
    state = {
        "z": torch.randn(3, 2),
        'a.é\x1b"\\': torch.randn(5),
        "h": torch.ones((), dtype=torch.bfloat16),
        "d": torch.ones(1, dtype=torch.float64),
        "u": torch.ones(3, dtype=torch.uint8),
        "none": torch.ones(0, 2),
    }
    safetensors.torch.save_file(state, tmp_path / "l", metadata={"format": "pt"})
    source = open_file(tmp_path / "l")
    sink = make_sink(into(tmp_path), "x.safetensors")
    sink.begin(list(source.specs.values()), source.metadata)
    for name in reversed(list(source.specs)):
        for extent in source.extents(name):
            sink.copy(name, 0, extent)
    sink.finish()
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "l").read_bytes()


def header(path: Path) -> dict[str, dict[str, list[int]]]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def test_the_given_order_stays_where_it_is_aligned(tmp_path: Path) -> None:
    specs = [
        TensorSpec(n, BY_NAME[d], s)
        for n, d, s in (("h", "float16", (2,)), ("z", "float32", (1,)), ("a", "int64", (1,)))
    ]
    path = write(tmp_path, {spec: noise(spec.nbytes) for spec in specs})
    assert [name for name in header(path) if name != "__metadata__"] == ["h", "z", "a"]
    assert list(open_file(path).specs) == ["h", "z", "a"]


def test_wider_elements_come_first_where_the_order_is_not_aligned(tmp_path: Path) -> None:
    specs = [
        TensorSpec(n, BY_NAME[d], (1,)) for n, d in (("u", "uint8"), ("z", "float32"), ("d", "float64"), ("a", "int32"))
    ]
    path = write(tmp_path, {spec: noise(spec.nbytes) for spec in specs})
    assert list(open_file(path).specs) == ["d", "z", "a", "u"]
    begins = [(entry["data_offsets"][0], name) for name, entry in header(path).items() if name != "__metadata__"]
    assert begins == sorted(begins)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_specs_follow_the_data_not_the_header(tmp_path: Path) -> None:
    entries = {
        "second": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
        "none": {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [1, 1]},
        "first": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    }
    text = json.dumps(entries).encode()
    (tmp_path / "w").write_bytes(len(text).to_bytes(8, "little") + text + b"abc")
    source = open_file(tmp_path / "w")
    assert list(source.specs) == ["first", "none", "second"]
    assert bits(source.read("second")) == b"bc"
    assert source.read("none").shape == (0, 2**40)
    assert source.extents("none") == ()


def test_metadata_travels_sorted_and_the_callers_format_wins(tmp_path: Path) -> None:
    metadata = {"z": "\u202e\n", "format": "np", "a": "x" * 2_000_000}
    path = write(tmp_path, {}, metadata)
    assert list(open_file(path).metadata.items()) == sorted(metadata.items())
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == metadata


def test_an_empty_file_without_tensors_is_valid(tmp_path: Path) -> None:
    assert safetensors.numpy.load_file(write(tmp_path, {})) == {}
    safetensors.numpy.save_file({}, tmp_path / "e")
    assert open_file(tmp_path / "e").specs == {}


def test_rows_beyond_four_gibibytes_are_read_alone(tmp_path: Path) -> None:
    rows, columns = 5000, 2**20
    entry = {"w": {"dtype": "U8", "shape": [rows, columns], "data_offsets": [0, rows * columns]}}
    text = json.dumps(entry).encode()
    with open(tmp_path / "w", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + rows * columns)
        file.seek(8 + len(text) + 4999 * columns)
        file.write(b"\7\7")
    block = open_file(tmp_path / "w").read("w", (4998, 5000))
    assert block.shape == (2, columns)
    assert block.sum() == 14
    assert block[1, 1] == 7


def test_rows_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    specs = {
        TensorSpec(n, BY_SAFETENSORS[c], s): s
        for n, c, s in (("w", "F32", (2, 3)), ("s", "F32", ()), ("f", "F4", (3, 2)), ("g", "F6_E2M3", (4, 1)))
    }
    source = open_file(write(tmp_path, {spec: noise(spec.nbytes) for spec in specs}))
    for name, rows in (("w", (0, 3)), ("w", (-1, 1)), ("w", (2, 1)), ("s", (0, 1)), ("g", (0, 1))):
        with pytest.raises(ValueError, match="rows"):
            source.read(name, rows)
    assert source.read("f", (1, 3)).shape == (2,)
    assert bits(source.read("f", (1, 3))) == bits(source.read("f"))[1:]
    with pytest.raises(KeyError):
        source.read("absent")


def test_many_threads_read_one_source(tmp_path: Path) -> None:
    specs = [TensorSpec(f"t{i}", BY_NAME["int64"], (1000,)) for i in range(32)]
    source = open_file(write(tmp_path, {spec: np.full(1000, i) for i, spec in enumerate(specs)}))
    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda i: set(source.read(f"t{i % 32}").tolist()), range(320)))
    assert values == [{i % 32} for i in range(320)]


def test_reading_after_close_fails(tmp_path: Path) -> None:
    spec = TensorSpec("w", BY_NAME["int64"], (1,))
    source = open_file(write(tmp_path, {spec: noise(8)}))
    source.close()
    with pytest.raises(ValueError, match="closed"):
        source.read("w")


@pytest.mark.parametrize(
    ("spec", "flavour", "problem"),
    [
        (TensorSpec("w", BY_NAME["complex128"], (1,)), "hf", "no element type complex128"),
        (TensorSpec("w", BY_NAME["text"], (1,)), "hf", "no element type text"),
        (TensorSpec("w", BY_NAME["int4"], (1,)), "ms", "no element type int4"),
        (TensorSpec("w", BY_NAME["complex64"], (1,)), "ms", "MindSpore reads no complex64"),
        (TensorSpec("w", BY_NAME["float8_e4m3fn"], (1,)), "ms", "MindSpore reads no float8_e4m3fn"),
        (TensorSpec("format", BY_NAME["float32"], (1,)), "ms", "metadata key"),
        (TensorSpec("note", BY_NAME["float32"], (1,)), "ms", "metadata key"),
        (TensorSpec("__metadata__", BY_NAME["float32"], (1,)), "hf", "reserved"),
        (TensorSpec("", BY_NAME["float32"], (1,)), "hf", "empty"),
        (TensorSpec("\ud800", BY_NAME["float32"], (1,)), "hf", "surrogate"),
        (TensorSpec("n" * 4097, BY_NAME["float32"], (1,)), "hf", "4097 bytes"),
        (TensorSpec("w", BY_NAME["float32"], (1,) * 33), "hf", "33 axes"),
        (TensorSpec("w", BY_NAME["float4"], (3,)), "hf", "inside a byte"),
        (TensorSpec("twice", BY_NAME["float32"], (1,)), "hf", "occurs twice"),
    ],
)
def test_what_a_file_cannot_hold_is_refused_by_name(
    spec: TensorSpec, flavour: str, problem: str, tmp_path: Path
) -> None:
    other = TensorSpec("twice", BY_NAME["float32"], (1,))
    sink = make_sink(into(tmp_path), "x.safetensors", flavour=flavour)  # type: ignore[arg-type]
    with pytest.raises(MappingError, match=problem) as caught:
        sink.begin([other, spec], {"note": ""})
    assert "x.safetensors" in caught.value.where[0]
    assert len(caught.value.where) == 1
    assert list(tmp_path.iterdir()) == []


def test_every_tensor_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    specs = [TensorSpec(f"w{i}", BY_NAME["complex128"], (1,)) for i in range(30)]
    with pytest.raises(MappingError) as caught:
        make_sink(into(tmp_path), "x.safetensors").begin(specs, {})
    assert len(caught.value.where) == 30


def test_a_tensor_written_in_part_or_twice_is_a_defect(tmp_path: Path) -> None:
    spec = TensorSpec("w", BY_NAME["float32"], (4,))
    for number, blocks in enumerate([[], [(0, 8)], [(0, 16), (0, 16)]]):
        sink = make_sink(into(tmp_path), f"{number}.safetensors")
        sink.begin([spec], {})
        for offset, length in blocks:
            sink.write("w", offset, np.zeros(length, np.uint8))
        with pytest.raises(LorabridgeError, match="exactly once"):
            sink.finish()
        with pytest.raises(ValueError, match="outside"):
            sink.write("w", 15, np.zeros(2, np.uint8))


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@settings(deadline=None, max_examples=80)
@given(
    data=st.data(),
    names=st.lists(NAMES, max_size=6, unique=True),
    metadata=st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=3),
)
def test_what_is_written_is_read_back_bit_for_bit(
    data: st.DataObject, names: list[str], metadata: dict[str, str]
) -> None:
    tensors: dict[TensorSpec, np.ndarray] = {}
    for name in names:
        dtype = BY_SAFETENSORS[data.draw(st.sampled_from(ALL))]
        shape = data.draw(SHAPES)
        if np.prod(shape, dtype=object) * dtype.bits % 8:
            shape = (*shape, 4)
        spec = TensorSpec(name, dtype, shape)
        tensors[spec] = np.frombuffer(data.draw(st.binary(min_size=spec.nbytes, max_size=spec.nbytes)), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), tensors, metadata)
        source = open_file(path)
        assert dict(source.metadata) == {"format": "pt", **metadata}
        assert set(source.specs.values()) == set(tensors)
        judge = dict(safetensors.deserialize(path.read_bytes()))
        assert set(judge) == set(names)
        for spec, raw in tensors.items():
            assert bits(source.read(spec.name)) == raw.tobytes() == bytes(judge[spec.name]["data"])
            if spec.shape and spec.dtype.bits >= 8:
                stop = data.draw(st.integers(0, spec.shape[0]))
                start = data.draw(st.integers(0, stop))
                assert bits(source.read(spec.name, (start, stop))) == bits(source.read(spec.name)[start:stop])
        source.close()


def test_metadata_that_is_null_is_none(tmp_path: Path) -> None:
    """As mlx 0.32 writes it and safetensors reads it."""
    header = b'{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\x80\x3f")
    assert safetensors.numpy.load_file(path)["a"].tolist() == [1.0]
    source = open_file(path)
    assert source.metadata == {}
    assert source.read("a").tobytes() == b"\0\0\x80\x3f"
    source.close()
