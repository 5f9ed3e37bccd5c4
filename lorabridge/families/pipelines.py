"""Single files of diffusion pipelines (CompVis, Stability AI, ComfyUI): which networks they hold, and whose tables fit.

A table is one network's. A single file has several under a prefix each; diffusers has a folder for each.
"""

from __future__ import annotations

from collections.abc import Iterable

from .models import detect_family

UNETS = ("sd15", "sd21", "sdxl", "sd3", "sd35_medium", "sd35_large", "flux")
TEXT = ("sd_clip", "sd_openclip")
PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("model.diffusion_model.", UNETS), ("first_stage_model.", ("sd_vae",)), ("vae.", ("sd_vae",)),
    ("cond_stage_model.", TEXT), ("conditioner.embedders.0.", TEXT), ("conditioner.embedders.1.", TEXT),
    ("text_encoders.clip_l.", TEXT), ("text_encoders.clip_g.", TEXT), ("text_encoders.t5xxl.", ("sd_t5",)),
)  # fmt: skip


def networks(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the prefix of each network that a single file holds, with the families that know all of its names."""
    from .tables import load_family

    names = list(names)
    held = {prefix: [name for name in names if name.startswith(prefix)] for prefix, _ in PARTS}
    return {
        prefix: tuple(detect_family({family: load_family(family) for family in families}, held[prefix], "ms"))
        for prefix, families in PARTS
        if held[prefix]
    }


def advice(names: Iterable[str]) -> str:
    """Say how to convert a single file of several networks; empty for any other file."""
    found = networks(names)
    if len(found) < 2:
        return ""
    ways = [f"--family {' or '.join(fit)} --include '{prefix}*'" for prefix, fit in found.items() if fit]
    return (
        f"this file holds several networks: convert each with --from ms --to hf and {'; '.join(ways)}" if ways else ""
    )
