"""Tensors over boxes that ranks hold, and what is found of those that cannot be put together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..axes import read
from ..dtypes import DType
from ..errors import InputError
from ..formats.sharded import placement_problem
from ..tensors import Source
from .assembled import Copy, Placed, same_bits
from .grid import Box, assemble_boxes
from .layout import Layout

Held = tuple[Box, Copy]
"""A box of a tensor and the copy that fills it."""


@dataclass(frozen=True, slots=True)
class Broken:
    """A tensor that the ranks' files do not make up, as far as they tell.

    ``shape``: of the whole, None where nothing tells it; the boxes are then those of each rank's own tensor. Boxes of
    one axis count the elements of a tensor that has more.
    ``missing``: boxes that no rank holds, with the ranks that should.
    """

    name: str
    dtype: DType | None
    shape: tuple[int, ...] | None
    boxes: Mapping[Box, tuple[Copy, ...]]
    problem: str
    missing: Mapping[Box, tuple[int, ...]] = field(default_factory=dict)
    layout: Layout | None = None
    stage: int = 0


@dataclass(slots=True)
class Findings:
    """What is wrong with a directory that is described nevertheless; every opener that gets one adds to it."""

    errors: list[InputError] = field(default_factory=list)
    broken: dict[str, Broken] = field(default_factory=dict)


def damaged(findings: Findings | None) -> list[InputError] | None:
    """Return where to note files that cannot be read, None where they are errors; see :class:`.assembled.Files`."""
    return None if findings is None else findings.errors


def settle(error: InputError, findings: Findings | None) -> None:
    """Raise an error, or note it where the directory is to be described all the same."""
    if findings is None:
        raise error
    findings.errors.append(error)


def place_boxes(name: str, shape: tuple[int, ...], held: Iterable[Held], pieces: Source) -> Placed:
    """Put a tensor together from boxes, of which equal ones are copies; ValueError says what does not fit.

    Boxes without elements are passed over, except where the tensor has none.
    """
    copies = grouped(held)
    if not copies:
        raise ValueError("no rank holds it")
    first = next(iter(copies.values()))[0]
    dtype = pieces.specs[first.piece].dtype
    odd = {pieces.specs[copy.piece].dtype.name for found in copies.values() for copy in found} - {dtype.name}
    if odd:
        raise ValueError(f"its pieces have different element types: {dtype.name}, {', '.join(sorted(odd))}")
    for (_, size), found in copies.items():
        for copy in found:
            if pieces.specs[copy.piece].shape != size:
                raise ValueError(
                    f"rank {copy.rank} holds shape {list(pieces.specs[copy.piece].shape)}, not {list(size)}"
                )
    exprs = {box: read(pieces.specs[found[0].piece]) for box, found in copies.items()}
    expr = assemble_boxes(exprs, shape, dtype)
    filled = {box: found for box, found in copies.items() if 0 not in box[1]}
    return Placed(
        name, expr, {box[0]: found for box, found in filled.items()}, boxes={box[0]: box for box in filled}
    )  # fmt: skip


def unfit_files(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Say why files that metadata names may not be read: missing, not regular, or reached by links to elsewhere."""
    found: dict[str, str] = {}
    home = Path(os.path.realpath(path))
    for name in sorted(set(names)):
        problem = placement_problem(path, name)
        if not problem and "/" in name and not Path(os.path.realpath(path / name)).is_relative_to(home):
            problem = "reached by a symbolic link that leaves the directory"
        if problem:
            found[name] = problem
    return found


def grouped(held: Iterable[Held]) -> dict[Box, tuple[Copy, ...]]:
    """Return the copies of every box, in the order of the boxes' places."""
    found: dict[Box, list[Copy]] = {}
    for box, copy in held:
        found.setdefault(box, []).append(copy)
    return {box: tuple(found[box]) for box in sorted(found)}


def place_whole(name: str, copies: tuple[Copy, ...], pieces: Source) -> Placed:
    """Take a tensor from one rank where all that hold it agree, whose bits are compared; ValueError where not."""
    for copy in copies[1:]:
        if not same_bits(pieces, copies[0].piece, copy.piece):
            raise ValueError(f"differs between rank {copies[0].rank} and rank {copy.rank}")
    spec = pieces.specs[copies[0].piece]
    start = (0,) * len(spec.shape)
    return Placed(name, read(spec), {start: copies}, boxes={start: (start, spec.shape)})
