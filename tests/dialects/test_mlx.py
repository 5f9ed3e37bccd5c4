"""MLX-LM's adapters: files that mlx-lm 0.32.2 saved, with the logits that it computed, and ours.

The other direction was run with ``mlx_lm/make_adapters.py load`` where mlx is installed: 3e-7 at most.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft_models import CASES, load
from safetensors.numpy import load_file, save_file

from lorabridge import ConvertOptions, convert, inspect
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError

REAL = Path(__file__).parent / "mlx_lm"
REFUSED = {
    "lora_bias": "no bias on the B factor",
    "bias all": "factors and nothing beside",
    "bias lora_only": "factors and nothing beside",
    "bias all and saved": "factors and nothing beside",
    "modules_to_save": "factors and nothing beside",
    "embedding dora": "magnitude per token",
    "trainable tokens": "single rows",
    "conv": "no LoRA for conv",
    "conv dora": "no LoRA for conv",
    "grouped conv": "no LoRA for conv",
    "attention": "no LoRA for in_proj_weight",
    "attention bias": "in_proj_weight|nothing beside",
    "attention pattern": "no LoRA for in_proj_weight",
    "bert": "factors and nothing beside",
}


def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    known = np.load(REAL / "base.npz")
    model.load_state_dict({k: torch.from_numpy(known[k]) for k in known if k != "ids"})
    return model


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_what_mlx_saved_has_the_same_effect_in_peft(tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    report = convert(REAL / kind, tmp_path / "out", ConvertOptions(target_dialect="peft"))
    assert (report.source_dialect, report.tensors_read) == ("mlx", len(load_file(REAL / kind / "adapters.safetensors")))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["lora_dropout"], config["base_model_name_or_path"]) == (0.05, "tiny")
    adapted = PeftModel.from_pretrained(llama(), str(tmp_path / "out")).eval()
    with torch.no_grad():
        logits = adapted(torch.from_numpy(np.load(REAL / "base.npz")["ids"])).logits.numpy()
    expected = np.load(REAL / kind / "logits.npy")
    assert np.abs(logits - expected).max() < 3e-6
    with torch.no_grad(), adapted.disable_adapter():
        plain = adapted(torch.from_numpy(np.load(REAL / "base.npz")["ids"])).logits.numpy()
    assert np.abs(plain - expected).max() > 1e-2


def test_a_scale_that_no_alpha_gives_pads_the_rank(tmp_path: Path) -> None:
    """0.1 at rank 3: no double divided by 3 is 0.1."""
    report = convert(REAL / "lora", tmp_path / "out", ConvertOptions(target_dialect="peft"))
    assert {(module.rank, module.alpha, module.scaling) for module in report.modules} == {(4, 0.4, 0.1)}


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_way_back_is_mlxs_own_file(tmp_path: Path, kind: str) -> None:
    convert(REAL / kind, tmp_path / "out", ConvertOptions(target_dialect="peft"))
    report = convert(tmp_path / "out", tmp_path / "back", ConvertOptions(target_dialect="mlx"))
    assert "restored bit for bit" in report.notes[0]
    ours, theirs = (load_file(d / "adapters.safetensors") for d in (tmp_path / "back", REAL / kind))
    assert {n: v.tobytes() for n, v in ours.items()} == {n: v.tobytes() for n, v in theirs.items()}
    configs = [json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path / "back", REAL / kind)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", list(CASES))
def test_peft_adapters_go_to_mlx_and_back(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    adapted = case.adapted()
    adapted.save_pretrained(tmp_path / "peft")
    if name in REFUSED:
        with pytest.raises(MappingError, match=REFUSED[name]) as error:
            convert(tmp_path / "peft", tmp_path / "out", ConvertOptions(target_dialect="mlx"))
        assert error.value.hint
        return
    convert(tmp_path / "peft", tmp_path / "out", ConvertOptions(target_dialect="mlx", adapter_only=True))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapters.safetensors", "lorabridge.json",
    ]  # fmt: skip
    held = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_parameters"]
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    assert set(held["keys"]) == {name.rpartition(".")[0] for name in tensors}
    assert all(tensors[f"{p}.lora_a"].shape[1] == held["rank"] == tensors[f"{p}.lora_b"].shape[0] for p in held["keys"])
    convert(tmp_path / "out", tmp_path / "restored")
    first, second = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("peft", "restored"))
    factors = {n: v.tobytes() for n, v in first.items() if "lora_" in n}
    assert factors == {n: v.tobytes() for n, v in second.items()}
    (tmp_path / "out" / "lorabridge.json").unlink()
    kinds = Facts((Fact("emb", "kind", "embedding"), Fact("transformer.w*", "kind", "embedding")))
    convert(tmp_path / "out", tmp_path / "plain", ConvertOptions(target_dialect="peft", facts=kinds))
    if name in ("layer_replication", "pissa", "olora"):  # MLX's config cannot say that the base was changed
        return
    if case.base().__class__.__name__.startswith("GPT2"):  # the config of peft must say that Conv1D is transposed
        config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
        config["fan_in_fan_out"] = True
        (tmp_path / "plain" / "adapter_config.json").write_text(json.dumps(config))
    there, expected = case.output(load(case, tmp_path / "plain")), case.output(adapted)
    assert torch.allclose(there, expected, atol=2e-6)


def test_embeddings_are_asked_for_where_the_name_does_not_say(tmp_path: Path) -> None:
    save_file({"emb.lora_a": np.ones((20, 2), np.float32), "emb.lora_b": np.ones((2, 16), np.float32)},
              tmp_path / "adapters.safetensors")  # fmt: skip
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 2, "scale": 1.0}}))
    with pytest.raises(MappingError, match="embedding or linear") as error:
        convert(tmp_path, tmp_path.parent / "out_kinds", ConvertOptions(target_dialect="peft"))
    assert "--kind" in error.value.hint


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({"a.lora_a": (4, 2)}, {"scale": 1.0}, "factor B is missing"),
        ({"a.lora_a": (4, 2), "a.lora_b": (3, 4)}, {"scale": 1.0}, "shapes are not"),
        ({"a.lora_a": (4, 2), "a.lora_b": (2, 4)}, {}, "scale is not stored"),
        ({"a.lora_a": (4, 2), "a.lora_b": (2, 4)}, {"scale": "x"}, "no number"),
        ({"a.lora_a": (4, 2), "a.lora_b": (2, 4), "b.weight": (2,)}, {"scale": 1.0}, "beside the factors"),
        ({"a.lora_a": (4, 2), "a.lora_b": (2, 4), "a.m": (3,)}, {"scale": 1.0}, "magnitude"),
        ({"e.lora_a": (3, 2, 8), "e.lora_b": (3, 4, 2)}, {"scale": 1.0}, "stack of experts"),
        ({"m.switch_mlp.e.lora_a": (3, 2, 8), "m.switch_mlp.e.lora_b": (2, 4, 2)}, {"scale": 1.0}, "experts, rank, in"),
        ({"a.lora_a": (4, 2), "a.lora_b": (2, 4), "a.m": (4,), "b.lora_a": (4, 2), "b.lora_b": (2, 4)},
         {"scale": 1.0}, "some have none"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_of_mlx_is_refused(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], config: dict[str, object], words: str
) -> None:
    save_file({n: np.ones(s, np.float32) for n, s in tensors.items()}, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_parameters": config} if config else {"seed": 0}))
    with pytest.raises(MappingError, match=words):
        convert(tmp_path, tmp_path.parent / "out_refused", ConvertOptions(target_dialect="peft"))


def test_an_alpha_stands_in_for_a_missing_scale(tmp_path: Path) -> None:
    save_file(
        {"a.lora_a": np.ones((4, 2), np.float32), "a.lora_b": np.ones((2, 4), np.float32)}, tmp_path / "a.safetensors"
    )
    options = ConvertOptions(target_dialect="peft", facts=Facts((Fact("*", "alpha", 6),)))
    report = convert(tmp_path / "a.safetensors", tmp_path / "out", options)
    assert report.modules[0].scaling == 3
    assert inspect(tmp_path / "a.safetensors").dialect == "mlx"


def test_experts_of_a_stack_become_one_module_each(tmp_path: Path) -> None:
    done = convert(REAL / "experts", tmp_path / "out", ConvertOptions(target_dialect="peft"))
    assert len(done.modules) == 10
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    deltas = np.load(REAL / "experts" / "fused.npz")
    for stack in deltas:
        for number, delta in enumerate(deltas[stack]):
            path = "base_model.model." + stack.replace("switch_mlp", f"experts.{number}")
            ours = 3.0 * made[f"{path}.lora_B.weight"] @ made[f"{path}.lora_A.weight"]
            np.testing.assert_allclose(ours, delta, rtol=1e-5, atol=1e-5)
    (tmp_path / "out" / "lorabridge.json").unlink()
    convert(tmp_path / "out", tmp_path / "back", ConvertOptions(target_dialect="mlx"))
    before, after = (load_file(p / "adapters.safetensors") for p in (REAL / "experts", tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    keys = json.loads((tmp_path / "back" / "adapter_config.json").read_text())["lora_parameters"]["keys"]
    assert "model.layers.0.mlp.switch_mlp.gate_proj" in keys


def test_mixtral_s_experts_have_its_names(tmp_path: Path) -> None:
    path = "model.layers.0.block_sparse_moe.switch_mlp"
    tensors = {f"{path}.{n}_proj.lora_{s}": np.ones(shape, np.float32) for n in ("gate", "down", "up")
               for s, shape in (("a", (2, 3, 4)), ("b", (2, 5, 3)))}  # fmt: skip
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "adapters.safetensors")
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"scale": 1.0, "rank": 3}}))
    done = convert(tmp_path / "in", tmp_path / "out", ConvertOptions(target_dialect="peft"))
    assert {m.path.rpartition(".")[2] for m in done.modules} == {"w1", "w2", "w3"}
    (tmp_path / "out" / "lorabridge.json").unlink()
    done = convert(
        tmp_path / "out", tmp_path / "less", ConvertOptions(target_dialect="peft", exclude=("*experts.1.w2",))
    )
    (tmp_path / "less" / "lorabridge.json").unlink()
    with pytest.raises(MappingError, match="stacks those of all experts") as caught:
        convert(tmp_path / "less", tmp_path / "again", ConvertOptions(target_dialect="mlx"))
    assert caught.value.where == (f"{path}.down_proj: expert 1",)


def test_experts_become_the_parameters_that_transformers_holds(tmp_path: Path) -> None:
    config = {"model_type": "qwen2_moe", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24,
              "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 3, "moe_intermediate_size": 8,
              "shared_expert_intermediate_size": 8, "vocab_size": 32, "decoder_sparse_step": 1,
              "mlp_only_layers": [], "tie_word_embeddings": False}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ConvertOptions(
        target_dialect="peft", family="qwen2_moe", layout={"hf_experts": "memory"}, config=tmp_path / "config.json"
    )
    convert(REAL / "experts", tmp_path / "out", options)
    targets = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["target_parameters"]
    assert {name.rpartition(".")[2] for name in targets} == {"gate_up_proj", "down_proj"}
