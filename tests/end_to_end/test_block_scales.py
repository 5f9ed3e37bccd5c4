"""float8 weights with block scales: the product that DeepSeek's and MindFormers' scripts make in torch is the judge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabridge import ConvertOptions, convert
from lorabridge.actions.extract import ExtractOptions, extract
from lorabridge.actions.merge import MergeOptions, merge
from lorabridge.errors import MappingError

Tensors = dict[str, torch.Tensor]
SIZES = {"hidden_size": 160, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 200, "vocab_size": 40, "model_type": "llama"}  # fmt: skip


def scaled_by_blocks(shape: tuple[int, int], block: tuple[int, int], dtype: torch.dtype) -> Tensors:
    """Return a weight of every float8 number, NaN apart, and scales that need rounding."""
    rows, columns = shape
    codes = torch.arange(rows * columns).remainder(256).to(torch.uint8)
    codes[codes.remainder(128) == 127] = 0
    scales = torch.rand(-(-rows // block[0]), -(-columns // block[1])) * 1e-3 + 1e-5
    return {"weight": codes.view(torch.float8_e4m3fn).reshape(shape), "weight_scale_inv": scales.to(dtype)}


def product(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The rule of DeepSeek's fp8_cast_bf16.py: multiplied in float32."""
    every = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return weight.float() * every[: weight.shape[0], : weight.shape[1]]


def model(folder: Path, block: tuple[int, int] = (128, 128), *, said: bool = True, dtype: torch.dtype = torch.float32,
          scales: bool = True) -> Tensors:  # fmt: skip
    """Write a small Llama with float8 projections; return the tensors."""
    torch.manual_seed(0)
    plain = {"model.embed_tokens.weight": (40, 160), "model.norm.weight": (160,), "lm_head.weight": (40, 160),
             "model.layers.0.input_layernorm.weight": (160,),
             "model.layers.0.post_attention_layernorm.weight": (160,)}  # fmt: skip
    tensors = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in plain.items()}
    rows = {"self_attn.q_proj": (160, 160), "self_attn.k_proj": (80, 160), "self_attn.v_proj": (80, 160),
            "self_attn.o_proj": (160, 160), "mlp.gate_proj": (200, 160), "mlp.up_proj": (200, 160),
            "mlp.down_proj": (160, 200)}  # fmt: skip
    for name, shape in rows.items():
        for kind, tensor in scaled_by_blocks(shape, block, dtype).items():
            tensors[f"model.layers.0.{name}.{kind}"] = tensor
    folder.mkdir()
    kept = {name: tensor for name, tensor in tensors.items() if scales or not name.endswith("inv")}
    save_file(kept, folder / "model.safetensors")
    quantization = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}} if said else {}
    (folder / "config.json").write_text(json.dumps(SIZES | quantization))
    return tensors


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(
    ("block", "said", "scale"),
    [((128, 128), False, torch.float32), ((128, 128), True, torch.bfloat16), ((64, 32), True, torch.float32)],
)
def test_products_are_those_of_the_scripts_bit_for_bit(
    tmp_path: Path, block: tuple[int, int], said: bool, scale: torch.dtype, dtype: str
) -> None:
    tensors = model(tmp_path / "in", block, said=said, dtype=scale)
    options = ConvertOptions(dequantize=True, dtype=None if dtype == "bf16" else dtype, family="llama")
    report = convert(tmp_path / "in", tmp_path / "ms.safetensors", options)
    made = load_file(tmp_path / "ms.safetensors")
    target = torch.bfloat16 if dtype == "bf16" else torch.float32
    pairs = {"attention.wq": "self_attn.q_proj", "attention.wv": "self_attn.v_proj", "feed_forward.w2": "mlp.down_proj"}
    for ms, hf in pairs.items():
        name = f"model.layers.0.{hf}.weight"
        wanted = product(tensors[name], tensors[f"{name}_scale_inv"], block).to(target)
        value = made[f"model.layers.0.{ms}.weight"]
        assert value.dtype == target
        assert torch.equal(value.view(torch.uint8), wanted.view(torch.uint8))
    assert not [name for name in made if "scale" in name]
    exact = dtype == "fp32" and scale == torch.bfloat16  # 4 bits times 8
    parts = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"] + [f"feed_forward.w{k}" for k in (1, 2, 3)]
    rounded = {f"model.layers.0.{part}.weight" for part in parts if not exact}
    assert {row.tensor for row in report.rounding if row.inexact} == rounded


