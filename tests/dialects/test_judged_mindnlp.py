"""Adapters that MindNLP 0.3.1, 0.4.1 and 0.5.1 saved, and their logits with ours (``make_mindnlp.py`` ran them)."""

from __future__ import annotations

import json
from pathlib import Path

import mindspore
import numpy as np
import pytest
import torch
from make_mindnlp import FIELDS, HERE, IDS
from safetensors.torch import load_file

from lorabridge import ConvertOptions, convert

SAVED = ("031/lora", "041/lora", "041/dora", "041/half", "051/lora")


def logits(folder: Path) -> np.ndarray:
    """Let transformers and peft run an adapter on the base."""
    from peft import PeftModel
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**FIELDS)).eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in np.load(HERE / "base.npz").items()})
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(folder)).eval()(torch.from_numpy(IDS)).logits.numpy()


@pytest.mark.parametrize("saved", SAVED)
def test_peft_computes_what_mindnlp_computed(saved: str, tmp_path: Path) -> None:
    if saved == "051/lora":  # peft's own file, by way of MindSpore
        convert(HERE / saved, tmp_path / "way", ConvertOptions(target_dialect="mindnlp"))
        (tmp_path / "way" / "lorabridge.json").unlink()
    source = tmp_path / "way" if saved == "051/lora" else HERE / saved
    report = convert(source, tmp_path / "out", ConvertOptions(target_dialect="peft"))
    assert (report.source_dialect, report.source_format) == ("mindnlp", "mindspore")
    assert {module.rank for module in report.modules} == {2, 4}
    if saved == "041/half":
        kinds = {str(tensor.dtype) for tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").values()}
        assert kinds == {"torch.float16", "torch.float32"}
        return
    assert np.abs(logits(tmp_path / "out") - np.load(HERE / saved / "logits.npy")).max() < 2e-6


@pytest.mark.parametrize("release", ["031", "041"])
def test_both_releases_compute_with_ours_what_peft_computes(release: str) -> None:
    assert np.abs(np.load(HERE / release / "ours.npy") - logits(HERE / "peft")).max() < 2e-6


def test_what_they_loaded_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mindspore.train.serialization, "_get_available_memory", lambda: None)
    convert(HERE / "peft", tmp_path / "out", ConvertOptions(target_dialect="mindnlp"))
    then, now = (mindspore.load_checkpoint(str(d / "adapter_model.ckpt")) for d in (HERE / "ours", tmp_path / "out"))
    assert {n: v.asnumpy().tobytes() for n, v in now.items()} == {n: v.asnumpy().tobytes() for n, v in then.items()}
    configs = [json.loads((d / "adapter_config.json").read_text("utf-8")) for d in (HERE / "ours", tmp_path / "out")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("saved", SAVED)
def test_the_way_back_is_mindnlp_s_own_tensors(saved: str, tmp_path: Path) -> None:
    target = "mindnlp" if saved == "051/lora" else "peft"
    convert(HERE / saved, tmp_path / "out", ConvertOptions(target_dialect=target))
    done = convert(tmp_path / "out", tmp_path / "back")
    assert "restored bit for bit from the manifest" in done.notes
