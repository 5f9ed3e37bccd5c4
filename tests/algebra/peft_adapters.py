"""Tiny models with several real peft adapters, saved one by one; and deltas read back through peft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

SIZE = 12


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, SIZE)
        self.q = nn.Linear(SIZE, 16)
        self.k = nn.Linear(16, SIZE)
        self.conv = nn.Conv2d(3, 5, (3, 2))
        self.head = nn.Linear(SIZE, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.k(torch.tanh(self.q(self.emb(x)))))


def wrapped(configs: Sequence[Mapping[str, object]], seed: int = 0):
    """Return a peft model with adapters a0, a1 ... whose factors are random."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = [LoraConfig(**{"target_modules": ["q", "k"], "init_lora_weights": False, **c}) for c in configs]
    model = get_peft_model(Net(), settings[0], adapter_name="a0")
    for i, config in enumerate(settings[1:], 1):
        model.add_adapter(f"a{i}", config)
    return model


def saved(model, folder: Path) -> list[Path]:
    """Save every adapter and return their directories."""
    names = list(model.peft_config)
    model.save_pretrained(folder, selected_adapters=names)
    return [folder / name for name in names]


def deltas(model, adapter: str) -> dict[str, np.ndarray]:
    """Return every module's delta in double precision, as peft computes it."""
    from peft.tuners.lora import LoraLayer

    found = {}
    double = model.double()
    for name, layer in double.named_modules():
        if isinstance(layer, LoraLayer) and adapter in [*layer.lora_A, *layer.lora_embedding_A]:
            found[name.removeprefix("base_model.model.")] = layer.get_delta_weight(adapter).detach().numpy()
    return found


def loaded(folder: Path) -> dict[str, np.ndarray]:
    """Load one adapter into a fresh model with peft and return its deltas."""
    from peft import PeftModel

    torch.manual_seed(1)
    return deltas(PeftModel.from_pretrained(Net(), folder), "default")


def apart(one: np.ndarray, two: np.ndarray) -> float:
    """Return the relative distance of two deltas."""
    return float(np.linalg.norm(one - two) / np.linalg.norm(two))
