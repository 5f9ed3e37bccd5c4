"""Tiny real transformers models, saved, converted and loaded into the reference networks."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import mindspore
import numpy as np
import torch
import transformers

from lorabridge.actions.convert import ConvertOptions, convert
from lorabridge.layers.models import build

VOCAB, TIME = 29, 16


@dataclass(frozen=True)
class Case:
    """A class of transformers, its config, and how its checkpoint is converted."""

    architecture: str
    family: str
    fields: dict[str, object]
    layout: dict[str, str] = field(default_factory=dict)


GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 3, "vocab_size": VOCAB, "n_positions": TIME, "bos_token_id": 0,
        "eos_token_id": 0}  # fmt: skip
BERT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40,
        "vocab_size": VOCAB, "max_position_embeddings": TIME}  # fmt: skip
LLAMA = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
         "intermediate_size": 24, "vocab_size": VOCAB, "max_position_embeddings": TIME}  # fmt: skip
WIDE = LLAMA | {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-2}
CASES = {
    "gpt2": Case("GPT2LMHeadModel", "gpt2", GPT2),
    "gpt2-odd": Case(
        "GPT2Model", "gpt2",
        GPT2 | {"n_inner": 24, "layer_norm_epsilon": 1e-2, "activation_function": "gelu",
                "scale_attn_by_inverse_layer_idx": True},
    ),
    "bert": Case("BertModel", "bert", BERT),
    "bert-tokens": Case("BertForTokenClassification", "bert", BERT | {"num_labels": 5, "hidden_act": "gelu_new"}),
    "bert-sequence": Case("BertForSequenceClassification", "bert", BERT | {"layer_norm_eps": 1e-2}),
    "bert-mlm": Case("BertForMaskedLM", "bert", BERT, {"mlm_head": "cell"}),
    "llama": Case("LlamaForCausalLM", "llama", WIDE),
    "llama-model": Case("LlamaModel", "llama", LLAMA | {"hidden_act": "gelu"}),
    "qwen2": Case("Qwen2ForCausalLM", "llama", LLAMA),
    "qwen2-tied": Case("Qwen2ForCausalLM", "llama", LLAMA | {"tie_word_embeddings": True}, {"head": "tied"}),
}  # fmt: skip


def real(case: Case) -> torch.nn.Module:
    """Build a class of transformers with random parameters, biases and norms included."""
    named = case.architecture.split("For")[0].split("LM")[0].removesuffix("Model") + "Config"
    torch.manual_seed(1)
    config = getattr(transformers, named)(**case.fields)
    module = getattr(transformers, case.architecture)(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0, 0.3)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter += 1
    return module


def config_of(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / "config.json").read_text()))


def converted(case: Case, module: torch.nn.Module, folder: Path) -> Path:
    """Save a model as transformers does and convert it; return the .ckpt."""
    module.save_pretrained(folder / "hf")
    convert(folder / "hf", folder / "base.ckpt", ConvertOptions(family=case.family, layout=case.layout))
    return folder / "base.ckpt"


def loaded(config: dict[str, object], checkpoint: Path, *, dtype: object = mindspore.float32) -> mindspore.nn.Cell:
    """Build the reference network and load a checkpoint into it, with nothing left over on either side."""
    network = build(config, dtype=dtype)
    state = mindspore.load_checkpoint(str(checkpoint))
    left = mindspore.load_param_into_net(network, state, strict_load=dtype == mindspore.float32)
    assert left == ([], [])
    return network


def inputs(batch: int = 3, time: int = 11) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and a mask: one row whole, one padded at the end, one padded at the start."""
    ids = np.random.default_rng(5).integers(0, VOCAB, (batch, time))
    mask = np.ones((batch, time), np.int64)
    mask[1, 7:] = 0
    mask[2, :3] = 0
    return ids, mask


def torch_output(module: torch.nn.Module, ids: np.ndarray, mask: np.ndarray | None, **more: np.ndarray) -> np.ndarray:
    """Return the logits, or the hidden states of a model without a head, and the pooled output after them."""
    given = {key: torch.tensor(value) for key, value in more.items()}
    with torch.no_grad():
        out = module(torch.tensor(ids), attention_mask=None if mask is None else torch.tensor(mask), **given)
    return next(out[key] for key in ("logits", "last_hidden_state") if key in out).numpy()


def ms_output(network: mindspore.nn.Cell, ids: np.ndarray, mask: np.ndarray | None, **more: np.ndarray) -> np.ndarray:
    given = {key: mindspore.Tensor(value, mindspore.int32) for key, value in more.items()}
    masked = () if mask is None else (mindspore.Tensor(mask, mindspore.int32),)
    out = network(mindspore.Tensor(ids, mindspore.int32), *masked, **given)
    return (out[0] if isinstance(out, tuple) else out).asnumpy()
