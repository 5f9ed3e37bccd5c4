"""``merge --undo``, ``unmerge`` and ``switch`` on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from console import Invoke
from safetensors.numpy import load_file, save_file


@pytest.fixture
def base(tmp_path: Path, peft_dir: Path) -> Path:
    """A model under the adapter of ``peft_dir``, whose factors also get another scaling in ``other``."""
    rng = np.random.default_rng(1)
    factors = load_file(peft_dir / "adapter_model.safetensors")
    tensors = {"layer.0.norm.weight": np.ones(8, np.float16)}
    for name, a in factors.items():
        if name.endswith("lora_A.weight"):
            rows = factors[name.replace("lora_A", "lora_B")].shape[0]
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            tensors[f"{path}.weight"] = (rng.standard_normal((rows, a.shape[1])) * 0.1).astype(np.float16)
    save_file(tensors, tmp_path / "base.safetensors", metadata={"format": "pt"})
    shutil.copytree(peft_dir, tmp_path / "other")
    config = json.loads((peft_dir / "adapter_config.json").read_text())
    for folder, alpha in ((peft_dir, 8), (tmp_path / "other", 3)):
        told = {**config, "lora_alpha": alpha, "fan_in_fan_out": False}
        (folder / "adapter_config.json").write_text(json.dumps(told))
    return tmp_path / "base.safetensors"


@pytest.fixture
def merged(tmp_path: Path, base: Path, peft_dir: Path, invoke: Invoke) -> Path:
    done = invoke("merge", base, peft_dir, tmp_path / "merged.safetensors", "--undo", tmp_path / "u")
    assert done.code == 0
    assert f"undo file {tmp_path / 'u'}: " in done.out
    return tmp_path / "merged.safetensors"


def same(path: Path, other: Path) -> bool:
    mine, theirs = load_file(path), load_file(other)
    return {k: v.tobytes() for k, v in mine.items()} == {k: v.tobytes() for k, v in theirs.items()}


def test_there_and_back(tmp_path: Path, base: Path, merged: Path, peft_dir: Path, invoke: Invoke) -> None:
    assert not same(base, merged)
    out = tmp_path / "back.safetensors"
    done = invoke("unmerge", merged, out, "--adapter", peft_dir, "--undo", tmp_path / "u")
    assert (done.code, done.err) == (0, "")
    assert "restored 2 parameters bit for bit" in done.out
    assert "digests of the base agree" in done.out
    assert same(base, out)


def test_without_the_file_it_warns(tmp_path: Path, merged: Path, peft_dir: Path, invoke: Invoke) -> None:
    done = invoke("unmerge", merged, tmp_path / "near.safetensors", "--adapter", peft_dir, "-v")
    assert done.code == 0
    assert "approximately" in done.out
    assert "expected to differ from the base" in done.out
    assert "expected wrong" in done.out
    assert "layer.0.query.weight" in done.out
    assert "warning: without an undo file the result is only near to the base" in done.err
    assert "bit for bit" not in done.out + done.err


def test_json_documents(tmp_path: Path, base: Path, merged: Path, peft_dir: Path, invoke: Invoke) -> None:
    args = ["--adapter", peft_dir, "--json"]
    exact = json.loads(invoke("unmerge", merged, tmp_path / "a.safetensors", *args, "--undo", tmp_path / "u").out)
    near = json.loads(invoke("unmerge", merged, tmp_path / "b.safetensors", *args).out)
    assert exact["schema"] == near["schema"] == "lorabridge/unmerge/1"
    assert (exact["exact"], near["exact"]) == (True, False)
    assert exact["rows"] == []
    assert {row["parameter"] for row in near["rows"]} == {"layer.0.query.weight", "layer.0.value.weight"}
    undo = json.loads(
        invoke("merge", base, peft_dir, tmp_path / "c.safetensors", "--undo", tmp_path / "v", "--json").out
    )["undo"]
    assert undo["added"] == 2
    assert undo["nbytes"] == (tmp_path / "v").stat().st_size
    assert json.loads(invoke("merge", base, peft_dir, tmp_path / "d.safetensors", "--json").out)["undo"] is None


def test_switching(tmp_path: Path, base: Path, merged: Path, peft_dir: Path, invoke: Invoke) -> None:
    other, out, right = tmp_path / "other", tmp_path / "switched.safetensors", tmp_path / "right.safetensors"
    assert invoke("merge", base, other, right).code == 0
    pair = ["--from", peft_dir, "--to", other]
    done = invoke("switch", merged, *pair, out, "--undo", tmp_path / "u", "--undo-out", tmp_path / "v")
    assert done.code == 0
    assert "through the exact base" in done.out
    assert f"undo file {tmp_path / 'v'}: " in done.out
    assert same(out, right)
    near = invoke("switch", merged, *pair, tmp_path / "near.safetensors")
    assert "through the best inverse, not the exact base" in near.out
    assert "warning: " in near.err
    found = json.loads(invoke("switch", merged, *pair, tmp_path / "x.safetensors", "--json").out)
    assert (found["schema"], found["exact"]) == ("lorabridge/switch/1", False)


def test_the_wrong_adapter_exits_with_4_and_a_damaged_file_with_3(
    tmp_path: Path, merged: Path, peft_dir: Path, invoke: Invoke
) -> None:
    out = tmp_path / "back.safetensors"
    wrong = invoke("unmerge", merged, out, "--adapter", tmp_path / "other", "--undo", tmp_path / "u")
    assert wrong.code == 4
    assert "another delta was merged into it" in wrong.err
    (tmp_path / "u").write_bytes((tmp_path / "u").read_bytes()[:-3])
    damaged = invoke("unmerge", merged, out, "--adapter", peft_dir, "--undo", tmp_path / "u")
    assert damaged.code == 3
    assert "damaged" in damaged.err
    assert not out.exists()


def test_options_that_contradict_each_other(tmp_path: Path, merged: Path, peft_dir: Path, invoke: Invoke) -> None:
    out = tmp_path / "x.safetensors"
    told = invoke("unmerge", merged, out, "--adapter", peft_dir, "--undo", tmp_path / "u", "--exact")
    assert told.code == 2
    assert "--weights and --exact are what --undo knows" in told.err
    lost = invoke("switch", merged, out, "--from", peft_dir, "--to", peft_dir, "--undo-out", tmp_path / "v")
    assert lost.code == 2
    assert "--undo-out needs --undo" in lost.err
    assert invoke("unmerge", merged, out).code == 2
