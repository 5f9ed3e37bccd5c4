"""Merging and converting commute, for any table: convert(merge(W, A)) == merge(convert(W), convert(A))."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from lorabridge import axes
from lorabridge.dialects.adapter import Adapter, Extra, LoraModule, Scaling, Term
from lorabridge.families.models import Index, resolve
from lorabridge.families.rules import Slot
from lorabridge.families.tables import Table, map_adapter

from .conftest import F64, Store, delta

KINDS = ("plain", "rslora", "dora", "lora_bias", "bias", "modules_to_save")
Model = dict[str, np.ndarray]


def modules_of(table: Table, shapes: Mapping[str, tuple[int, ...]], layout: Mapping[str, str]) -> dict[str, Slot]:
    """Return the hf side's linear modules and embeddings that the table maps under a layout."""
    variant = resolve(table, shapes, side="hf", layout=layout)
    index = Index(table, "hf", (variant.hf_prefix,))
    found = {}
    for name, shape in shapes.items():
        for hit in index.find(name.rpartition(".")[0]) if len(shape) == 2 else ():
            slot = hit.what
            if isinstance(slot, Slot) and slot.field == "module" and slot.rule.holds(variant.layout):
                found[name.rpartition(".")[0]] = slot
    return found


def adapter_on(
    store: Store, table: Table, shapes: Mapping[str, tuple[int, ...]], *, layout: Mapping[str, str], kind: str
) -> Adapter:
    """Return an adapter of one kind on every module of a model that can have it."""
    modules, extras = [], []
    for path, slot in modules_of(table, shapes, layout).items():
        face = slot.rule.hf
        linear = slot.rule.kind == "linear"
        first, second = shapes[f"{path}.{face.weight}"]
        out, inner = (first, second) if linear and face.order == "out in" else (second, first)
        if kind == "modules_to_save":
            extras.append(Extra(path, face.weight, store.random(f"{path}.saved", (first, second)), "modules_to_save"))
            continue
        a, b = store.random(f"{path}.a", (2, inner)), store.random(f"{path}.b", (out, 2))
        module = LoraModule(path, slot.rule.kind, out, (Term(a, b, 0, out),), Scaling(3.0, 2, kind == "rslora"))  # type: ignore[arg-type]
        if kind == "dora" and linear:
            module = replace(module, magnitude=store.random(f"{path}.m", (out,)))
        if kind == "lora_bias" and linear and f"{path}.bias" in shapes:
            module = replace(module, lora_bias=store.random(f"{path}.lb", (out,)))
        modules.append(module)
    if kind in ("bias", "modules_to_save"):
        told = "bias" if kind == "bias" else "modules_to_save"
        for name, shape in shapes.items():
            path, _, parameter = name.rpartition(".")
            if len(shape) == 1 and (parameter == "bias" or kind == "modules_to_save"):
                extras.append(Extra(path, parameter, store.random(f"{name}.trained", shape), told))  # type: ignore[arg-type]
    return Adapter(tuple(modules), tuple(extras))


def item_of(made: Model, module: LoraModule) -> np.ndarray:
    """Return a view of one expert's matrix in the tensor that stacks them."""
    assert module.stack is not None
    made[module.stack.parameter] = np.ascontiguousarray(made[module.stack.parameter])
    whole = made[module.stack.parameter]
    return whole.reshape(module.stack.count or 0, -1, whole.shape[-1])[module.stack.number]


def merged(store: Store, base: Mapping[str, np.ndarray], adapter: Adapter) -> Model:
    """Return a model's parameters after merging (DoRA, Liu et al. 2024: rows rescaled to the magnitude)."""
    made = {name: values.copy() for name, values in base.items()}
    for extra in adapter.extras:
        assert extra.name in made, extra.name
        made[extra.name] = store.value(extra.value)
    for module in adapter.modules:
        name = f"{module.path}.{module.weight}"
        name = name if name in made else f"{module.path}.weight"
        turned = module.kind == "embedding" or bool(module.fan_in_fan_out)
        stored = made[name] if name in made else item_of(made, module)
        weight = stored.T if turned else stored
        total = weight + delta(store, module, weight.shape[1])
        if module.magnitude is not None:
            total *= (store.value(module.magnitude) / np.linalg.norm(total, axis=1))[:, None]
        if name in made:
            made[name] = total.T if turned else total
        else:
            item_of(made, module)[...] = total.T if turned else total
        if module.lora_bias is not None:
            beside = "in_proj_bias" if module.weight == "in_proj_weight" else "bias"
            made[f"{module.path}.{beside}"] = made[f"{module.path}.{beside}"] + module.scaling.value * store.value(
                module.lora_bias
            )
    return made


def square(
    store: Store, table: Table, shapes: Mapping[str, tuple[int, ...]], *, sizes: dict[str, int],
    layout: Mapping[str, str], kind: str,
) -> int:  # fmt: skip
    """Compare merging first with converting first over a whole model; return how many modules were adapted."""
    adapter = adapter_on(store, table, shapes, layout=layout, kind=kind)
    slots = modules_of(table, shapes, layout)
    stored = [replace(m, fan_in_fan_out=slots[m.path].rule.hf.order == "in out") for m in adapter.modules]
    base = {name: store.value(store.random(name, shape)) for name, shape in shapes.items()}
    chosen = {key: choice for key, choice in layout.items() if key != "hf_prefix"}

    def converted(model: Mapping[str, np.ndarray], label: str) -> Model:
        for name, values in model.items():
            store.bits[f"{label}{name}"] = np.ascontiguousarray(values).view("<u8").reshape(values.shape)
        extras = [
            Extra(*n.rpartition(".")[::2], axes.Read(f"{label}{n}", F64, v.shape), "base") for n, v in model.items()
        ]
        there = map_adapter(table, Adapter((), tuple(extras)), to="ms", sizes=sizes, layout=chosen)
        return {extra.name: store.value(extra.value) for extra in there.extras}

    first = converted(merged(store, base, replace(adapter, modules=tuple(stored))), "merged:")
    theirs = map_adapter(table, adapter, to="ms", sizes=sizes, layout=chosen)
    second = merged(store, converted(base, "base:"), theirs)
    assert set(first) == set(second)
    for name, values in first.items():
        np.testing.assert_allclose(values, second[name], rtol=1e-11, atol=1e-11, err_msg=name)
    return len(theirs.modules) + len(theirs.extras)
