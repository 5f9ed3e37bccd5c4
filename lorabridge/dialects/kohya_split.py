"""Files of sd-scripts' ``split_qkv``: parts of fused layers, trained with ``alpha / rank`` each.

``save_weights`` joins the parts: A one above the other, B as blocks on a diagonal, under the alpha of one part. Every
loader, sd-scripts' own too, divides that by the joined rank, and so applies a third of what was trained, or a quarter
for the layers that hold the MLP's part. Source: sd-scripts 48d368fa, networks/lora_flux.py and lora_sd3.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ..tensors import Source, TensorSpec

_FUSED = {
    3: re.compile(r"lora_unet_(double_blocks_\d+_(img|txt)_attn|joint_blocks_\d+_(x|context)_block_attn2?)_qkv"),
    4: re.compile(r"lora_unet_single_blocks_\d+_linear1"),
}
"""Layers whose parts are trained apart, by the number of parts; q, k and v are of one length, the MLP has the rest."""
_LENGTHS = {3: 3, 4: 3 + 4}
"""The length of all parts in lengths of q; the MLP's is the last."""


@dataclass(frozen=True, slots=True)
class Joined:
    """One fused layer whose rank is that of all parts, by its header; ``rows``: the first of each part, and the end."""

    up: str
    parts: int
    rank: int
    rows: tuple[int, ...]


def joined(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str], numbers: Mapping[str, object]) -> list[Joined]:
    """Return the layers that have the joined rank of parts under the alpha of one part, by headers and alphas alone.

    ``numbers``: alphas by the names of their tensors. A part's rank and alpha are those that sd-scripts wrote as
    ``ss_network_dim`` and ``ss_network_alpha``, or those of all other layers of the network; else nothing is known.
    """
    fused, others = [], set()
    for name, spec in specs.items():
        module, _, tensor = name.partition(".")
        alpha = numbers.get(f"{module}.alpha")
        if tensor != "lora_up.weight" or len(spec.shape) != 2 or not module.startswith("lora_unet_"):
            continue
        parts = next((parts for parts, pattern in _FUSED.items() if pattern.fullmatch(module)), 0)
        if parts:
            fused.append((name, spec, parts, alpha))
        else:
            others.add((spec.shape[1], alpha))
    one = _stated(metadata) or (others.pop() if len(others) == 1 else None)
    found = []
    for name, spec, parts, alpha in fused:
        (rows, rank), lengths = spec.shape, _LENGTHS[parts]
        if one is not None and alpha is not None and (rank, alpha) == (parts * one[0], one[1]) and not rows % lengths:
            starts = tuple(rows // lengths * part for part in range(parts))
            found.append(Joined(name, parts, rank, (*starts, rows)))
    return found


def _stated(metadata: Mapping[str, str]) -> tuple[int, object] | None:
    try:
        return int(metadata["ss_network_dim"]), float(metadata["ss_network_alpha"])
    except (KeyError, ValueError):
        return None


def is_split(one: Joined, source: Source) -> bool:
    """Say whether B is made of blocks on a diagonal, by the first and the last row of each part."""
    width = one.rank // one.parts
    for part in range(one.parts):
        for row in (one.rows[part], one.rows[part + 1] - 1):
            bits = source.read(one.up, (row, row + 1)).reshape(one.rank, -1)
            inside = int(bits[part * width : (part + 1) * width].any(-1).sum())
            if not inside or int(bits.any(-1).sum()) != inside:
                return False
    return True


def warnings(split: Mapping[str, object]) -> list[str]:
    """Say what is read of such layers. ``split``: the number of parts by the name of B."""
    told = []
    for parts in sorted({parts for parts in split.values() if isinstance(parts, int)}):
        names = sorted(name for name, value in split.items() if value == parts)
        some = names[0].partition(".")[0] + (" and others like it" if len(names) > 1 else "")
        told.append(
            f"{some}: trained in {parts} parts by sd-scripts' split_qkv and saved under the alpha of one, so that all "
            f"loaders, sd-scripts' own too, apply 1/{parts} of what was trained; so does what is read here"
        )
    return told
