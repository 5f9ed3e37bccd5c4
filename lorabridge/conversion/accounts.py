"""The kernels of a run together with what they note, so that parts of it can be done in other processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, Self

from ..arithmetic import numerics
from ..arithmetic.notes import Notes
from ..axes import Kernel
from ..errors import UsageError


class Arithmetic(Protocol):
    """Kernels and their notes."""

    def kernels(self, output: str) -> Mapping[str, Kernel]:
        """Return the kernels for one output; they may be called from any thread."""
        ...

    def elsewhere(self) -> Self:
        """Return what does the same and has noted nothing yet, fit to be sent to another process and back."""
        ...

    def absorb(self, other: Self) -> None:
        """Add what a part of the run noted elsewhere."""
        ...


@dataclass(frozen=True, slots=True)
class Numeric:
    """Casts, scalings and what undoes them; see :func:`lorabridge.arithmetic.numerics.kernels`.

    ``keys``: under which name an output's residue is kept, where that is not the output's own.
    """

    notes: Notes = field(default_factory=Notes)
    residues: Mapping[str, bytes] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)

    def kernels(self, output: str) -> Mapping[str, Kernel]:
        """Return the kernels for one output."""
        return numerics.kernels(self.keys.get(output, output), self.notes, self.residues)

    def elsewhere(self) -> Numeric:
        """Return the same without notes."""
        return Numeric(Notes(), self.residues, self.keys)

    def absorb(self, other: Numeric) -> None:
        """Add what a part of the run noted elsewhere."""
        self.notes.absorb(other.notes)


@dataclass(frozen=True, slots=True)
class Here:
    """Kernels that hold what only this process has, beside casts."""

    own: Mapping[str, Kernel]
    notes: Notes = field(default_factory=Notes)

    def kernels(self, output: str) -> Mapping[str, Kernel]:
        """Return the kernels for one output."""
        return {**numerics.kernels(output, self.notes, {}), **self.own}

    def elsewhere(self) -> Here:
        """Refuse with a UsageError."""
        raise UsageError("this is done by one process", hint="use --engine process")

    def absorb(self, other: Here) -> None:
        """Do nothing: there is no other."""
