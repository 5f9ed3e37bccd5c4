"""Build small mixture-of-experts networks of MindFormers on the CPU and write their parameters' names and shapes.

``python make_moe_names.py RELEASE [CASE...]`` adds to ``names/`` what ``make_mindformers_names.py`` writes for dense
networks, in the same form and by the same means.
"""

from __future__ import annotations

import sys

from make_mindformers_names import CASES as DENSE
from make_mindformers_names import graph_training, mcore, stand_in, write

QWEN = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2,
        "vocab_size": 128, "max_position_embeddings": 64, "tie_word_embeddings": False}  # fmt: skip
DEEPSEEK = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
            "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 4, "n_shared_experts": 2,
            "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "vocab_size": 128,
            "max_position_embeddings": 64, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 8,
            "v_head_dim": 16, "qk_nope_head_dim": 12, "num_nextn_predict_layers": 1,
            "routed_scaling_factor": 2.5, "qk_layernorm": True}  # fmt: skip
GLM = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
       "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 4, "n_shared_experts": 1,
       "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "vocab_size": 128,
       "max_position_embeddings": 64, "use_qk_norm": True, "attention_bias": True}  # fmt: skip


GROUPED = {"moe_grouped_gemm": True}


def qwen3(part: str, cls: str, **fields: object) -> object:
    args = ("qwen3_moe", "qwen3_moe", "Qwen3MoeConfig", cls)
    if part == "train":
        return graph_training(*args, **QWEN | GROUPED | fields)
    return mcore(*args, part, **QWEN | fields)


def deepseek3(part: str, cls: str, **fields: object) -> object:
    args = ("deepseek3", "deepseek_v3", "DeepseekV3Config", cls)
    if part == "train":
        return graph_training(*args, **DEEPSEEK | GROUPED | fields)
    return mcore(*args, part, **DEEPSEEK | GROUPED | fields)


MOE = {
    "2.1.0": {
        "qwen3_moe.2.1.0.graph": lambda: qwen3("train", "TrainingQwen3MoeForCausalLM"),
        "qwen3_moe.2.1.0.predict": lambda: qwen3("infer", "InferenceQwen3MoeForCausalLM"),
        "deepseek3.2.1.0.graph": lambda: deepseek3("train", "TrainingDeepseekV3ForCausalLM", mla_qkv_concat=False),
        "deepseek3.2.1.0.graph_concat": lambda: deepseek3(
            "train", "TrainingDeepseekV3ForCausalLM", mla_qkv_concat=True),
        "deepseek3.2.1.0.pynative": lambda: deepseek3("pynative", "PyNativeDeepseekV3ForCausalLM"),
        "deepseek3.2.1.0.predict": lambda: deepseek3("infer", "InferenceDeepseekV3ForCausalLM"),
        "glm4_moe.2.1.0.predict": lambda: mcore(
            "glm4_moe", "glm4_moe", "Glm4MoeConfig", "InferenceGlm4MoeForCausalLM", "infer", **GLM),
        "telechat3_moe.2.1.0.graph": lambda: graph_training(
            "telechat3_moe", "telechat3_moe", "TeleChat3MoeConfig", "TrainingTeleChat3MoeForCausalLM",
            **DEEPSEEK | GROUPED),
    },
}  # fmt: skip

if __name__ == "__main__":
    import mindspore

    mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target="CPU")
    stand_in()
    DENSE.clear()
    DENSE.update(MOE)
    write(sys.argv[1], sys.argv[2:])
