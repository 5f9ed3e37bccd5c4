"""torchtune's adapters: files that 0.6.1 saved, with its logits and its own export to peft, and ours.

The other direction was run with ``torchtune_061/make_adapters.py load``: a strict load, the same logits.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lorabridge import ConvertOptions, convert
from lorabridge.dialects.adapter import Facts
from lorabridge.errors import MappingError

REAL = Path(__file__).parent / "torchtune_061"
FIELDS = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**FIELDS, "model_type": "llama"}))
    return path


def options(config: Path, target: str, family: str | None = "llama_torchtune", **more: object) -> ConvertOptions:
    return ConvertOptions(target_dialect=target, family=family, config=config, **more)  # type: ignore[arg-type]


def llama(base: str) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**FIELDS)).eval()
    known = np.load(REAL / base)
    model.load_state_dict({k: torch.from_numpy(known[k]) for k in known if k != "ids"})
    return model


@pytest.mark.parametrize(("kind", "base"), [("lora", "base.npz"), ("dora", "base_dora.npz")])
def test_what_torchtune_saved_has_the_same_effect_in_peft(tmp_path: Path, config: Path, kind: str, base: str) -> None:
    from peft import PeftModel

    report = convert(REAL / kind, tmp_path / "out", options(config, "peft"))
    assert report.source_dialect == "torchtune"
    adapted = PeftModel.from_pretrained(llama(base), str(tmp_path / "out")).eval()
    with torch.no_grad():
        logits = adapted(torch.from_numpy(np.load(REAL / "base.npz")["ids"])).logits.numpy()
    assert np.abs(logits - np.load(REAL / kind / "logits.npy")).max() < 2e-5
    made = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (made["r"], made["lora_alpha"], made["base_model_name_or_path"]) == (3, 5, "tiny")


def test_torchtunes_own_export_is_the_same_bit_for_bit(tmp_path: Path, config: Path) -> None:
    convert(REAL / "lora", tmp_path / "out", options(config, "peft"))
    ours = load_file(tmp_path / "out" / "adapter_model.safetensors")
    theirs = np.load(REAL / "lora" / "export.npz")
    assert set(ours) == set(theirs)
    assert all(ours[name].numpy().tobytes() == theirs[name].tobytes() for name in ours)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_back_with_and_without_the_manifest(tmp_path: Path, config: Path, kind: str) -> None:
    convert(REAL / kind, tmp_path / "out", options(config, "peft"))
    report = convert(tmp_path / "out", tmp_path / "back", options(config, "torchtune"))
    (tmp_path / "out" / "lorabridge.json").unlink()
    convert(tmp_path / "out", tmp_path / "plain", options(config, "torchtune"))
    theirs = torch.load(REAL / kind / "adapter_model.pt", weights_only=True)
    for folder in ("back", "plain"):
        ours = torch.load(tmp_path / folder / "adapter_model.pt", weights_only=True)
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        made = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        real = json.loads((REAL / kind / "adapter_config.json").read_text())
        assert {**made, "target_modules": sorted(made["target_modules"])} == {
            **real, "target_modules": sorted(real["target_modules"]),
        }  # fmt: skip
    assert any("apply_lora_to_mlp=True" in note for note in report.notes) or "restored" in report.notes[0]


def test_a_table_is_asked_for(tmp_path: Path, config: Path) -> None:
    with pytest.raises(MappingError, match="module names of its own") as error:
        convert(REAL / "lora", tmp_path / "out", options(config, "peft", family=None))
    assert "llama_torchtune, qwen2_torchtune" in error.value.text()
    with pytest.raises(MappingError, match="module names of its own"):
        convert(REAL / "lora", tmp_path / "out", options(config, "peft", family="llama"))
    with pytest.raises(MappingError, match="convert to peft first"):
        convert(REAL / "lora", tmp_path / "out.ckpt", options(config, "mindpet", family="llama"))


def peft(tmp_path: Path, **lora: object) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(llama("base.npz"), LoraConfig(**settings))  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    return tmp_path / "peft"


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, "the same modules in every layer"),
        ({"target_modules": ["q_proj", "up_proj"]}, "only w3 of w1, w2 and w3"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "no module of this name"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "no bias on the B factor"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "nothing beside them"),
    ],
)
def test_what_torchtune_cannot_build_is_refused(
    tmp_path: Path, config: Path, lora: dict[str, object], words: str
) -> None:
    with pytest.raises(MappingError, match=words) as error:
        convert(peft(tmp_path, **lora), tmp_path / "out", options(config, "torchtune"))
    assert error.value.hint
    assert not (tmp_path / "out").exists()


def test_mixed_ranks_become_one(tmp_path: Path, config: Path) -> None:
    source = peft(
        tmp_path, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 12}
    )
    report = convert(source, tmp_path / "out", options(config, "torchtune"))
    assert {(module.rank, module.alpha) for module in report.modules} == {(4, 12)}


def test_qwen2_keeps_its_rows(tmp_path: Path, config: Path) -> None:
    """models/qwen2/_convert_weights.py renames and does not permute."""
    source = peft(tmp_path, target_modules=["q_proj", "v_proj"])
    convert(source, tmp_path / "out", options(config, "torchtune", family="qwen2_torchtune", facts=Facts()))
    ours = torch.load(tmp_path / "out" / "adapter_model.pt", weights_only=True)
    theirs = load_file(source / "adapter_model.safetensors")
    assert torch.equal(
        ours["layers.1.attn.q_proj.lora_b.weight"],
        theirs["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"],
    )
