"""Rank directories that MindSpore cut, put together again; and everything that may be wrong with them."""

from __future__ import annotations

import shutil
from pathlib import Path

import mindspore
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.reassemble import reassemble
from lorabridge.distributed.ranks import open_ranks
from lorabridge.errors import InputError, UsageError

DATA = Path(__file__).parent / "data"
OPT2 = DATA / "strategies" / "tp4pp2_opt2" / "merged.ckpt"


def full(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(DATA / "ranks" / name / "full.npz"))


@pytest.fixture
def ranks(tmp_path: Path) -> Path:
    """Return a copy of the 16 ranks (two stages of tensor parallel 4 and optimizer shards of 2) to spoil."""
    return Path(shutil.copytree(DATA / "ranks" / "tp4pp2_opt2", tmp_path / "ranks"))


def rewrite(ranks: Path, rank: int, change: dict[str, np.ndarray | None]) -> None:
    path = next((ranks / f"rank_{rank}").iterdir())
    tensors = load_file(path)
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("tp4pp2_opt2", "tp4pp2_opt2/merged.ckpt"),
        ("tp4pp2_opt2", "tp4pp2_opt2"),
        ("tp4pp2_opt_all", "tp4pp2_opt_all/merged.ckpt"),
    ],
)
def test_the_whole_is_what_mindspore_cut(name: str, strategy: str, tmp_path: Path) -> None:
    out = tmp_path / "whole.ckpt"
    done = reassemble(DATA / "ranks" / name, out, ConvertOptions(strategies=(DATA / "strategies" / strategy,)))
    assert done.tensors == len(full(name)) == 8
    loaded = mindspore.load_checkpoint(str(out))
    for key, value in full(name).items():
        assert np.array_equal(loaded[key].asnumpy(), value), key


