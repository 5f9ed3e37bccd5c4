"""Plain gradient descent, the same in both frameworks."""

from __future__ import annotations

import mindspore as ms
import torch
from judges import tensor


def descend_torch(module: torch.nn.Module, x: torch.Tensor, target: torch.Tensor, steps: int, rate: float) -> None:
    """Minimise the mean squared error by ``steps`` steps over the parameters that train."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        ((module(x) - target) ** 2).mean().backward()
        optimizer.step()


def descend_mindspore(cell: ms.nn.Cell, x: torch.Tensor, target: torch.Tensor, steps: int, rate: float) -> None:
    """Do what :func:`descend_torch` does."""
    ids = not x.is_floating_point()
    given = ms.Tensor(x.numpy()) if ids else tensor(x)
    wanted = tensor(target)
    weights = ms.ParameterTuple(cell.trainable_params())
    optimizer = ms.nn.SGD(weights, learning_rate=rate)
    gradients = ms.value_and_grad(lambda: ((cell(given) - wanted) ** 2).mean(), None, weights)
    for _ in range(steps):
        optimizer(gradients()[1])
