"""A checkpoint opened from Python: headers at once, tensors one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from .conversion.repository import Input, open_input
from .files.placeholders import spoken
from .tensors import TensorSpec


class Checkpoint(Mapping[str, "npt.NDArray[np.generic]"]):
    """Map tensor names to numpy arrays, each read from the file when it is asked for.

    bfloat16 and fp8 arrays have the dtypes of ``ml_dtypes``. Use it as a context manager, or call :meth:`close`.
    """

    def __init__(self, opened: Input) -> None:
        self._opened = opened

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Names, element types and shapes, in file order, without reading data."""
        return self._opened.source.specs

    @property
    def metadata(self) -> Mapping[str, str]:
        """The container's own string pairs."""
        return self._opened.source.metadata

    @property
    def config(self) -> Mapping[str, object] | None:
        """The adapter's config, from the directory, beside the file or from the manifest."""
        return self._opened.adapter_config

    @property
    def format(self) -> str:
        """The container: "safetensors", "torch" or "mindspore"."""
        return self._opened.source.format

    def __getitem__(self, name: str) -> npt.NDArray[np.generic]:
        spec = self.specs[name]
        bits = self._opened.source.read(name)
        return bits if spec.dtype.numpy is None else bits.view(spec.dtype.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def close(self) -> None:
        """Release the file."""
        self._opened.source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self.close()

    def __repr__(self) -> str:
        size = sum(spec.nbytes for spec in self.specs.values())
        return f"Checkpoint({spoken(str(self._opened.path))!r}, {self.format}, {len(self)} tensors, {size:,} bytes)"

    def _repr_html_(self) -> str:
        from .reports.plain import table_html

        rows = ((s.name, str(s.dtype), " x ".join(map(str, s.shape)), f"{s.nbytes:,}") for s in self.specs.values())
        return table_html(repr(self), ("tensor", "dtype", "shape", "bytes"), rows)


def open_checkpoint(path: Path | str, *, config: Path | None = None) -> Checkpoint:
    """Open a checkpoint file, a sharded set or an adapter directory of any container.

    Reads headers only. Raises InputError with the file and tensor for anything malformed or unsafe.
    """
    return Checkpoint(open_input(Path(path), config=config))
