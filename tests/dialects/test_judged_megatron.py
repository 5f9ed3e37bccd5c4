"""Adapters that Megatron-Bridge saved, and what it computed; what it loaded of ours is what is written today.

``judge_megatron.py`` ran megatron-bridge 0.3.1 and megatron-core 0.16.1 and wrote ``megatron_files/``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from judge_megatron import ALPHA, HERE, KINDS, digest, from_peft, llama, logits, to_peft
from safetensors.torch import load_file

from lorabridge import ConvertOptions, convert
from lorabridge.dialects.adapter import Fact, Facts

JUDGED = json.loads((HERE / "judged.json").read_text("utf-8"))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_what_megatron_computed(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    theirs = torch.from_numpy(np.load(HERE / kind / "logits.npy"))
    model = PeftModel.from_pretrained(llama(), str(to_peft(kind, tmp_path / "out"))).eval()
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=1e-6)
    with model.disable_adapter():
        assert float((logits(model) - theirs).abs().max()) > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_what_megatron_loaded_with_the_same_logits_is_what_is_written(kind: str, tmp_path: Path) -> None:
    assert max(JUDGED[kind]["read"], JUDGED[kind]["written"]) < 1e-6
    from_peft(kind, HERE / kind / "peft", tmp_path / "out.pt")
    assert digest(tmp_path / "out.pt") == JUDGED[kind]["digest"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_back_is_bit_for_bit(kind: str, tmp_path: Path) -> None:
    convert(to_peft(kind, tmp_path / "out"), tmp_path / "back.pt")
    assert digest(tmp_path / "back.pt") == digest(HERE / kind / "adapter.pt")


def test_the_distributed_checkpoint_of_the_adapter_is_read_as_it_lies(tmp_path: Path) -> None:
    facts = Facts((Fact("*", "alpha", float(ALPHA)),))
    options = ConvertOptions(target_dialect="peft", family="llama_megatron", config=HERE / "config.json", facts=facts)
    convert(HERE / "lora" / "torch_dist", tmp_path / "out", options)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    expected = load_file(to_peft("lora", tmp_path / "plain") / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
