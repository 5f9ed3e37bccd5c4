"""Distributed directories that somebody made to do harm: they are refused or read, quickly, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lorabridge.distributed import open_distributed
from lorabridge.distributed.dtensors import _OBJECTS, _state
from lorabridge.distributed.layout import Layout
from lorabridge.distributed.megatron import _fields, _flat
from lorabridge.distributed.partitions import _paddings
from lorabridge.distributed.placing import Findings
from lorabridge.distributed.strategy import fitted, read_strategy
from lorabridge.errors import InputError, LorabridgeError
from lorabridge.formats.torchpickle import Unpickler
from lorabridge.formats.torchvalues import PickleError, Table

DATA = Path(__file__).parent / "data"
MERGED = DATA / "strategies" / "tp4pp2_opt2" / "merged.ckpt"
DCP = DATA / "dcp_peft_fsdp2"
ITERATION = DATA / "mindformers_ckpt2" / "iteration_00000001"
RANK = DATA / "torch_ranks" / "tp" / "model_world_size_4_rank_1.pt"
quick = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

Edits = list[tuple[int, int, bytes]]
inserted = st.binary(max_size=10) | st.sampled_from([b"\xff" * 9, b"-1"])
edits = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 8), inserted), min_size=1, max_size=4)


def edited(data: bytes, changes: Edits) -> bytes:
    """Replace some bytes at some places."""
    for place, length, new in changes:
        at = place % (len(data) + 1)
        data = data[:at] + new + data[at + length :]
    return data


def refused_or_read(act: Callable[[], object]) -> None:
    with contextlib.suppress(LorabridgeError):
        act()


@quick
@given(changes=edits)
def test_edited_strategies(changes: Edits, tmp_path: Path) -> None:
    file = tmp_path / "strategy.ckpt"
    file.write_bytes(edited(MERGED.read_bytes(), changes))
    refused_or_read(lambda: read_strategy([file]))


@quick
@given(changes=edits)
def test_edited_json_strategies(changes: Edits, tmp_path: Path) -> None:
    source = next(iter(sorted((DATA / "strategies" / "tp4pp2_opt2_json").glob("*.json"))))
    file = tmp_path / "strategy.json"
    file.write_bytes(edited(source.read_bytes(), changes))
    refused_or_read(lambda: read_strategy([file]))


@quick
@given(changes=edits)
def test_edited_dcp_metadata(changes: Edits, tmp_path: Path) -> None:
    shutil.copytree(DCP, tmp_path / "run", dirs_exist_ok=True)
    (tmp_path / "run" / ".metadata").write_bytes(edited((DCP / ".metadata").read_bytes(), changes))
    refused_or_read(lambda: open_distributed(tmp_path / "run"))
    refused_or_read(lambda: open_distributed(tmp_path / "run", findings=Findings()))


@quick
@given(changes=edits)
def test_edited_iteration_metadata(changes: Edits, tmp_path: Path) -> None:
    shutil.copytree(ITERATION, tmp_path / "run", dirs_exist_ok=True)
    (tmp_path / "run" / "metadata.json").write_bytes(edited((ITERATION / "metadata.json").read_bytes(), changes))
    refused_or_read(lambda: open_distributed(tmp_path / "run"))
    refused_or_read(lambda: open_distributed(tmp_path / "run", findings=Findings()))


@quick
@given(changes=edits)
def test_edited_pickles_of_dtensors(changes: Edits) -> None:
    with zipfile.ZipFile(RANK) as archive:
        data = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    with contextlib.suppress(PickleError, ValueError):
        _state(Unpickler(edited(data, changes), _OBJECTS).load())


numbers = st.integers(-3, 12) | st.sampled_from([2**31, 2**53 - 1, 0, 10**9])


@quick
@given(
    grid=st.lists(numbers, max_size=6), axes=st.lists(numbers, max_size=6), optimizer=numbers, stage=numbers,
    shape=st.lists(numbers, max_size=6),
)  # fmt: skip
def test_any_numbers_in_a_strategy(
    grid: list[int], axes: list[int], optimizer: int, stage: int, shape: list[int], tmp_path: Path
) -> None:
    about = {"dev_matrix": grid, "tensor_map": axes, "opt_weight_shard_size": optimizer, "tensor_shape": shape}
    item = {"MatMul_w": {"parallel_strategy": [], "stage": stage}}
    root = {"current_stage": 2, "parallel_layout_item": {"w": about}, "parallel_strategy_item": item}
    (tmp_path / "s.json").write_text(json.dumps(root))
    for rank in range(2):
        (tmp_path / f"rank_{rank}").mkdir(exist_ok=True)
        save_file({"w": np.zeros((4, 2), np.float32)}, tmp_path / f"rank_{rank}" / "a.safetensors")
    refused_or_read(lambda: open_distributed(tmp_path, strategies=[tmp_path / "s.json"]))
    described = open_distributed(tmp_path, strategies=[tmp_path / "s.json"], findings=Findings())
    assert described is not None


def test_a_layout_of_endless_devices_is_refused() -> None:
    assert "more than" in Layout((2**20, 2**20), ((0,),)).problem()


def test_foldings_without_end_are_not_tried() -> None:
    layout = Layout((2,), ((),) * 32, 0, (1,) * 32)
    assert fitted(layout, (1,) * 16) is None


def test_sharing_and_cycles_cost_nothing() -> None:
    nest: list[object] = [0]
    for _ in range(60):
        nest = [nest] * 50
    nest.append(nest)
    with pytest.raises(ValueError, match="param_alignment_paddings is a list"):
        _paddings(nest)
    assert _paddings([[0, 2], [3]]) == ((0, 2), (3,))


def test_a_model_of_shared_tables_ends() -> None:
    table = Table([("a", 1)])
    for _ in range(30):
        table = Table([(str(i), table) for i in range(100)])
    with pytest.raises(ValueError, match="nests too deep"):
        list(_flat(table, 8))
    assert len(_fields(table)) == 100


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/done",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Harm()))
    torch.save({"w": Harm()}, tmp_path / "model_world_size_1_rank_0.pt")
    with pytest.raises(InputError, match=r"posix\.system"):
        open_distributed(tmp_path)
    (tmp_path / ".metadata").unlink()
    with pytest.raises(InputError, match=r"posix\.system"):
        open_distributed(tmp_path)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("source", [DCP, ITERATION])
def test_files_that_lead_out_of_the_directory_are_refused(source: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(source, run)
    victim = next(p for p in sorted(run.iterdir()) if p.suffix in (".distcp", ".safetensors"))
    shutil.move(victim, tmp_path / "elsewhere")
    victim.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError) as caught:
        open_distributed(run)
    assert caught.value.where == (f"{victim}: a symbolic link that leaves the directory",)


def test_a_folder_that_leads_out_is_refused(tmp_path: Path) -> None:
    from lorabridge.distributed.placing import unfit_files

    (tmp_path / "run").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("x")
    (tmp_path / "run" / "sub").symlink_to(tmp_path / "out")
    assert unfit_files(tmp_path / "run", ["sub/x"]) == {"sub/x": "reached by a symbolic link that leaves the directory"}
