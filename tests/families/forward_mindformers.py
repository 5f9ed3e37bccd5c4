"""Compare what transformers and MindFormers compute from one set of weights, converted by a table.

``python forward_mindformers.py prepare DIR`` (torch, transformers, lorabridge) writes small random models, the
converted weights and transformers' logits; ``python forward_mindformers.py run DIR`` (mindspore 2.10.0, mindformers
2.1.0, numpy 1.26) loads the weights strictly into MindFormers' networks on the CPU and prints how far the logits are
apart. The CPU has no kernels for the fused norm, the outer product and flash attention: MindFormers' own norm in
steps, a product and a softmax stand in for them. docs/families.md says what was printed.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

TOKENS = [[3, 17, 42, 8, 60, 1, 29, 33, 5, 9, 50, 21, 2, 11, 48, 7]]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
         "vocab_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 32}  # fmt: skip
EXACT = {"compute_dtype": "float32", "param_init_type": "float32", "layernorm_compute_type": "float32",
         "softmax_compute_type": "float32", "rotary_dtype": "float32"}  # fmt: skip
LEGACY = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "n_kv_heads": 2, "vocab_size": 64,
          "num_layers": 2, "seq_length": 16, "max_position_embedding": 32, "rms_norm_eps": 1e-6,
          "use_rope_slice": True}  # fmt: skip
GLM2 = {"hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "multi_query_attention": True,
        "multi_query_group_num": 2, "padded_vocab_size": 64, "num_layers": 2, "kv_channels": 8, "seq_length": 16,
        "add_qkv_bias": True, "layernorm_epsilon": 1e-6}  # fmt: skip
MCORE = SIZES | {"head_dim": 16, "seq_length": 16, "params_dtype": "float32", "compute_dtype": "float32",
                 "layernorm_compute_dtype": "float32", "softmax_compute_dtype": "float32", "rotary_dtype": "float32",
                 "rms_norm_eps": 1e-6, "use_flash_attention": False, "tie_word_embeddings": False}  # fmt: skip


def llama(fields: Mapping[str, object]) -> object:
    from mindformers.models.llama import LlamaConfig, LlamaForCausalLM, llama_layer

    llama_layer.check_rmsnorm_big_kernel_valid = lambda: False
    return LlamaForCausalLM(LlamaConfig(**LEGACY, **EXACT, **fields))


def glm2(fields: Mapping[str, object]) -> object:
    import mindspore
    from mindformers.models.glm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration, glm2_modules
    from mindspore import ops

    glm2_modules.check_rmsnorm_big_kernel_valid = lambda: False
    glm2_modules.ChatGLM2RMSNorm.cast = ops.Cast()  # the norm in steps forgets it
    net = ChatGLM2ForConditionalGeneration(ChatGLM2Config(**GLM2, **EXACT, **fields))
    for _, cell in net.cells_and_names():
        if hasattr(cell, "mul_mask"):  # the mask is uint8, which cannot hold -10000; flash attention takes another way
            cell.mul_mask = lambda mask, by: mask.astype(mindspore.float32) * by
        if hasattr(cell, "k_bmm_swap"):  # the CPU's BatchMatMul does not broadcast
            cell.bmm_swap = cell.k_bmm_swap = ops.matmul
    return net


def qwen3(fields: Mapping[str, object]) -> object:
    """Build parallel_core's network for training in graph mode."""
    from mindspore import nn, ops

    core = "mindformers.parallel_core.training_graph."

    class Product(nn.Cell):
        def construct(self, a, b):  # type: ignore[no-untyped-def]
            return ops.reshape(a, (-1, 1)) * ops.reshape(b, (1, -1))

        def shard(self, *_: object) -> None:
            pass

    class Attention(nn.Cell):
        def __init__(self, *_: object, **__: object) -> None:
            super().__init__()

        def construct(self, q, k, v, mask):  # type: ignore[no-untyped-def]
            s, b, n, d = q.shape
            repeats = n // k.shape[2]
            q = ops.transpose(q, (1, 2, 0, 3))
            k = ops.repeat_interleave(ops.transpose(k, (1, 2, 0, 3)), repeats, 1)
            v = ops.repeat_interleave(ops.transpose(v, (1, 2, 0, 3)), repeats, 1)
            scores = ops.matmul(q, ops.transpose(k, (0, 1, 3, 2))) / (d**0.5)
            scores = scores + ops.triu(ops.full((s, s), -1e9, dtype=scores.dtype), 1)
            out = ops.matmul(ops.softmax(scores, -1), v)
            return ops.reshape(ops.transpose(out, (2, 0, 1, 3)), (s, b, n * d))

        def shard(self, *_: object) -> None:
            pass

    def unrepeated(self, x, repeats):  # type: ignore[no-untyped-def]
        return x

    importlib.import_module(f"{core}transformer.utils").is_legacy_model = lambda: False
    norm = importlib.import_module(f"{core}transformer.norm")
    norm.FusedNorm.__new__ = staticmethod(norm.Norm.__new__)
    importlib.import_module(f"{core}base_models.common.embeddings.rotary_pos_embedding").Outer = Product
    importlib.import_module(f"{core}base_models.gpt.gpt_layer_specs").FlashAttention = Attention
    for kind in vars(importlib.import_module(f"{core}transformer.attention")).values():
        if isinstance(kind, type) and "_repeat_kv" in vars(kind):
            kind._repeat_kv = unrepeated
    from mindformers.models.qwen3 import Qwen3Config
    from mindformers.models.qwen3.modeling_qwen3_train import TrainingQwen3ForCausalLM

    return TrainingQwen3ForCausalLM(Qwen3Config(**MCORE, **fields))


