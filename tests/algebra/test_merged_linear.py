"""loralib's fused projections and convolutions through the algebra commands: blocks stay where they belong."""

from __future__ import annotations

from pathlib import Path

import loralib
import numpy as np
import pytest
import torch
from torch import nn

from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.combine import CombineOptions, combine
from lorabridge.actions.diff import DiffOptions, diff
from lorabridge.actions.resize import resize
from lorabridge.dialects.adapter import Fact, Facts

FACTS = Facts((
    Fact("qkv", "enable_lora", [True, False, True]), Fact("pixels", "kernel_size", [3]),
    Fact("pixels", "kind", "conv2d"), Fact("*", "alpha", 6),
))  # fmt: skip


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = loralib.MergedLinear(8, 24, r=2, lora_alpha=6, enable_lora=[True, False, True])
        self.pixels = loralib.Conv2d(3, 4, 3, r=2, lora_alpha=6)


def trained(path: Path, seed: int) -> tuple[Path, dict[str, torch.Tensor]]:
    """Save bare factors; return what loralib itself adds to each weight when it merges."""
    torch.manual_seed(seed)
    net = Fused().train()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape))
    torch.save(loralib.lora_state_dict(net), path)
    before = {"qkv": net.qkv.weight.detach().clone(), "pixels": net.pixels.conv.weight.detach().clone()}
    net.eval()
    return path, {"qkv": net.qkv.weight - before["qkv"], "pixels": net.pixels.conv.weight - before["pixels"]}


@pytest.fixture
def two(tmp_path: Path) -> list[tuple[Path, dict[str, torch.Tensor]]]:
    return [trained(tmp_path / f"{i}.pt", i) for i in range(2)]


def deltas(path: Path) -> dict[str, np.ndarray]:
    from lorabridge.actions.sides import open_side
    from lorabridge.actions.thin import thin

    side = open_side(path)
    try:
        found = {m.path: thin(m, side.source) for m in side.adapter.modules}
        return {path: delta.scaling * delta.b @ delta.a for path, delta in found.items()}
    finally:
        side.close()


@pytest.mark.parametrize("target", ["out.pt", "out.ckpt", "out"])
@pytest.mark.parametrize("method", ["cat", "svd"])
def test_sums_of_fused_blocks(method: str, target: str, two: list, tmp_path: Path) -> None:
    options = CombineOptions(
        method, (("*", (0.5, 2.0)),), facts=FACTS, energy=1.0 if method == "svd" else None,
        target_dialect="peft" if target == "out" else None,
    )  # fmt: skip
    combine([path for path, _ in two], tmp_path / target, options)
    made = deltas(tmp_path / target)
    for path in ("qkv", "pixels"):
        wanted = (0.5 * two[0][1][path] + 2 * two[1][1][path]).detach().double().numpy()
        assert np.allclose(made[path], wanted.reshape(made[path].shape), atol=1e-5)


def test_resized_blocks_and_differences(two: list, tmp_path: Path) -> None:
    source, merged = two[0]
    resize(source, tmp_path / "small.pt", energy=1.0, options=ConvertOptions(facts=FACTS))
    found = deltas(tmp_path / "small.pt")
    assert np.allclose(found["qkv"], merged["qkv"].detach().numpy(), atol=1e-5)
    assert diff(source, tmp_path / "small.pt", DiffOptions(facts=FACTS)).same
    other = diff(source, two[1][0], DiffOptions(facts=FACTS))
    assert not other.same
