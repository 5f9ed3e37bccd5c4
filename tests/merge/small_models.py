"""Small transformers models with adapters of every kind, made by peft and saved as users save them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def gpt2(folder: Path, dtype: str, *, seed: int = 0) -> Path:
    """Save a GPT-2 of two layers with tied embeddings; biases and norms are not trivial."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16))
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.02
    model.to(DTYPES[dtype]).save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, *, seed: int = 1, **config: object) -> Path:
    """Train nothing: save a peft adapter of the base whose factors, magnitudes and extras are random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM"}
    settings |= {"init_lora_weights": False, "fan_in_fan_out": True, **config}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += torch.randn_like(parameter) * 0.02
    model.save_pretrained(folder)
    return folder


def bits(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Return type, shape and bytes of every tensor of a model directory or file."""
    file = path / "model.safetensors" if path.is_dir() else path
    return {
        name: (x.dtype, tuple(x.shape), x.contiguous().view(torch.uint8).numpy().tobytes())
        for name, x in load_file(file).items()
    }


def plain_adapter(folder: Path, factors: Mapping[str, tuple[np.ndarray, np.ndarray]], *, alpha: float = 8.0) -> Path:
    """Save a peft adapter from factors ``(a, b)`` by module path, all of one rank."""
    import json

    folder.mkdir()
    tensors = {}
    for path, (a, b) in factors.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.from_numpy(np.ascontiguousarray(a))
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.from_numpy(np.ascontiguousarray(b))
    save_file(tensors, folder / "adapter_model.safetensors")
    rank = next(iter(factors.values()))[0].shape[0]
    names = sorted({path.rpartition(".")[2] for path in factors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": names, "fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def plain_model(path: Path, weights: Mapping[str, torch.Tensor]) -> Path:
    """Save tensors as a model of no known family."""
    save_file(dict(weights), path, metadata={"format": "pt"})
    return path
