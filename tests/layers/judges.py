"""Carry values between torch modules and cells, and bound how far two correct computations can lie apart."""

from __future__ import annotations

from collections.abc import Mapping

import mindspore as ms
import numpy as np
import torch

TORCH = {ms.float32: torch.float32, ms.float16: torch.float16}
ROUNDOFF = {ms.float32: 2.0**-24, ms.float16: 2.0**-11}
TINY = {ms.float32: 2.0**-149, ms.float16: 2.0**-24}


def tensor(values: np.ndarray | torch.Tensor, dtype: object = ms.float32) -> ms.Tensor:
    """Return a MindSpore tensor of these values."""
    if isinstance(values, torch.Tensor):
        values = values.detach().float().numpy()
    return ms.Tensor(np.ascontiguousarray(values)).astype(dtype)


def array(values: ms.Tensor | torch.Tensor) -> np.ndarray:
    """Return the values in double precision."""
    if isinstance(values, torch.Tensor):
        return values.detach().double().numpy()
    return values.astype(ms.float32).asnumpy().astype(np.float64)


def give(cell: ms.nn.Cell, values: Mapping[str, torch.Tensor]) -> None:
    """Set every registered parameter of a cell, and nothing else, from torch tensors by name."""
    assert set(cell._params) == set(values), (set(cell._params), set(values))
    for name, value in values.items():
        parameter = cell._params[name]
        assert tuple(parameter.shape) == tuple(value.shape), name
        parameter.set_data(tensor(value, parameter.dtype))


def randomise(*parameters: torch.Tensor, seed: int = 0, scale: float = 0.3) -> None:
    """Give parameters normal values, so that no factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data = (torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype)


def assert_within(found: ms.Tensor, wanted: torch.Tensor, mass: np.ndarray, terms: int, dtype: object) -> None:
    """Compare two computations of one sum of products.

    Each result differs from the exact one by at most ``gamma(n) * mass`` (Higham 2002, section 3.1), with ``n`` the
    roundings on the way of a term, ``gamma(n) = n u / (1 - n u)`` and ``mass`` the sum of the terms' absolute values;
    half types may also underflow, by half of the smallest number each time.
    """
    assert tuple(found.shape) == tuple(wanted.shape)
    u = ROUNDOFF[dtype]
    assert terms * u < 0.5, "the bound says nothing for so many terms"
    bound = 2 * (terms * u / (1 - terms * u) * mass + terms * TINY[dtype])
    error = np.abs(array(found) - array(wanted))
    assert np.isfinite(array(found)).all()
    assert (error <= bound).all(), f"error {error.max():.3g}, {(error / bound).max():.3g} times the bound"
