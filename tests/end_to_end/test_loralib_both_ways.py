"""Adapters really made by loralib: to MindSpore, to peft and back, with the same forward output."""

from __future__ import annotations

from pathlib import Path

import loralib
import numpy as np
import pytest
import torch
from torch import nn

from lorabridge import ConvertOptions, convert
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError


class Net(nn.Module):
    """A net with one adapted layer, called ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def fact(**facts: object) -> Facts:
    return Facts(tuple(Fact("*", name, value) for name, value in facts.items()))


CASES = {
    "linear": (lambda: loralib.Linear(12, 20, r=4, lora_alpha=8), floats(3, 12), {"alpha": 8, "kind": "linear"}),
    "fan_in_fan_out": (
        lambda: loralib.Linear(12, 20, r=4, lora_alpha=8, fan_in_fan_out=True),
        floats(3, 12),
        {"alpha": 8, "fan_in_fan_out": True},
    ),
    "merged": (
        lambda: loralib.MergedLinear(12, 36, r=4, lora_alpha=6, enable_lora=[True, False, True]),
        floats(3, 12),
        {"alpha": 6, "enable_lora": [True, False, True]},
    ),
    "merged all": (
        lambda: loralib.MergedLinear(12, 36, r=4, lora_alpha=6, enable_lora=[True, True, True]),
        floats(3, 12),
        {"alpha": 6, "enable_lora": [True, True, True]},
    ),
    "embedding": (
        lambda: loralib.Embedding(30, 8, r=4, lora_alpha=8),
        torch.arange(10)[None],
        {"alpha": 8, "kind": "embedding"},
    ),
    "conv2d": (
        lambda: loralib.Conv2d(4, 6, 3, r=2, lora_alpha=8),
        floats(2, 4, 7, 7),
        {"alpha": 8, "kind": "conv2d", "kernel_size": 3, "conv_form": "loralib"},
    ),
    "conv2d grouped": (
        lambda: loralib.Conv2d(4, 6, 3, r=2, lora_alpha=8, groups=2),
        floats(2, 4, 7, 7),
        {"alpha": 8, "kind": "conv2d", "kernel_size": 3, "groups": 2, "conv_form": "loralib"},
    ),
}


def make(name: str) -> tuple[Net, torch.Tensor, Facts]:
    """Return a net whose factors are all random, an input, and what its file will not say."""
    build, example, said = CASES[name]
    torch.manual_seed(0)
    net = Net(build())
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape))
    return net, example, fact(**said)


def output(net: Net, example: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return net(example)


@pytest.mark.parametrize("name", list(CASES))
def test_to_mindspore_and_back(name: str, tmp_path: Path, mindspore) -> None:
    net, example, facts = make(name)
    state = loralib.lora_state_dict(net)
    torch.save(state, tmp_path / "lora.pt")
    expected = output(net, example)

    convert(tmp_path / "lora.pt", tmp_path / "out.ckpt", ConvertOptions(facts=facts))

    loaded = mindspore.load_checkpoint(str(tmp_path / "out.ckpt"))
    assert sorted(loaded) == sorted(state)
    for key, value in state.items():
        np.testing.assert_array_equal(loaded[key].asnumpy(), value.numpy())
    back = convert(tmp_path / "out.ckpt", tmp_path / "back.pt")
    assert back.target_dialect == "loralib"
    again, _, _ = make(name)
    with torch.no_grad():
        for key, parameter in again.named_parameters():
            if "lora_" in key:
                parameter.zero_()
    again.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True), strict=False)
    assert torch.equal(output(again, example), expected)


@pytest.mark.parametrize("name", [name for name in CASES if name != "conv2d grouped"])
def test_to_peft_and_back(name: str, tmp_path: Path) -> None:
    """peft's delta equals loralib's in double precision, and the way back gives loralib's own factors."""
    from safetensors.torch import load_file

    net, _, facts = make(name)
    state = loralib.lora_state_dict(net)
    torch.save(state, tmp_path / "lora.pt")

    convert(tmp_path / "lora.pt", tmp_path / "peft", ConvertOptions(target_dialect="peft", facts=facts))

    tensors = {k: v.double() for k, v in load_file(tmp_path / "peft" / "adapter_model.safetensors").items()}
    with torch.no_grad():
        before = net.double().layer
        weight = before.conv.weight if hasattr(before, "conv") else before.weight
        start = weight.clone()
        before.eval()
        delta = weight - start
    assert torch.allclose(peft_delta(tensors, tmp_path / "peft", delta.shape, name), delta, rtol=0, atol=1e-12)

    convert(tmp_path / "peft", tmp_path / "back.pt", ConvertOptions(target_dialect="loralib"))
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[key], state[key].float()) for key in state)


