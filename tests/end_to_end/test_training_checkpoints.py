"""Whole training checkpoints: base weights, factors and the optimizer's state in one file."""

from __future__ import annotations

from pathlib import Path

import loralib
import numpy as np
import torch
from torch import nn

from lorabridge import ConvertOptions, convert
from lorabridge.dialects.adapter import Fact, Facts

STATED = Facts(
    (
        Fact("m", "enable_lora", [True, False, True]),
        Fact("emb", "kind", "embedding"),
        Fact("*", "alpha", 8),
        Fact("*", "merged", False),
    )
)


class Net(nn.Module):
    """One layer of each kind that loralib has, and two that it leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = loralib.Embedding(20, 12, r=4, lora_alpha=8)
        self.l1 = loralib.Linear(12, 12, r=4, lora_alpha=8)
        self.m = loralib.MergedLinear(12, 36, r=4, lora_alpha=8, enable_lora=[True, False, True])
        self.conv = loralib.Conv2d(1, 4, 3, r=2, lora_alpha=8)
        self.norm = nn.LayerNorm(36)
        self.head = nn.Linear(36, 3)


def trained() -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    x = net.norm(net.m(net.l1(net.emb(torch.arange(10)[None]))))
    (net.head(x).sum() + net.conv(torch.randn(1, 1, 5, 5)).sum()).backward()
    optimizer.step()
    return net, optimizer


def test_loralib_to_mindspore_and_back(tmp_path: Path, mindspore) -> None:
    net, optimizer = trained()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "train.pt")
    report = convert(tmp_path / "train.pt", tmp_path / "out.ckpt", ConvertOptions(facts=STATED))
    assert {name for name, _ in report.left_out} == {"optimizer", "epoch"}
    loaded = mindspore.load_checkpoint(str(tmp_path / "out.ckpt"))
    np.testing.assert_array_equal(loaded["emb.embedding_table"].asnumpy(), net.emb.weight.detach().numpy())
    assert "conv.weight" in loaded
    for manifest in (True, False):
        if not manifest:
            (tmp_path / "out.ckpt.lorabridge.json").unlink()
        target = tmp_path / f"back{manifest}.pt"
        convert(tmp_path / "out.ckpt", target, ConvertOptions(target_dialect="loralib", facts=STATED))
        again = torch.load(target, weights_only=True)
        assert set(again) == set(net.state_dict())
        assert all(torch.equal(again[name], value) for name, value in net.state_dict().items())


def test_loralib_with_its_base_to_peft(tmp_path: Path) -> None:
    """peft itself loads the file, base weights included, into an untrained network."""
    from peft import PeftModel

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.l1, self.m = nn.Embedding(20, 12), nn.Linear(12, 12), nn.Linear(12, 36)
            self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.LayerNorm(36), nn.Linear(36, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(self.m(self.l1(self.emb(ids)))))

    net, _ = trained()
    torch.save(net.state_dict(), tmp_path / "full.pt")
    convert(tmp_path / "full.pt", tmp_path / "out.ckpt", ConvertOptions(facts=STATED))
    (tmp_path / "out.ckpt.lorabridge.json").unlink()
    report = convert(tmp_path / "out.ckpt", tmp_path / "peft", ConvertOptions(target_dialect="peft", facts=STATED))
    assert {m.path: m.rank for m in report.modules} == {"conv": 18, "emb": 4, "l1": 4, "m": 8}
    model = PeftModel.from_pretrained(Plain(), tmp_path / "peft").eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = net.head(net.norm(net.m(net.l1(net.emb(ids)))))
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-5)


def test_mindpet_training_checkpoint(tmp_path: Path, mindspore) -> None:
    """MindSpore's Adam saves its moments and counters beside the network; they are left out and listed."""
    from mindspore import nn as cells

    from lorabridge.layers.mindpet import LoRADense

    class Cell(cells.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.q = LoRADense(12, 20, lora_rank=4, lora_alpha=8)
            self.head = cells.Dense(20, 3)

        def construct(self, x):
            return self.head(self.q(x))

    net = Cell()
    optimizer = cells.Adam(net.trainable_params(), 1e-3)
    step = cells.TrainOneStepCell(cells.WithLossCell(net, cells.MSELoss()), optimizer)
    step(mindspore.Tensor(np.ones((2, 12), np.float32)), mindspore.Tensor(np.ones((2, 3), np.float32)))
    said = {"epoch_num": 3, "step_num": 100, "loss": 0.5, "note": "hi"}
    mindspore.save_checkpoint(step, str(tmp_path / "train.ckpt"), append_dict=said)

    options = ConvertOptions(target_dialect="loralib", facts=Facts((Fact("*", "alpha", 8),)))
    report = convert(tmp_path / "train.ckpt", tmp_path / "out.pt", options)

    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert set(out) == {"q.lora_A", "q.lora_B", "q.weight", "q.bias", "head.weight", "head.bias"}
    left = {name for name, _ in report.left_out}
    assert {"moment1.q.mindpet_delta_lora_a", "moment2.head.bias", "beta1_power", "epoch_num", "note"} <= left
    np.testing.assert_array_equal(out["q.lora_B"].numpy(), net.q.mindpet_delta_lora_b.asnumpy())


def test_the_report_shows_ranks_and_alphas_as_written(tmp_path: Path) -> None:
    """One rank and alpha for all modules: what MindPet gets, not what peft had."""
    from dialects.peft_models import CASES

    CASES["patterns"].adapted().save_pretrained(tmp_path / "peft")
    report = convert(tmp_path / "peft", tmp_path / "out.ckpt", ConvertOptions(target_dialect="mindpet"))
    assert {(module.rank, module.alpha, module.scaling) for module in report.modules} == {(5, 15, 3)}
