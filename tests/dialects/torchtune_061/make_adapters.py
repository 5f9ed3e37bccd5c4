"""Let torchtune 0.6.1 (torch 2.13) save adapters of a tiny Llama 3, or load one of ours.

python make_adapters.py save DIR            DIR/lora, DIR/dora: adapter_model.pt, adapter_config.json, logits.npy; for
                                            lora what torchtune itself exports to peft, export.npz;
                                            DIR/base.npz: the base by transformers' names, and the token ids
python make_adapters.py load DIR PT KIND    PT over DIR/base.npz: the largest difference to DIR/KIND/logits.npy
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torchtune.models.convert_weights import (
    hf_to_tune,
    tune_to_hf,
    tune_to_peft_adapter_config,
    tune_to_peft_adapter_weights,
)
from torchtune.models.llama3 import lora_llama3
from torchtune.modules.peft import get_adapter_params, get_lora_module_names

SIZES = {"num_heads": 4, "num_kv_heads": 2, "dim": 16, "head_dim": 4}
ATTENTION = ["q_proj", "k_proj", "output_proj"]


def build(kind):
    return lora_llama3(
        lora_attn_modules=ATTENTION, apply_lora_to_mlp=True, apply_lora_to_output=True, vocab_size=40, num_layers=2,
        num_heads=4, num_kv_heads=2, embed_dim=16, max_seq_len=16, rope_base=10000, intermediate_dim=24,
        lora_rank=3, lora_alpha=5, use_dora=kind == "dora",
    ).eval()  # fmt: skip


def save(folder):
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    ids = torch.randint(0, 40, (2, 6))
    for kind in ("lora", "dora"):
        torch.manual_seed(1)
        model = build(kind)
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                parameter.copy_(torch.randn(parameter.shape) * (0.1 if "lora" not in name else 0.3))
            for name, parameter in model.named_parameters():
                if name.endswith("magnitude"):
                    parameter.copy_(torch.rand(parameter.shape) + 0.5)
            logits = model(ids)
        adapter = get_adapter_params(model)
        (folder / kind).mkdir(exist_ok=True)
        torch.save({k: v.detach().clone() for k, v in adapter.items()}, folder / kind / "adapter_model.pt")
        config = {"r": 3, "lora_alpha": 5, "target_modules": get_lora_module_names(ATTENTION, True, True),
                  "peft_type": "LORA"}  # fmt: skip
        config = tune_to_peft_adapter_config(config, "tiny")
        (folder / kind / "adapter_config.json").write_text(json.dumps(config))
        np.save(folder / kind / "logits.npy", logits.numpy())
        if kind == "lora":
            export = tune_to_peft_adapter_weights({k: v.detach() for k, v in adapter.items()}, **SIZES)
            np.savez(folder / kind / "export.npz", **{k: v.numpy() for k, v in export.items()})
            plain = {k: v for k, v in model.state_dict().items() if k not in adapter}
            base = tune_to_hf({k: v.clone() for k, v in plain.items()}, **SIZES)
            np.savez(folder / "base.npz", ids=ids.numpy(), **{k: v.numpy() for k, v in base.items()})
        else:
            np.savez(folder / "base_dora.npz", **{
                k: v.numpy() for k, v in tune_to_hf(
                    {k: v.clone() for k, v in model.state_dict().items() if k not in adapter}, **SIZES).items()
            })  # fmt: skip


def load(folder, file):
    kind = sys.argv[4]
    model = build(kind)
    known = np.load(folder / ("base.npz" if kind == "lora" else "base_dora.npz"))
    state = hf_to_tune({k: torch.from_numpy(known[k]) for k in known if k != "ids"}, **SIZES)
    state |= torch.load(file, weights_only=True)
    print(model.load_state_dict(state, strict=True))
    with torch.no_grad():
        logits = model(torch.from_numpy(np.load(folder / "base.npz")["ids"]))
    print(np.abs(logits.numpy() - np.load(folder / kind / "logits.npy")).max())


if __name__ == "__main__":
    {"save": save, "load": load}[sys.argv[1]](*map(Path, sys.argv[2:4]))
