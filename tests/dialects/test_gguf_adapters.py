"""GGUF adapters: what is written, read by the gguf package and computed as llama.cpp does, is peft's delta."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lorabridge import ConvertOptions, convert, inspect
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError

FIELDS = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip
SEVEN = [*NAMES]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**FIELDS, "model_type": "llama"}))
    return path


def options(config: Path, target: str, family: str = "llama_gguf", **more: object) -> ConvertOptions:
    return ConvertOptions(target_dialect=target, family=family, config=config, **more)  # type: ignore[arg-type]


def adapted(folder: Path, **lora: object) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**FIELDS)), LoraConfig(**settings))  # type: ignore[arg-type]
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order rows as convert_hf_to_gguf.py does for the architecture llama (``LlamaModel.permute``)."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def deltas(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Compute deltas as src/llama-adapter.cpp and build_lora_mm do: alpha over the rank of b, all of them if 0."""
    reader = gguf.GGUFReader(str(path))
    pairs = {tensor.name: np.array(tensor.data, np.float64) for tensor in reader.tensors}
    said = {key: field.contents() for key, field in reader.fields.items()}
    out = {}
    for name, b in pairs.items():
        if name.endswith(".lora_b"):
            a = pairs[name.replace("lora_b", "lora_a")]
            a = a.T if name.startswith("token_embd") else a
            scale = said["adapter.lora.alpha"] / b.shape[1] if said["adapter.lora.alpha"] else 1.0
            out[name.removesuffix(".weight.lora_b")] = scale * b @ a
    return out, said


def expected(model: torch.nn.Module, *, llama: bool = True) -> dict[str, np.ndarray]:
    out = {}
    for path, module in model.base_model.model.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        delta = module.get_delta_weight("default").detach().double().numpy()
        parts, last = path.split("."), path.rpartition(".")[2]
        if last in ("q_proj", "k_proj") and llama:
            delta = permuted(delta, 4 if last == "q_proj" else 2)
        if last == "embed_tokens":
            out["token_embd"] = delta.T
        else:
            out["output" if last == "lm_head" else f"blk.{parts[2]}.{NAMES[last]}"] = delta
    return out


CASES: dict[str, dict[str, object]] = {
    "seven": {"target_modules": SEVEN},
    "embedding and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "ranks of their own": {"target_modules": SEVEN, "rank_pattern": {"q_proj": 5}},
    "alphas of their own": {"target_modules": SEVEN, "alpha_pattern": {"q_proj": 5, "up_proj": 24}},
    "rslora": {"target_modules": SEVEN, "use_rslora": True},
    "float alpha": {"target_modules": ["v_proj"], "lora_alpha": 0.1},
}


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_peft_s_deltas(tmp_path: Path, config: Path, name: str) -> None:
    model = adapted(tmp_path / "peft", **CASES[name])
    report = convert(tmp_path / "peft", tmp_path / "out.gguf", options(config, "gguf"))
    found, said = deltas(tmp_path / "out.gguf")
    assert (said["general.architecture"], said["general.type"], said["adapter.type"]) == ("llama", "adapter", "lora")
    wanted = expected(model)
    assert set(found) == set(wanted)
    for path, delta in wanted.items():
        assert np.abs(found[path] - delta).max() <= 2e-6 * np.abs(delta).max(), path
    if name == "ranks of their own":
        assert {module.rank for module in report.modules} == {3, 5}
        assert not report.rounding
    if name == "float alpha":
        assert any("stored as the float32 0.10000000149011612" in note for note in report.notes)


@pytest.mark.parametrize("name", CASES)
def test_back_with_and_without_the_manifest(tmp_path: Path, config: Path, name: str) -> None:
    model = adapted(tmp_path / "peft", **CASES[name])
    convert(tmp_path / "peft", tmp_path / "out.gguf", options(config, "gguf"))
    report = convert(tmp_path / "out.gguf", tmp_path / "back", ConvertOptions(target_dialect="peft"))
    assert "restored bit for bit" in report.notes[0]
    first = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    second = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert all(torch.equal(first[key], second[key]) for key in first), report.notes
    (tmp_path / "out.gguf.lorabridge.json").unlink()
    assert inspect(tmp_path / "out.gguf").dialect == "gguf"
    convert(tmp_path / "out.gguf", tmp_path / "plain", options(config, "peft"))
    made = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    third = load_file(tmp_path / "plain" / "adapter_model.safetensors")
    assert set(third) == set(first)
    for path, delta in {**expected(model, llama=False)}.items():
        hf = _hf(path)
        suffix = (
            ("lora_embedding_A", "lora_embedding_B") if path == "token_embd" else ("lora_A.weight", "lora_B.weight")
        )
        a, b = (third[f"base_model.model.{hf}.{end}"].double().numpy() for end in suffix)
        rank = made["rank_pattern"].get(hf, made["r"])
        alpha = made["alpha_pattern"].get(hf, made["lora_alpha"])
        assert a.shape[0] == rank
        assert np.abs(alpha / rank * b @ a - delta).max() <= 2e-6 * np.abs(delta).max(), path


