"""Write the undo file of a merge while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ..arithmetic import numerics
from ..arithmetic.recipe import recipe_of
from ..axes import Kernel
from ..dialects.adapter import Adapter, Json
from ..errors import OutputError
from ..joined import prefixed
from ..merging.kernel import Merger, Seen
from ..merging.undo import Recorder
from ..merging.unmerge_kernel import Recording, additive
from ..merging.unmerge_planning import Traces, at_home, keep_others, traces
from ..tensors import TensorSpec, marks
from . import merge_inputs
from .merge import MergeJob
from .merge_inputs import MergeOptions, Opened


@dataclass(frozen=True, slots=True)
class UndoSummary:
    """What an undo file holds: its bytes, those of the tensors that it restores, and how it restores them.

    ``added``: parameters that come back from the merged ones less the delta; ``whole``: those that the merge replaced
    or normalised, whose bits are kept against the merged ones; ``raw``: those that the merged model does not have.
    """

    path: str
    nbytes: int
    restores: int
    added: int
    whole: tuple[str, ...]
    raw: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """Return the object "undo" of the JSON documents of merge and switch."""
        return asdict(self)

    def sentence(self) -> str:
        """Return one line for a report."""
        from ..reports.plain import count, size

        share = f" ({self.nbytes / self.restores:.1%} of what it restores)" if self.restores else ""
        kept = [f"{count(len(self.whole), 'replaced parameter')} in it"] if self.whole else []
        kept += [f"{count(len(self.raw), 'parameter')} whole"] if self.raw else []
        return f"undo file {self.path}: {size(self.nbytes)}{share}{', with ' + ' and '.join(kept) if kept else ''}"


class UndoWriter:
    """Watch a merge (``actions.merge.Watch``) and write its undo file just before the model is published."""

    def __init__(self, path: Path | str, options: MergeOptions) -> None:
        self.path = Path(path)
        self.summary: UndoSummary | None = None
        self._options = options

    def __call__(self, job: MergeJob) -> tuple[Seen, Callable[[], None]]:
        """Return what notes each block of a merge, and what writes the file."""
        given = job.given
        base = prefixed(given.origin.parse(given.base.content()), merge_inputs.BASE, given.base.source.specs)
        base = at_home(base, job.merged.homes)
        return self.start(base, traces(base, job.merged.model), given, given.base.model_config, Merger().kernels())

    def start(
        self, base: Adapter, found: Traces, given: Opened, config: Json | None, kernels: Mapping[str, Kernel]
    ) -> tuple[Seen, Callable[[], None]]:
        """Return what notes each block, and what writes the file.

        ``base``: the model that ``given.adapters`` are merged into; ``kernels``: what ``found`` needs beside casts.
        """
        if self.path.exists() and not self._options.overwrite:
            hint = "choose another name or pass --overwrite"
            raise OutputError("the undo file exists", where=str(self.path), hint=hint)
        recorder = Recorder(self.path)
        seen = Recording(recorder, found.nodes, given.joined)
        facts: dict[str, object] = {
            "base": given.base.path.name,
            "adapters": [one.path.name for one in given.adapters],
            "weights": list(self._options.weights or (1.0,) * len(given.adapters)),
            "exact": self._options.exact,
            "side": given.origin.name,
            "family": self._options.family,
            "added": list(found.added),
            "marks": marks(given.base.source.metadata),
            "config": None if config is None else dict(config),
        }

        def finish() -> None:
            others = {**numerics.kernels("undo", numerics.Notes(), {}), **kernels}
            keep_others(recorder, found, given.joined, others)
            nbytes = recorder.write(facts, overwrite=self._options.overwrite)
            recorder.close()
            self.summary = _summary(str(self.path), nbytes, base, found)

        return seen, finish


def _summary(path: str, nbytes: int, base: Adapter, found: Traces) -> UndoSummary:
    values = {extra.name: extra.value for extra in base.extras}
    touched = [*found.nodes, *found.replaced, *found.lost]
    specs = [TensorSpec(name, values[name].dtype, values[name].shape) for name in touched]
    dora = [name for name, node in found.nodes.items() if not additive(recipe_of(node)[0])]
    return UndoSummary(
        path, nbytes, sum(spec.nbytes for spec in specs), len(found.nodes) - len(dora),
        (*dora, *found.replaced), tuple(found.lost),
    )  # fmt: skip
