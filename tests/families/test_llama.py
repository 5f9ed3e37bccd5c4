"""The llama table: names and shapes of the real classes, row layouts of qkv_concat, heads, adapters, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lorabridge import axes
from lorabridge.dialects.adapter import Adapter
from lorabridge.errors import LorabridgeError, MappingError
from lorabridge.families.tables import (
    Table,
    check_complete,
    detect_family,
    map_adapter,
    names,
    sizes_from_config,
    tied_checks,
)

from .conftest import Store, delta, lora, model, reread

LLAMA = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 10, "vocab_size": 17, "max_position_embeddings": 16}  # fmt: skip
WIDE = {"hidden_size": 12, "num_hidden_layers": 11, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6,
        "intermediate_size": 12, "vocab_size": 12, "max_position_embeddings": 16}  # fmt: skip
SPLIT = {"qkv_concat": "off", "head": "own"}
CASES = [
    ("LlamaForCausalLM", LLAMA, SPLIT),
    ("LlamaForCausalLM", WIDE, SPLIT),
    ("LlamaForCausalLM", WIDE | {"attention_bias": True}, SPLIT),
    ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}, SPLIT | {"head": "tied"}),
    ("LlamaModel", WIDE, SPLIT | {"hf_prefix": ""}),
    ("Qwen2ForCausalLM", LLAMA, SPLIT),
    ("Qwen2ForCausalLM", LLAMA | {"tie_word_embeddings": True}, SPLIT | {"head": "tied"}),
    ("Qwen2Model", LLAMA, SPLIT | {"hf_prefix": ""}),
]


def real(architecture: str, fields: dict[str, int]) -> tuple[dict[str, tuple[int, ...]], dict[str, object]]:
    """Build a class of transformers on the meta device; return its parameters' shapes and its config.json."""
    import torch
    import transformers

    name = architecture.split("For")[0].removesuffix("Model") + "Config"
    config = getattr(transformers, name)(**fields)
    with torch.device("meta"):
        module = getattr(transformers, architecture)(config)
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    return shapes, json.loads(config.to_json_string(use_diff=False))


def biases(shapes: dict[str, tuple[int, ...]]) -> set[str]:
    return {name for name in shapes if name.endswith(".bias")}


@pytest.mark.parametrize(("architecture", "fields", "layout"), CASES)
def test_names_and_shapes_are_those_of_the_real_class(
    tables: dict[str, Table], architecture: str, fields: dict[str, int], layout: dict[str, str]
) -> None:
    table = tables["llama"]
    shapes, config = real(architecture, fields)
    sizes = sizes_from_config(table, config)
    wanted = names(table, sizes, "hf", layout=layout, architecture=architecture)
    tied = {name for name, _ in tied_checks(table, shapes, side="hf", layout=layout)}
    assert tied == ({"lm_head.weight"} if layout["head"] == "tied" else set())
    assert set(wanted) == set(shapes) - tied - biases(shapes)
    assert all(shapes[name] == shape for name, shape in wanted.items())
    expected = {"q_proj", "k_proj", "v_proj"} if architecture.startswith("Qwen2") else set()
    expected |= {"q_proj", "k_proj", "v_proj", "o_proj"} if "attention_bias" in fields else set()
    assert {name.split(".")[-2] for name in biases(shapes)} == expected
    assert check_complete(table, shapes, side="hf", sizes=sizes, layout=layout).problems == ()
    assert "llama" in detect_family(tables, shapes, "hf")


