"""Small real models of transformers with trained-looking peft adapters, and their conversions."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
import transformers

from lorabridge.actions.convert import ConvertOptions, convert

VOCAB, TIME = 61, 40


@dataclass(frozen=True)
class Small:
    """A class of transformers, its config, the adapted modules, and the family of its names."""

    architecture: str
    family: str
    task: str | None
    targets: list[str]
    fields: dict[str, object]
    lora: dict[str, object] = field(default_factory=dict)


LLAMA = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
         "intermediate_size": 48, "vocab_size": VOCAB, "max_position_embeddings": TIME}  # fmt: skip
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = {
    "gpt2": Small(
        "GPT2LMHeadModel", "gpt2", "CAUSAL_LM", ["c_attn", "c_proj", "c_fc"],
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": TIME, "bos_token_id": 0,
         "eos_token_id": 0},
    ),
    "bert": Small(
        "BertForTokenClassification", "bert", "TOKEN_CLS", ["query", "key", "value"],
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "vocab_size": VOCAB, "max_position_embeddings": TIME, "num_labels": 5},
        {"bias": "lora_only"},
    ),
    "llama": Small("LlamaForCausalLM", "llama", "CAUSAL_LM", ALL, LLAMA, {"use_rslora": True}),
    "qwen2": Small(
        "Qwen2ForCausalLM", "llama", "CAUSAL_LM", ALL, LLAMA | {"tie_word_embeddings": True}, {"use_dora": True}
    ),
}  # fmt: skip


def build(small: Small, *, seed: int = 1) -> torch.nn.Module:
    """Build a class of transformers with random weights, biases and norms included."""
    named = small.architecture.split("For")[0].split("LM")[0] + "Config"
    torch.manual_seed(seed)
    module = getattr(transformers, small.architecture)(getattr(transformers, named)(**small.fields)).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0, 0.2)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter += 1
    return module


def save(small: Small, folder: Path) -> tuple[Path, Path]:
    """Save a base and a peft adapter whose factors are not zero; return both directories."""
    module = build(small)
    module.save_pretrained(folder / "base")
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=small.targets, task_type=small.task, **small.lora)
    torch.manual_seed(2)
    adapted = peft.get_peft_model(module, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(0, 0.2)
            elif "magnitude" in name:
                parameter *= 1.2
            elif parameter.requires_grad:
                parameter += 0.1
    adapted.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


def converted(small: Small, folder: Path, target: str = "out.ckpt", **options: object) -> Path:
    """Convert the saved adapter for MindSpore."""
    made = {"family": small.family, "config": folder / "base" / "config.json", **options}
    convert(folder / "adapter", folder / target, ConvertOptions(**made))  # type: ignore[arg-type]
    return folder / target


def with_config(folder: Path, **changes: object) -> Path:
    """Copy a model directory with another config.json."""
    copy = folder.parent / f"{folder.name}-{'-'.join(changes)}"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy
