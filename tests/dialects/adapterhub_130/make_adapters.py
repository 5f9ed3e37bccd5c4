"""Let adapters 1.3.0 (transformers 4.57.6, torch 2.13) save LoRA of tiny models, or load one of ours.

python make_adapters.py save DIR           DIR/bert, DIR/gpt2: what save_adapter writes, base.npz and output.npy
python make_adapters.py load DIR ADAPTER   ADAPTER over DIR/base.npz: the largest difference to DIR/output.npy
"""

import sys
from pathlib import Path

import numpy as np
import torch
from adapters import LoRAConfig, init
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

MODELS = {
    "bert": lambda: BertModel(BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=24)),
    "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)),
}  # fmt: skip
CONFIGS = {
    "bert": {"attn_matrices": ["q", "v"], "intermediate_lora": True, "output_lora": True, "leave_out": [0]},
    "gpt2": {"attn_matrices": ["q", "v"], "intermediate_lora": True},
}
IDS = torch.arange(12).reshape(2, 6)


def save(folder):
    for kind, make in MODELS.items():
        torch.manual_seed(3)
        model = make().eval()
        (folder / kind).mkdir(parents=True, exist_ok=True)
        np.savez(folder / kind / "base.npz", **{k: v.numpy() for k, v in model.state_dict().items()})
        init(model)
        model.add_adapter("mine", config=LoRAConfig(r=3, alpha=5, dropout=0.1, **CONFIGS[kind]))
        model.set_active_adapters("mine")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "loras" in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.3)
        model.save_adapter(str(folder / kind), "mine")
        model.eval()
        with torch.no_grad():
            np.save(folder / kind / "output.npy", model(IDS).last_hidden_state.numpy())


def load(folder, adapter):
    known = np.load(folder / "base.npz")
    model = MODELS[folder.name]().eval()
    model.load_state_dict({k: torch.from_numpy(known[k]) for k in known})
    init(model)
    name = model.load_adapter(str(adapter))
    model.set_active_adapters(name)
    model.eval()
    with torch.no_grad():
        print(name, np.abs(model(IDS).last_hidden_state.numpy() - np.load(folder / "output.npy")).max())


if __name__ == "__main__":
    {"save": save, "load": load}[sys.argv[1]](*map(Path, sys.argv[2:4]))
