"""Where the rows of a converted weight come from, against the formulas of MindFormers' scripts, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from lorabridge import axes
from lorabridge.families.tables import load_family, map_adapter, sizes_from_config

from .catalogue import CASES, Case
from .conftest import Store, model

Arrays = Mapping[str, np.ndarray]


def grouped(q: np.ndarray, k: np.ndarray, v: np.ndarray, groups: int) -> np.ndarray:
    """qkv_concat_hf2mg: per key/value head its queries, its key, its value."""
    return np.concatenate([x.reshape(groups, -1, *x.shape[1:]) for x in (q, k, v)], 1).reshape(-1, *q.shape[1:])


def interleaved(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """ffn_concat_hf2mg: gate and up row by row."""
    return np.stack([gate, up], 1).reshape(-1, gate.shape[1])


def halves(w: np.ndarray, head: int) -> np.ndarray:
    """rearrange_w, rearrange_b of glm2: in each head the even rows, then the odd ones."""
    rows = w.reshape(-1, head, *w.shape[1:])
    return np.concatenate([rows[:, 0::2], rows[:, 1::2]], 1).reshape(w.shape)


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """permute of llama's convert_meta_torch_ckpt."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def keys_and_values(w: np.ndarray, heads: int, head: int) -> tuple[np.ndarray, np.ndarray]:
    """TeleChat2's key_value: per head its key, then its value."""
    rows = w.reshape(heads, 2 * head, -1)
    return rows[:, :head].reshape(heads * head, -1), rows[:, head:].reshape(heads * head, -1)


def qkv(t: Arrays, kind: str = "weight", at: str = "model.layers.1.self_attn.") -> list[np.ndarray]:
    return [t[f"{at}{n}_proj.{kind}"] for n in "qkv"]


def gate_up(t: Arrays) -> list[np.ndarray]:
    return [t[f"model.layers.1.mlp.{n}_proj.weight"] for n in ("gate", "up")]


def glm(t: Arrays, kind: str) -> list[np.ndarray]:
    return np.split(t[f"transformer.encoder.layers.1.self_attention.query_key_value.{kind}"], [32, 48])


