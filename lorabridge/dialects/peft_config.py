"""Read adapter_config.json as peft 0.21.2 does, and refuse what would change the adapter's meaning unseen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ..errors import MappingError, counted
from .adapter import Json, Value
from .peft_patterns import KeyTable, pattern_matches

DEFAULTS: dict[str, Value] = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": None, "bias": "none",
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "layers_pattern": None,
    "layers_to_transform": None, "lora_alpha": 8, "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA",
    "r": 8, "rank_pattern": {}, "revision": None, "target_modules": None, "task_type": None, "use_dora": False,
    "use_rslora": False,
}  # fmt: skip
"""The fields every written config has; peft itself fills the rest, so that older versions can read the file."""

KNOWN = frozenset(DEFAULTS) | {
    "alora_invocation_tokens", "arrow_config", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "kasa_config", "layer_replication", "loftq_config", "lora_bias", "lora_ga_config", "megatron_config",
    "megatron_core", "monteclora_config", "peft_version", "qalora_group_size", "runtime_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_qalora", "velora_config",
    "merge_weights", "enable_lora",  # peft 0.1 and 0.2
}  # fmt: skip
"""LoraConfig's fields of peft 0.21.2 and of older versions."""

REFUSED = {
    "use_qalora": "QALoRA's A acts on pooled inputs",
    "use_bdlora": "BD-LoRA stores compact diagonal blocks",
    "enable_lora": "peft 0.2 stored grouped factors for fused projections",
}
"""Fields whose factors are not those of the hub."""

INPUT_DEPENDENT = {
    "alora_invocation_tokens": "the adapter acts only on tokens after its invocation sequence (aLoRA)",
    "arrow_config": "adapters are mixed token by token (Arrow)",
}
TRAINING_ONLY = {
    "velora_config": "VeLoRA's compressed backward pass",
    "monteclora_config": "MonteCLoRA's variational samplers",
}
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")

HEADS = dict.fromkeys(("SEQ_CLS", "TOKEN_CLS"), ("classifier", "score"))
"""Modules that peft saves whole for a task whatever modules_to_save says; older versions did not list them there."""

Number = int | float
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Settings:
    """The fields that decide what the tensors mean. ``alpha`` is None where there is no config."""

    config: Json | None
    rank: int | None
    alpha: Number | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, Number]
    rslora: bool
    dora: bool
    lora_bias: bool
    bias: str
    fan_in_fan_out: bool | None
    modules_to_save: tuple[str, ...]
    tokens: Mapping[str, int]
    rank_keys: KeyTable
    alpha_keys: KeyTable
    target_parameters: tuple[str, ...] = ()

    def rank_of(self, path: str) -> int | None:
        """Return a module's rank: the first matching key of rank_pattern, else ``r``."""
        keys = self.rank_keys.matching(path)
        return self.rank_pattern[keys[0]] if keys else self.rank_pattern.get(path, self.rank)

    def alpha_of(self, path: str) -> Number | None:
        """Return a module's alpha: the first matching key of alpha_pattern, else ``lora_alpha``."""
        keys = self.alpha_keys.matching(path)
        return self.alpha_pattern[keys[0]] if keys else self.alpha_pattern.get(path, self.alpha)

    def parameters_of(self, path: str, levels: int) -> list[str]:
        """Return the parameters of a module with so many layers of factors that target_parameters may name, sorted.

        A name without a module, which peft itself writes for experts (``gate_up_proj``), is that of a parameter in any
        module: it does not count for a layer that target_modules select, nor where names with the module say all.
        """
        exact = targets_of([target for target in self.target_parameters if "." in target], path)
        if len(exact) == levels or not self.target_parameters:
            return exact
        if not exact and levels == 1 and self.config is not None and selected(self.config, [path]):
            return []
        return targets_of(self.target_parameters, path)

    def saves(self, path: str) -> bool:
        """Say whether modules_to_save covers a module or one of its parents; peft compares ends of paths."""
        levels = path.split(".")
        parents = [".".join(levels[: i + 1]) for i in range(len(levels))]
        return any(parent.endswith(saved) for parent in parents for saved in self.modules_to_save)


