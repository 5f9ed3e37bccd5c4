"""Factors that msbnb saved, and what its layers computed (``make_msbnb.py`` ran MindNLP's master)."""

from __future__ import annotations

from pathlib import Path

import mindspore
import numpy as np
import pytest
import torch
from make_msbnb import HERE
from safetensors.torch import load_file

from lorabridge import ConvertOptions, convert
from lorabridge.dialects.adapter import Fact, Facts


def test_its_layers_computed_the_delta_that_is_written_for_peft_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mindspore.train.serialization, "_get_available_memory", lambda: None)
    facts = Facts((Fact("*", "alpha", 5),))
    options = ConvertOptions(source_dialect="msbnb", target_dialect="peft", facts=facts)
    convert(HERE / "lora.ckpt", tmp_path / "out", options)
    tensors, run = load_file(tmp_path / "out" / "adapter_model.safetensors"), np.load(HERE / "run.npz")
    for name in ("q", "v"):
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        found = torch.from_numpy(run[f"x.{name}"]) @ a.T @ b.T * (5 / 3)
        torch.testing.assert_close(found, torch.from_numpy(run[f"y.{name}"]), rtol=1e-5, atol=1e-5)
    (tmp_path / "out" / "lorabridge.json").unlink()
    convert(tmp_path / "out", tmp_path / "ours.ckpt", ConvertOptions(target_dialect="msbnb"))
    ours, theirs = (mindspore.load_checkpoint(str(f)) for f in (tmp_path / "ours.ckpt", HERE / "lora.ckpt"))
    assert {n: v.asnumpy().tobytes() for n, v in ours.items()} == {n: v.asnumpy().tobytes() for n, v in theirs.items()}
