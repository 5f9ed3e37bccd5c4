"""The names of lorabridge's own MindSpore layers: everything peft can express is kept, with the facts beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bare import content, facts, written

from lorabridge import axes
from lorabridge.dialects import DIALECTS, by_name, detect
from lorabridge.dialects.adapter import Adapter, Content, Extra, LoraModule, Scaling, Term
from lorabridge.dialects.loralib_ms import LoralibMs
from lorabridge.dtypes import BY_NAME
from lorabridge.errors import MappingError, UsageError
from lorabridge.tensors import TensorSpec

MS = LoralibMs()
TENSORS: dict[str, torch.Tensor] = {}


def tensor(*shape):
    """Stand for a fresh random tensor."""
    name = f"t{len(TENSORS)}"
    TENSORS[name] = torch.randn(shape)
    return axes.read(TensorSpec(name, BY_NAME["float32"], shape))


def module(path, a, b, kind="linear", *, alpha=4.0, rank=2, rslora=False, **more):
    """Stand for a plain module."""
    out = b[0] // more["kernel_size"][0] if more.get("conv_form") == "loralib" else b[0]
    return LoraModule(path, kind, out, (Term(tensor(*a), tensor(*b), 0, out),), Scaling(alpha, rank, rslora), **more)


def everything():
    """Every kind of module that peft knows, on every adjustment."""
    blocks = tuple(Term(tensor(2, 5), tensor(3, 2), start, start + 3) for start in (0, 6))
    return [
        module("fc", (2, 5), (6, 2), fan_in_fan_out=True),
        module("rs", (2, 5), (6, 2), rslora=True),
        module("dora", (2, 5), (6, 2), magnitude=tensor(6), lora_bias=tensor(6)),
        module("emb", (2, 11), (5, 2), "embedding", magnitude=tensor(5)),
        module("c1", (2, 3, 4), (6, 2, 1), "conv1d", kernel_size=(4,)),
        module("c2", (4, 3, 3, 2), (6, 2, 1, 1), "conv2d", rank=4, kernel_size=(3, 2), groups=2),
        module(
            "c3", (2, 3, 1, 2, 3), (6, 2, 1, 1, 1), "conv3d", kernel_size=(1, 2, 3), magnitude=tensor(1, 6, 1, 1, 1)
        ),
        module("cl", (6, 9), (12, 6), "conv2d", kernel_size=(3, 3), conv_form="loralib"),
        module("mha", (2, 4), (12, 2), weight="in_proj_weight", magnitude=tensor(12)),
        LoraModule("qkv", "linear", 9, blocks, Scaling(3.0, 2)),
    ]


def read_again(made, tensors):
    """Parse what was written, from its own facts alone."""
    specs = content(tensors).specs
    return MS.parse(Content(specs, {"container": "mindspore"}, made.config, made.facts, "file"))


def strip(adapter):
    """What a module is, without where its values come from."""
    return {
        m.path: (m.kind, m.out, m.scaling, m.weight, m.conv_form, m.kernel_size, m.groups, m.fan_in_fan_out,
                 [(t.start, t.stop, t.a.shape, t.b.shape) for t in m.terms],
                 m.magnitude and m.magnitude.shape, m.lora_bias and m.lora_bias.shape)
        for m in adapter.modules
    }  # fmt: skip


def test_everything_is_written_and_read_again_from_its_own_facts():
    adapter = Adapter(
        tuple(everything()),
        (
            Extra("head", "weight", tensor(3, 4), "modules_to_save"),
            Extra("fc", "bias", tensor(6), "bias"),
            Extra("emb", "weight", tensor(2, 5), "trainable_tokens"),
        ),
        {"trainable_token_indices": {"emb": [3, 7]}},
    )
    tensors, made = written(MS, adapter, TENSORS)
    expected = {"fc.lora_A", "dora.lora_magnitude_vector", "dora.lora_bias", "qkv.lora_B"}
    assert expected | {"mha.in_proj_lora_A", "mha.in_proj_lora_magnitude_vector"} <= set(tensors)
    again = read_again(made, tensors)
    assert strip(again) == strip(adapter)
    assert {(e.name, e.kind) for e in again.extras} == {
        ("head.weight", "modules_to_save"), ("fc.bias", "bias"), ("emb.weight", "trainable_tokens"),
    }  # fmt: skip
    assert again.config == adapter.config
    repeated, _ = written(MS, again, tensors)
    assert list(repeated) == list(tensors)
    assert all(torch.equal(repeated[name], tensors[name]) for name in tensors)


def test_facts_are_said_once_where_all_modules_agree():
    adapter = Adapter((module("a", (2, 5), (6, 2)), module("b", (2, 5), (6, 2))))
    made = MS.write(adapter, facts())
    assert {(f.pattern, f.field, f.value) for f in made.facts.entries} == {("*", "alpha", 4), ("*", "kind", "linear")}
    uneven = Adapter((module("a[0]", (2, 5), (6, 2)), module("b", (2, 5), (6, 2), alpha=0.5)))
    said = MS.write(uneven, facts()).facts
    assert said.get("a[0]", "alpha") == 4
    assert said.get("b", "alpha") == 0.5


def test_conv_form_can_be_chosen():
    conv = module("c", (2, 3, 3, 3), (6, 2, 1, 1), "conv2d", kernel_size=(3, 3))
    made = MS.write(Adapter((conv,)), facts(("conv_form", "loralib")))
    assert {name: expr.shape for name, expr in made.tensors} == {"c.lora_A": (6, 9), "c.lora_B": (18, 6)}
    assert made.facts.get("c", "conv_form") == "loralib"
    grown = module("c", (6, 9), (18, 6), "conv2d", kernel_size=(3, 3), conv_form="loralib")
    back = MS.write(Adapter((grown,)), facts(("conv_form", "peft")))
    assert {n: e.shape for n, e in back.tensors}["c.lora_A"] == (18, 3, 3, 3)


def test_an_embedding_table_says_what_it_is():
    file = {"e.lora_A": torch.zeros(2, 9), "e.lora_B": torch.zeros(4, 2), "e.embedding_table": torch.zeros(9, 4)}
    adapter = MS.parse(content(file, ("alpha", 2), ("merged", False), container="mindspore"))
    assert adapter.modules[0].kind == "embedding"
    assert [(e.path, e.parameter, e.kind) for e in adapter.extras] == [("e", "embedding_table", "base")]


def test_blocks_of_unequal_rank_become_one_pair_and_say_so():
    terms = (Term(tensor(2, 5), tensor(3, 2), 0, 3), Term(tensor(1, 5), tensor(3, 1), 3, 6))
    made = MS.write(Adapter((LoraModule("f", "linear", 6, terms, Scaling(2.0, 1)),)), facts())
    assert {name: expr.shape for name, expr in made.tensors} == {"f.lora_A": (3, 5), "f.lora_B": (6, 3)}
    assert made.notes == ("f: blocks of rank [2, 1] became one pair of rank 3",)
    assert made.facts.get("f", "alpha") == 6


def test_a_higher_rank_can_be_chosen():
    made = MS.write(Adapter((module("m", (2, 5), (6, 2)),)), facts(("rank", 4)))
    assert {name: expr.shape for name, expr in made.tensors} == {"m.lora_A": (4, 5), "m.lora_B": (6, 4)}
    assert made.facts.get("m", "alpha") == 8


def test_merged_base_weights_stay_marked():
    file = {"m.lora_A": torch.zeros(2, 5), "m.lora_B": torch.zeros(6, 2), "m.weight": torch.zeros(6, 5)}
    adapter = MS.parse(content(file, ("alpha", 2), ("merged", True), container="mindspore"))
    assert adapter.merged
    assert "already contain" in adapter.warnings[0]
    assert MS.write(adapter, facts()).facts.get("m", "merged") is True
    assert by_name("loralib").write(adapter, facts()).facts.get("m", "merged") is True
    with pytest.raises(MappingError, match="already contain"):
        by_name("mindpet").write(adapter, facts())
    bare = replace(adapter, extras=())
    assert by_name("mindpet").write(bare, facts()).tensors


def test_optimizer_state_is_left_out_and_listed():
    file = {"m.lora_A": torch.zeros(2, 5), "m.lora_B": torch.zeros(6, 2), "moment1.m.lora_A": torch.zeros(2, 5),
            "global_step": torch.zeros(1), "linear.weight": torch.zeros(3, 3),
            "exp_avg_sq_m.lora_B": torch.zeros(6, 2)}  # fmt: skip
    adapter = MS.parse(content(file, ("alpha", 2), container="mindspore"))
    assert dict(adapter.left_out) == {
        "moment1.m.lora_A": "optimizer state of m.lora_A", "global_step": "training state",
        "exp_avg_sq_m.lora_B": "optimizer state of m.lora_B",
    }  # fmt: skip
    assert [e.name for e in adapter.extras] == ["linear.weight"]


def test_the_registry_finds_one_dialect_per_file():
    assert {"peft", "loralib", "loralib-ms", "mindpet", "tk"} <= {d.name for d in DIALECTS}
    bare = {"m.lora_A": torch.zeros(2, 5), "m.lora_B": torch.zeros(6, 2)}
    assert [n for n, _ in detect(content(bare))] == ["loralib"]
    assert [n for n, _ in detect(content(bare, container="mindspore"))] == ["loralib-ms"]
    assert [n for n, _ in detect(content(bare, container="safetensors", format="ms"))] == ["loralib-ms"]
    spelled = {f"base_model.model.m.lora_{x}.weight": torch.zeros(2, 2) for x in "AB"}
    assert [n for n, _ in detect(content(spelled))] == ["peft"]
    pet = {f"m.mindpet_delta_lora_{x}": torch.zeros(2, 2) for x in "ab"}
    assert [n for n, _ in detect(content(pet, container="mindspore"))] == ["mindpet"]
    assert detect(content({"m.weight": torch.zeros(2, 2)})) == []
    with pytest.raises(UsageError, match="unknown dialect"):
        by_name("nobody")