def _hf(path: str) -> str:
    if path in ("token_embd", "output"):
        return {"token_embd": "model.embed_tokens", "output": "lm_head"}[path]
    _, layer, last = path.split(".")
    name = {ours: theirs for theirs, ours in NAMES.items()}[last]
    return f"model.layers.{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"


def test_qwen2_keeps_its_rows(tmp_path: Path, config: Path) -> None:
    model = adapted(tmp_path / "peft", target_modules=["q_proj", "k_proj"])
    convert(tmp_path / "peft", tmp_path / "out.gguf", options(config, "gguf", "qwen2_gguf"))
    found, said = deltas(tmp_path / "out.gguf")
    assert said["general.architecture"] == "qwen2"
    for path, delta in expected(model, llama=False).items():
        assert np.abs(found[path] - delta).max() <= 2e-6 * np.abs(delta).max()


def save(path: Path, tensors: dict[str, np.ndarray], alpha: float | None = 4.0, kind: str = "lora") -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, kind)
    if alpha is not None:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pair(path: str = "blk.0.attn_v", rank: int = 2) -> dict[str, np.ndarray]:
    return {
        f"{path}.weight.lora_a": np.ones((rank, 16), np.float32),
        f"{path}.weight.lora_b": np.ones((8, rank), np.float32),
    }


def test_alpha_zero_means_a_scaling_of_one(tmp_path: Path, config: Path) -> None:
    save(tmp_path / "a.gguf", pair(), alpha=0.0)
    report = convert(tmp_path / "a.gguf", tmp_path / "out", options(config, "peft"))
    assert report.modules[0].scaling == 1


def test_what_is_no_lora_adapter_is_refused(tmp_path: Path, config: Path) -> None:
    save(tmp_path / "a.gguf", pair(), alpha=None)
    with pytest.raises(MappingError, match=r"adapter\.lora\.alpha is not stored"):
        convert(tmp_path / "a.gguf", tmp_path / "out", options(config, "peft"))
    stated = options(config, "peft", facts=Facts((Fact("*", "alpha", 6),)))
    assert convert(tmp_path / "a.gguf", tmp_path / "out", stated).modules[0].scaling == 3
    save(tmp_path / "b.gguf", pair(), kind="prompt")
    with pytest.raises(MappingError, match=r"adapter\.type is 'prompt'"):
        convert(tmp_path / "b.gguf", tmp_path / "out2", options(config, "peft"))
    save(tmp_path / "c.gguf", {"blk.0.attn_v.weight.lora_a": np.ones((2, 16), np.float32)})
    with pytest.raises(MappingError, match="lora_b is missing"):
        convert(tmp_path / "c.gguf", tmp_path / "out2", options(config, "peft"))
    save(tmp_path / "d.gguf", {**pair(), "blk.0.attn_norm.weight": np.ones(16, np.float32)})
    done = convert(tmp_path / "d.gguf", tmp_path / "out2", options(config, "peft"))
    assert any("leaves whole parameters" in warning for warning in done.warnings)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "no DoRA"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "no bias on the B factor"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "nothing beside them"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [1]}, "single rows"),
    ],
)
def test_what_llama_cpp_cannot_load_is_refused(
    tmp_path: Path, config: Path, lora: dict[str, object], words: str
) -> None:
    adapted(tmp_path / "peft", **lora)
    with pytest.raises(MappingError, match=words):
        convert(tmp_path / "peft", tmp_path / "out.gguf", options(config, "gguf"))
    assert not (tmp_path / "out.gguf").exists()


def test_a_table_and_sizes_are_asked_for(tmp_path: Path, config: Path) -> None:
    adapted(tmp_path / "peft", target_modules=["q_proj"])
    with pytest.raises(MappingError, match="module names of its own") as error:
        convert(tmp_path / "peft", tmp_path / "out.gguf", ConvertOptions(target_dialect="gguf"))
    assert "llama_gguf" in error.value.text()
    with pytest.raises(MappingError) as error:
        convert(tmp_path / "peft", tmp_path / "out.gguf", ConvertOptions(target_dialect="gguf", family="llama_gguf"))
    assert "needs heads" in error.value.text()


def test_sizes_that_are_not_known_are_asked_for(tmp_path: Path) -> None:
    adapted(tmp_path / "peft", target_modules=["q_proj"])
    with pytest.raises(MappingError, match="do not fit") as raised:
        convert(tmp_path / "peft", tmp_path / "out.gguf", ConvertOptions(target_dialect="gguf", family="llama_gguf"))
    assert raised.value.hint == "give the model's configuration with --config config.json"
