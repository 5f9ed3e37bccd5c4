"""Run adapted layers as lorabridge's MindSpore cells, loaded by MindSpore under the names that the file has."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any

import numpy as np

from ..dialects import factors
from ..dialects.adapter import LoraModule
from ..errors import MappingError
from ..frameworks import load
from .layer_side import Array, Layer

Cell = Any
"""A cell of MindSpore, which has no place in signatures outside this file."""

NAMES = {
    "loralib-ms": {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector", "bias": "lora_bias"},
    "mindpet": {"a": "mindpet_delta_lora_a", "b": "mindpet_delta_lora_b"},
}
"""Parameter of each role, as the dialects write it."""


def run_cell(layer: Layer, x: Array) -> Array:
    """Build the cell with the module's options, load its parameters with nothing left over, and run it unmerged."""
    mindspore = load("mindspore")
    dora = layer.module.magnitude is not None  # its cells compute their first magnitudes from their first weights
    with nullcontext() if dora else _without_values():
        cell = mindspore.nn.SequentialCell([_cell(layer, mindspore)])
    cell.set_train(False)
    wanted = {f"0.{NAMES[layer.dialect][role]}": array for role, array in layer.tensors.items()}
    turned = layer.module.kind == "linear" and layer.module.fan_in_fan_out and layer.dialect == "loralib-ms"
    table = "embedding_table" if layer.module.kind == "embedding" else "weight"
    wanted[f"0.{table}"] = layer.base.weight.T if turned else layer.base.weight
    if layer.base.bias is not None:
        wanted["0.bias"] = layer.base.bias
    wanted = {name: np.ascontiguousarray(array) for name, array in wanted.items()}
    given = {name: mindspore.Parameter(mindspore.Tensor.from_numpy(array), name=name) for name, array in wanted.items()}
    absent, unused = mindspore.load_param_into_net(cell, given, strict_load=True)
    if absent or unused:
        raise MappingError(
            "the cell and the file have different parameters", where=[layer.module.path, *absent, *unused],
            hint="report this defect",
        )  # fmt: skip
    found: Array = cell(mindspore.Tensor(x)).asnumpy()
    return found


def _without_values() -> AbstractContextManager[None]:
    """Leave parameters without values where MindSpore can (2.5 and later): they are loaded anyway."""
    try:
        made: AbstractContextManager[None] = import_module("mindspore.nn.utils").no_init_parameters()
    except (ImportError, AttributeError):
        return nullcontext()
    return made


def _cell(layer: Layer, mindspore: Any) -> Cell:
    from .. import layers

    module, weight = layer.module, layer.base.weight
    dtype = mindspore.float64 if weight.dtype == np.float64 else mindspore.float32
    rank, alpha = module.scaling.rank, module.scaling.alpha
    if layer.dialect == "mindpet":
        return layers.LoRADense(
            weight.shape[1], weight.shape[0], rank, alpha, param_init_type=dtype, compute_dtype=dtype,
            has_bias=layer.base.bias is not None,
        )  # fmt: skip
    options: dict[str, Any] = {
        "r": rank, "lora_alpha": alpha, "merge_weights": False, "use_rslora": module.scaling.rslora,
        "use_dora": module.magnitude is not None, "dtype": dtype,
    }  # fmt: skip
    if module.kind == "embedding":
        return layers.Embedding(weight.shape[0], weight.shape[1], **options)
    options |= {"lora_bias": module.lora_bias is not None, "bias": layer.base.bias is not None}
    if module.kind == "linear":
        options["fan_in_fan_out"] = bool(module.fan_in_fan_out)
        if not module.plain:
            enabled = factors.as_merged(module)[2]
            return layers.MergedLinear(weight.shape[1], weight.shape[0], enable_lora=enabled, **options)
        return layers.Linear(weight.shape[1], weight.shape[0], **options)
    return _convolution(module, weight, options)


def _convolution(module: LoraModule, weight: Array, options: dict[str, Any]) -> Cell:
    from .. import layers

    kinds = {"conv1d": layers.Conv1d, "conv2d": layers.Conv2d, "conv3d": layers.Conv3d}
    return kinds[module.kind](
        weight.shape[1] * module.groups, weight.shape[0], weight.shape[2:], groups=module.groups,
        conv_form=module.conv_form, **options,
    )  # fmt: skip
