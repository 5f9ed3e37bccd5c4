"""peft's target_parameters: stacks of experts that real peft wrote, read; what is written, loaded by real peft."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lorabridge import axes
from lorabridge.dialects.adapter import Adapter, Content, Facts, Json
from lorabridge.dialects.peft import PEFT
from lorabridge.errors import MappingError
from lorabridge.formats import open_source

MOE = {
    "vocab_size": 13, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
}  # fmt: skip
MODELS = {
    "Mixtral": MOE | {"intermediate_size": 6, "num_local_experts": 3},
    "Qwen3Moe": MOE | {"intermediate_size": 6, "moe_intermediate_size": 5, "num_experts": 4, "head_dim": 4},
    "Olmoe": MOE | {"intermediate_size": 4, "num_experts": 3},  # gate_up_proj is square
    "GptOss": MOE | {"intermediate_size": 6, "num_local_experts": 3, "head_dim": 4},  # stored [experts, in, out]
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def network(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    return getattr(transformers, f"{name}ForCausalLM")(config)


def adapted(name: str, folder: Path, **fields: object) -> peft.PeftModel:
    """Adapt a network with random factors and save them."""
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 5, "init_lora_weights": False, **fields})
    model = peft.get_peft_model(network(name), config)
    model.save_pretrained(folder)
    return model


def content(folder: Path, **fields: object) -> Content:
    source = open_source(folder / "adapter_model.safetensors")
    config: Json = {**json.loads((folder / "adapter_config.json").read_text()), **fields}
    return Content(dict(source.specs), {}, config, Facts(), str(folder))


def deltas(adapter: Adapter, folder: Path) -> dict[str, np.ndarray]:
    """Return scaling * B @ A of every module, [out, in]."""
    source = open_source(folder / "adapter_model.safetensors")
    made = {}
    for module in adapter.modules:
        (term,) = module.terms
        a, b = (
            np.ascontiguousarray(axes.evaluate(x, source.read, {})).view("<f4").astype("f8") for x in (term.a, term.b)
        )
        made[module.path] = module.scaling.value * (b @ a)
    return made


@pytest.mark.parametrize("name", list(MODELS))
def test_the_deltas_of_experts_are_those_that_peft_merges(name: str, tmp_path: Path) -> None:
    model = adapted(name, tmp_path, target_modules=["q_proj"], target_parameters=BOTH, lora_alpha=3, use_rslora=True)
    adapter = PEFT.parse(content(tmp_path))
    made = deltas(adapter, tmp_path)
    before = network(name).state_dict()
    after = model.merge_and_unload().state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    count = {"Mixtral": 3, "Qwen3Moe": 4, "Olmoe": 3, "GptOss": 3}[name]
    assert len(made) == 2 * (1 + 2 * count)
    assert changed == {f"model.layers.{i}.{p}" for i in (0, 1) for p in (*BOTH, "self_attn.q_proj.weight")}
    for module in adapter.modules:
        if module.stack is None:
            continue
        key = module.stack.parameter
        assert module.path == f"{key}.{module.stack.number}"
        assert module.stack.count == count
        assert module.fan_in_fan_out is (name == "GptOss")
        wanted = (after[key] - before[key])[module.stack.number].double().numpy()
        np.testing.assert_allclose(
            made[module.path].T if module.fan_in_fan_out else made[module.path], wanted, atol=1e-6
        )


@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]])
def test_writing_gives_the_file_that_was_read(targets: list[str], tmp_path: Path) -> None:
    adapted("Mixtral", tmp_path, target_parameters=targets, rank_pattern={"experts.down_proj": 3})
    given = content(tmp_path)
    written = PEFT.write(PEFT.parse(given), Facts())
    assert dict(written.tensors) == {name: axes.read(spec) for name, spec in given.specs.items()}
    same = ("r", "lora_alpha", "rank_pattern", "target_parameters", "target_modules", "peft_version")
    assert written.config is not None
    assert {k: written.config.get(k) for k in same} == {k: given.config.get(k) for k in same}  # type: ignore[union-attr]


def test_what_is_written_anew_is_loaded_by_peft_with_the_same_effect(tmp_path: Path) -> None:
    """Experts of which some are not adapted, ranks that differ, and a config that says nothing."""
    model = adapted("Qwen3Moe", tmp_path / "a", target_parameters=BOTH, target_modules=["o_proj"])
    parsed = PEFT.parse(content(tmp_path / "a"))
    kept = tuple(m for m in parsed.modules if m.stack is None or m.stack.number != 2)
    written = PEFT.write(Adapter(kept, config={"lora_dropout": 0.1}), Facts())
    assert any("2 got factors of zeros" in note for note in written.notes)
    assert any("lora_dropout 0.1 became 0" in note for note in written.notes)
    source = open_source(tmp_path / "a" / "adapter_model.safetensors")
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(axes.evaluate(expr, source.read, {})).view("<f4").copy())
        for name, expr in written.tensors
    }
    (tmp_path / "b").mkdir()
    save_file(tensors, tmp_path / "b" / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(written.config))
    loaded = peft.PeftModel.from_pretrained(network("Qwen3Moe"), tmp_path / "b").merge_and_unload().state_dict()
    whole, before = model.merge_and_unload().state_dict(), network("Qwen3Moe").state_dict()
    for key, value in loaded.items():
        wanted = whole[key].clone()
        if "experts" in key:
            wanted[2] = before[key][2]
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=1e-6)


def flipped(tmp_path: Path, targets: list[str]) -> tuple[Content, Adapter]:
    """Return a file in the form of peft 0.18 (in and out of every expert exchanged), and what it means."""
    adapted("Mixtral", tmp_path / "new", target_parameters=targets)
    tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
    turned = {}
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        by_expert = b.reshape(b.shape[0], 2, 3).permute(2, 1, 0).reshape(6, b.shape[0])
        turned[name] = by_expert.contiguous()
        turned[name.replace("lora_A", "lora_B")] = (
            a.reshape(3, 2, a.shape[1]).permute(2, 1, 0).reshape(-1, 6).contiguous()
        )
    (tmp_path / "old").mkdir()
    save_file(turned, tmp_path / "old" / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "old" / "adapter_config.json").write_text((tmp_path / "new" / "adapter_config.json").read_text())
    return content(tmp_path / "old", peft_version="0.18.1"), PEFT.parse(content(tmp_path / "new"))


@pytest.mark.parametrize("version", ["0.18.1", None, "0.21.2"])
def test_two_parameters_show_which_way_old_files_lie(version: str | None, tmp_path: Path) -> None:
    old, new = flipped(tmp_path, BOTH)
    read = PEFT.parse(Content(old.specs, {}, {**(old.config or {}), "peft_version": version}, Facts(), ""))
    made, wanted = deltas(read, tmp_path / "old"), deltas(new, tmp_path / "new")
    assert made.keys() == wanted.keys()
    for path, delta in made.items():
        np.testing.assert_allclose(delta, wanted[path], atol=1e-12)


def test_one_parameter_of_an_old_file_needs_to_be_told(tmp_path: Path) -> None:
    from lorabridge.dialects.adapter import Fact

    old, new = flipped(tmp_path, BOTH[:1])
    with pytest.raises(MappingError) as error:
        PEFT.parse(old)
    assert "--fan-in-fan-out" in error.value.text()
    stated = Facts((Fact("*experts*", "fan_in_fan_out", False),))
    made = deltas(PEFT.parse(Content(old.specs, {}, old.config, stated, "")), tmp_path / "old")
    for path, delta in deltas(new, tmp_path / "new").items():
        np.testing.assert_allclose(made[path], delta, atol=1e-12)
    config = {key: value for key, value in (old.config or {}).items() if key != "peft_version"}
    with pytest.raises(MappingError) as error:
        PEFT.parse(Content(old.specs, {}, config, stated, ""))
    assert "add peft_version to adapter_config.json" in error.value.text()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (
            {"target_parameters": ["mlp.experts.down_proj"]},
            "factors of 2 parameters, but target_parameters names down_proj",
        ),
        ({"target_parameters": ["mlp.experts.a", "mlp.experts.b"]}, "the order of its parameters a, b is not known"),
        ({"r": 4}, "are no stacks of rank 4"),
        ({"target_parameters": None}, "factors of 2 parameters, but target_parameters names none"),
    ],
)
def test_what_does_not_say_its_parameters_is_refused(fields: dict[str, object], problem: str, tmp_path: Path) -> None:
    adapted("Mixtral", tmp_path, target_parameters=BOTH)
    with pytest.raises(MappingError) as error:
        PEFT.parse(content(tmp_path, **fields))
    assert problem in error.value.text()


def test_a_router_s_own_matrix_is_an_ordinary_module(tmp_path: Path) -> None:
    adapted("Mixtral", tmp_path, target_parameters=["mlp.gate.weight"])
    modules = PEFT.parse(content(tmp_path)).modules
    assert [(m.path, m.stack) for m in modules] == [(f"model.layers.{i}.mlp.gate", None) for i in (0, 1)]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("Mixtral", ["q_proj", "v_proj", "w1", "w2", "w3"]),
        ("Qwen3Moe", "all-linear"),
        ("Qwen3Moe", ["k_proj", "gate_proj", "up_proj", "down_proj"]),
    ],
)
def test_targets_that_peft_turned_into_parameters_without_a_module(
    name: str, targets: list[str] | str, tmp_path: Path
) -> None:
    """peft rewrites names of single experts as ``gate_up_proj`` with twice the rank, beside ordinary layers."""
    model = adapted(name, tmp_path, target_modules=targets)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {"gate_up_proj", "down_proj"} <= set(config["target_parameters"])
    made = deltas(PEFT.parse(content(tmp_path)), tmp_path)
    before, after = network(name).state_dict(), model.merge_and_unload().state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    reached = set()
    for path, delta in made.items():
        parameter, _, number = path.rpartition(".")
        plain = f"{path}.weight" in after
        reached.add(f"{path}.weight" if plain else parameter)
        key = f"{path}.weight" if plain else parameter
        change = (after[key].double() - before[key].double()).numpy()
        np.testing.assert_allclose(delta, change if plain else change[int(number)], atol=1e-5)
    assert reached == changed
