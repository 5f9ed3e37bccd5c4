"""The two seams of a conversion: a Source of named tensors and a Sink for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .dtypes import DType

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bits = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Describe one tensor: its name, element type and shape."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the raw little-endian C-contiguous buffer."""
        return (self.size * self.dtype.bits + 7) // 8


MARK = "lorabridge."
"""How metadata keys begin that every container carries, and that a conversion keeps: what was done to the tensors."""


def marks(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata that travels with the tensors from file to file."""
    return {key: text for key, text in metadata.items() if key.startswith(MARK)}


@dataclass(frozen=True, slots=True)
class Extent:
    """Name a byte range of a file that holds (a part of) one tensor's contiguous buffer."""

    path: Path
    offset: int
    length: int


class Source(Protocol):
    """Read tensors lazily. Opening reads headers only; every method may be called from any thread.

    ``specs`` keeps the file's order. ``metadata`` holds the container's own string pairs. ``format`` is the
    container's registry name ("safetensors", "torch", "mindspore").
    """

    format: str
    path: Path
    specs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Bits:
        """Return the bits of a tensor, or of rows [start, stop) of its first axis.

        The array has the tensor's shape and ``dtype.carrier()`` as dtype (flat uint8 for types below a byte),
        is C-contiguous and owned by the caller. A KeyError means that the name is not in ``specs``; an
        InputError that the file changed or ended early.
        """
        ...

    def extents(self, name: str) -> tuple[Extent, ...]:
        """Return the byte ranges whose concatenation is the tensor's buffer; () where it must be read instead."""
        ...

    def close(self) -> None:
        """Release file descriptors; the source must not be used afterwards."""
        ...


class Sink(Protocol):
    """Write one checkpoint whose layout is fixed before the first byte of a tensor is written.

    ``write`` and ``copy`` may be called from any thread and in any order; together they must cover each tensor's
    buffer exactly once. Nothing is visible at the final path until the staging area that owns the files commits.
    """

    def begin(self, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> None:
        """Lay out headers for these tensors in this order. A MappingError names a tensor that cannot be held."""
        ...

    def write(self, name: str, offset: int, block: Bits) -> None:
        """Write a C-contiguous block at a byte offset inside the tensor's buffer."""
        ...

    def copy(self, name: str, offset: int, extent: Extent) -> None:
        """Copy a file range to a byte offset inside the tensor's buffer, in the kernel where possible."""
        ...

    def finish(self) -> None:
        """Write what depends on the data (checksums, trailers) and flush every file to disk."""
        ...