@pytest.mark.parametrize("concat", ["off", "contiguous", "grouped"])
@pytest.mark.parametrize(("architecture", "fields", "layout"), CASES)
def test_there_and_back_is_the_identity_on_expressions_and_bits(
    tables: dict[str, Table], store: Store, architecture: str, fields: dict[str, int], layout: dict[str, str],
    concat: str,
) -> None:  # fmt: skip
    table = tables["llama"]
    shapes, config = real(architecture, fields)
    sizes = sizes_from_config(table, config)
    choices = {key: choice for key, choice in layout.items() if key != "hf_prefix"} | {"qkv_concat": concat}
    there = map_adapter(table, model(store, shapes), to="ms", sizes=sizes, layout=choices)
    assert not any(axes.computes(extra.value) for extra in there.extras)
    written, said = reread(there)
    expected = names(table, sizes, "ms", layout=choices, architecture=architecture)
    made = {extra.name: extra.value.shape for extra in written.extras}
    assert {name: shape for name, shape in made.items() if not name.endswith(".bias")} == expected
    back = map_adapter(table, written, to="hf", sizes=sizes, layout=layout | {"qkv_concat": concat})
    dropped = {name for name, _ in there.left_out}
    assert {extra.name for extra in back.extras} == set(shapes) - dropped
    for extra in back.extras:
        whole = axes.substitute(extra.value, said)
        assert whole == axes.Read(extra.name, whole.dtype, shapes[extra.name]), extra.name


def test_the_mindformers_names_are_written(tables: dict[str, Table], store: Store) -> None:
    shapes, _ = real("Qwen2ForCausalLM", LLAMA | {"num_hidden_layers": 1})
    there = map_adapter(tables["llama"], model(store, shapes), to="ms")
    made = {extra.name: axes.reads(extra.value) for extra in there.extras}
    block, origin = "model.layers.0.", "model.layers.0."
    assert made == {
        "model.tok_embeddings.embedding_weight": ("model.embed_tokens.weight",),
        **{
            f"{block}{ms}.{kind}": (f"{origin}self_attn.{hf}.{kind}",)
            for ms, hf in [("attention.wq", "q_proj"), ("attention.wk", "k_proj"), ("attention.wv", "v_proj")]
            for kind in ("weight", "bias")
        },
        f"{block}attention.wo.weight": (f"{origin}self_attn.o_proj.weight",),
        f"{block}feed_forward.w1.weight": (f"{origin}mlp.gate_proj.weight",),
        f"{block}feed_forward.w2.weight": (f"{origin}mlp.down_proj.weight",),
        f"{block}feed_forward.w3.weight": (f"{origin}mlp.up_proj.weight",),
        f"{block}attention_norm.weight": (f"{origin}input_layernorm.weight",),
        f"{block}ffn_norm.weight": (f"{origin}post_attention_layernorm.weight",),
        "model.norm_out.weight": ("model.norm.weight",),
        "lm_head.weight": ("lm_head.weight",),
    }


def test_fused_rows_follow_mindformers_two_orders(tables: dict[str, Table], store: Store) -> None:
    """Compare with the formulas: kv groups of [q x repeats, k, v]; gate and up stacked row by row."""
    table = tables["llama"]
    shapes, config = real("Qwen2ForCausalLM", LLAMA)
    sizes = sizes_from_config(table, config)
    given = model(store, shapes)
    at = "model.layers.1."
    q, k, v = (store.bits[f"{at}self_attn.{n}_proj.weight"] for n in "qkv")
    gate, up = (store.bits[f"{at}mlp.{n}_proj.weight"] for n in ("gate", "up"))
    biases_ = [store.bits[f"{at}self_attn.{n}_proj.bias"] for n in "qkv"]
    for concat in ("contiguous", "grouped"):
        there = map_adapter(table, given, to="ms", sizes=sizes, layout={"qkv_concat": concat})
        made = {e.name: axes.evaluate(e.value, store.bits.__getitem__, {}) for e in there.extras}
        if concat == "contiguous":
            qkv, both, bias = np.concatenate([q, k, v]), np.concatenate([gate, up]), np.concatenate(biases_)
        else:
            qkv = np.concatenate([x.reshape(2, -1, 12) for x in (q, k, v)], 1).reshape(-1, 12)
            both = np.stack([gate, up], 1).reshape(-1, 12)
            bias = np.concatenate([x.reshape(2, -1) for x in biases_], 1).reshape(-1)
        assert (made[f"{at}attention.w_qkv.weight"] == qkv).all()
        assert (made[f"{at}feed_forward.w_gate_hidden.weight"] == both).all()
        assert (made[f"{at}attention.w_qkv.bias"] == bias).all()


