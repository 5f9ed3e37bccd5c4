"""Remove the staging directories that killed runs left behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, OutputError, UsageError
from ..files import placeholders
from ..files.fsio import StagingArea, find_staging, remove_staging


@dataclass(frozen=True, slots=True)
class CleanReport:
    """What was found in ``directory``: ``removed`` (with ``dry_run``: what would be) and ``held`` by a live run."""

    directory: Path
    dry_run: bool
    removed: tuple[StagingArea, ...]
    held: tuple[StagingArea, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the staged files that were removed or would be."""
        return sum(area.size for area in self.removed)


def clean(directory: Path, *, dry_run: bool = False) -> CleanReport:
    """Remove the staging directories directly in ``directory`` that no run holds.

    What a killed ``--overwrite`` had set aside is put back first. Raises InputError when ``directory`` is none,
    StorageError when the operating system refuses.
    """
    if placeholders.destination(directory) is not None:
        hint = "run the command that was killed again, with the same target: it writes over what is there"
        raise UsageError("what a killed upload left in a store is not removed", where=str(directory), hint=hint)
    if not directory.is_dir():
        raise InputError("not a directory", where=str(directory), hint="name the directory that holds the outputs")
    removed: list[StagingArea] = []
    held: list[StagingArea] = []
    for area in find_staging(directory):
        if area.held:
            held.append(area)
            continue
        try:
            if dry_run or remove_staging(area.path):
                removed.append(area)
        except OutputError:  # a run took it up in the meantime
            held.append(area)
    return CleanReport(directory, dry_run, tuple(removed), tuple(held))