@dataclass(frozen=True)
class Case:
    """A class of transformers, a table with its layout, and MindFormers' network with its flags."""

    hf: str
    family: str
    layout: Mapping[str, str]
    build: Callable[[Mapping[str, object]], object]
    flags: Mapping[str, object]
    fields: Mapping[str, object]
    graph: bool = False


def llamas(cls: str, concat: str, **flags: object) -> Case:
    return Case(cls, "llama", {"qkv_concat": concat}, llama, flags, {})


def glms(concat: bool, rearranged: bool) -> Case:
    said = "concat" if concat else "split"
    layout = {"qkv": said, "mlp": said, "rope": "rearranged" if rearranged else "plain"}
    flags = {"qkv_concat": concat, "mlp_concat": concat, "use_rearrange_rope": rearranged}
    return Case("GlmForCausalLM", "glm4", layout, glm2, flags, {"head_dim": 8, "attention_bias": True})


def qwens(qkv: str, fc1: str) -> Case:
    flags = {"use_contiguous_weight_layout_attention": qkv == "contiguous",
             "use_interleaved_weight_layout_mlp": fc1 == "interleaved"}  # fmt: skip
    return Case("Qwen3ForCausalLM", "qwen3_mcore", {"qkv": qkv, "fc1": fc1}, qwen3, flags, {"head_dim": 16}, True)


CASES = {
    "llama off": llamas("LlamaForCausalLM", "off"),
    "llama grouped": llamas("LlamaForCausalLM", "grouped", qkv_concat=True),
    "qwen2 off": llamas("Qwen2ForCausalLM", "off", qkv_has_bias=True),
    "qwen2 grouped": llamas("Qwen2ForCausalLM", "grouped", qkv_has_bias=True, qkv_concat=True),
    "glm4 concat": glms(True, False),
    "glm4 split": glms(False, False),
    "glm4 concat rearranged": glms(True, True),
    "glm4 split rearranged": glms(False, True),
    "qwen3 grouped interleaved": qwens("grouped", "interleaved"),
    "qwen3 contiguous contiguous": qwens("contiguous", "contiguous"),
    "qwen3 grouped contiguous": qwens("grouped", "contiguous"),
}


def prepare(folder: Path) -> None:
    """Write each case's model, converted weights and logits."""
    import numpy as np
    import torch
    import transformers

    from lorabridge import ConvertOptions, convert

    for name, case in CASES.items():
        torch.manual_seed(7)
        fields = SIZES | dict(case.fields) | {"rms_norm_eps": 1e-6, "pad_token_id": 0}
        config = getattr(transformers, case.hf.replace("ForCausalLM", "Config"))(**fields)
        model = getattr(transformers, case.hf)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
            logits = model(torch.tensor(TOKENS)).logits.numpy()
        model.save_pretrained(folder / f"{name}.hf")
        options = ConvertOptions(family=case.family, layout=dict(case.layout), overwrite=True)
        convert(folder / f"{name}.hf", folder / f"{name}.ckpt", options)
        np.save(folder / f"{name}.npy", logits)


def run(folder: Path) -> None:
    """Load each case's weights into MindFormers' network and print how far the logits are apart."""
    import mindspore
    import numpy as np

    for name, case in CASES.items():
        mode = mindspore.GRAPH_MODE if case.graph else mindspore.PYNATIVE_MODE
        mindspore.set_context(mode=mode, device_target="CPU")
        net = case.build(case.flags)
        weights = mindspore.load_checkpoint(str(folder / f"{name}.ckpt"))
        missing, unused = mindspore.load_param_into_net(net, weights, True)
        assert not unused, unused
        assert all(key.endswith("_cache") for key in missing), missing
        net.set_train(False)  # type: ignore[attr-defined]
        net.add_flags_recursive(is_first_iteration=True)  # type: ignore[attr-defined]
        out = net(mindspore.Tensor(np.array(TOKENS), mindspore.int32))  # type: ignore[operator]
        logits = (out[0] if isinstance(out, tuple) else out).asnumpy().reshape(len(TOKENS), len(TOKENS[0]), -1)
        wanted = np.load(folder / f"{name}.npy")
        said = {"logits": np.abs(wanted).max(), "apart": np.abs(logits - wanted).max()}
        print(json.dumps({"case": name} | {key: float(f"{value:.3g}") for key, value in said.items()}), flush=True)


if __name__ == "__main__":
    {"prepare": prepare, "run": run}[sys.argv[1]](Path(sys.argv[2]))
