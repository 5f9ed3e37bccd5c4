"""The products of weights and the scales of their blocks, exactly; ``numerics`` rounds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..axes import Compute
from .floats import Bits, Mask, Numbers, values


def products(node: Compute, args: Sequence[Bits]) -> Iterator[tuple[slice, Numbers]]:
    """Yield rows of a weight ``[out, in]`` times their scales, block row by block row, as float64.

    ``args``: the weight's and the scales' bits, ``[ceil(out / rows), ceil(in / columns)]``. 4 bits of a float8 times at
    most 24 of a scale: float64 holds the product.
    """
    rows, columns = (int(dict(node.params)[name]) for name in ("rows", "columns"))
    scales = values(args[1], node.args[1].dtype).reshape(node.args[1].shape)
    weight = args[0].reshape(node.shape)
    for k in range(len(scales)):
        where = slice(k * rows, min((k + 1) * rows, node.shape[0]))
        factors = np.repeat(scales[k], min(columns, node.shape[1]))[: node.shape[1]]
        yield where, values(np.ascontiguousarray(weight[where]), node.args[0].dtype).reshape(-1, len(factors)) * factors


def narrowed(exact: Numbers) -> tuple[Numbers, Mask]:
    """Round to float32, as the scripts do that multiply in it; also say where that changed a number."""
    with np.errstate(all="ignore"):
        near = exact.astype(np.float32).astype(np.float64)
    return near, near != exact
