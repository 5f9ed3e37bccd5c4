"""Take merged adapters out of a model again: bit for bit with the merge's undo file, as near as can be without."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..conversion.accounts import Here
from ..merging.identity import MERGED_KEY
from ..merging.unmerge_kernel import Unmerger
from . import merge_inputs, restoring
from .base_check import UNMERGED_KEY
from .merge_inputs import MergeOptions
from .model_output import Progress, write
from .restoring import GuessRow, Way


@dataclass(frozen=True, slots=True)
class UnmergeReport:
    """One unmerging, done or (``dry_run``) planned.

    ``exact``: the undo file restored every parameter that the merge had changed, and the digests of the base agree.
    Otherwise ``rows`` say what may be wrong, and ``wrong`` is the share of the elements of these parameters that is
    expected to differ from the base. ``restored``: the parameters; ``left_merged``: those that stay as they are in the
    merged model, as asked; ``nbytes``: bytes of the output tensors.
    """

    merged: str
    adapters: tuple[str, ...]
    undo: str
    target: str
    target_format: str
    target_dialect: str
    exact: bool
    restored: tuple[str, ...]
    tensors: int
    nbytes: int
    seconds: float
    left_merged: tuple[str, ...]
    rows: tuple[GuessRow, ...]
    wrong: float
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    digest: str
    dry_run: bool

    def as_json(self) -> dict[str, object]:
        """Return the JSON document of ``lorabridge unmerge --json``."""
        return {"schema": "lorabridge/unmerge/1", **asdict(self)}

    def summary(self) -> str:
        """Return one line: what went where, and how good it is."""
        from ..reports.plain import count

        done = "would restore" if self.dry_run else "restored"
        what = count(len(self.restored), "parameter")
        where = f"of {count(self.tensors, 'tensor')} ({self.target_dialect} {self.target_format}) at {self.target}"
        if self.exact:
            digests = "the digests of the base would be checked" if self.dry_run else "the digests of the base agree"
            return f"{done} {what} bit for bit, {where}; {digests}"
        share = "" if self.dry_run else f", about {self.wrong:.2%} of their elements expected to differ from the base"
        return f"{done} {what} approximately, {where}{share}"

    def _repr_html_(self) -> str:
        from ..reports.plain import table_html

        rows = ((r.parameter, f"{r.blurred:.2%}", f"{r.wrong:.2%}", f"{r.error:.1e}") for r in self.rows)
        return table_html(self.summary(), ("parameter", "blurred", "expected wrong", "largest error"), rows)


def unmerge(
    merged: Path | str, adapters: Path | str | Sequence[Path | str], target: Path | str,
    options: MergeOptions | None = None, *, undo: Path | str | None = None, progress: Progress | None = None,
) -> UnmergeReport:  # fmt: skip
    """Take ``adapters`` out of ``merged``, write the base to ``target`` and return what was done.

    With ``undo``, the file that the merge wrote, the base comes back bit for bit and is compared with the recorded
    digests. Without it the result is the best inverse of the rounding, which is not the base. All or nothing. Raises
    InputError (malformed input, a damaged undo file), MappingError (files that do not belong together, parameters that
    cannot be computed back), DifferentError (the digests differ), OutputError, StorageError, UsageError.
    """
    started, paths = time.perf_counter(), merge_inputs.paths_of(adapters)
    kept = restoring.open_undo(undo)
    options = restoring.recorded(options or MergeOptions(), kept, len(paths))
    with merge_inputs.opened(Path(merged), paths, options) as given:
        way = restoring.way_back(given, options, kept, partial=True)
        said = {} if kept is not None else {UNMERGED_KEY: "the best inverse of a merge, not the base itself"}
        said |= way.left
        writing = restoring.planned(
            way.given, way.restored.model, way.config, target, options, metadata=said, merged=MERGED_KEY in said,
            seed=f"unmerge {undo}",
        )  # fmt: skip
        unmerger = Unmerger(way.restored.away, kept)
        if not options.dry_run:
            write(writing, options, Here(unmerger.kernels()), unmerger.check, progress)
        rows = restoring.guesses(unmerger)
        return UnmergeReport(
            **writing.described(),
            **way.described(),
            adapters=tuple(str(one.path) for one in given.adapters),
            seconds=time.perf_counter() - started,
            left_merged=tuple(way.restored.left),
            rows=rows,
            wrong=restoring.expected_wrong(rows),
            notes=writing.notes,
            warnings=(*way.warnings, *_warnings(way, exact=kept is not None)),
            dry_run=options.dry_run,
        )


def _warnings(way: Way, *, exact: bool) -> tuple[str, ...]:
    from ..reports.plain import count

    reasons: dict[str, list[str]] = {}
    for name, why in way.restored.left.items():
        reasons.setdefault(why, []).append(name)
    said = [
        f"{count(len(names), 'parameter')} as in the merged model, not as in the base"
        + (f" ({why})" if why else "") + f": {', '.join(names)}"
        for why, names in reasons.items()
    ]  # fmt: skip
    partly = any(name in way.nodes for name in way.restored.left)
    what = "part of the adapter" if partly else "another adapter"
    more = (f"the result is still a merged model: it holds {what}",) if MERGED_KEY in way.left else ()
    return (*(() if exact else (INEXACT,)), *said, *more)


INEXACT = (
    "without an undo file the result is only near to the base: rounding lost bits when the adapter was merged; "
    "`lorabridge merge --undo FILE` keeps them"
)
