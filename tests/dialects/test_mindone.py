"""MindOne's own LoRA layers: MindSpore cells of their shape load what is written, and compute the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from judge_diffusers import FOLDER, digest, written
from safetensors.torch import load_file, save_file

from lorabridge import ConvertOptions, convert
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError

JUDGED = json.loads((Path(__file__).parent / "mindone_judged.json").read_text("utf-8"))
PATH = "input_blocks.4.1.transformer_blocks.1.attn2.to_k"
FLAT = "lora_unet_" + PATH.replace(".", "_")
MODULE = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An SDXL adapter of sd-scripts with one module of scaling 0.5."""
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"{FLAT}.lora_down.weight": torch.randn(4, 2048, generator=g) / 8,
        f"{FLAT}.lora_up.weight": torch.randn(640, 4, generator=g) / 8,
        f"{FLAT}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def cells(dialect: str, rank: int, scale: float):
    """Build a layer with MindOne's parameters and formula (mindone/models/lora.py; gm/modules/lora/layers.py)."""
    from mindspore import nn

    down, up = {"mindone-lora": ("lora_down", "lora_up"), "mindone-gm": ("lora_A", "lora_B")}[dialect]

    class Layer(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, down, nn.Dense(2048, rank, has_bias=False))
            setattr(self, up, nn.Dense(rank, 640, has_bias=False))

        def construct(self, x):
            return getattr(self, up)(getattr(self, down)(x)) * scale

    return Layer()


@pytest.mark.parametrize(("dialect", "needs"), [
    ("mindone-lora", "inject the layers with rank=4 and scale=0.5: the file cannot say them"),
    ("mindone-gm", "build the network with lora_dim=4 and lora_alpha=2: the file cannot say them"),
])  # fmt: skip
def test_a_cell_of_mindone_s_shape_computes_the_delta(dialect: str, needs: str, source: Path, tmp_path: Path) -> None:
    import mindspore

    done = convert(source, tmp_path / "o.ckpt", ConvertOptions(target_dialect=dialect, family="sdxl"))
    assert needs in done.notes
    layer = cells(dialect, 4, 0.5)
    given = mindspore.load_checkpoint(str(tmp_path / "o.ckpt"))
    assert {name.rpartition(f"{PATH}.")[0] for name in given} == {"model.diffusion_model."}
    own = {name.removeprefix(f"model.diffusion_model.{PATH}."): value for name, value in given.items()}
    missing, unused = mindspore.load_param_into_net(layer, own, strict_load=True)
    assert (list(missing), list(unused)) == ([], [])
    x = np.random.default_rng(0).standard_normal((3, 2048)).astype(np.float32)
    tensors = load_file(source)
    wanted = 0.5 * torch.from_numpy(x) @ tensors[f"{FLAT}.lora_down.weight"].T @ tensors[f"{FLAT}.lora_up.weight"].T
    found = layer(mindspore.Tensor(x)).asnumpy()
    np.testing.assert_allclose(found, wanted.numpy(), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dialect", ["mindone-lora", "mindone-gm"])
def test_the_way_back_needs_alpha_and_gives_diffusers_names(dialect: str, source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "o.ckpt", ConvertOptions(target_dialect=dialect, family="sdxl"))
    (tmp_path / "o.ckpt.lorabridge.json").unlink()
    options = ConvertOptions(target_dialect="diffusers", family="sdxl")
    with pytest.raises(MappingError, match="alpha is not stored in the file"):
        convert(tmp_path / "o.ckpt", tmp_path / "back", options)
    done = convert(
        tmp_path / "o.ckpt", tmp_path / "back",
        ConvertOptions(target_dialect="diffusers", family="sdxl", facts=Facts((Fact("*", "alpha", 2),))),
    )  # fmt: skip
    assert done.source_dialect == dialect
    assert [module.path for module in done.modules] == [MODULE]


@pytest.mark.parametrize("dialect", ["mindone-lora", "mindone-gm"])
def test_diffusers_names_are_refused_without_a_table(dialect: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="the paths are diffusers'") as caught:
        convert(source, tmp_path / "o.ckpt", ConvertOptions(target_dialect=dialect))
    assert "--family sd15, sd21 or sdxl" in caught.value.hint


def test_convolutions_have_no_layer_there(tmp_path: Path) -> None:
    name = "lora_unet_input_blocks_4_0_in_layers_2"
    down, up = torch.ones(4, 320, 3, 3), torch.ones(640, 4, 1, 1)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "in.safetensors")
    options = ConvertOptions(target_dialect="mindone-gm", family="sdxl")
    with pytest.raises(MappingError, match="mindone-gm has no LoRA for conv2d") as caught:
        convert(tmp_path / "in.safetensors", tmp_path / "o.ckpt", options)
    assert caught.value.where == ("model.diffusion_model.input_blocks.4.0.in_layers.2",)


@pytest.mark.parametrize("source", ["mixed_float16", "uniform_float16"])
def test_what_is_written_today_is_what_mindone_loaded(source: str, tmp_path: Path) -> None:
    verdicts = JUDGED["layers"]
    for case, path in written(FOLDER / f"kohya_{source}.safetensors", tmp_path).items():
        if case != "kohya":
            verdict = verdicts[f"{source} {case}"]
            assert verdict["digest"] == digest(path), case
            assert verdict["layers"] == 79, case
            assert verdict["difference"] < 2e-7, case
    named = Facts((Fact("*", "names_of", str(tmp_path / "base.safetensors")),))
    out = tmp_path / "pytorch_lora_weights.ckpt"
    convert(FOLDER / f"kohya_{source}.safetensors", out, ConvertOptions(target_dialect="mindone", facts=named))
    assert verdicts[f"{source} ckpt"]["digest"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert verdicts[f"{source} ckpt"]["difference"] < 2e-7


def test_mindone_s_own_layer_computed_the_delta() -> None:
    assert JUDGED["models_lora"]["unused"] == []
    assert JUDGED["models_lora"]["difference"] < 1e-6