def peft_delta(tensors: dict[str, torch.Tensor], folder: Path, shape: torch.Size, name: str) -> torch.Tensor:
    """Let peft itself compute the delta of what was written, on a double precision base."""
    from peft import PeftModel

    plain = {
        "linear": lambda: nn.Linear(12, 20),
        "merged": lambda: nn.Linear(12, 36),
        "merged all": lambda: nn.Linear(12, 36),
        "embedding": lambda: nn.Embedding(30, 8),
        "conv2d": lambda: nn.Conv2d(4, 6, 3),
    }
    if name == "fan_in_fan_out":
        from transformers.pytorch_utils import Conv1D

        plain[name] = lambda: Conv1D(20, 12)
    model = PeftModel.from_pretrained(Net(plain[name]()), folder).double()
    return model.base_model.model.layer.get_delta_weight("default").reshape(shape)


def test_missing_alpha_is_refused(tmp_path: Path) -> None:
    net, _, _ = make("linear")
    torch.save(loralib.lora_state_dict(net), tmp_path / "lora.pt")
    with pytest.raises(MappingError, match="alpha"):
        convert(tmp_path / "lora.pt", tmp_path / "out.ckpt", ConvertOptions(facts=fact(kind="linear")))
    assert [p.name for p in tmp_path.iterdir()] == ["lora.pt"]


def test_facts_from_a_sidecar(tmp_path: Path) -> None:
    """What the file does not say may lie beside it, written by hand."""
    net, _, _ = make("merged")
    torch.save(loralib.lora_state_dict(net), tmp_path / "lora.pt")
    (tmp_path / "lora.pt.lorabridge.json").write_text(
        '{"schema": "lorabridge/facts/1", "alpha": 6, "modules": {"layer": {"enable_lora": [true, false, true]}}}'
    )
    report = convert(tmp_path / "lora.pt", tmp_path / "out.ckpt")
    assert [(m.path, m.rank, m.alpha) for m in report.modules] == [("layer", 4, 6)]


def test_grouped_factors_that_no_pair_can_express(tmp_path: Path) -> None:
    """Rows of loralib's delta that straddle two groups' kernels have no low-rank convolution form."""
    net, _, facts = make("conv2d grouped")
    torch.save(loralib.lora_state_dict(net), tmp_path / "lora.pt")
    with pytest.raises(MappingError, match="2 groups") as raised:
        convert(tmp_path / "lora.pt", tmp_path / "peft", ConvertOptions(target_dialect="peft", facts=facts))
    assert "merge" in raised.value.hint
    assert not (tmp_path / "peft").exists()


def full_state(tmp_path: Path, *, merged: bool) -> None:
    """Save a whole loralib state: base weights and factors, merged as eval() does or not."""
    net, _, _ = make("linear")
    net.train(not merged)
    torch.save(net.state_dict(), tmp_path / "full.pt")


@pytest.mark.parametrize("merged", [True, False])
def test_a_full_checkpoint_must_say_whether_it_is_merged(merged: bool, tmp_path: Path) -> None:
    full_state(tmp_path, merged=merged)
    with pytest.raises(MappingError, match="merged"):
        convert(tmp_path / "full.pt", tmp_path / "out.ckpt", ConvertOptions(facts=fact(alpha=8)))
    options = ConvertOptions(facts=fact(alpha=8, merged=merged))
    convert(tmp_path / "full.pt", tmp_path / "out.ckpt", options)
    convert(tmp_path / "out.ckpt", tmp_path / "back.pt")
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("full", "back"))
    assert list(one) == list(two)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_merged_base_does_not_reach_peft_with_its_factors(tmp_path: Path) -> None:
    full_state(tmp_path, merged=True)
    options = ConvertOptions(target_dialect="peft", facts=fact(alpha=8, merged=True))
    with pytest.raises(MappingError, match="again") as raised:
        convert(tmp_path / "full.pt", tmp_path / "peft", options)
    assert "--adapter-only" in raised.value.hint
    report = convert(
        tmp_path / "full.pt", tmp_path / "peft",
        ConvertOptions(target_dialect="peft", facts=fact(alpha=8), adapter_only=True),
    )  # fmt: skip
    assert {name for name, _ in report.left_out} == {"layer.weight", "layer.bias"}


def test_a_stated_alpha_is_the_source_s(tmp_path: Path) -> None:
    """One flag must not be read twice: as the source's alpha and as the one wanted in the target."""
    net, _, facts = make("linear")
    torch.save(loralib.lora_state_dict(net), tmp_path / "lora.pt")
    report = convert(tmp_path / "lora.pt", tmp_path / "out.ckpt", ConvertOptions(target_dialect="mindpet", facts=facts))
    assert report.rounding == ()
    assert [(m.rank, m.alpha) for m in report.modules] == [(4, 8)]
