"""peft's ``target_parameters``: factors around single parameters of a module, stacks of experts above all.

The names of such factors say the module alone. Layers around several of its parameters are nested in the order in
which the module has them, the last one outermost. For a parameter of three axes ``A`` is ``[experts * rank, in]``,
expert by expert, and ``B`` is ``[out, experts * rank]``, rank by rank with the experts inside. Source: peft 0.21.2,
``lora.layer.ParamWrapper`` and ``tuners_utils.inject_parameters``. Before 0.19 (peft#3165) input and output of
parameters stored ``[experts, out, in]`` were exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..axes import Expr, read, reorder, reshape, zeros
from ..tensors import TensorSpec
from .adapter import Facts, Json, LoraModule, Scaling, Term, Value
from .experts import ExpertFactors, experts_apart, item_path
from .peft_config import Settings, targets_of
from .prefixes import Role

ORDER = (
    "gate_proj", "w1", "v1", "w2", "gate_up_proj", "gate_up_proj_bias", "up_proj", "down_proj", "down_proj_bias",
    "weight", "bias",
)  # fmt: skip
"""The order of parameters in every module of experts of transformers 5.23."""
STORED_IN_OUT = ("Aria", "GptOss", "OpenAIPrivacyFilter")
"""Beginnings of transformers' classes whose experts are stored ``[experts, in, out]``."""
FLIPPED_UNTIL = (0, 19)
"""The version of peft that first read ``[experts, out, in]`` as such."""
VERSION = "0.19.0"
"""What is written as peft_version where the config has none that reads the written factors as they are meant."""

Parts = Mapping[tuple[Role, str], TensorSpec]


@dataclass(frozen=True, slots=True)
class Found:
    """What the layers around one module's parameters hold, and what does not fit."""

    modules: tuple[LoraModule, ...] = ()
    problems: tuple[str, ...] = ()
    without_alpha: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Level:
    """The factors of one parameter; ``rank``: of one expert."""

    parameter: str
    a: TensorSpec
    b: TensorSpec
    rank: int

    @property
    def count(self) -> int:
        """How many experts there are."""
        return self.a.shape[0] // self.rank


def is_plain(path: str, parts: Parts, names: Sequence[str], settings: Settings) -> bool:
    """Say whether factors are those of a layer's own matrix, which target_parameters may name ``weight``."""
    a = parts.get(("A", "weight"))
    return list(names) == ["weight"] and (a is None or a.shape[:1] == (settings.rank_of(f"{path}.weight"),))


def read_parameters(
    path: str, levels: Mapping[int, Parts], names: Sequence[str], settings: Settings, facts: Facts
) -> Found:  # fmt: skip
    """Read the factors around a module's parameters, ``levels`` by depth; one module per expert."""
    problem = _unnamed(path, levels, names)
    ordered = sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else -1)
    found: list[_Level] = []
    for depth, name in zip(sorted(levels), reversed(ordered), strict=False):
        level = _level(f"{path}.{name}", levels[depth], settings)
        if isinstance(level, str):
            problem = problem or level
        else:
            found.append(level)
    if problem:
        return Found(problems=(problem,))
    flipped = _flipped(found, settings.config, facts)
    if isinstance(flipped, str):
        return Found(problems=(f"{path}: {flipped}",))
    modules: list[LoraModule] = []
    without: list[str] = []
    for level in found:
        scaling = _scaling(level, settings, facts)
        if scaling is None:
            without.append(level.parameter)
        else:
            modules += _modules(level, scaling, flipped, _stored_in_out(level, settings.config, facts, flipped))
    return Found(tuple(modules), (), tuple(without))


def _unnamed(path: str, levels: Mapping[int, Parts], names: Sequence[str]) -> str:
    if sorted(levels) != list(range(len(levels))):
        return f"{path}: factors of a parameter are missing between others"
    if len(names) != len(levels):
        said = ", ".join(names) or "none"
        return f"{path}: factors of {len(levels)} parameters, but target_parameters names {said}"
    unknown = [name for name in names if name not in ORDER]
    if len(names) > 1 and unknown:
        return f"{path}: the order of its parameters {', '.join(names)} is not known"
    return ""


def _level(parameter: str, parts: Parts, settings: Settings) -> _Level | str:
    a, b = parts.get(("A", "weight")), parts.get(("B", "weight"))
    if a is None or b is None or len(parts) > 2:
        return f"{parameter}: target_parameters takes lora_A and lora_B, the file has {len(parts)} tensors"
    rank = settings.rank_of(parameter) or 0
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or rank < 1 or a.shape[0] % rank:
        return f"{parameter}: factors {a.shape} and {b.shape} are no stacks of rank {rank}"
    return _Level(parameter, a, b, rank)


def _flipped(levels: Sequence[_Level], config: Json | None, facts: Facts) -> bool | str:
    """Say whether input and output are exchanged: by the lengths that two parameters share, else by the version."""
    stacked = {level.parameter.rpartition(".")[2]: level for level in levels if level.count > 1}
    up, down = stacked.get("gate_up_proj"), stacked.get("down_proj")
    if up is not None and down is not None:
        (p, q), (s, t) = ((level.a.shape[1], level.b.shape[0]) for level in (up, down))
        if (p == t and q == 2 * s) != (q == s and p == 2 * t):
            return q == s and p == 2 * t
        return f"gate_up_proj {p} -> {q} and down_proj {s} -> {t} are not those of gated experts"
    version = peft_version(config)
    if not stacked or (version is not None and version >= FLIPPED_UNTIL):
        return False
    parameter = next(iter(stacked.values())).parameter
    stored = facts.get(item_path(parameter, 0), "fan_in_fan_out")
    if version is not None and isinstance(stored, bool):
        return not stored
    if version is None:
        return (
            "peft before 0.19 exchanged input and output of experts, and nothing says which version wrote this: add "
            "peft_version to adapter_config.json"
        )
    return (
        f"peft {'.'.join(map(str, version))} exchanged input and output of experts stored [out, in]: say how they are "
        "stored with --fan-in-fan-out"
    )


