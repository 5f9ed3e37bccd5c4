"""The reference networks against transformers: same weights through convert, same logits; wrong names, other logits."""

from __future__ import annotations

from pathlib import Path

import mindspore
import numpy as np
import pytest
import torch
from tiny_models import (
    BERT,
    CASES,
    GPT2,
    LLAMA,
    TIME,
    config_of,
    converted,
    inputs,
    loaded,
    ms_output,
    real,
    torch_output,
)

from lorabridge.errors import MappingError
from lorabridge.layers.models import build

CLOSE = 2e-5


@pytest.fixture(autouse=True)
def pynative() -> None:
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


MODULES: dict[Path, torch.nn.Module] = {}


def both(name: str, work: Path) -> tuple[torch.nn.Module, mindspore.nn.Cell]:
    folder = work / name
    if folder not in MODULES:
        folder.mkdir()
        MODULES[folder] = real(CASES[name])
        converted(CASES[name], MODULES[folder], folder)
    return MODULES[folder], loaded(config_of(folder / "hf"), folder / "base.ckpt")


@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_transformers(name: str, work: Path) -> None:
    module, network = both(name, work)
    ids, mask = inputs()
    kept = mask.astype(bool)
    want, got = torch_output(module, ids, mask), ms_output(network, ids, mask)
    if want.ndim == 3:
        want, got = want[kept], got[kept]
    assert got.shape == want.shape
    assert want.std() > 0.1
    assert np.abs(got - want).max() < CLOSE
    assert np.abs(ms_output(network, ids, None) - torch_output(module, ids, None)).max() < CLOSE
    assert not np.isnan(ms_output(network, ids, mask)).any()
    places = {"position_ids": (np.arange(11)[None] + 5).repeat(3, 0)}
    assert np.abs(ms_output(network, ids, None, **places) - torch_output(module, ids, None, **places)).max() < CLOSE


def test_the_pooled_output_and_token_types_of_bert_are_those_of_transformers(work: Path) -> None:
    module, network = both("bert", work)
    ids, mask = inputs()
    types = (ids % 2).astype(np.int64)
    with torch.no_grad():
        want = module(torch.tensor(ids), torch.tensor(mask), torch.tensor(types))
    given = [mindspore.Tensor(x, mindspore.int32) for x in (ids, mask, types)]
    hidden, pooled = network(*given)
    assert np.abs(hidden.asnumpy() - want.last_hidden_state.numpy())[mask.astype(bool)].max() < CLOSE
    assert np.abs(pooled.asnumpy() - want.pooler_output.numpy()).max() < CLOSE


@pytest.mark.parametrize("name", ["gpt2", "bert-tokens", "llama"])
def test_float16_is_close_to_transformers_in_float32(name: str, work: Path) -> None:
    module, _ = both(name, work)
    half = loaded(config_of(work / name / "hf"), work / name / "base.ckpt", dtype=mindspore.float16)
    assert {parameter.dtype for parameter in half.get_parameters()} == {mindspore.float16}
    ids, mask = inputs()
    want, got = torch_output(module, ids, mask)[mask.astype(bool)], ms_output(half, ids, mask)
    assert got.dtype == np.float16
    assert np.abs(got[mask.astype(bool)] - want).max() < 0.02 * np.abs(want).max()


def test_graph_mode_computes_the_same(work: Path) -> None:
    _, network = both("qwen2-tied", work)
    ids, mask = inputs()
    want = ms_output(network, ids, mask)
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    assert np.abs(ms_output(network, ids, mask) - want).max() < CLOSE


SWAPS = [
    ("gpt2", "attention.dense1", "attention.dense2"),
    ("gpt2", "layernorm1.gamma", "layernorm2.gamma"),
    ("bert-tokens", "attention.dense2", "attention.dense3"),
    ("bert-tokens", "layernorm1", "layernorm2"),
    ("llama", "attention.wk", "attention.wv"),
    ("llama", "feed_forward.w1", "feed_forward.w3"),
    ("llama", "attention_norm", "ffn_norm"),
    ("qwen2", "attention.wk.bias", "attention.wv.bias"),
    ("qwen2", "feed_forward.w1", "feed_forward.w2"),
]


@pytest.mark.parametrize(("name", "first", "second"), SWAPS)
def test_two_names_exchanged_change_the_logits_clearly(name: str, first: str, second: str, work: Path) -> None:
    _, network = both(name, work)
    ids, mask = inputs()
    right = ms_output(network, ids, mask)
    state = mindspore.load_checkpoint(str(work / name / "base.ckpt"))
    swapped = {}
    for key, value in state.items():
        other = key.replace(first, second) if first in key else key.replace(second, first)
        swapped[other] = mindspore.Parameter(value, name=other)
    assert set(swapped) == set(state)
    mindspore.load_param_into_net(network, swapped, strict_load=True)
    assert np.abs(ms_output(network, ids, mask) - right).max() > 1e-2


def test_a_transposed_square_weight_changes_the_logits_clearly(work: Path) -> None:
    _, network = both("gpt2", work)
    ids, mask = inputs()
    right = ms_output(network, ids, mask)
    weight = network.backbone.blocks[0].attention.projection.weight
    weight.set_data(mindspore.Tensor(weight.asnumpy().T.copy()))
    assert np.abs(ms_output(network, ids, mask) - right).max() > 1e-2


def config(kind: str, architecture: str, fields: dict[str, object], **more: object) -> dict[str, object]:
    return {"model_type": kind, "architectures": [architecture], **fields, **more}


