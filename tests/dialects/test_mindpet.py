"""MindPet's names, one global rank and alpha, and what a LoRADense cannot hold."""

from __future__ import annotations

import pytest
import torch
from bare import content, evaluated, facts, written

from lorabridge import axes
from lorabridge.dialects import detect
from lorabridge.dialects.adapter import Adapter, Content, Extra, LoraModule, Scaling, Term
from lorabridge.dialects.mindpet import TK, Mindpet
from lorabridge.dtypes import BY_NAME
from lorabridge.errors import MappingError
from lorabridge.tensors import TensorSpec

MINDPET = Mindpet()


def pair(path, style="mindpet_delta_lora_", letters="ab", rank=2):
    """Two factors as a checkpoint names them."""
    dot = f"{path}." if path else ""
    return {f"{dot}{style}{letters[0]}": torch.randn(rank, 5), f"{dot}{style}{letters[1]}": torch.randn(6, rank)}


def module(path, tensors, alpha=4.0, rank=2, **more):
    """A module over fresh tensors."""
    made = {f"{path}.a": torch.randn(rank, 5), f"{path}.b": torch.randn(6, rank)}
    tensors |= made
    a, b = (axes.read(TensorSpec(n, BY_NAME["float32"], tuple(t.shape))) for n, t in made.items())
    return LoraModule(path, more.pop("kind", "linear"), 6, (Term(a, b, 0, 6),), Scaling(alpha, rank), **more)


@pytest.mark.parametrize("style", ["mindpet_delta_lora_", "tk_delta_lora_"])
@pytest.mark.parametrize("letters", ["ab", "AB"])
def test_every_spelling_is_read_and_the_current_one_written(style, letters):
    file = pair("h.0.dense1", style, letters)
    given = content(file, ("alpha", 16), container="mindspore")
    dialect = MINDPET if style.startswith("mindpet") else TK
    assert list(detect(given)) == [(dialect.name, f"2 parameters such as h.0.dense1.{style}{letters[0]}")]
    adapter = MINDPET.parse(given)
    assert adapter.modules[0].path == "h.0.dense1"
    assert adapter.modules[0].scaling == Scaling(16.0, 2)
    tensors, made = written(MINDPET, adapter, file)
    assert list(tensors) == ["h.0.dense1.mindpet_delta_lora_a", "h.0.dense1.mindpet_delta_lora_b"]
    assert all(torch.equal(x, y) for x, y in zip(tensors.values(), file.values(), strict=True))
    assert (made.facts.get("h.0.dense1", "alpha"), made.facts.get("h.0.dense1", "rank")) == (16, 2)


def test_a_root_layer_keeps_upper_case_names():
    file = pair("", letters="AB")
    adapter = MINDPET.parse(content(file, ("alpha", 16), container="mindspore"))
    tensors, _ = written(MINDPET, adapter, file)
    assert list(tensors) == ["mindpet_delta_lora_A", "mindpet_delta_lora_B"]


@pytest.mark.parametrize(
    "other", [pair("b", "tk_delta_lora_"), pair("b", letters="AB"), {"a.tk_delta_lora_a": torch.zeros(2, 5)}]
)
def test_mixed_spellings_are_refused(other):
    with pytest.raises(MappingError, match="two spellings"):
        MINDPET.parse(content({**pair("a"), **other}, ("alpha", 1), container="mindspore"))


def test_a_training_checkpoint_gives_its_factors_and_lists_the_rest():
    file = pair("q")
    for slot in ("moment1", "moment2"):
        file |= {f"{slot}.{name}": torch.zeros_like(t) for name, t in pair("q").items()}
    file |= {n: torch.zeros(1) for n in ("global_step", "learning_rate", "beta1_power", "beta2_power")}
    adapter = MINDPET.parse(content(file, ("alpha", 1), container="mindspore"))
    assert len(adapter.modules) == 1
    assert len(adapter.left_out) == 8
    assert dict(adapter.left_out)["moment1.q.mindpet_delta_lora_a"] == "optimizer state of q.mindpet_delta_lora_a"


