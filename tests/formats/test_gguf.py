"""GGUF files, both ways, with the gguf package as the judge."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf as judge
import ml_dtypes
import numpy as np
import pytest
from disk_files import into

from lorabridge.dtypes import BY_NAME
from lorabridge.errors import InputError, MappingError
from lorabridge.formats import gguf, identify, make_sink, open_source
from lorabridge.tensors import Extent, TensorSpec

TYPES = {
    "float32": "F32",
    "float16": "F16",
    "float64": "F64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    out = {f"blk.0.{t}.weight.lora_a": (rng.standard_normal((3, 5)) * 9).astype(t) for t in TYPES}
    out["output_norm.weight"] = rng.standard_normal(7).astype(np.float32)
    out["deep"] = rng.standard_normal((2, 3, 4, 5)).astype(np.float16)
    return out


def save(path: Path, data: dict[str, np.ndarray]) -> None:
    writer = judge.GGUFWriter(str(path), "llama")
    writer.add_type(judge.GGUFType.ADAPTER)
    writer.add_string(judge.Keys.Adapter.TYPE, "lora")
    writer.add_float32(judge.Keys.Adapter.LORA_ALPHA, 16.5)
    writer.add_uint32("x.u32", 7)
    writer.add_bool("x.bool", True)
    writer.add_array("x.words", ["a", "b:c"])
    writer.add_array("x.numbers", [1, -2])
    writer.add_string("x.text", "f32:1.5")
    writer.add_uint64("x.u64", 1 << 60)
    writer.add_float64("x.f64", 0.1)
    for name, value in data.items():
        writer.add_tensor(name, value)
    bits = np.arange(6, dtype=np.uint16).reshape(2, 3)
    writer.add_tensor("bf16", bits.view(np.uint8), raw_dtype=judge.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(path: Path, data: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    sink = make_sink("gguf", into(path.parent), path.name)  # type: ignore[arg-type]
    sink.begin([TensorSpec(n, BY_NAME[v.dtype.name], v.shape) for n, v in data.items()], metadata)
    for name, value in reversed(data.items()):
        raw = np.frombuffer(value.tobytes(), np.uint8)
        for at in reversed(range(0, len(raw), 11)):
            sink.write(name, at, raw[at : at + 11])
    sink.finish()


SAID = {
    "general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora",
    "adapter.lora.alpha": "f32:16.5",
    "x.u32": "u32:7", "x.bool": "bool:true", "x.words": '[str]:["a", "b:c"]', "x.numbers": "[i32]:[1, -2]",
    "x.text": "str:f32:1.5", "x.u64": f"u64:{1 << 60}", "x.f64": "f64:0.1",
}  # fmt: skip


def test_what_the_gguf_package_writes_is_read(tmp_path: Path) -> None:
    data = arrays()
    save(tmp_path / "a.gguf", data)
    assert identify(tmp_path / "a.gguf").format == "gguf"
    source = open_source(tmp_path / "a.gguf")
    assert source.metadata == SAID
    assert list(source.specs) == [*data, "bf16"]
    raw = (tmp_path / "a.gguf").read_bytes()
    for name, value in data.items():
        assert source.specs[name] == TensorSpec(name, BY_NAME[value.dtype.name], value.shape)
        assert source.read(name).tobytes() == value.tobytes()
        assert source.read(name, (1, 2)).tobytes() == value[1:2].tobytes()
        (extent,) = source.extents(name)
        assert raw[extent.offset : extent.offset + extent.length] == value.tobytes()
    assert (source.specs["bf16"].dtype.name, source.specs["bf16"].shape) == ("bfloat16", (2, 3))
    assert source.read("bf16").tobytes() == np.arange(6, dtype=np.uint16).tobytes()
    source.close()


def test_the_gguf_package_reads_what_is_written(tmp_path: Path) -> None:
    data = {**arrays(), "bf16": np.ones((2, 3), ml_dtypes.bfloat16)}
    write(tmp_path / "a.gguf", data, {**SAID, "format": "pt"})
    reader = judge.GGUFReader(str(tmp_path / "a.gguf"))
    assert [tensor.name for tensor in reader.tensors] == list(data)
    for tensor in reader.tensors:
        value = data[tensor.name]
        assert tuple(tensor.shape)[::-1] == value.shape
        assert tensor.tensor_type.name == TYPES.get(value.dtype.name, "BF16")
        assert tensor.data.tobytes() == value.tobytes()
        assert tensor.data_offset % 32 == 0
    assert reader.fields["adapter.lora.alpha"].contents() == 16.5
    assert reader.fields["x.words"].contents() == ["a", "b:c"]
    assert reader.fields["x.text"].contents() == "f32:1.5"
    assert reader.fields["x.bool"].contents() is True
    assert "format" not in reader.fields
    again = open_source(tmp_path / "a.gguf")
    assert again.metadata == SAID
    assert all(again.read(name).tobytes() == value.tobytes() for name, value in data.items())


def test_the_same_bytes_as_the_gguf_package(tmp_path: Path) -> None:
    data = {"a": np.arange(5, dtype=np.float32), "b": np.ones((2, 3), np.float16)}
    writer = judge.GGUFWriter(str(tmp_path / "theirs.gguf"), "llama")
    writer.add_float32("adapter.lora.alpha", 3.0)
    for name, value in data.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write(tmp_path / "ours.gguf", data, {"general.architecture": "llama", "adapter.lora.alpha": "f32:3.0"})
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_ranges_are_copied(tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(b"-" + bytes(range(40)))
    sink = make_sink("gguf", into(tmp_path), "a.gguf")  # type: ignore[arg-type]
    sink.begin([TensorSpec("a", BY_NAME["int8"], (40,))], {})
    sink.copy("a", 20, Extent(tmp_path / "raw", 21, 20))
    sink.copy("a", 0, Extent(tmp_path / "raw", 1, 20))
    with pytest.raises(ValueError, match="outside"):
        sink.write("a", 39, np.zeros(2, np.uint8))
    sink.finish()
    assert open_source(tmp_path / "a.gguf").read("a").tobytes() == bytes(range(40))


def test_quantized_tensors_are_named(tmp_path: Path) -> None:
    writer = judge.GGUFWriter(str(tmp_path / "a.gguf"), "llama")
    block = judge.quants.quantize(np.ones((2, 32), np.float32), judge.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight", block, raw_dtype=judge.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="quantized") as error:
        open_source(tmp_path / "a.gguf")
    assert "blk.0.attn_q.weight" in error.value.text()


def head(tensors: int = 0, pairs: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def text(word: bytes) -> bytes:
    return struct.pack("<Q", len(word)) + word


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    axes = b"".join(struct.pack("<Q", n) for n in shape)
    return text(name) + struct.pack("<I", len(shape)) + axes + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"GGUF", "cut off"),
        (head(version=1), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (head(tensors=1 << 40), "tensors are more"),
        (head(pairs=1 << 40), "pairs are more"),
        (head(pairs=1) + struct.pack("<Q", 1 << 50), "bytes of a string"),
        (head(pairs=1) + text(b"a") + struct.pack("<I", 77), "no type of a value"),
        (head(pairs=1) + text(b"a") + struct.pack("<IIQ", 9, 4, 1 << 50), "items of an array"),
        (head(pairs=1) + text(b"a") + struct.pack("<IIQ", 9, 9, 1), "no type of a value"),
        (head(pairs=2) + (text(b"a") + struct.pack("<IB", 0, 1)) * 2, "occurs twice"),
        (head(pairs=1) + text(b"\xff") + struct.pack("<IB", 0, 1), "not UTF-8"),
        (head(pairs=1) + text(b"general.alignment") + struct.pack("<II", 4, 7), "alignment"),
        (head(tensors=1) + tensor(b"a", (2,), 0, 0), "lies where it cannot"),
        (head(tensors=1) + tensor(b"a", (2,), 0, 1) + bytes(100), "lies where it cannot"),
        (head(tensors=1) + tensor(b"", (2,), 0, 0) + bytes(100), "is empty or occurs twice"),
        (head(tensors=2) + tensor(b"a", (2,), 0, 0) * 2 + bytes(200), "occurs twice"),
        (head(tensors=2) + tensor(b"a", (20,), 0, 0) + tensor(b"b", (2,), 0, 32) + bytes(200), "lies where it cannot"),
        (head(tensors=1) + tensor(b"a", (1 << 61, 1 << 61), 0, 0) + bytes(100), "lies where it cannot"),
        (head(tensors=1) + tensor(b"a", (1,) * 5, 0, 0) + bytes(100), "axes are more"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(InputError, match=words):
        gguf.open_file(tmp_path / "a.gguf")


def test_other_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x05\x06" + bytes(18))
    with pytest.raises(InputError, match="zip"):
        gguf.open_file(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [("a" * 64, "float32", (2,)), ("", "float32", (2,)), ("a", "uint8", (2,)), ("a", "float32", ()),
     ("a", "float32", (0, 2)), ("a", "float32", (1,) * 5)],
)  # fmt: skip
def test_what_ggml_cannot_hold_is_refused(tmp_path: Path, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    sink = make_sink("gguf", into(tmp_path), "a.gguf")  # type: ignore[arg-type]
    with pytest.raises(MappingError, match="cannot be held"):
        sink.begin([TensorSpec(name, BY_NAME[dtype], shape)], {})
