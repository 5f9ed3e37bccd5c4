"""What the peft dialect writes, judged by peft itself: the same names, config and outputs, bit for bit."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_models import CASES, SIZE, Case, Dense, content, load, save, save_written, tensors_of

from lorabridge.axes import Read, read, zeros
from lorabridge.dialects.adapter import Adapter, Extra, Fact, Facts, LoraModule, Scaling, Term
from lorabridge.dialects.peft import PEFT
from lorabridge.dialects.peft_scaling import exact_alpha
from lorabridge.dialects.peft_write import of_part
from lorabridge.dtypes import BY_NAME
from lorabridge.errors import MappingError
from lorabridge.tensors import TensorSpec

F32 = BY_NAME["float32"]
SECOND_COPIES = {"head.modules_to_save.bias", "head.original_module.bias"}
"""What peft itself saves twice with bias="all" and modules_to_save; it loads nothing from them."""


def module(
    path: str, rank: int = 2, *, alpha: float = 4, rslora: bool = False, out: int = 24, **more: object
) -> LoraModule:
    a, b = (read(TensorSpec(f"{path}.{side}", F32, shape)) for side, shape in (("a", (rank, SIZE)), ("b", (out, rank))))
    return replace(LoraModule(path, "linear", out, (Term(a, b, 0, out),), Scaling(alpha, rank, rslora)), **more)


def factors(*modules: LoraModule) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    reads = [e for m in modules for term in m.terms for e in (term.a, term.b)]
    return {e.name: torch.randn(e.shape) for e in reads if isinstance(e, Read)}


@pytest.mark.parametrize("name", CASES)
def test_save_pretrained_comes_back_with_the_same_names_tensors_and_config(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.adapted()
    tensors, config = save(model, tmp_path / "peft")
    adapter = PEFT.parse(content(tensors, config))
    written = PEFT.write(adapter, Facts())
    expected = {n: t for n, t in tensors.items() if n.removeprefix("base_model.model.") not in SECOND_COPIES}
    assert [n for n, _ in written.tensors] == sorted(expected)
    assert all(isinstance(expr, Read) and expr.name == n for n, expr in written.tensors)
    assert written.config == config
    assert written.notes == ()
    assert PEFT.parse(content(expected, config)) == replace(adapter, left_out=())
    save_written(written, tensors, tmp_path / "ours")
    assert torch.equal(case.output(load(case, tmp_path / "ours")), case.output(model))


@pytest.mark.parametrize("name", CASES)
def test_raw_state_dict_becomes_an_adapter_that_peft_loads(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.adapted()
    _, config = save(model, tmp_path / "peft")
    raw = model.state_dict()
    adapter = PEFT.parse(content(raw, config))
    written = PEFT.write(adapter, Facts())
    used = {n for _, expr in written.tensors for n in [expr.name]}
    assert used | {n for n, _ in adapter.left_out} == set(raw)
    assert written.config == config
    again = PEFT.parse(content(tensors_of(written, raw), written.config))
    assert [(e.name, e.kind) for e in again.extras] == [(e.name, e.kind) for e in adapter.extras]
    assert [(m.path, m.kind, m.scaling) for m in again.modules] == [
        (m.path, m.kind, m.scaling) for m in adapter.modules
    ]
    save_written(written, raw, tmp_path / "ours")
    assert torch.equal(case.output(load(case, tmp_path / "ours")), case.output(model))


def test_a_config_is_made_for_an_adapter_that_never_had_one(tmp_path: Path) -> None:
    modules = (module("layers.0.q"), module("layers.1.q", 3, alpha=6), module("layers.1.k", 3, alpha=1, out=SIZE))
    k = modules[2].terms[0]
    modules = (*modules[:2], replace(modules[2], terms=(replace(k, a=read(TensorSpec("layers.1.k.a", F32, (3, 24)))),)))
    written = PEFT.write(Adapter(modules), Facts())
    tensors = factors(*modules)
    save_written(written, tensors, tmp_path)
    loaded = load(CASES["linear"], tmp_path)
    layers = loaded.base_model.model.layers
    for path, scaling in (((0, "q"), 2.0), ((1, "q"), 2.0), ((1, "k"), 1 / 3)):
        layer = layers[path[0]][path[1]]
        assert layer.scaling["default"] == scaling
        assert torch.equal(layer.lora_B["default"].weight, tensors[f"layers.{path[0]}.{path[1]}.b"])
    assert not hasattr(layers[0]["k"], "lora_A")
    assert written.config["target_modules"] == ["layers.0.q", "layers.1.k", "layers.1.q"]


paths = st.lists(
    st.lists(st.sampled_from(["a", "b", "q", "a.b", "x0", "q-1", "7"]), min_size=1, max_size=4).map(".".join),
    min_size=1, max_size=8, unique=True,
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(paths, st.data())
def test_patterns_give_every_module_its_rank_and_scaling_in_peft(names: list[str], data: st.DataObject) -> None:
    from peft.utils.other import get_pattern_key

    ranks = data.draw(st.lists(st.integers(1, 3), min_size=len(names), max_size=len(names)))
    alphas = data.draw(st.lists(st.sampled_from([1, 2, 7.3]), min_size=len(names), max_size=len(names)))
    carried = data.draw(
        st.sampled_from(
            [{}, {"r": 2, "lora_alpha": 7.3, "rank_pattern": {"b": 3, "a": 1}, "alpha_pattern": {".*q": 1}}]
        )
    )
    modules = tuple(module(p, r, alpha=a) for p, r, a in zip(names, ranks, alphas, strict=True))
    config = PEFT.write(Adapter(modules, config=carried), Facts()).config
    config = json.loads(json.dumps(config, sort_keys=True))
    for path, rank, alpha in zip(names, ranks, alphas, strict=True):
        r = config["rank_pattern"].get(get_pattern_key(config["rank_pattern"].keys(), path), config["r"])
        a = config["alpha_pattern"].get(get_pattern_key(config["alpha_pattern"].keys(), path), config["lora_alpha"])
        assert (r, a) == (rank, alpha)


def test_patterns_whose_order_sorting_would_change_are_rewritten(tmp_path: Path) -> None:
    unsorted = {"layers.0.q": 64, ".*q": 4}  # sorted, '.*q' comes first and wins
    tensors = {
        f"base_model.model.layers.{i}.q.lora_{s}.weight": torch.randn(shape)
        for i in (0, 1) for s, shape in (("A", (2, SIZE)), ("B", (24, 2)))
    }  # fmt: skip
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q"], "alpha_pattern": unsorted}
    adapter = PEFT.parse(content(tensors, config))
    assert [m.scaling.alpha for m in adapter.modules] == [64, 4]
    assert any("different values" in warning for warning in adapter.warnings)
    written = PEFT.write(adapter, Facts())
    assert any("rewritten" in note for note in written.notes)
    save_written(written, tensors, tmp_path)
    layers = load(CASES["linear"], tmp_path).base_model.model.layers
    assert [layer["q"].scaling["default"] for layer in layers] == [32.0, 2.0]


def test_several_terms_become_one_exact_pair(tmp_path: Path) -> None:
    parts = [module(f"part{i}", 2, out=8, alpha=2) for i in (0, 1)]
    first, second = (p.terms[0] for p in parts)
    fused = replace(
        module("layers.0.q", alpha=2),
        terms=(replace(first, start=0, stop=8), replace(second, start=16, stop=24)),
    )
    tensors = factors(*parts)
    written = PEFT.write(Adapter((fused,)), Facts())
    assert (written.config["r"], written.config["lora_alpha"]) == (4, 4)
    assert "rank 4" in written.notes[0]
    made = tensors_of(written, tensors)
    a, b = (made[f"base_model.model.layers.0.q.lora_{side}.weight"] for side in "AB")
    delta = torch.zeros(24, SIZE)
    delta[:8] = tensors["part0.b"] @ tensors["part0.a"]
    delta[16:] = tensors["part1.b"] @ tensors["part1.a"]
    assert torch.equal((b @ a)[8:16], delta[8:16])
    assert torch.allclose(b @ a, delta, atol=1e-6)
    save_written(written, tensors, tmp_path)
    assert load(CASES["linear"], tmp_path).base_model.model.layers[0]["q"].scaling["default"] == 1.0


def test_growing_the_rank_is_refused_where_the_initialisation_depends_on_it() -> None:
    fused = module("layers.0.q")
    term = fused.terms[0]
    fused = replace(fused, out=48, terms=(term, replace(term, start=24, stop=48)))
    with pytest.raises(MappingError, match="pissa"):
        PEFT.write(Adapter((fused,), config={"init_lora_weights": "pissa"}), Facts())


def test_mixed_rank_stabilised_scaling_is_exact_or_refused(tmp_path: Path) -> None:
    modules = (module("layers.0.q", 4, alpha=3, rslora=True), module("layers.1.q", 4, alpha=5))
    written = PEFT.write(Adapter(modules), Facts())
    save_written(written, factors(*modules), tmp_path)
    layers = load(CASES["linear"], tmp_path).base_model.model.layers
    assert [layer["q"].scaling["default"] for layer in layers] == [1.5, 1.25]
    odd = (module("a", 3, alpha=13, rslora=True), module("b", 3, alpha=10.3))
    with pytest.raises(MappingError, match="use_rslora is one switch"):
        PEFT.write(Adapter(odd), Facts())


@settings(deadline=None, max_examples=200)
@given(st.floats(1e-6, 1e6), st.integers(1, 300), st.booleans(), st.booleans())
def test_alpha_of_another_form_gives_the_same_double_or_none(a: float, rank: int, was: bool, becomes: bool) -> None:
    scaling = module("a", rank, alpha=a, rslora=was).scaling
    alpha = exact_alpha(module("a", rank, alpha=a, rslora=was), becomes)
    if alpha is None:
        assert was != becomes
    else:
        assert alpha / (math.sqrt(rank) if becomes else rank) == scaling.value


def test_one_switch_for_all_modules_is_refused_or_filled_with_zeros() -> None:
    with_norm = replace(module("a"), magnitude=zeros(F32, (24,)))
    with pytest.raises(MappingError, match="DoRA"):
        PEFT.write(Adapter((with_norm, module("b"))), Facts())
    with_bias = replace(module("a"), lora_bias=read(TensorSpec("bias", F32, (24,))))
    written = PEFT.write(Adapter((with_bias, module("b"))), Facts())
    assert dict(written.tensors)["base_model.model.b.lora_B.bias"] == zeros(F32, (24,))
    assert written.config["lora_bias"] is True
    assert written.notes == ("b: lora_B got a bias of zeros",)


def test_what_peft_cannot_say_is_refused_by_name() -> None:
    attention = module("mha", out=48, weight="in_proj_weight")
    out = module("mha.out_proj", out=SIZE, alpha=99)
    tokens = Extra("emb", "weight", zeros(F32, (2, SIZE)), "trainable_tokens")
    for adapter, words in (
        (Adapter((attention,)), "out_proj"),
        (Adapter((attention, out)), "one rank and one scaling"),
        (Adapter((module("x", weight="gate_up_proj"),)), "gate_up_proj"),
        (Adapter((module("x"), module("x"))), "2 times"),
        (Adapter((module(""),)), "the model itself"),
        (Adapter((module("x"),), (tokens,)), "does not say which"),
    ):
        with pytest.raises(MappingError, match=words):
            PEFT.write(adapter, Facts())


def test_bias_and_saved_modules_without_a_config_set_its_fields(tmp_path: Path) -> None:
    tensors = factors(module("layers.0.q")) | {
        "k": torch.randn(SIZE), "q": torch.randn(24), "w": torch.randn(3, SIZE), "b": torch.randn(3),
    }  # fmt: skip

    def extra(path: str, parameter: str, name: str, kind: str) -> Extra:
        return Extra(path, parameter, read(TensorSpec(name, F32, tuple(tensors[name].shape))), kind)

    only_lora = Adapter((module("layers.0.q"),), (extra("layers.0.q", "bias", "q", "bias"),))
    assert PEFT.write(only_lora, Facts()).config["bias"] == "lora_only"
    extras = (
        extra("layers.0.q", "bias", "q", "bias"), extra("layers.0.k", "bias", "k", "bias"),
        extra("head", "weight", "w", "modules_to_save"), extra("head", "bias", "b", "modules_to_save"),
    )  # fmt: skip
    written = PEFT.write(Adapter((module("layers.0.q"),), extras), Facts())
    assert (written.config["bias"], written.config["modules_to_save"]) == ("all", ["head"])
    save_written(written, tensors, tmp_path)
    model = load(CASES["linear"], tmp_path).base_model.model
    assert torch.equal(model.layers[0]["q"].base_layer.bias, tensors["q"])
    assert torch.equal(model.layers[0]["k"].bias, tensors["k"])
    assert torch.equal(model.head.modules_to_save["default"].weight, tensors["w"])


def test_targets_that_no_longer_fit_are_replaced_by_full_paths(tmp_path: Path) -> None:
    case = Case(Dense, {"r": 4, "target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"})
    tensors, config = save(case.adapted(), tmp_path)
    adapter = PEFT.parse(content(tensors, config))
    moved = replace(adapter, modules=tuple(replace(m, path="layers.0.k") for m in adapter.modules))
    written = PEFT.write(moved, Facts())
    assert written.config["target_modules"] == ["layers.0.k"]
    assert written.config["layers_to_transform"] is None
    assert written.config["lora_dropout"] == config["lora_dropout"]


def test_a_higher_rank_is_padded_without_changing_outputs(tmp_path: Path) -> None:
    case = CASES["grouped conv"]
    model = case.adapted()
    tensors, config = save(model, tmp_path / "peft")
    adapter = PEFT.parse(content(tensors, config))
    written = PEFT.write(adapter, Facts((Fact("*", "rank", 8),)))
    assert (written.config["r"], written.config["lora_alpha"]) == (8, 16)
    save_written(written, tensors, tmp_path / "ours")
    assert torch.allclose(case.output(load(case, tmp_path / "ours")), case.output(model), atol=1e-6)
    assert PEFT.write(adapter, Facts((Fact("*", "rank", 2),))).config == config


def test_two_tensors_for_one_name_are_refused() -> None:
    both = [Extra("head", "weight", zeros(F32, (3, SIZE)), kind) for kind in ("base", "modules_to_save")]
    with pytest.raises(MappingError, match="two tensors each"):
        PEFT.write(Adapter((module("a"),), tuple(both)), Facts())


@pytest.mark.parametrize("name", ["bert", "transformed layers", "trainable tokens", "modules_to_save", "regex target"])
def test_a_part_of_an_adapter_loads_without_the_rest(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    tensors, config = save(case.adapted(), tmp_path / "peft")
    adapter = PEFT.parse(content(tensors, config))
    part = of_part(replace(adapter, modules=adapter.modules[-1:], extras=()))
    written = PEFT.write(part, Facts())
    save_written(written, tensors, tmp_path / "ours")
    loaded = load(case, tmp_path / "ours")
    wrapped = [path for path, layer in loaded.named_modules() if hasattr(layer, "lora_A")]
    assert wrapped == [f"base_model.model.{adapter.modules[-1].path}"]
