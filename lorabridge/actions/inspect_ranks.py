"""Describe how a checkpoint lies over its ranks: which holds which slice, copies, and what no rank holds."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..axes import byte_ranges
from ..distributed.assembled import Assembled, Copy, Placed
from ..distributed.grid import Box
from ..distributed.layout import Layout
from ..distributed.placing import Broken
from ..errors import UsageError
from ..reports import plain

MAX_SLICES = 4096
"""Slices of one tensor that are listed."""


@dataclass(frozen=True, slots=True)
class SliceRow:
    """One slice of a tensor: its first element and shape, and the ranks that hold it, the one that is read first.

    ``missing``: no rank holds it, and ``ranks`` are those that should, where that is known. ``apart``: ranks whose copy
    differs from the first; None where copies were not compared.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    ranks: tuple[int, ...]
    missing: bool = False
    apart: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class SlicedTensor:
    """One tensor over the ranks. ``shape``: None where nothing tells it; slices are then the ranks' own tensors.

    ``flat``: slices count the tensor's elements in row-major order. ``grid``: devices of its stage, and ``cuts`` the
    grid axes that cut each tensor axis, where the source says them. ``problem``: why it cannot be put together, or "".
    """

    name: str
    dtype: str
    shape: tuple[int, ...] | None
    stage: int
    grid: tuple[int, ...]
    cuts: tuple[tuple[int, ...], ...]
    shards: int
    flat: bool
    slices: tuple[SliceRow, ...]
    problem: str = ""

    @property
    def cut(self) -> str:
        """Say in a few words how the tensor is cut."""
        if self.shape is None:
            return "not told"
        if self.flat:
            return f"elements in {len(self.slices)}"
        parts = []
        for axis in range(len(self.shape)):
            lengths = list(dict.fromkeys((row.start[axis], row.shape[axis]) for row in self.slices))
            if len(lengths) < 2:
                continue
            shards = f" ({self.shards} optimizer shards)" if axis == 0 and self.shards > 1 else ""
            sizes = [length for _, length in sorted(lengths)]
            uneven = (
                f" ({', '.join(map(str, sizes[:6]))}{' ...' if len(sizes) > 6 else ''})" if len(set(sizes)) > 1 else ""
            )
            parts.append(f"axis {axis} in {len(lengths)}{shards or uneven}")
        return ", ".join(parts) or "whole"

    @property
    def holders(self) -> tuple[int, ...]:
        """The ranks that hold any of it."""
        return tuple(sorted({rank for row in self.slices if not row.missing for rank in row.ranks}))

    @property
    def copies(self) -> str:
        """Say how many ranks hold a slice, and whether they agree where that was looked at."""
        if self.shape is None:
            return "?"
        counts = {len(row.ranks) for row in self.slices if not row.missing} or {0}
        text = str(min(counts)) if len(counts) == 1 else f"{min(counts)} to {max(counts)}"
        compared = [row.apart for row in self.slices if row.apart is not None and len(row.ranks) > 1]
        if compared:
            text += ", differ" if any(compared) else ", equal"
        return text

    @property
    def missing(self) -> int:
        """The number of slices that no rank holds."""
        return sum(row.missing for row in self.slices)


@dataclass(frozen=True, slots=True)
class LayoutRow:
    """Tensors that lie alike: the first one's name and shape stand for them."""

    stage: int
    grid: tuple[int, ...]
    cut: str
    slices: int
    missing: int
    copies: str
    ranks: tuple[int, ...]
    tensors: int
    example: str
    shape: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class RanksReport:
    """A checkpoint over its ranks. ``kind``: what wrote it; ``shown``: the tensors whose slices were asked for."""

    kind: str
    ranks: int
    stages: int
    layouts: tuple[LayoutRow, ...]
    notes: tuple[str, ...] = ()
    shown: tuple[SlicedTensor, ...] = ()
    compared: bool = False
    examples: tuple[SlicedTensor, ...] = field(default=(), repr=False)

    @property
    def head(self) -> str:
        """Say the number of ranks and what wrote them."""
        stages = f", {self.stages} stages" if self.stages > 1 else ""
        return f"{plain.count(self.ranks, 'rank')}{stages}: {self.kind}"


def ranks_report(
    source: Assembled, broken: Mapping[str, Broken], *, select: str | None,
    apart: Mapping[tuple[str, int], Sequence[int]] | None = None,
) -> RanksReport:  # fmt: skip
    """Describe an assembled checkpoint and the tensors that could not be put together.

    ``select``: a name or a glob of the tensors whose slices are listed; UsageError where it names none. ``apart``: what
    :meth:`Assembled.apart` found, None where copies were not compared.
    """
    tensors = [_placed(one, source, apart) for one in source.arrangement.placed.values()]
    tensors += [_broken(one) for one in broken.values()]
    shown: tuple[SlicedTensor, ...] = ()
    if select is not None:
        shown = tuple(t for t in tensors if t.name == select or fnmatch.fnmatchcase(t.name, select))
        if not shown:
            raise UsageError(f"no tensor is called {select}", hint="lorabridge inspect PATH --tensors lists the names")
    groups: dict[tuple[object, ...], list[SlicedTensor]] = {}
    for tensor in tensors:
        key = (tensor.stage, tensor.grid, tensor.cut, len(tensor.slices), tensor.missing, tensor.copies, tensor.holders)
        groups.setdefault(key, []).append(tensor)
    examples = tuple(group[0] for group in groups.values())
    return RanksReport(
        kind=source.arrangement.kind,
        ranks=source.arrangement.ranks,
        stages=len({tensor.stage for tensor in tensors}) or 1,
        layouts=tuple(_row(group) for group in groups.values()),
        notes=source.arrangement.notes,
        shown=shown,
        compared=apart is not None,
        examples=shown or examples,
    )


