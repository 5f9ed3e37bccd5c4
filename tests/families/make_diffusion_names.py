"""Write diffusion_names.json.gz: the parameters of diffusers' networks, and what diffusers makes of original files.

    python make_diffusion_names.py        needs diffusers 0.42.1 beside torch

``network``: name to shape of every parameter, on the meta device. ``original``: what each is made of in the original
code: runs of (name, first row, last row + 1), found by giving diffusers' converters tensors whose elements say where
they lie. A projection that is turned has its axes and rows exchanged: its run names the columns.
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
SD3 = {"num_attention_heads": 24, "num_layers": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
TRANSFORMERS = {
    "flux": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd35_medium": (
        "SD3Transformer2DModel",
        {**SD3, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    ),
    "sd35_large": (
        "SD3Transformer2DModel",
        {
            "num_attention_heads": 38, "num_layers": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    ),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", {}),
    "wan": (
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "text_dim": 16, "freq_dim": 8,
            "num_layers": 2, "image_dim": 20, "added_kv_proj_dim": 24,
        },
    ),
}  # fmt: skip
VAE = {
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2,
}  # fmt: skip
BIG = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280,
}  # fmt: skip
LAYOUTS = {"sd15": {"names": "original"}, "sd21": {"names": "original"}, "sdxl": {"names": "original"},
           "sd_vae": {"names": "original", "attention": "to_q"}, "sd_openclip": {"names": "original"}}  # fmt: skip
STEP = 1 << 20
Runs = list[tuple[str, int, int]]


def places(names: dict[str, tuple[int, ...]]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return a thin tensor for every name, whose elements count rows from a number of its own, and the names."""
    state = {}
    for number, (name, shape) in enumerate(names.items()):
        rows = torch.arange(max([1, *shape[:1]]), dtype=torch.float64) + number * STEP
        state[name] = rows.reshape(-1, *(1,) * (len(shape) - 1))
    return state, list(names)


def runs(tensor: torch.Tensor, names: list[str]) -> Runs:
    """Read off which rows of which tensors a converted tensor consists of."""
    out: Runs = []
    for value in tensor.reshape(-1).long().tolist():
        name, row = names[value // STEP], value % STEP
        if out and out[-1][0] == name and out[-1][2] == row:
            out[-1] = (name, out[-1][1], row + 1)
        else:
            out.append((name, row, row + 1))
    return out


def main() -> None:
    """Write the file."""
    import diffusers
    import transformers
    from diffusers.loaders import single_file_utils as theirs

    from lorabridge.families import tables

    out: dict[str, object] = {"diffusers": diffusers.__version__}
    networks = {family: ("UNet2DConditionModel", config) for family, config in CONFIGS.items()} | TRANSFORMERS
    networks |= {"sd_vae": ("AutoencoderKL", VAE), "sd_openclip": ("CLIPTextModelWithProjection", BIG)}
    for family, (kind, config) in networks.items():
        if kind.startswith("CLIP"):
            settings = transformers.CLIPTextConfig(**config)
            config = json.loads(settings.to_json_string(use_diff=False))
        with torch.device("meta"):
            network = (
                getattr(transformers, kind)(settings) if kind.startswith("CLIP") else getattr(diffusers, kind)(**config)
            )
        table = tables.load_family(family)
        sizes = tables.sizes_from_config(table, config) if table.sizes else {}
        layout = LAYOUTS.get(family, {})
        state, names = places(tables.names(table, sizes, "ms", layout=layout, architecture=kind, optional=True))
        if kind.startswith("CLIP"):
            found = theirs.convert_open_clip_checkpoint(network, state, "conditioner.embedders.1.model.")
        elif kind.startswith("Auto"):
            found = theirs.convert_ldm_vae_checkpoint(state, dict(network.config))
        elif kind.startswith("UNet"):
            found = theirs.convert_ldm_unet_checkpoint(state, dict(network.config))
        elif kind.startswith("Flux"):
            found = theirs.convert_flux_transformer_checkpoint_to_diffusers(state)
        elif kind.startswith("Hunyuan"):
            found = theirs.convert_hunyuan_video_transformer_to_diffusers(state)
        elif kind.startswith("Wan"):
            found = theirs.convert_wan_transformer_to_diffusers(state)
        else:
            found = theirs.convert_sd3_transformer_checkpoint_to_diffusers(state)
        out[family] = {
            "network": {name: list(tensor.shape) for name, tensor in network.state_dict().items()},
            "original": {name: runs(tensor, names) for name, tensor in found.items() if tensor is not None},
        }
    text = json.dumps(out, sort_keys=True).encode()
    (Path(__file__).parent / "diffusion_names.json.gz").write_bytes(gzip.compress(text, 9, mtime=0))


if __name__ == "__main__":
    main()
