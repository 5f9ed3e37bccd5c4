"""How a tensor is cut over the devices of one pipeline stage, and how it is put together again.

The devices of a stage form a grid (MindSpore's ``device_matrix``, torch's device mesh), outermost axis first; rank r of
a stage has the coordinates ``unravel(r, grid)``. Every axis of a tensor is cut over some axes of the grid, the most
significant first; grid axes that cut nothing hold replicas, unless the optimizer's parallelism cuts them further
along the tensor's first axis. Source of the formulas: mindspore 2.10, parallel/_tensor.py (_get_tensor_slice_index,
_extract_layout_item) and its transform of checkpoints, with which they were compared over random layouts; where that
transform permutes blocks (a permuted map together with optimizer shards) the runtime's own slicing counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from ..axes import Expr, cut, join

ALL = -1
"""``Layout.optimizer``: the first axis is cut over all replicas."""


MAX_DEVICES = 1 << 20
"""Devices of a stage."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How one tensor lies over a stage's devices.

    ``grid``: devices per grid axis. ``cuts``: for each tensor axis the grid axes that cut it, counted from the left,
    the most significant first. ``optimizer``: into how many parts the replicas share the first axis of what the cuts
    leave (0: not at all, ``ALL``: over all of them). ``shape``: of the whole tensor, where the source says it.
    """

    grid: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]
    optimizer: int = 0
    shape: tuple[int, ...] | None = None
    rows: tuple[int, ...] = ()
    field: int = 0

    @property
    def devices(self) -> int:
        """Number of devices of a stage."""
        return math.prod(self.grid)

    @property
    def parts(self) -> tuple[int, ...]:
        """Into how many slices each tensor axis is cut, optimizer shards aside."""
        return tuple(math.prod(self.grid[axis] for axis in axes) for axes in self.cuts)

    @property
    def free(self) -> tuple[int, ...]:
        """The grid axes that cut nothing, outermost first."""
        used = {axis for axes in self.cuts for axis in axes}
        return tuple(axis for axis in range(len(self.grid)) if axis not in used)

    @property
    def shards(self) -> int:
        """Into how many optimizer shards the first axis of a slice is cut; 1: not at all."""
        replicas = math.prod(self.grid[axis] for axis in self.free)
        return replicas if self.optimizer == ALL else max(1, self.optimizer)

    @property
    def fractions(self) -> tuple[int, ...]:
        """Into how many equal pieces each tensor axis is cut in all."""
        parts = self.parts
        return (parts[0] * self.shards, *parts[1:]) if parts else ()

    def problem(self) -> str:
        """Say what is wrong with the layout by itself, or return ""."""
        used = [axis for axes in self.cuts for axis in axes]
        replicas = math.prod(self.grid[axis] for axis in self.free if axis < len(self.grid))
        if not self.grid or any(size < 1 for size in self.grid):
            return f"the device matrix {list(self.grid)} has no devices"
        if self.devices > MAX_DEVICES:
            return f"the device matrix {list(self.grid)} has more than {MAX_DEVICES} devices"
        if any(not 0 <= axis < len(self.grid) for axis in used):
            return f"its map names axes that the device matrix {list(self.grid)} does not have"
        if len(set(used)) < len(used):
            return "its map uses one axis of the device matrix twice"
        if self.optimizer < ALL or (self.optimizer > 0 and replicas % self.optimizer):
            return f"{self.optimizer} optimizer shards do not divide {replicas} replicas"
        if self.shards > 1 and not self.cuts:
            return "a scalar cannot be cut into optimizer shards"
        if self.rows and (self.field or len(self.rows) != math.prod(self.parts)):
            return f"it says the rows of {len(self.rows)} slices, and there are {math.prod(self.parts)}"
        return ""

    def local_shape(self, shape: Sequence[int]) -> tuple[int, ...] | None:
        """Return the shape of every slice of a tensor, or None where an axis does not divide."""
        fractions = self.fractions
        if len(shape) != len(fractions) or any(size % n for size, n in zip(shape, fractions, strict=True)):
            return None
        return tuple(size // n for size, n in zip(shape, fractions, strict=True))

    def whole_shape(self, local: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the tensor whose slices have the given one; both have as many axes."""
        return tuple(size * n for size, n in zip(local, self.fractions, strict=True))

    def place(self, rank: int) -> tuple[int, ...]:
        """Return which slice a rank of the stage holds: an index per tensor axis, counted in ``fractions``."""
        return _spread(self.grid, self.cuts, self.optimizer).places[rank]

    def replica(self, rank: int) -> int:
        """Return which copy of its slice a rank of the stage holds; 0 is the first."""
        return self.holders()[self.place(rank)].index(rank)

    def holders(self) -> Mapping[tuple[int, ...], tuple[int, ...]]:
        """Return, for every slice, the stage's ranks that hold it, in the order of their replicas."""
        return _spread(self.grid, self.cuts, self.optimizer).holders


