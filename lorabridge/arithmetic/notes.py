"""What the kernels of a run have to say: what was rounded, and what undoing a scaling needs."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock

from ..errors import MappingError


@dataclass(frozen=True, slots=True)
class Rounding:
    """What arithmetic cost one tensor: elements whose value changed, of how many, and the worst relative error.

    An element that vanished has relative error 1; ``overflowed`` ones were saturated or became infinite.
    """

    inexact: int
    elements: int
    max_relative_error: float
    overflowed: int = 0

    def plus(self, other: Rounding) -> Rounding:
        """Add another part of the same tensor."""
        worst = max(self.max_relative_error, other.max_relative_error)
        return Rounding(
            self.inexact + other.inexact, self.elements + other.elements, worst, self.overflowed + other.overflowed
        )


class Notes:
    """What the kernels of one run have to say; any thread may add, and the order of adding leaves no trace."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._rounding: dict[str, Rounding] = {}
        self._residues: dict[str, dict[bytes, bytes]] = {}

    def add(self, output: str, rounding: Rounding) -> None:
        """Count a part of an output."""
        with self._lock:
            known = self._rounding.get(output)
            self._rounding[output] = rounding if known is None else known.plus(rounding)

    def keep(self, output: str, digest: bytes, residue: bytes) -> None:
        """Keep what undoing one scaling needs; ``digest`` identifies its result, an empty residue says: nothing."""
        with self._lock:
            known = self._residues.setdefault(output, {}).setdefault(digest, residue)
        if known != residue:
            raise MappingError(
                "two different blocks become equal when they are scaled, so the way back could not tell them apart",
                where=output,
                hint="convert one of them apart, with --include",
            )

    def absorb(self, other: Notes) -> None:
        """Add what another process noted about other parts of the same run; raises what :meth:`keep` raises."""
        for output, rounding in other._rounding.items():
            self.add(output, rounding)
        for output, entries in other._residues.items():
            for digest, residue in entries.items():
                self.keep(output, digest, residue)

    def __getstate__(self) -> tuple[dict[str, Rounding], dict[str, dict[bytes, bytes]]]:
        with self._lock:
            return dict(self._rounding), {name: dict(entries) for name, entries in self._residues.items()}

    def __setstate__(self, state: tuple[dict[str, Rounding], dict[str, dict[bytes, bytes]]]) -> None:
        self._lock = Lock()
        self._rounding, self._residues = state

    @property
    def rounding(self) -> Mapping[str, Rounding]:
        """Per output tensor."""
        with self._lock:
            return dict(sorted(self._rounding.items()))

    @property
    def residues(self) -> Mapping[str, bytes]:
        """Per output tensor with any: entries of digest, length (8 bytes, little-endian) and zlib data, by digest."""
        with self._lock:
            packed = {name: _pack(entries) for name, entries in sorted(self._residues.items())}
        return {name: raw for name, raw in packed.items() if raw}


def _pack(entries: Mapping[bytes, bytes]) -> bytes:
    return b"".join(key + struct.pack("<Q", len(data)) + data for key, data in sorted(entries.items()) if data)
