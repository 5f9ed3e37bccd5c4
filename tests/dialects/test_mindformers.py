"""MindFormers' names, configs and target patterns, on small tensors and on the files that MindFormers wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from bare import content, evaluated, facts, written
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge import axes
from lorabridge.conversion.repository import open_input
from lorabridge.dialects import by_name, detect
from lorabridge.dialects.adapter import Adapter, Content, Extra, LoraModule, Scaling, Term
from lorabridge.dialects.mindformers_config import read_config
from lorabridge.dialects.mindformers_targets import leaf_pattern, number_pattern, path_pattern, selects
from lorabridge.dtypes import BY_NAME
from lorabridge.errors import InputError, MappingError, UsageError
from lorabridge.tensors import TensorSpec

FILES = Path(__file__).parent / "mindformers_files"
STEMS = {
    "tk": ("tk_delta_lora_a", "tk_delta_lora_b"),
    "mindpet": ("mindpet_delta_lora_a", "mindpet_delta_lora_b"),
    "mcore": ("lora_A.weight", "lora_B.weight"),
    "pynative": ("lora_a", "lora_b"),
    "slora": ("lora_a", "lora_b"),
}
PATHS = {
    "tk": "h.0.dense1", "mindpet": "h.0.dense1", "mcore": "decoder.layers.0.mlp.linear_fc1",
    "pynative": "decoder.layers.0.mlp.linear_fc1", "slora": "model.layers.0.attention.wq",
}  # fmt: skip


def file_of(dialect: str, path: str, rank: int = 2) -> dict[str, torch.Tensor]:
    a, b = STEMS[dialect]
    return {f"{path}.{a}": torch.randn(rank, 5), f"{path}.{b}": torch.randn(6, rank)}


def module(path: str, tensors: dict[str, torch.Tensor], alpha: float = 4.0, rank: int = 2, **more) -> LoraModule:
    made = {f"{path}.a": torch.randn(rank, 5), f"{path}.b": torch.randn(6, rank)}
    tensors |= made
    a, b = (axes.read(TensorSpec(n, BY_NAME["float32"], tuple(t.shape))) for n, t in made.items())
    return LoraModule(path, more.pop("kind", "linear"), 6, (Term(a, b, 0, 6),), Scaling(alpha, rank), **more)


@pytest.mark.parametrize("dialect", STEMS)
def test_each_dialect_claims_its_names_and_writes_them_back(dialect: str) -> None:
    file = file_of(dialect, PATHS[dialect])
    seen = content(file, ("alpha", 4), container="mindspore")
    assert [name for name, _ in detect(seen)] == [dialect]
    adapter = by_name(dialect).parse(seen)
    assert [(m.path, m.kind, m.scaling) for m in adapter.modules] == [(PATHS[dialect], "linear", Scaling(4.0, 2))]
    tensors, out = written(by_name(dialect), adapter, file)
    assert {n: t.tolist() for n, t in tensors.items()} == {n: t.tolist() for n, t in file.items()}
    assert (out.facts.get(PATHS[dialect], "rank"), out.facts.get(PATHS[dialect], "alpha")) == (2, 4)


def test_the_container_tells_mcore_from_peft_and_both_say_why() -> None:
    bare = file_of("mcore", "decoder.layers.0.mlp.linear_fc1")
    assert detect(content(bare, container="mindspore")) == [
        ("mcore", "1 parameter such as decoder.layers.0.mlp.linear_fc1.lora_A.weight in a MindSpore file")
    ]
    assert [n for n, _ in detect(content(bare, container="safetensors", format="ms"))] == ["mcore"]
    for container in ("torch", "safetensors"):
        ((name, why),) = detect(content(bare, container=container, format="pt"))
        assert (name, "as peft does" in why) == ("peft", True)


def test_llama_cells_are_served_and_others_are_pynative() -> None:
    for path, dialect in (
        ("model.layers.0.feed_forward.w_gate_hidden", "slora"),
        ("lm_head", "slora"),
        ("output_layer", "pynative"),
        ("decoder.layers.1.self_attention.linear_qkv", "pynative"),
    ):
        seen = content(file_of("slora", path), container="safetensors", format="ms")
        assert [name for name, _ in detect(seen)] == [dialect]
        other = content(file_of("slora", path), container="safetensors", format="mlx")
        assert not {"slora", "pynative"} & {name for name, _ in detect(other)}


@pytest.mark.parametrize(
    ("folder", "file", "dialect", "paths"),
    [
        ("llama", "adapter.ckpt", "mindpet", "model.layers.{}.attention.wq model.layers.{}.attention.wv"
                                             " model.layers.{}.feed_forward.w2"),
        ("llama_concat", "adapter.ckpt", "mindpet", "model.layers.{}.attention.w_qkv model.layers.{}.attention.wo"
                                                    " model.layers.{}.feed_forward.w_gate_hidden"),
        ("qwen3", "adapter.ckpt", "mcore", "decoder.layers.{}.self_attention.linear_qkv"
                                           " decoder.layers.{}.self_attention.linear_proj"
                                           " decoder.layers.{}.mlp.linear_fc1"),
        ("qwen3", "adapter.safetensors", "mcore", "decoder.layers.{}.self_attention.linear_qkv"
                                                  " decoder.layers.{}.self_attention.linear_proj"
                                                  " decoder.layers.{}.mlp.linear_fc1"),
    ],
)  # fmt: skip
def test_files_of_mindformers_are_read_with_the_config_beside_them(folder, file, dialect, paths) -> None:
    source = open_input(FILES / folder / file)
    try:
        seen = source.content()
        assert [name for name, _ in detect(seen)] == [dialect]
        adapter = by_name(dialect).parse(seen)
    finally:
        source.source.close()
    expected = {path.format(layer) for path in paths.split() for layer in range(2)}
    assert {module.path for module in adapter.modules} == expected
    assert {module.scaling for module in adapter.modules} == {Scaling(8.0, 4)}
    assert adapter.config == {"lora_dropout": 0.01}
    assert not adapter.warnings


def test_a_network_that_predicts_several_tokens_has_a_second_head_and_running_state() -> None:
    source = open_input(FILES / "deepseek_v3" / "whole.ckpt")
    try:
        adapter = by_name("mcore").parse(source.content())
    finally:
        source.source.close()
    paths = {module.path for module in adapter.modules}
    assert {"output_layer", "mtp.output_layer"} <= paths
    left = dict(adapter.left_out)
    assert left["decoder.layers.1.mlp.router.fi_accu"] == "running state of the network"
    assert {name.rpartition(".")[2] for name in left} == {"fi_accu", "expert_load"}
    assert {extra.kind for extra in adapter.extras} == {"base"}
    assert "decoder.layers.1.mlp.router.expert_bias" in {extra.name for extra in adapter.extras}


CONFIGS = {
    "adapter_config.json": {"r": 2, "lora_alpha": 6, "peft_type": "LORA", "target_modules": [".*dense1"]},
    "pet_config": {"model": {"model_config": {"pet_config": {"pet_type": "lora", "lora_rank": 2, "lora_alpha": 6,
                                                             "target_modules": ".*dense1|.*dense3"}}}},
    "lora_config": {"lora_config": {"lora_rank": 2, "lora_alpha": 6, "target_modules": "dense1"}},
    "mindformers_adapter_config.json": {"format": "mindformers_pynative_lora_adapter_v1",
                                        "lora_config": {"lora_rank": 2, "lora_alpha": 6, "target_modules": "dense"}},
}  # fmt: skip


def with_config(file, config, *rows) -> Content:
    seen = content(file, *rows, container="mindspore")
    return Content(seen.specs, seen.metadata, config, seen.facts, seen.path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_config_gives_rank_and_alpha(kind: str) -> None:
    found = read_config(CONFIGS[kind])
    assert found is not None
    assert (found.name, found.rank, found.alpha) == (kind, 2, 6)
    adapter = by_name("mindpet").parse(with_config(file_of("mindpet", "h.0.dense1"), CONFIGS[kind]))
    assert adapter.modules[0].scaling == Scaling(6.0, 2)
    wrong = file_of("mindpet", "h.0.dense1", rank=3)
    with pytest.raises(MappingError, match="does not belong to this file: it says rank 2") as caught:
        by_name("mindpet").parse(with_config(wrong, CONFIGS[kind]))
    assert "--config" in caught.value.hint
    aside = by_name("mindpet").parse(with_config(wrong, CONFIGS[kind], ("alpha", 9)))
    assert aside.modules[0].scaling == Scaling(9.0, 3)
    assert aside.warnings == (f"{kind} is left aside: it says rank 2, and h.0.dense1 has rank 3",)


def test_a_flag_that_differs_from_the_config_is_reported() -> None:
    seen = with_config(file_of("mindpet", "h.0.dense1"), CONFIGS["pet_config"], ("alpha", 9))
    adapter = by_name("mindpet").parse(seen)
    assert adapter.modules[0].scaling.alpha == 6
    assert adapter.warnings == ("the source has alpha 6, as pet_config says, not 9",)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}, "do not select h.0.dense1"),
        ({"r": 2, "lora_alpha": 6, "alpha_pattern": {"x": 3}}, "it sets alpha_pattern"),
        ({"r": 2, "lora_alpha": 6, "use_rslora": True}, "it sets use_rslora"),
    ],
)
def test_a_peft_config_beside_is_not_taken_for_mindformers(config, why) -> None:
    with pytest.raises(MappingError, match=re.escape(why)):
        by_name("mindpet").parse(with_config(file_of("mindpet", "h.0.dense1"), config))


def test_yaml_without_alpha_means_mindformers_default_and_other_algorithms_are_refused() -> None:
    found = read_config({"pet_config": {"pet_type": "lora", "lora_rank": 8}})
    assert found is not None
    assert found.alpha == 16
    with pytest.raises(MappingError, match="pet_type 'ptuning2', which is not LoRA"):
        read_config({"pet_config": {"pet_type": "ptuning2"}})
    with pytest.raises(MappingError, match="no positive integer"):
        read_config({"pet_config": {"lora_rank": "8"}})


def test_yaml_is_read_by_flag_and_from_the_directory(tmp_path: Path) -> None:
    torch.save(file_of("mindpet", "h.0.dense1"), tmp_path / "adapter_model.bin")
    run = tmp_path / "run_llama.yaml"
    run.write_text("model:\n  model_config:\n    pet_config:\n      pet_type: lora\n      lora_rank: 2\n"
                   "      lora_alpha: 6\n      target_modules: '.*dense1'\nother: &a [1, 2]\n")  # fmt: skip
    for source in (
        open_input(tmp_path),
        open_input(tmp_path / "adapter_model.bin", config=run),
    ):
        source.source.close()
        assert source.adapter_config == {
            "pet_config": {"pet_type": "lora", "lora_rank": 2, "lora_alpha": 6, "target_modules": ".*dense1"}
        }
    (tmp_path / "second.yml").write_text("lora_config: {lora_rank: 2}\n")
    with pytest.raises(UsageError, match="several yaml files"):
        open_input(tmp_path)
    (tmp_path / "second.yml").write_text("a: [1\n")
    with pytest.raises(InputError, match="not valid yaml"):
        open_input(tmp_path, config=tmp_path / "second.yml")
    (tmp_path / "second.yml").write_text("a: 1\n")
    with pytest.raises(InputError, match="describes no adapter"):
        open_input(tmp_path, config=tmp_path / "second.yml")


def test_missing_pyyaml_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    torch.save(file_of("mindpet", "h.0.dense1"), tmp_path / "a.bin")
    (tmp_path / "run.yaml").write_text("lora_config: {}\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(InputError, match="PyYAML") as caught:
        open_input(tmp_path / "a.bin", config=tmp_path / "run.yaml")
    assert "lorabridge[yaml]" in caught.value.hint


@settings(deadline=None, max_examples=60)
@given(st.sets(st.integers(0, 300), min_size=1, max_size=40))
def test_a_number_pattern_matches_exactly_its_numbers(numbers: set[int]) -> None:
    pattern = re.compile(number_pattern(numbers))
    assert {n for n in range(400) if pattern.fullmatch(str(n))} == numbers


NAMES = ("self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2", "mlp.shared_experts.linear_fc1")


@settings(deadline=None, max_examples=60)
@given(st.sets(st.tuples(st.integers(0, 12), st.sampled_from(NAMES)), min_size=1), st.booleans())
def test_a_path_pattern_selects_exactly_the_adapted_cells(cells, head: bool) -> None:
    every = [f"decoder.layers.{i}.{name}" for i in range(13) for name in NAMES]
    every += ["output_layer", "mtp.output_layer", "mtp.layers.0.transformer_layer.mlp.linear_fc1"]
    adapted = {f"decoder.layers.{i}.{name}" for i, name in cells} | ({"mtp.output_layer"} if head else set())
    pattern = path_pattern(sorted(adapted))
    for prefix in ("", "model."):  # MindFormers searches in the path below the class that holds the network
        assert {path for path in every if re.search(pattern, prefix + path)} == adapted
    assert {path for path in every if selects(pattern, path, search=True)} == adapted


def test_a_leaf_pattern_matches_whole_names_only() -> None:
    pattern = leaf_pattern(["model.layers.0.attention.wq", "model.layers.1.attention.wq", "model.layers.0.mlp.w1"])
    assert pattern == "wq$|w1$"
    assert [name for name in ("wq", "w1", "w12", "wqx", "xwq") if re.match(pattern, name)] == ["wq", "w1"]


def test_configs_for_graph_mode_are_those_that_mindformers_writes() -> None:
    """The same fields as LoraModel.save_pet_config wrote for the file in the repository."""
    tensors: dict[str, torch.Tensor] = {}
    adapter = Adapter((module("model.layers.0.attention.wq", tensors), module("model.layers.0.attention.wv", tensors)))
    for dialect, freeze in (("mindpet", False), ("tk", False), ("mcore", True)):
        out = by_name(dialect).write(adapter, facts())
        config = json.loads(out.files["adapter_config.json"])
        theirs = json.loads((FILES / "llama" / "adapter_config.json").read_text())
        assert list(config) == list(theirs)
        assert {k: type(v) for k, v in config.items()} == {k: type(v) for k, v in theirs.items()}
        assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4, ["wq$", "wv$"])
        text = out.files["pet_config.yaml"]
        assert ("freeze_exclude: ['*lora*']" in text) == freeze
        assert any("pet_config: {pet_type: lora, lora_rank: 2, lora_alpha: 4" in note for note in out.notes)


def test_the_yaml_snippets_are_yaml() -> None:
    import yaml

    tensors: dict[str, torch.Tensor] = {}
    adapter = Adapter((module("decoder.layers.0.mlp.it's", tensors), module("output_layer", tensors)))
    graph = yaml.safe_load(by_name("mcore").write(adapter, facts()).files["pet_config.yaml"])["pet_config"]
    assert graph["target_modules"] == "it's$|output_layer$"
    out = by_name("pynative").write(adapter, facts())
    told = yaml.safe_load(out.files["lora_config.yaml"])["lora_config"]
    assert json.loads(out.files["mindformers_adapter_config.json"])["lora_config"] == told
    line = next(note for note in out.notes if "lora_config:" in note).partition("at the top: ")[2]
    assert yaml.safe_load(line) == {"lora_config": told}


@pytest.mark.parametrize("dialect", ["mcore", "pynative", "slora"])
def test_alpha_becomes_an_integer_exactly_where_it_can(dialect: str) -> None:
    path = PATHS[dialect]
    tensors: dict[str, torch.Tensor] = {}
    adapter = Adapter((module(path, tensors, alpha=3.5, rank=2),))
    made, out = written(by_name(dialect), adapter, tensors)
    assert out.facts.get(path, "alpha") == 7
    assert torch.equal(made[f"{path}.{STEMS[dialect][1]}"], tensors[f"{path}.b"] / 2)
    odd = Adapter((module(path, tensors, alpha=0.1, rank=2),))
    made, out = written(by_name(dialect), odd, tensors)
    assert out.facts.get(path, "alpha") == 2
    torch.testing.assert_close(made[f"{path}.{STEMS[dialect][1]}"], tensors[f"{path}.b"] * 0.05)
    assert any("rounded once" in note for note in out.notes)
    with pytest.raises(MappingError, match="no positive integer"):
        by_name(dialect).write(adapter, facts(("alpha", 2.5)))


@pytest.mark.parametrize("dialect", ["mcore", "pynative", "slora"])
def test_ranks_are_padded_with_zeros(dialect: str) -> None:
    one, two = (PATHS[dialect], PATHS[dialect].replace("0", "1"))
    tensors: dict[str, torch.Tensor] = {}
    adapter = Adapter((module(one, tensors, 8.0, 4), module(two, tensors, 4.0, 2)))
    made, out = written(by_name(dialect), adapter, tensors)
    a, b = STEMS[dialect]
    assert (out.facts.get(two, "rank"), out.facts.get(two, "alpha")) == (4, 8)
    assert torch.equal(made[f"{two}.{a}"][:2], tensors[f"{two}.a"])
    assert not made[f"{two}.{a}"][2:].any()
    assert not made[f"{two}.{b}"][:, 2:].any()


def test_what_has_no_place_is_named_with_the_cure() -> None:
    tensors: dict[str, torch.Tensor] = {}
    vector = axes.read(TensorSpec("v", BY_NAME["float32"], (6,)))
    odd = (
        module("dora", tensors, magnitude=vector), module("biased", tensors, lora_bias=vector),
        module("embed_tokens", tensors, kind="embedding"), module("conv", tensors, kind="conv2d"),
    )  # fmt: skip
    for dialect in ("mcore", "pynative", "mindpet", "tk"):
        with pytest.raises(MappingError) as caught:
            by_name(dialect).write(Adapter(odd), facts())
        named = {place.partition(":")[0] for place in caught.value.where}
        assert named == {"dora", "biased", "embed_tokens", "conv"}
        assert "merge" in caught.value.hint


def test_slora_serves_llama_cells_and_factors_only() -> None:
    tensors: dict[str, torch.Tensor] = {}
    vector = axes.read(TensorSpec("v", BY_NAME["float32"], (6,)))
    adapter = Adapter(
        (module("model.layers.0.self_attn.q_proj", tensors),),
        (Extra("lm_head", "weight", vector, "modules_to_save"),),
    )
    with pytest.raises(MappingError) as caught:
        by_name("slora").write(adapter, facts())
    assert {place.partition(":")[0] for place in caught.value.where} == {
        "model.layers.0.self_attn.q_proj",
        "lm_head.weight",
    }
    assert "--family llama" in caught.value.hint
    added = {**file_of("slora", "lm_head"), "lm_head.lora_embedding": torch.zeros(2, 5)}
    with pytest.raises(MappingError, match="rows of added tokens"):
        by_name("slora").parse(content(added, ("alpha", 1)))


def test_slora_embeddings_and_rank_stabilised_scaling_are_read() -> None:
    file = {**file_of("slora", "model.tok_embeddings"), **file_of("slora", "lm_head")}
    config = {"r": 2, "lora_alpha": 4, "use_rslora": True, "target_modules": ["embed_tokens", "lm_head"]}
    adapter = by_name("slora").parse(with_config(file, config))
    assert {m.path: m.kind for m in adapter.modules} == {"model.tok_embeddings": "embedding", "lm_head": "linear"}
    assert {m.scaling for m in adapter.modules} == {Scaling(4.0, 2, rslora=True)}
    tensors, out = written(by_name("slora"), adapter, file)
    told = json.loads(out.files["adapter_config.json"])
    assert told["use_rslora"] is False
    assert isinstance(told["lora_alpha"], int)
    assert isinstance(told["lora_dropout"], float)
    assert sorted(told["target_modules"]) == ["embed_tokens", "lm_head"]
    torch.testing.assert_close(tensors["lm_head.lora_b"] * told["lora_alpha"] / 2, file["lm_head.lora_b"] * 4 / 2**0.5)


def test_notes_say_what_the_pattern_of_graph_mode_cannot() -> None:
    tensors: dict[str, torch.Tensor] = {}
    uneven = (
        module("model.layers.0.a.wq", tensors),
        module("model.layers.1.a.wv", tensors),
        module("lm_head", tensors),
    )
    notes = " ".join(by_name("mindpet").write(Adapter(uneven), facts()).notes)
    assert "inside 'model' only, so not lm_head" in notes
    assert "wq, wv in every layer" in notes
    hidden = (module("model.a.dense", tensors), module("model.b.dense.inner", tensors))
    notes = " ".join(by_name("mindpet").write(Adapter(hidden), facts()).notes)
    assert "'dense' hides model.b.dense.inner" in notes


def test_read_and_written_again_from_own_facts() -> None:
    tensors: dict[str, torch.Tensor] = {}
    for dialect in ("mcore", "pynative"):
        adapter = Adapter((module("a", tensors, 6.0, 3), module("b", tensors, 2.0, 1)))
        made, out = written(by_name(dialect), adapter, tensors)
        again = by_name(dialect).parse(Content(content(made).specs, {"container": "mindspore"}, None, out.facts, "f"))
        assert [m.scaling for m in again.modules] == [Scaling(6.0, 3)] * 2
        parts = evaluated([("a", again.modules[1].terms[0].a)], made)
        assert torch.equal(parts["a"][:1], tensors["b.a"])


def test_routed_experts_are_modules_and_go_back_into_their_tensors() -> None:
    source = open_input(FILES / "deepseek_v3_pynative")
    try:
        seen = source.content()
        assert [name for name, _ in detect(seen)] == ["pynative"]
        adapter = by_name("pynative").parse(seen)
        raw = {n: torch.from_numpy(source.source.read(n).view("float32").copy()) for n in source.source.specs}
    finally:
        source.source.close()
    expert = next(m for m in adapter.modules if m.path == "decoder.layers.1.mlp.experts.weight1.3")
    assert (expert.out, expert.scaling, expert.fan_in_fan_out) == (32, Scaling(8.0, 4), True)
    factors = evaluated([("a", expert.terms[0].a), ("b", expert.terms[0].b)], raw)
    stem = "decoder.layers.1.mlp.experts.weight1_lora_"
    assert torch.equal(factors["a"], raw[f"{stem}a"][3].T)
    assert torch.equal(factors["b"], raw[f"{stem}b"][3].T)
    tensors, out = written(by_name("pynative"), adapter, raw)
    assert {n: t.tolist() for n, t in tensors.items()} == {n: t.tolist() for n, t in raw.items()}
    pattern = json.loads(out.files["mindformers_adapter_config.json"])["lora_config"]["target_modules"]
    cells = [row.partition(":")[0] for row in json.loads((FILES / "deepseek_v3_pynative" / "cells.json").read_text())]
    selected = {cell.removeprefix("model.") for cell in cells if re.search(pattern, cell)}
    adapted = {name.rpartition(".")[0] for name in raw}
    assert selected == adapted
    for dialect in ("mcore", "mindpet", "slora"):
        with pytest.raises(MappingError, match=r"no LoRA for routed experts|have no place"):
            by_name(dialect).write(adapter, facts())


def test_experts_are_refused_with_every_place() -> None:
    lone = {"m.experts.weight1_lora_a": torch.zeros(2, 5, 3), "m.experts.weight1_lora_b": torch.zeros(2, 3, 6)}
    adapter = by_name("pynative").parse(content(lone, ("alpha", 3)))
    assert any(
        "m.experts.weight2: MindFormers adapts it" in n for n in by_name("pynative").write(adapter, facts()).notes
    )
    with pytest.raises(MappingError, match="alpha is not stored"):
        by_name("pynative").parse(content(lone))
    lone["m.experts.weight1_lora_b"] = torch.zeros(2, 4, 6)
    with pytest.raises(MappingError, match="shapes are not those"):
        by_name("pynative").parse(content(lone, ("alpha", 3)))
