"""Row layouts of fused projections: how the rows of q, k and v lie in one weight."""

from __future__ import annotations

from collections.abc import Sequence

from ..axes import Expr, ShapeError, cut, join, reshape


def split_rows(x: Expr, sizes: Sequence[int], *, groups: int = 1, axis: int = 0) -> tuple[Expr, ...]:
    """Take a fused axis apart into parts of the given sizes.

    ``groups`` 1: the parts lie one after another. ``groups`` g: the axis holds g blocks, each with 1/g of every part,
    as Megatron-LM stores ``linear_qkv`` (``[q..q k v]`` per key/value head), GPT-NeoX and BLOOM ``query_key_value``
    (g = heads), and an interleaved gate/up projection (g = the part's size). Any dtype, any rank; the sizes are the
    fused axis' length together, each a multiple of g (ShapeError).
    """
    _check(sizes, groups)
    if sum(sizes) != x.shape[axis]:
        raise ShapeError(f"parts {tuple(sizes)} have {sum(sizes)} rows, axis {axis} of {x.shape} has {x.shape[axis]}")
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    blocks = x if groups == 1 else reshape(x, (*before, groups, sum(sizes) // groups, *after))
    out, at = [], 0
    for size in sizes:
        rows = size // groups
        piece = cut(blocks, axis if groups == 1 else axis + 1, at, at + rows)
        out.append(reshape(piece, (*before, size, *after)))
        at += rows
    return tuple(out)


def fuse_rows(parts: Sequence[Expr], *, groups: int = 1, axis: int = 0) -> Expr:
    """Join parts into a fused axis; the inverse of :func:`split_rows`, to the same expression."""
    sizes = [part.shape[axis] for part in parts]
    _check(sizes, groups)
    if groups == 1:
        return join(parts, axis)
    before, after = parts[0].shape[:axis], parts[0].shape[axis + 1 :]
    blocks = [reshape(part, (*before, groups, size // groups, *after)) for part, size in zip(parts, sizes, strict=True)]
    return reshape(join(blocks, axis + 1), (*before, sum(sizes), *after))


def _check(sizes: Sequence[int], groups: int) -> None:
    odd = [size for size in sizes if groups < 1 or size % groups]
    if odd:
        raise ShapeError(f"{odd[0]} rows do not divide into {groups} groups")
