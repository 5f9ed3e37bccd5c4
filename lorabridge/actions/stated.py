"""What every action that reads adapters or models can be told of them: names, and what files do not say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..dialects.adapter import Facts


@dataclass(frozen=True, slots=True)
class Told:
    """What the options of a command say about names."""

    family: str | None = None
    layout: Mapping[str, str] = field(default_factory=dict)
    mappings: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """The options that actions share.

    ``family``: the table between names of different projects; ``layout``: the choices that it asks for; ``mappings``:
    a directory of one's own tables; ``config``: an adapter's or a model's, where it is not beside its file; ``facts``:
    what files do not say.
    """

    family: str | None = None
    config: Path | None = None
    layout: Mapping[str, str] = field(default_factory=dict)
    mappings: Path | None = None
    facts: Facts = field(default_factory=Facts)

    @property
    def told(self) -> Told:
        """What is said about names."""
        return Told(self.family, self.layout, self.mappings)
