"""peft's additive tuners beside the products: what each module's tensors are as a pair of factors.

| ``peft_type`` | tensors below the module | pair | rank |
|---|---|---|---|
| MISS | ``miss_block[r, out]`` (``mini``: repeated) | the block, and a repeated identity | ``r`` |
| VBLORA | ``vblora_logits_A[r, in / l, v]``, ``_B[out / l, r, v]`` | mixtures of a shared bank ``[v, l]`` | ``r`` |
| DELORA | ``delora_A``, ``_B``, ``_lambda``, ``_w_norm`` | ``A`` with all norms in it, ``B`` | ``r`` |
| PVERA | as VeRA, twice ``r`` | VeRA's of the means, which is what peft merges | ``r`` |
| GRALORA | ``gralora_A[k, in / k, r]``, ``_B[k, r, out / k]``, hybrid | blocks of zeros and slices | ``k r`` + hybrid |
| RANDLORA | ``randlora_lambda[r, n]``, ``_gamma[n, m]`` | scaled random bases | ``r n`` |
| C3A | ``c3a_kernel[m, n, b]`` | the delta and an identity | shorter side |
| SHIRA | ``shira_weight``, ``shira_indices`` | the same | shorter side |
| FOURIERFT | ``fourierft_spectrum`` | the same | shorter side |

Only elements that are computed are rounded, once, to float32. Source: peft 0.21.2, ``tuners/*/layer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..arithmetic import products, tuned
from ..axes import Expr, ShapeError, cut, join, read, reorder, reshape, zeros
from ..dtypes import BY_NAME
from ..tensors import TensorSpec

FLOAT = BY_NAME["float32"]
Specs = Mapping[str, TensorSpec]
Shape = tuple[int, int] | None
"""(out, in) of a module's weight, None where no base was given."""


class UnknownSizeError(Exception):
    """The base's shapes are needed and were not given."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """The numbers of a config that a pair needs, by field; a missing one has the tuner's default."""

    get: Callable[[str, float], float]
    mini: bool = False


