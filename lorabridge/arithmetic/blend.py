"""Ways to make one tensor of several: weighted sums, sign election and pruning, as peft 0.21 defines them.

Tensors are stacked on axis 0 and all of one shape; everything is float64. Sources: TIES (Yadav et al. 2023), DARE (Yu
et al. 2023), and for every detail ``peft/utils/merge_utils.py``.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .floats import Mask, Numbers

Election = Literal["total", "frequency"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to blend: what to prune and whether signs are elected.

    ``pruning``: "none", "magnitude" (the largest of each tensor stay) or "random" (each element stays with probability
    ``density`` and is divided by it). ``elects``: only elements with the majority's sign count, and their weighted
    sum is divided by how many they are. ``election``: the majority is that of the sums or of the counts.
    """

    pruning: Literal["none", "magnitude", "random"] = "none"
    elects: bool = False
    density: float = 1.0
    election: Election = "total"
    seed: int = 0


def blend(tensors: Numbers, weights: Numbers, recipe: Recipe, *, key: str) -> Numbers:
    """Return one tensor for ``tensors[n, ...]`` and ``weights[n]``; ``key`` names the tensor for the random numbers."""
    pruned = np.stack([_pruned(tensor, recipe, f"{key}/{i}") for i, tensor in enumerate(tensors)])
    weighted = pruned * weights.reshape(-1, *(1,) * (tensors.ndim - 1))
    if not recipe.elects:
        return np.asarray(weighted.sum(axis=0))
    votes = pruned if recipe.election == "total" else np.sign(pruned)
    majority = np.where(votes.sum(axis=0) >= 0, 1.0, -1.0)
    agree = np.sign(pruned) == majority
    return np.asarray((weighted * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1.0))


def _pruned(tensor: Numbers, recipe: Recipe, key: str) -> Numbers:
    if recipe.pruning == "none" or recipe.density >= 1:
        return tensor
    if recipe.pruning == "random":
        return tensor * kept_at_random(tensor.shape, recipe.density, recipe.seed, key) / recipe.density
    return tensor * _largest(tensor, int(recipe.density * tensor.size))


def kept_at_random(shape: tuple[int, ...], density: float, seed: int, key: str) -> Mask:
    """Return which elements stay: the same for the same shape, seed and key on every machine."""
    stream = np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(key.encode())]))
    return np.asarray(np.random.Generator(stream).random(shape) < density)


def _largest(tensor: Numbers, count: int) -> Mask:
    """Mark the ``count`` elements of largest magnitude; among equal ones the first stay."""
    size = np.abs(tensor).reshape(-1)
    kept = np.zeros(size.shape, bool)
    if count:
        kept[np.argsort(-size, kind="stable")[:count]] = True
    return kept.reshape(tensor.shape)
