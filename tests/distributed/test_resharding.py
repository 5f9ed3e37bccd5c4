"""Resharding: what MindSpore cuts itself, what it loads, and laws of cutting twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import mindspore
import numpy as np
import pytest
from mindspore import nn
from safetensors.numpy import load_file, save_file

from lorabridge import open_checkpoint
from lorabridge.actions.reassemble import reassemble
from lorabridge.actions.reshard import ReshardOptions, reshard, reshard_files
from lorabridge.distributed.parallel import Sizes
from lorabridge.errors import MappingError, OutputError, UsageError

DATA = Path(__file__).parent / "data"
OPT2 = DATA / "strategies" / "tp4pp2_opt2" / "merged.ckpt"
ALL = DATA / "strategies" / "tp4pp2_opt_all" / "merged.ckpt"
RANKS = DATA / "ranks" / "tp4pp2_opt2"


def llama(hidden: int = 16, inner: int = 24, layers: int = 4, vocab: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    shapes: dict[str, tuple[int, ...]] = {"model.tok_embeddings.embedding_weight": (vocab, hidden)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.attention.{w}.weight": (hidden, hidden) for w in ("wq", "wk", "wv", "wo")}
        shapes |= {f"model.layers.{i}.feed_forward.{w}.weight": (inner, hidden) for w in ("w1", "w3")}
        shapes[f"model.layers.{i}.feed_forward.w2.weight"] = (hidden, inner)
        shapes[f"model.layers.{i}.attention_norm.weight"] = (hidden,)
        shapes[f"model.layers.{i}.attention.wq.mindpet_delta_lora_a"] = (4, hidden)
        shapes[f"model.layers.{i}.attention.wq.mindpet_delta_lora_b"] = (hidden, 4)
        shapes[f"model.layers.{i}.attention.wo.mindpet_delta_lora_a"] = (4, hidden)
        shapes[f"model.layers.{i}.attention.wo.mindpet_delta_lora_b"] = (hidden, 4)
    shapes |= {"model.norm_out.weight": (hidden,), "lm_head.weight": (vocab, hidden), "global_step": (1,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(llama(), path, metadata={"format": "ms"})
    return path


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_ranks_are_what_mindspore_cuts_along_the_same_strategy(tmp_path: Path) -> None:
    options = ReshardOptions(strategies=(OPT2,), to=(ALL,), format="mindspore")
    done = reshard(RANKS, tmp_path / "out", options)
    assert (done.ranks, done.stages, done.tensors) == (16, 2, 8)
    for rank in range(16):
        theirs = mindspore.load_checkpoint(str(next((DATA / "ranks" / "tp4pp2_opt_all" / f"rank_{rank}").iterdir())))
        ours = mindspore.load_checkpoint(str(tmp_path / "out" / f"rank_{rank}" / "checkpoint.ckpt"))
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name].asnumpy(), theirs[name].asnumpy()) for name in theirs)


@pytest.mark.parametrize("sizes", [Sizes(4), Sizes(2, 2), Sizes(2, 4, 2), Sizes(1, 1, 4), Sizes(2, 1, 2, 4)])
def test_ranks_made_from_sizes_come_together_again(model: Path, tmp_path: Path, sizes: Sizes) -> None:
    done = reshard(model, tmp_path / "ranks", ReshardOptions(sizes=sizes))
    assert done.ranks == sizes.tensor * sizes.stages * sizes.copies
    assert done.replicated == ("global_step",)
    reassemble(tmp_path / "ranks", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == llama().keys()
    assert all(np.array_equal(again[name], llama()[name]) for name in again)


def test_mindspores_transform_reads_the_ranks_and_their_strategy(model: Path, tmp_path: Path) -> None:
    reshard(model, tmp_path / "ranks", ReshardOptions(sizes=Sizes(2, 2, 2), format="safetensors"))
    merged = tmp_path / "merged.ckpt"
    mindspore.merge_pipeline_strategys(str(tmp_path / "ranks" / "strategy"), str(merged))
    mindspore.transform_checkpoints(
        str(tmp_path / "ranks"), str(tmp_path / "theirs"), "whole", str(merged), None, output_format="safetensors"
    )
    theirs = load_file(next((tmp_path / "theirs" / "rank_0").iterdir()))
    full = llama()
    assert theirs.keys() == full.keys()
    assert all(np.array_equal(theirs[name], full[name]) for name in full)


def test_load_distributed_checkpoint_reads_the_ranks(tmp_path: Path) -> None:
    class Net(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.wq = nn.Dense(16, 8, has_bias=False)
            self.wo = nn.Dense(8, 16, has_bias=False)

    rng = np.random.default_rng(1)
    full = {"wq.weight": rng.standard_normal((8, 16)), "wo.weight": rng.standard_normal((16, 8))}
    full = {name: value.astype(np.float32) for name, value in full.items()}
    save_file(full, tmp_path / "net.safetensors")
    reshard(tmp_path / "net.safetensors", tmp_path / "ranks", ReshardOptions(sizes=Sizes(2, 1, 2), format="mindspore"))
    net = Net()
    mindspore.load_distributed_checkpoint(
        net,
        [str(tmp_path / "ranks" / f"rank_{rank}" / "checkpoint.ckpt") for rank in range(4)],
        None,
        str(tmp_path / "ranks" / "strategy" / "strategy_0.ckpt"),
    )
    assert np.array_equal(net.wq.weight.asnumpy(), full["wq.weight"])
    assert np.array_equal(net.wo.weight.asnumpy(), full["wo.weight"])


def test_lora_factors_are_cut_where_their_weight_is(model: Path, tmp_path: Path) -> None:
    reshard(model, tmp_path / "ranks", ReshardOptions(sizes=Sizes(4)))
    held = load_file(tmp_path / "ranks" / "rank_0" / "checkpoint.safetensors")
    shapes = {
        name.split(".layers.0.attention.")[1]: value.shape
        for name, value in held.items()
        if ".layers.0.attention." in name
    }
    assert shapes["wq.weight"] == (4, 16)
    assert shapes["wq.mindpet_delta_lora_a"] == (4, 16)
    assert shapes["wq.mindpet_delta_lora_b"] == (4, 4)
    assert shapes["wo.weight"] == (16, 4)
    assert shapes["wo.mindpet_delta_lora_a"] == (4, 4)
    assert shapes["wo.mindpet_delta_lora_b"] == (16, 4)


def test_cutting_twice_is_cutting_once(model: Path, tmp_path: Path) -> None:
    reshard(model, tmp_path / "once", ReshardOptions(sizes=Sizes(2, 2)))
    reshard(model, tmp_path / "first", ReshardOptions(sizes=Sizes(4, 1, 2)))
    reshard(tmp_path / "first", tmp_path / "twice", ReshardOptions(sizes=Sizes(2, 2)))
    assert files(tmp_path / "once") == files(tmp_path / "twice")


def test_the_bytes_do_not_depend_on_the_workers(model: Path, tmp_path: Path) -> None:
    for workers in (1, 4):
        reshard(model, tmp_path / str(workers), ReshardOptions(sizes=Sizes(4, 2, 2), workers=workers))
    assert files(tmp_path / "1") == files(tmp_path / "4")


@pytest.mark.parametrize(("format", "suffix"), [("mindspore", "ckpt"), ("safetensors", "safetensors")])
def test_the_files_of_one_checkpoint_have_the_container_that_is_asked_for(
    model: Path, tmp_path: Path, format: Literal["mindspore", "safetensors"], suffix: str
) -> None:
    reshard_files(model, tmp_path / "whole", ReshardOptions(format=format), shards=2)
    shards = [f"model-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    assert sorted(path.name for path in (tmp_path / "whole").iterdir()) == [*shards, f"model.{suffix}.index.json"]
    with open_checkpoint(tmp_path / "whole") as held:
        assert {name: held[name].tobytes() for name in held.specs} == {n: v.tobytes() for n, v in llama().items()}


@pytest.mark.parametrize("shards", [1, 3])
def test_one_checkpoint_in_several_files(model: Path, tmp_path: Path, shards: int) -> None:
    reshard(model, tmp_path / "ranks", ReshardOptions(sizes=Sizes(2, 2)))
    reshard_files(tmp_path / "ranks", tmp_path / "whole", ReshardOptions(), shards=shards)
    index = list((tmp_path / "whole").glob("*.index.json"))
    assert len(index) == (shards > 1)
    found: dict[str, np.ndarray] = {}
    for path in sorted((tmp_path / "whole").glob("*.ckpt")):
        found |= {name: value.asnumpy() for name, value in mindspore.load_checkpoint(str(path)).items()}
    if index:
        assert set(json.loads(index[0].read_text())["weight_map"].values()) == {
            p.name for p in (tmp_path / "whole").glob("*.ckpt")
        }
        assert len(list((tmp_path / "whole").glob("*.ckpt"))) == shards
    assert all(np.array_equal(found[name], llama()[name]) for name in found)
    assert found.keys() == llama().keys()


def test_ranks_replace_ranks_and_nothing_else(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "ranks"
    reshard(model, out, ReshardOptions(sizes=Sizes(4)))
    reshard(model, tmp_path / "two", ReshardOptions(sizes=Sizes(2)))
    with pytest.raises(OutputError, match="exists already"):
        reshard(model, out, ReshardOptions(sizes=Sizes(2)))
    reshard(model, out, ReshardOptions(sizes=Sizes(2), overwrite=True))
    assert files(out) == files(tmp_path / "two")
    with pytest.raises(OutputError, match="the input lies inside the output"):
        reshard(out / "rank_0" / "checkpoint.safetensors", out, ReshardOptions(sizes=Sizes(1), overwrite=True))
    (out / "rank_1" / "kept").mkdir()
    with pytest.raises(OutputError, match="holds other directories"):
        reshard(model, out, ReshardOptions(sizes=Sizes(4), overwrite=True))
    (out / "rank_1" / "kept").rmdir()
    (out / "notes").mkdir()
    with pytest.raises(OutputError, match="holds other directories"):
        reshard(model, out, ReshardOptions(sizes=Sizes(4), overwrite=True))


def test_what_does_not_fit_is_named_and_nothing_is_written(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(MappingError, match=r"axis 0 of \[16, 16\] does not divide by 3"):
        reshard(model, out, ReshardOptions(sizes=Sizes(3)))
    with pytest.raises(MappingError, match="4 layers do not divide into 3 stages"):
        reshard(model, out, ReshardOptions(sizes=Sizes(1, 3)))
    with pytest.raises(MappingError, match="lists none of the tensors"):
        reshard(model, out, ReshardOptions(to=(ALL,)))
    with pytest.raises(UsageError, match="not said"):
        reshard(model, out, ReshardOptions())
    with pytest.raises(OutputError, match="inside the input"):
        reshard(RANKS, RANKS / "out", ReshardOptions(strategies=(OPT2,), to=(ALL,)))
    assert not out.exists()


def test_a_name_that_no_rule_knows_must_be_said(tmp_path: Path) -> None:
    save_file({"tower.mystery.weight": np.ones((4, 4), np.float32)}, tmp_path / "m.safetensors")
    with pytest.raises(MappingError, match=r"tower\.mystery\.weight: no rule says how it is cut"):
        reshard(tmp_path / "m.safetensors", tmp_path / "out", ReshardOptions(sizes=Sizes(2)))
    reshard(tmp_path / "m.safetensors", tmp_path / "out", ReshardOptions(sizes=Sizes(2), cuts=(("mystery", 1),)))
    held = load_file(tmp_path / "out" / "rank_1" / "checkpoint.safetensors")
    assert held["tower.mystery.weight"].shape == (4, 2)
