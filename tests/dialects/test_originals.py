"""The original code's names: what diffusers' converters make of a file, and what they make of what is written."""

from __future__ import annotations

import json
from pathlib import Path

import originals_cases as made
import pytest
import torch
from judge_originals import TARGETS, file_digest, write
from safetensors.torch import load_file, save_file

from lorabridge import ConvertOptions, convert
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError

JUDGED = json.loads((Path(__file__).parent / "originals_judged.json").read_text("utf-8"))
CASES = made.cases()


def said(**facts: str) -> Facts:
    return Facts(tuple(Fact("*", name, value) for name, value in facts.items()))


def file(tensors: made.Tensors, folder: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "in.safetensors")
    return folder / "in.safetensors"


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_read_as_diffusers_reads_it(name: str, tmp_path: Path) -> None:
    source = file(CASES[name][1], tmp_path)
    options = ConvertOptions(target_dialect="diffusers", facts=said(alpha_in="weights"))
    convert(source, tmp_path / "out.safetensors", options)
    assert made.digests(load_file(tmp_path / "out.safetensors")) == JUDGED["read"][name]


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_what_diffusers_judged(name: str, tmp_path: Path) -> None:
    pipeline, tensors = CASES[name]
    write(file(tensors, tmp_path), tmp_path / "back.safetensors", pipeline, TARGETS[name])
    judged = JUDGED["written"][name]
    assert file_digest(tmp_path / "back.safetensors") == judged["file"]
    assert judged["other"] == (["transformer.norm_out.linear"] if name == "bfl" else [])


FLUX = "transformer.transformer_blocks.0.attn"


def lora(*modules: str, rank: int = 4) -> made.Tensors:
    shapes = {f"{FLUX}.{name}" if "." not in name else name: (3072, 3072) for name in modules}
    return made.factors(shapes, rank, made.AB, None)


def refusal(tensors: made.Tensors, dialect: str, folder: Path, **facts: str) -> str:
    source, options = file(tensors, folder), ConvertOptions(target_dialect=dialect, facts=said(**facts))
    with pytest.raises(MappingError) as error:
        convert(source, folder / "out.safetensors", options)
    return str(error.value)


def test_the_way_back_from_mindspore_restores_every_bit(tmp_path: Path) -> None:
    tensors = {**CASES["comfy_flux"][1], **made.with_biases(made.wan(made.COMFY, made.DOWN_UP, 3.0), "ffn")}
    tensors = {name: tensor for name, tensor in tensors.items() if "blocks.0" in name and "double" not in name}
    tensors = {name: tensor for name, tensor in tensors.items() if "single" not in name}
    convert(file(tensors, tmp_path), tmp_path / "out.ckpt", ConvertOptions(target_dialect="mindone"))
    done = convert(tmp_path / "out.ckpt", tmp_path / "back.safetensors")
    assert "restored bit for bit from the manifest" in done.notes
    found = load_file(tmp_path / "back.safetensors")
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_attention_that_two_networks_have_needs_a_choice(tmp_path: Path) -> None:
    told = refusal(lora("to_q", "to_k", "to_v"), "comfy", tmp_path)
    assert "flux or hunyuan_video" in told
    assert "--names-of" in told
    for only, name in (("flux", "img_attn.qkv"), ("hunyuan_video", "img_attn_qkv")):
        options = ConvertOptions(target_dialect="comfy", facts=said(names_of=only), overwrite=True)
        convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", options)
        found = load_file(tmp_path / "out.safetensors")
        assert any(key.startswith(f"diffusion_model.double_blocks.0.{name}.lora_") for key in found)


