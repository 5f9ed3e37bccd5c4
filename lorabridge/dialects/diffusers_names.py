"""Names in the LoRA files of diffusers' pipelines, old and new, as peft's names of one component."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

COMPONENTS = (
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior", "controlnet",
)  # fmt: skip
IMPLIED = {
    "down_blocks": "unet", "up_blocks": "unet", "mid_block": "unet", "conv_in": "unet", "conv_out": "unet",
    "time_embedding": "unet", "add_embedding": "unet", "transformer_blocks": "transformer",
    "single_transformer_blocks": "transformer", "text_model": "text_encoder",
}  # fmt: skip
"""First levels of names without a component, as attention processors and single networks are saved."""

AMBIGUOUS = ("transformer",)
"""Components that are also what other networks call their trunk; GPT-2's modules lie below ``transformer.h``."""

_OF_VIDEO = re.compile(r"blocks\.\d+\.attn[12]\.|condition_embedder\.")
"""Wan's modules; MPT's blocks are called ``transformer.blocks``, too."""

Role = Literal["factor", "alpha", "other"]
_ENDS = {
    ".lora.down.weight": ".lora_A.weight",
    ".lora.up.weight": ".lora_B.weight",
    ".lora_linear_layer.down.weight": ".lora_A.weight",
    ".lora_linear_layer.up.weight": ".lora_B.weight",
}
_PROCESSORS = {"to_q_lora": "to_q", "to_k_lora": "to_k", "to_v_lora": "to_v", "to_out_lora": "to_out.0"}
_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out.0": "out_proj"}


@dataclass(frozen=True, slots=True)
class Name:
    """One tensor: its component, the module's path in it, and its name as peft would spell it in that component alone.

    ``style``: which spelling it is in, "" for a tensor that is no factor. ``sure``: the name can only be a pipeline's.
    """

    original: str
    component: str
    path: str
    peft: str
    role: Role
    style: str
    sure: bool


def recognise(name: str) -> Name:
    """Take a name apart; what is not a factor keeps its name, for peft's reader to judge."""
    first, _, rest = name.partition(".")
    component = first if first in COMPONENTS else IMPLIED.get(first, "")
    inner = rest if first in COMPONENTS else name
    text = component.startswith("text_encoder")
    if inner.endswith(".alpha"):
        path, _ = _module(inner.removesuffix(".alpha").removesuffix(".lora"), text)
        return Name(name, component, path, "", "alpha", "", False)
    for end, new in _ENDS.items():
        if inner.endswith(end):
            path = inner.removesuffix(end)
            style = "lora_linear_layer" if "linear_layer" in end else "lora.down"
            return Name(name, component, path, f"base_model.model.{path}{new}", "factor", style, bool(component))
    for end, new in ((".down.weight", ".lora_A.weight"), (".up.weight", ".lora_B.weight")):
        path, old = _module(inner.removesuffix(end), text)
        if inner.endswith(end) and old:
            return Name(name, component, path, f"base_model.model.{path}{new}", "factor", "processor", bool(component))
    path, new_style, _ = inner.partition(".lora_")
    if not new_style:
        return Name(name, component, inner.rpartition(".")[0], f"base_model.model.{inner}", "other", "", False)
    known = first in COMPONENTS and (
        first not in AMBIGUOUS or rest.partition(".")[0] in IMPLIED or _OF_VIDEO.match(rest) is not None
    )
    return Name(name, component, path, f"base_model.model.{inner}", "factor", "lora_A", known)


def _module(path: str, text: bool) -> tuple[str, bool]:
    """Return the module that an attention processor's layer stands for, and whether it is one."""
    head, _, last = path.rpartition(".")
    plain = _PROCESSORS.get(last)
    if plain is None:
        return path, False
    own = _TEXT[plain] if text else plain
    return f"{head.removesuffix('.processor')}.{own}", True
