"""Experts whose weights one tensor holds: one module per expert in the hub, one pair of stacked factors in a file.

A file's stack is given as ``a[experts, rank, in]`` and ``b[experts, out, rank]``; dialects that order the axes
otherwise reorder them before and after. Slices of one tensor melt into it again, so that taking a stack apart and
putting it together gives the tensor itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..axes import Expr, ShapeError, cut, join, reshape, zeros
from ..errors import MappingError
from .adapter import LoraModule, Scaling, StackItem, Term
from .factors import grow, pad_rank

DIALECTS = ("peft", "pynative")
"""The dialects that have names for factors of stacked experts."""

_MERGE = "merge the adapter into the base model first"


@dataclass(frozen=True, slots=True)
class ExpertFactors:
    """The factors of all experts of one stored tensor, ``parameter``; shapes as above, one rank and one scaling.

    ``fan_in_fan_out``: each expert's matrix is stored ``[in, out]``. ``untrained``: experts whose factors are zeros.
    """

    parameter: str
    a: Expr
    b: Expr
    scaling: Scaling
    fan_in_fan_out: bool | None = None
    untrained: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """How many experts there are."""
        return self.a.shape[0]

    def apart(self) -> tuple[LoraModule, ...]:
        """Return one module per expert, those with factors of zeros included."""
        return experts_apart(self.parameter, self.a, self.b, self.scaling, fan_in_fan_out=self.fan_in_fan_out)


def item_path(parameter: str, number: int) -> str:
    """Return the path of one expert's module: the stored tensor's name and the number."""
    return f"{parameter}.{number}"


def experts_apart(
    parameter: str, a: Expr, b: Expr, scaling: Scaling, *, fan_in_fan_out: bool | None = None
) -> tuple[LoraModule, ...]:  # fmt: skip
    """Return one module per expert; ShapeError where the factors are no two stacks of one rank and length."""
    fits = len(a.shape) == len(b.shape) == 3 and a.shape[0] == b.shape[0] and a.shape[1] == b.shape[2]
    if not fits:
        raise ShapeError(f"{a.shape} and {b.shape} are not [experts, rank, in] and [experts, out, rank]")
    count, out = a.shape[0], b.shape[1]
    made = []
    for number in range(count):
        one, two = (reshape(cut(x, 0, number, number + 1), x.shape[1:]) for x in (a, b))
        made.append(
            LoraModule(
                item_path(parameter, number), "linear", out, (Term(one, two, 0, out),), scaling,
                fan_in_fan_out=fan_in_fan_out, stack=StackItem(parameter, number, count),
            )
        )  # fmt: skip
    return tuple(made)


def experts_together(modules: Iterable[LoraModule]) -> tuple[list[LoraModule], list[ExpertFactors]]:
    """Return the modules that lie in no stack, and the factors of each stack.

    Several terms become one pair, ranks are padded with zeros to the highest of their stack, and experts that nothing
    adapts get zeros; all of it is exact. MappingError: scalings that differ within a stack, DoRA magnitudes and biases
    of B, an unknown number of experts, factors of different types.
    """
    plain: list[LoraModule] = []
    stacks: dict[str, list[LoraModule]] = {}
    for module in modules:
        if module.stack is None:
            plain.append(module)
        else:
            stacks.setdefault(module.stack.parameter, []).append(module)
    return plain, [_together(parameter, items) for parameter, items in stacks.items()]


def _together(parameter: str, modules: Sequence[LoraModule]) -> ExpertFactors:
    _check(parameter, modules)
    pairs = {m.stack.number: grow(m) for m in modules if m.stack is not None}
    rank = max(pair.terms[0].rank for pair in pairs.values())
    padded = {number: pad_rank(pair, rank) for number, pair in pairs.items()}
    first = next(iter(padded.values()))
    count = max(m.stack.count or 0 for m in modules if m.stack is not None)
    (like,) = first.terms
    empty = zeros(like.a.dtype, like.a.shape), zeros(like.b.dtype, like.b.shape)
    every = [(padded[k].terms[0].a, padded[k].terms[0].b) if k in padded else empty for k in range(count)]
    try:
        a, b = (join([reshape(pair[i], (1, *pair[i].shape)) for pair in every], 0) for i in (0, 1))
    except ShapeError as error:
        raise MappingError(
            f"the experts' factors differ: {error}", where=parameter, hint="give all factors one type with --dtype"
        ) from error
    untrained = tuple(number for number in range(count) if number not in padded)
    return ExpertFactors(parameter, a, b, first.scaling, first.fan_in_fan_out, untrained)


def _check(parameter: str, modules: Sequence[LoraModule]) -> None:
    items = [(module, module.stack) for module in modules if module.stack is not None]
    numbers = [item.number for _, item in items]
    counts = {item.count for _, item in items}
    if None in counts or len(counts) != 1 or max(numbers) >= max(n or 0 for n in counts):
        raise MappingError(
            "how many experts the tensor holds is not known",
            where=parameter,
            hint="give the model's configuration with --config config.json",
        )
    twice = [module.path for module in modules if len(set(numbers)) < len(numbers)]
    if twice:
        raise MappingError("one expert is adapted twice", where=twice)
    odd = [module.path for module in modules if module.magnitude is not None or module.lora_bias is not None]
    if odd:
        raise MappingError("stacked experts have no DoRA magnitudes and no biases of B", where=odd, hint=_MERGE)
    values = {module.scaling.value for module in modules}
    if len(values) > 1:
        raise MappingError(
            f"the experts of one tensor have one scaling, these have {len(values)}",
            where=[f"{module.path}: {module.scaling.value:g}" for module in modules],
            hint="bring them to one scaling with --alpha and --rank, or merge the adapter",
        )
