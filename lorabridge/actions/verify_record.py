"""Hold a merged model against the record beside it: the merge run again, bit for bit."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UsageError
from ..merging.identity import MERGED_KEY, merged_mark
from ..merging.kernel import Merger
from . import merge_inputs
from .merge import plan_merge
from .merge_record import MergeRecipe, recipe_of
from .sides import Side
from .verify_conversion import run_forward
from .verify_inputs import VerifyOptions
from .verify_report import Check

Step = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a merged model's manifest says that it was made from, and where the adapters lie now."""

    recipe: MergeRecipe
    adapters: tuple[Path, ...]

    def sentence(self) -> str:
        """Name the adapters with their weights."""
        rows = zip(self.adapters, self.recipe.weights, strict=True)
        return " and ".join(f"{path}" + (f" times {weight:g}" if weight != 1 else "") for path, weight in rows)


def holds_adapters(side: Side) -> bool:
    """Say whether a whole model says that adapters were merged into it."""
    return not side.is_adapter and (MERGED_KEY in side.source.metadata or recipe_of(side.kept, side.path) is not None)


def recorded(base: Side, merged: Side) -> Recorded:
    """Find what a merged model was made from; a UsageError says which command verifies it where nothing is found."""
    recipe = recipe_of(merged.kept, merged.path)
    if recipe is None:
        mark = merged_mark(merged.source.metadata, where=merged.path)
        names = [str(row.get("adapter")) for row in mark.adapters] if mark is not None else []
        raise _not_found(f"{merged.role} holds {_listed(names)}, and no manifest says where it lies", base, merged)
    found = recipe.found(merged.given.path)
    if len(found) < len(recipe.adapters):
        said = f"{merged.role} was merged from {recipe.base} and {_listed(recipe.adapters)}"
        raise _not_found(f"{said}, which is not where it was", base, merged)
    return Recorded(recipe, tuple(found))


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return " and ".join(names) or "an adapter"


def _not_found(problem: str, base: Side, merged: Side) -> UsageError:
    command = shlex.join(["lorabridge", "verify", "ADAPTER", merged.path, "--base", base.path])
    return UsageError(
        problem, where=merged.path,
        hint=f"name the adapter: {command}; several that were merged together are one after `lorabridge combine "
        "--method cat`; `lorabridge diff` compares the two models as they are",
    )  # fmt: skip


def verify_record(
    base: Side, merged: Side, known: Recorded, options: VerifyOptions, step: Step
) -> tuple[tuple[Check, ...], tuple[str, ...]]:
    """Merge again, compare every tensor; also return what that proves. Raises what planning a merge raises."""
    assert merged.kept is not None
    told = replace(known.recipe.options(merged.kept), config=options.config, mappings=options.mappings)
    merger = Merger()
    with merge_inputs.opened(base.given.path, known.adapters, told) as given:
        if given.base.model_config is None:
            given = replace(given, base=replace(given.base, model_config=merged.kept.model_config))
        job = plan_merge(given, merged.given.path, told)
        names, bits = run_forward(job.model.plan, given.joined, merged.source, step, merger.kernels())
    again = shlex.join(["lorabridge", "verify", str(known.adapters[0]), merged.path, "--base", base.path])
    if not bits.ok and len(known.adapters) == 1 and known.recipe.weights == (1.0,):
        bits = replace(bits, detail=f"{bits.detail}; module by module: {again}")
    bits = replace(bits, name=f"merged again, {base.role} and the adapter make {merged.role}'s bits")
    return (names, bits), (f"every bit of {merged.role} is {base.role} with {known.sentence()} merged into it again",)
