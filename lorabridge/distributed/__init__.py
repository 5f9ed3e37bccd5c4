"""Checkpoints that lie in pieces on many ranks: how each layout lies on disk, read as one logical checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .assembled import Assembled
    from .placing import Findings


def open_distributed(
    path: Path, *, strategies: Sequence[Path] = (), step: str | None = None, findings: Findings | None = None
) -> Assembled | None:
    """Open a directory that ranks wrote as one checkpoint, or return None where it is not one.

    ``strategies``, ``step``: see :func:`.ranks.open_ranks`; they are asked for by some layouts only, and by default are
    what :mod:`.told` has of the path. Raises InputError
    naming what is missing, disagrees or does not fit; nothing but headers is read, and what ranks hold that nothing
    says how to cut, to compare it. With ``findings`` what can be described is: errors that leave something to describe
    go there, and so do the tensors that cannot be put together.
    """
    if not path.is_dir():
        return None
    from .dcp import is_dcp, open_dcp
    from .deepspeed import open_zero
    from .dtensors import open_dtensors, rank_files
    from .hfdcp import open_sharded, sharded_files
    from .iterations import iteration_directory, open_iteration
    from .megatron import is_megatron, iteration, open_megatron
    from .ranks import is_rank_directory, open_ranks
    from .told import step_of, strategies_of
    from .universal import open_universal, universal_directory
    from .zerofiles import zero_directory

    strategies, step = strategies or strategies_of(path), step_of(path) if step is None else step
    if is_rank_directory(path):
        return open_ranks(path, strategies=strategies, step=step, findings=findings)
    path = iteration(path, step) or path
    if is_dcp(path):
        return open_dcp(path, findings=findings)
    if is_megatron(path):
        return open_megatron(path, findings=findings)
    if rank_files(path):
        return open_dtensors(path, findings=findings)
    if sharded_files(path):
        return open_sharded(path, findings=findings)
    universal = universal_directory(path, step)  # which holds model states, too
    zero = None if universal == path else zero_directory(path, step)
    if zero is not None:
        return open_zero(zero, findings=findings)
    if universal is not None:
        return open_universal(universal)
    found = iteration_directory(path, step)
    return open_iteration(found, findings=findings) if found is not None else None
