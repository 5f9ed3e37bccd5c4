"""A reassembly into shards that is killed half way: what is finished stays, the rest is written by the next run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.reassemble import reassemble
from lorabridge.actions.reshard import ReshardOptions, reshard
from lorabridge.distributed.parallel import Sizes
from lorabridge.files import fsio

KILLED = """
import os, sys
from pathlib import Path
from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.reassemble import reassemble
from lorabridge.files import fsio

closed, close = [], fsio.OutFile.close
def dies(self):
    close(self)
    closed.append(self)
    if len(closed) == 2:
        os._exit(9)
fsio.OutFile.close = dies
reassemble(Path(sys.argv[1]), sys.argv[2], ConvertOptions(max_shard_size=3000, workers=1))
"""


def test_finished_shards_of_a_killed_run_are_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    model = {
        f"model.layers.{i}.attention.wq.weight": rng.standard_normal((32, 16)).astype(np.float32) for i in range(6)
    }
    save_file(model, tmp_path / "model.safetensors", {"format": "ms"})
    reshard(tmp_path / "model.safetensors", tmp_path / "ranks", ReshardOptions(sizes=Sizes(2)))
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "ranks"), f"{out}/"], check=False)
    assert done.returncode == 9
    assert not out.exists()
    left = {p.name: p.stat() for p in tmp_path.rglob("model-*-of-00006.ckpt")}
    assert len(left) >= 2
    created: list[str] = []
    create = fsio.Staging.create

    def noting(self: fsio.Staging, name: str) -> fsio.OutFile:
        created.append(name)
        return create(self, name)

    monkeypatch.setattr(fsio.Staging, "create", noting)
    options = ConvertOptions(max_shard_size=3000, workers=1)
    reassemble(tmp_path / "ranks", f"{out}/", options)
    shards = sorted(p.name for p in out.glob("model-*.ckpt"))
    assert len(shards) == 6
    kept = set(shards) - set(created)
    assert len(kept) == 2
    assert all((out / name).stat().st_ino == left[name].st_ino for name in kept)
    reassemble(tmp_path / "ranks", f"{tmp_path / 'clean'}/", options)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "clean").iterdir()
    }
