"""Build small mixture-of-experts networks of MindFormers on the CPU and write their parameters' names and shapes.

``python make_moe_names.py RELEASE [CASE...]`` adds to ``names/`` what ``make_mindformers_names.py`` writes for dense
networks, in the same form and by the same means; ``research`` of release 1.5.0 must be importable.
"""

from __future__ import annotations

import sys

from make_mindformers_names import CASES as DENSE
from make_mindformers_names import LLAMA, graph_training, mcore, network, stand_in, write

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


def telechat3(**fields: object) -> object:
    """Build TeleChat3-MoE, whose configuration does not hand the sizes of heads on: its network has the defaults'."""
    return graph_training(
        "telechat3_moe",
        "telechat3_moe",
        "TeleChat3MoeConfig",
        "TrainingTeleChat3MoeForCausalLM",
        **DEEPSEEK | GROUPED | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **fields,
    )


def deepseek3(part: str, cls: str, **fields: object) -> object:
    args = ("deepseek3", "deepseek_v3", "DeepseekV3Config", cls)
    if part == "train":
        return graph_training(*args, **DEEPSEEK | GROUPED | fields)
    return mcore(*args, part, **DEEPSEEK | GROUPED | fields)


OLD = {"batch_size": 1, "seq_length": 16, "hidden_size": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 40,
       "intermediate_size": 28, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
       "v_head_dim": 8, "mtp_depth": 1, "max_position_embeddings": 32, "offset": 0, "extend_method": "None",
       "compute_dtype": "float32"}  # fmt: skip
ROUTED = {"num_experts_chosen": 2, "routing_policy": "TopkRouterV2"}
BIASED = ROUTED | {"expert_num": 4, "shared_expert_num": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 10,
                   "topk_group": 1, "n_group": 1, "balance_via_topk_bias": True,
                   "topk_bias_update_rate": 0.001}  # fmt: skip


def without_groups() -> None:
    """Let layers that exchange tokens between devices be built without any other device; 1.3 has none."""
    try:
        import mindformers.modules.transformer.moev3 as layers
    except ModuleNotFoundError:
        return
    layers.create_group = lambda *_, **__: None


def llama(*, qkv: bool = False, bias: bool = False, predict: bool = False, **fields: object) -> object:
    from mindformers.models.llama import LlamaConfig, LlamaForCausalLM
    from mindformers.modules.transformer.moe import MoEConfig

    without_groups()
    made = MoEConfig(expert_num=3, **ROUTED | fields)
    more = {"use_past": True, "use_flash_attention": True} if predict else {}
    return LlamaForCausalLM(LlamaConfig(**LLAMA, qkv_concat=qkv, qkv_has_bias=bias, moe_config=made, **more))


def old_deepseek(**fields: object) -> object:
    without_groups()
    where = "research.deepseek3"
    return network(f"{where}.deepseek3_model_train", "TrainingDeepseekV3ForCausalLM", f"{where}.deepseek3_config",
                   "DeepseekV3Config", **OLD, moe_config=BIASED | fields)  # fmt: skip


def old_deepseek_inference(**fields: object) -> object:
    """Build DeepSeek-V3 for inference, as on one device."""
    import mindformers.experimental.parallel_core.pynative.parallel_state as state

    state._get_rank_helper = lambda *_, **__: 0
    state._get_world_size_helper = lambda *_, **__: 1
    state._get_group_helper = lambda *_, **__: ""
    without_groups()
    where = "research.deepseek3"
    own = OLD | {"use_past": True, "use_flash_attention": True, "router_dense_type": "float32"} | fields
    return network(f"{where}.deepseek3_model_infer", "InferenceDeepseekV3ForCausalLM", f"{where}.deepseek3_config",
                   "DeepseekV3Config", **own, moe_config=BIASED)  # fmt: skip


def deepseek2(module: str, **fields: object) -> object:
    """Build DeepSeek-V2: without the further layer and the balancing bias of DeepSeek-V3."""
    without_groups()
    fewer = {key: value for key, value in BIASED.items() if "topk_bias" not in key}
    made = fewer | {"topk_method": "group_limited_greedy"} | fields
    own = {key: value for key, value in OLD.items() if key != "mtp_depth"}
    where = "research.deepseek2"
    return network(f"{where}.{module}", "DeepseekV2ForCausalLM", f"{where}.deepseek2_config", "DeepseekV2Config",
                   **own, moe_config=made)  # fmt: skip


