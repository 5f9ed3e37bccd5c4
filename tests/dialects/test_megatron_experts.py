"""Megatron's experts: SequentialMLP's one by one through a table, a grouped layer's refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorabridge import ConvertOptions, convert
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError

CONFIG = {
    "model_type": "qwen3_moe", "hidden_size": 12, "moe_intermediate_size": 6, "num_hidden_layers": 1, "num_experts": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 20, "tie_word_embeddings": False,
}  # fmt: skip
MLP = "decoder.layers.0.mlp.experts"


def options(folder: Path, **more: object) -> ConvertOptions:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    stated = {"family": "qwen3_moe_megatron", "config": folder / "config.json", "target_dialect": "peft",
              "facts": Facts((Fact("*", "alpha", 6),))}  # fmt: skip
    return ConvertOptions(**{**stated, **more})  # type: ignore[arg-type]


def experts(path: str, count: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    out = {}
    for number in range(count):
        for name, (inner, rows) in {"linear_fc1": (12, 12), "linear_fc2": (6, 12)}.items():
            stem = f"{path.format(number)}.{name}.adapter"
            out[f"{stem}.linear_in.weight"] = torch.randn(3, inner, generator=generator)
            out[f"{stem}.linear_out.weight"] = torch.randn(rows, 3, generator=generator)
    return out


def test_experts_one_by_one_become_peft_s_modules_and_come_back(tmp_path: Path) -> None:
    tensors = experts(MLP + ".local_experts.{}")
    torch.save(tensors, tmp_path / "a.pt")
    done = convert(tmp_path / "a.pt", tmp_path / "out", options(tmp_path))
    assert len(done.modules) == 9
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")

    def delta(name: str) -> torch.Tensor:
        return made[f"{name}.lora_B.weight"] @ made[f"{name}.lora_A.weight"]

    for number in range(3):
        ours, theirs = f"base_model.model.model.layers.0.mlp.experts.{number}", f"{MLP}.local_experts.{number}"
        fc1, fc2 = (
            tensors[f"{theirs}.{n}.adapter.linear_out.weight"] @ tensors[f"{theirs}.{n}.adapter.linear_in.weight"]
            for n in ("linear_fc1", "linear_fc2")
        )
        both = torch.cat([delta(f"{ours}.gate_proj"), delta(f"{ours}.up_proj")])
        assert torch.allclose(both, fc1, atol=1e-5), "gate before up"
        assert torch.allclose(delta(f"{ours}.down_proj"), fc2, atol=1e-5)
    (tmp_path / "out" / "lorabridge.json").unlink()
    done = convert(tmp_path / "out", tmp_path / "back.pt", options(tmp_path, target_dialect="megatron", facts=Facts()))
    assert {m.path for m in done.modules} == {f"{MLP}.local_experts.{n}.linear_fc{k}" for n in range(3) for k in (1, 2)}


def test_one_pair_for_all_experts_of_a_rank_is_refused(tmp_path: Path) -> None:
    torch.save(experts(MLP, 1), tmp_path / "a.pt")
    with pytest.raises(MappingError, match="one pair for all the experts") as caught:
        convert(tmp_path / "a.pt", tmp_path / "out", options(tmp_path))
    assert "export_adapter_weights" in caught.value.hint
