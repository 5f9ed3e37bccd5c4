"""Adapters made by peft and loralib themselves, with every factor random, and ways to damage files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.convert import convert
from lorabridge.actions.verify import verify
from lorabridge.actions.verify_inputs import VerifyOptions
from lorabridge.actions.verify_report import VerifyReport
from lorabridge.dialects.adapter import Fact, Facts

WIDTH = 24


class Layer(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.up = nn.Linear(width, 40, bias=False)


class Net(nn.Module):
    """Two layers of linear modules, an embedding and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, 16)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.line = nn.Conv1d(6, 8, 3)
        self.image = nn.Conv2d(6, 8, 3)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2)
        self.volume = nn.Conv3d(4, 6, 2)


def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give every factor normal values, DoRA's magnitudes values near their norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                parameter.copy_(parameter * (1 + 0.1 * noise) if "magnitude" in name else 0.3 * noise)
    return model


def peft_model(net: nn.Module | None = None, **options: object) -> nn.Module:
    """Wrap a net with peft; options are LoraConfig's."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"], **options}
    return randomise(get_peft_model(net or Net(), LoraConfig(**given)))  # type: ignore[arg-type]


def peft_adapter(folder: Path, net: nn.Module | None = None, **options: object) -> Path:
    """Let peft save an adapter."""
    peft_model(net, **options).save_pretrained(folder)
    return folder


def stated(**facts: object) -> Facts:
    return Facts(tuple(Fact("*", name, value) for name, value in facts.items()))  # type: ignore[arg-type]


def converted(source: Path, target: Path, **options: object) -> Path:
    convert(source, target, ConvertOptions(**options))  # type: ignore[arg-type]
    return target


def without_manifest(path: Path) -> Path:
    """Take a file's manifest away."""
    path.with_name(f"{path.name}.lorabridge.json").unlink()
    return path


def checked(source: Path, target: Path, *depths: str, **options: object) -> VerifyReport:
    return verify(source, target, VerifyOptions(depths=depths, **options))  # type: ignore[arg-type]


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], Mapping[str, np.ndarray] | None]) -> Path:
    """Change the tensors of a peft adapter in place."""
    path = folder / "adapter_model.safetensors"
    tensors = {name: np.array(value) for name, value in load_file(path).items()}
    made = change(tensors) or tensors
    save_file({name: np.ascontiguousarray(value) for name, value in made.items()}, path, metadata={"format": "pt"})
    return folder


def configure(folder: Path, **fields: object) -> Path:
    """Change fields of a peft adapter's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def factor(module: str, letter: str) -> str:
    return f"base_model.model.{module}.lora_{letter}.weight"


def notes(report: VerifyReport, depth: str) -> str:
    """Return what the failed modules of a depth say."""
    found = report.depth(depth)
    assert found is not None
    return "; ".join(f"{row.path}: {row.note}" for row in found.failed)
