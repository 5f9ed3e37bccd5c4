"""What processes save by themselves: DTensors of FSDP2, sharded safetensors of DCP, Megatron's ranks, put together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lorabridge.actions.inspect import inspect
from lorabridge.distributed import open_distributed
from lorabridge.distributed.assembled import Assembled
from lorabridge.distributed.placing import Findings
from lorabridge.errors import InputError

DATA = Path(__file__).parent / "data"
TORCH = DATA / "torch_ranks"
MEGATRON = DATA / "megatron"
NORMS = {"input_layernorm": "self_attention.linear_qkv", "pre_mlp_layernorm": "mlp.linear_fc1"}
"""Norms that torch_dist names as parts of the layer after them."""


def opened(path: Path, **options: str) -> Assembled:
    source = open_distributed(path, **options)  # type: ignore[arg-type]
    assert source is not None
    return source


def values(source: Assembled) -> dict[str, torch.Tensor]:
    """Return every tensor, as bits of its own type."""
    out = {}
    for name, spec in source.specs.items():
        bits = torch.from_numpy(source.read(name).copy())
        out[name] = bits.view(getattr(torch, spec.dtype.name)).reshape(spec.shape)
    return out


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize("mesh", ["fsdp", "hsdp", "tp"])
@pytest.mark.parametrize("form", ["", "hf"])
def test_the_parts_of_four_processes_make_the_network(mesh: str, form: str) -> None:
    source = opened(TORCH / mesh / form)
    same(values(source), torch.load(TORCH / mesh / "full.pt"))
    source.check_replicas()
    source.close()


def test_short_and_empty_parts_are_placed() -> None:
    placed = opened(TORCH / "fsdp").arrangement.placed["1.weight"]
    assert sorted(placed.boxes.values()) == [((0, 0), (2, 6)), ((2, 0), (2, 6)), ((4, 0), (1, 6))]
    assert placed.mesh is not None
    assert placed.mesh.grid == (4,)


def test_a_rank_whose_parts_another_holds_may_be_missing(tmp_path: Path) -> None:
    shutil.copytree(TORCH / "hsdp", tmp_path / "run")
    (tmp_path / "run" / "model_world_size_4_rank_1.pt").unlink()
    source = opened(tmp_path / "run")
    same(values(source), torch.load(TORCH / "hsdp" / "full.pt"))
    assert source.arrangement.notes == ("rank 1 is missing; others hold its parts",)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    shutil.copytree(TORCH / "tp", tmp_path / "run")
    (tmp_path / "run" / "model_world_size_4_rank_2.pt").unlink()
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "run")
    assert "rank 2: model_world_size_4_rank_2.pt is missing" in caught.value.where
    findings = Findings()
    described = open_distributed(tmp_path / "run", findings=findings)
    assert described is not None
    assert findings.broken["0.weight"].shape == (6, 8)
    assert "nothing holds 2 to 3 of axis 0" in findings.broken["0.weight"].problem


def test_files_of_two_runs_are_not_mixed(tmp_path: Path) -> None:
    shutil.copytree(TORCH / "fsdp", tmp_path / "run")
    shutil.copy(TORCH / "fsdp" / "model_world_size_4_rank_0.pt", tmp_path / "run" / "model_world_size_2_rank_0.pt")
    with pytest.raises(InputError, match="runs of 2, 4 ranks"):
        opened(tmp_path / "run")


def test_ranks_that_disagree_on_what_is_no_dtensor_are_refused(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"w": torch.full((2,), float(rank))}, tmp_path / f"model_world_size_2_rank_{rank}.pt")
    with pytest.raises(InputError) as caught:
        opened(tmp_path)
    assert "w: differs between rank 0 and rank 1" in caught.value.where


def test_sharded_tensors_of_fsdp1_are_refused_with_the_cure() -> None:
    with pytest.raises(InputError, match="FSDP1's ShardedTensors") as caught:
        opened(TORCH / "fsdp1")
    assert "dcp.save" in caught.value.hint


def test_a_hole_between_shards_is_named(tmp_path: Path) -> None:
    shutil.copytree(TORCH / "tp" / "hf", tmp_path / "run")
    (tmp_path / "run" / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(InputError, match="shards do not make up the tensors") as caught:
        opened(tmp_path / "run")
    assert any("0.weight: nothing holds 3 to 5 of axis 0" in place for place in caught.value.where)


@pytest.mark.parametrize(
    "said", ["not json", json.dumps({}), json.dumps({"w": {"saved_offsets": [-1]}}), json.dumps({"w": 3}), "[" * 9999]
)
def test_shards_that_do_not_say_their_place_are_refused(tmp_path: Path, said: str) -> None:
    file = tmp_path / "shard-00001-model-00001-of-00001.safetensors"
    save_file({"w": torch.zeros(4)}, file, {"DCP_SHARDING_INFO": said})
    with pytest.raises(InputError):
        opened(tmp_path)


def test_shards_that_lap_over_are_refused(tmp_path: Path) -> None:
    for number, start in ((1, 0), (2, 3)):
        info = json.dumps({"w": {"saved_offsets": [start]}})
        file = tmp_path / f"shard-0000{number}-model-00001-of-00001.safetensors"
        save_file({"w": torch.zeros(4)}, file, {"DCP_SHARDING_INFO": info})
    with pytest.raises(InputError) as caught:
        opened(tmp_path)
    assert "w: chunks lap over at 3 of axis 0" in caught.value.where


def test_the_fixture_is_what_torch_says() -> None:
    with safe_open(TORCH / "tp" / "hf" / "shard-00003-model-00001-of-00001.safetensors", "pt") as file:
        assert json.loads(file.metadata()["DCP_SHARDING_INFO"])["0.weight"] == {"saved_offsets": [2, 0]}


def unstacked(kind: str) -> dict[str, torch.Tensor]:
    """Return what torch read from the torch_dist directory, a tensor per layer."""
    out = {}
    for name, value in torch.load(MEGATRON / kind / "full.pt").items():
        head, stack, rest = name.partition("layers.")
        out |= {f"{head}layers.{i}.{rest}": one for i, one in enumerate(value)} if stack else {name: value}
    return out


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_megatrons_stacked_layers_come_one_by_one(kind: str) -> None:
    source = opened(MEGATRON / kind / "torch_dist")
    same(values(source), unstacked(kind))
    assert {reason for _, reason in source.skipped} == {"extra state"}


def test_megatrons_ranks_make_what_megatron_itself_put_together() -> None:
    source = opened(MEGATRON / "dense" / "legacy")
    assert source.arrangement.kind == "megatron TP2 PP2"
    ours = values(source)
    for norm, home in NORMS.items():
        ours = {name.replace(f"{norm}.weight", f"{home}.layer_norm_weight"): value for name, value in ours.items()}
    same(ours, unstacked("dense"))
    source.check_replicas()


def test_megatrons_expert_ranks_are_numbered_through() -> None:
    ours = values(opened(MEGATRON / "experts" / "legacy"))
    stacked = torch.load(MEGATRON / "experts" / "full.pt")
    found = {name: value for name, value in ours.items() if "local_experts" in name}
    assert len(found) == 2 * 4 * 2
    for name, value in found.items():
        parts = name.split(".")
        layer, expert, rest = int(parts[2]), int(parts[6]), ".".join(parts[7:])
        whole = stacked[f"decoder.layers.mlp.experts.experts.{rest}"]
        assert torch.equal(value, whole[layer, expert]), name
    assert torch.equal(ours["output_layer.weight"], stacked["output_layer.weight"])


def test_a_missing_tensor_rank_is_named(tmp_path: Path) -> None:
    shutil.copytree(MEGATRON / "dense" / "legacy", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "iter_0000003" / "mp_rank_01_001")
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "run")
    assert caught.value.where[0] == "tensor rank 1, pipeline rank 1: its file is missing"


def test_an_iteration_is_chosen_by_step() -> None:
    assert len(opened(MEGATRON / "dense" / "legacy", step="3").specs) == 31
    with pytest.raises(InputError, match="no iteration 4"):
        opened(MEGATRON / "dense" / "legacy", step="4")


def test_what_no_rule_cuts_is_refused(tmp_path: Path) -> None:
    for rank in range(2):
        folder = tmp_path / "iter_0000001" / f"mp_rank_0{rank}"
        folder.mkdir(parents=True)
        torch.save({"model": {"decoder.layers.0.mixer.in_proj.weight": torch.zeros(4)}}, folder / "model_optim_rng.pt")
    with pytest.raises(InputError) as caught:
        opened(tmp_path)
    assert "decoder.layers.0.mixer.in_proj.weight: no rule says how tensor parallelism cut it" in caught.value.where


def test_virtual_stages_take_turns(tmp_path: Path) -> None:
    """Chunk c of stage p holds the layers after those of all earlier chunks, and of earlier stages of its own."""
    for stage in range(2):
        folder = tmp_path / "iter_0000001" / f"mp_rank_00_00{stage}"
        folder.mkdir(parents=True)
        chunks = {
            f"model{chunk}": {
                f"decoder.layers.{layer}.mlp.linear_fc2.weight": torch.full((1,), 4.0 * chunk + 2 * stage + layer)
                for layer in range(2)
            }
            for chunk in range(2)
        }
        torch.save({"checkpoint_version": 3.0, **chunks}, folder / "model_optim_rng.pt")
    ours = values(opened(tmp_path))
    assert {name: float(value) for name, value in ours.items()} == {
        f"decoder.layers.{layer}.mlp.linear_fc2.weight": float(layer) for layer in range(8)
    }


def test_states_of_one_rank_need_no_rules(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000001" / "mp_rank_00"
    folder.mkdir(parents=True)
    nested = {"language_model": {"encoder": {"layers.0.mixer.in_proj.weight": torch.ones(3)}}}
    torch.save({"model": nested, "optimizer": {"step": 3}, "iteration": 1}, folder / "model_optim_rng.pt")
    assert list(opened(tmp_path).specs) == ["language_model.encoder.layers.0.mixer.in_proj.weight"]


def missing(path: Path, name: str) -> tuple[tuple[int, ...] | None, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """Return a tensor's shape and what inspect shows as missing of it: where it starts, and the ranks that held it."""
    report = inspect(path, slices=name)
    assert report.ranks is not None
    (tensor,) = report.ranks.shown
    assert report.problems
    return tensor.shape, [(row.start, row.ranks) for row in tensor.slices if row.missing]


@pytest.mark.parametrize(("rank", "rows"), [(1, 2), (2, 4)])
def test_inspect_shows_what_a_missing_process_held(rank: int, rows: int, tmp_path: Path) -> None:
    run = Path(shutil.copytree(TORCH / "fsdp", tmp_path / "run"))
    shutil.rmtree(run / "hf")
    (run / f"model_world_size_4_rank_{rank}.pt").unlink()
    assert missing(run, "0.weight") == ((6, 8), [((rows, 0), (rank,))])


def test_inspect_shows_what_a_missing_tensor_rank_held(tmp_path: Path) -> None:
    shutil.copytree(MEGATRON / "dense" / "legacy", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "iter_0000003" / "mp_rank_01_001")
    whole = torch.load(MEGATRON / "dense" / "full.pt")["output_layer.weight"].shape
    assert missing(tmp_path / "run", "output_layer.weight") == (tuple(whole), [((whole[0] // 2, 0), (3,))])
