"""Adapters for vLLM and vllm-mindspore: peft loads what is written, with the same outputs, and vLLM's rules hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from peft_models import CASES, load
from safetensors.torch import load_file, save_file

from lorabridge import ConvertOptions, convert
from lorabridge.errors import MappingError

REFUSED = {
    "dora": "no DoRA",
    "lora_bias": "no bias on the B factor",
    "bias all": "no trained biases",
    "bias lora_only": "no trained biases",
    "bias all and saved": "no trained biases|whole modules",
    "modules_to_save": "whole modules",
    "embedding dora": "no DoRA",
    "trainable tokens": "single rows",
    "conv": "no LoRA for conv",
    "conv dora": "no LoRA for conv|no DoRA",
    "grouped conv": "no LoRA for conv",
    "attention": "no LoRA for in_proj_weight",
    "attention bias": "in_proj_weight|biases",
    "attention pattern": "no LoRA for in_proj_weight",
    "bert": "whole modules",
    "layer_replication": "does not replicate",
    "pissa": "changed the base",
    "olora": "changed the base",
}


def read_by_vllm(folder: Path) -> dict[str, tuple[float, np.ndarray]]:
    """Return each module's delta as vLLM computes it: one rank, one alpha, names taken apart by its rules.

    vllm/lora/peft_helper.py (``vllm_lora_scaling_factor``, ``_validate_features``) and utils.py
    (``parse_fine_tuned_lora_name``).
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    assert config["bias"] == "none"
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    tensors = load_file(folder / "adapter_model.safetensors")
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", name)
        assert match, name
        pairs.setdefault(match[1], {})[match[2]] = tensor.double().numpy()
    assert all(pair["A"].shape[0] <= config["r"] for pair in pairs.values())
    return {path: scaling * pair["B"] @ pair["A"] for path, pair in pairs.items()}


@pytest.mark.parametrize("name", list(CASES))
def test_peft_and_vllm_read_the_same_deltas(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    adapted = case.adapted()
    adapted.save_pretrained(tmp_path / "peft")
    options = ConvertOptions(target_dialect="vllm", adapter_only=True)
    if name in REFUSED:
        with pytest.raises(MappingError, match=REFUSED[name]) as error:
            convert(tmp_path / "peft", tmp_path / "out", options)
        assert "merge" in error.value.hint
        assert not (tmp_path / "out").exists()
        return
    report = convert(tmp_path / "peft", tmp_path / "out", options)
    assert any("--max-lora-rank" in note for note in report.notes)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    assert isinstance(config["target_modules"], list)
    expected = {}
    for path, module in adapted.base_model.model.named_modules():
        if isinstance(getattr(module, "scaling", None), dict) and hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach().double()
            turned = getattr(module, "fan_in_fan_out", False) or "default" in module.lora_embedding_A
            expected[path] = (delta.T if turned else delta).numpy()
    found = read_by_vllm(tmp_path / "out")
    assert set(found) == set(expected)
    for path, delta in expected.items():
        assert np.abs(found[path] - delta).max() <= 1e-6 * np.abs(delta).max() + 1e-9, path
    if "llama embedding" not in name:
        assert torch.allclose(case.output(load(case, tmp_path / "out")), case.output(adapted), atol=2e-6)
    convert(tmp_path / "out", tmp_path / "back")
    first, second = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("peft", "back"))
    assert all(torch.equal(first[n], second[n]) for n in second)


def llama(tmp_path: Path, **config: object) -> Path:
    from peft import LoraConfig, get_peft_model

    model = CASES["llama embedding"].model()
    lora = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM", **config}
    get_peft_model(model, LoraConfig(**lora)).save_pretrained(tmp_path / "peft", save_embedding_layers=False)  # type: ignore[arg-type]
    return tmp_path / "peft"


def test_vllm_mindspore_takes_the_seven_projections(tmp_path: Path) -> None:
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    source = llama(tmp_path, target_modules=seven, rank_pattern={"q_proj": 4}, use_rslora=True)
    report = convert(source, tmp_path / "out", ConvertOptions(target_dialect="vllm-mindspore"))
    assert {module.rank for module in report.modules} == {4}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == sorted(seven)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_vllm_mindspore_would_ignore_embeddings_and_heads(tmp_path: Path, target: str) -> None:
    source = llama(tmp_path, target_modules=["q_proj", target])
    with pytest.raises(MappingError, match=f"ignores factors of {target}") as error:
        convert(source, tmp_path / "out", ConvertOptions(target_dialect="vllm-mindspore"))
    assert "merge" in error.value.hint
    assert "--exclude" in error.value.hint
    options = ConvertOptions(target_dialect="vllm-mindspore", exclude=(f"*{target}",))
    assert all("q_proj" in m.path for m in convert(source, tmp_path / "out", options).modules)


def test_base_weights_are_left_out_on_demand(tmp_path: Path) -> None:
    CASES["llama embedding"].adapted().save_pretrained(tmp_path / "peft")
    with pytest.raises(MappingError, match="no base weights") as error:
        convert(tmp_path / "peft", tmp_path / "out", ConvertOptions(target_dialect="vllm"))
    assert "--adapter-only" in error.value.hint


def test_a_rank_beyond_every_choice_is_said(tmp_path: Path) -> None:
    source = llama(tmp_path, target_modules=["q_proj"], r=600)
    report = convert(source, tmp_path / "out", ConvertOptions(target_dialect="vllm"))
    assert any("600 is more than" in note for note in report.notes)


def test_for_is_another_name_of_to_and_folds_what_vllm_ignores(tmp_path: Path) -> None:
    from lorabridge.commands._run import run

    paths = {n: f"base_model.model.model.layers.0.self_attn.{n}_proj" for n in "qv"}
    tensors = {f"{path}.lora_A.weight": torch.ones(2, 4) for path in paths.values()}
    tensors |= {f"{path}.lora_B.weight": torch.ones(4, 2) for path in paths.values()}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"v_proj": 8}}
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(config))
    assert run(["convert", str(tmp_path / "in"), f"{tmp_path / 'out'}/", "--for", "vllm"]) == 0
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not written.get("alpha_pattern")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    scaling = written["lora_alpha"] / written["r"]
    for n, expected in (("q", 4.0), ("v", 8.0)):
        delta = scaling * found[f"{paths[n]}.lora_B.weight"] @ found[f"{paths[n]}.lora_A.weight"]
        assert torch.equal(delta, torch.full((4, 4), expected))
