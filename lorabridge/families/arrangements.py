"""Arrangements: how one side stores axes that the other side stores otherwise, as a regrouping of named lengths.

``heads 2 half -> heads half 2`` says that rows which are counted by head, then half, then pair member are stored by
head, then pair member, then half. ``(positions hidden)`` says that two axes are stored as one. The notation is that of
einops (Rogozhnikov 2022); every arrangement is a permutation of elements, so it states its own inverse.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..axes import Expr, ShapeError, reorder, reshape
from ..sizes import ANY, Size, SizeError

_WORD = re.compile(r"\(|\)|[^\s()]+")
_ONE = "1"


@dataclass(frozen=True, slots=True)
class Arrangement:
    """``atoms``: the lengths in the common order. ``axes``: the stored axes, each a product of atoms, by position."""

    text: str
    atoms: tuple[Size, ...]
    axes: tuple[tuple[int, ...], ...]

    @classmethod
    def of_rows(cls, text: str) -> Arrangement:
        """Read ``common order -> stored order`` of one axis; SizeError for what is no permutation."""
        before, arrow, after = text.partition("->")
        atoms, stored = before.split(), after.split()
        if not arrow or not atoms or any(mark in text for mark in "()"):
            raise SizeError(f"{text!r} is not 'a b c -> a c b'")
        return cls(text, tuple(Size.parse(atom) for atom in atoms), (_positions(atoms, stored, text),))

    @classmethod
    def of_axes(cls, atoms: Sequence[str], text: str) -> Arrangement:
        """Read how one side stores ``atoms``: in another order, with axes of length 1, several as one ``(a b)``."""
        groups: list[list[str]] = []
        inside = False
        for word in _WORD.findall(text):
            if word == "(" and not inside:
                groups.append([])
            elif word == ")" and inside:
                pass
            elif word in "()":
                raise SizeError(f"{text!r} has brackets that do not pair")
            elif inside:
                groups[-1].append(word)
            else:
                groups.append([word])
            inside = word == "(" or (inside and word != ")")
        if inside:
            raise SizeError(f"{text!r} has brackets that do not pair")
        order = iter(_positions([a for a in atoms if a != _ONE], [w for g in groups for w in g if w != _ONE], text))
        kept = [k for k, atom in enumerate(atoms) if atom != _ONE]
        axes = tuple(tuple(kept[next(order)] for word in group if word != _ONE) for group in groups)
        return cls(text, tuple(Size.parse(atom) for atom in atoms), axes)

    @property
    def order(self) -> tuple[int, ...]:
        """The atoms in stored order; those of length 1 that a side does not write come last."""
        named = tuple(atom for axis in self.axes for atom in axis)
        return named + tuple(k for k in range(len(self.atoms)) if k not in named)

    def lengths(self, sizes: Mapping[str, int] | None, total: int | None = None) -> tuple[int, ...]:
        """Return every atom's length; one that is not known follows from ``total``, else SizeError names it."""
        found: list[int] = []
        for atom in self.atoms:
            known = sizes is not None or not atom.fields
            found.append(atom.value(sizes or {}) if known else ANY)
        free = [k for k, length in enumerate(found) if length == ANY]
        known_product = math.prod(length for length in found if length != ANY)
        if len(free) == 1 and total is not None and total % known_product == 0:
            found[free[0]] = total // known_product
        elif free:
            needed = ", ".join(dict.fromkeys(self.atoms[k].text for k in free))
            raise SizeError(f"{self.text!r} needs {needed}", tuple(f for k in free for f in self.atoms[k].fields))
        if total is not None and math.prod(found) != total:
            raise ShapeError(f"{self.text!r} counts {math.prod(found)}, not {total}")
        return tuple(found)

    def stored_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the stored shape; ANY where an atom may have any length."""
        lengths = [atom.value(sizes) for atom in self.atoms]
        axes = [[lengths[k] for k in axis] for axis in self.axes]
        return tuple(ANY if ANY in axis else math.prod(axis) for axis in axes)

    def labels(self) -> list[str]:
        """Return what each stored axis counts, for messages."""
        return [" * ".join(self.atoms[k].text for k in axis) or _ONE for axis in self.axes]

    def store_rows(self, x: Expr, axis: int, sizes: Mapping[str, int] | None) -> Expr:
        """Bring an axis from the common order to the stored one."""
        return _permuted(x, axis, self.lengths(sizes, x.shape[axis]), self.axes[0])

    def load_rows(self, x: Expr, axis: int, sizes: Mapping[str, int] | None) -> Expr:
        """Bring an axis from the stored order back; the inverse of :meth:`store_rows`, to the same expression."""
        lengths = self.lengths(sizes, x.shape[axis])
        order = self.axes[0]
        return _permuted(x, axis, [lengths[k] for k in order], [order.index(k) for k in range(len(order))])

    def store(self, x: Expr, sizes: Mapping[str, int] | None) -> Expr:
        """Bring a tensor of the common shape to the stored one."""
        lengths = self._tensor_lengths(sizes, x.shape)
        shape = tuple(math.prod(lengths[k] for k in axis) for axis in self.axes)
        return reshape(reorder(reshape(x, lengths), self.order), shape)

    def load(self, x: Expr, sizes: Mapping[str, int] | None) -> Expr:
        """Bring a stored tensor back to the common shape; the inverse of :meth:`store`, to the same expression."""
        lengths = self.lengths_of_stored(x.shape, sizes)
        order = self.order
        back = [order.index(k) for k in range(len(order))]
        return reshape(reorder(reshape(x, [lengths[k] for k in order]), back), lengths)

    def _tensor_lengths(self, sizes: Mapping[str, int] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) != len(self.atoms):
            raise ShapeError(f"shape {shape} has not the axes {' '.join(atom.text for atom in self.atoms)}")
        return shape

    def lengths_of_stored(self, shape: tuple[int, ...], sizes: Mapping[str, int] | None) -> tuple[int, ...]:
        """Return every atom's length where a stored tensor has this shape; sizes are needed where axes are joined."""
        if len(shape) != len(self.axes):
            raise ShapeError(f"shape {shape} has not the axes {self.text!r}")
        found = [1] * len(self.atoms)
        for length, axis in zip(shape, self.axes, strict=True):
            part = Arrangement(self.text, tuple(self.atoms[k] for k in axis), ())
            lengths = [length] if len(axis) == 1 else part.lengths(sizes, length)
            for k, number in zip(axis, lengths, strict=True):
                found[k] = number
        return tuple(found)


def _positions(atoms: Sequence[str], stored: Sequence[str], text: str) -> tuple[int, ...]:
    """Find each stored atom in the common order; equal ones keep their order among themselves."""
    if sorted(atoms) != sorted(stored):
        raise SizeError(f"{text!r} does not have each of {' '.join(atoms)} once")
    left = list(enumerate(atoms))
    out = []
    for word in stored:
        found = next(item for item in left if item[1] == word)
        left.remove(found)
        out.append(found[0])
    return tuple(out)


def _permuted(x: Expr, axis: int, lengths: Sequence[int], order: Sequence[int]) -> Expr:
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    whole = reshape(x, (*before, *lengths, *after))
    inner = [axis + k for k in order]
    rest = range(axis + len(lengths), len(whole.shape))
    return reshape(reorder(whole, [*range(axis), *inner, *rest]), x.shape)
