"""Adapters in other projects' names merge into transformers' base as the peft adapter that they came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabridge import ConvertOptions, MergeOptions, convert, merge
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import LorabridgeError

CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False,
    "architectures": ["LlamaForCausalLM"],
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
}  # fmt: skip


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """A base and a peft adapter on every linear layer, of whole numbers."""
    generator = torch.Generator().manual_seed(3)
    whole = {"model.embed_tokens.weight": (32, 16), "lm_head.weight": (32, 16), "model.norm.weight": (16,)}
    whole |= {f"model.layers.0.{n}_layernorm.weight": (16,) for n in ("input", "post_attention")}
    whole |= {f"model.layers.0.{n}.weight": shape for n, shape in SHAPES.items()}
    tensors = {n: torch.randint(-4, 4, shape, generator=generator).float() for n, shape in whole.items()}
    factors = {}
    for name, (rows, columns) in SHAPES.items():
        path = f"base_model.model.model.layers.0.{name}"
        factors[f"{path}.lora_A.weight"] = torch.randint(-4, 4, (2, columns), generator=generator).float()
        factors[f"{path}.lora_B.weight"] = torch.randint(-4, 4, (rows, 2), generator=generator).float()
    lora = {"r": 2, "lora_alpha": 4, "peft_type": "LORA"}
    for folder, content, stem, config in (("base", tensors, "", CONFIG), ("adapter", factors, "adapter_", lora)):
        (tmp_path / folder).mkdir()
        save_file(content, tmp_path / folder / f"{stem}model.safetensors")
        (tmp_path / folder / f"{stem}config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(("dialect", "name"), [("gguf", "a.gguf"), ("megatron", "a.pt")])
def test_a_file_of_another_project_merges_through_its_table(pair: Path, dialect: str, name: str) -> None:
    family = f"llama_{dialect}"
    options = ConvertOptions(target_dialect=dialect, family=family, config=pair / "base" / "config.json")
    done = convert(pair / "adapter", pair / name, options)
    (pair / f"{name}.lorabridge.json").unlink()
    top = max(module.rank for module in done.modules)
    facts = Facts((Fact("*", "alpha", 2 * top),))
    with pytest.raises(LorabridgeError, match=f"has {dialect} names") as caught:
        merge(pair / "base", [pair / name], pair / "out", MergeOptions(facts=facts))
    assert "--family" in caught.value.hint
    merge(pair / "base", [pair / name], pair / "out", MergeOptions(facts=facts, family=family))
    merge(pair / "base", [pair / "adapter"], pair / "expected")
    found, expected = (load_file(pair / out / "model.safetensors") for out in ("out", "expected"))
    assert all(torch.equal(found[key], value) for key, value in expected.items())
