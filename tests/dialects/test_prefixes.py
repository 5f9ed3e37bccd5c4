"""Names of peft files in every wrapper they are found in."""

from __future__ import annotations

import pytest

from lorabridge.dialects.prefixes import is_factor, recognise
from lorabridge.errors import MappingError

BARE = (
    "bert.layer.0.query.lora_A.weight", "bert.layer.0.query.lora_B.weight", "bert.layer.0.query.lora_B.bias",
    "bert.layer.0.query.lora_magnitude_vector", "bert.emb.lora_embedding_A", "bert.emb.lora_embedding_B",
    "classifier.weight",
)  # fmt: skip
NAMED = (
    "bert.layer.0.query.lora_A.{a}.weight", "bert.layer.0.query.lora_B.{a}.weight",
    "bert.layer.0.query.lora_B.{a}.bias", "bert.layer.0.query.lora_magnitude_vector.{a}.weight",
    "bert.emb.lora_embedding_A.{a}", "bert.emb.lora_embedding_B.{a}", "classifier.modules_to_save.{a}.weight",
)  # fmt: skip
PREFIXES = (
    "", "base_model.model.", "base_model.model.base_model.model.", "module.base_model.model.",
    "_orig_mod.base_model.model.", "module._orig_mod.base_model.model.", "_orig_mod.module.base_model.model.",
    "_fsdp_wrapped_module.base_model.model.", "base_model.model._fsdp_wrapped_module.",
    "_fsdp_wrapped_module.base_model.model._fsdp_wrapped_module.", "module.",
)  # fmt: skip


def read(names: tuple[str, ...]) -> set[tuple[str, str, str]]:
    return {(n.path, n.role, n.parameter) for n in recognise(names).names}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("adapter", ["", "default", "my-adapter", "weight"])
def test_every_prefix_and_adapter_name_leads_to_the_same_paths(prefix: str, adapter: str) -> None:
    names = [name.format(a=adapter) for name in NAMED] if adapter else list(BARE)
    expected = {
        ("bert.layer.0.query", "A", "weight"), ("bert.layer.0.query", "B", "weight"),
        ("bert.layer.0.query", "B", "bias"), ("bert.layer.0.query", "magnitude", "weight"),
        ("bert.emb", "embedding_A", "weight"), ("bert.emb", "embedding_B", "weight"),
        ("classifier", "saved" if adapter else "plain", "weight"),
    }  # fmt: skip
    assert read(tuple(prefix + name for name in names)) == expected
    assert recognise(prefix + name for name in names).adapter == adapter


def test_levels_that_fsdp_puts_inside_some_paths_are_removed_there() -> None:
    names = (
        "base_model.model.bert._fsdp_wrapped_module.layer.0._checkpoint_wrapped_module.query.lora_A.default.weight",
        "base_model.model.bert._fsdp_wrapped_module.layer.0.query.lora_B.default.weight",
    )
    assert {path for path, _, _ in read(names)} == {"bert.layer.0.query"}


def test_a_model_may_itself_have_a_part_called_module_or_base_model() -> None:
    inside = ("base_model.model.module.q.lora_A.weight", "base_model.model.module.q.lora_B.weight")
    assert {path for path, _, _ in read(inside)} == {"module.q"}
    some = ("module.q.lora_A.weight", "module.q.lora_B.weight", "head.weight")
    assert {path for path, _, _ in read(some)} == {"module.q", "head"}
    own = ("base_model.encoder.q.lora_A.weight", "base_model.encoder.q.lora_B.weight")
    assert {path for path, _, _ in read(own)} == {"base_model.encoder.q"}


def test_removing_module_from_names_without_a_prefix_is_said() -> None:
    found = recognise(["module.q.lora_A.weight", "module.q.lora_B.weight"])
    assert found.prefix == "module."
    assert "DataParallel" in found.warnings[0]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("base_model.model.q.lora_A.weight", "q.lora_B.weight"), "different prefixes"),
        (("base_model.model.base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"), "different prefix"),
        (("module.base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"), "different prefixes"),
        (("q.lora_A.one.weight", "q.lora_B.one.weight", "q.lora_A.two.weight"), "2 adapters: one, two"),
        (("q.lora_A.weight", "q.lora_B.default.weight"), r"2 adapters: \(no name\), default"),
        (("q.lora_A.a.weight", "head.modules_to_save.b.weight"), "2 adapters: a, b"),
        (("q.lora_A.weight", "k.lora_A.a.weight", "head.modules_to_save.a.weight"), r"2 adapters: \(no name\), a"),
        (("q.lora_A.weight", "_orig_mod.q.lora_A.weight"), "twice"),
        (("q.base_layer.weight", "_orig_mod.q.base_layer.weight", "q.lora_A.default.weight"), "twice"),
        (("base_model.model.q.lora_E", "base_model.model.q.lora_A"), "AdaLoRA"),
        (("base_model.model.q.hada_w1_a",), "LoHa"),
        (("base_model.model.q.ia3_l",), "IA3"),
        (("q..lora_A.weight",), "empty part"),
        (("",), "empty part"),
    ],
)  # fmt: skip
def test_what_is_ambiguous_or_of_another_kind_is_refused(names: tuple[str, ...], words: str) -> None:
    with pytest.raises(MappingError, match=words) as caught:
        recognise(names)
    assert caught.value.hint
    assert caught.value.where


def test_base_layers_are_removed_and_remembered() -> None:
    found = {n.name: n for n in recognise(["mha.base_layer.out_proj.lora_A.d.weight", "lin.base_layer.bias"]).names}
    factor, bias = found["mha.base_layer.out_proj.lora_A.d.weight"], found["lin.base_layer.bias"]
    assert (factor.path, factor.wrapped, factor.adapter) == ("mha.out_proj", True, "d")
    assert (bias.path, bias.role, bias.parameter, bias.wrapped) == ("lin", "plain", "bias", True)


def test_variant_tensors_lose_the_adapter_name_only_where_it_is_one() -> None:
    raw = recognise(["q.lora_A.d.weight", "q.lora_monteclora_sampler.d.std_prior", "q.lora_diag.d"]).names
    assert [n.parameter for n in raw] == ["weight", "lora_monteclora_sampler.std_prior", "lora_diag"]
    saved = recognise(["q.lora_A.weight", "q.lora_monteclora_sampler.std_prior", "q.lora_diag"]).names
    assert [n.parameter for n in saved] == ["weight", "lora_monteclora_sampler.std_prior", "lora_diag"]


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("q.lora_A.weight", True), ("q.lora_B.default.weight", True), ("q.lora_B.bias", True),
        ("emb.lora_embedding_A", True), ("emb.lora_embedding_B.default", True),
        ("q.lora_A", False), ("lora_A.weight", False), ("q.weight", False), ("q.lora_A.x.y.weight", False),
        ("q.mindpet_delta_lora_a", False), ("lora_A", False), ("q.lora_A.weights", False),
    ],
)  # fmt: skip
def test_only_peft_spelling_counts_as_a_factor(name: str, factor: bool) -> None:
    assert is_factor(name) is factor
