"""Random inputs and random frozen layers, the same for the same seed and module path."""

from __future__ import annotations

import zlib

import numpy as np

from ..dialects.adapter import LoraModule
from ..dtypes import DType
from .layer_side import Array, Base

WIDTH = 64
"""Features that one input row uses, where at most as many rows as this cover all of them."""
LEAST = 4
"""Fewest sparse rows."""
TOKENS = 512
"""Tokens of one embedding input."""


def generator(seed: int, path: str) -> np.random.Generator:
    """Return the random numbers of one module."""
    return np.random.default_rng([seed, zlib.crc32(path.encode())])


def inputs(module: LoraModule, base: Base, rng: np.random.Generator, dtype: DType) -> Array:
    """Return inputs that exercise every input feature, and sums short enough for a sharp bound.

    Linear: rows that share the features out among themselves, each feature in one row, zero elsewhere, and one dense
    row. A dot product with k numbers that are not zero has an error of ``gamma(k)``, however wide it is, so that
    mistakes show which a bound for dense rows would have to allow. Convolutions do the same with channels.
    Embeddings: every token where they are few, else those whose column of A is trained first, by chance.
    """
    real = np.dtype(dtype.name)
    if module.kind == "embedding":
        count = base.weight.shape[0]
        return np.sort(rng.permutation(count)[:TOKENS]).astype(np.int64)
    width = base.weight.shape[1] * module.groups
    shares = _shares(width, rng)
    size = tuple(2 * k + 1 for k in module.kernel_size)
    x = np.zeros((len(shares) + 1, width, *size), real)
    for row, share in enumerate(shares):
        x[row, share] = rng.standard_normal((len(share), *size))
    x[-1] = rng.standard_normal((width, *size))
    return x


def _shares(width: int, rng: np.random.Generator) -> list[Array]:
    """Deal the features out to rows."""
    rows = min(WIDTH, max(LEAST, -(-width // WIDTH)), width)
    return [np.sort(share) for share in np.array_split(rng.permutation(width), rows)]


def random_base(module: LoraModule, norm: float, rng: np.random.Generator, dtype: DType) -> Base:
    """Return a frozen layer of the right shape, its weight as large as the delta, so that neither hides the other."""
    shape = weight_shape(module)
    size = float(np.prod(shape))
    scale = norm / np.sqrt(size) if np.isfinite(norm) and norm > 0 else 1 / np.sqrt(shape[-1])
    real = np.float64 if dtype.name == "float64" else np.float32
    weight = rng.random(shape, dtype=real)
    weight -= real(0.5)
    weight *= real(scale * np.sqrt(12))  # of standard deviation ``scale``
    if module.kind == "embedding":
        return Base(weight, None)
    return Base(weight, (rng.standard_normal(module.out) * scale).astype(real))


def weight_shape(module: LoraModule) -> tuple[int, ...]:
    """Return the shape of the frozen weight: ``[out, in]``, ``[num, dim]`` or ``[out, in / groups, *kernel]``."""
    a = module.terms[0].a.shape
    if module.kind == "embedding":
        return (a[1], module.out)
    if module.kind == "linear":
        return (module.out, a[1])
    channels = a[1] if module.conv_form == "peft" else a[1] // module.kernel_size[0]
    return (module.out, channels // module.groups, *module.kernel_size)
