"""Put a distributed checkpoint together: one whole checkpoint, in any container and dialect in the same pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..conversion.repository import open_input
from ..distributed.assembled import Assembled
from ..errors import InputError
from .choices import ConvertOptions, source_dialect
from .convert import convert_opened
from .convert_report import ConvertReport
from .whole import WholeOptions, write_whole


def reassemble(
    source: Path | str,
    target: Path | str,
    options: ConvertOptions | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertReport:
    """Write what the ranks of ``source`` hold as one checkpoint and return what was done.

    Every tensor is written under its name, training state included, unless ``options`` ask for a selection, a dialect,
    a family or a type: then :func:`lorabridge.actions.convert.convert` does it in the same pass, with no whole
    checkpoint in between. Copies of a slice are compared first unless ``options.check_replicas`` is false. Raises
    InputError also for a source that no ranks wrote.
    """
    started = time.perf_counter()
    options = options or ConvertOptions()
    given = open_input(Path(source), config=options.config, strategies=options.strategies, step=options.step)
    try:
        if not isinstance(given.source, Assembled):
            raise InputError(
                "the source is one whole checkpoint already",
                where=str(source),
                hint="use lorabridge convert, or name the directory that holds the ranks' files",
            )
        if not _converts(options):
            kept = WholeOptions(options.max_shard_size, options.crc, options.check_replicas, options.workers,
                                options.dry_run, options.overwrite, options.strategies, options.step,
                                options.engine)  # fmt: skip
            return write_whole(given, target, kept, progress=progress, started=started)
        if options.target_dialect is None and options.family is None:
            origin = source_dialect(given, None, options.facts.then(given.stated), options.source_dialect)
            options = replace(options, source_dialect=origin.name, target_dialect=origin.name)
        return convert_opened(given, target, options, progress=progress, started=started)
    finally:
        given.source.close()


def _converts(options: ConvertOptions) -> bool:
    """Say whether anything is asked for beyond putting the tensors together."""
    return bool(
        options.source_dialect or options.target_dialect or options.family or options.facts.entries or options.config
        or options.layout or options.dtype or options.include or options.exclude or options.layers or options.compress
        or options.adapter_only or options.encrypt
    )  # fmt: skip
