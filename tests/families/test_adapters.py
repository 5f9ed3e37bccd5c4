"""Adapters through tables: ``convert(merge(W, A, B)) == merge(convert(W), convert(A, B))``, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lorabridge import axes
from lorabridge.dialects.adapter import Adapter, Extra, LoraModule, Scaling, Term
from lorabridge.errors import MappingError
from lorabridge.families.tables import Table, load_table, map_adapter, sizes_from_config

from .conftest import F64, Store, delta, lora

HIDDEN = 6
CONFIG = {"n_embd": HIDDEN, "n_layer": 2, "vocab_size": 11, "n_positions": 5, "n_inner": 9}
GPT2 = {
    "transformer.h.1.attn.c_attn": (3 * HIDDEN, HIDDEN),
    "transformer.h.1.attn.c_proj": (HIDDEN, HIDDEN),
    "transformer.h.1.mlp.c_fc": (9, HIDDEN),
    "transformer.h.1.mlp.c_proj": (HIDDEN, 9),
}
BERT = {
    "bert.encoder.layer.0.attention.self.value": (HIDDEN, HIDDEN),
    "bert.encoder.layer.0.attention.output.dense": (HIDDEN, HIDDEN),
    "bert.encoder.layer.0.intermediate.dense": (9, HIDDEN),
    "bert.encoder.layer.0.output.dense": (HIDDEN, 9),
    "bert.pooler.dense": (HIDDEN, HIDDEN),
}
LLAMA = """
schema = 1
family = "grouped"
[sizes]
hidden = "hidden_size"
heads = "heads"
kv_heads = "kv_heads"
head = "head_dim"
layers = "layers"
[holes]
i = "layers"
[[linear]]
hf = { q = "layers.{i}.q_proj", k = "layers.{i}.k_proj", v = "layers.{i}.v_proj" }
ms = { qkv = "blocks.{i}.w_qkv" }
out = { q = "heads * head", k = "kv_heads * head", v = "kv_heads * head" }
in = "hidden"
bias = true
groups = "kv_heads"
"""
GROUPED = {"hidden_size": 5, "heads": 4, "kv_heads": 2, "head_dim": 3, "layers": 1}


def merged(store: Store, base: np.ndarray, module: LoraModule, *, turned: bool) -> np.ndarray:
    """Return the stored weight with the delta added (DoRA, Liu et al. 2024: rows rescaled to the magnitude)."""
    weight = base.T if turned else base
    total = weight + delta(store, module, weight.shape[1])
    if module.magnitude is not None:
        total *= (store.value(module.magnitude) / np.linalg.norm(total, axis=1))[:, None]
    return total.T if turned else total


def square(store: Store, table: Table, shapes: Mapping[str, tuple[int, int]], *, sizes: dict[str, int], dora: bool,
           hf_turned: bool) -> None:  # fmt: skip
    """Compare merging first with converting first, for every module at once."""
    modules = [lora(store, path, out, inner, dora=dora) for path, (out, inner) in shapes.items()]
    weights = {p: store.random(f"{p}.weight", (i, o) if hf_turned else (o, i)) for p, (o, i) in shapes.items()}
    base = Adapter((), tuple(Extra(p, "weight", w, "base") for p, w in weights.items()))
    for module in modules:
        both = merged(store, store.value(weights[module.path]), module, turned=hf_turned)
        store.bits[f"{module.path}.merged"] = np.ascontiguousarray(both).view("<u8")
    whole = Adapter(
        (), tuple(Extra(p, "weight", axes.Read(f"{p}.merged", F64, w.shape), "base") for p, w in weights.items())
    )
    first = {e.path: store.value(e.value) for e in map_adapter(table, whole, to="ms", sizes=sizes).extras}
    converted = {e.path: store.value(e.value) for e in map_adapter(table, base, to="ms", sizes=sizes).extras}
    adapter = map_adapter(table, Adapter(tuple(modules)), to="ms", sizes=sizes)
    assert {module.path for module in adapter.modules} == set(first)
    for module in adapter.modules:
        turned = bool(module.fan_in_fan_out)
        np.testing.assert_allclose(
            merged(store, converted[module.path], module, turned=turned), first[module.path], rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("dora", [False, True])
def test_merging_and_converting_commute_for_gpt2(tables: dict[str, Table], store: Store, dora: bool) -> None:
    square(store, tables["gpt2"], GPT2, sizes=sizes_from_config(tables["gpt2"], CONFIG), dora=dora, hf_turned=True)


@pytest.mark.parametrize("dora", [False, True])
def test_merging_and_converting_commute_for_bert(tables: dict[str, Table], store: Store, dora: bool) -> None:
    config = {"hidden_size": HIDDEN, "intermediate_size": 9, "num_hidden_layers": 1, "vocab_size": 7,
              "max_position_embeddings": 4, "type_vocab_size": 2}  # fmt: skip
    square(store, tables["bert"], BERT, sizes=sizes_from_config(tables["bert"], config), dora=dora, hf_turned=False)


@pytest.mark.parametrize("dora", [False, True])
def test_merging_and_converting_commute_under_grouped_fusion(store: Store, tmp_path: Path, dora: bool) -> None:
    table = grouped(tmp_path)
    shapes = {"layers.0.q_proj": (12, 5), "layers.0.k_proj": (6, 5), "layers.0.v_proj": (6, 5)}
    square(store, table, shapes, sizes=sizes_from_config(table, GROUPED), dora=dora, hf_turned=False)
    back = {"blocks.0.w_qkv": (24, 5)}
    square(store, table.reverse(), back, sizes=sizes_from_config(table, GROUPED), dora=dora, hf_turned=False)


def grouped(tmp_path: Path) -> Table:
    path = tmp_path / "grouped.toml"
    path.write_text(LLAMA)
    return load_table(path)


def test_base_rows_interleave_as_megatron_groups_them(store: Store, tmp_path: Path) -> None:
    table = grouped(tmp_path)
    shapes = {"layers.0.q_proj": (12, 5), "layers.0.k_proj": (6, 5), "layers.0.v_proj": (6, 5)}
    base = Adapter((), tuple(Extra(p, "weight", store.random(f"{p}.weight", s), "base") for p, s in shapes.items()))
    there = map_adapter(table, base, to="ms", sizes=sizes_from_config(table, GROUPED))
    q, k, v = (store.value(extra.value) for extra in base.extras)
    # MindFormers qkv_concat_hf2mg: per key/value head, its queries, then its key, then its value
    wanted = np.concatenate(
        [q.reshape(2, 6, 5), k.reshape(2, 3, 5), v.reshape(2, 3, 5)], axis=1
    ).reshape(24, 5)  # fmt: skip
    assert (store.value(there.extras[0].value) == wanted).all()
    said = {"blocks.0.w_qkv.weight": there.extras[0].value}
    written = Adapter((), (replace(there.extras[0], value=axes.Read("blocks.0.w_qkv.weight", F64, (24, 5))),))
    back = map_adapter(table, written, to="hf", sizes=sizes_from_config(table, GROUPED))
    assert {e.name: axes.substitute(e.value, said) for e in back.extras} == {e.name: e.value for e in base.extras}


@pytest.mark.parametrize("dora", [False, True])
def test_there_and_back_gives_the_same_expressions(tables: dict[str, Table], store: Store, dora: bool) -> None:
    given = Adapter(tuple(lora(store, path, *shape, dora=dora, bias=True) for path, shape in GPT2.items()))
    there = map_adapter(tables["gpt2"], given, to="ms")
    back = map_adapter(tables["gpt2"], there, to="hf")
    wanted = sorted((replace(module, fan_in_fan_out=True) for module in given.modules), key=lambda module: module.path)
    assert sorted(back.modules, key=lambda module: module.path) == wanted


@pytest.mark.parametrize("missing", [(), ("k_proj",), ("q_proj", "v_proj")])
def test_there_and_back_under_grouped_fusion(store: Store, tmp_path: Path, missing: tuple[str, ...]) -> None:
    table = grouped(tmp_path)
    sizes = sizes_from_config(table, GROUPED)
    rows = {"q_proj": 12, "k_proj": 6, "v_proj": 6}
    modules = [lora(store, f"layers.0.{p}", n, 5) for p, n in rows.items() if p not in missing]
    there = map_adapter(table, Adapter(tuple(modules)), to="ms", sizes=sizes)
    assert [module.out for module in there.modules] == [24]
    assert len(there.modules[0].terms) == len(modules)
    back = map_adapter(table, there, to="hf", sizes=sizes)
    assert {m.path: m for m in back.modules} == {m.path: replace(m, fan_in_fan_out=False) for m in modules}


def test_a_split_adapter_shares_a_and_cuts_b(tables: dict[str, Table], store: Store) -> None:
    module = lora(store, "transformer.h.0.attn.c_attn", 3 * HIDDEN, HIDDEN)
    there = map_adapter(tables["gpt2"], Adapter((module,)), to="ms")
    assert [m.path for m in there.modules] == [f"backbone.blocks.0.attention.dense{k}" for k in (1, 2, 3)]
    for k, made in enumerate(there.modules):
        assert made.plain
        assert made.fan_in_fan_out is False
        assert made.terms[0].a == module.terms[0].a
        assert made.terms[0].b == axes.cut(module.terms[0].b, 0, k * HIDDEN, (k + 1) * HIDDEN)


def test_merged_linear_with_q_and_v_maps_to_dense1_and_dense3_only(tables: dict[str, Table], store: Store) -> None:
    rows = [(0, HIDDEN), (2 * HIDDEN, 3 * HIDDEN)]
    module = lora(store, "h.0.attn.c_attn", 3 * HIDDEN, HIDDEN, rows=rows)
    there = map_adapter(tables["gpt2"], Adapter((module,)), to="ms")
    assert {m.path: m.terms for m in there.modules} == {
        "backbone.blocks.0.attention.dense1": (replace(module.terms[0], start=0, stop=HIDDEN),),
        "backbone.blocks.0.attention.dense3": (replace(module.terms[1], start=0, stop=HIDDEN),),
    }
    back = map_adapter(tables["gpt2"], there, to="hf", layout={"hf_prefix": ""})
    assert back.modules == (replace(module, fan_in_fan_out=True),)


def test_a_term_across_a_boundary_is_cut_there(tables: dict[str, Table], store: Store) -> None:
    module = lora(store, "h.0.attn.c_attn", 3 * HIDDEN, HIDDEN, rows=[(4, 2 * HIDDEN + 1)])
    there = map_adapter(tables["gpt2"], Adapter((module,)), to="ms")
    assert [(m.terms[0].start, m.terms[0].stop) for m in there.modules] == [(4, 6), (0, 6), (0, 1)]
    back = map_adapter(tables["gpt2"], there, to="hf", layout={"hf_prefix": ""})
    assert back.modules[0].terms == module.terms


def test_parts_with_factors_of_their_own_become_one_term_each(tables: dict[str, Table], store: Store) -> None:
    paths = [f"backbone.blocks.0.attention.dense{k}" for k in (1, 3)]
    given = Adapter(tuple(lora(store, path, HIDDEN, HIDDEN, rank=k + 1) for k, path in enumerate(paths)))
    given = Adapter(tuple(replace(m, scaling=Scaling(2.0 * m.terms[0].rank, m.terms[0].rank)) for m in given.modules))
    (made,) = map_adapter(tables["gpt2"], given, to="hf").modules
    assert (made.path, made.out, made.fan_in_fan_out) == ("transformer.h.0.attn.c_attn", 3 * HIDDEN, True)
    assert [(t.start, t.stop, t.rank) for t in made.terms] == [(0, 6, 1), (12, 18, 2)]
    wanted = np.concatenate([delta(store, given.modules[0], 6), np.zeros((6, 6)), delta(store, given.modules[1], 6)])
    np.testing.assert_allclose(delta(store, made, 6), wanted, rtol=1e-15)


def test_unequal_scalings_under_one_fused_module_are_refused(tables: dict[str, Table], store: Store) -> None:
    given = [lora(store, f"backbone.blocks.0.attention.dense{k}", 6, 6, alpha=float(k)) for k in (1, 2)]
    with pytest.raises(MappingError, match=r"scalings 0\.5, 1 differ") as error:
        map_adapter(tables["gpt2"], Adapter(tuple(given)), to="hf")
    assert "one alpha and rank" in error.value.hint


def test_dora_with_a_missing_part_is_refused(tables: dict[str, Table], store: Store) -> None:
    given = [lora(store, f"backbone.blocks.0.attention.dense{k}", 6, 6, dora=True) for k in (1, 3)]
    with pytest.raises(MappingError, match="DoRA needs a magnitude for each of q, k, v") as error:
        map_adapter(tables["gpt2"], Adapter(tuple(given)), to="hf")
    assert "merge" in error.value.hint


def test_a_bias_on_rows_without_factors_is_refused(tables: dict[str, Table], store: Store) -> None:
    module = lora(store, "h.0.attn.c_attn", 18, 6, rows=[(0, 6)], bias=True)
    with pytest.raises(MappingError, match="part 'k' has a bias or magnitude but no factors"):
        map_adapter(tables["gpt2"], Adapter((module,)), to="ms")


def test_uneven_parts_need_a_config_and_say_so(store: Store, tmp_path: Path) -> None:
    given = Adapter((lora(store, "blocks.0.w_qkv", 24, 5),))
    with pytest.raises(MappingError, match="need heads, head, kv_heads") as error:
        map_adapter(grouped(tmp_path), given, to="hf")
    assert "--config config.json" in error.value.hint


def test_sizes_of_modules_are_checked_by_name(tables: dict[str, Table], store: Store) -> None:
    sizes = sizes_from_config(tables["gpt2"], CONFIG | {"n_embd": 12})
    with pytest.raises(MappingError) as error:
        map_adapter(tables["gpt2"], Adapter((lora(store, "h.0.mlp.c_proj", 6, 9),)), to="ms", sizes=sizes)
    assert error.value.where == ("h.0.mlp.c_proj: 6 rows, but hidden = 12 (gpt2.toml:63)",)


def test_embedding_lora_follows_the_table(tables: dict[str, Table], store: Store) -> None:
    terms = (Term(store.random("a", (2, 11)), store.random("b", (HIDDEN, 2)), 0, HIDDEN),)
    module = LoraModule("transformer.wte", "embedding", HIDDEN, terms, Scaling(4, 2))
    sizes = sizes_from_config(tables["gpt2"], CONFIG)
    (made,) = map_adapter(tables["gpt2"], Adapter((module,)), to="ms", sizes=sizes).modules
    assert (made.path, made.weight) == ("backbone.embedding.word_embedding", "embedding_table")
    assert made.fan_in_fan_out is None
    assert map_adapter(tables["gpt2"], Adapter((made,)), to="hf").modules == (module,)
    with pytest.raises(MappingError, match=r"is linear, but gpt2\.toml:\d+ maps embedding"):
        map_adapter(tables["gpt2"], Adapter((replace(module, kind="linear"),)), to="ms")


def test_a_lora_on_the_tied_head_is_refused_by_name(tables: dict[str, Table], store: Store) -> None:
    with pytest.raises(MappingError, match=r"lm_head: no rule in gpt2\.toml"):
        map_adapter(tables["gpt2"], Adapter((lora(store, "lm_head", 11, 6),)), to="ms")


def test_saved_modules_and_biases_travel_with_their_kind(tables: dict[str, Table], store: Store) -> None:
    extras = (
        Extra("classifier", "weight", store.random("w", (9, 6)), "modules_to_save"),
        Extra("classifier", "bias", store.random("c", (9,)), "modules_to_save"),
        Extra("bert.encoder.layer.0.output.LayerNorm", "bias", store.random("n", (6,)), "bias"),
        Extra("bert.embeddings.word_embeddings", "weight", store.random("t", (2, 6)), "trainable_tokens"),
    )
    config = {"hidden_size": HIDDEN, "intermediate_size": 9, "num_hidden_layers": 1, "vocab_size": 7,
              "max_position_embeddings": 4, "type_vocab_size": 2}  # fmt: skip
    sizes = sizes_from_config(tables["bert"], config)
    there = map_adapter(tables["bert"], Adapter((), extras), to="ms", sizes=sizes)
    assert {(extra.name, extra.kind) for extra in there.extras} == {
        ("classifier.weight", "modules_to_save"),
        ("classifier.bias", "modules_to_save"),
        ("bert.bert_encoder.encoder.blocks.0.layernorm1.beta", "bias"),
        ("bert.word_embedding.embedding_table", "trainable_tokens"),
    }
    back = map_adapter(tables["bert"], there, to="hf", sizes=sizes)
    assert set(back.extras) == set(extras)


def test_fusing_a_saved_weight_needs_all_its_parts(tables: dict[str, Table], store: Store) -> None:
    one = Extra("backbone.blocks.0.attention.dense1", "weight", store.random("w", (6, 6)), "modules_to_save")
    with pytest.raises(MappingError, match="fusing needs k, v as well"):
        map_adapter(tables["gpt2"], Adapter((), (one,)), to="hf")


def test_an_empty_adapter_stays_empty(tables: dict[str, Table]) -> None:
    for name in ("gpt2", "bert", "identity"):
        assert map_adapter(tables[name], Adapter(()), to="ms") == Adapter(())
