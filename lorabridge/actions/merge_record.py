"""The record beside a merged model: what it was made from and how, so that other commands need not be told again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .. import __version__, manifest
from ..conversion.plan import Plan
from ..conversion.repository import Output
from ..dialects import project_of
from ..dialects.adapter import Dialect, Fact, Facts, Json, Value
from ..errors import InputError, counted
from ..files import placeholders
from ..files.placeholders import is_remote
from ..manifest import Manifest
from .merge_inputs import MergeOptions, Opened

COMMAND = "merge"


@dataclass(frozen=True, slots=True)
class MergeRecipe:
    """How a model was merged.

    ``base`` and ``adapters``: names of the files; ``paths``: of the adapters, from the merged model's directory or with
    their store, "" where none is known. ``weights``: one for each adapter. ``dialect``, ``family``, ``layout``: as they
    were told.
    """

    base: str
    adapters: tuple[str, ...]
    paths: tuple[str, ...]
    weights: tuple[float, ...]
    dialect: str | None = None
    exact: bool = False
    residual_base: bool = False
    onto_merged: bool = False
    family: str | None = None
    layout: Mapping[str, str] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)

    def as_json(self) -> Json:
        """Spell it for a manifest."""
        rows = zip(self.adapters, self.paths, self.weights, strict=True)
        adapters: list[Value] = [{"name": name, "path": path, "weight": weight} for name, path, weight in rows]
        return {
            "command": COMMAND, "base": self.base, "adapters": adapters, "from": self.dialect, "exact": self.exact,
            "residual_base": self.residual_base, "onto_merged": self.onto_merged,
            "family": self.family, "layout": dict(self.layout),
            "facts": [list(row) for row in manifest.facts_json(self.facts)],
        }  # fmt: skip

    def options(self, kept: Manifest) -> MergeOptions:
        """Return the options of the merge, as far as they decide bits; ``kept``: the manifest that holds the recipe."""
        return MergeOptions(
            adapter_dialect=self.dialect, target_dialect=kept.target.dialect, family=self.family,
            layout=self.layout, facts=self.facts, weights=self.weights, exact=self.exact,
            residual_base=self.residual_base, onto_merged=self.onto_merged, any_base=True,
        )  # fmt: skip

    def found(self, merged: Path) -> list[Path]:
        """Return the adapters that lie where they lay, or beside the model, in their order."""
        folder = merged.resolve().parent
        places = [
            [placeholders.looked_at(path if is_remote(path) else _from(folder, path)) for path in (path, name) if path]
            for name, path in zip(self.adapters, self.paths, strict=True)
        ]
        return [path for row in places for path in [next((p for p in row if p.exists()), None)] if path is not None]


def recipe_of(kept: Manifest | None, where: str) -> MergeRecipe | None:
    """Read the recipe in a manifest; None where it holds none, InputError where it is malformed."""
    raw = None if kept is None else kept.recipe
    if raw is None or raw.get("command") != COMMAND:
        return None
    try:
        rows = [row for row in _list(raw["adapters"]) if isinstance(row, Mapping)]
        layout = raw.get("layout") or {}
        if not isinstance(layout, Mapping):
            raise ValueError("layout is no object")
        return MergeRecipe(
            str(raw["base"]), tuple(str(row["name"]) for row in rows), tuple(str(row["path"]) for row in rows),
            tuple(float(str(row["weight"])) for row in rows), _text(raw.get("from")), raw.get("exact") is True,
            raw.get("residual_base") is True, raw.get("onto_merged") is True, _text(raw.get("family")),
            {str(key): str(value) for key, value in layout.items()},
            manifest.facts_from_json(_list(row) for row in _list(raw.get("facts") or [])),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the record of the merge is malformed ({type(error).__name__}: {error})", where=where,
            hint="move the manifest away and pass flags",
        ) from error  # fmt: skip


def _from(folder: Path, path: str) -> Path:
    """Return where a record says that a path lies; in a store, whose names have no dots, without its ``..``."""
    place = folder / path
    return Path(os.path.normpath(place)) if placeholders.destination(folder) is not None else place


def _list(raw: Value) -> list[Value]:
    if not isinstance(raw, list):
        raise ValueError(f"{raw!r} is no list")
    return raw


def _text(raw: object) -> str | None:
    return None if raw is None else str(raw)


def recipe(given: Opened, target: Path, options: MergeOptions) -> MergeRecipe:
    """Describe a merge of ``given`` into ``target``."""
    weights = options.weights or (1.0,) * len(given.adapters)
    paths = [one.path for one in given.adapters]
    return MergeRecipe(
        given.base.path.resolve().name, tuple(path.resolve().name for path in paths),
        tuple(_relative(path, target) for path in paths), tuple(map(float, weights)), options.adapter_dialect,
        options.exact, options.residual_base, options.onto_merged, options.family, options.layout, options.facts,
    )  # fmt: skip


def _relative(path: Path, target: Path) -> str:
    """Return a path from the target's directory; "" where only the root is common: it would tell about the machine.

    What lies in another store than the target has its name there.
    """
    far, near = placeholders.destination(path), placeholders.destination(target)
    if (far and far[0]) != (near and near[0]):
        return "" if far is None else far[0].url(far[1])
    there, folder = path.resolve(), target.resolve().parent
    if os.path.commonpath([there, folder]) == os.path.sep:
        return ""
    return os.path.relpath(there, folder)


def record(
    given: Opened, output: Output, goal: Dialect, options: MergeOptions, planned: Plan, config: Json | None,
    made: MergeRecipe | None = None,
) -> Manifest:  # fmt: skip
    """Return the manifest of a model that holds adapters; ``options`` name the table where one is known."""
    words = f"{given.base.path.name} and {counted(len(given.adapters), 'adapter')}"
    other = "ms" if goal.name == "hf" else "hf"
    named = {f"layout.{key}": value for key, value in options.layout.items()}
    known = {"family": options.family, **named} if options.family is not None and not project_of(options.family) else {}
    return Manifest(
        __version__, manifest.Side("", other, words, ()),
        manifest.Side(output.format, goal.name, output.file, tuple(planned.specs)), known, Facts(), Facts(),
        Facts((Fact("*", "merged", True),)), planned.digest, model_config=config,
        recipe=None if made is None else made.as_json(),
    )  # fmt: skip