REFUSED = [
    (config("gpt2", "GPT2LMHeadModel", GPT2, reorder_and_upcast_attn=True), "reorder_and_upcast_attn"),
    (config("gpt2", "GPT2LMHeadModel", GPT2, tie_word_embeddings=False), "tie_word_embeddings"),
    (config("gpt2", "GPT2LMHeadModel", GPT2, add_cross_attention=True), "add_cross_attention"),
    (config("gpt2", "GPT2LMHeadModel", GPT2, activation_function="mish"), "activation_function"),
    (config("gpt2", "GPT2LMHeadModel", GPT2, n_head=5), "n_head"),
    (config("gpt2", "GPT2DoubleHeadsModel", GPT2), "GPT2DoubleHeadsModel"),
    (config("bert", "BertModel", BERT, position_embedding_type="relative_key"), "position_embedding_type"),
    (config("bert", "BertModel", BERT, is_decoder=True), "is_decoder"),
    (config("bert", "BertModel", BERT, vocab_size="many"), "vocab_size"),
    (config("llama", "LlamaForCausalLM", LLAMA, rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling.type"),
    (config("llama", "LlamaForCausalLM", LLAMA, rope_scaling={"rope_type": "default", "factor": 2.0}), "factor"),
    (config("llama", "LlamaForCausalLM", LLAMA, rope_parameters={"rope_type": "yarn"}), "rope_parameters.rope_type"),
    (
        config("llama", "LlamaForCausalLM", LLAMA, rope_parameters={"rope_theta": 5e5}, rope_theta=1e4),
        "rope_theta: is 10000",
    ),
    (config("llama", "LlamaForCausalLM", LLAMA, attention_bias=True), "attention_bias"),
    (config("llama", "LlamaForCausalLM", LLAMA, mlp_bias=True), "mlp_bias"),
    (config("llama", "LlamaForCausalLM", LLAMA, sliding_window=4), "sliding_window"),
    (config("llama", "LlamaForCausalLM", LLAMA, num_key_value_heads=4), "num_key_value_heads"),
    (config("qwen2", "Qwen2ForCausalLM", LLAMA, use_sliding_window=True), "use_sliding_window"),
    (config("qwen2", "Qwen2ForCausalLM", LLAMA, layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    (config("qwen2", "Qwen2ForCausalLM", LLAMA, quantization_config={"bits": 4}), "quantization_config"),
]


@pytest.mark.parametrize(("given", "named"), REFUSED)
def test_an_option_that_the_network_does_not_follow_is_refused_by_name(given: dict[str, object], named: str) -> None:
    with pytest.raises(MappingError) as error:
        build(given)
    assert named in error.value.where[0]
    assert all("rope_scaling" in place for place in error.value.where[1:])


def test_every_problem_is_listed_at_once() -> None:
    with pytest.raises(MappingError) as error:
        build({"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 8, "is_decoder": True})
    assert len(error.value.where) == 6


def test_an_unknown_model_type_lists_the_known_ones() -> None:
    with pytest.raises(MappingError, match="'mamba'") as error:
        build({"model_type": "mamba"})
    assert "llama" in error.value.hint


def test_configs_of_transformers_4_and_5_mean_the_same_network() -> None:
    old = build(config("llama", "LlamaForCausalLM", LLAMA, rope_theta=5e5, rope_scaling=None))
    new = build(config("llama", "LlamaForCausalLM", LLAMA, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}))
    plain = build(config("llama", "LlamaForCausalLM", LLAMA))
    tables = [network.model.frequencies.asnumpy() for network in (old, new, plain)]
    assert (tables[0] == tables[1]).all()
    assert not (tables[0] == tables[2]).all()


PUBLISHED = {
    "gpt2": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        **{key: GPT2[key] for key in ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size")},
    },
    "bert-chinese": {
        "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1, "directionality": "bidi",
        "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-12,
        "model_type": "bert", "pad_token_id": 0, "pooler_fc_size": 768, "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3, "pooler_size_per_head": 128, "pooler_type": "first_token_transform",
        "type_vocab_size": 2, "position_embedding_type": "absolute", "pruned_heads": {}, **BERT,
    },
    "llama-2": {
        "_name_or_path": "x", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "initializer_range": 0.02, "model_type": "llama", "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": True, **LLAMA,
    },
    "qwen2.5": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "initializer_range": 0.02, "max_window_layers": 24,
        "model_type": "qwen2", "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
        "use_mrope": False, "use_sliding_window": False, **LLAMA,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_as_they_are_published_are_read(name: str) -> None:
    assert build(PUBLISHED[name]).trainable_params()


def test_every_field_of_a_complete_config_is_known() -> None:
    import json

    import transformers

    for case in CASES.values():
        kind = case.architecture.split("For")[0].split("LM")[0].removesuffix("Model") + "Config"
        whole = json.loads(getattr(transformers, kind)(**case.fields).to_json_string(use_diff=False))
        assert build(whole, architecture=case.architecture).trainable_params()


def test_the_architecture_can_be_given_where_the_config_has_none() -> None:
    fields = {"model_type": "gpt2", **GPT2}
    with pytest.raises(MappingError, match="pass architecture="):
        build(fields)
    assert build(fields, architecture="GPT2LMHeadModel").head
    assert not build(fields, architecture="GPT2Model").head


def test_a_sequence_beyond_the_positions_is_refused(work: Path) -> None:
    network = build(config("gpt2", "GPT2LMHeadModel", GPT2))
    with pytest.raises(ValueError, match="n_positions = 16"):
        ms_output(network, np.zeros((1, TIME + 1), np.int64), None)
