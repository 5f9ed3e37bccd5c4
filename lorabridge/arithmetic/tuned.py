"""What additive tuners compute from what they train: factors and deltas that are no copies of tensors.

| kernel | arguments | result |
|---|---|---|
| ``circulant`` | ``w[m, n, b]`` | C3A's delta ``[m b, n b]``: circulant blocks over the number of columns |
| ``mixture`` | logits ``[.., v]``, bank ``[v, l]`` | VB-LoRA: softmax of the highest ``value`` logits, times the bank |
| ``balanced`` | ``A[r, in]``, ``B[out, r]``, one number, norms ``[in]`` | DeLoRA's A, both factors' norms divided out |
| ``outer`` | ``l[r, n]``, ``A[r, k]``, ``g[n, k]`` | RandLora's scaled bases ``[r n, k]`` |
| ``scatter`` | numbers, ``[2, count]`` indices | SHiRA's sparse matrix |
| ``fourier`` | spectrum ``[count]`` | FourierFT's delta: real part of the inverse transform; seed ``value`` |
| ``projected`` | rows, weight, bias, weight, bias | a prefix through Dense, tanh, Dense |

All in float64; rounded once by the caller. FourierFT's places are those of ``torch.randperm`` with a generator of that
seed on a CPU: Mersenne twister (MT19937), one 32-bit number per exchange. Source: peft 0.21.2, ``tuners/*/layer.py``;
MindPet 1.0.4 for the projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..axes import Compute, Expr
from ..dtypes import DType

if TYPE_CHECKING:
    from .lowrank import Matrix

KERNELS = ("circulant", "mixture", "balanced", "outer", "scatter", "fourier", "projected")
MOST_PLACES = 2**32 // 20
"""From here on ``torch.randperm`` draws 64-bit numbers."""
LEAST_NORM = 1e-4
"""What DeLoRA takes for norms below it."""


def made(kernel: str, args: Sequence[Expr], shape: Sequence[int], dtype: DType, value: float = 0.0) -> Expr:
    """Stand for the result of one of ``KERNELS``; the caller has compared the shapes."""
    params = (("value", float(value)),) if kernel in ("mixture", "fourier") else ()
    return Compute(kernel, tuple(args), params, "", dtype, tuple(shape))


def compute(kernel: str, args: Sequence[Matrix], shape: Sequence[int], value: float) -> Matrix:
    """Run one kernel on float64 arrays; the result is not rounded yet. Raises KeyError for another name."""
    import numpy as np

    if kernel == "circulant":
        return _circulant(args[0])
    if kernel == "mixture":
        return _mixture(args[0], args[1], int(value))
    if kernel == "balanced":
        a, b, size, norms = args
        both = np.maximum(np.linalg.norm(a, axis=1), LEAST_NORM) * np.maximum(np.linalg.norm(b, axis=0), LEAST_NORM)
        scaled: Matrix = (float(size.reshape(-1)[0]) / a.shape[0] / both)[:, None] * a * norms[None, :]
        return scaled
    if kernel == "outer":
        first, a, last = args
        return np.ascontiguousarray((first[:, :, None] * a[:, None, :] * last[None]).reshape(tuple(shape)))
    if kernel == "scatter":
        out = np.zeros(tuple(shape))
        rows, columns = args[1].astype(np.int64)
        np.add.at(out, (rows, columns), args[0])
        return out
    if kernel == "fourier":
        return _fourier(args[0], tuple(shape), int(value))
    if kernel == "projected":
        rows, first, bias, second, last = args
        return np.asarray(np.tanh(rows @ first.T + bias) @ second.T + last)
    raise KeyError(kernel)


def _circulant(w: Matrix) -> Matrix:
    """Return C3A's delta: element ``[p, q]`` of a block of kernel w is ``w[(q - p) mod b]``."""
    import numpy as np

    m, n, b = w.shape
    rows, columns = np.indices((b, b))
    blocks = w[:, :, (columns - rows) % b]  # [m, n, b, b]
    return np.ascontiguousarray(blocks.transpose(0, 2, 1, 3).reshape(m * b, n * b)) / (n * b)


def _mixture(logits: Matrix, bank: Matrix, top: int) -> Matrix:
    import numpy as np

    chosen = np.argsort(-logits, axis=-1, kind="stable")[..., :top]
    kept = np.take_along_axis(logits, chosen, -1)
    weights = np.exp(kept - kept.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.asarray((weights[..., None] * bank[chosen]).sum(-2))


def _fourier(spectrum: Matrix, shape: tuple[int, ...], seed: int) -> Matrix:
    import numpy as np

    dense = np.zeros(shape)
    dense.reshape(-1)[places(spectrum.size, dense.size, seed)] = spectrum
    return np.ascontiguousarray(np.fft.ifft2(dense).real)


def places(count: int, size: int, seed: int) -> list[int]:
    """Return the first ``count`` numbers of ``torch.randperm(size)`` with a CPU generator of ``seed``.

    ValueError for a size from which torch draws otherwise, or a seed that a generator has not.
    """
    import numpy as np

    if size >= MOST_PLACES or not 0 <= seed < 2**32:
        raise ValueError(f"torch draws {size} places of seed {seed} in another way")
    twister = np.random.MT19937()
    twister._legacy_seeding(seed)  # what torch.Generator.manual_seed does
    drawn = twister.random_raw(min(count, size - 1))
    moved: dict[int, int] = {}
    out = []
    for first, number in enumerate(drawn.tolist()):
        other = first + number % (size - first)
        out.append(moved.get(other, other))
        moved[other] = moved.get(first, first)
    return out + [moved.get(size - 1, size - 1)] * (count - len(out))