def peft_version(config: Json | None) -> tuple[int, int] | None:
    """Return major and minor of the version that wrote a config; None where it does not say."""
    said = str((config or {}).get("peft_version") or "").split(".")
    return (int(said[0]), int(said[1])) if len(said) > 1 and said[0].isdecimal() and said[1].isdecimal() else None


def _stored_in_out(level: _Level, config: Json | None, facts: Facts, flipped: bool) -> bool | None:
    stated = facts.get(item_path(level.parameter, 0), "fan_in_fan_out")
    if isinstance(stated, bool):
        return stated
    version = peft_version(config)
    if version is not None and version < FLIPPED_UNTIL and level.count > 1:
        return not flipped
    mapping = (config or {}).get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return name.startswith(STORED_IN_OUT) if isinstance(name, str) else None


def _scaling(level: _Level, settings: Settings, facts: Facts) -> Scaling | None:
    alpha: Value = settings.alpha_of(level.parameter)
    alpha = facts.get(item_path(level.parameter, 0), "alpha") if alpha is None else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        return None
    return Scaling(float(alpha), level.rank, settings.rslora)


def _modules(level: _Level, scaling: Scaling, flipped: bool, stored: bool | None) -> tuple[LoraModule, ...]:
    count, rank = level.count, level.rank
    a = reshape(read(level.a), (count, rank, level.a.shape[1]))
    b = reorder(reshape(read(level.b), (level.b.shape[0], rank, count)), (2, 0, 1))
    if count == 1:
        path, _, name = level.parameter.rpartition(".")
        term = Term(read(level.a), read(level.b), 0, level.b.shape[0])
        return (LoraModule(path, "linear", term.stop, (term,), scaling, weight=name),)
    if flipped:
        a, b = reorder(b, (0, 2, 1)), reorder(a, (0, 2, 1))
    return experts_apart(level.parameter, a, b, scaling, fan_in_fan_out=stored)


def spelled(factors: ExpertFactors) -> tuple[Expr, Expr]:
    """Return ``A[experts * rank, in]`` and ``B[out, experts * rank]`` as peft 0.19 and later stores them."""
    count, rank, inner = factors.a.shape
    out = factors.b.shape[1]
    return reshape(factors.a, (count * rank, inner)), reshape(reorder(factors.b, (1, 2, 0)), (out, rank * count))


def stand_in(factors: ExpertFactors) -> LoraModule:
    """Return a module that has a stack's name, rank and scaling, for what config fields say about it."""
    rank, inner, out = *factors.a.shape[1:], factors.b.shape[1]
    term = Term(zeros(factors.a.dtype, (rank, inner)), zeros(factors.b.dtype, (out, rank)), 0, out)
    return LoraModule(factors.parameter, "linear", out, (term,), factors.scaling)


def parameter_fields(stacks: Sequence[ExpertFactors], config: Json) -> tuple[dict[str, Value], list[str]]:
    """Return the config's fields that stacks need, and notes about what they change."""
    if not stacks:
        return ({"target_parameters": None} if config.get("target_parameters") else {}), []
    fields: dict[str, Value] = {}
    notes = []
    parameters = sorted(factors.parameter for factors in stacks)
    if not _names_them(config, parameters):
        fields["target_parameters"] = list(parameters)
    version = peft_version(config)
    if version is None or version < FLIPPED_UNTIL:
        fields["peft_version"] = VERSION
    if config.get("lora_dropout"):
        fields["lora_dropout"] = 0.0
        notes.append(f"lora_dropout {config['lora_dropout']} became 0: peft refuses it with target_parameters")
    return fields, notes


def _names_them(config: Json, parameters: Sequence[str]) -> bool:
    """Say whether the config's own target_parameters name these parameters and, of their modules, no others."""
    targets = config.get("target_parameters")
    if not isinstance(targets, list):
        return False
    names = tuple(target for target in targets if isinstance(target, str))
    modules: dict[str, list[str]] = {}
    for parameter in parameters:
        module, _, name = parameter.rpartition(".")
        modules.setdefault(module, []).append(name)
    return all(targets_of(names, module) == sorted(found) for module, found in modules.items())


def by_module(stacks: Sequence[ExpertFactors]) -> dict[str, list[str]]:
    """Return the stacked parameters of each module."""
    found: dict[str, list[str]] = {}
    for factors in stacks:
        found.setdefault(factors.parameter.rpartition(".")[0], []).append(factors.parameter)
    return found


def nested(parameters: Sequence[str]) -> dict[str, int] | None:
    """Return how deep the layer around each parameter of one module lies; None where their order is not known."""
    names = [parameter.rpartition(".")[2] for parameter in parameters]
    if len(names) == 1:
        return {parameters[0]: 0}
    if any(name not in ORDER for name in names):
        return None
    outermost = sorted(parameters, key=lambda parameter: ORDER.index(parameter.rpartition(".")[2]), reverse=True)
    return {parameter: depth for depth, parameter in enumerate(outermost)}