def test_sd_scripts_attention_means_one_thing_in_both_networks(tmp_path: Path) -> None:
    flat = {"lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072), "lora_unet_single_blocks_3_linear1": (21504, 3072)}
    done = convert(
        file(made.factors(flat, 2, made.DOWN_UP, 2.0), tmp_path),
        tmp_path / "out",
        ConvertOptions(target_dialect="peft"),
    )
    assert len(done.modules) == 7


def test_xlabs_takes_the_attention_only(tmp_path: Path) -> None:
    tensors = lora("transformer.single_transformer_blocks.0.attn.to_q")
    tensors |= made.factors({"transformer.single_transformer_blocks.0.proj_mlp": (12288, 3072)}, 2, made.AB, None)
    assert "not the MLP of its single blocks" in refusal(tensors, "xlabs", tmp_path, names_of="flux")
    tensors = made.factors({"transformer.transformer_blocks.0.ff.net.0.proj": (12288, 3072)}, 2, made.AB, None)
    assert "the attention of Flux only" in refusal(tensors, "xlabs", tmp_path, names_of="flux")


def test_modules_of_no_known_model_are_refused(tmp_path: Path) -> None:
    told = refusal(
        made.factors({"transformer.transformer_blocks.0.attn.to_x": (8, 8)}, 2, made.AB, None), "comfy", tmp_path
    )
    assert "are not known" in told
    assert "wan" in told


def test_text_encoders_have_names_in_comfy_only(tmp_path: Path) -> None:
    tensors = lora("to_q") | made.factors(
        {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (768, 768)}, 4, made.AB, None
    )
    assert "bfl has no text encoders" in refusal(tensors, "bfl", tmp_path, names_of="flux")
    options = ConvertOptions(target_dialect="comfy", facts=said(names_of="flux"))
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", options)
    name = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    assert f"{name}.lora_down.weight" in load_file(tmp_path / "out.safetensors")
    options = ConvertOptions(target_dialect="diffusers", facts=said(alpha_in="weights"))
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(tmp_path / "out.safetensors"), plain)
    convert(plain, tmp_path / "back.safetensors", options)
    assert made.digests(load_file(tmp_path / "back.safetensors")).items() >= made.digests(tensors).items()


def test_a_bias_without_factors_and_foreign_tensors_are_refused(tmp_path: Path) -> None:
    wan = made.wan(made.COMFY, made.AB, None)
    alone = {f"{made.COMFY}time_embedding.0.diff_b": torch.zeros(24)}
    assert "a change of a bias without factors" in refusal({**wan, **alone}, "diffusers", tmp_path)
    assert "is nothing of a LoRA" in refusal({**wan, f"{made.COMFY}blocks.0.norm3.weight": torch.zeros(24)},
                                             "diffusers", tmp_path)  # fmt: skip


def test_sd3_s_original_names_go_there_and_back(tmp_path: Path) -> None:
    shapes = {
        f"{made.COMFY}joint_blocks.0.{name}": (4608, 1536) for name in ("x_block.attn.qkv", "context_block.attn.qkv")
    }
    tensors = made.factors(shapes, 2, made.DOWN_UP, 2.0)
    convert(file(tensors, tmp_path), tmp_path / "d", ConvertOptions(target_dialect="diffusers"))
    (tmp_path / "d" / "lorabridge.json").unlink(missing_ok=True)
    assert len(load_file(tmp_path / "d" / "pytorch_lora_weights.safetensors")) == 12
    options = ConvertOptions(target_dialect="comfy", facts=said(names_of="sd3"))
    convert(tmp_path / "d", tmp_path / "back.safetensors", options)
    written = load_file(tmp_path / "back.safetensors")
    for name in shapes:
        up, down = (written[f"{name}.{end}"] for end in reversed(made.DOWN_UP))
        before = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
        assert torch.equal(up @ down * written[f"{name}.alpha"] / down.shape[0], before)


def test_names_of_another_model_are_found_in_its_files(tmp_path: Path) -> None:
    path = "transformer_blocks.0.attn1.to_q"
    tensors = made.factors({f"{made.COMFY}{path}": (8, 8)}, 2, made.AB, None)
    assert "not found among the modules" in refusal(tensors, "diffusers", tmp_path)
    save_file({f"{path}.weight": torch.zeros(8, 8)}, tmp_path / "base.safetensors")
    options = ConvertOptions(target_dialect="diffusers", facts=said(names_of=str(tmp_path / "base.safetensors")))
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", options)
    assert set(load_file(tmp_path / "out.safetensors")) == {f"transformer.{path}.lora_{s}.weight" for s in "AB"}