def _row(group: Sequence[SlicedTensor]) -> LayoutRow:
    first = group[0]
    return LayoutRow(
        first.stage, first.grid, first.cut, len(first.slices), first.missing, first.copies, first.holders, len(group),
        first.name, first.shape,
    )  # fmt: skip


def _placed(placed: Placed, source: Assembled, apart: Mapping[tuple[str, int], Sequence[int]] | None) -> SlicedTensor:
    layout = placed.layout or placed.mesh
    boxes, flat = placed.boxes, False
    if not boxes:
        boxes, flat = _flat(placed, source)

    def row(box: Box, copies: Sequence[Copy]) -> SliceRow:
        ranks = tuple(dict.fromkeys(copy.rank for copy in copies))
        wrong = None if apart is None else tuple(apart.get((placed.name, copies[0].rank), ()))
        return SliceRow(*box, ranks, apart=wrong)

    rows = tuple(row(boxes[index], copies) for index, copies in placed.slices.items() if index in boxes)
    return _tensor(placed.name, placed.expr.dtype.name, placed.expr.shape, placed.stage, layout, rows, flat=flat)


def _flat(placed: Placed, source: Assembled) -> tuple[dict[tuple[int, ...], Box], bool]:
    """Return where pieces lie among the elements, for tensors that are cut as one row of elements."""
    ranges, width = byte_ranges(placed.expr), placed.expr.dtype.itemsize
    at = 0
    found: dict[tuple[int, ...], Box] = {}
    for (index, _), (_, _, length) in zip(placed.slices.items(), ranges or (), strict=False):
        found[index] = ((at // width,), (length // width,))
        at += length
    return found, True


def _broken(broken: Broken) -> SlicedTensor:
    rows = [SliceRow(*box, tuple(copy.rank for copy in copies)) for box, copies in broken.boxes.items()]
    rows += [SliceRow(*box, ranks, missing=True) for box, ranks in broken.missing.items()]
    dtype = broken.dtype.name if broken.dtype is not None else "unknown"
    rows.sort(key=lambda row: row.start)
    flat = broken.shape is not None and any(len(row.start) != len(broken.shape) for row in rows)
    return _tensor(
        broken.name, dtype, broken.shape, broken.stage, broken.layout, tuple(rows), flat=flat, problem=broken.problem
    )


def _tensor(
    name: str, dtype: str, shape: tuple[int, ...] | None, stage: int, layout: Layout | None,
    rows: tuple[SliceRow, ...], *, flat: bool = False, problem: str = "",
) -> SlicedTensor:  # fmt: skip
    grid = layout.grid if layout is not None else ()
    cuts = layout.cuts if layout is not None else ()
    shards = layout.shards if layout is not None else 1
    return SlicedTensor(name, dtype, shape, stage, grid, cuts, shards, flat, rows[:MAX_SLICES], problem)


def spans(ranks: Sequence[int]) -> str:
    """Spell ranks as ``0-7, 9``."""
    parts: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if parts and parts[-1][1] + 1 == rank:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def layouts_text(report: RanksReport, *, width: int | None) -> list[str]:
    """Return the blocks that show the layouts, the slices that were asked for, and the notes."""
    header = ["grid", "cut", "slices", "copies", "ranks", "tensors", "for example"]
    rows = []
    for row in report.layouts:
        held = f"{row.slices}, {row.missing} missing" if row.missing else str(row.slices)
        shape = "" if row.shape is None else f" {plain.shape(row.shape)}"
        grid = " x ".join(map(str, row.grid)) or "-"
        rows.append((grid, row.cut, held, row.copies, spans(row.ranks), str(row.tensors), f"{row.example}{shape}"))
    blocks = [plain.table(header, rows, right="     r", width=width)] if rows else []
    blocks += [slices_text(tensor, width=width) for tensor in report.shown]
    if report.notes:
        blocks.append("\n".join(["notes:", *(f"  {plain.escape(note)}" for note in report.notes)]))
    return blocks


def slices_text(tensor: SlicedTensor, *, width: int | None) -> str:
    """Spell one tensor's slices as a table."""
    shape = "of unknown shape" if tensor.shape is None else plain.shape(tensor.shape)
    cut = tensor.problem if tensor.shape is None else tensor.cut
    title = plain.escape(f"{tensor.name}: {shape} {tensor.dtype}, {cut}")
    rows = []
    for row in tensor.slices:
        others = "" if len(row.ranks) < 2 or row.missing else ", ".join(map(str, row.ranks[1:]))
        state = "missing" if row.missing else ""
        if row.apart:
            state = f"differs on {spans(row.apart)}"
        elif row.apart is not None and others:
            state = "equal"
        rank = (f"({spans(row.ranks)})" if row.ranks else "none") if row.missing else str(row.ranks[0])
        rows.append((interval(row), rank, others, state))
    kept = [i for i in range(4) if i < 2 or any(line[i] for line in rows)]
    header = ("slice", "rank", "copies on" if tensor.shape is not None else "also on", "state")
    return f"{title}\n" + plain.table(
        [header[i] for i in kept], [tuple(line[i] for i in kept) for line in rows], width=width
    )


def interval(row: SliceRow) -> str:
    """Spell a slice as numpy does: ``[0:16, 0:8]``."""
    ends = zip(row.start, row.shape, strict=True)
    return "[" + ", ".join(f"{start}:{start + size}" for start, size in ends) + "]"
