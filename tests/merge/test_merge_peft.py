"""Merging files agrees with peft's own merge in memory, kind by kind, and the merged models compute the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lorabridge.actions.merge import MergeOptions, merge
from lorabridge.errors import MappingError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PLACES = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}


def llama(**more: object) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **more}))


def gpt2(**more: object) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, **more))


def bert(**more: object) -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **sizes))


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[Callable[..., torch.nn.Module], dict[str, object]]] = {
    "linear": (llama, {"target_modules": ALL}),
    "rslora": (llama, {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 5}),
    "patterns": (llama, {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2},
                         "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}),
    "rank above a slice": (llama, {"target_modules": ["q_proj"], "r": 40}),
    "dora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d dora": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "bias all": (bert, {"target_modules": ["query", "value"], "bias": "all", "task_type": "SEQ_CLS"}),
    "lora bias": (bert, {"target_modules": ["query", "dense"], "lora_bias": True, "task_type": "SEQ_CLS"}),
    "modules to save": (bert, {"target_modules": ["key"], "modules_to_save": ["classifier", "pooler"]}),
    "embedding": (lambda: llama(tie_word_embeddings=False), {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "tokens": (lambda: llama(tie_word_embeddings=False), {"target_modules": ["q_proj"],
                                                         "trainable_token_indices": [5, 2, 63]}),
    "tokens tied": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["q_proj"],
                                                             "trainable_token_indices": [0, 1, 9]}),
}  # fmt: skip


def prepare(folder: Path, model: torch.nn.Module, dtype: torch.dtype, **options: object) -> torch.nn.Module:
    """Write a base and an adapter; return the model as peft merges it after loading both."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(1)
    model.to(dtype).save_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **options}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.1)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder / "adapter")
    fresh = type(model).from_pretrained(folder / "base", dtype=dtype)
    return PeftModel.from_pretrained(fresh, folder / "adapter").merge_and_unload()