def telechat(t: Arrays) -> list[np.ndarray]:
    at = "transformer.h.1.self_attention."
    q = t[f"{at}query.weight"]
    return [q, *keys_and_values(t[f"{at}key_value.weight"], 2, q.shape[0] // 4)]


def per_device(w: np.ndarray, parts: int, devices: int) -> np.ndarray:
    """convert_weight_torch_to_ms of TeleChat-52B: a Conv1D's weight, turned, with each device's rows of every part."""
    return w.T.reshape(parts, devices, -1, w.shape[0]).swapaxes(0, 1).reshape(w.T.shape)


def bloom(t: Arrays, part: int) -> np.ndarray:
    """bloom's convert_weight: reshape(n_head, 3, head, -1)."""
    return t["transformer.h.1.self_attention.query_key_value.weight"].reshape(4, 3, 6, 24)[:, part].reshape(24, 24)


CORE = "decoder.layers.1."
GLM = "transformer.encoder.layers.1.self_attention."
Formula = Callable[[Arrays], np.ndarray]
ROWS: list[tuple[str, dict[str, str], str, Formula]] = [
    ("qwen3_mcore-Qwen3ForCausalLM", {"qkv": "grouped", "fc1": "interleaved"},
     f"{CORE}self_attention.linear_qkv.weight", lambda t: grouped(*qkv(t), 2)),
    ("qwen3_mcore-Qwen3ForCausalLM", {"qkv": "contiguous", "fc1": "contiguous"},
     f"{CORE}self_attention.linear_qkv.weight", lambda t: np.concatenate(qkv(t))),
    ("qwen3_mcore-Qwen3ForCausalLM", {"qkv": "contiguous", "fc1": "interleaved"},
     f"{CORE}mlp.linear_fc1.weight", lambda t: interleaved(*gate_up(t))),
    ("qwen3_mcore-Qwen3ForCausalLM", {"qkv": "grouped", "fc1": "contiguous"},
     f"{CORE}mlp.linear_fc1.weight", lambda t: np.concatenate(gate_up(t))),
    ("telechat3_mcore-telechat3.hf", {"qkv": "grouped", "fc1": "interleaved"},
     f"{CORE}self_attention.linear_qkv.weight", lambda t: grouped(*qkv(t), 2)),
    ("qwen2_mcore-Qwen2ForCausalLM", {},
     f"{CORE}self_attention.linear_qkv.bias", lambda t: np.concatenate(qkv(t, "bias"))),
    ("qwen2_mcore-Qwen2ForCausalLM", {},
     f"{CORE}mlp.linear_fc1.weight", lambda t: np.concatenate(gate_up(t))),
    ("glm4_mcore-Glm4ForCausalLM", {},
     f"{CORE}mlp.linear_fc1.weight", lambda t: t["model.layers.1.mlp.gate_up_proj.weight"]),
    ("telechat2_mcore-telechat2_wide.hf", {},
     f"{CORE}self_attention.linear_qkv.weight", lambda t: np.concatenate(telechat(t))),
    ("telechat-telechat2.hf", {"qkv_concat": "contiguous"},
     "model.layers.1.attention.w_qkv.weight", lambda t: np.concatenate(telechat(t))),
    ("telechat-telechat2.hf", {"qkv_concat": "off"},
     "model.layers.1.attention.wk_v.weight", lambda t: t["transformer.h.1.self_attention.key_value.weight"]),
    ("telechat_52b-telechat_52b.hf", {"mp": "1"},
     "model.layers.1.attention.w_qkv.weight", lambda t: t["transformer.h.1.attn.c_attn.weight"].T),
    ("telechat_52b-telechat_52b.hf", {"mp": "4"}, "model.layers.1.attention.w_qkv.weight",
     lambda t: per_device(t["transformer.h.1.attn.c_attn.weight"], 3, 4)),
    ("telechat_52b-telechat_52b.hf", {"mp": "8"}, "model.layers.1.feed_forward.w_gate_hidden.weight",
     lambda t: per_device(t["transformer.h.1.mlp.c_fc.weight"], 2, 8)),
    ("llama_meta-llama_meta.hf", {},
     "model.layers.1.attention.wq.weight", lambda t: permuted(t["layers.1.attention.wq.weight"], 4)),
    ("llama_meta-llama_meta.hf", {},
     "model.layers.1.attention.wk.weight", lambda t: permuted(t["layers.1.attention.wk.weight"], 2)),
    ("llama_meta-llama_meta.hf", {},
     "model.layers.1.attention.wv.weight", lambda t: t["layers.1.attention.wv.weight"]),
    ("glm2-glm2.hf", {"qkv": "split"}, f"{GLM}wk.weight", lambda t: glm(t, "weight")[1]),
    ("glm2-glm2.hf", {"qkv": "split", "rope": "rearranged"}, f"{GLM}wq.weight",
     lambda t: halves(glm(t, "weight")[0], 8)),
    ("glm2-glm2.hf", {"qkv": "concat", "rope": "rearranged"}, f"{GLM}query_key_value.bias",
     lambda t: np.concatenate([*(halves(x, 8) for x in glm(t, "bias")[:2]), glm(t, "bias")[2]])),
    ("glm4-GlmForCausalLM", {"qkv": "concat", "rope": "rearranged"}, f"{GLM}query_key_value.weight",
     lambda t: np.concatenate([*(halves(x, 8) for x in qkv(t)[:2]), qkv(t)[2]])),
    ("internlm2-internlm2.hf", {"qkv_concat": "off"}, "model.layers.1.attention.wk.weight",
     lambda t: t["model.layers.1.attention.wqkv.weight"].reshape(2, 4, 6, 24)[:, 2].reshape(12, 24)),
    ("internlm2-internlm2.hf", {"qkv_concat": "off"}, "model.layers.1.attention.wq.weight",
     lambda t: t["model.layers.1.attention.wqkv.weight"].reshape(2, 4, 6, 24)[:, :2].reshape(24, 24)),
    ("bloom-BloomForCausalLM", {}, "blocks.1.attention.dense2.weight", lambda t: bloom(t, 1)),
    ("bloom-BloomForCausalLM", {}, "blocks.1.output.mapping.weight",
     lambda t: t["transformer.h.1.mlp.dense_h_to_4h.weight"].T),
    ("wizardcoder-GPTBigCodeForCausalLM", {}, "backbone.blocks.1.attention.dense3.weight",
     lambda t: t["transformer.h.1.attn.c_attn.weight"][30:]),
    ("wizardcoder-GPTBigCodeForCausalLM", {}, "backbone.blocks.1.attention.projection.weight",
     lambda t: t["transformer.h.1.attn.c_proj.weight"].T),
    ("qwen-qwen.hf", {}, "transformer.layers.1.attention.wv.bias",
     lambda t: t["transformer.h.1.attn.c_attn.bias"][48:]),
    ("qwen-qwen.hf", {}, "transformer.layers.1.feed_forward.w3.weight",
     lambda t: t["transformer.h.1.mlp.w2.weight"]),
    ("baichuan2-baichuan2.hf", {"qkv_concat": "off"}, "model.layers.1.attention.wk.weight",
     lambda t: t["model.layers.1.self_attn.W_pack.weight"][24:48]),
]  # fmt: skip
NAMED: dict[str, Case] = {str(case): case for case in CASES}


@pytest.mark.parametrize(
    ("case", "layout", "name", "formula"), ROWS, ids=[f"{row[0]}-{'-'.join(row[1].values())}-{row[2]}" for row in ROWS]
)
def test_rows_lie_where_the_script_puts_them(
    store: Store, case: str, layout: dict[str, str], name: str, formula: Formula
) -> None:
    table = load_family(NAMED[case].table)
    shapes, config = NAMED[case].model()
    there = map_adapter(table, model(store, shapes), to="ms", sizes=sizes_from_config(table, config), layout=layout)
    made = {extra.name: extra.value for extra in there.extras}
    value = axes.evaluate(made[name], store.bits.__getitem__, {})
    wanted = formula(store.bits)
    assert value.shape == wanted.shape
    assert (value == wanted).all()