def miss(specs: Specs, shape: Shape, numbers: Numbers) -> tuple[Expr, Expr, float]:
    """Return MiSS' pair: column i of the delta is row ``i mod r`` of the block."""
    block = read(specs["miss_block"])
    out, width = _known(shape)
    rank, rows = block.shape
    if numbers.mini:
        if out % rows:
            raise ShapeError(f"{rows} rows of a block do not repeat to {out}")
        block = join([block] * (out // rows), 1)
    one = products.identity(rank, block.dtype)
    parts = [one] * (width // rank) + ([cut(one, 1, 0, width % rank)] if width % rank else [])
    return join(parts, 1), reorder(block, (1, 0)), 1.0


def vblora(specs: Specs, shape: Shape, numbers: Numbers) -> tuple[Expr, Expr, float]:
    """Return VB-LoRA's pair, each factor a mixture of the shared bank's vectors."""
    first, last, bank = (read(specs[name]) for name in ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"))
    count, length = bank.shape
    if len(first.shape) != 3 or first.shape[2] != count or last.shape[1:] != (first.shape[0], count):
        raise ShapeError(f"logits {list(first.shape)} and {list(last.shape)} do not fit a bank of {list(bank.shape)}")
    top = numbers.get("topk", 2)
    kept = products.wide(bank)
    a, b = (tuned.made("mixture", (x, bank), (*x.shape[:2], length), kept, top) for x in (first, last))
    rank = first.shape[0]
    return reshape(a, (rank, first.shape[1] * length)), _columns(b, rank), 1.0


def _columns(b: Expr, rank: int) -> Expr:
    """Turn ``[tiles, rank, length]`` into ``[tiles * length, rank]``."""
    return reshape(reorder(b, (0, 2, 1)), (b.shape[0] * b.shape[2], rank))


def delora(specs: Specs, shape: Shape, numbers: Numbers) -> tuple[Expr, Expr, float]:
    """Return DeLoRA's pair: the norms of both factors divided out of A, those of the base's columns multiplied in."""
    a, b, size, norms = (read(specs[f"delora_{name}"]) for name in ("A", "B", "lambda", "w_norm"))
    if b.shape[1:] != a.shape[:1] or norms.shape != a.shape[1:] or math.prod(size.shape) != 1:
        raise ShapeError(f"delora_A {list(a.shape)}, _B {list(b.shape)} and _w_norm {list(norms.shape)} do not fit")
    return tuned.made("balanced", (a, b, size, norms), a.shape, products.wide(a, b)), b, 1.0


def pvera(specs: Specs, shape: Shape, numbers: Numbers) -> tuple[Expr, Expr, float]:
    """Return PVeRA's pair of the means; the variances are for sampling."""
    d, b = read(specs["pvera_lambda_d"]), read(specs["pvera_lambda_b"])
    whole_a, whole_b = read(specs["pvera_A"]), read(specs["pvera_B"])
    rank, kept = whole_b.shape[1], products.wide(d, b, whole_a, whole_b)
    if d.shape != (2 * rank,) or whole_a.shape[0] != 2 * rank or (shape and shape[1] > whole_a.shape[1]):
        raise ShapeError(f"pvera_A {list(whole_a.shape)} and pvera_B {list(whole_b.shape)} are not of one rank")
    a = cut(cut(whole_a, 0, 0, rank), 1, 0, _known(shape)[1])
    out = b.shape[0]
    return products.scale_rows(a, cut(d, 0, 0, rank), kept), products.scale_rows(cut(whole_b, 0, 0, out), b, kept), 1.0


def gralora(specs: Specs, shape: Shape, numbers: Numbers) -> tuple[Expr, Expr, float]:
    """Return GraLoRA's pair: one block of ``r / k`` ranks for each of the ``k * k`` blocks of the weight."""
    first, last = read(specs["gralora_A"]), read(specs["gralora_B"])
    k, width, rank = first.shape
    if last.shape[:2] != (k, rank) or rank % k:
        raise ShapeError(f"gralora_A {list(first.shape)} and gralora_B {list(last.shape)} do not fit")
    height, sub = last.shape[2], rank // k
    rows, columns = [], []
    for n in range(k):
        for o in range(k):
            a = reshape(cut(cut(first, 0, n, n + 1), 2, o * sub, (o + 1) * sub), (width, sub))
            b = reshape(cut(cut(last, 0, o, o + 1), 1, n * sub, (n + 1) * sub), (sub, height))
            rows.append(_placed(reorder(a, (1, 0)), 1, n, k))
            columns.append(_placed(reorder(b, (1, 0)), 0, o, k))
    hybrid = 0
    if "gralora_A_general.weight" in specs:
        rows.append(read(specs["gralora_A_general.weight"]))
        columns.append(read(specs["gralora_B_general.weight"]))
        hybrid = rows[-1].shape[0]
    return join(rows, 0), join(columns, 1), numbers.get("alpha", 64) / (rank + hybrid)


def _placed(x: Expr, axis: int, number: int, count: int) -> Expr:
    """Put a block between zeros: the ``number``-th of ``count`` along an axis."""
    empty = zeros(x.dtype, x.shape)
    return join([x if i == number else empty for i in range(count)], axis)


def randlora(specs: Specs, shape: Shape, numbers: Numbers) -> tuple[Expr, Expr, float]:
    """Return RandLora's pair: the smaller base scaled for every one of n, the larger as it is."""
    size, gamma = read(specs["randlora_lambda"]), read(specs["randlora_gamma"])
    first, last = read(specs["randlora_A"]), read(specs["randlora_B"])
    out, width = _known(shape)
    rank, n = size.shape
    least, most = min(out, width), max(out, width)
    if gamma.shape != (n, least) or first.shape[:2] != (rank, 1) or last.shape[0] < most or last.shape[2] != rank:
        raise ShapeError(f"randlora_gamma {list(gamma.shape)} and bases do not fit a weight of [{out}, {width}]")
    base = reshape(cut(first, 2, 0, least), (rank, least))
    small = tuned.made("outer", (size, base, gamma), (rank * n, least), products.wide(size, gamma, first, last))
    large = reshape(cut(cut(last, 0, 0, most), 1, 0, n), (most, n * rank))
    scaling = numbers.get("randlora_alpha", 640) / numbers.get("r", 32)
    if least == width:
        return small, large, scaling
    return reorder(large, (1, 0)), reorder(small, (1, 0)), scaling


def c3a(specs: Specs, shape: Shape, numbers: Numbers) -> tuple[Expr, Expr, float]:
    """Return C3A's circulant blocks as a whole matrix and an identity."""
    kernel = read(specs["c3a_kernel"])
    m, n, b = kernel.shape
    return (*products.whole_pair(tuned.made("circulant", (kernel,), (m * b, n * b), products.wide(kernel))), 1.0)


def shira(specs: Specs, shape: Shape, numbers: Numbers) -> tuple[Expr, Expr, float]:
    """Return SHiRA's sparse matrix and an identity."""
    weight, indices = read(specs["shira_weight"]), read(specs["shira_indices"])
    if indices.shape != (2, *weight.shape) or len(weight.shape) != 1:
        raise ShapeError(f"shira_weight {list(weight.shape)} and shira_indices {list(indices.shape)} do not fit")
    return (*products.whole_pair(tuned.made("scatter", (weight, indices), _known(shape), weight.dtype)), 1.0)


def fourierft(specs: Specs, shape: Shape, numbers: Numbers) -> tuple[Expr, Expr, float]:
    """Return FourierFT's delta and an identity."""
    spectrum, size = read(specs["fourierft_spectrum"]), _known(shape)
    seed = numbers.get("random_loc_seed", 777)
    if len(spectrum.shape) != 1:
        raise ShapeError(f"fourierft_spectrum {list(spectrum.shape)} is no vector")
    if math.prod(size) >= tuned.MOST_PLACES or not 0 <= seed < 2**32 or math.prod(spectrum.shape) > math.prod(size):
        raise ShapeError(f"the places of {list(spectrum.shape)} frequencies in {list(size)} are not known")
    made = tuned.made("fourier", (spectrum,), size, products.wide(spectrum), seed)
    return (*products.whole_pair(made), numbers.get("scaling", 150.0))


def _known(shape: Shape) -> tuple[int, int]:
    if shape is None:
        raise UnknownSizeError
    return shape


PAIRS = {
    "MISS": miss, "VBLORA": vblora, "DELORA": delora, "PVERA": pvera, "GRALORA": gralora, "RANDLORA": randlora,
    "C3A": c3a, "SHIRA": shira, "FOURIERFT": fourierft,
}  # fmt: skip
TENSORS: Mapping[str, tuple[str, ...]] = {
    "MISS": ("miss_block",), "VBLORA": ("vblora_logits_A", "vblora_logits_B"),
    "DELORA": ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
    "PVERA": ("pvera_lambda_b", "pvera_lambda_d"),
    "GRALORA": ("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"),
    "RANDLORA": ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"), "C3A": ("c3a_kernel",),
    "SHIRA": ("shira_weight", "shira_indices"), "FOURIERFT": ("fourierft_spectrum",),
}  # fmt: skip
SHARED: Mapping[str, tuple[str, ...]] = {
    "VBLORA": ("vblora_vector_bank",), "PVERA": ("pvera_A", "pvera_B"), "RANDLORA": ("randlora_A", "randlora_B"),
}  # fmt: skip
"""Tensors that lie once below ``base_model``, for all modules."""
DENSE = ("GRALORA", "RANDLORA", "C3A", "SHIRA", "FOURIERFT")
"""Tuners whose exact pair has a large rank."""
