"""Let mlx-lm 0.32.2 on mlx 0.32.4 (CPU, Linux) save adapters of a tiny Llama, or load one of ours.

python make_adapters.py save DIR               DIR/lora, DIR/dora: adapters.safetensors, its config, logits.npy;
                                               DIR/base.npz: the base, with transformers' names, and the token ids
python make_adapters.py load DIR ADAPTER KIND  ADAPTER over DIR/base.npz: the logits' difference to DIR/KIND/logits.npy
"""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import save_config

ARGS = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "num_attention_heads": 2,
    "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 40, "tie_word_embeddings": False,
}  # fmt: skip
KEYS = {
    "lora": ["self_attn.q_proj", "mlp.down_proj", "model.embed_tokens", "lm_head"],
    "dora": ["self_attn.q_proj", "self_attn.v_proj"],
}


def base(folder):
    model = Model(ModelArgs.from_dict(ARGS))
    known = np.load(folder / "base.npz")
    model.update(tree_unflatten([(k, mx.array(known[k])) for k in known if k != "ids"]))
    return model, mx.array(known["ids"])


def save(folder):
    rng = np.random.default_rng(32)
    model = Model(ModelArgs.from_dict(ARGS))
    start = {k: (rng.standard_normal(v.shape) * 0.2).astype(np.float32) for k, v in tree_flatten(model.parameters())}
    folder.mkdir(exist_ok=True)
    np.savez(folder / "base.npz", ids=rng.integers(0, 40, (2, 6)), **start)
    for kind, keys in KEYS.items():
        model, ids = base(folder)
        model.freeze()
        parameters = {"rank": 3, "scale": 0.1 if kind == "lora" else 2.5, "dropout": 0.05, "keys": keys}
        linear_to_lora_layers(model, 1 if kind == "lora" else 2, parameters, use_dora=kind == "dora")
        for name, value in tree_flatten(model.trainable_parameters()):
            shift = mx.array((rng.standard_normal(value.shape) * 0.3).astype(np.float32))
            model.update(tree_unflatten([(name, value + shift)]))
        (folder / kind).mkdir(exist_ok=True)
        mx.save_safetensors(
            str(folder / kind / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters()))
        )
        config = {"fine_tune_type": kind, "num_layers": 1 if kind == "lora" else 2, "lora_parameters": parameters,
                  "model": "tiny", "batch_size": 4, "iters": 1000, "seed": 0, "resume_adapter_file": None}  # fmt: skip
        save_config(config, folder / kind / "adapter_config.json")
        model.eval()
        np.save(folder / kind / "logits.npy", np.array(model(ids)))


def load(folder, adapter):
    model, ids = base(folder)
    load_adapters(model, str(adapter))
    model.eval()
    print(np.abs(np.array(model(ids)) - np.load(folder / sys.argv[4] / "logits.npy")).max())


if __name__ == "__main__":
    {"save": save, "load": load}[sys.argv[1]](*map(Path, sys.argv[2:4]))
