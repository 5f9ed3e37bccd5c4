"""Run adapted layers as peft and loralib do: their own classes, their own loading, their own reading of the config."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..dialects import factors
from ..dialects.adapter import LoraModule
from ..errors import MappingError
from ..frameworks import load
from .layer_side import Array, Layer

if TYPE_CHECKING:
    from collections.abc import Callable

Torch = Any
"""A module or tensor of torch, which has no place in signatures outside this file."""

CONFIG = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out")
"""Fields of adapter_config.json that decide what a layer computes; which layers exist is decided here."""


def run_peft(layer: Layer, x: Array) -> Array:
    """Wrap a plain layer with peft at the module's own path, let peft load the factors, and run it.

    peft resolves rank, alpha, patterns and rsLoRA from the adapter's own config; without one they are the module's.
    """
    torch, peft = load("torch"), load("peft")
    module, path = layer.module, layer.module.path
    plain = _plain(torch, layer)
    holder = _nest(torch, path, plain)
    model = peft.get_peft_model(holder, _config(peft, layer))
    state = {_peft_name(module, role): torch.from_numpy(array) for role, array in layer.tensors.items()}
    result = peft.set_peft_model_state_dict(model, state)
    lacking = [key for key in result.missing_keys if "lora_" in key]
    if lacking or result.unexpected_keys:
        raise MappingError(
            "peft does not load the factors", where=[path, *lacking, *map(str, result.unexpected_keys)],
            hint="check that adapter_config.json belongs to them",
        )  # fmt: skip
    model.eval()
    wrapped = model.base_model.model.get_submodule(path)
    if wrapped is plain:
        raise MappingError("peft did not adapt the layer", where=path, hint="check adapter_config.json")
    return _numpy(wrapped(torch.from_numpy(x)))


def _plain(torch: ModuleType, layer: Layer) -> Torch:
    """Build the frozen layer with its weights, on no device first so that nothing is initialised for nothing."""
    module, nn = layer.module, torch.nn
    weight, bias = layer.base.weight, layer.base.bias
    with torch.device("meta"):
        if module.kind == "embedding":
            plain = nn.Embedding(*weight.shape)
        elif module.kind == "linear" and module.fan_in_fan_out:
            load("transformers")
            from importlib import import_module

            plain = import_module("transformers.pytorch_utils").Conv1D(weight.shape[0], weight.shape[1])
            weight = np.ascontiguousarray(weight.T)
        elif module.kind == "linear":
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        else:
            convolution = getattr(nn, f"Conv{module.kind[4]}d")
            channels = weight.shape[1] * module.groups
            plain = convolution(
                channels, weight.shape[0], weight.shape[2:], groups=module.groups, bias=bias is not None
            )
    plain.weight = nn.Parameter(torch.from_numpy(weight), requires_grad=False)
    if getattr(plain, "bias", None) is not None:
        plain.bias = nn.Parameter(torch.from_numpy(np.zeros(module.out, weight.dtype) if bias is None else bias), False)
    return plain


def _nest(torch: ModuleType, path: str, leaf: Torch) -> Torch:
    """Put a layer at a dotted path below an empty module."""
    levels = path.split(".")
    inner = leaf
    for level in reversed(levels):
        outer = torch.nn.Module()
        outer.add_module(level, inner)
        inner = outer
    return inner


def _config(peft: ModuleType, layer: Layer) -> Torch:
    module = layer.module
    own: dict[str, object] = {
        "r": module.scaling.rank, "lora_alpha": module.scaling.alpha, "use_rslora": module.scaling.rslora,
        "use_dora": module.magnitude is not None, "lora_bias": module.lora_bias is not None,
        "fan_in_fan_out": bool(module.fan_in_fan_out),
    }  # fmt: skip
    given = layer.config or {}
    if "lora_alpha" in given:
        own |= {name: given[name] for name in CONFIG if name in given}
    if module.kind == "linear":
        own["fan_in_fan_out"] = bool(module.fan_in_fan_out)
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    unknown = [name for name, value in own.items() if value and name not in known]
    if unknown:
        raise MappingError(
            f"the installed peft {peft.__version__} does not know {', '.join(unknown)}", where=module.path,
            hint="upgrade peft",
        )  # fmt: skip
    own = {name: value for name, value in own.items() if name in known}
    return peft.LoraConfig(**own, target_modules=[module.path], init_lora_weights=False)


def _peft_name(module: LoraModule, role: str) -> str:
    place = f"base_model.model.{module.path}"
    if role == "magnitude":
        return f"{place}.lora_magnitude_vector"
    if role == "bias":
        return f"{place}.lora_B.bias"
    letter = role.upper()
    return f"{place}.lora_embedding_{letter}" if module.kind == "embedding" else f"{place}.lora_{letter}.weight"


def run_loralib(layer: Layer, x: Array) -> Array:
    """Build loralib's layer with the module's options, load its whole state strictly, and run it unmerged."""
    torch, loralib = load("torch"), load("loralib")
    module, base = layer.module, layer.base
    made = _loralib_layer(loralib, layer)
    state: dict[str, Array] = {"lora_A": layer.tensors["a"], "lora_B": layer.tensors["b"]}
    inside = "conv." if module.kind.startswith("conv") else ""
    state[f"{inside}weight"] = base.weight.T if module.kind == "linear" and module.fan_in_fan_out else base.weight
    if base.bias is not None:
        state[f"{inside}bias"] = base.bias
    made = made.to(torch.from_numpy(np.zeros(1, base.weight.dtype)).dtype)
    made.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in state.items()}, strict=True)
    return _numpy(made(torch.from_numpy(x)))


def _loralib_layer(loralib: ModuleType, layer: Layer) -> Torch:
    module, weight = layer.module, layer.base.weight
    options: dict[str, Any] = {"r": module.scaling.rank, "lora_alpha": module.scaling.alpha, "merge_weights": False}
    if module.kind == "embedding":
        return loralib.Embedding(*weight.shape, **options)
    options["bias"] = layer.base.bias is not None
    if module.kind == "linear":
        options["fan_in_fan_out"] = bool(module.fan_in_fan_out)
        if not module.plain:
            return loralib.MergedLinear(
                weight.shape[1], weight.shape[0], enable_lora=list(factors.as_merged(module)[2]), **options
            )
        return loralib.Linear(weight.shape[1], weight.shape[0], **options)
    kind: Callable[..., Torch] = getattr(loralib, f"Conv{module.kind[4]}d")
    return kind(weight.shape[1] * module.groups, weight.shape[0], weight.shape[2], groups=module.groups, **options)


def _numpy(y: Torch) -> Array:
    found: Array = y.detach().numpy()
    return found
