"""Compression says what it did, and a judge of its own agrees."""

from __future__ import annotations

from pathlib import Path

import loralib
import pytest
import torch
from dialects.peft_models import CASES
from torch import nn

from lorabridge import ConvertOptions, convert, open_checkpoint
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError, UsageError

CONV = Facts((Fact("*", "alpha", 7), Fact("*", "kernel_size", [3])))


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def peft_delta(folder: Path) -> torch.Tensor:
    from peft import PeftModel

    model = PeftModel.from_pretrained(Net(nn.Conv2d(4, 6, 3)), folder).double()
    return model.base_model.model.layer.get_delta_weight("default")


@pytest.fixture
def conv(tmp_path: Path) -> Path:
    """loralib's factors of a convolution whose delta peft can hold with a rank far below that of the block form."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(Net(nn.Conv2d(4, 6, 3)), LoraConfig(r=3, lora_alpha=7, target_modules=["layer"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "lora.pt", ConvertOptions(target_dialect="loralib"))
    (tmp_path / "lora.pt.lorabridge.json").unlink()
    return tmp_path


@pytest.mark.parametrize(("asked", "rank", "error"), [("1e-6", 3, 1e-6), ("2", 2, None), ("0.9", 1, None)])
def test_the_error_of_a_compressed_convolution(asked: str, rank: int, error: float | None, conv: Path) -> None:
    options = ConvertOptions(target_dialect="peft", facts=CONV, compress=asked)
    report = convert(conv / "lora.pt", conv / "peft", options)
    (row,) = report.compressed
    assert (row.path, row.before, row.after) == ("layer", 27, rank)
    whole, small = peft_delta(conv / "own"), peft_delta(conv / "peft")
    assert row.error == pytest.approx(float((whole - small).norm() / whole.norm()), rel=1e-3)
    assert error is None or row.error < error
    assert report.as_json()["compressed"] == ({"path": "layer", "before": 27, "after": rank, "error": row.error},)


def test_growth_is_said_in_the_ranks_of_the_user(conv: Path) -> None:
    to_peft = convert(conv / "lora.pt", conv / "peft", ConvertOptions(target_dialect="peft", facts=CONV))
    assert "ranks [3] became one pair of rank 27" in to_peft.notes[0]
    facts = Facts((*CONV.entries, Fact("*", "conv_form", "peft")))
    to_ms = convert(conv / "lora.pt", conv / "out.ckpt", ConvertOptions(facts=facts))
    assert "rank 3 became 27" in to_ms.notes[0]


def test_a_wider_type_is_used_while_compressing(tmp_path: Path) -> None:
    """Factors in bfloat16 would round the compressed ones to three digits."""
    CASES["linear"].adapted().to(torch.bfloat16).save_pretrained(tmp_path / "own")
    padded = ConvertOptions(target_dialect="peft", facts=Facts((Fact("*", "rank", 8),)))
    convert(tmp_path / "own", tmp_path / "peft", padded)
    errors = {}
    for dtype in (None, "fp32"):
        options = ConvertOptions(target_dialect="peft", compress="4", dtype=dtype)
        report = convert(tmp_path / "peft", tmp_path / f"out{dtype}.safetensors", options)
        errors[dtype] = max(row.error for row in report.compressed)
        with open_checkpoint(tmp_path / f"out{dtype}.safetensors") as made:
            assert {spec.dtype.name for spec in made.specs.values()} == {"float32" if dtype else "bfloat16"}
    assert errors["fp32"] < 1e-6 < 1e-4 < errors[None]


def test_what_cannot_be_compressed(tmp_path: Path) -> None:
    CASES["grouped conv"].adapted().save_pretrained(tmp_path / "peft")
    for asked in ("2", "1e-3"):
        with pytest.raises(MappingError, match="grouped"):
            convert(tmp_path / "peft", tmp_path / "out.ckpt", ConvertOptions(compress=asked))
    for asked in ("inf", "nan", "-1", "2.5", "many"):
        with pytest.raises(UsageError, match="--compress"):
            convert(tmp_path / "peft", tmp_path / "out.ckpt", ConvertOptions(compress=asked))
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_a_bare_pair_named_like_a_convolution_is_not_taken_for_a_linear_layer(tmp_path: Path) -> None:
    net = nn.ModuleDict({"conv1": loralib.Conv2d(4, 6, 3, r=2, lora_alpha=7)})
    torch.save(loralib.lora_state_dict(net), tmp_path / "lora.pt")
    alpha = Fact("*", "alpha", 7)
    with pytest.raises(MappingError, match="convolution") as raised:
        convert(tmp_path / "lora.pt", tmp_path / "out.ckpt", ConvertOptions(facts=Facts((alpha,))))
    assert "--kernel-size" in raised.value.hint
    report = convert(tmp_path / "lora.pt", tmp_path / "out.ckpt", ConvertOptions(facts=CONV))
    assert [(module.kind, module.rank) for module in report.modules] == [("conv2d", 2)]


@pytest.mark.parametrize("policy", ["saturate", "inf"])
def test_values_that_overflow_are_counted(policy: str, tmp_path: Path) -> None:
    torch.save({"w": torch.tensor([1.0, 7e4])}, tmp_path / "in.pt")
    options = ConvertOptions(family="identity", target_dialect="ms", dtype="fp16", on_overflow=policy)
    report = convert(tmp_path / "in.pt", tmp_path / "out.ckpt", options)
    assert [(row.tensor, row.overflowed) for row in report.rounding] == [("w", 1)]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factors_of_a_changed_base_keep_their_rank(init: str, tmp_path: Path) -> None:
    CASES[init].adapted().save_pretrained(tmp_path / "peft")
    with pytest.raises(MappingError, match=init):
        convert(tmp_path / "peft", tmp_path / "small", ConvertOptions(target_dialect="peft", compress="2"))
    assert not (tmp_path / "small").exists()