def test_mindspores_own_transform_gives_the_same_bits(tmp_path: Path) -> None:
    mindspore.transform_checkpoints(
        str(DATA / "ranks" / "tp4pp2_opt2"), str(tmp_path / "theirs"), "whole", str(OPT2), None,
        output_format="safetensors",
    )  # fmt: skip
    theirs = load_file(next((tmp_path / "theirs" / "rank_0").iterdir()))
    reassemble(DATA / "ranks" / "tp4pp2_opt2", tmp_path / "ours.safetensors", ConvertOptions(strategies=(OPT2,)))
    ours = load_file(tmp_path / "ours.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_rows_are_read_from_the_pieces_that_hold_them() -> None:
    source = open_ranks(DATA / "ranks" / "tp4pp2_opt2", strategies=[OPT2])
    for name, value in full("tp4pp2_opt2").items():
        rows = value.shape[0]
        for span in ((0, rows), (1, rows - 1), (rows // 2, rows // 2 + 1), (3, 3)):
            assert np.array_equal(source.read(name, span).view(value.dtype), value[slice(*span)]), (name, span)
    cut_by_rows = [name for name in source.specs if source.extents(name)]
    assert "n.b0.up.w" in cut_by_rows
    assert "n.b0.down.w" not in cut_by_rows
    source.close()


def test_a_lost_rank_with_a_living_replica_is_recovered_and_said(tmp_path: Path) -> None:
    ranks = Path(shutil.copytree(DATA / "ranks" / "tp4pp2_opt_all", tmp_path / "ranks"))
    strategy = tmp_path / "replicated.ckpt"
    from lorabridge.distributed.layout import Layout
    from lorabridge.distributed.strategy import write_strategy

    value = np.arange(32, dtype=np.float32).reshape(8, 4)
    shutil.rmtree(ranks)
    layout = Layout((2, 4), ((1,), ()))
    strategy.write_bytes(write_strategy(0, {"w": layout}))
    for rank in range(8):
        if rank != 2:
            (ranks / f"rank_{rank}").mkdir(parents=True)
            at = rank % 4 * 2
            save_file({"w": np.ascontiguousarray(value[at : at + 2])}, ranks / f"rank_{rank}" / "net.safetensors")
    done = reassemble(ranks, tmp_path / "whole.safetensors", ConvertOptions(strategies=(strategy,)))
    assert "rank 2 is missing; its slices were read from rank 6" in done.notes
    assert np.array_equal(load_file(tmp_path / "whole.safetensors")["w"], value)
    rewrite(ranks, 7, {"w": value[:2] + 1})
    with pytest.raises(InputError, match="1 tensor differs between ranks") as caught:
        reassemble(ranks, tmp_path / "again.safetensors", ConvertOptions(strategies=(strategy,)))
    assert "w: rank 3 and rank 7" in str(caught.value)
    assert not (tmp_path / "again.safetensors").exists()
    shutil.rmtree(ranks / "rank_6")
    with pytest.raises(InputError, match=r"lies on rank 2, 6"):
        open_ranks(ranks, strategies=[strategy])


def test_removed_redundancy_is_found_on_the_rank_that_kept_it(tmp_path: Path) -> None:
    from lorabridge.distributed.layout import Layout
    from lorabridge.distributed.strategy import write_strategy

    value = np.arange(24, dtype=np.float16).reshape(4, 6)
    bias = np.arange(4, dtype=np.float16)
    strategy = tmp_path / "s.ckpt"
    strategy.write_bytes(write_strategy(0, {"w": Layout((2, 2), ((), (1,))), "b": Layout((2, 2), ((),))}))
    held = {0: {"w": value[:, :3]}, 1: {"b": bias}, 2: {}, 3: {"w": value[:, 3:]}}
    for rank, tensors in held.items():
        (tmp_path / "ranks" / f"rank_{rank}").mkdir(parents=True)
        arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        path = tmp_path / "ranks" / f"rank_{rank}" / "net.safetensors"
        save_file(arrays, path, metadata={"remove_redundancy": "True"})
    source = open_ranks(tmp_path / "ranks", strategies=[strategy])
    assert np.array_equal(source.read("w").view(np.float16), value)
    assert np.array_equal(source.read("b").view(np.float16), bias)
    assert "remove_redundancy" not in source.metadata


def test_a_missing_stage_is_named(ranks: Path, tmp_path: Path) -> None:
    for rank in range(8, 16):
        shutil.rmtree(ranks / f"rank_{rank}")
    with pytest.raises(InputError, match="stage 1: none of its ranks 8 to 15 is there"):
        reassemble(ranks, tmp_path / "whole.ckpt", ConvertOptions(strategies=(OPT2,)))
    assert not (tmp_path / "whole.ckpt").exists()


def test_a_missing_rank_without_a_replica_is_named(ranks: Path) -> None:
    shutil.rmtree(ranks / "rank_5")
    with pytest.raises(InputError, match=r"n\.b0\.up\.w: slice \[3, 0\] of \[8, 1\] lies on rank 5"):
        open_ranks(ranks, strategies=[OPT2])


def test_the_strategy_of_another_run_is_refused(ranks: Path) -> None:
    with pytest.raises(InputError, match="do not make up one checkpoint"):
        open_ranks(ranks, strategies=[DATA / "strategies" / "other" / "tp_only.ckpt"])
    with pytest.raises(InputError, match=r"slices of shape \(32, 64\) are not .* cuts a tensor of shape \(16, 64\)"):
        open_ranks(ranks, strategies=[DATA / "strategies" / "tp4pp2_opt2_json" / "merged.json"])
    with pytest.raises(InputError, match=r"is of 1 stage of 8 devices; there is rank 8"):
        open_ranks(ranks, strategies=[DATA / "strategies" / "other" / "single_stage.ckpt"])


def test_slices_of_unequal_shape_are_refused(ranks: Path) -> None:
    rewrite(ranks, 3, {"n.b0.up.w": np.zeros((5, 16), np.float32)})
    with pytest.raises(InputError, match=r"n\.b0\.up\.w: slices differ in type or shape"):
        open_ranks(ranks, strategies=[OPT2])


def test_a_truncated_slice_is_refused(ranks: Path) -> None:
    path = next((ranks / "rank_4").iterdir())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="rank_4"):
        open_ranks(ranks, strategies=[OPT2])


def test_parameters_that_the_strategy_does_not_list_must_agree(ranks: Path) -> None:
    for rank in range(16):
        rewrite(ranks, rank, {"global_step": np.array([7], np.int32)})
    assert open_ranks(ranks, strategies=[OPT2]).read("global_step").tolist() == [7]
    rewrite(ranks, 9, {"global_step": np.array([8], np.int32)})
    with pytest.raises(
        InputError, match="global_step: differs between rank 0 and rank 9; the strategy does not list it"
    ):
        open_ranks(ranks, strategies=[OPT2])


def test_ranks_that_trained_apart_are_not_one_checkpoint(tmp_path: Path) -> None:
    value = np.ones((2, 3), np.float32)
    for rank in range(2):
        (tmp_path / "run" / f"rank_{rank}").mkdir(parents=True)
        save_file({"w": value}, tmp_path / "run" / f"rank_{rank}" / "net-1_2.safetensors")
    assert np.array_equal(open_ranks(tmp_path / "run").read("w").view(np.float32), value)
    save_file({"w": value * 2}, tmp_path / "run" / "rank_1" / "net-1_2.safetensors")
    with pytest.raises(InputError, match="w: differs between rank 0 and rank 1; give --strategy"):
        open_ranks(tmp_path / "run")


def test_one_of_several_steps_must_be_chosen(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / "run" / f"rank_{rank}").mkdir(parents=True)
        for step in ("1_9", "1_10"):
            value = np.full((2,), int(step[2:]), np.float32)
            save_file({"w": value}, tmp_path / "run" / f"rank_{rank}" / f"net_rank_{rank}-{step}.safetensors")
    with pytest.raises(UsageError, match="several checkpoints") as caught:
        open_ranks(tmp_path / "run")
    assert "--step: 1_9, 1_10" in str(caught.value)
    assert open_ranks(tmp_path / "run", step="1_10").read("w").view(np.float32).tolist() == [10, 10]
    with pytest.raises(InputError, match="of step 3_1"):
        open_ranks(tmp_path / "run", step="3_1")


def test_a_whole_checkpoint_needs_no_reassembly(tmp_path: Path) -> None:
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="one whole checkpoint already"):
        reassemble(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