SHARED = {"shared_expert_num": 2, "use_shared_expert_gating": True}
MOE = {
    "1.3.0": {"deepseek2.1.3.0.whole": lambda: deepseek2("deepseek2")},
    "1.5.0": {
        "deepseek2.1.5.0.batched": lambda: deepseek2("deepseek2_model"),
        "deepseek2.1.5.0.grouped": lambda: deepseek2("deepseek2_model", use_gmm=True),
        "mixtral.1.5.0.batched": llama,
        "mixtral.1.5.0.grouped": lambda: llama(use_gmm=True),
        "mixtral.1.5.0.predict": lambda: llama(predict=True),
        "qwen2_moe.1.5.0.batched": lambda: llama(bias=True, **SHARED),
        "qwen2_moe.1.5.0.grouped": lambda: llama(bias=True, use_gmm=True, **SHARED),
        "qwen2_moe.1.5.0.predict_concat": lambda: llama(bias=True, qkv=True, predict=True, **SHARED),
        "deepseek3.1.5.0.batched": old_deepseek,
        "deepseek3.1.5.0.grouped": lambda: old_deepseek(use_gmm=True),
        "deepseek3.1.5.0.predict": old_deepseek_inference,
        "deepseek3.1.5.0.predict_concat": lambda: old_deepseek_inference(qkv_concat=True),
        "deepseek3.1.5.0.predict_direct": lambda: old_deepseek_inference(q_lora_rank=0),
    },
    "2.1.0": {
        "qwen3_moe_mcore.2.1.0.graph": lambda: qwen3("train", "TrainingQwen3MoeForCausalLM"),
        "qwen3_moe_mcore.2.1.0.predict": lambda: qwen3("infer", "InferenceQwen3MoeForCausalLM"),
        "deepseek3_mcore.2.1.0.graph": lambda: deepseek3(
            "train", "TrainingDeepseekV3ForCausalLM", mla_qkv_concat=False),
        "deepseek3_mcore.2.1.0.graph_concat": lambda: deepseek3(
            "train", "TrainingDeepseekV3ForCausalLM", mla_qkv_concat=True),
        "deepseek3_mcore.2.1.0.pynative": lambda: deepseek3("pynative", "PyNativeDeepseekV3ForCausalLM"),
        "deepseek3_mcore.2.1.0.predict": lambda: deepseek3("infer", "InferenceDeepseekV3ForCausalLM"),
        "deepseek3_mcore.2.1.0.direct_graph": lambda: deepseek3(
            "train", "TrainingDeepseekV3ForCausalLM", mla_qkv_concat=False, q_lora_rank=None),
        "deepseek3_mcore.2.1.0.direct_graph_concat": lambda: deepseek3(
            "train", "TrainingDeepseekV3ForCausalLM", mla_qkv_concat=True, q_lora_rank=None),
        "deepseek3_mcore.2.1.0.direct_pynative": lambda: deepseek3(
            "pynative", "PyNativeDeepseekV3ForCausalLM", q_lora_rank=None),
        "deepseek3_mcore.2.1.0.direct_predict": lambda: deepseek3(
            "infer", "InferenceDeepseekV3ForCausalLM", q_lora_rank=None),
        "deepseek3_mcore.2.1.0.telechat3_graph": lambda: telechat3(mla_qkv_concat=False),
        "deepseek3_mcore.2.1.0.telechat3_graph_concat": lambda: telechat3(mla_qkv_concat=True),
        "glm4_moe_mcore.2.1.0.predict": lambda: mcore(
            "glm4_moe", "glm4_moe", "Glm4MoeConfig", "InferenceGlm4MoeForCausalLM", "infer", **GLM),
    },
}  # fmt: skip

if __name__ == "__main__":
    import mindspore

    mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target="CPU")
    stand_in()
    DENSE.clear()
    DENSE.update(MOE)
    write(sys.argv[1], sys.argv[2:])
