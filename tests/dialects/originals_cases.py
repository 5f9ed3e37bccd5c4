"""Files in the names of diffusion models' original code: made of small whole numbers, so that deltas are exact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch

Tensors = dict[str, torch.Tensor]
HIDDEN = 3072
FLUX = {
    "img_attn.qkv": (9216, 3072), "img_attn.proj": (3072, 3072), "img_mlp.0": (12288, 3072),
    "img_mlp.2": (3072, 12288), "img_mod.lin": (18432, 3072), "txt_attn.qkv": (9216, 3072),
    "txt_attn.proj": (3072, 3072), "txt_mlp.0": (12288, 3072), "txt_mlp.2": (3072, 12288), "txt_mod.lin": (18432, 3072),
}  # fmt: skip
FLUX_SINGLE = {"linear1": (21504, 3072), "linear2": (3072, 15360), "modulation.lin": (9216, 3072)}
FLUX_OTHER = {
    "img_in": (3072, 64), "txt_in": (3072, 4096), "time_in.in_layer": (3072, 256), "time_in.out_layer": (3072, 3072),
    "vector_in.in_layer": (3072, 768), "vector_in.out_layer": (3072, 3072), "guidance_in.in_layer": (3072, 256),
    "guidance_in.out_layer": (3072, 3072), "final_layer.linear": (64, 3072),
    "final_layer.adaLN_modulation.1": (6144, 3072),
}  # fmt: skip
XLABS = {
    "double_blocks.0.processor.qkv_lora1": (9216, 3072), "double_blocks.0.processor.qkv_lora2": (9216, 3072),
    "double_blocks.0.processor.proj_lora1": (3072, 3072), "double_blocks.0.processor.proj_lora2": (3072, 3072),
    "single_blocks.0.processor.qkv_lora": (9216, 3072), "single_blocks.0.processor.proj_lora": (3072, 15360),
}  # fmt: skip
HUNYUAN = {
    "double_blocks.0.img_attn_qkv": (9216, 3072), "double_blocks.0.img_attn_proj": (3072, 3072),
    "double_blocks.0.txt_attn_qkv": (9216, 3072), "double_blocks.0.txt_mlp.fc1": (12288, 3072),
    "double_blocks.0.img_mod.linear": (18432, 3072), "single_blocks.0.linear1": (21504, 3072),
    "single_blocks.0.linear2": (3072, 15360), "single_blocks.0.modulation.linear": (9216, 3072),
}  # fmt: skip
WAN = {
    **{f"{part}.{n}": (24, 24) for part in ("self_attn", "cross_attn") for n in "qkvo"},
    **{f"cross_attn.{n}": (24, 24) for n in ("k_img", "v_img")}, "ffn.0": (40, 24), "ffn.2": (24, 40),
}  # fmt: skip
AB, DOWN_UP = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
WAN_TINY = {
    "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 40, "text_dim": 16, "freq_dim": 8, "num_layers": 2,
    "image_dim": 20, "added_kv_proj_dim": 24, "in_channels": 4, "out_channels": 4,
}  # fmt: skip


def numbers(shape: Iterable[int], seed: int) -> torch.Tensor:
    """Return whole numbers from -3 to 3, by arithmetic alone."""
    shape = tuple(shape)
    count = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    mixed = (count * 2654435761 + seed * 40503 + (count >> 3) * (seed + 11)) % 1000003
    return (mixed % 7 - 3).reshape(shape).to(torch.float32)


def factors(shapes: Mapping[str, tuple[int, int]], rank: int, ends: tuple[str, str], alpha: float | None) -> Tensors:
    """Make the pair of every module, with an alpha where one is given."""
    out: Tensors = {}
    for number, (name, (rows, columns)) in enumerate(shapes.items()):
        out[f"{name}.{ends[0]}"] = numbers((rank, columns), 2 * number)
        out[f"{name}.{ends[1]}"] = numbers((rows, rank), 2 * number + 1)
        if alpha is not None:
            out[f"{name}.alpha"] = torch.tensor(alpha)
    return out


def flux_blocks(doubles: int, singles: int) -> dict[str, tuple[int, int]]:
    """Return the modules of the first blocks."""
    double = {f"double_blocks.{i}.{name}": shape for i in range(doubles) for name, shape in FLUX.items()}
    return double | {f"single_blocks.{i}.{name}": shape for i in range(singles) for name, shape in FLUX_SINGLE.items()}


def under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Put a prefix before every name."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def control() -> Tensors:
    """Make a control LoRA as Black Forest Labs writes one: every module, biases of B, whole norms.

    diffusers exchanges the halves of the last modulation's A, too, so both are equal here.
    """
    shapes = {**flux_blocks(19, 38), **FLUX_OTHER}
    out = {name: value.half() for name, value in factors(shapes, 2, AB, None).items()}
    last = "final_layer.adaLN_modulation.1.lora_A.weight"
    out[last] = out[last][:1].repeat(2, 1)
    for number, (name, (rows, _)) in enumerate(shapes.items()):
        out[f"{name}.lora_B.bias"] = numbers((rows,), number).half()
    norms = [f"double_blocks.{i}.{part}_attn.norm" for i in range(19) for part in ("img", "txt")]
    for number, name in enumerate([*norms, *(f"single_blocks.{i}.norm" for i in range(38))]):
        out |= {f"{name}.{which}.scale": numbers((128,), number + len(which)) for which in ("query_norm", "key_norm")}
    return out


def wan(prefix: str, ends: tuple[str, str], alpha: float | None, *, flat: bool = False) -> Tensors:
    """Make two blocks of Wan's image-to-video network."""
    shapes = {f"blocks.{i}.{name}": shape for i in range(2) for name, shape in WAN.items()}
    named = {prefix + (name.replace(".", "_") if flat else name): shape for name, shape in shapes.items()}
    return factors(named, 4, ends, alpha)


