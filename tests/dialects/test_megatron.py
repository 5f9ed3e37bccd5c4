"""NeMo's and Megatron-Bridge's adapters: names and fused rows by their sources' rules; peft computes the effect.

Rows are fused as ``merge_qkv_weights`` of megatron-bridge 0.3.1 fuses them; test_judged_megatron.py has its own files.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lorabridge import ConvertOptions, convert
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError

HEADS, GROUPS, HEAD, HIDDEN, INNER = 6, 2, 4, 18, 20
FIELDS = {
    "vocab_size": 40, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
    "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": HEAD, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**FIELDS, "model_type": "llama"}))
    return path


def options(config: Path, target: str, **more: object) -> ConvertOptions:
    return ConvertOptions(target_dialect=target, family="llama_megatron", config=config, **more)  # type: ignore[arg-type]


def merged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Interleave as param_mapping.merge_qkv_weights does: the q of a group, its k, its v."""
    q, k, v = q.view(HEADS, HEAD, -1), k.view(GROUPS, HEAD, -1), v.view(GROUPS, HEAD, -1)
    per = HEADS // GROUPS
    rows = [part for i in range(GROUPS) for part in (q[i * per : (i + 1) * per], k[i : i + 1], v[i : i + 1])]
    return torch.cat(rows).reshape(-1, q.shape[-1])


def adapter(prefix: str = "", seed: int = 0) -> dict[str, torch.Tensor]:
    """Make factors for every layer that Megatron-Bridge's LoRA adapts by default."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "self_attention.linear_qkv": (HIDDEN, (HEADS + 2 * GROUPS) * HEAD),
        "self_attention.linear_proj": (HEADS * HEAD, HIDDEN),
        "mlp.linear_fc1": (HIDDEN, 2 * INNER), "mlp.linear_fc2": (INNER, HIDDEN),
    }  # fmt: skip
    out = {}
    for layer in range(2):
        for name, (inner, rows) in shapes.items():
            stem = f"{prefix}decoder.layers.{layer}.{name}.adapter"
            out[f"{stem}.linear_in.weight"] = torch.randn(3, inner, generator=generator)
            out[f"{stem}.linear_out.weight"] = torch.randn(rows, 3, generator=generator)
    return out


def peft_deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Let peft load an adapter over a Llama and return the delta of every module."""
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    model = PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**FIELDS)), str(folder))
    return {
        path: module.get_delta_weight("default").detach()
        for path, module in model.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def check(found: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], scaling: float, prefix: str = "") -> None:
    for layer in range(2):
        hf, stem = f"model.layers.{layer}", f"{prefix}decoder.layers.{layer}"

        def delta(name: str, stem: str = stem) -> torch.Tensor:
            a, b = (tensors[f"{stem}.{name}.adapter.linear_{end}.weight"] for end in ("in", "out"))
            return scaling * b @ a

        q, k, v = (found[f"{hf}.self_attn.{x}_proj"] for x in "qkv")
        assert torch.allclose(merged(q, k, v), delta("self_attention.linear_qkv"), atol=1e-5)
        assert torch.allclose(found[f"{hf}.self_attn.o_proj"], delta("self_attention.linear_proj"), atol=1e-5)
        fc1 = torch.cat([found[f"{hf}.mlp.gate_proj"], found[f"{hf}.mlp.up_proj"]])
        assert torch.allclose(fc1, delta("mlp.linear_fc1"), atol=1e-5)
        assert torch.allclose(found[f"{hf}.mlp.down_proj"], delta("mlp.linear_fc2"), atol=1e-5)


