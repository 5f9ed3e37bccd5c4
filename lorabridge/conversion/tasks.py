"""Cut a plan into tasks for workers.

Tasks are the smallest groups that share no source tensor in memory: each part of a join along the first axis stands
alone, and whatever is a run of source bytes is copied without passing through memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..arithmetic import recipe
from ..axes import Compute, Expr, Join, Read, Reshape, Slice, byte_ranges, children, reshape
from ..errors import InputError, MappingError
from ..tensors import Extent, TensorSpec
from .plan import Plan

MERGED = 4 << 20
"""Most bytes of a merged weight that one task makes."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of one output, ``nbytes`` long from ``offset`` in its buffer: file ranges or an expression.

    ``needs``: the source tensors that must be whole in memory, as often as the expression asks for them. The factors
    of a merged weight are not among them: they are small, and read again for every block.
    """

    output: str
    offset: int
    nbytes: int
    expr: Expr
    extents: tuple[Extent, ...]
    needs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """Pieces done by one worker in this order, and the most bytes they hold in memory."""

    pieces: tuple[Piece, ...]
    held: int


def _nbytes(expr: Expr) -> int:
    return TensorSpec("", expr.dtype, expr.shape).nbytes


def refuse_packed(plan: Plan) -> None:
    """Types below a byte are flat bytes: they can be copied whole, not cut or reordered."""
    wrong = []
    for name, expr in plan.outputs().items():
        while isinstance(expr, Reshape):
            expr = expr.x
        if expr.dtype.bits % 8 and not isinstance(expr, Read):
            wrong.append(f"{name} ({expr.dtype})")
    if wrong:
        raise MappingError("types narrower than a byte can only be copied whole", where=wrong)


def cut(plan: Plan, extents: Mapping[str, tuple[Extent, ...]], *, whole: bool) -> list[Task]:
    """Cut a plan into tasks; ``whole`` keeps each output's pieces together and in order, for its digest."""
    pieces = [
        piece
        for name, expr in plan.outputs().items()
        for piece in _split(name, 0, expr, plan.sources, extents)
        if piece.nbytes
    ]
    parent: dict[tuple[str, str], tuple[str, str]] = {}

    def root(key: tuple[str, str]) -> tuple[str, str]:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    groups: dict[tuple[str, str], list[Piece]] = {}
    keys = []
    for number, piece in enumerate(pieces):
        needed = [("source", name) for name in dict.fromkeys(piece.needs)]
        mine = [("output", piece.output)] * whole + needed or [("piece", str(number))]
        for key in mine[1:]:
            parent[root(key)] = root(mine[0])
        keys.append(mine[0])
    for key, piece in zip(keys, pieces, strict=True):
        groups.setdefault(root(key), []).append(piece)
    return [Task(tuple(group), _held(group, plan.sources)) for group in groups.values()]


def _split(
    name: str,
    offset: int,
    expr: Expr,
    sources: Mapping[str, TensorSpec],
    extents: Mapping[str, tuple[Extent, ...]],
) -> Iterator[Piece]:
    while isinstance(expr, Reshape):
        expr = expr.x
    if isinstance(expr, Join) and math.prod(expr.shape[: expr.axis]) == 1:
        for part in expr.parts:
            yield from _split(name, offset, part, sources, extents)
            offset += _nbytes(part)
        return
    if isinstance(expr, Slice) and expr.axis == 0:
        expr = recipe.rows_of(expr.x, expr.start, expr.stop) or expr
    if isinstance(expr, Compute) and recipe.is_merge(expr):
        yield from _merged(name, offset, expr, sources)
        return
    ranges = byte_ranges(expr) or []
    copied: tuple[Extent, ...] = ()
    if all(extents[source] for source, _, _ in ranges):
        copied = _clip(ranges, sources, extents)
    needs = () if copied or rows(expr) else tuple(_leaves(expr))
    yield Piece(name, offset, _nbytes(expr), expr, copied, needs)


