"""Tensors of torch models as dialects see them, and the way back into torch."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from lorabridge import axes
from lorabridge.arithmetic import numerics
from lorabridge.dialects.adapter import Content, Fact, Facts
from lorabridge.dtypes import BY_TORCH, DType
from lorabridge.tensors import TensorSpec

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_of(tensor: torch.Tensor) -> DType:
    """The element type of a torch tensor."""
    return BY_TORCH[str(tensor.dtype).removeprefix("torch.")]


def facts(*rows):
    """Facts from (field, value) for every module, or (pattern, field, value)."""
    return Facts(tuple(Fact(*row) if len(row) == 3 else Fact("*", *row) for row in rows))


def content(tensors: Mapping[str, torch.Tensor], *rows, container="torch", **metadata):
    """What a dialect reads of a state dict."""
    specs = {
        name: TensorSpec(name, BY_TORCH[str(t.dtype).removeprefix("torch.")], tuple(t.shape))
        for name, t in tensors.items()
    }
    return Content(specs, {"container": container, **metadata}, None, facts(*rows), "file")


def evaluated(outputs, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run expressions over a state dict and return torch tensors."""

    def source(name):
        t = tensors[name].detach().contiguous()
        return t.view(WORDS[t.dtype.itemsize]).numpy().view(dtype_of(t).carrier())

    made = {}
    for name, expr in outputs:
        bits = axes.evaluate(expr, source, numerics.kernels(name, numerics.Notes(), {}))
        dtype = getattr(torch, expr.dtype.torch)
        word = np.dtype(f"i{bits.itemsize}")
        made[name] = torch.from_numpy(np.ascontiguousarray(bits).view(word).copy()).view(dtype)
    return made


def written(dialect, adapter, tensors, *rows):
    """Write an adapter and return its tensors and the facts about them."""
    made = dialect.write(adapter, facts(*rows))
    return evaluated(made.tensors, tensors), made
