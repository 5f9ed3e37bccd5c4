"""What an adapter holds twice, for an embedding and for the head tied to it: peft saves both, trained as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..arithmetic.numerics import Notes, kernels
from ..axes import Expr, reads, transpose
from ..dialects.adapter import Adapter, Extra, LoraModule
from ..tensors import Source
from .reading import rows, spans

Same = Callable[[Expr, Expr], bool]
"""Says whether two expressions have the same type, shape and bits."""


def comparing(source: Source) -> Same:
    """Return what compares expressions over a source, block by block."""
    known = kernels("", Notes(), {})

    def same(first: Expr, second: Expr) -> bool:
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        return all(
            rows(first, *span, source, known).tobytes() == rows(second, *span, source, known).tobytes()
            for span in spans(first)
        )

    return same


def without_twin(
    adapter: Adapter, names: Mapping[int, str], embedding: str, head: str, same: Same
) -> tuple[Adapter, bool]:  # fmt: skip
    """Return an adapter without what it holds for the head, and whether all of that is a copy.

    ``names``: the base parameter that each module and extra reaches, by the object's id. It is a copy where the head
    has the same whole matrix as the embedding, or the embedding's factors with their roles exchanged.
    """
    items: list[LoraModule | Extra] = [*adapter.modules, *adapter.extras]
    here = [item for item in items if names[id(item)] == embedding]
    there = [item for item in items if names[id(item)] == head]
    if len(here) != len(there) or not all(any(_twins(one, other, same) for one in here) for other in there):
        return adapter, not here and not there
    gone = {id(item) for item in there}
    dropped = [name for item in there for name in _read(item)]
    kept = replace(
        adapter,
        modules=tuple(module for module in adapter.modules if id(module) not in gone),
        extras=tuple(extra for extra in adapter.extras if id(extra) not in gone),
        left_out=(*adapter.left_out, *((name, f"equals that of {embedding}, which it is tied to") for name in dropped)),
    )
    return kept, True


def _twins(one: LoraModule | Extra, other: LoraModule | Extra, same: Same) -> bool:
    if isinstance(one, Extra) and isinstance(other, Extra):
        kinds = {one.kind, other.kind}  # peft marks the head of a saved embedding in no way
        return (len(kinds) == 1 or kinds == {"modules_to_save", "base"}) and same(one.value, other.value)
    if isinstance(one, LoraModule) and isinstance(other, LoraModule):
        return _mirrored(one, other, same)
    return False


def _mirrored(embedding: LoraModule, head: LoraModule, same: Same) -> bool:
    if embedding.kind != "embedding" or head.kind != "linear" or not (embedding.plain and head.plain):
        return False
    if embedding.scaling.value != head.scaling.value or any(
        part is not None for module in (embedding, head) for part in (module.magnitude, module.lora_bias)
    ):
        return False
    (left,), (right,) = embedding.terms, head.terms
    return same(transpose(left.a), right.b) and same(transpose(left.b), right.a)


def _read(item: LoraModule | Extra) -> Sequence[str]:
    values = [item.value] if isinstance(item, Extra) else [x for term in item.terms for x in (term.a, term.b)]
    return [name for value in values for name in reads(value)]
