"""The checkpoints that a command compares or computes with: opened, read as their dialect, and in common names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..arithmetic import numerics
from ..arithmetic.floats import Bits, Numbers
from ..axes import Expr, Read, evaluate, reads
from ..conversion.read_facts import of_base
from ..conversion.repository import Input, open_input
from ..dialects import naming
from ..dialects.adapter import Adapter, Content, Dialect, Facts
from ..errors import MappingError
from ..manifest import Manifest
from ..merging.components import of_component
from ..tensors import Source
from .choices import source_dialect

BLOCK_BYTES = 4 << 20
"""Bytes of a tensor that are read at once where a matrix is gone through row by row."""


@dataclass(frozen=True, slots=True)
class Side:
    """One checkpoint, read as its dialect.

    ``kept`` is its manifest where that describes it; ``role``: what a command calls it in messages ("SRC", "A").
    """

    given: Input
    dialect: Dialect
    kept: Manifest | None
    content: Content
    adapter: Adapter
    role: str = ""

    @property
    def source(self) -> Source:
        """The tensors."""
        return self.given.source

    @property
    def path(self) -> str:
        """The path as given."""
        return str(self.given.path)

    @property
    def names(self) -> str:
        """Whose module names it has: "hf", "ms" or another project's (see ``dialects.naming``)."""
        return naming(self.dialect)

    @property
    def is_adapter(self) -> bool:
        """The checkpoint carries LoRA factors."""
        return bool(self.adapter.modules)

    def part_of(self, base: Side) -> Side:
        """Return a pipeline's adapter as the one of a network that lies by itself; see ``merging.components``."""
        known = {extra.name for extra in base.adapter.extras}
        return replace(self, adapter=of_component(self.adapter, known, self.path))

    def close(self) -> None:
        """Release the file."""
        self.given.source.close()


def open_side(
    path: Path | str, *, dialect: str | None = None, config: Path | None = None, facts: Facts | None = None,
    role: str = "", base: Side | None = None,
) -> Side:  # fmt: skip
    """Open one checkpoint and read its headers; errors are those of a conversion of the same file.

    ``facts`` are for every file of a command, so what a file's own manifest or sidecar says outranks them. ``base``:
    the model of an adapter whose file does not have all that it takes to find the modules.
    """
    given = open_input(Path(path), config=config)
    try:
        kept = given.manifest if given.manifest is not None and given.manifest.describes(given.source.specs) else None
        said = given.stated.then(kept.facts if kept else Facts()).then(facts or Facts())
        if base is not None and base.dialect.name == "hf":
            said = said.then(of_base(said, given.source.specs, base.source.specs, base.path))
        origin = source_dialect(given, kept, said, dialect)
        content = given.content(said)
        return Side(given, origin, kept, content, origin.parse(content), role)
    except BaseException:
        given.source.close()
        raise


def bits_of(expr: Expr, source: Source) -> Bits:
    """Return the bits of an expression over a file, C-contiguous."""

    def fetch(name: str) -> Bits:
        return source.read(name)

    bits = evaluate(expr, fetch, numerics.kernels("", numerics.Notes(), {}))
    return np.ascontiguousarray(bits).reshape(expr.shape)


def numbers_of(expr: Expr, source: Source) -> Numbers:
    """Return the values of an expression over a file as float64, exactly; MappingError for types without arithmetic."""
    if expr.dtype.numpy is None or expr.dtype.kind not in ("float", "int", "uint", "bool"):
        raise MappingError(f"no arithmetic on {expr.dtype}", where=f"{source.path}: {expr_name(expr)}")
    return numerics.values(bits_of(expr, source), expr.dtype)


class Rows:
    """Rows of an expression over a file: read alone where the file has them in one place, else taken from the whole.

    A tensor without axes is one row.
    """

    def __init__(self, expr: Expr, source: Source) -> None:
        self.expr = expr
        self.count = expr.shape[0] if expr.shape else 1
        self._source = source
        self._whole = None if isinstance(expr, Read) and expr.shape and expr.dtype.bits >= 8 else bits_of(expr, source)

    def take(self, first: int, last: int) -> Bits:
        """Return the bits of rows [first, last)."""
        if self._whole is not None:
            return self._whole.reshape(self.count, -1)[first:last] if not self.expr.shape else self._whole[first:last]
        assert isinstance(self.expr, Read)
        return self._source.read(self.expr.name, (first, last))

    def spans(self) -> Iterator[tuple[int, int]]:
        """Cut the rows into intervals of a bounded number of bytes."""
        nbytes = math.prod(self.expr.shape) * self.expr.dtype.bits // 8
        step = max(1, BLOCK_BYTES * self.count // max(1, nbytes))
        return ((first, min(first + step, self.count)) for first in range(0, self.count, step))


def expr_name(expr: Expr) -> str:
    """Name the tensors that an expression reads, for messages."""
    return ", ".join(reads(expr)) or "zeros"
