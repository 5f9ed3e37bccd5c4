"""Marks travel inside every container, and the frameworks' own loaders pass over them."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lorabridge import formats
from lorabridge.dtypes import BY_NAME
from lorabridge.errors import InputError
from lorabridge.files.fsio import Staging
from lorabridge.formats.marks import RECORD
from lorabridge.formats.wire import PRIVATE, delimited
from lorabridge.tensors import TensorSpec

MARKS = {"lorabridge.merged": '{"adapters": ["ä"]}', "lorabridge.base": "x" * 5000}
SPECS = [TensorSpec("a.weight", BY_NAME["float32"], (3, 4)), TensorSpec("b", BY_NAME["float32"], (2,))]
VALUES = {spec.name: np.arange(spec.size, dtype=np.float32).reshape(spec.shape) for spec in SPECS}


def write(path: Path, metadata: dict[str, str], **options: object) -> Path:
    with Staging(path, digest="0" * 64, overwrite=False, directory=False) as staging:
        sink = formats.make_sink(formats.format_for(path), staging.create, path.name, **options)  # type: ignore[arg-type]
        sink.begin(SPECS, metadata)
        for name, value in VALUES.items():
            sink.write(name, 0, value)
        sink.finish()
        staging.commit()
    return path


def check(path: Path, metadata: dict[str, str]) -> None:
    source = formats.open_source(path)
    assert {key: text for key, text in source.metadata.items() if key.startswith("lorabridge.")} == metadata
    for name, value in VALUES.items():
        assert np.array_equal(source.read(name).view(np.float32), value)
    source.close()


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".ckpt"])
@pytest.mark.parametrize("metadata", [{}, MARKS], ids=["none", "marks"])
def test_marks_come_back_from_every_container(tmp_path: Path, suffix: str, metadata: dict[str, str]) -> None:
    check(write(tmp_path / f"file{suffix}", {"format": "pt", **metadata}), metadata)


@pytest.mark.parametrize("crc", [False, True])
def test_mindspore_passes_over_them(tmp_path: Path, crc: bool) -> None:
    import mindspore

    path = write(tmp_path / "file.ckpt", MARKS, crc=crc)
    loaded = mindspore.load_checkpoint(str(path), crc_check=crc)
    assert {name: value.asnumpy().tolist() for name, value in loaded.items()} == {
        name: value.tolist() for name, value in VALUES.items()
    }


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_passes_over_them(tmp_path: Path, mapped: bool) -> None:
    loaded = torch.load(write(tmp_path / "file.bin", MARKS), weights_only=True, mmap=mapped)
    assert {name: value.tolist() for name, value in loaded.items()} == {
        name: value.tolist() for name, value in VALUES.items()
    }


def test_the_tensors_of_a_torch_file_lie_where_they_lay_without_marks(tmp_path: Path) -> None:
    places = []
    for name, metadata in (("one/file.bin", {}), ("two/file.bin", MARKS)):
        (tmp_path / name).parent.mkdir()
        source = formats.open_source(write(tmp_path / name, metadata))
        places.append([extent.offset for spec in SPECS for extent in source.extents(spec.name)])
        source.close()
    assert places[0] == places[1]


@pytest.mark.parametrize("raw", [b"[]", b'{"other": "x"}', b'{"lorabridge.x": 1}', b"{", b"\xff"])
def test_marks_that_are_none_are_refused(tmp_path: Path, raw: bytes) -> None:
    ckpt = write(tmp_path / "file.ckpt", {})
    ckpt.write_bytes(ckpt.read_bytes() + delimited(PRIVATE, len(raw)) + raw)
    torch_file = write(tmp_path / "file.bin", {})
    with zipfile.ZipFile(torch_file, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"file/{RECORD}", raw)
    for path in (ckpt, torch_file):
        with pytest.raises(InputError, match=r"marks of lorabridge are malformed|does not hold|cannot be used|zip"):
            formats.open_source(path)
