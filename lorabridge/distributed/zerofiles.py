"""The files of a DeepSpeed checkpoint: which of them are whose, how many ranks there were, and what is missing."""

from __future__ import annotations

import re
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError
from ..formats.untrusted import read_word, shown
from .partitions import HINT, Said

MAX_RANKS = 1 << 20
"""Ranks of a run."""

_OPTIMIZER = re.compile(r"(?:bf16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{2,6})_optim_states\.pt")
_MODEL = re.compile(r"(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{2,6})_model_states\.pt")
_LAYER = re.compile(r"layer_(\d{2,6})(?:-model_(\d{2,6}))?-model_states\.pt")
_EXPERTS = re.compile(
    r"(?:layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt|expp_rank_\d+_mp_rank_\d+_optim_states\.pt"
)


def zero_directory(path: Path, step: str | None = None) -> Path | None:
    """Return the directory of a tag: ``path`` itself, or what ``latest`` (or ``step``, a tag) names in it; or None."""
    if _is_tag(path):
        return path
    latest = path / "latest"
    tag = step or (read_word(latest) if latest.is_file() else "")
    inside = path / tag
    if not tag or "/" in tag or tag in (".", "..") or not _is_tag(inside):
        return None
    return inside


def _is_tag(path: Path) -> bool:
    return any(_MODEL.fullmatch(p.name) or _LAYER.fullmatch(p.name) for p in path.glob("*model_states.pt"))


@dataclass(slots=True)
class Listed:
    """The files of a tag: by model-parallel and data-parallel rank, and by layer and tensor rank."""

    models: dict[int, dict[int, Path]] = field(default_factory=dict)
    optimizers: dict[int, dict[int, Path]] = field(default_factory=dict)
    layers: dict[int, dict[int, Path]] = field(default_factory=dict)

    @property
    def third(self) -> bool:
        """Whether every data-parallel rank has model states of its own, as ZeRO's stage 3 has."""
        return any(file.name.startswith("zero_") for held in self.models.values() for file in held.values())

    def files(self) -> dict[str, Path]:
        """Return every file by its name."""
        groups = (self.models, self.optimizers, self.layers)
        return {file.name: file for group in groups for held in group.values() for file in held.values()}

    def leave_out(self, readable: Container[str]) -> None:
        """Leave out optimizer states and layers that cannot be read."""
        for group in (self.optimizers, self.layers):
            for held in group.values():
                for key in [key for key, file in held.items() if file.name not in readable]:
                    del held[key]


def listed_files(path: Path) -> Listed:
    """Return the files of a tag's directory; InputError where experts lie in files of their own."""
    found = Listed()
    experts = []
    for file in sorted(path.iterdir()):
        if match := _MODEL.fullmatch(file.name):
            found.models.setdefault(int(match[2]), {})[int(match[1] or 0)] = file
        elif match := _OPTIMIZER.fullmatch(file.name):
            found.optimizers.setdefault(int(match[2]), {})[int(match[1])] = file
        elif match := _LAYER.fullmatch(file.name):
            found.layers.setdefault(int(match[1]), {})[int(match[2] or 0)] = file
        elif _EXPERTS.fullmatch(file.name):
            experts.append(file)
    if experts:
        raise InputError(
            "the run's experts lie in files of their own, which is not supported",
            where=[shown(str(file)) for file in experts[:8]],
            hint="save the model inside the training process: engine.module.state_dict(), or save_16bit_model",
        )
    return found


@dataclass(frozen=True, slots=True)
class Shape:
    """How many pipeline stages, tensor ranks and data-parallel ranks a run had."""

    stages: int
    tensor: int
    data: int

    @property
    def model(self) -> int:
        """The number of model-parallel ranks."""
        return self.stages * self.tensor

    @staticmethod
    def of(listed: Listed, said: Said) -> Shape:
        """Read it off the states, else off the files."""
        count = max(said.model, 1 + max(listed.models), 1 + max(listed.optimizers, default=0))
        tensor = said.tensor
        if not tensor:
            tensor = max((1 + max(held) for held in listed.layers.values()), default=count)
        found = Shape(said.stages or max(1, count // tensor), tensor, said.ranks)
        if found.model * found.data > MAX_RANKS:
            told = f"{found.stages} stages of {tensor} tensor ranks with {found.data} data-parallel ranks each"
            raise InputError("the model states tell of more ranks than runs have", where=told, hint=HINT)
        return found

    def absent(self, listed: Listed) -> list[str]:
        """Name the files that a run of this shape has and that are not there, or that are there and it has not."""
        found = []
        for rank in range(self.model):
            optimizers, models = listed.optimizers.get(rank, {}), listed.models.get(rank, {})
            wanted = range(self.data) if listed.third else range(1)
            found += [f"model states of {rank_name(rank, d, self, listed.third)}" for d in wanted if d not in models]
            if listed.optimizers or listed.third:
                found += [
                    f"optimizer states of {rank_name(rank, d, self)}" for d in range(self.data) if d not in optimizers
                ]
            found += [
                f"{shown(optimizers[d].name)}: the run had {self.data} ranks" for d in optimizers if d >= self.data
            ]
        found += [
            f"{shown(f.name)}: the run had {self.model} model-parallel ranks"
            for rank, held in listed.models.items() if rank >= self.model for f in held.values()
        ]  # fmt: skip
        count = 1 + max(listed.layers, default=-1)
        found += [
            f"layer {layer} of tensor rank {t}" for layer in range(count) for t in range(self.tensor)
            if layer in listed.layers and t not in listed.layers[layer]
        ]  # fmt: skip
        return found


def rank_name(model: int, data: int, shape: Shape, many: bool = True) -> str:
    """Name a rank as its files do; ``many``: of a file that every data-parallel rank has."""
    parts = [f"rank {data}"] if many or shape.model == 1 else []
    if shape.model > 1:
        parts.append(f"model-parallel rank {model}")
    return " of ".join(parts)
