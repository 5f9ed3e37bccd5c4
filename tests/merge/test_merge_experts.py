"""Adapters of experts merged: as peft merges them, into every way that either side stores experts, and out again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lorabridge import ConvertOptions, MergeOptions, convert, merge, open_checkpoint, unmerge
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError

MOE = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
}  # fmt: skip
MODELS = {
    "Mixtral": ("mixtral", MOE | {"intermediate_size": 12, "num_local_experts": 3}),
    "Qwen3Moe": (
        "qwen3_moe_mcore",
        MOE | {"intermediate_size": 8, "moe_intermediate_size": 8, "num_experts": 4, "head_dim": 8},
    ),
}  # fmt: skip  Qwen3Moe: gate_up_proj is square
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PLAIN = {"qkv": "grouped", "experts": "flat"}


def network(name: str, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name][1])
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)


def saved(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, **fields: object) -> peft.PeftModel:
    """Save a base as transformers does, and an adapter as peft does."""
    network(name, dtype).save_pretrained(folder / "base")
    config = peft.LoraConfig(
        **{"r": 2, "lora_alpha": 3, "target_parameters": BOTH, "target_modules": ["q_proj"]} | fields
    )
    model = peft.get_peft_model(network(name, dtype), config)
    torch.manual_seed(1)
    for key, tensor in model.named_parameters():
        if "lora_" in key:
            tensor.data = torch.randn_like(tensor) / 2
    model.save_pretrained(folder / "adapter")
    return model


def tensors(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        return {name: np.array(checkpoint[name]) for name in checkpoint}


@pytest.mark.parametrize("name", list(MODELS))
def test_a_merge_into_files_of_transformers_is_peft_s(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path, torch.float32)  # in bfloat16 peft rounds the delta, and then the sum
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", MergeOptions(family=MODELS[name][0]))
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "peft"))
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert ours.keys() == theirs.keys() == base.keys()
    changed = 0
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-6, atol=1e-6)
        changed += int(not torch.equal(value, base[key]))
    count = {"Mixtral": 3, "Qwen3Moe": 4}[name]
    assert changed == 2 * (1 + 3 * count)


def test_without_a_family_the_error_says_what_is_needed(tmp_path: Path) -> None:
    saved("Mixtral", tmp_path)
    with pytest.raises(MappingError) as error:
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", MergeOptions())
    assert "mlp.experts.down_proj.0: the base has no such module" in error.value.text()
    assert "pass --family" in error.value.hint


LAYOUTS = [
    ("Mixtral", {"experts": "batched"}), ("Mixtral", {"experts": "transposed"}), ("Mixtral", {"experts": "grouped"}),
    ("Qwen3Moe", PLAIN), ("Qwen3Moe", PLAIN | {"experts": "stacked"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_merging_and_converting_commute_on_bits_and_come_undone(
    name: str, layout: dict[str, str], tmp_path: Path
) -> None:  # fmt: skip
    saved(name, tmp_path)
    family = MODELS[name][0]
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", MergeOptions(family=family))
    to_ms = ConvertOptions(family=family, layout=layout, config=tmp_path / "base" / "config.json")
    convert(tmp_path / "merged", tmp_path / "merged.ckpt", to_ms)
    convert(tmp_path / "base", tmp_path / "base.ckpt", to_ms)
    both = MergeOptions(family=family, layout=layout, config=tmp_path / "base" / "config.json", target_dialect="ms")
    undo = tmp_path / "undo"
    merge(tmp_path / "base.ckpt", tmp_path / "adapter", tmp_path / "again.ckpt", both, undo=undo)
    first, second = tensors(tmp_path / "merged.ckpt"), tensors(tmp_path / "again.ckpt")
    assert first.keys() == second.keys()
    for key, bits in first.items():
        assert np.array_equal(bits, second[key]), key
    before = tensors(tmp_path / "base.ckpt")
    stacked = [key for key in first if "experts" in key or "ffn." in key]
    assert stacked
    assert all(not np.array_equal(first[key], before[key]) for key in stacked)
    unmerge(tmp_path / "again.ckpt", tmp_path / "adapter", tmp_path / "back.ckpt", both, undo=undo)
    after = tensors(tmp_path / "back.ckpt")
    assert all(np.array_equal(after[key], bits) for key, bits in before.items())


def test_two_adapters_with_weights_add_up_in_a_stack(tmp_path: Path) -> None:
    saved("Qwen3Moe", tmp_path)
    saved("Qwen3Moe", tmp_path / "two", r=3, lora_alpha=4, target_parameters=BOTH[1:])
    config = tmp_path / "base" / "config.json"
    adapters = [tmp_path / "adapter", tmp_path / "two" / "adapter"]
    told = MergeOptions(family="qwen3_moe_mcore", weights=(0.5, 2.0))
    merge(tmp_path / "base", adapters, tmp_path / "merged", told)
    layout = PLAIN | {"experts": "stacked"}
    to_ms = ConvertOptions(family="qwen3_moe_mcore", layout=layout, config=config)
    convert(tmp_path / "merged", tmp_path / "merged.ckpt", to_ms)
    convert(tmp_path / "base", tmp_path / "base.ckpt", to_ms)
    both = MergeOptions(family="qwen3_moe_mcore", layout=layout, config=config, weights=(0.5, 2.0))
    merge(tmp_path / "base.ckpt", adapters, tmp_path / "again.ckpt", both)
    first, second = tensors(tmp_path / "merged.ckpt"), tensors(tmp_path / "again.ckpt")
    for key, bits in first.items():
        assert np.array_equal(bits, second[key]), key


@pytest.mark.parametrize("name", ["Qwen3Moe"])
def test_an_adapter_goes_to_pynative_stacks_and_back(name: str, tmp_path: Path) -> None:
    saved(name, tmp_path, target_modules=None)
    family, config = MODELS[name][0], tmp_path / "base" / "config.json"
    there = ConvertOptions(family=family, target_dialect="pynative", config=config)
    convert(tmp_path / "adapter", tmp_path / "ms.safetensors", there)
    held = tensors(tmp_path / "ms.safetensors")
    assert held["decoder.layers.1.mlp.experts.weight1_lora_a"].shape == (4, 16, 2)
    assert held["decoder.layers.1.mlp.experts.weight2_lora_b"].shape == (4, 2, 16)
    convert(tmp_path / "ms.safetensors", tmp_path / "back")
    one, two = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "back"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("layout", [{}, {"hf_experts": "memory"}, PLAIN])
def test_experts_of_a_converted_adapter_land_in_files_whatever_its_layout_was(
    layout: dict[str, str], tmp_path: Path
) -> None:
    """The base's names say how it stores experts; a layout that is told, or kept in a manifest, was the adapter's."""
    saved("Qwen3Moe", tmp_path, torch.float32)
    config, family = tmp_path / "base" / "config.json", "qwen3_moe_mcore"
    made = {**PLAIN, "hf_experts": "memory"}
    convert(tmp_path / "adapter", tmp_path / "a.ckpt", ConvertOptions(target_dialect="pynative", family=family,
                                                                      layout=PLAIN, config=config))  # fmt: skip
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "b.ckpt").write_bytes((tmp_path / "a.ckpt").read_bytes())
    with open_checkpoint(tmp_path / "a.ckpt") as checkpoint:
        rank = next(checkpoint[name].shape[-1] for name in checkpoint if name.endswith("weight1_lora_a"))
    facts = Facts((Fact("*", "alpha", 1.5 * rank),))
    convert(tmp_path / "moved" / "b.ckpt", tmp_path / "again", ConvertOptions(target_dialect="peft", family=family,
            source_dialect="pynative", layout=made, config=config, facts=facts))  # fmt: skip
    for adapter, told, out in (("adapter", {}, "one"), ("again", layout, "two")):
        merge(tmp_path / "base", tmp_path / adapter, tmp_path / out, MergeOptions(family=family, layout=told))
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=1e-6, atol=1e-6)


def test_experts_land_in_files_of_a_family_with_layers_for_further_tokens(tmp_path: Path) -> None:
    """Names of such layers fit rules that say nothing of experts; the base shows how it stores them even so."""
    torch.manual_seed(0)
    made = MOE | {"n_routed_experts": 3, "n_shared_experts": 1, "moe_intermediate_size": 6, "intermediate_size": 12,
                  "head_dim": 8, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}  # fmt: skip
    base = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**made))
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, lora_alpha=3, target_parameters=BOTH, target_modules=["q_proj"],
                              init_lora_weights=False),
    )  # fmt: skip
    model.save_pretrained(tmp_path / "adapter")
    told = {"hf_experts": "memory"}
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", MergeOptions(family="glm4_moe_mcore", layout=told))
    model.merge_and_unload().save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "peft"))
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-6, atol=1e-6)


def test_dialects_without_names_for_experts_refuse_them(tmp_path: Path) -> None:
    saved("Mixtral", tmp_path)
    options = ConvertOptions(
        family="mixtral", target_dialect="mindpet", layout={"experts": "batched"},
        config=tmp_path / "base" / "config.json",
    )  # fmt: skip
    with pytest.raises(MappingError) as error:
        convert(tmp_path / "adapter", tmp_path / "out.ckpt", options)
    assert "'mindpet' has no factors of experts that one tensor holds" in error.value.problem
    assert "model.layers.0.feed_forward.ffn.w1.weight" in error.value.where


@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "in one tensor"])
def test_recover_finds_experts(stacked: bool, tmp_path: Path) -> None:
    from lorabridge.actions.recover import recover

    saved("Mixtral", tmp_path, torch.float32)
    base, merged = tmp_path / "base", tmp_path / "merged"
    merge(base, [tmp_path / "adapter"], merged, MergeOptions(family="mixtral"))
    if stacked:
        for folder in (base, merged):
            known = ConvertOptions(family="mixtral", layout={"experts": "batched"})
            convert(folder, tmp_path / f"{folder.name}.ckpt", known)
            (tmp_path / f"{folder.name}.ckpt.lorabridge.json").unlink()
            known = replace(known, layout={"experts": "batched", "hf_experts": "memory"}, config=folder / "config.json")
            convert(tmp_path / f"{folder.name}.ckpt", tmp_path / f"{folder.name}_stacked", known)
        base, merged = tmp_path / "base_stacked", tmp_path / "merged_stacked"
    found = recover(base, merged, tmp_path / "adapter")
    assert {row.fits for row in found.modules} == {True}
    assert {row.times for row in found.modules} == {1}
    assert len({row.weight for row in found.modules}) == (6 if stacked else 20)
