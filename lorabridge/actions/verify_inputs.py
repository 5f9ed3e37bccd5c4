"""What a verification is told, and the checkpoints that it reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .sides import Side, open_side
from .stated import Stated
from .verify_report import ComparedFile


@dataclass(frozen=True, slots=True)
class VerifyOptions(Stated):
    """Everything a verification can be told.

    ``depths``: those asked for by name; where none is, *tensors* and *layers* if possible. ``model``: depth *model*
    too, which runs whole networks. ``facts`` say what the files do not;
    what a file, its config or its manifest says outranks them. ``seed``: of the random inputs and bases.
    """

    base: Path | None = None
    depths: tuple[str, ...] = ()
    model: bool = False
    source_dialect: str | None = None
    target_dialect: str | None = None
    seed: int = 0


def opened(role: str, path: Path, options: VerifyOptions, base: Side | None = None) -> Side:
    """Open one checkpoint and read its headers, for an adapter's names with its base's at hand.

    Errors are those of a conversion of the same file.
    """
    chosen = {"SRC": options.source_dialect, "DST": options.target_dialect}.get(role)
    config = options.config if role == "SRC" else None
    return open_side(path, dialect=chosen, config=config, facts=options.facts, role=role, base=base)


def described(side: Side) -> ComparedFile:
    """Return what the report says about a file."""
    specs = side.source.specs.values()
    return ComparedFile(
        side.role, side.path, side.source.format, side.dialect.name, side.dialect.framework, len(specs),
        sum(spec.nbytes for spec in specs),
    )  # fmt: skip
