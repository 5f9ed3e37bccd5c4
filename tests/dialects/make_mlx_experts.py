"""Write mlx_lm/experts: adapters that mlx-lm made for the experts of a small Qwen2-MoE, and what it computes from them.

    python make_mlx_experts.py        needs mlx-lm 0.32.2 and mlx (CPU) beside numpy

``fused.npz``: ``fuse()`` less the base weight, for every stack of experts, by the stack's path: ``[experts, out, in]``.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2_moe
from mlx_lm.tuner.lora import LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

FOLDER = Path(__file__).parent / "mlx_lm" / "experts"
PARAMETERS = {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": [
    "self_attn.q_proj", "mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj", "mlp.switch_mlp.down_proj",
]}  # fmt: skip
CONFIG = {
    "model_type": "qwen2_moe", "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 24,
    "num_attention_heads": 2, "num_experts_per_tok": 2, "num_experts": 3, "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8, "rms_norm_eps": 1e-6, "vocab_size": 32, "num_key_value_heads": 1,
}  # fmt: skip


def main() -> None:
    """Write the folder."""
    mx.set_default_device(mx.cpu)
    mx.random.seed(1)
    model = qwen2_moe.Model(qwen2_moe.ModelArgs.from_dict(CONFIG))
    model.freeze()
    linear_to_lora_layers(model, 1, PARAMETERS)
    trained = tree_flatten(model.trainable_parameters())
    model.load_weights([(name, mx.random.normal(value.shape)) for name, value in trained], strict=False)
    FOLDER.mkdir(exist_ok=True)
    mx.save_safetensors(str(FOLDER / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": PARAMETERS, "model": "qwen2_moe"}
    (FOLDER / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    deltas = {
        name: np.array(layer.fuse().weight - layer.linear.weight)
        for name, layer in model.named_modules()
        if isinstance(layer, LoRASwitchLinear)
    }
    np.savez(FOLDER / "fused.npz", **deltas)


if __name__ == "__main__":
    main()