def near(ours: torch.Tensor, theirs: torch.Tensor, scale: torch.Tensor) -> bool:
    """Say whether two results are apart by one rounding of numbers as large as ``scale``."""
    place = scale.double() * 2.0 ** (1 - PLACES[ours.dtype])
    return bool(((ours.double() - theirs.double()).abs() <= place).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_merging_files_agrees_with_peft(tmp_path: Path, case: str, dtype: str) -> None:
    build, options = CASES[case]
    theirs = prepare(tmp_path, build(), DTYPES[dtype], **options)
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    expected = {name: value for name, value in theirs.state_dict().items() if name in ours}
    assert set(ours) == set(base)
    assert set(ours) <= set(expected)
    exact_sum = 2 if options.get("use_dora") else 1
    for name, value in ours.items():
        old = base[name].double()
        scale = torch.maximum(old.abs(), expected[name].double().abs()) + (expected[name].double() - old).abs()
        scale = scale.amax() if dtype == "float32" or exact_sum > 1 else scale
        assert near(value, expected[name], exact_sum * scale), name
        if name not in report.merged and name not in report.replaced:
            assert torch.equal(value, base[name]), name
    again = type(theirs).from_pretrained(tmp_path / "merged", dtype=DTYPES[dtype]).eval()
    tokens = torch.arange(0, 24).reshape(2, 12)
    with torch.no_grad():
        mine, his = again(tokens).logits, theirs.eval()(tokens).logits
    size = his.abs().max().item()
    assert (mine - his).abs().max().item() <= size * 2.0 ** (4 - PLACES[DTYPES[dtype]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_most_one_in_100000_elements_differs_from_the_correctly_rounded_sum(tmp_path: Path, dtype: str) -> None:
    model = llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=4)
    prepare(tmp_path, model, DTYPES[dtype], target_modules=ALL, r=16)
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    base, ours = (load_file(tmp_path / part / "model.safetensors") for part in ("base", "merged"))
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    wrong = total = 0
    for name in [name for name in factors if "lora_A" in name]:
        a, b = factors[name].double(), factors[name.replace("lora_A", "lora_B")].double()
        target = name.removeprefix("base_model.model.").replace("lora_A.", "")
        exact = base[target].double() + (6 / 16) * (b @ a)
        wrong += int((correctly_rounded(exact, dtype) != ours[target]).sum())
        total += exact.numel()
    assert total > 900_000
    assert wrong <= total // 100_000


def correctly_rounded(x: torch.Tensor, name: str) -> torch.Tensor:
    """Round float64 once; torch goes through float32."""
    from lorabridge.arithmetic.floats import encode, rounded
    from lorabridge.dtypes import BY_NAME

    dtype = BY_NAME[name]
    bits = encode(rounded(np.ascontiguousarray(x.numpy()), dtype), dtype)
    return torch.from_numpy(bits.view(f"i{dtype.itemsize}")).view(DTYPES[name])


def test_a_delta_on_a_tied_embedding_unties_the_head(tmp_path: Path) -> None:
    """peft adds it to both: what training did is embedding with delta, head without."""
    from peft import PeftModel

    model = llama(tie_word_embeddings=True)
    prepare(tmp_path, model, torch.float32, target_modules=["embed_tokens", "q_proj"])
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert any("tie_word_embeddings" in note for note in report.notes)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert torch.equal(ours["lm_head.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(ours["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    kind = type(model)
    adapted = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    merged = kind.from_pretrained(tmp_path / "merged").eval()
    tokens = torch.arange(0, 24).reshape(2, 12)
    with torch.no_grad():
        assert torch.allclose(merged(tokens).logits, adapted(tokens).logits, atol=1e-5)


def test_replicated_layers_are_written_out(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model = llama()
    kind = type(model)
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], layer_replication=[[0, 2], [1, 3]])
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    adapted = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    merged = kind.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.num_hidden_layers == 4
    tokens = torch.arange(0, 24).reshape(2, 12)
    with torch.no_grad():
        assert torch.allclose(merged(tokens).logits, adapted(tokens, use_cache=False).logits, atol=1e-5)


def test_several_adapters_add_up_with_weights(tmp_path: Path) -> None:
    prepare(tmp_path, gpt2(), torch.float32, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    prepare(tmp_path / "two", gpt2(), torch.float32, target_modules=["c_attn"], r=2, fan_in_fan_out=True)
    adapters = [tmp_path / "adapter", tmp_path / "two" / "adapter"]
    merge(tmp_path / "base", adapters, tmp_path / "merged", MergeOptions(weights=(0.5, -2.0)))
    ours, base = (load_file(tmp_path / part / "model.safetensors") for part in ("merged", "base"))
    name = "transformer.h.1.attn.c_attn"
    expected = base[f"{name}.weight"].double()
    for folder, factor in zip(adapters, (0.5 * 6 / 4, -2.0 * 6 / 2), strict=True):
        factors = load_file(folder / "adapter_model.safetensors")
        a, b = (factors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "AB")
        expected = expected + factor * (b @ a).T
    assert torch.equal(ours[f"{name}.weight"], expected.float())


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d", "attention"])
def test_plain_networks_agree_with_peft(tmp_path: Path, kind: str) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    torch.manual_seed(2)
    layer = {
        "conv1d": lambda: torch.nn.Conv1d(6, 8, 3), "conv2d": lambda: torch.nn.Conv2d(6, 8, 3),
        "conv3d": lambda: torch.nn.Conv3d(6, 8, 2), "attention": lambda: torch.nn.MultiheadAttention(16, 2),
    }[kind]()  # fmt: skip
    tokens = torch.randn(5, 2, 16)
    net = torch.nn.ModuleDict({"block": torch.nn.ModuleDict({"layer": layer})})
    save_file({k: v.clone() for k, v in net.state_dict().items()}, tmp_path / "base.safetensors")
    adapted = get_peft_model(net, LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], use_dora=kind == "conv2d"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "base.safetensors", [tmp_path / "adapter"], tmp_path / "merged.safetensors")
    ours = load_file(tmp_path / "merged.safetensors")
    if kind == "attention":  # what peft computes, not only what it merges, has out_proj's delta twice
        expected = adapted.eval().base_model.model["block"]["layer"](tokens, tokens, tokens)[0]
        plain = torch.nn.MultiheadAttention(16, 2).eval()
        plain.load_state_dict({name.removeprefix("block.layer."): value for name, value in ours.items()})
        assert torch.allclose(plain(tokens, tokens, tokens)[0], expected, atol=1e-5)
    theirs = adapted.merge_and_unload().state_dict()
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], atol=1e-6), name


def test_a_residual_base_must_be_confirmed(tmp_path: Path) -> None:
    prepare(tmp_path, llama(), torch.float32, target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": "pissa"}))
    with pytest.raises(MappingError, match="cannot be merged"):
        merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", MergeOptions(residual_base=True))


def trained(model: torch.nn.Module, folder: Path, **options: object) -> torch.nn.Module:
    """Adapt a model whose base is saved already, give every trainable parameter a value, and save the adapter."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, **options}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)
    return adapted.eval()


def same_logits(merged: Path, adapted: torch.nn.Module, kind: type, tokens: torch.Tensor) -> None:
    again = kind.from_pretrained(merged).eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        mine, his = again(tokens).logits, adapted(tokens).logits
    assert torch.allclose(mine, his, atol=1e-5 * max(1.0, his.abs().max().item()))


TIED: dict[str, dict[str, object]] = {
    "delta on both": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    "saved whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "trained rows": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("case", TIED)
def test_what_was_trained_on_both_stays_tied(tmp_path: Path, case: str) -> None:
    model = llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    adapted = trained(model, tmp_path / "adapter", **TIED[case])
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    same_logits(tmp_path / "merged", adapted, type(model), torch.arange(24).reshape(2, 12))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [70, 60])
def test_a_resized_vocabulary_goes_into_the_config(tmp_path: Path, size: int, tied: bool) -> None:
    from peft import PeftModel

    model = llama(tie_word_embeddings=tied)
    kind = type(model)
    model.save_pretrained(tmp_path / "base")
    model = kind.from_pretrained(tmp_path / "base")  # peft asks the files whether the vocabulary was resized
    model.resize_token_embeddings(size)
    adapted = trained(model, tmp_path / "adapter", target_modules=["q_proj"])
    report = merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged")
    assert any(f"vocab_size 64 became {size}" in note for note in report.notes)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["vocab_size"] == size
    assert config["tie_word_embeddings"] is tied
    tokens = torch.arange(36, 60).reshape(2, 12) + size - 60
    same_logits(tmp_path / "merged", adapted, kind, tokens)
    fresh = kind.from_pretrained(tmp_path / "base")
    fresh.resize_token_embeddings(size)
    same_logits(tmp_path / "merged", PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval(), kind, tokens)


def test_pefts_factors_of_a_grouped_convolution_are_refused_as_peft_refuses_them(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    net = torch.nn.ModuleDict({"layer": torch.nn.Conv2d(4, 6, 3, groups=2)})
    save_file({k: v.clone() for k, v in net.state_dict().items()}, tmp_path / "base.safetensors")
    adapted = get_peft_model(net, LoraConfig(r=4, target_modules=["layer"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(NotImplementedError):
        adapted.merge_and_unload()
    with pytest.raises(MappingError) as error:
        merge(tmp_path / "base.safetensors", [tmp_path / "adapter"], tmp_path / "m.safetensors")
    assert "layer: peft's factors of a grouped convolution" in error.value.text()


@pytest.mark.parametrize("dora", [False, True])
def test_peft_on_a_fused_weight_of_mindspore_is_peft_on_its_parts(tmp_path: Path, dora: bool) -> None:
    """DoRA's magnitudes of q, k and v become one vector; the sum of three terms is normalised row by row."""
    from lorabridge.actions.choices import ConvertOptions
    from lorabridge.actions.convert import convert

    theirs = prepare(tmp_path, llama(), torch.float32, target_modules=ALL, use_dora=dora)
    config, layout = tmp_path / "base" / "config.json", {"qkv_concat": "grouped"}
    there = ConvertOptions(family="llama", layout=layout, config=config)
    convert(tmp_path / "base", tmp_path / "base.ckpt", there)
    merge(tmp_path / "base.ckpt", [tmp_path / "adapter"], tmp_path / "merged.ckpt", MergeOptions(
        family="llama", layout=layout, config=config))  # fmt: skip
    back = tmp_path / "back"
    convert(tmp_path / "merged.ckpt", back, ConvertOptions(family="llama", layout=layout, config=config))
    ours, expected = load_file(back / "model.safetensors"), theirs.state_dict()
    assert {name for name in expected if name in ours} == set(ours)
    for name, value in ours.items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name
