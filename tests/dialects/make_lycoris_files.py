"""Write the files under lycoris/ with the real package: lycoris_lora 4.1.3, torch 2.13 (CPU).

    python make_lycoris_files.py        needs lycoris_lora, which brings packages that tests do without

Each file holds what LyCORIS saved for a small network, and its metadata the rank and the options. ``base.safetensors``
is the network itself; ``probes.safetensors`` has an input of every module and, for every file, what the adapted module
computed on it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent / "lycoris"
CASES: dict[str, dict[str, object]] = {
    "lora": {"algo": "lora"},
    "lora_rs": {"algo": "lora", "rs_lora": True},
    "lora_tucker": {"algo": "lora", "use_tucker": True},
    "lora_dora": {"algo": "lora", "dora_wd": True},
    "lora_dora_per_input": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha"},
    "loha_tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr_both": {"algo": "lokr", "factor": 6, "decompose_both": True, "linear_dim": 1},
    "lokr_tucker": {"algo": "lokr", "factor": 4, "use_tucker": True, "linear_dim": 2},
    "lokr_whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "full": {"algo": "full"},
    "glora": {"algo": "glora"},
    "ia3": {"algo": "ia3"},
    "oft": {"algo": "diag-oft"},
}


class Block(torch.nn.Module):
    """One layer of each kind; the full algorithm also trains biases, so there are none."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(24, 36, bias=False)
        self.conv = torch.nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False)
        self.point_wise = torch.nn.Conv2d(8, 16, 1, bias=False)


class Net(torch.nn.Module):
    """Give the modules a parent, so that flattened names have a dot to lose."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()


def main() -> None:
    """Write every file."""
    import lycoris

    HERE.mkdir(exist_ok=True)
    torch.manual_seed(0)
    base = Net()
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    save_file(weights, HERE / "base.safetensors")
    probes = {"x.fc": torch.randn(3, 24), "x.conv": torch.randn(1, 16, 5, 5), "x.point_wise": torch.randn(2, 8, 4, 4)}
    for name, options in CASES.items():
        net, plain = Net(), Net()
        net.load_state_dict(weights)
        plain.load_state_dict(weights)
        given = {"linear_dim": 4, "linear_alpha": 2.0, "conv_dim": 4, "conv_alpha": 1.0, **options}
        if given["linear_dim"] != 4:
            given["conv_dim"] = given["linear_dim"]
        lycoris.LycorisNetwork.apply_preset({"target_module": ["Block"], "enable_conv": True})
        given.update(preset="full", multiplier=1.0)
        adapter = lycoris.create_lycoris(net, **given)
        adapter.apply_to()  # only now are they its parameters
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter) / 3)
            for layer in ("fc", "conv", "point_wise"):
                probes[f"{name}.{layer}"] = getattr(net.block, layer)(probes[f"x.{layer}"])
                assert not torch.equal(probes[f"{name}.{layer}"], getattr(plain.block, layer)(probes[f"x.{layer}"]))
        tensors = {key: value.contiguous().clone() for key, value in adapter.state_dict().items()}
        save_file(tensors, HERE / f"{name}.safetensors", {"lycoris_options": repr(given)})
        print(name, {key.partition("_block_")[2]: tuple(value.shape) for key, value in tensors.items()})
    save_file({key: value.clone() for key, value in probes.items()}, HERE / "probes.safetensors")


if __name__ == "__main__":
    main()
