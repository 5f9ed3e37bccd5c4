"""DeepSpeed under tensor parallelism and pipelines, as it really wrote them; judged by its own ds_to_universal."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from lorabridge.actions.inspect import inspect
from lorabridge.distributed import open_distributed
from lorabridge.distributed.assembled import Assembled
from lorabridge.distributed.tensorrules import along, read_universal
from lorabridge.errors import InputError
from lorabridge.formats.torchvalues import Table

DATA = Path(__file__).parent / "data"
PARALLEL = DATA / "deepspeed_parallel"
BITS = {torch.float32: (np.uint32, torch.int32), torch.bfloat16: (np.uint16, torch.int16)}


def opened(path: Path) -> Assembled:
    source = open_distributed(path)
    assert source is not None
    return source


def same(source: Assembled, theirs: dict[str, torch.Tensor]) -> None:
    for name, value in theirs.items():
        assert source.specs[name].shape == tuple(value.shape), name
        assert source.specs[name].dtype.torch == str(value.dtype).removeprefix("torch."), name
        ours = source.read(name).view(BITS[value.dtype][0])
        assert np.array_equal(ours, value.contiguous().view(BITS[value.dtype][1]).numpy().view(ours.dtype)), name


@pytest.mark.parametrize(
    ("run", "kind", "besides"),
    [
        ("autotp_zero2", "deepspeed ZeRO-2 TP2, each in the partitions of 2", set()),
        ("autotp_zero3", "deepspeed ZeRO-3 TP2, each in the partitions of 2", set()),
        ("fused_zero1", "deepspeed ZeRO-2 TP2, each in the partitions of 2", set()),
        ("pipeline_zero1", "deepspeed ZeRO-2 TP2 PP2", {"1.inv_freq", "2.inv_freq", "3.inv_freq"}),
    ],
)
def test_the_whole_is_what_ds_to_universal_makes(run: str, kind: str, besides: set[str]) -> None:
    full = torch.load(PARALLEL / run / "full.pt")
    source = opened(PARALLEL / run)
    assert source.arrangement.kind == kind
    assert source.specs.keys() == full.keys() | besides
    full |= {name: full[name].bfloat16() for name in full.keys() & {"table"}}  # a buffer, which it widens
    same(source, full)
    source.check_replicas()


def test_what_every_tensor_rank_holds_is_compared(tmp_path: Path) -> None:
    run = Path(shutil.copytree(PARALLEL / "autotp_zero2", tmp_path / "run"))
    file = run / "global_step2" / "mp_rank_01_model_states.pt"
    state = torch.load(file)
    state["frozen_param_fragments"]["model.embed_tokens.weight"][3, 4] += 1
    torch.save(state, file)
    with pytest.raises(InputError, match="1 tensor differs between ranks") as caught:
        opened(run).check_replicas()
    assert caught.value.where == ("model.embed_tokens.weight: rank 0 and rank 1",)


def without(run: Path, key: str) -> Path:
    for file in run.glob("*/*model_states.pt"):
        state = torch.load(file)
        if key in state:
            torch.save({k: v for k, v in state.items() if k != key}, file)
    return run


def test_megatrons_names_tell_what_the_checkpoint_does_not(tmp_path: Path) -> None:
    run = Path(shutil.copytree(PARALLEL / "pipeline_zero1", tmp_path / "run"))
    full = torch.load(run / "full.pt")
    same(opened(without(run, "universal_checkpoint_info")), full)
    same(opened(without(run, "checkpoint_parallel_dimensions")), full)


def test_a_name_that_nothing_tells_how_to_join_is_refused_with_the_cure(tmp_path: Path) -> None:
    run = without(Path(shutil.copytree(PARALLEL / "autotp_zero3", tmp_path / "run")), "universal_checkpoint_info")
    with pytest.raises(InputError, match="do not make up one model") as caught:
        open_distributed(run)
    assert "model.embed_tokens.weight: no rule says how tensor parallelism cut it" in caught.value.where
    assert not any("q_proj" in line or "norm" in line for line in caught.value.where)
    assert "AutoTP" in caught.value.hint


def test_the_layers_of_a_pipeline_are_read_without_zero() -> None:
    source = opened(PARALLEL / "pipeline")
    assert source.arrangement.kind == "deepspeed TP2 PP2"
    folder = PARALLEL / "pipeline" / "global_step2"
    expected = {}
    for layer in range(5):
        parts = [torch.load(folder / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt") for rank in range(2)]
        for name in parts[0]:
            axis = {"dense_h_to_4h.weight": 0, "dense_h_to_4h.bias": 0, "dense_4h_to_h.weight": 1}.get(name)
            held = [part[name] for part in parts]
            expected[f"{layer}.{name}"] = held[0] if axis is None else torch.cat(held, axis)
    assert source.specs.keys() == expected.keys()
    same(source, expected)


def ranks_of(path: Path) -> tuple[dict[str, str], list[str]]:
    report = inspect(path)
    assert report.ranks is not None
    return {row.example: f"{row.slices} {row.missing}" for row in report.ranks.layouts}, [
        line for problem in report.problems for line in (problem.problem, *problem.where)
    ]


@pytest.mark.parametrize("stage", [2, 3])
def test_inspect_shows_what_a_missing_rank_of_zero_held(stage: int, tmp_path: Path) -> None:
    run = Path(shutil.copytree(DATA / f"deepspeed_zero{stage}_lora", tmp_path / "run"))
    (run / "global_step1" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(InputError, match="states of ranks are missing") as caught:
        open_distributed(run)
    assert caught.value.where == ("optimizer states of rank 1",)
    report = inspect(run, slices="*")
    assert report.ranks is not None
    assert "optimizer states of rank 1" in [line for problem in report.problems for line in problem.where]
    full = torch.load(run / "full_lora.pt")
    shown = {tensor.name: tensor for tensor in report.ranks.shown}
    assert shown.keys() == full.keys()
    lost = 0
    for name, value in full.items():
        assert sum(int(np.prod(row.shape)) for row in shown[name].slices) == value.numel(), name
        for row in shown[name].slices:
            assert row.ranks == ((1,) if row.missing else (0,))
            lost += row.missing
    assert lost if stage == 3 else lost < len(full)


def test_inspect_shows_which_model_parallel_rank_lacks_states(tmp_path: Path) -> None:
    run = Path(shutil.copytree(PARALLEL / "autotp_zero3", tmp_path / "run"))
    (run / "global_step2" / "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt").unlink()
    layouts, problems = ranks_of(run)
    assert "optimizer states of rank 1 of model-parallel rank 1" in problems
    assert layouts["model.layers.0.self_attn.q_proj.weight"] == "2 1"
    assert layouts["model.embed_tokens.weight"] == "1 0", "the other tensor rank holds a copy"


def test_a_rank_without_any_optimizer_states_is_a_hole_and_not_its_16_bit_weights(tmp_path: Path) -> None:
    run = Path(shutil.copytree(PARALLEL / "autotp_zero2", tmp_path / "run"))
    for file in run.glob("*/*mp_rank_01_optim*"):
        file.unlink()
    layouts, problems = ranks_of(run)
    assert layouts["model.layers.1.self_attn.q_proj.weight"] == "2 1"
    assert not any("element types" in line for line in problems)


def test_a_lost_tensor_rank_is_a_hole(tmp_path: Path) -> None:
    run = Path(shutil.copytree(PARALLEL / "autotp_zero2", tmp_path / "run"))
    for file in run.glob("*/*mp_rank_01_*"):
        file.unlink()
    with pytest.raises(InputError) as caught:
        open_distributed(run)
    assert "model states of model-parallel rank 1" in caught.value.where
    layouts, _ = ranks_of(run)
    assert set(layouts.values()) >= {"2 1", "1 0"}


def zero2(folder: Path, paddings: list[list[int]], *, module: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Write two ranks of stage 2 as zero_to_fp32 (deepspeed 0.19.8) reads them: padding behind every parameter."""
    generator = torch.Generator().manual_seed(1)
    shapes = [OrderedDict(a=torch.Size([3, 5]), b=torch.Size([7])), OrderedDict(c=torch.Size([4, 2]))]
    values = {n: torch.randn(s, generator=generator) for group in shapes for n, s in group.items()}
    flats: list[list[torch.Tensor]] = [[], []]
    for group, padded in zip(shapes, paddings, strict=True):
        parts = [(values[n].flatten(), torch.full((pad,), 9.0)) for n, pad in zip(group, padded, strict=True)]
        whole = torch.cat([piece for pair in parts for piece in pair])
        half = -(-len(whole) // 2)
        flats[0].append(whole[:half].clone())
        flats[1].append(whole[half:].clone())
    folder.mkdir()
    said = {"module": module, "param_shapes": shapes, "dp_world_size": 2, "mp_world_size": 1, "buffer_names": []}
    torch.save(said, folder / "mp_rank_00_model_states.pt")
    for rank, groups in enumerate(flats):
        state = {"single_partition_of_fp32_groups": groups, "param_alignment_paddings": paddings}
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return values


@pytest.mark.parametrize("paddings", [[[0, 0], [0]], [[1, 1], [0]], [[3, 5], [8]]])
def test_the_padding_behind_each_parameter_is_passed_over(paddings: list[list[int]], tmp_path: Path) -> None:
    values = zero2(tmp_path / "run", paddings, module={})
    source = opened(tmp_path / "run")
    assert source.specs.keys() == values.keys()
    same(source, values)


def test_what_stage_1_froze_comes_from_the_module(tmp_path: Path) -> None:
    base = torch.randn(4, 4, dtype=torch.bfloat16)
    values = zero2(tmp_path / "run", [[0, 0], [0]], module={"base.weight": base, "a": torch.zeros(3, 5)})
    source = opened(tmp_path / "run")
    same(source, {**values, "base.weight": base})


def test_without_optimizer_states_the_model_states_are_read(tmp_path: Path) -> None:
    base = torch.randn(4, 4, dtype=torch.bfloat16)
    zero2(tmp_path / "run", [[0, 0], [0]], module={"base.weight": base})
    for file in (tmp_path / "run").glob("*optim*"):
        file.unlink()
    source = opened(tmp_path / "run")
    same(source, {"base.weight": base})
    assert source.arrangement.notes == ("no optimizer states are there; the weights are those of the model states",)


@pytest.mark.parametrize("said", [{"dp_world_size": 1 << 19}, {"mp_world_size": 60000, "dp_world_size": 60000}])
def test_endless_ranks_that_a_file_tells_of_are_refused(said: dict[str, int], tmp_path: Path) -> None:
    zero2(tmp_path / "run", [[0, 0], [0]], module={})
    file = tmp_path / "run" / "mp_rank_00_model_states.pt"
    torch.save(torch.load(file) | said, file)
    with pytest.raises(InputError):
        inspect(tmp_path / "run")


def test_experts_in_files_of_their_own_are_refused(tmp_path: Path) -> None:
    zero2(tmp_path / "run", [[0, 0], [0]], module={})
    torch.save({}, tmp_path / "run" / "layer_0_expert_3_mp_rank_00_model_states.pt")
    with pytest.raises(InputError, match="experts lie in files of their own"):
        open_distributed(tmp_path / "run")


def test_a_universal_checkpoint_is_read(tmp_path: Path) -> None:
    full = torch.load(PARALLEL / "autotp_zero3" / "full.pt")
    for name, value in full.items():
        (tmp_path / "step" / "zero" / name).mkdir(parents=True)
        torch.save({"param": value, "cat_dim": 0}, tmp_path / "step" / "zero" / name / "fp32.pt")
    (tmp_path / "latest_universal").write_text("step")
    for path in (tmp_path, tmp_path / "step"):
        source = opened(path)
        assert source.arrangement.kind == "deepspeed universal"
        assert source.specs.keys() == full.keys()
        same(source, full)


def table(value: object) -> object:
    return Table([(k, table(v)) for k, v in value.items()]) if isinstance(value, dict) else value


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"^.*.*.*.*$", r"a{1000}", r"a|b", r"(?s:x)", "x" * 600])
def test_patterns_that_could_take_long_are_not_run(pattern: str) -> None:
    with pytest.raises(ValueError, match="is not one that is run here"):
        read_universal(table({"tp_replicated_parameter_patterns": [pattern]}))


