"""A pipeline's adapter merges into the network that lies by itself in a folder, and only into that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabridge import ConvertOptions, MergeOptions, convert, merge
from lorabridge.actions.recover import recover
from lorabridge.actions.verify import verify
from lorabridge.actions.verify_inputs import VerifyOptions
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError

FOLDER = Path(__file__).parents[1] / "dialects" / "diffusers"
FILE = FOLDER / "kohya_mixed_float16.safetensors"


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    """The tiny U-Net's names and shapes, with weights of its own."""
    g = torch.Generator().manual_seed(0)
    shapes = json.loads((FOLDER / "tiny_names.json").read_text("utf-8"))
    save_file({n: torch.randn(s, generator=g) for n, s in shapes.items()}, tmp_path / "unet.safetensors")
    return tmp_path / "unet.safetensors"


def named(base: Path) -> Facts:
    return Facts((Fact("*", "names_of", str(base)),))


def delta(file: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Compute what sd-scripts adds to a weight."""
    down, up = file[f"{name}.lora_down.weight"].double(), file[f"{name}.lora_up.weight"].double()
    scale = float(file[f"{name}.alpha"]) / down.shape[0] if f"{name}.alpha" in file else 1.0
    return torch.tensordot(up.reshape(up.shape[:2]), down, 1) * scale


@pytest.mark.parametrize("stated", [True, False])
def test_an_adapter_of_sd_scripts_merges_into_its_u_net(stated: bool, unet: Path, tmp_path: Path) -> None:
    options = MergeOptions(facts=named(unet)) if stated else None
    merge(unet, FILE, tmp_path / "out.safetensors", options)
    before, after, file = load_file(unet), load_file(tmp_path / "out.safetensors"), load_file(FILE)
    names = {key.partition(".")[0] for key in file}
    for name, weight in before.items():
        flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        wanted = weight if flat not in names else (weight.double() + delta(file, flat).reshape(weight.shape)).float()
        torch.testing.assert_close(after[name], wanted, rtol=0, atol=1e-6)


def test_what_was_merged_is_verified_and_recovered(unet: Path, tmp_path: Path) -> None:
    merge(unet, FILE, tmp_path / "out.safetensors")
    found = verify(FILE, tmp_path / "out.safetensors", VerifyOptions(base=unet, depths=("tensors",)))
    assert (found.exit_code, found.relation) == (0, "merge")
    assert recover(unet, tmp_path / "out.safetensors", FILE).summary().startswith("merged once, 79 of 79 modules")


def test_other_networks_factors_have_no_place_there(unet: Path, tmp_path: Path) -> None:
    convert(FILE, tmp_path / "d", ConvertOptions(target_dialect="diffusers", facts=named(unet)))
    (tmp_path / "d" / "lorabridge.json").unlink()
    path = tmp_path / "d" / "pytorch_lora_weights.safetensors"
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    more = {f"{text}.lora_A.weight": torch.ones(4, 6), f"{text}.lora_B.weight": torch.ones(8, 4)}
    save_file({**load_file(path), **more}, tmp_path / "both.safetensors")
    with pytest.raises(MappingError, match="the base is the unet alone") as caught:
        merge(unet, tmp_path / "both.safetensors", tmp_path / "out.safetensors")
    assert caught.value.where[0] == "text_encoder: 1 module"
    assert "convert --include 'unet.*'" in caught.value.hint
