"""What llama.cpp's own converter wrote, and what llama.cpp computed with the files that are written today.

``judge_llama_cpp.py`` ran the llama.cpp of llama-cpp-python 0.3.36 and wrote ``llama_cpp_files/``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from judge_llama_cpp import HERE, LORA, digest, ours
from safetensors.torch import load_file

from lorabridge import ConvertOptions, convert

JUDGED = json.loads((HERE / "judged.json").read_text("utf-8"))


@pytest.mark.parametrize("kind", LORA)
def test_what_llama_cpp_computed_with_is_what_is_written_and_what_its_converter_writes(
    kind: str, tmp_path: Path
) -> None:
    judged = JUDGED[kind]
    assert judged["ours"] <= max(judged["base"], judged["theirs"]) < 1e-5 < 1 < judged["effect"]
    assert digest(ours(kind, tmp_path / "out.gguf")) == judged["digest"] == digest(HERE / kind / "theirs.gguf")


@pytest.mark.parametrize("kind", LORA)
def test_its_converter_s_file_becomes_the_adapter_that_it_was(kind: str, tmp_path: Path) -> None:
    options = ConvertOptions(target_dialect="peft", family=f"{kind}_gguf", config=HERE / kind / "config.json")
    convert(HERE / kind / "theirs.gguf", tmp_path / "out", options)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    source = load_file(HERE / kind / "peft" / "adapter_model.safetensors")
    assert found.keys() == source.keys()
    scaling = json.loads((HERE / kind / "peft" / "adapter_config.json").read_text("utf-8"))
    made = json.loads((tmp_path / "out" / "adapter_config.json").read_text("utf-8"))
    assert made["lora_alpha"] == scaling["lora_alpha"]
    assert all(torch.equal(found[name], source[name]) for name in source)