def test_patterns_of_old_checkpoints_join_sub_parameters() -> None:
    said = read_universal(table({
        "universal_checkpoint_version": 0.2,
        "parameter_with_sub_params": [table({"patterns": [r"h\.\d+\.qkv"], "shape": [3, -1], "partition_dim": 0})],
        "parameter_with_2_sub_params_cat_dim_0": [r".*\.fc1"],
        "vocabulary_parameter_patterns": ["embed"], "original_vocab_size": 5,
        "parameter_to_average_patterns": ["mean"],
    }))  # fmt: skip
    assert said is not None
    q = [np.arange(6).reshape(3, 2) + 10 * rank for rank in range(2)]

    def joined(name: str) -> list[int]:
        found = said.blocks(name, [(3, 2), (3, 2)]) if name != "b.fc1" else said.blocks(name, [(2, 2), (2, 2)])
        out = np.zeros(found.shape, int)
        for block in found.blocks:
            inside, at = ([slice(a, a + n) for a, n in zip(*box, strict=True)] for box in (block.inside, block.at))
            out[tuple(at)] = q[block.rank][tuple(inside)]
        return out[: found.rows, 0].tolist()

    assert joined("h.12.qkv") == [0, 10, 2, 12, 4, 14]
    assert joined("b.fc1") == [0, 10, 2, 12]
    assert joined("embed") == [0, 2, 4, 10, 12]
    with pytest.raises(ValueError, match="averaged"):
        said.blocks("mean", [(2,), (2,)])
    with pytest.raises(ValueError, match="cannot be joined along axis 1"):
        along([(2, 2), (3, 2)], 1)
