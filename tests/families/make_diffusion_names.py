"""Write diffusion_names.json.gz: the parameters of diffusers' networks, and what diffusers takes them for in LDM files.

    python make_diffusion_names.py        needs diffusers 0.42.1 beside torch

Every parameter of the U-Nets of Stable Diffusion 1.5, 2.1 and XL (``network``: name to shape, on the meta device); and
``original``: the name in the original code, found by giving ``convert_ldm_unet_checkpoint`` a tensor for each of the
table's names and looking where it ends up. MindSpore's norms have gamma and beta, PyTorch's weight and bias.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch

SDXL = {
    "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10], "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
CONFIGS = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    "sd21": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl": SDXL,
}
NORMS = {"gamma": "weight", "beta": "bias"}


def main() -> None:
    """Write the file."""
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    from lorabridge.families import tables

    out: dict[str, object] = {"diffusers": diffusers.__version__}
    for family, config in CONFIGS.items():
        with torch.device("meta"):
            network = diffusers.UNet2DConditionModel(**config)
        shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
        state, labels = {}, {}
        for name in tables.names(tables.load_family(family), {}, "ms"):
            path, _, leaf = name.rpartition(".")
            state[f"{path}.{NORMS.get(leaf, leaf)}"] = torch.full((1,), float(len(labels)))
            labels[float(len(labels))] = name
        found = convert_ldm_unet_checkpoint(state, dict(network.config))
        out[family] = {
            "network": shapes,
            "original": {name: labels[float(tensor)] for name, tensor in found.items()},
        }
    text = json.dumps(out, sort_keys=True).encode()
    (Path(__file__).parent / "diffusion_names.json.gz").write_bytes(gzip.compress(text, 9, mtime=0))


if __name__ == "__main__":
    main()
