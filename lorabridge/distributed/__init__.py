"""Checkpoints that lie in pieces on many ranks: how each layout lies on disk, read as one logical checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .assembled import Assembled


def open_distributed(path: Path, *, strategies: Sequence[Path] = (), step: str | None = None) -> Assembled | None:
    """Open a directory that ranks wrote as one checkpoint, or return None where it is not one.

    ``strategies``, ``step``: see :func:`.ranks.open_ranks`; they are asked for by some layouts only. Raises InputError
    naming what is missing, disagrees or does not fit; nothing but headers is read.
    """
    if not path.is_dir():
        return None
    from .dcp import is_dcp, open_dcp
    from .deepspeed import open_zero, zero_directory
    from .iterations import iteration_directory, open_iteration
    from .ranks import is_rank_directory, open_ranks

    if is_rank_directory(path):
        return open_ranks(path, strategies=strategies, step=step)
    if is_dcp(path):
        return open_dcp(path)
    zero = zero_directory(path, step)
    if zero is not None:
        return open_zero(zero)
    iteration = iteration_directory(path, step)
    return open_iteration(iteration) if iteration is not None else None