@pytest.mark.parametrize("prefix", ["", "module.", "model.module."])
def test_fused_layers_become_peft_s_modules(tmp_path: Path, config: Path, prefix: str) -> None:
    tensors = adapter(prefix)
    torch.save(tensors, tmp_path / "a.pt")
    stated = options(config, "peft", facts=Facts((Fact("*", "alpha", 6),)))
    report = convert(tmp_path / "a.pt", tmp_path / "out", stated)
    assert (report.source_dialect, len(report.modules)) == ("megatron", 14)
    check(peft_deltas(tmp_path / "out"), tensors, 2.0, prefix)
    back = convert(tmp_path / "out", tmp_path / "back.pt", ConvertOptions(target_dialect="megatron"))
    assert "restored bit for bit" in back.notes[0]
    again = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def trained(tmp_path: Path, **lora: object) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**FIELDS)), LoraConfig(**settings))  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    return tmp_path / "peft"


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("targets", [SEVEN, ["q_proj", "v_proj", "o_proj"]])
def test_peft_s_modules_become_fused_layers_of_a_higher_rank(tmp_path: Path, config: Path, targets: list[str]) -> None:
    source = trained(tmp_path, target_modules=targets)
    report = convert(source, tmp_path / "out.pt", options(config, "megatron"))
    assert any("dim=6" in note or "dim=4" in note for note in report.notes)
    tensors = torch.load(tmp_path / "out.pt", weights_only=True)
    facts = json.loads((tmp_path / "out.pt.lorabridge.json").read_text())["target"]
    assert facts
    rank, alpha = report.modules[0].rank, report.modules[0].alpha
    found = peft_deltas(source)
    for layer in range(2):
        stem = f"decoder.layers.{layer}.self_attention.linear_qkv.adapter"
        zeros = torch.zeros(GROUPS * HEAD, HIDDEN)
        q, k, v = (found.get(f"model.layers.{layer}.self_attn.{x}_proj", zeros) for x in "qkv")
        delta = alpha / rank * tensors[f"{stem}.linear_out.weight"] @ tensors[f"{stem}.linear_in.weight"]
        assert torch.allclose(delta, merged(q, k, v), atol=1e-5)
    back = convert(tmp_path / "out.pt", tmp_path / "back", ConvertOptions(target_dialect="peft"))
    assert "restored bit for bit" in back.notes[0]
    first, second = (load_file(d / "adapter_model.safetensors") for d in (source, tmp_path / "back"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_canonical_adapters_are_one_to_one(tmp_path: Path, config: Path) -> None:
    source = trained(tmp_path, target_modules=SEVEN)
    canonical = {"lora": "canonical"}
    report = convert(source, tmp_path / "out.pt", options(config, "megatron", layout=canonical))
    assert {module.rank for module in report.modules} == {2}
    tensors = torch.load(tmp_path / "out.pt", weights_only=True)
    first = load_file(source / "adapter_model.safetensors")
    stem = "decoder.layers.1.self_attention.linear_qkv.adapter.adapter_k"
    theirs = "base_model.model.model.layers.1.self_attn.k_proj"
    assert torch.equal(tensors[f"{stem}.linear_in.weight"], first[f"{theirs}.lora_A.weight"])
    assert torch.equal(tensors[f"{stem}.linear_out.weight"], first[f"{theirs}.lora_B.weight"])
    (tmp_path / "out.pt.lorabridge.json").unlink()
    stated = options(config, "peft", layout=canonical, facts=Facts((Fact("*", "alpha", 6),)))
    convert(tmp_path / "out.pt", tmp_path / "plain", stated)
    second = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nemo_1_names_mean_the_same(tmp_path: Path, config: Path) -> None:
    tensors = adapter()
    names = {
        "self_attention.linear_qkv.adapter": "self_attention.adapter_layer.lora_kqv_adapter",
        "self_attention.linear_proj.adapter": "self_attention.adapter_layer.lora_dense_attention_adapter",
        "mlp.linear_fc1.adapter": "mlp.adapter_layer.lora_hto4h_adapter",
        "mlp.linear_fc2.adapter": "mlp.adapter_layer.lora_4htoh_adapter",
    }
    old = {}
    for name, value in tensors.items():
        for new, first in names.items():
            if new in name:
                old[f"model.{name.replace(new, first)}"] = value
    torch.save(old, tmp_path / "a.ckpt.pt")
    convert(tmp_path / "a.ckpt.pt", tmp_path / "out", options(config, "peft", facts=Facts((Fact("*", "alpha", 3),))))
    check(peft_deltas(tmp_path / "out"), tensors, 1.0)


def test_magnitudes_follow_their_rows(tmp_path: Path, config: Path) -> None:
    source = trained(tmp_path, target_modules=["q_proj", "k_proj", "v_proj"], use_dora=True)
    convert(source, tmp_path / "out.pt", options(config, "megatron"))
    tensors = torch.load(tmp_path / "out.pt", weights_only=True)
    first = load_file(source / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.self_attn"
    q, k, v = (first[f"{stem}.{x}_proj.lora_magnitude_vector"][:, None] for x in "qkv")
    found = tensors["decoder.layers.0.self_attention.linear_qkv.adapter.weight_magnitude"]
    assert torch.equal(found[:, None], merged(q, k, v))


def test_what_is_missing_or_has_no_place_is_said(tmp_path: Path, config: Path) -> None:
    torch.save(adapter(), tmp_path / "a.pt")
    with pytest.raises(MappingError, match="alpha is not stored") as error:
        convert(tmp_path / "a.pt", tmp_path / "out", options(config, "peft"))
    assert "--alpha" in error.value.hint
    facts = Facts((Fact("*", "alpha", 6),))
    with pytest.raises(MappingError, match="module names of its own"):
        convert(tmp_path / "a.pt", tmp_path / "out", ConvertOptions(target_dialect="peft", facts=facts))
    torch.save({"decoder.layers.0.adapter_layer.ia3_adapter.linear_in.weight": torch.ones(2, 2)}, tmp_path / "b.pt")
    with pytest.raises(MappingError, match="no adapter of LoRA"):
        convert(tmp_path / "b.pt", tmp_path / "out", options(config, "peft"))
    source = trained(tmp_path, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(MappingError, match="no LoRA for embedding"):
        convert(source, tmp_path / "out.pt", options(config, "megatron"))
    assert np.all([not (tmp_path / name).exists() for name in ("out", "out.pt")])
