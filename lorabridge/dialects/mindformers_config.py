"""What MindFormers' own files say about an adapter: rank, alpha, dropout and which cells are adapted.

| file | written or read by | content |
|---|---|---|
| ``output/adapter_config.json`` | LoraModel.save_pet_config, 1.7 ... 2.1 | peft's fields; ``target_modules`` is the regular expression, cut at each bar |
| ``mindformers_adapter_config.json`` | checkpoint_callback.py, 2.1 | ``lora_config``, with a fingerprint of the base |
| run yaml | graph modes | ``model.model_config.pet_config`` |
| run yaml | PyNative mode, 2.0 and later | ``lora_config`` |
| ``adapter_config.json`` of S-LoRA | SLoraAdapter, 1.3 ... 2.1 | peft's fields with types of its own |
"""  # noqa: E501

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import MappingError
from .adapter import Fact, Facts, Json, Value
from .mindformers_targets import selects

DEFAULT_ALPHA = 16
"""LoraConfig's default in every release of MindFormers, for yaml that leaves ``lora_alpha`` out."""
FOREIGN = ("rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "target_parameters")
"""peft's fields that MindFormers has no counterpart for: a config that sets one is not MindFormers'."""


@dataclass(frozen=True, slots=True)
class PetConfig:
    """One config's statements; None where it says nothing.

    ``name``: what to call the config in messages. ``targets``: one regular expression. ``search``: it is meant for
    PyNative mode. ``foreign``: fields that are set and that MindFormers does not have.
    """

    name: str
    rank: int | None
    alpha: float | None
    dropout: float | None = None
    rslora: bool = False
    targets: str | None = None
    search: bool = False
    foreign: tuple[str, ...] = ()

    def misfit(self, ranks: Mapping[str, int]) -> str:
        """Say why this cannot be the config of a file with adapted cells of these ranks; "" where it can."""
        if self.foreign:
            return f"it sets {', '.join(self.foreign)}, which MindFormers does not have"
        other = next((f"{path} has rank {rank}" for path, rank in ranks.items() if self.rank not in (None, rank)), "")
        if other:
            return f"it says rank {self.rank}, and {other}"
        if self.targets is not None:
            beside = [path for path in ranks if not selects(self.targets, path, search=self.search)]
            if beside:
                return f"its target_modules {self.targets!r} do not select {beside[0]}"
        return ""


def pet_section(raw: Json) -> Json | None:
    """Return the part of a run's yaml, or of a JSON config, that describes an adapter; None where there is none."""
    for key in ("lora_config", "pet_config"):
        if isinstance(raw.get(key), Mapping):
            return {key: raw[key]}
    for key in ("model", "model_config"):
        inner = raw.get(key)
        if isinstance(inner, Mapping):
            found = pet_section(inner)
            if found is not None:
                return found
    return None


def states_alpha(config: Json | None) -> bool:
    """Say whether a config, of peft or MindFormers, states an adapter's alpha."""
    if config is None:
        return False
    return "lora_alpha" in config or pet_section(config) is not None


def read_config(config: Json | None, where: str = "") -> PetConfig | None:
    """Read any of the configs; None where it describes no adapter. MappingError for values that no adapter has."""
    if config is None:
        return None
    section = pet_section(config)
    if section is None:
        return _peft_like(config, where) if "r" in config and "lora_alpha" in config else None
    ((key, fields),) = section.items()
    assert isinstance(fields, Mapping)
    kind = fields.get("pet_type", "lora")
    if kind not in ("lora", "slora", None):
        raise MappingError(
            f"{key} says pet_type {kind!r}, which is not LoRA", where=where, hint="give the run's own config"
        )
    search = key == "lora_config"
    whole = "format" in config and search
    alpha = fields.get("lora_alpha", DEFAULT_ALPHA)
    targets = fields.get("target_modules", fields.get("reg_rules"))
    return PetConfig(
        "mindformers_adapter_config.json" if whole else key,
        _whole(fields.get("lora_rank"), "lora_rank", where),
        _number(alpha, "lora_alpha", where),
        _number(fields.get("lora_dropout"), "lora_dropout", where),
        targets=targets if isinstance(targets, str) and targets else None,
        search=search,
    )


def _peft_like(config: Json, where: str) -> PetConfig:
    targets = config.get("target_modules")
    names = [str(name) for name in targets] if isinstance(targets, list) else []
    return PetConfig(
        "adapter_config.json",
        _whole(config["r"], "r", where),
        _number(config["lora_alpha"], "lora_alpha", where),
        _number(config.get("lora_dropout"), "lora_dropout", where),
        rslora=bool(config.get("use_rslora")),
        targets="|".join(names) if names else targets if isinstance(targets, str) else None,
        foreign=tuple(field for field in FOREIGN if config.get(field)),
    )


def _number(value: Value, field: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise MappingError(f"{field} {value!r} is no number", where=where, hint="correct the config")
    return value


def _whole(value: Value, field: str, where: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise MappingError(f"{field} {value!r} is no positive integer", where=where, hint="correct the config")
    return value


def statements(config: PetConfig | None, facts: Facts, ranks: Mapping[str, int], file: str) -> tuple[Facts, list[str]]:
    """Return what a config states about a file with adapted cells of these ranks, and warnings.

    ``facts``: what flags and manifests state. A config that does not fit the file is left aside where the facts give
    alpha, and is a MappingError where they do not. Where both speak the config counts, as with peft's.
    """
    if config is None:
        return Facts(), []
    why = config.misfit(ranks)
    told = [facts.get(path, "alpha") for path in ranks]
    if why and None in told:
        raise MappingError(
            f"{config.name} does not belong to this file: {why}",
            where=file,
            hint="name the right config with --config, or give --alpha to leave this one aside",
        )
    if why:
        return Facts(), [f"{config.name} is left aside: {why}"]
    if config.alpha is None:
        return Facts(), []
    other = [value for value in told if value is not None and value != config.alpha]
    said = [f"the source has alpha {config.alpha:g}, as {config.name} says, not {other[0]}"] if other else []
    stable = (Fact("*", "use_rslora", True),) if config.rslora else ()
    return Facts((Fact("*", "alpha", config.alpha), *stable)), said


def config_files(config: Json | None) -> dict[str, str]:
    """Return the file that MindFormers wrote with this content, by its name; none for a section of a yaml.

    The text is MindFormers' own: ``json.dump(..., indent=2, ensure_ascii=False)``.
    """
    if config is None:
        return {}
    name = "mindformers_adapter_config.json" if "format" in config else "adapter_config.json"
    whole = pet_section(config) is None or "format" in config
    return {name: json.dumps(dict(config), indent=2, ensure_ascii=False)} if whole else {}


def carried(config: PetConfig | None) -> dict[str, Value]:
    """Return what a config says that an adapter keeps on its way to peft."""
    return {} if config is None or config.dropout is None else {"lora_dropout": config.dropout}
