"""sd-scripts' own files and names; what sd-scripts merged from ours is what it merged from its own.

``judge_kohya.py`` ran sd-scripts and wrote ``kohya_files/``.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from judge_kohya import FILES, HERE, digest, written
from safetensors import safe_open
from safetensors.torch import load_file

from lorabridge import ConvertOptions, convert
from lorabridge.dialects import flattened, flattened_spelling
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError

NAMES = json.loads(gzip.decompress((HERE / "names.json.gz").read_bytes()))
JUDGED = json.loads((HERE / "judged.json").read_text("utf-8"))


@pytest.mark.parametrize("pipeline", NAMES)
def test_every_module_that_sd_scripts_adapts_is_known_by_name_and_shape_and_spelled_back(pipeline: str) -> None:
    axes = {name: tuple(shape) for name, shape in NAMES[pipeline].items()}
    places, pipelines = flattened.resolve(axes, None, pipeline)
    assert pipelines == (pipeline,)
    plain = {place.path: name for name, place in places.items() if not place.fused}
    spelled = flattened_spelling.spell({path: axes[name] for path, name in plain.items()}, pipeline)
    assert spelled.names == plain
    fused = [name for name, place in places.items() if place.fused]
    assert all(any(part in name for part in ("qkv", "linear1", "adaLN_modulation")) for name in fused)


@pytest.mark.parametrize("name", FILES)
def test_what_sd_scripts_merged_as_its_own_is_what_is_written(name: str, tmp_path: Path) -> None:
    judged = JUDGED[name]
    assert judged["difference"] == 0.0
    assert digest(written(name, tmp_path)) == judged["digest"]


@pytest.mark.parametrize("name", FILES)
def test_its_files_go_to_mindspore_and_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    source = HERE / f"{name}.safetensors"
    facts = Facts((Fact("*", "names_of", FILES[name][0]),))
    convert(source, tmp_path / "out.ckpt", ConvertOptions(target_dialect="mindone", facts=facts))
    convert(tmp_path / "out.ckpt", tmp_path / "back.safetensors")
    assert digest(tmp_path / "back.safetensors") == digest(source)
    with safe_open(source, "pt") as before, safe_open(tmp_path / "back.safetensors", "pt") as after:
        assert after.metadata() == {"format": "pt", **before.metadata()}


def test_ranks_and_alphas_by_block_and_the_alpha_zero_that_is_a_rank(tmp_path: Path) -> None:
    done = convert(HERE / "sd15.safetensors", tmp_path / "out", ConvertOptions(target_dialect="peft"))
    scalings = {module.path: (module.rank, module.scaling) for module in done.modules}
    assert scalings["unet.down_blocks.1.attentions.0.proj_in"] == (2, 1.5)
    assert scalings["unet.down_blocks.1.resnets.0.conv1"] == (1, 1.0)
    assert scalings["text_encoder.text_model.encoder.layers.11.mlp.fc1"] == (2, 0.5)


@pytest.mark.parametrize("name", ["dylora", "lora_fa"])
def test_the_files_of_its_other_networks_are_lora(name: str, tmp_path: Path) -> None:
    """DyLoRA joins its ranks when it saves; LoRA-FA trains B only. sd-scripts itself loads both as LoRA."""
    facts = Facts((Fact("*", "names_of", str(HERE / "tiny_unet.safetensors")),))
    options = ConvertOptions(target_dialect="peft", facts=facts)
    done = convert(HERE / f"{name}.safetensors", tmp_path / "out", options)
    assert [(module.rank, module.scaling) for module in done.modules] == [(2, 0.25)] * 4
    tensors, found = load_file(HERE / f"{name}.safetensors"), load_file(tmp_path / "out" / "adapter_model.safetensors")
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    path = next(n for n in found if n.endswith("attn1.to_q.lora_A.weight"))
    assert torch.equal(found[path], tensors[f"{stem}.lora_down.weight"])


def test_oft_is_named_and_refused(tmp_path: Path) -> None:
    with pytest.raises(MappingError) as caught:
        convert(HERE / "oft.safetensors", tmp_path / "out", ConvertOptions(target_dialect="peft"))
    assert str(caught.value).startswith("OFT, which rotates the weight, is no product of factors")
