"""MindFormers' iteration directories: pieces of eight ranks, described by metadata.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lorabridge.actions.reassemble import reassemble
from lorabridge.distributed import open_distributed
from lorabridge.errors import InputError

DATA = Path(__file__).parent / "data" / "mindformers_ckpt2"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a copy of the iterations to spoil."""
    return Path(shutil.copytree(DATA, tmp_path / "run"))


def test_every_tensor_comes_back_with_its_optimizer_state(tmp_path: Path) -> None:
    done = reassemble(DATA / "iteration_00000001", tmp_path / "whole.safetensors")
    whole = load_file(tmp_path / "whole.safetensors")
    full = dict(np.load(DATA / "full.npz"))
    assert done.left_out == ()
    assert whole.keys() == full.keys()
    assert all(np.array_equal(whole[name], full[name]) for name in whole)
    source = open_distributed(DATA / "iteration_00000001")
    assert source is not None
    assert all(np.array_equal(source.read(name).view(np.float32), full[name]) for name in full)


def test_the_latest_iteration_is_taken_where_the_run_names_it(root: Path) -> None:
    with pytest.raises(InputError, match=r"latest_checkpointed_iteration\.txt is missing"):
        open_distributed(root)
    (root / "latest_checkpointed_iteration.txt").write_text("1\n")
    found = open_distributed(root)
    assert found is not None
    assert found.path.name == "iteration_00000001"
    with pytest.raises(InputError, match="no iteration 5") as caught:
        open_distributed(root, step="5")
    assert "--step: 1" in str(caught.value)


def spoil(root: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> Path:
    path = root / "iteration_00000001" / "metadata.json"
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))
    return path.parent


def test_what_is_missing_or_disagrees_is_named(root: Path) -> None:
    lost = root / "iteration_00000001" / "llm-model-0000003-0000008.safetensors"
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(InputError, match="llm-model-0000003"):
        open_distributed(root / "iteration_00000001")
    lost.write_bytes(kept)

    piece = "('n.b0.up.w', (5,))"
    place = spoil(root, lambda m: m["storage_data"].pop(piece))
    with pytest.raises(InputError, match=r"n\.b0\.up\.w: piece 5 is in no file"):
        open_distributed(place)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", ""])
def test_files_elsewhere_are_refused(root: Path, name: str) -> None:
    key = "('n.b0.up.w', (5,))"
    place = spoil(root, lambda m: m["storage_data"].update({key: [{"file_name": name, "storage_rank": 0}]}))
    with pytest.raises(InputError, match="names no plain file"):
        open_distributed(place)


def test_shapes_that_do_not_divide_are_refused(root: Path) -> None:
    def change(metadata: dict[str, dict[str, object]]) -> None:
        about = metadata["state_dict_metadata"]["n.b0.up.w"]
        assert isinstance(about, dict)
        about["axis_fragmentations"] = [7, 1]

    with pytest.raises(InputError, match=r"shape \[64, 16\] does not divide into \[7, 1\]"):
        open_distributed(spoil(root, change))


def test_metadata_of_another_project_is_no_iteration(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    assert open_distributed(tmp_path) is None
