"""MindPet 1.0.4's own cells: of MindFormers, which its package imports, three names are enough."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

import pytest
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer


class Linear(nn.Cell):
    """What MindFormers 2.1.0's Linear computes for two axes: in ``compute_dtype``, returned in the input's type."""

    def __init__(self, in_channels: int, out_channels: int, compute_dtype: object, param_init_type: object) -> None:
        super().__init__()
        weight = initializer(Normal(0.01), [out_channels, in_channels], param_init_type)
        self.weight = Parameter(weight, name="weight")
        self.bias = Parameter(initializer("zeros", [out_channels], param_init_type), name="bias")
        self.matmul, self.bias_add, self.cast = ops.MatMul(transpose_b=True), ops.Add(), ops.Cast()
        self.kind = compute_dtype

    def construct(self, x: Tensor) -> Tensor:
        y = self.matmul(self.cast(x, self.kind), self.cast(self.weight, self.kind))
        return self.cast(self.bias_add(y, self.cast(self.bias, self.kind)), x.dtype)


def mindpet(monkeypatch: pytest.MonkeyPatch, module: str) -> types.ModuleType:
    """Import a module of mindpet.delta; skip where mindpet is not installed."""
    if importlib.util.find_spec("mindpet") is None:
        pytest.skip("mindpet is not installed")

    def decorate(*types_: object, **names: object) -> object:
        return lambda function: function

    layers = types.ModuleType("mindformers.modules.layers")
    layers.Linear = Linear
    layers._args_type_validator_check = decorate
    layers._valid_value_checks = decorate
    if importlib.util.find_spec("mindformers") is None:
        for name in ("mindformers", "mindformers.modules"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "mindformers.modules.layers", layers)
        adapter = sys.modules.get("mindpet.delta.adapter")
        if adapter is not None:  # another test's stand-in may be its Linear
            monkeypatch.setattr(adapter, "_Linear", Linear)
    found = importlib.import_module(f"mindpet.delta.{module}")
    if module == "low_rank_adapter":  # relies on a method that MindSpore's cells had until 2.3
        monkeypatch.setattr(found.LowRankLinear, "cast", ops.Cast(), raising=False)
    return found
