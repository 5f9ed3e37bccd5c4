"""Files that torch.save wrote before the zip format: read like the others, bounded, without torch."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from lorabridge.errors import InputError
from lorabridge.formats import open_source
from lorabridge.formats.torchlegacy import MAGIC

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64)


def legacy(value: object, path: Path) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "old.bin"


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    tensors = {str(dtype): (torch.randn(3, 5) * 3).to(dtype) for dtype in DTYPES}
    return tensors | {"shared": base, "turned": base.t(), "part": base[2:4], "none": torch.zeros(0, 3)}


def test_every_tensor_is_torch_s_bit_for_bit(path: Path) -> None:
    wanted = state()
    source = open_source(legacy(wanted, path))
    assert list(source.specs) == list(wanted)
    for name, tensor in wanted.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert np.ascontiguousarray(source.read(name)).tobytes() == raw
        assert source.specs[name].shape == tuple(tensor.shape)
    part = source.extents("part")[0]
    assert path.read_bytes()[part.offset : part.offset + part.length] == wanted["part"].numpy().tobytes()
    assert np.array_equal(source.read("shared", (1, 3)), wanted["shared"][1:3].numpy().view(np.uint32))


def test_a_training_checkpoint_and_many_tensors_are_read(path: Path) -> None:
    many = {f"layers.{i}.{'x' * 90}.weight": torch.full((1,), float(i)) for i in range(9000)}
    source = open_source(legacy({"state_dict": many, "epoch": 3}, path))
    assert len(source.specs) == 9000
    last = list(many)[-1]
    assert source.read(last).view(np.float32)[0] == 8999.0
    assert [name for name, _ in source.skipped] == ["epoch"]


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1 + 1",)


def test_code_is_not_run_and_names_it(path: Path) -> None:
    with pytest.raises(InputError, match=r"eval"):
        open_source(legacy({"w": torch.ones(2), "evil": Evil()}, path))


@pytest.mark.parametrize("cut", [16, 60, 200, -1, -9])
def test_cut_files_are_refused(path: Path, cut: int) -> None:
    raw = legacy({"w": torch.ones(4)}, path).read_bytes()
    path.write_bytes(raw[:cut])
    with pytest.raises(InputError):
        open_source(path)


def test_what_contradicts_itself_is_refused(path: Path) -> None:
    raw = legacy({"w": torch.ones(4)}, path).read_bytes()
    path.write_bytes(raw + b"\0")
    with pytest.raises(InputError, match="1 bytes follow the last storage"):
        open_source(path)
    path.write_bytes(raw[:-24] + (5).to_bytes(8, "little") + raw[-16:])
    with pytest.raises(InputError, match="is not where it should be"):
        open_source(path)
    path.write_bytes(MAGIC + pickle.dumps(1000, protocol=2) + raw[len(MAGIC) + 6 :])
    with pytest.raises(InputError, match="the protocol is 1000, not 1001"):
        open_source(path)