@dataclass(frozen=True, slots=True)
class _Spread:
    """Which slice each rank holds, and which ranks hold each slice."""

    places: tuple[tuple[int, ...], ...]
    holders: Mapping[tuple[int, ...], tuple[int, ...]]


@lru_cache(maxsize=64)
def _spread(grid: tuple[int, ...], cuts: tuple[tuple[int, ...], ...], optimizer: int) -> _Spread:
    """Work out a layout, of whatever shape, for all its ranks; the thousands of tensors of a model share few."""
    layout = Layout(grid, cuts, optimizer)
    shards, free = layout.shards, layout.free
    places: list[tuple[int, ...]] = []
    holders: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for rank in range(layout.devices):
        place = unravel(rank, grid)
        replica = ravel([place[axis] for axis in free], [grid[axis] for axis in free])
        index = [ravel([place[a] for a in axes], [grid[a] for a in axes]) for axes in cuts]
        if shards > 1:
            index[0] = index[0] * shards + replica % shards
        places.append(tuple(index))
        holders.setdefault(places[-1], []).append((replica // shards, rank))
    found = {index: tuple(rank for _, rank in sorted(ranks)) for index, ranks in sorted(holders.items())}
    return _Spread(tuple(places), MappingProxyType(found))


def unravel(index: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the coordinates of an index in row-major order."""
    out = []
    for size in reversed(sizes):
        index, at = divmod(index, size)
        out.append(at)
    return tuple(reversed(out))


def ravel(place: Sequence[int], sizes: Sequence[int]) -> int:
    """Return the row-major index of coordinates; 0 for no axes."""
    index = 0
    for at, size in zip(place, sizes, strict=True):
        index = index * size + at
    return index


def assemble(slices: dict[tuple[int, ...], Expr], fractions: Sequence[int]) -> Expr:
    """Put a tensor together from its slices, keyed by their index per axis; none below ``fractions`` is missing."""

    def along(axis: int, place: tuple[int, ...]) -> Expr:
        if axis == len(fractions):
            return slices[place]
        return join([along(axis + 1, (*place, i)) for i in range(fractions[axis])], axis)

    return along(0, ())


def slice_of(x: Expr, layout: Layout, rank: int) -> Expr:
    """Cut out of a whole tensor what a rank of the stage holds; every axis divides (see ``local_shape``)."""
    return _cut_out(x, layout.place(rank), layout.fractions)


def slices_of(x: Expr, layout: Layout) -> list[Expr]:
    """Cut out of a whole tensor what every rank of the stage holds; ranks with copies get the same expression."""
    fractions = layout.fractions
    made = {index: _cut_out(x, index, fractions) for index in layout.holders()}
    return [made[index] for index in _spread(layout.grid, layout.cuts, layout.optimizer).places]


def _cut_out(x: Expr, place: Sequence[int], fractions: Sequence[int]) -> Expr:
    for axis, (index, count) in enumerate(zip(place, fractions, strict=True)):
        size = x.shape[axis] // count
        x = cut(x, axis, index * size, (index + 1) * size)
    return x
