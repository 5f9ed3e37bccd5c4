"""AdapterHub's LoRA: files that adapters 1.3.0 saved, with its outputs, and ours.

The other direction was run with ``adapterhub_130/make_adapters.py load``: 0 for BERT, 9e-7 for GPT-2's grown pairs.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lorabridge import ConvertOptions, convert
from lorabridge.errors import MappingError

REAL = Path(__file__).parent / "adapterhub_130"
IDS = torch.arange(12).reshape(2, 6)


def base(kind: str) -> torch.nn.Module:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

    if kind == "bert":
        config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                            intermediate_size=24, max_position_embeddings=24)  # fmt: skip
        model: torch.nn.Module = BertModel(config)
    else:
        model = GPT2Model(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    known = np.load(REAL / kind / "base.npz")
    model.load_state_dict({k: torch.from_numpy(known[k]) for k in known})
    return model.eval()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_what_adapters_saved_has_the_same_effect_in_peft(tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    report = convert(REAL / kind, tmp_path / "out", ConvertOptions(target_dialect="peft"))
    assert report.source_dialect == "adapterhub"
    made = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert made["lora_dropout"] == 0.1
    adapted = PeftModel.from_pretrained(base(kind), str(tmp_path / "out")).eval()
    with torch.no_grad():
        output = adapted(IDS).last_hidden_state.numpy()
    assert np.abs(output - np.load(REAL / kind / "output.npy")).max() < 5e-6


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_way_back_is_the_librarys_own_file(tmp_path: Path, kind: str) -> None:
    convert(REAL / kind, tmp_path / "out", ConvertOptions(target_dialect="peft"))
    report = convert(tmp_path / "out", tmp_path / "back", ConvertOptions(target_dialect="adapterhub"))
    assert "restored bit for bit" in report.notes[0]
    ours, theirs = (torch.load(d / "pytorch_adapter.bin", weights_only=True) for d in (tmp_path / "back", REAL / kind))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    configs = [json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path / "back", REAL / kind)]
    assert configs[0] == configs[1]


def test_blocks_of_a_fused_projection_keep_to_the_library_through_loralib(tmp_path: Path) -> None:
    convert(REAL / "gpt2", tmp_path / "out.pt", ConvertOptions(target_dialect="loralib"))
    (tmp_path / "out.pt.lorabridge.json").rename(tmp_path / "kept.json")
    from lorabridge.dialects.adapter import Fact, Facts

    facts = Facts((Fact("*", "alpha", 5), Fact("*c_attn", "enable_lora", [True, False, True])))
    convert(tmp_path / "out.pt", tmp_path / "back", ConvertOptions(target_dialect="adapterhub", facts=facts))
    made = json.loads((tmp_path / "back" / "adapter_config.json").read_text())["config"]
    assert (made["attn_matrices"], made["r"], made["alpha"], made["intermediate_lora"]) == (["q", "v"], 3, 5, True)
    ours, theirs = (
        torch.load(d / "pytorch_adapter.bin", weights_only=True) for d in (tmp_path / "back", REAL / "gpt2")
    )
    renamed = {name.replace(".mine.", ".default."): value for name, value in theirs.items()}
    assert set(ours) == set(renamed)
    assert all(torch.equal(ours[name], renamed[name]) for name in ours)


def test_the_config_says_where_lora_is(tmp_path: Path) -> None:
    convert(REAL / "bert", tmp_path / "out", ConvertOptions(target_dialect="peft"))
    (tmp_path / "out" / "lorabridge.json").unlink()
    convert(tmp_path / "out", tmp_path / "back", ConvertOptions(target_dialect="adapterhub"))
    made = json.loads((tmp_path / "back" / "adapter_config.json").read_text())["config"]
    real = json.loads((REAL / "bert" / "adapter_config.json").read_text())["config"]
    assert made == real
    found = torch.load(tmp_path / "back" / "pytorch_adapter.bin", weights_only=True)
    assert all(".loras.default." in name for name in found)


def peft(tmp_path: Path, **lora: object) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, **lora}
    get_peft_model(base("bert"), LoraConfig(**settings)).save_pretrained(tmp_path / "peft")  # type: ignore[arg-type]
    return tmp_path / "peft"


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": ["query"], "use_dora": True}, "norm leaves alpha out"),
        ({"target_modules": ["query"], "lora_bias": True}, "no bias on the B factor"),
        ({"target_modules": ["query", "word_embeddings"]}, "no LoRA for embedding"),
        ({"target_modules": ["attention.output.dense"]}, "none of this name"),
        ({"target_modules": ["query"], "modules_to_save": ["pooler"]}, "nothing beside them"),
        ({"target_modules": ["layer.0.attention.self.query", "value"]}, "the same places in every layer"),
    ],
)
def test_what_the_library_does_not_adapt_is_refused(tmp_path: Path, lora: dict[str, object], words: str) -> None:
    with pytest.raises(MappingError, match=words) as error:
        convert(peft(tmp_path, **lora), tmp_path / "out", ConvertOptions(target_dialect="adapterhub"))
    assert "merge" in error.value.hint
    assert not (tmp_path / "out").exists()


def test_mixed_ranks_and_alphas_become_one(tmp_path: Path) -> None:
    source = peft(tmp_path, target_modules=["query", "value"], rank_pattern={"value": 4}, alpha_pattern={"value": 12})
    report = convert(source, tmp_path / "out", ConvertOptions(target_dialect="adapterhub"))
    assert {(module.rank, module.alpha) for module in report.modules} == {(4, 12)}
    convert(tmp_path / "out", tmp_path / "back")
    first, second = (load_file(d / "adapter_model.safetensors") for d in (source, tmp_path / "back"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use_gating": True}, "a gate"), ({"composition_mode": "scale"}, "composition_mode = 'scale'"),
        ({"architecture": "mtl_lora"}, "architecture"),
        ({"architecture": "reft"}, "hidden states"), ({"vera_d": 0.1}, "VeRA"), ({"use_dora": True}, "DoRA"),
        ({"r": 7}, "rank is stated as 7"),
    ],
)  # fmt: skip
def test_other_methods_are_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    config = json.loads((REAL / "bert" / "adapter_config.json").read_text())
    config["config"] |= change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_adapter.bin").write_bytes((REAL / "bert" / "pytorch_adapter.bin").read_bytes())
    with pytest.raises(MappingError, match=words):
        convert(tmp_path, tmp_path.parent / "out_other", ConvertOptions(target_dialect="peft"))