def targets_of(targets: Iterable[str], path: str) -> list[str]:
    """Return which parameters of a module target_parameters may name, sorted; peft compares ends of names."""
    found = set()
    for target in targets:
        module, _, parameter = target.rpartition(".")
        if not module or path == module or path.endswith(f".{module}"):
            found.add(parameter)
    return sorted(found)


def read_settings(config: Json | None, where: str) -> Settings:
    """Check a config and take out what is needed.

    MappingError: another peft_type, unknown fields that are set, fields that lorabridge refuses, values of a wrong
    type; all of one sort are listed together.
    """
    if config is None:
        return Settings(None, None, None, {}, {}, False, False, False, "none", None, (), {}, KeyTable(()), KeyTable(()))
    _check_type(config, where)
    _check_fields(config, where)
    issues: list[str] = []
    ranks = _pattern(config, "rank_pattern", _rank, issues)
    alphas = _pattern(config, "alpha_pattern", _number, issues)
    settings = Settings(
        config=config,
        rank=_rank(config.get("r", DEFAULTS["r"]), "r", issues),
        alpha=_number(config["lora_alpha"], "lora_alpha", issues) if config.get("lora_alpha") is not None else None,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        rslora=_flag(config, "use_rslora", issues),
        dora=_flag(config, "use_dora", issues),
        lora_bias=_flag(config, "lora_bias", issues),
        bias=_bias(config, issues),
        fan_in_fan_out=_flag(config, "fan_in_fan_out", issues),
        modules_to_save=(*_names(config, "modules_to_save", issues), *HEADS.get(str(config.get("task_type")), ())),
        tokens=_tokens(config.get("trainable_token_indices"), issues),
        rank_keys=KeyTable(ranks),
        alpha_keys=KeyTable(alphas),
        target_parameters=_names(config, "target_parameters", issues),
    )
    if issues:
        raise MappingError(
            f"adapter_config.json has {counted(len(issues), 'field')} of a wrong type",
            where=[where, *issues],
            hint="correct the fields; peft 0.21.2 documents their types in LoraConfig",
        )
    return settings


def warnings_of(config: Json) -> list[str]:
    """Return a sentence for every field that is carried but changes where or how the adapter is valid."""
    found = []
    init = changes_base(config)
    if init:
        found.append(
            f"init_lora_weights={init!r} changed the base weights: the factors are valid for that changed base only"
        )
    if config.get("kasa_config"):
        found.append("kasa_config truncated the base weights and puts lora_diag between the factors")
    found += [f"{name}: {why}" for name, why in INPUT_DEPENDENT.items() if config.get(name) is not None]
    found += [f"{name}: {why}; only peft can hold them" for name, why in TRAINING_ONLY.items() if config.get(name)]
    if config.get("layer_replication"):
        found.append("layer_replication: layer numbers count the replicated layers, which share base weights")
    if config.get("megatron_config"):
        found.append("megatron_config: the adapted layers were Megatron's parallel layers")
    return found


def unsupported_fields(config: Json) -> list[tuple[str, str]]:
    """Return (field, why) for every field that makes the delta something other than ``scaling * B @ A``.

    Only peft can express these. Fields that merely changed the base at initialisation are not among them: the
    factors mean the same everywhere, on that base (:func:`warnings_of`).
    """
    found = []
    if config.get("kasa_config"):
        found.append(("kasa_config", "the base weights were truncated and a diagonal stands between the factors"))
    for fields in (REFUSED, INPUT_DEPENDENT, TRAINING_ONLY):
        found += [(name, why) for name, why in fields.items() if config.get(name)]
    return found


def selected(config: Json, paths: Iterable[str]) -> set[str]:
    """Return the module paths that ``target_modules`` selects, the layer and exclusion fields considered.

    Source: peft 0.21.2, ``tuners_utils.check_target_module_exists``.
    """
    chosen, excluded = config.get("target_modules"), config.get("exclude_modules")
    chosen_names, excluded_names = _name_set(chosen), _name_set(excluded)
    layers = config.get("layers_to_transform")
    by_layer = not (isinstance(chosen, str) or layers is None or layers == [])
    wanted = layers if isinstance(layers, list) else [layers]
    found = set()
    for path in paths:
        if excluded and _selects(excluded, excluded_names, path):
            continue
        if path in chosen_names or (
            _selects(chosen, chosen_names, path)
            and (not by_layer or _layer(config.get("layers_pattern"), path) in wanted)
        ):
            found.add(path)
    return found


