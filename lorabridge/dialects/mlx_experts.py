"""Experts in MLX-LM's adapters: ``P.switch_mlp.gate_proj.lora_a[E, r, in]``, ``.lora_b[E, out, r]``.

Unlike its linear layers these are not turned around. mlx-lm's models stack what transformers' files have one by one,
``P.experts.N.gate_proj``, and Mixtral's ``P.block_sparse_moe.experts.N.w1``, ``w3``, ``w2``; expert N is the module of
that name here. Source: mlx-lm 0.32.2, tuner/lora.py (LoRASwitchLinear) and ``sanitize`` of models/*.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..axes import Expr, ShapeError, join, read, reshape
from ..errors import MappingError, counted
from ..tensors import TensorSpec
from .adapter import LoraModule, Scaling
from .experts import experts_apart
from .pairs import Problems

STACK = "switch_mlp"
_STACK = re.compile(r"^(?P<path>.+)\.switch_mlp\.(?P<name>[a-z0-9_]+)$")
_EXPERT = re.compile(r"^(?P<path>.+)\.experts\.(?P<number>\d+)\.(?P<name>[a-z0-9_]+)$")
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def is_stack(path: str, specs: Mapping[str, TensorSpec]) -> bool:
    """Say whether a module's factors are a stack of experts."""
    return all(len(specs[role].shape) == 3 for role in ("a", "b") if role in specs) and _STACK.match(path) is not None


def read_stack(path: str, specs: Mapping[str, TensorSpec], problems: Problems) -> tuple[LoraModule, ...]:
    """Return one module per expert, each under the name that transformers' files have; scaling comes later."""
    match = _STACK.match(path)
    assert match is not None
    if "a" not in specs or "b" not in specs or "magnitude" in specs:
        problems.add("a stack of experts is no pair of factors", path, "save the adapter again")
        return ()
    a, b = read(specs["a"]), read(specs["b"])
    try:
        found = experts_apart(path, a, b, Scaling(0.0, a.shape[1]), fan_in_fan_out=False)
    except ShapeError:
        said = f"{path}: {list(a.shape)} and {list(b.shape)}"
        problems.add("shapes are not [experts, rank, in] and [experts, out, rank]", said, "check --from")
        return ()
    name = match["name"]
    if match["path"].endswith("block_sparse_moe"):
        name = next((old for old, new in _MIXTRAL.items() if new == name), name)
    return tuple(
        LoraModule(f"{match['path']}.experts.{number}.{name}", "linear", module.out, module.terms, module.scaling,
                   fan_in_fan_out=False)
        for number, module in enumerate(found)
    )  # fmt: skip


def spell_stacks(modules: Sequence[LoraModule]) -> tuple[list[LoraModule], list[tuple[str, Expr]], list[str]]:
    """Return the modules that are no experts, the tensors of those that are, and the paths of their stacks.

    The modules are one pair each, all of one rank. MappingError where a stack lacks experts: nothing says how many the
    model has.
    """
    plain: list[LoraModule] = []
    stacks: dict[str, dict[int, LoraModule]] = {}
    for module in modules:
        match = _EXPERT.match(module.path)
        if match is None:
            plain.append(module)
            continue
        name = (
            _MIXTRAL.get(match["name"], match["name"]) if match["path"].endswith("block_sparse_moe") else match["name"]
        )
        stacks.setdefault(f"{match['path']}.{STACK}.{name}", {})[int(match["number"])] = module
    top = max((number for items in stacks.values() for number in items), default=-1)
    lacking = [
        f"{path}: expert {number}" for path, items in stacks.items() for number in range(top + 1) if number not in items
    ]
    if lacking:
        raise MappingError(
            f"{counted(len(lacking), 'expert')} without factors, and MLX-LM stacks those of all experts",
            where=lacking, hint="adapt every expert, or leave them out with --exclude '*.experts.*'",
        )  # fmt: skip
    tensors = []
    for path, items in stacks.items():
        for letter in ("a", "b"):
            parts = [getattr(items[number].terms[0], letter) for number in range(top + 1)]
            try:
                stacked = join([reshape(part, (1, *part.shape)) for part in parts], 0)
            except ShapeError as error:
                raise MappingError(f"the experts' factors differ: {error}", where=path, hint="use --dtype") from error
            tensors.append((f"{path}.lora_{letter}", stacked))
    return plain, tensors, list(stacks)