def with_biases(tensors: Tensors, of: str) -> Tensors:
    """Add a change of the bias to every module of a kind."""
    ups = [name for name in tensors if f".{of}." in name and name.endswith("lora_up.weight")]
    made = {name.replace("lora_up.weight", "diff_b"): numbers(tensors[name].shape[:1], len(name)) for name in ups}
    return {**tensors, **made}


COMFY = "diffusion_model."
BLOCKS = flux_blocks(1, 1)  # of the others diffusers 0.42.1 loses the component


def cases() -> dict[str, tuple[str, Tensors]]:
    """Return every file by name: the pipeline that reads it in diffusers, and its tensors."""
    return {
        "comfy_flux": ("Flux", under(COMFY, factors(BLOCKS, 4, DOWN_UP, 2.0))),
        "xlabs": ("Flux", factors(XLABS, 4, ("down.weight", "up.weight"), None)),
        "bfl": ("Flux", control()),
        "comfy_wan": ("Wan", wan(COMFY, AB, None)),
        "comfy_wan_alpha": ("Wan", with_biases(wan(COMFY, DOWN_UP, 2.0), "ffn")),
        "musubi_wan": ("Wan", wan("lora_unet_", DOWN_UP, 2.0, flat=True)),
        "comfy_hunyuan": ("HunyuanVideo", under(COMFY, factors(HUNYUAN, 4, AB, None))),
    }


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return :func:`every_digest`, or one digest of them where there are more than a hundred."""
    out = every_digest(tensors)
    if len(out) > 100:
        return {f"all {len(out)}": hashlib.sha256(json.dumps(out).encode()).hexdigest()[:16]}
    return out


def every_digest(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return, for a file of diffusers' names without alpha, a digest of what every module's delta does to a vector."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(".lora_A.weight"):
            up = tensors[name.replace("lora_A", "lora_B")].double()
            moved = up @ (tensor.double() @ (torch.arange(tensor.shape[1]) % 5 - 2).double())
            out[name.removesuffix(".lora_A.weight")] = digest(moved)
        elif not name.endswith(".lora_B.weight") and tensor.any():  # peft gives every module a bias, or none
            out[name] = digest(tensor.double())
    return dict(sorted(out.items()))


def digest(tensor: torch.Tensor) -> str:
    """Return the first digits of a tensor's hash; its numbers are whole or halves."""
    return hashlib.sha256((tensor * 16).to(torch.int64).numpy().tobytes()).hexdigest()[:16]
