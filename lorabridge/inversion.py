"""The way back from the outputs of reversible expressions to the tensors that they were made of, without any data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .axes import Compute, Expr, Join, Read, Reorder, Reshape, Zeros, cut, join, reads, reorder, reshape


@dataclass(frozen=True, slots=True)
class Inverse:
    """How to get source tensors back from outputs.

    ``exprs``: source name to an expression over the outputs. ``lost``: source names that the outputs do not determine.
    ``redundant``: the outputs hold zeros or copies that must be confirmed (by running forward again) before the
    inverse may be trusted on outputs that have been changed since.
    """

    exprs: Mapping[str, Expr]
    lost: tuple[str, ...]
    redundant: bool


def invert(outputs: Mapping[str, Expr]) -> Inverse:
    """Derive every source tensor from the outputs, without looking at data."""
    found: dict[str, Expr] = {}
    pieces: dict[Expr, dict[tuple[int, int, int], Expr]] = {}
    spare: list[Expr] = []  # what some output repeats if the source is found without it
    redundant = False
    todo: list[tuple[Expr, Expr]] = [
        (expr, Read(name, expr.dtype, expr.shape)) for name, expr in outputs.items()
    ]  # (what the output says, where it can be read)
    while todo:
        node, value = todo.pop()
        if isinstance(node, Read):
            redundant |= node.name in found
            found.setdefault(node.name, value)
        elif isinstance(node, Zeros):
            redundant = True
        elif isinstance(node, Reorder):
            order = [node.order.index(i) for i in range(len(node.order))]
            todo.append((node.x, reorder(value, order)))
        elif isinstance(node, Reshape):
            todo.append((node.x, reshape(value, node.x.shape)))
        elif isinstance(node, Join):
            at = 0
            for part in node.parts:
                length = part.shape[node.axis]
                todo.append((part, cut(value, node.axis, at, at + length)))
                at += length
        elif isinstance(node, Compute):
            if node.inverse and len(node.args) == 1:
                (arg,) = node.args
                params = tuple((k, arg.dtype.name if k == "dtype" else v) for k, v in node.params)
                back = Compute(node.inverse, (value,), params, node.kernel, arg.dtype, arg.shape)
                todo.append((arg, back))
            else:
                spare.append(node)
        else:
            seen = pieces.setdefault(node.x, {})
            redundant |= (node.axis, node.start, node.stop) in seen
            seen.setdefault((node.axis, node.start, node.stop), value)
            whole, used = _cover(node.x, seen)
            if whole is not None:
                spare += [node.x] if sum(stop > start for _, start, stop in seen) > used else []
                pieces[node.x] = {}
                todo.append((node.x, whole))
    spare += [x for x, seen in pieces.items() if any(stop > start for _, start, stop in seen)]
    redundant |= any(all(name in found for name in reads(x)) for x in spare)
    lost = sorted({name for expr in outputs.values() for name in reads(expr)} - set(found))
    return Inverse(found, tuple(lost), redundant)


def _cover(x: Expr, seen: Mapping[tuple[int, int, int], Expr]) -> tuple[Expr | None, int]:
    """Put a tensor together from intervals of one axis; also say how many were needed, 0 where some overlap."""
    for axis in {key[0] for key in seen}:
        at, chosen, overlap = 0, [], False
        parts = sorted((start, stop) for a, start, stop in seen if a == axis)
        reach = (0, 0)
        for start, stop in [*parts, (x.shape[axis] + 1, 0)]:
            while start > at < reach[1]:  # the longest interval that begins at or before this place
                value = seen[(axis, *reach)]
                chosen.append(cut(value, axis, at - reach[0], reach[1] - reach[0]))
                overlap |= reach[0] < at
                at = reach[1]
            if start > at:
                break
            reach = max(reach, (start, stop), key=lambda part: part[1])
        if at == x.shape[axis]:
            return join(chosen, axis), 0 if overlap else len(chosen)
    return None, 0
