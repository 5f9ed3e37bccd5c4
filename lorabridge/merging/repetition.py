"""Layers that are repeated: peft's ``layer_replication`` written out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..axes import Expr
from ..dialects.adapter import Json, Value
from ..errors import MappingError
from ..names import natural_key

STACKS = ("layers", "layer", "h", "blocks")
"""What the list of layers is called in Llama, BERT, GPT-2 and Falcon, and MindFormers."""
LOST = "\0lost/"
"""How a name begins that stands for a parameter of the base which the repeated model does not have."""


def repeat_layers(
    values: Mapping[str, Expr], ranges: Value, config: dict[str, Value] | None, label: str
) -> tuple[dict[str, Expr], dict[str, Value], str]:
    """Return the parameters with layers as the ranges list them, the config with their number, and a note.

    ``ranges``: ``[[start, stop], ...]`` of layers, stop excluded; the new layers are numbered from 0 (peft 0.21.2,
    ``helpers.replicate_layers``). Every copy is a parameter of its own from then on. Raises MappingError.
    """
    order = _order(ranges, label)
    numbered = {name: found for name in values if (found := _layer(name)) is not None}
    stacks = {stack for stack, _, _ in numbered.values()}
    layers = {number for _, number, _ in numbered.values()}
    if config is None or len(stacks) != 1 or layers != set(range(len(layers))) or max(order) >= len(layers):
        raise MappingError(
            f"layer_replication {ranges} does not fit the base, which has {len(layers)} layers",
            where=[label, *sorted(stacks)],
            hint="give the base model's config.json with --config, and check that it is the right base",
        )
    (stack,) = stacks
    by_layer: dict[int, list[tuple[str, Expr]]] = {}
    for name, (_, number, rest) in numbered.items():
        by_layer.setdefault(number, []).append((rest, values[name]))
    out = {name: value for name, value in values.items() if name not in numbered}
    for new, old in enumerate(order):
        out |= {f"{stack}.{new}.{rest}": value for rest, value in by_layer[old]}
    changed = dict(config)
    fields = [field for field in ("num_hidden_layers", "n_layer") if config.get(field) == len(layers)]
    for field in fields:
        changed[field] = len(order)
    for field, value in config.items():
        if isinstance(value, list) and len(value) == len(layers) and field.endswith(("_types", "_layers")):
            changed[field] = [value[old] for old in order]
    if not fields:
        raise MappingError("the config does not say how many layers the base has", where=label, hint="check --config")
    said = f"config: {fields[0]} {len(layers)} became {len(order)}: layer_replication repeats layers"
    return dict(sorted(out.items(), key=lambda row: natural_key(row[0]))), changed, said


def homes(names: Iterable[str], ranges: Value, label: str) -> dict[str, str]:
    """Return where each parameter of a base is first found after its layers were repeated.

    A layer that the ranges leave out is nowhere: its parameters get names that no model has (see :func:`origin`).
    """
    order = _order(ranges, label)
    found: dict[str, str] = {}
    for name in names:
        layer = _layer(name)
        if layer is not None:
            stack, number, rest = layer
            found[name] = f"{stack}.{order.index(number)}.{rest}" if number in order else LOST + name
    return found


def origin(name: str, ranges: Value, label: str) -> str:
    """Return what a parameter of a repeated model is called in its base; empty for a further copy of a layer."""
    if name.startswith(LOST):
        return name.removeprefix(LOST)
    layer, order = _layer(name), _order(ranges, label)
    if layer is None:
        return name
    stack, number, rest = layer
    if number >= len(order) or order[number] in order[:number]:
        return ""
    return f"{stack}.{order[number]}.{rest}"


def shortened(config: Json, ranges: Value, label: str) -> dict[str, Value]:
    """Return the config of a base whose layers were repeated; MappingError where layers of the base are missing."""
    order = _order(ranges, label)
    count = max(order) + 1
    missing = sorted(set(range(count)) - set(order))
    if missing:
        raise MappingError(
            "layers of the base are not in the merged model", where=[f"{label}: layer_replication {ranges}",
            f"missing: {', '.join(map(str, missing))}"], hint="pass --undo with the file that merge --undo wrote",
        )  # fmt: skip
    changed = dict(config)
    for field in ("num_hidden_layers", "n_layer"):
        if config.get(field) == len(order):
            changed[field] = count
    for field, value in config.items():
        if isinstance(value, list) and len(value) == len(order) and field.endswith(("_types", "_layers")):
            changed[field] = [value[order.index(old)] for old in range(count)]
    return changed


def _order(ranges: Value, label: str) -> list[int]:
    order: list[int] = []
    for span in ranges if isinstance(ranges, list) else [None]:
        if not (isinstance(span, list) and len(span) == 2 and all(isinstance(n, int) for n in span)):
            raise MappingError(f"layer_replication is {ranges}, not a list of ranges", where=label, hint="correct it")
        start, stop = (int(n) for n in span if isinstance(n, int))
        if not 0 <= start < stop <= 100_000:
            raise MappingError(f"layer_replication has the range {span}", where=label, hint="correct it")
        order += range(start, stop)
    return order


def _layer(name: str) -> tuple[str, int, str] | None:
    """Split a name into its stack, the layer's number and the rest."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        if parts[i].isascii() and parts[i].isdigit() and parts[i - 1] in STACKS:
            return ".".join(parts[:i]), int(parts[i]), ".".join(parts[i + 1 :])
    return None