def _name_set(chosen: Value) -> frozenset[str]:
    return frozenset(name for name in chosen if isinstance(name, str)) if isinstance(chosen, list) else frozenset()


def _selects(chosen: Value, names: frozenset[str], path: str) -> bool:
    """Say whether a regular expression, or a list of path endings, selects a path."""
    if isinstance(chosen, str):
        return chosen == "all-linear" or pattern_matches(chosen, path)
    levels = path.split(".")
    return any(".".join(levels[i:]) in names for i in range(len(levels)))


def _layer(pattern: Value, path: str) -> int | None:
    """Return the first layer number that peft finds in a path; the pattern is taken as a plain name."""
    names = [pattern] if isinstance(pattern, str) else pattern if isinstance(pattern, list) else []
    levels = path.split(".")
    for i in range(1, len(levels) - 1):
        named = levels[i - 1] in names if names else i >= 2
        if named and levels[i].isdecimal():
            return int(levels[i])
    return None


def changes_base(config: Json) -> str | None:
    """Return the initialisation that changed the base weights (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA), or None."""
    init = config.get("init_lora_weights")
    return init if isinstance(init, str) and init.lower().startswith(CHANGES_BASE) else None


def _check_type(config: Json, where: str) -> None:
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise MappingError(
            f"adapter_config.json says peft_type {kind!r}, not LORA",
            where=where,
            hint="turn the adapter into LoRA with peft.convert_to_lora, or merge it with merge_and_unload",
        )


def _check_fields(config: Json, where: str) -> None:
    refused = [f"{name}: {why}" for name, why in REFUSED.items() if config.get(name)]
    if refused:
        raise MappingError(
            "the adapter uses forms of LoRA that lorabridge cannot express",
            where=[where, *refused],
            hint="merge the adapter in peft with merge_and_unload",
        )
    unknown = [f"{name} = {repr(value)[:60]}" for name, value in config.items() if name not in KNOWN and value]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and not init.lower().startswith((*CHANGES_BASE, *HARMLESS_INITS)):
        unknown.append(f"init_lora_weights = {init[:60]!r}")
    if unknown:
        raise MappingError(
            f"adapter_config.json sets {counted(len(unknown), 'field')} that lorabridge does not know",
            where=[where, *unknown],
            hint="update lorabridge, or remove a field if the adapter means the same without it",
        )


def _rank(value: Value, field: str, issues: list[str]) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    issues.append(f"{field} = {value!r} is not a positive integer")
    return 0


def _number(value: Value, field: str, issues: list[str]) -> Number:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            if math.isfinite(value):
                return value
        except OverflowError:
            pass
    issues.append(f"{field} = {str(value)[:60]} is not a finite number")
    return 0


def _pattern(
    config: Json, field: str, check: Callable[[Value, str, list[str]], _T], issues: list[str]
) -> dict[str, _T]:
    value = config.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        issues.append(f"{field} is not an object")
        return {}
    return {key: check(entry, f"{field}[{key[:60]!r}]", issues) for key, entry in value.items()}


def _flag(config: Json, field: str, issues: list[str]) -> bool:
    value = config.get(field)
    if value is not None and not isinstance(value, bool):
        issues.append(f"{field} = {str(value)[:60]!r} is neither true nor false")
    return bool(value)


def _bias(config: Json, issues: list[str]) -> str:
    value = config.get("bias", "none")
    if value not in ("none", "all", "lora_only"):
        issues.append(f"bias = {str(value)[:60]!r} is none of none, all, lora_only")
    return str(value)


def _names(config: Json, field: str, issues: list[str]) -> tuple[str, ...]:
    value = config.get(field)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        issues.append(f"{field} is not a list of names")
        return ()
    return tuple(str(name) for name in value)


def _tokens(value: Value, issues: list[str]) -> dict[str, int]:
    """Return how many rows are trained per embedding; "" stands for the model's input embedding."""
    named = value if isinstance(value, dict) else {"": value} if value else {}
    for rows in named.values():
        if not isinstance(rows, list) or not all(isinstance(row, int) and not isinstance(row, bool) for row in rows):
            issues.append("trainable_token_indices is neither a list of integers nor one list per module")
            return {}
    return {path: len(rows) for path, rows in named.items() if isinstance(rows, list)}
