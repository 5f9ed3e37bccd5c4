"""Tensors made on the way: a Source whose tensors are appended to an unnamed temporary file, so that memory stays free.

The file lies in the system's temporary directory (``TMPDIR``) and vanishes with the process, however that ends.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Lock

import numpy as np

from .arithmetic.floats import Bits, Numbers
from .arithmetic.numerics import cast
from .axes import Expr, read
from .dtypes import BY_NAME, DType
from .tensors import Extent, TensorSpec


class Spool:
    """Hold computed tensors by name; any thread may read, and :meth:`put` is for one thread at a time.

    ``key``: the prefix of the spool among joined sources, which the expressions that :meth:`put` returns have.
    """

    def __init__(self, key: str = "made") -> None:
        self.key = key
        self.format = "spool"
        self.path = Path(tempfile.gettempdir())
        self.metadata: Mapping[str, str] = {}
        self.specs: Mapping[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        self._file = tempfile.TemporaryFile(prefix="lorabridge-")  # noqa: SIM115  closed by close()
        self._end = 0
        self._hash = hashlib.sha256()
        self._lock = Lock()

    @property
    def digest(self) -> str:
        """Hexadecimal sha256 of the bytes of all tensors in order."""
        return self._hash.hexdigest()

    def put(self, name: str, numbers: Numbers, dtype: DType, *, where: str = "") -> Expr:
        """Round numbers once to a type, keep them under a new name, and return how a joined source reads them.

        A MappingError says that a number is beyond the type's range.
        """
        if name in self.specs:
            raise ValueError(f"{name!r} was put before")
        double = BY_NAME["float64"]
        bits, _ = cast(np.ascontiguousarray(numbers).view(double.carrier()), double, dtype, where=where or name)
        data = bits.tobytes()
        with self._lock:
            self._file.seek(self._end)
            self._file.write(data)
            self._file.flush()
            spec = TensorSpec(name, dtype, tuple(numbers.shape))
            self.specs = {**self.specs, name: spec}
            self._offsets[name] = self._end
            self._end += len(data)
            self._hash.update(data)
        return read(replace(spec, name=f"{self.key}/{name}"))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Bits:
        """Return the bits of a tensor, or of rows of its first axis."""
        spec, offset = self.specs[name], self._offsets[name]
        shape, length = spec.shape, spec.nbytes
        if rows is not None:
            row = length // shape[0] if shape[0] else 0
            shape, offset, length = (rows[1] - rows[0], *shape[1:]), offset + rows[0] * row, (rows[1] - rows[0]) * row
        data, done = bytearray(length), 0
        while done < length:
            count = os.preadv(self._file.fileno(), [memoryview(data)[done:]], offset + done)
            if count <= 0:
                raise OSError("the temporary file ended early")
            done += count
        found: Bits = np.frombuffer(data, spec.dtype.carrier()).reshape(shape)
        return found

    def extents(self, name: str) -> tuple[Extent, ...]:
        """Return nothing: the file has no path, so its tensors are read."""
        return ()

    def close(self) -> None:
        """Delete the file."""
        self._file.close()
