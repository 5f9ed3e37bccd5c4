"""The five commands through the command line: exit codes, one JSON document, words that say what was done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft_adapters import Net, saved, wrapped
from safetensors.torch import save_file

from lorabridge.commands._run import run

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def invoke(*args: object) -> tuple[int, str, str]:
        code = run([str(arg) for arg in args])
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return invoke


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return saved(wrapped([{"r": 4, "lora_alpha": 6}, {"r": 4, "lora_alpha": 3}]), tmp_path)


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    torch.manual_seed(0)
    net = Net()
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    with torch.no_grad():
        net.q.weight += torch.randn(16, 4) @ torch.randn(4, 12)
        net.q.bias += 1
    save_file(net.state_dict(), tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


def test_combine(call: Call, adapters: list[Path], tmp_path: Path) -> None:
    code, out, _ = call("combine", *adapters, tmp_path / "out", "--weights", "0.5,2", "--weights", "q=1,-1", "-v")
    assert code == 0
    assert out.startswith("combined 2 adapters (cat) into 2 modules of rank 8")
    assert "q       4 4       1 -1     8        1      rounded" in out
    code, out, _ = call("combine", *adapters, tmp_path / "ties", "--method", "ties", "--density", "0.5", "--json")
    document = json.loads(out)
    assert (code, document["schema"], document["method"]) == (0, "lorabridge/combine/1", "ties")
    assert all(row["apart"] > 0 for row in document["modules"])
    code, out, err = call("combine", *adapters, tmp_path / "more", "--weights", "1")
    assert (code, out) == (2, "")
    assert "one weight per adapter" in err
    code, out, _ = call("combine", *adapters, tmp_path / "more", "--weights", "q=a,b")
    assert code == 2
    assert not (tmp_path / "more").exists()


def test_extract(call: Call, models: tuple[Path, Path], tmp_path: Path) -> None:
    code, out, _ = call("extract", *models, tmp_path / "out", "--rank", 4, "-v")
    assert code == 0
    assert out.startswith("extracted 1 module and 1 whole tensor (100 % of the energy)")
    assert "taken over whole: q.bias" in out
    code, out, _ = call("extract", *models, tmp_path / "dry", "--energy", 0.5, "-n", "--json")
    document = json.loads(out)
    assert (code, document["dry_run"], document["schema"]) == (0, True, "lorabridge/extract/1")
    assert document["modules"][0]["energy"] >= 0.5
    assert not (tmp_path / "dry").exists()
    code, out, err = call("extract", *models, tmp_path / "dry")
    assert code == 2
    assert "--rank R, or --energy SHARE" in err


def test_resize_and_diff(call: Call, adapters: list[Path], tmp_path: Path) -> None:
    code, out, _ = call("resize", adapters[0], tmp_path / "out", "--rank", 2, "-v")
    assert code == 0
    assert "resized 2 modules of 2 (rank 4 -> 2, at least" in out
    code, out, _ = call("resize", adapters[0], tmp_path / "json", "--energy", "0.9", "--json")
    document = json.loads(out)
    assert (code, document["schema"]) == (0, "lorabridge/resize/1")
    assert all(row["energy"] >= 0.9 for row in document["modules"])
    code, out, _ = call("diff", adapters[0], tmp_path / "out")
    assert code == 1
    assert out.startswith("different: 2 deltas of 2 deltas")
    code, out, _ = call("diff", adapters[0], adapters[0])
    assert (code, out) == (0, "same: 4 tensors compared\n")
    code, out, _ = call("diff", adapters[0], tmp_path / "out", "--json")
    document = json.loads(out)
    assert (code, document["same"], document["schema"]) == (1, False, "lorabridge/diff/1")
    code, out, _ = call("diff", adapters[0], tmp_path / "nowhere")
    assert code == 3


def test_recover(call: Call, adapters: list[Path], models: tuple[Path, Path], tmp_path: Path) -> None:
    call("extract", *models, tmp_path / "made", "--rank", 4)
    bare = tmp_path / "bare.safetensors"
    (tmp_path / "made" / "adapter_model.safetensors").rename(bare)
    code, out, _ = call("recover", *models, bare)
    assert code == 0
    assert "1 of 1 modules explained" in out
    assert "--alpha 4" in out
    code, out, _ = call("recover", *models, adapters[0])
    assert code == 1
    assert out.startswith("nothing fits")
    code, out, _ = call("recover", *models, adapters[0], "--json")
    document = json.loads(out)
    assert (code, document["fits"], document["schema"]) == (1, False, "lorabridge/recover/1")