def test_base_weights_are_never_merged_and_go_along():
    file = {**pair("q"), "q.weight": torch.randn(6, 5), "q.bias": torch.randn(6), "norm.gamma": torch.randn(5)}
    adapter = MINDPET.parse(content(file, ("alpha", 1), container="mindspore"))
    assert {e.name: e.kind for e in adapter.extras} == {"q.weight": "base", "q.bias": "base", "norm.gamma": "base"}
    tensors, _ = written(MINDPET, adapter, file)
    assert set(tensors) == set(file)


def test_alpha_is_asked_for():
    with pytest.raises(MappingError, match="alpha is not stored"):
        MINDPET.parse(content(pair("q"), container="mindspore"))


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"x.mindpet_delta_adapter.mindpet_delta_adapter_block.weight": torch.zeros(2)}, "another algorithm"),
        ({"y.mindpet_delta_lora_a": torch.zeros(4, 5), "y.mindpet_delta_lora_b": torch.zeros(6, 2)}, "LoRADense"),
        ({"y.mindpet_delta_lora_a": torch.zeros(4, 5)}, "lora_B is missing"),
    ],
)
def test_what_is_no_loradense_is_refused(extra, problem):
    with pytest.raises(MappingError) as caught:
        MINDPET.parse(content({**pair("q"), **extra}, ("alpha", 1), container="mindspore"))
    assert problem in str(caught.value)


def test_ranks_are_padded_and_scalings_shared_exactly():
    tensors: dict[str, torch.Tensor] = {}
    modules = (module("a", tensors, 16.0, 8), module("b", tensors, 8.0, 4), module("c", tensors, 8.0, 8))
    made, out = written(MINDPET, Adapter(modules), tensors)
    assert (out.facts.get("b", "rank"), out.facts.get("b", "alpha")) == (8, 16)
    assert {tuple(t.shape) for t in made.values()} == {(8, 5), (6, 8)}
    for old in modules:
        new = {x: made[f"{old.path}.mindpet_delta_lora_{x}"].double() for x in "ab"}
        was = {x: tensors[f"{old.path}.{x}"].double() for x in "ab"}
        torch.testing.assert_close(new["b"] @ new["a"] * 2.0, was["b"] @ was["a"] * old.scaling.value)
    assert any("power of two" in note for note in out.notes)


def test_the_users_rank_and_alpha_count():
    tensors: dict[str, torch.Tensor] = {}
    adapter = Adapter((module("a", tensors, 8.0, 4),))
    made, out = written(MINDPET, adapter, tensors, ("rank", 8), ("alpha", 8))
    assert (out.facts.get("a", "rank"), out.facts.get("a", "alpha")) == (8, 8)
    assert torch.equal(made["a.mindpet_delta_lora_b"][:, :4], tensors["a.b"] * 2)
    with pytest.raises(MappingError, match="does not fit rank 2"):
        MINDPET.write(adapter, facts(("rank", 2)))


def test_written_files_are_read_again_from_their_own_facts():
    tensors: dict[str, torch.Tensor] = {}
    adapter = Adapter((module("a", tensors, 6.0, 3), module("b", tensors, 2.0, 1)))
    made, out = written(MINDPET, adapter, tensors)
    specs = content(made).specs
    again = MINDPET.parse(Content(specs, {"container": "mindspore"}, None, out.facts, "file"))
    assert [m.scaling for m in again.modules] == [Scaling(6.0, 3)] * 2
    parts = evaluated([("a", again.modules[1].terms[0].a)], made)
    assert torch.equal(parts["a"][:1], tensors["b.a"])
    assert not parts["a"][1:].any()


def test_all_that_is_refused_is_named_at_once_with_the_cure():
    tensors: dict[str, torch.Tensor] = {}
    vector = axes.read(TensorSpec("v", BY_NAME["float32"], (6,)))
    odd = (
        module("dora", tensors, magnitude=vector), module("biased", tensors, lora_bias=vector),
        module("emb", tensors, kind="embedding"), module("conv", tensors, kind="conv2d"),
        module("mha", tensors, weight="in_proj_weight"),
    )  # fmt: skip
    with pytest.raises(MappingError) as caught:
        MINDPET.write(Adapter(odd, (Extra("emb", "trainable_tokens_delta", vector, "trainable_tokens"),)), facts())
    named = {place.partition(":")[0] for place in caught.value.where}
    assert named == {"dora", "biased", "emb", "conv", "mha", "emb.trainable_tokens_delta"}
    assert "merge_and_unload" in caught.value.hint
