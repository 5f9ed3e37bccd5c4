"""Routed experts of MindFormers' PyNative mode: ``P.weight1_lora_a[E, in, r]``, ``P.weight1_lora_b[E, r, out]``.

Source: pynative/pet/moe_lora_layer.py of 2.1.0, GroupedMLPWithLoRA. The stored weights ``P.weight1`` (gate and up) and
``P.weight2`` (down) are ``[experts, in, out]``, and an expert's delta is ``alpha / r * a @ b`` as it lies there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..axes import Expr, ShapeError, read, reorder
from ..errors import MappingError
from ..tensors import TensorSpec
from .adapter import Adapter, Content, LoraModule
from .experts import experts_apart, experts_together
from .pairs import Names, Reader

WEIGHTS = ("weight1", "weight2")
ROLES = {f"{weight}_lora_{letter}": (letter, weight) for weight in WEIGHTS for letter in ("a", "b")}
_TURN = (0, 2, 1)


def cell_of(module: LoraModule) -> str:
    """Return the path of the cell that MindFormers adapts: of an expert, the cell that holds all of them."""
    return module.path if module.stack is None else module.stack.parameter.rpartition(".")[0]


def rank_of(weight: str, tensors: Mapping[str, TensorSpec]) -> int:
    """Return the rank that a pair of factors has, in the shapes of its kind; 0 where it has too few axes."""
    shape = tensors["a"].shape
    return shape[-1] if weight in WEIGHTS else shape[0]


def pair_fits(weight: str, tensors: Mapping[str, TensorSpec]) -> bool:
    """Say whether factors are matrices of one rank, of experts one pair for each."""
    a, b = tensors["a"].shape, tensors["b"].shape
    if weight in WEIGHTS:
        return len(a) == len(b) == 3 and a[0] == b[0] and a[2] == b[1]
    return len(a) == len(b) == 2 and a[0] == b[1]


def without_experts(found: Names) -> Names:
    """Return the names without the factors of experts."""
    return replace(found, pairs={key: value for key, value in found.pairs.items() if key[1] not in WEIGHTS})


def read_experts(content: Content, found: Names) -> tuple[LoraModule, ...]:
    """Return one module per expert; MappingError for a missing alpha, with every place."""
    reader = Reader(content, found.rest)
    modules: list[LoraModule] = []
    for (path, weight), tensors in found.pairs.items():
        if weight in WEIGHTS:
            parameter = f"{path}.{weight}" if path else weight
            scaling = reader.scaling(parameter, rank_of(weight, tensors))
            a, b = (reorder(read(tensors[role]), _TURN) for role in ("a", "b"))
            try:
                modules += experts_apart(parameter, a, b, scaling, fan_in_fan_out=True)
            except ShapeError as error:  # checked before, so that all misfits are named at once
                raise MappingError(str(error), where=parameter) from error
    reader.problems.raise_any(content.path)
    return tuple(modules)


def spell_experts(modules: Sequence[LoraModule]) -> tuple[list[LoraModule], list[tuple[str, Expr]], list[str]]:
    """Return the modules that are no experts, the tensors of those that are, and notes.

    MappingError where experts lie in another tensor than a GroupedMLP's, or differ in what one tensor shares.
    """
    plain, stacks = experts_together(modules)
    odd = [stack.parameter for stack in stacks if stack.parameter.rpartition(".")[2] not in WEIGHTS]
    if odd:
        raise MappingError(
            "MindFormers' PyNative mode keeps experts in weight1 and weight2",
            where=odd,
            hint="name the modules as they are there with --family",
        )
    tensors: list[tuple[str, Expr]] = []
    notes: list[str] = []
    held = {stack.parameter for stack in stacks}
    for stack in stacks:
        tensors.append((f"{stack.parameter}_lora_a", reorder(stack.a, _TURN)))
        tensors.append((f"{stack.parameter}_lora_b", reorder(stack.b, _TURN)))
        if stack.untrained:
            notes.append(f"{stack.parameter}: experts {list(stack.untrained)} have no factors and get zeros")
        cell, _, weight = stack.parameter.rpartition(".")
        other = f"{cell}.{WEIGHTS[1 - WEIGHTS.index(weight)]}"
        if other not in held:
            notes.append(f"{other}: MindFormers adapts it together with {weight}; its factors start at zero")
    return plain, tensors, notes


def has_experts(adapter: Adapter) -> list[str]:
    """Return the stored tensors of experts that an adapter adapts."""
    return list(dict.fromkeys(m.stack.parameter for m in adapter.modules if m.stack is not None))
