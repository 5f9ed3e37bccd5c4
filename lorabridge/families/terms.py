"""Low-rank terms under fused projections: cut along the rows, placed on the rows, never computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..axes import Expr, Join, Zeros, cut, join, zeros
from ..dialects.adapter import Term
from .layouts import fuse_rows, split_rows


def split_terms(terms: Sequence[Term], sizes: Sequence[int], *, groups: int = 1) -> tuple[tuple[Term, ...], ...]:
    """Give each part of a fused module its terms; ``a`` is shared, the rows of ``b`` are cut.

    A part that no term reaches gets none. Exact by definition: rows of ``b @ a`` are rows of ``b`` times ``a``.
    """
    out: list[list[Term]] = [[] for _ in sizes]
    for term in terms:
        for part, piece in enumerate(_pieces(term, sizes, groups)):
            if piece is not None and (trimmed := _trim(piece)) is not None:
                out[part].append(trimmed)
    return tuple(tuple(part) for part in out)


def _pieces(term: Term, sizes: Sequence[int], groups: int) -> list[Term | None]:
    if groups > 1:
        rows = split_rows(place([term], sum(sizes)), sizes, groups=groups)
        return [Term(term.a, b, 0, size) for b, size in zip(rows, sizes, strict=True)]
    found: list[Term | None] = []
    low = 0
    for size in sizes:
        start, stop = max(low, term.start), min(low + size, term.stop)
        b = cut(term.b, 0, start - term.start, stop - term.start) if start < stop else None
        found.append(None if b is None else Term(term.a, b, start - low, stop - low))
        low += size
    return found


def fuse_terms(parts: Mapping[int, Sequence[Term]], sizes: Sequence[int], *, groups: int = 1) -> tuple[Term, ...]:
    """Place the terms of the parts on the rows of the fused module; the inverse of :func:`split_terms`.

    ``groups`` 1: terms keep their own rows, and neighbours with the same ``a`` become one. More groups: the rows of a
    part are no interval, so each distinct ``a`` gives one term over all rows, with zeros where it does not reach.
    """
    if groups == 1:
        starts = [sum(sizes[:part]) for part in range(len(sizes))]
        moved = [
            replace(term, start=term.start + starts[part], stop=term.stop + starts[part])
            for part, terms in parts.items()
            for term in terms
        ]
        return _melt(sorted(moved, key=lambda term: term.start))
    out = []
    for a in dict.fromkeys(term.a for part in sorted(parts) for term in parts[part]):
        mine = {part: [term for term in terms if term.a == a] for part, terms in parts.items()}
        like = next(term.b for terms in mine.values() for term in terms)
        rows = [
            place(mine[part], size) if mine.get(part) else zeros(like.dtype, (size, *like.shape[1:]))
            for part, size in enumerate(sizes)
        ]
        out.append(Term(a, fuse_rows(rows, groups=groups), 0, sum(sizes)))
    return tuple(out)


def rearrange_terms(terms: Sequence[Term], out: int, turn: Callable[[Expr], Expr]) -> tuple[Term, ...]:
    """Reorder the rows of a module of ``out`` rows: each distinct ``a`` gives one term over all of them."""
    distinct = dict.fromkeys(term.a for term in terms)
    return tuple(Term(a, turn(place([term for term in terms if term.a == a], out)), 0, out) for a in distinct)


def place(terms: Sequence[Term], height: int) -> Expr:
    """Return ``b`` of terms with one ``a`` on disjoint rows as one factor of full height, zeros elsewhere."""
    rows: list[Expr] = []
    at = 0
    for term in sorted(terms, key=lambda term: term.start):
        if term.start > at:
            rows.append(zeros(term.b.dtype, (term.start - at, *term.b.shape[1:])))
        rows.append(term.b)
        at = term.stop
    if at < height:
        rows.append(zeros(terms[0].b.dtype, (height - at, *terms[0].b.shape[1:])))
    return join(rows, 0)


def _melt(terms: Sequence[Term]) -> tuple[Term, ...]:
    out: list[Term] = []
    for term in terms:
        if out and out[-1].stop == term.start and out[-1].a == term.a:
            out[-1] = Term(term.a, join([out[-1].b, term.b], 0), out[-1].start, term.stop)
        else:
            out.append(term)
    return tuple(out)


def _trim(term: Term) -> Term | None:
    """Drop rows that are zero by construction from both ends; None where nothing is left."""
    if isinstance(term.b, Zeros):
        return None
    if not isinstance(term.b, Join) or term.b.axis != 0:
        return term
    parts, start, stop = list(term.b.parts), term.start, term.stop
    while isinstance(parts[0], Zeros):
        start += parts.pop(0).shape[0]
    while isinstance(parts[-1], Zeros):
        stop -= parts.pop().shape[0]
    return Term(term.a, join(parts, 0), start, stop)
