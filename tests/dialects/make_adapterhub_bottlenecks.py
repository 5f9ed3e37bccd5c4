"""Write the files of adapterhub_bottlenecks/ with the real adapters library, and judge what lorabridge wrote.

Made with adapters 1.3.0, transformers 4.57.6, torch 2.13.0:

    python tests/dialects/make_adapterhub_bottlenecks.py write    # NAME/, and outputs.npz: what each adapter computes
    python tests/dialects/make_adapterhub_bottlenecks.py judge DIR NAME   # a directory that lorabridge wrote back
"""

from __future__ import annotations

import sys
from pathlib import Path

import adapters
import numpy as np
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

HOME = Path(__file__).parent / "adapterhub_bottlenecks"
COMPACTER = {"reduction_factor": 2, "phm_dim": 1, "phm_rank": 2, "shared_phm_rule": False}
CONFIGS = {
    "houlsby": ("bert", adapters.DoubleSeqBnConfig(reduction_factor=2, non_linearity="gelu_new")),
    "scaled": ("bert", adapters.DoubleSeqBnConfig(reduction_factor=2, scaling=0.3, mh_adapter=False, leave_out=[0])),
    "compacter": ("bert", adapters.CompacterConfig(**COMPACTER, non_linearity="relu")),
    "gpt2": ("gpt2", adapters.DoubleSeqBnConfig(reduction_factor=4, non_linearity="relu")),
    "pfeiffer": ("bert", adapters.SeqBnConfig(reduction_factor=2)),
    "compacter_default": ("bert", adapters.CompacterConfig(reduction_factor=2)),
}


def model(kind: str) -> torch.nn.Module:
    torch.manual_seed(1)
    if kind == "gpt2":
        return GPT2Model(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=8))
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
    return BertModel(BertConfig(**sizes, vocab_size=20, max_position_embeddings=8))


def computed(network: torch.nn.Module, name: str) -> dict[str, np.ndarray]:
    """Return what every adapter makes of the same hidden states, by its place, and what the network makes of ids."""
    network.set_active_adapters(name)
    network.eval()
    hidden = torch.linspace(-3, 3, 24).reshape(3, 8)
    found = {}
    for place, module in network.named_modules():
        if place.endswith(f"adapters.{name}"):
            found[place.removesuffix(f".adapters.{name}")] = module(hidden, hidden)[0].detach().numpy()
    found["last_hidden_state"] = network(torch.arange(6)[None]).last_hidden_state.detach().numpy()
    return found


def write() -> None:
    outputs = {}
    HOME.mkdir(exist_ok=True)
    for name, (kind, config) in CONFIGS.items():
        network = model(kind)
        adapters.init(network)
        network.add_adapter(name, config=config)
        with torch.no_grad():
            for parameter_name, parameter in network.named_parameters():
                if ".adapters." in parameter_name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.5)
        network.save_adapter(str(HOME / name), name)
        if name != "compacter_default":  # its adapters compute only inside a run of the network
            outputs |= {f"{name}/{place}": value for place, value in computed(network, name).items()}
    np.savez(HOME / "outputs.npz", **outputs)


def judge(directory: str, original: str) -> None:
    network = model(CONFIGS[original][0])
    adapters.init(network)
    name = network.load_adapter(directory)
    wanted = np.load(HOME / "outputs.npz")
    for place, value in computed(network, name).items():
        apart = np.abs(value - wanted[f"{original}/{place}"]).max()
        print(f"{place}: {apart:.2g} apart")
        assert apart < 1e-6


if __name__ == "__main__":
    write() if sys.argv[1] == "write" else judge(*sys.argv[2:])