def test_blocks_larger_than_the_weight_cost_no_memory(tmp_path: Path) -> None:
    tensors = model(tmp_path / "in", (10**12, 10**12))
    convert(tmp_path / "in", tmp_path / "ms.safetensors", ConvertOptions(dequantize=True, family="llama"))
    name = "model.layers.0.self_attn.k_proj.weight"
    wanted = (tensors[name].float() * tensors[f"{name}_scale_inv"]).to(torch.bfloat16)
    made = load_file(tmp_path / "ms.safetensors")["model.layers.0.attention.wk.weight"]
    assert torch.equal(made.view(torch.uint8), wanted.view(torch.uint8))


def test_the_config_of_a_widened_model_says_nothing_of_float8(tmp_path: Path) -> None:
    model(tmp_path / "in")
    options = ConvertOptions(dequantize=True, family="identity", target_dialect="hf")
    convert(tmp_path / "in", tmp_path / "out", options)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in said
    assert said["hidden_size"] == 160
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == 12
    ms = ConvertOptions(dequantize=True, family="llama", target_dialect="ms")
    convert(tmp_path / "in", tmp_path / "ms.safetensors", ms)
    back = ConvertOptions(family="llama", target_dialect="hf", config=tmp_path / "in" / "config.json")
    report = convert(tmp_path / "ms.safetensors", tmp_path / "back", back)
    assert any("rounded on the way here" in text for text in report.warnings)
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_without_the_option_float8_stays_or_is_refused(tmp_path: Path) -> None:
    tensors = model(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "copy", ConvertOptions(family="identity", target_dialect="hf"))
    assert "quantization_config" in json.loads((tmp_path / "copy" / "config.json").read_text())
    copied = load_file(tmp_path / "copy" / "model.safetensors")
    assert all(torch.equal(copied[n].view(torch.uint8), t.view(torch.uint8)) for n, t in tensors.items())
    with pytest.raises(MappingError, match="7 weights in float8 with block scales cannot go through a table") as error:
        convert(tmp_path / "in", tmp_path / "no.safetensors", ConvertOptions(family="llama", target_dialect="ms"))
    assert error.value.hint.endswith("--dequantize")
    assert not (tmp_path / "no.safetensors").exists()


def test_scales_that_do_not_fit_and_weights_without_any_are_refused(tmp_path: Path) -> None:
    model(tmp_path / "odd", (64, 32), said=False)
    options = ConvertOptions(dequantize=True, family="llama", target_dialect="ms")
    with pytest.raises(MappingError, match="block scales do not fit their weights") as error:
        convert(tmp_path / "odd", tmp_path / "no.safetensors", options)
    assert error.value.where[1] == (
        "model.layers.0.mlp.gate_proj.weight: [200, 160] in blocks of 128 x 128, scales float32 [4, 5]"
    )
    model(tmp_path / "bare", scales=False)
    with pytest.raises(MappingError, match="no float8 weights with block scales"):
        convert(tmp_path / "bare", tmp_path / "no.safetensors", options)


def test_numbers_are_not_added_to_codes(tmp_path: Path) -> None:
    """A delta added to float8 codes that still lack their scale would be another model."""
    model(tmp_path / "base")
    at = "base_model.model.model.layers.0.self_attn.q_proj"
    (tmp_path / "adapter").mkdir()
    save_file({f"{at}.lora_A.weight": torch.randn(2, 160), f"{at}.lora_B.weight": torch.randn(160, 2)},
              tmp_path / "adapter" / "adapter_model.safetensors")  # fmt: skip
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(MappingError, match="float8 with block scales cannot take an adapter in"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", MergeOptions())
    with pytest.raises(MappingError, match="float8 with block scales cannot be compared as numbers"):
        extract(tmp_path / "base", tmp_path / "base", tmp_path / "delta", ExtractOptions(rank=2))
    convert(tmp_path / "base", tmp_path / "wide", ConvertOptions(dequantize=True, family="identity"))
    assert merge(tmp_path / "wide", [tmp_path / "adapter"], tmp_path / "merged", MergeOptions()).rows
