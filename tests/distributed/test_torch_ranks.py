"""PyTorch's distributed checkpoints: DCP of FSDP2 and of one process, DeepSpeed ZeRO 2 and 3, by their own writers."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.reassemble import reassemble
from lorabridge.actions.reshard import ReshardOptions, reshard
from lorabridge.distributed import open_distributed
from lorabridge.distributed.grid import assemble_boxes
from lorabridge.dtypes import BY_NAME
from lorabridge.errors import InputError

DATA = Path(__file__).parent / "data"
FSDP = DATA / "dcp_peft_fsdp2"


def whole(source: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    reassemble(source, tmp_path / "whole.safetensors", ConvertOptions(target_dialect="hf", source_dialect="hf"))
    return load_file(tmp_path / "whole.safetensors")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert ours[name].shape == value.shape
        bits = [one.contiguous().reshape(-1).view(torch.uint8) for one in (ours[name], value)]
        assert torch.equal(*bits), name


def test_chunks_of_four_fsdp2_processes_make_the_adapter(tmp_path: Path) -> None:
    same(whole(FSDP, tmp_path), torch.load(FSDP / "full.pt"))


def test_an_fsdp2_adapter_becomes_a_peft_directory(tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    config.write_text(
        json.dumps({"peft_type": "LORA", "r": 6, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"]})
    )
    done = reassemble(FSDP, tmp_path / "adapter", ConvertOptions(target_dialect="peft", config=config))
    assert {module.scaling for module in done.modules} == {2.0}
    written = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    full = torch.load(FSDP / "full.pt")
    assert written.keys() == {name.replace(".default", "") for name in full}
    assert all(torch.equal(written[name.replace(".default", "")], value) for name, value in full.items())


def test_a_state_of_model_and_optimizer_gives_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3)).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 5, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    model = net.state_dict()
    state = {"model": model, "optim": optimizer.state_dict(), "step": 7}
    dcp.save(state, checkpoint_id=tmp_path / "run", no_dist=True)
    source = open_distributed(tmp_path / "run")
    assert source is not None
    assert source.specs.keys() == model.keys()
    assert any(name.startswith("optim.state") for name, _ in source.skipped)
    assert dict(source.skipped)["step"] == "not a tensor"
    for name, value in model.items():
        assert np.array_equal(source.read(name), value.view(torch.uint16).numpy())


def test_four_fsdp1_processes_training_state_gives_the_model_and_names_the_rest(tmp_path: Path) -> None:
    run = DATA / "dcp_fsdp1_train"
    same(whole(run, tmp_path), torch.load(run / "full.pt"))
    source = open_distributed(run)
    assert source is not None
    left = {name for name, _ in source.skipped}
    assert {f"optim.state.{n}.exp_avg" for n in source.specs} <= left
    assert any(len({b[1] for b in p.boxes.values()}) > 1 for p in source.arrangement.placed.values()), "uneven rows"


def test_torchs_own_conversion_gives_the_same_bits(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(FSDP, tmp_path / "theirs.pt")
    same(whole(FSDP, tmp_path), torch.load(tmp_path / "theirs.pt"))


def test_a_missing_file_and_a_truncated_one_are_named(tmp_path: Path) -> None:
    run = Path(shutil.copytree(FSDP, tmp_path / "run"))
    lost = run / "__2_0.distcp"
    data = lost.read_bytes()
    lost.unlink()
    with pytest.raises(InputError, match=r"__2_0\.distcp"):
        open_distributed(run)
    lost.write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"__2_0\.distcp"):
        reassemble(run, tmp_path / "whole.safetensors")
    assert not (tmp_path / "whole.safetensors").exists()


class Exploit:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/lorabridge-was-here",)


@pytest.mark.parametrize(
    "value", [Exploit(), {"a": 1}, None, [], torch.distributed.checkpoint.metadata.Metadata({}), b"\x00" * 10]
)
def test_metadata_that_is_none_is_refused(value: object, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(InputError, match="the metadata is not accepted"):
        open_distributed(tmp_path)
    assert not Path("/tmp/lorabridge-was-here").exists()


def test_files_outside_the_directory_are_refused(tmp_path: Path) -> None:
    run = Path(shutil.copytree(FSDP, tmp_path / "run"))
    metadata = pickle.loads((run / ".metadata").read_bytes())
    first = next(iter(metadata.storage_data))
    metadata.storage_data[first].relative_path = "../run/__0_0.distcp"
    (run / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="does not lie beside it"):
        open_distributed(run)


def test_chunks_that_leave_a_gap_or_lap_over_are_refused(tmp_path: Path) -> None:
    run = Path(shutil.copytree(FSDP, tmp_path / "run"))
    metadata = pickle.loads((run / ".metadata").read_bytes())
    name = next(iter(metadata.state_dict_metadata))
    gone = metadata.state_dict_metadata[name].chunks.pop(1)
    (run / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="nothing holds 2 to 4 of axis 0"):
        open_distributed(run)
    metadata.state_dict_metadata[name].chunks += [gone, gone]
    metadata.state_dict_metadata[name].chunks[0].sizes = torch.Size([3, 256])
    (run / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="chunks lap over at 2 of axis 0"):
        open_distributed(run)


def test_boxes_are_put_together_over_several_axes() -> None:
    from lorabridge import axes
    from lorabridge.tensors import TensorSpec

    value = np.arange(5 * 6 * 2, dtype=np.uint32).reshape(5, 6, 2)
    dtype = BY_NAME["float32"]
    boxes, bits = {}, {}
    for rows in ((0, 2), (2, 3)):
        for columns in ((0, 6),) if rows[0] else ((0, 1), (1, 5)):
            box = ((rows[0], columns[0], 0), (rows[1], columns[1], 2))
            bits[str(box)] = value[rows[0] : sum(rows), columns[0] : sum(columns)]
            boxes[box] = axes.read(TensorSpec(str(box), dtype, box[1]))
    expr = assemble_boxes(boxes, value.shape, dtype)
    assert np.array_equal(axes.evaluate(expr, bits.__getitem__, {}), value)
    with pytest.raises(ValueError, match="outside the shape"):
        assemble_boxes(boxes, (5, 5, 2), dtype)
    with pytest.raises(ValueError, match="nothing holds 5 to 7 of axis 0"):
        assemble_boxes(boxes, (7, 6, 2), dtype)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_partitions_make_the_fp32_masters(stage: int, tmp_path: Path) -> None:
    folder = DATA / f"deepspeed_zero{stage}_lora"
    full = torch.load(folder / "full_lora.pt")
    same(whole(folder, tmp_path), full)
    source = open_distributed(folder / "global_step1")
    assert source is not None
    assert source.arrangement.kind == f"deepspeed ZeRO-{stage}"
    assert all(source.extents(name) for name in source.specs)


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_torch_loads_the_chunks_that_are_written(ranks: int, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    torch.manual_seed(ranks)
    state = {
        "layers.0.weight": torch.randn(7, 5, dtype=torch.bfloat16),
        "layers.0.bias": torch.randn(7),
        "scale": torch.tensor(2.5, dtype=torch.float64),
        "index": torch.arange(12).reshape(2, 3, 2),
        "wide": torch.randn(1, 300, dtype=torch.float16),
        "float8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    }
    torch.save(state, tmp_path / "whole.pt")
    done = reshard(tmp_path / "whole.pt", tmp_path / "run", ReshardOptions(dcp=ranks))
    assert (done.ranks, done.format) == (ranks, "torch DCP")
    target = {name: torch.zeros_like(value) for name, value in state.items()}
    dcp.load(target, checkpoint_id=tmp_path / "run", no_dist=True)
    same(target, state)
    dcp_to_torch_save(tmp_path / "run", tmp_path / "again.pt")
    same(torch.load(tmp_path / "again.pt"), state)
    same(whole(tmp_path / "run", tmp_path), state)


def test_four_fsdp2_processes_chunks_are_cut_for_three(tmp_path: Path) -> None:
    reshard(FSDP, tmp_path / "three", ReshardOptions(dcp=3))
    once = sorted((p.name, p.read_bytes()) for p in (tmp_path / "three").iterdir())
    reshard(tmp_path / "three", tmp_path / "two", ReshardOptions(dcp=2))
    reshard(tmp_path / "two", tmp_path / "again", ReshardOptions(dcp=3))
    assert once == sorted((p.name, p.read_bytes()) for p in (tmp_path / "again").iterdir())
    target = {name: torch.zeros_like(value) for name, value in torch.load(FSDP / "full.pt").items()}
    dcp.load(target, checkpoint_id=tmp_path / "again", no_dist=True)
    same(target, torch.load(FSDP / "full.pt"))