def _merged(name: str, offset: int, expr: Compute, sources: Mapping[str, TensorSpec]) -> Iterator[Piece]:
    """Cut a merged weight into blocks of rows, larger ones where the factors that each block reads are large."""
    factors = sum(sources[source].nbytes for arg in expr.args[1:] for source in _leaves(arg))
    for part in recipe.parts_of(expr, max(MERGED, 2 * factors)):
        needs = () if recipe.rows_read(part.args[0]) else tuple(_leaves(part.args[0]))
        yield Piece(name, offset, _nbytes(part), part, (), needs)
        offset += _nbytes(part)


def _clip(
    ranges: Sequence[tuple[str, int, int]],
    sources: Mapping[str, TensorSpec],
    extents: Mapping[str, tuple[Extent, ...]],
) -> tuple[Extent, ...]:
    """Turn byte ranges of tensors into ranges of files; neighbours become one."""
    found: list[Extent] = []
    for name, first, length in ranges:
        if sum(extent.length for extent in extents[name]) != sources[name].nbytes:
            raise InputError("the file holds another number of bytes than the tensor's shape says", where=name)
        at = 0
        for extent in extents[name]:
            low, high = max(first - at, 0), min(first + length - at, extent.length)
            at += extent.length
            if low >= high:
                continue
            start = extent.offset + low
            if found and found[-1].path == extent.path and found[-1].offset + found[-1].length == start:
                found[-1] = Extent(extent.path, found[-1].offset, found[-1].length + high - low)
            else:
                found.append(Extent(extent.path, start, high - low))
    return tuple(found)


def rows(expr: Expr) -> tuple[str, int, int] | None:
    """Return (source, start, stop) where all that an expression needs whole is rows of one source tensor."""
    if recipe.is_merge(expr):
        return recipe.rows_read(children(expr)[0])
    return recipe.rows_read(expr) if isinstance(expr, Slice) else None


def alone(expr: Expr, stand_in: str) -> Expr:
    """Replace the rows that :func:`rows` names by a source tensor ``stand_in``, which holds just them."""
    if isinstance(expr, Compute):
        weight = expr.args[0]
        held = Read(stand_in, weight.dtype, weight.x.shape if isinstance(weight, Reshape) else weight.shape)
        return Compute(
            expr.kernel, (reshape(held, weight.shape), *expr.args[1:]), expr.params, "", expr.dtype, expr.shape
        )
    return Read(stand_in, expr.dtype, expr.shape)


def _leaves(expr: Expr) -> Iterator[str]:
    if isinstance(expr, Read):
        yield expr.name
    for child in children(expr):
        yield from _leaves(child)


def _made(expr: Expr, top: bool = True) -> int:
    """Bound the bytes that evaluation makes besides its sources: kernels' results, inner joins and reshapes."""
    top = top and isinstance(expr, Join)
    made = _nbytes(expr) if isinstance(expr, Compute) or (isinstance(expr, Join | Reshape) and not top) else 0
    return made + sum(_made(child, top) for child in children(expr))


def _held(pieces: Sequence[Piece], sources: Mapping[str, TensorSpec]) -> int:
    tensors = sum(sources[name].nbytes for name in {name for piece in pieces for name in piece.needs})
    own = max((piece.nbytes for piece in pieces if not piece.extents and rows(piece.expr)), default=0)
    return tensors + own + max((_made(piece.expr) for piece in pieces if not piece.extents), default=0)


def ordered(tasks: list[Task], workers: int) -> list[Task]:
    """Put the few tasks first that would leave other workers idle at the end; the rest keeps the files' order."""
    sizes = [sum(piece.nbytes for piece in task.pieces) for task in tasks]
    large = sum(sizes) / (8 * workers)
    first = [task for task, size in zip(tasks, sizes, strict=True) if size > large]
    return first + [task for task, size in zip(tasks, sizes, strict=True) if size <= large]
