"""Merging loralib's files agrees with what loralib's own layers merge, and with the definition in double precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import loralib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabridge.actions.merge import MergeOptions, merge
from lorabridge.actions.undo import UndoWriter
from lorabridge.actions.unmerge import unmerge
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError

Make = Callable[[], torch.nn.Module]
LAYERS: dict[str, tuple[Make, dict[str, object]]] = {
    "linear": (lambda: loralib.Linear(10, 14, r=3, lora_alpha=5), {}),
    "linear [in, out]": (
        lambda: loralib.Linear(10, 14, r=3, lora_alpha=5, fan_in_fan_out=True), {"fan_in_fan_out": True},
    ),
    "square [in, out]": (
        lambda: loralib.Linear(12, 12, r=3, lora_alpha=5, fan_in_fan_out=True), {"fan_in_fan_out": True},
    ),
    "embedding": (lambda: loralib.Embedding(11, 6, r=2, lora_alpha=6), {"kind": "embedding"}),
    "conv1d": (lambda: loralib.Conv1d(4, 6, 1, r=2, lora_alpha=9), {"kind": "conv1d", "kernel_size": [1]}),
    "conv2d": (lambda: loralib.Conv2d(4, 6, 3, r=2, lora_alpha=9), {"kernel_size": 3}),
    "conv2d grouped": (
        lambda: loralib.Conv2d(4, 6, 3, r=2, lora_alpha=9, groups=2), {"kernel_size": 3, "groups": 2},
    ),
    "conv2d depthwise": (
        lambda: loralib.Conv2d(6, 6, 3, r=2, lora_alpha=9, groups=6), {"kernel_size": 3, "groups": 6},
    ),
    "conv3d": (lambda: loralib.Conv3d(4, 6, 1, r=2, lora_alpha=9), {"kind": "conv3d", "kernel_size": [1, 1, 1]}),
}  # fmt: skip
for enabled in ((True, False, True), (False, True, False), (True, True, True), (False, False, True, True)):
    for turned in (False, True):
        LAYERS[f"merged {''.join('FT'[on] for on in enabled)}{' [in, out]' * turned}"] = (
            lambda enabled=enabled, turned=turned: loralib.MergedLinear(  # type: ignore[misc]
                8, 12 * len(enabled) // 2, r=2, lora_alpha=7, enable_lora=list(enabled), fan_in_fan_out=turned
            ),
            {"enable_lora": list(enabled), "fan_in_fan_out": turned},
        )


def saved(folder: Path, name: str, dtype: torch.dtype) -> tuple[Path, Path, MergeOptions, dict[str, torch.Tensor]]:
    """Save a layer's base and its factors; return them with what loralib merges in double precision."""
    torch.manual_seed(0)
    make, facts = LAYERS[name]
    net = torch.nn.ModuleDict({"block": torch.nn.ModuleDict({"layer": make()})}).to(dtype)
    for parameter_name, parameter in net.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    factors = loralib.lora_state_dict(net)
    base = {k: v.clone().contiguous() for k, v in net.state_dict().items() if k not in factors}
    save_file(base, folder / "base.safetensors", metadata={"format": "pt"})
    torch.save(factors, folder / "lora.pt")
    said = {"alpha": net["block"]["layer"].lora_alpha, **facts}  # type: ignore[index]
    options = MergeOptions(facts=Facts(tuple(Fact("*", key, value) for key, value in said.items())))  # type: ignore[arg-type]
    net.double().eval()
    return folder / "base.safetensors", folder / "lora.pt", options, {k: v for k, v in net.state_dict().items()
                                                                     if k not in factors}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_merges_as_loralib_merges_it(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    base, lora, options, expected = saved(tmp_path, name, dtype)
    undo = UndoWriter(tmp_path / "u", options)
    report = merge(base, [lora], tmp_path / "merged.safetensors", options, watch=undo)
    ours, before = load_file(tmp_path / "merged.safetensors"), load_file(base)
    assert ours.keys() == expected.keys() == before.keys()
    assert len(report.merged) == 1
    assert not torch.equal(ours[report.merged[0]], before[report.merged[0]])
    for key, value in ours.items():
        assert value.dtype == dtype
        wanted = correctly_rounded(expected[key], dtype) if key in report.merged else before[key]
        assert torch.equal(value, wanted), key
    unmerge(tmp_path / "merged.safetensors", [lora], tmp_path / "back.safetensors", options, undo=tmp_path / "u")
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(back[key].view(torch.uint8), before[key].view(torch.uint8)) for key in before)


def correctly_rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from lorabridge.arithmetic.floats import encode, rounded
    from lorabridge.dtypes import BY_NAME

    kind = BY_NAME[str(dtype).removeprefix("torch.")]
    bits = encode(rounded(np.ascontiguousarray(x.numpy()), kind), kind)
    return torch.from_numpy(bits.view(f"i{kind.itemsize}")).view(dtype)


@pytest.mark.parametrize("kind", ["conv1d", "conv3d"])
def test_factors_that_loralib_itself_cannot_apply_are_refused(tmp_path: Path, kind: str) -> None:
    """loralib's factors have k*k elements per pair of channels; only a convolution over two axes has that many."""
    make = {"conv1d": loralib.Conv1d, "conv3d": loralib.Conv3d}[kind]
    net = torch.nn.ModuleDict({"layer": make(4, 6, 3, r=2, lora_alpha=9)})
    base = {k: v.clone() for k, v in net.state_dict().items() if "lora_" not in k}
    save_file(base, tmp_path / "base.safetensors", metadata={"format": "pt"})
    torch.save(loralib.lora_state_dict(net), tmp_path / "lora.pt")
    with pytest.raises(RuntimeError):
        net.eval()
    axes = 1 if kind == "conv1d" else 3
    facts = Facts((Fact("*", "alpha", 9), Fact("*", "kind", kind), Fact("*", "kernel_size", [3] * axes)))
    with pytest.raises(MappingError) as error:
        merge(
            tmp_path / "base.safetensors", [tmp_path / "lora.pt"], tmp_path / "m.safetensors", MergeOptions(facts=facts)
        )
    assert "layer" in error.value.text()
    assert not (tmp_path / "m.safetensors").exists()