def test_a_fused_checkpoint_is_never_read_without_its_layout(tables: dict[str, Table], store: Store) -> None:
    table = tables["llama"]
    shapes, config = real("LlamaForCausalLM", LLAMA)
    sizes = sizes_from_config(table, config)
    fused, _ = reread(map_adapter(table, model(store, shapes), to="ms", sizes=sizes, layout={"qkv_concat": "grouped"}))
    with pytest.raises(LorabridgeError, match=r"qkv_concat|w_qkv"):
        map_adapter(table, fused, to="hf", sizes=sizes)


def test_q_and_v_adapters_go_to_separate_cells_or_grow_into_a_fused_one(tables: dict[str, Table], store: Store) -> None:
    table = tables["llama"]
    sizes = sizes_from_config(table, WIDE)
    q = lora(store, "model.layers.3.self_attn.q_proj", 36, 12)
    v = lora(store, "model.layers.3.self_attn.v_proj", 18, 12)
    apart = map_adapter(table, Adapter((q, v)), to="ms", sizes=sizes)
    assert [m.path for m in apart.modules] == ["model.layers.3.attention.wq", "model.layers.3.attention.wv"]
    assert [m.terms for m in apart.modules] == [q.terms, v.terms]
    fused = map_adapter(table, Adapter((q, v)), to="ms", sizes=sizes, layout={"qkv_concat": "grouped"})
    (module,) = fused.modules
    assert (module.path, module.out) == ("model.layers.3.attention.w_qkv", 72)
    rows = delta(store, module, 12).reshape(3, 24, 12)
    assert (rows[:, :12].reshape(36, 12) == delta(store, q, 12)).all()
    assert not rows[:, 12:18].any()
    assert (rows[:, 18:].reshape(18, 12) == delta(store, v, 12)).all()
    head = map_adapter(table, Adapter((lora(store, "lm_head", 12, 12),)), to="ms", sizes=sizes)
    assert [m.path for m in head.modules] == ["lm_head"]


def test_rotary_buffers_are_dropped_with_a_reason(tables: dict[str, Table], store: Store) -> None:
    shapes, _ = real("LlamaForCausalLM", LLAMA)
    shapes |= {"model.layers.1.self_attn.rotary_emb.inv_freq": (2,), "model.rotary_emb.inv_freq": (2,)}
    there = map_adapter(tables["llama"], model(store, shapes), to="ms")
    assert {name for name, _ in there.left_out} == {name for name in shapes if "inv_freq" in name}
    assert all(why.startswith("rotary frequencies") for _, why in there.left_out)


def test_biases_that_the_cells_do_not_have_are_refused(tables: dict[str, Table], store: Store) -> None:
    shapes, _ = real("LlamaForCausalLM", LLAMA | {"mlp_bias": True})
    with pytest.raises(MappingError) as error:
        map_adapter(tables["llama"], model(store, shapes), to="ms")
    assert len(error.value.where) == 6
    assert all(".mlp." in place and ".bias" in place for place in error.value.where)


def test_a_head_that_should_be_tied_is_compared_and_left_out(tables: dict[str, Table], store: Store) -> None:
    shapes, _ = real("Qwen2ForCausalLM", LLAMA | {"tie_word_embeddings": True})
    kept = map_adapter(tables["llama"], model(store, shapes), to="ms")
    assert "lm_head.weight" in {extra.name for extra in kept.extras}
    tied = map_adapter(tables["llama"], model(store, shapes), to="ms", layout={"head": "tied"})
    assert tied.left_out == (("lm_head.weight", "tied: equal to model.embed_tokens.weight"),)
    assert "lm_head.weight" not in {extra.name for extra in tied.extras}


@pytest.mark.parametrize("tied", [True, False])
def test_the_config_says_whether_the_head_is_tied(tied: bool, tmp_path: Path) -> None:
    """Small models have no lm_head on disk; nobody should have to say so."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lorabridge import ConvertOptions, convert, open_checkpoint

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out.ckpt", ConvertOptions(family="llama"))
    with open_checkpoint(tmp_path / "out.ckpt") as checkpoint:
        assert ("lm_head.weight" in checkpoint) is not tied
    convert(tmp_path / "out.ckpt", tmp_path / "back")
    assert (tmp_path / "hf" / "model.safetensors").read_bytes() == (
        tmp_path / "back" / "model.safetensors"
    ).read_bytes()
