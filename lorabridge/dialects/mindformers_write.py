"""What every MindFormers dialect writes: one rank, one integer alpha, and the configs that its releases read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..errors import MappingError
from . import factors
from .adapter import Adapter, Fact, Facts, LoraModule, Value
from .mindformers_experts import cell_of, has_experts
from .mindformers_targets import leaf_pattern, path_pattern, swallowed
from .pairs import MERGE, Problems

ADAPTER_FORMAT = "mindformers_pynative_lora_adapter_v1"
LARGEST_ALPHA = 1 << 20


@dataclass(frozen=True, slots=True)
class Shared:
    """Modules of one rank and alpha, what to say about them, and the facts that the file itself cannot state."""

    modules: tuple[LoraModule, ...]
    rank: int
    alpha: float
    facts: Facts
    notes: tuple[str, ...]


def shared(adapter: Adapter, facts: Facts, *, whole_alpha: bool) -> Shared:
    """Give all modules the one rank and alpha of a run's config (see ``factors.uniform``).

    ``facts`` may state ``rank`` and ``alpha`` for ``*``. ``whole_alpha``: the target takes positive integers only; what
    an alpha has beyond that goes into B, as a power of two where that is exact.
    """
    rank, alpha = facts.get("*", "rank"), facts.get("*", "alpha")
    asked = rank if isinstance(rank, int) else None
    given = float(alpha) if isinstance(alpha, int | float) else None
    if whole_alpha and given is not None and (given != int(given) or given <= 0):
        raise MappingError(
            f"alpha {given:g} is no positive integer, which MindFormers' lora_alpha is",
            hint="choose another --alpha, or leave it out: what the scaling needs beyond it goes into B",
        )
    modules, top, found, notes = factors.uniform(adapter.modules, rank=asked, alpha=given)
    if whole_alpha and (found != int(found) or found <= 0):
        modules, top, found, notes = factors.uniform(adapter.modules, rank=asked, alpha=_whole(found, top))
    said = [Fact("*", "rank", top), Fact("*", "alpha", factors.as_written(found))]
    orders = {module.path: module.fan_in_fan_out for module in modules if module.fan_in_fan_out is not None}
    if len(orders) == len(modules) and len(set(orders.values())) == 1:
        said.append(Fact("*", "fan_in_fan_out", next(iter(orders.values()))))
    if any(extra.kind == "base" and extra.path in {m.path for m in modules} for extra in adapter.extras):
        said.append(Fact("*", "merged", False))
    return Shared(modules, top, found, Facts(tuple(said)), notes)


def _whole(alpha: float, rank: int) -> float:
    """Return the integer that an alpha is a power of two away from; the rank where there is none of usable size."""
    numerator = alpha.as_integer_ratio()[0]
    return float(numerator) if 0 < numerator <= LARGEST_ALPHA else float(rank)


def refuse(
    adapter: Adapter,
    title: str,
    *,
    kinds: Collection[str] = ("linear",),
    weights: Collection[str] = ("weight",),
    experts: bool = False,
) -> None:
    """Raise one MappingError for everything that has no place in a dialect of plain factor pairs."""
    problems = Problems(f"properties of the adapter have no place in {title}")
    merge = f"{MERGE}, or choose --to loralib-ms"
    for parameter in () if experts else has_experts(adapter):
        problems.add(f"{title} has no LoRA for routed experts", parameter, f"{MERGE}, or choose --to pynative")
    for module in adapter.modules:
        if module.kind not in kinds:
            problems.add(f"{title} has no LoRA for {module.kind}", module.path, merge)
        elif module.weight not in weights:
            problems.add(f"{title} has no LoRA for {module.weight}", module.path, merge)
        if module.magnitude is not None:
            problems.add(f"{title} has no DoRA magnitude", module.path, merge)
        if module.lora_bias is not None:
            problems.add(f"{title} has no bias on the B factor", module.path, merge)
    for extra in adapter.extras:
        if extra.kind == "trainable_tokens":
            problems.add(f"{title} has no trainable token rows", extra.name, merge)
    if adapter.merged and any(extra.kind == "base" for extra in adapter.extras):
        problems.add(
            "the base weights already contain the adapter, and the layers would add it again",
            "base weights",
            "leave the base out with --adapter-only",
        )
    problems.raise_any()


def dropout_of(adapter: Adapter) -> float:
    """Return the dropout that an adapter's config states, else 0.0; always a float."""
    value = adapter.config.get("lora_dropout")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def graph_files(adapter: Adapter, made: Shared, *, freeze: bool) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Return the files and notes for MindFormers' graph modes.

    ``adapter_config.json`` has the fields that LoraModel.save_pet_config of MindFormers 1.7 ... 2.1 writes and the
    tools read; ``pet_config.yaml`` is the section for the run's yaml. ``freeze``: MindFormers does not freeze the base
    by itself in this mode.
    """
    paths = [module.path for module in made.modules]
    targets, dropout = leaf_pattern(paths), dropout_of(adapter)
    config: dict[str, Value] = {
        "base_model_name_or_path": "none",
        "bias": "none",
        "lora_alpha": factors.as_written(made.alpha),
        "lora_bias": False,
        "lora_dropout": dropout,
        "peft_type": "LORA",
        "r": made.rank,
        "target_modules": list(targets.split("|")),
        "task_type": "CAUSAL_LM",
    }
    section: dict[str, Value] = {
        "pet_type": "lora",
        "lora_rank": made.rank,
        "lora_alpha": factors.as_written(made.alpha),
        "lora_dropout": dropout,
        "target_modules": targets,
    }
    if freeze:
        section |= {"freeze_include": ["*"], "freeze_exclude": ["*lora*"]}
    files = {
        "adapter_config.json": json.dumps(config, indent=2, ensure_ascii=False),
        "pet_config.yaml": _yaml("pet_config", section, "for the run's yaml, below model.model_config"),
    }
    return files, (f"yaml, below model.model_config: {_line('pet_config', section)}", *_unreached(paths))


def _unreached(paths: Sequence[str]) -> list[str]:
    """Say which cells the one expression of graph modes cannot select as the file has them."""
    notes = []
    hidden = swallowed(paths)
    if hidden:
        path, level = next(iter(hidden.items()))
        notes.append(
            f"MindFormers does not look below a cell that target_modules selects: {level!r} hides {path}"
            + (f" and {len(hidden) - 1} more" if len(hidden) > 1 else "")
        )
    layers: dict[str, set[str]] = {}
    for path in paths:
        layers.setdefault(path.rpartition(".")[2], set()).add(path.rpartition(".")[0])
    heads = {head.split(".")[0] for head in (parent for parents in layers.values() for parent in parents) if head}
    outside = [path for path in paths if "." not in path]
    if outside and len(heads) == 1 and heads <= {"model", "transformer", "backbone"}:
        notes.append(f"MindFormers' LoraModel adapts cells inside {heads.pop()!r} only, so not {', '.join(outside)}")
    counts = {leaf: _layer_numbers(parents) for leaf, parents in layers.items()}
    every = set().union(*counts.values()) if counts else set()
    uneven = [leaf for leaf, numbers in counts.items() if numbers and numbers != every]
    if uneven:
        notes.append(
            f"target_modules select {', '.join(uneven)} in every layer, and the file has factors in some:"
            " the others start at zero and change nothing until they are trained"
        )
    return notes


def _layer_numbers(parents: Collection[str]) -> set[int]:
    return {int(part) for parent in parents for part in parent.split(".") if part.isdecimal()}


def pynative_files(adapter: Adapter, made: Shared) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """Return the files and notes for PyNative mode of MindFormers 2.0 and 2.1.

    ``mindformers_adapter_config.json`` is the manifest that marks a directory as an adapter for
    ``checkpoint.load_path``; the base comes from ``checkpoint.base_load_path``, whose fingerprint is left open.
    ``lora_config.yaml`` is the section for the run's yaml.
    """
    section: dict[str, Value] = {
        "lora_rank": made.rank,
        "lora_alpha": factors.as_written(made.alpha),
        "lora_dropout": dropout_of(adapter),
        "target_modules": path_pattern([cell_of(module) for module in made.modules]),
    }
    manifest: dict[str, Value] = {
        "format": ADAPTER_FORMAT,
        "base_load_path": "",
        "base_fingerprint": None,
        "lora_config": section,
        "global_step": 0,
        "consumed_samples": 0,
    }
    files = {
        "mindformers_adapter_config.json": json.dumps(manifest, indent=2, ensure_ascii=False),
        "lora_config.yaml": _yaml("lora_config", section, "for the run's yaml, at the top"),
    }
    return files, (f"yaml, at the top: {_line('lora_config', section)}",)


def _yaml(key: str, section: Mapping[str, Value], where: str) -> str:
    lines = [f"# {where}", f"{key}:", *(f"  {name}: {_scalar(value)}" for name, value in section.items())]
    return "\n".join(lines) + "\n"


def _line(key: str, section: Mapping[str, Value]) -> str:
    return f"{key}: {{{', '.join(f'{name}: {_scalar(value)}' for name, value in section.items())}}}"


def _scalar(value: Value) -> str:
    """Spell a value as YAML; single quotes keep a regular expression's backslashes as they are."""
    if isinstance(value, str):
        return value if value.isidentifier() else "'" + value.replace("'", "''") + "'"
    if isinstance(value, list):
        return f"[{', '.join(_scalar(item) for item in value)}]"
    return json.dumps(value)
