"""Choose r, lora_alpha and their patterns so that peft gives every module its exact scaling."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from ..errors import MappingError
from .adapter import Json, LoraModule, Value
from .peft_config import Number, read_settings
from .peft_patterns import KeyTable

FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def scaling_fields(
    modules: Sequence[LoraModule], attention: frozenset[str], config: Json
) -> tuple[dict[str, Value], list[str]]:
    """Return the five fields of the config, and notes.

    ``config``'s own fields are kept where they give every module its rank and scaling with their keys sorted, as peft
    saves them. MappingError: rank-stabilised and plain modules together where no alpha is exact, or an attention's
    out_proj with another rank or scaling than its parent.
    """
    _check_attention(modules, attention)
    named = [m for m in modules if m.path.rpartition(".")[0] not in attention]
    ranks = {m.path: m.terms[0].rank for m in named}
    rslora, alphas = _alphas(named, config)
    if _still_right(config, ranks, alphas, rslora):
        return {}, []
    notes = []
    if config.get("alpha_pattern") or config.get("rank_pattern"):
        notes.append("rank_pattern and alpha_pattern were rewritten: with sorted keys they gave other values")
    rank = _common(ranks, config.get("r"))
    alpha = _common(alphas, config.get("lora_alpha"))
    fields: dict[str, Value] = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {**_keys({p: n for p, n in ranks.items() if n != rank}, ranks)},
        "alpha_pattern": {**_keys({p: n for p, n in alphas.items() if n != alpha}, alphas)},
        "use_rslora": rslora,
    }
    if not _still_right(fields, ranks, alphas, rslora):
        raise MappingError("no patterns give every module its rank and alpha", where=list(ranks), hint="report this")
    return fields, notes


def _check_attention(modules: Sequence[LoraModule], attention: frozenset[str]) -> None:
    by_path = {m.path: m for m in modules}
    pairs = [(by_path[path], by_path[f"{path}.out_proj"]) for path in sorted(attention)]
    issues = [
        f"{fused.path}: in_proj_weight has rank {fused.terms[0].rank} and scaling {fused.scaling.value}, "
        f"out_proj {out.terms[0].rank} and {out.scaling.value}"
        for fused, out in pairs
        if (fused.terms[0].rank, fused.scaling.value) != (out.terms[0].rank, out.scaling.value)
    ]
    if issues:
        raise MappingError(
            "peft gives both projections of an attention one rank and one scaling",
            where=issues,
            hint="bring them to one rank with --rank, or merge the adapter",
        )


def _alphas(modules: Sequence[LoraModule], config: Json) -> tuple[bool, dict[str, Number]]:
    """Choose rank-stabilised scaling or not, and every module's alpha under that choice."""
    stated = Counter(m.scaling.rslora for m in modules)
    choices = [next(iter(stated))] if len(stated) == 1 else [config.get("use_rslora") is True, False, True]
    failed: list[str] = []
    for rslora in choices:
        found = {m.path: exact_alpha(m, rslora) for m in modules}
        failed = [path for path, alpha in found.items() if alpha is None]
        if not failed:
            return rslora, {path: alpha for path, alpha in found.items() if alpha is not None}
    if not modules:
        return False, {}
    raise MappingError(
        "use_rslora is one switch in peft, and no alpha gives these modules their scaling exactly",
        where=[f"{m.path}: {m.scaling.value!r} at rank {m.terms[0].rank}" for m in modules if m.path in failed],
        hint="bring the modules to a rank that is a power of four with --rank, or merge the adapter",
    )


def exact_alpha(module: LoraModule, rslora: bool) -> Number | None:
    """Return the alpha that gives a module's scaling in double precision, an integer where one does; None if none."""
    scaling, rank = module.scaling, module.terms[0].rank
    if (scaling.rank, scaling.rslora) == (rank, rslora):
        return _number(scaling.alpha)
    divisor = math.sqrt(rank) if rslora else rank
    near = scaling.value * divisor
    if not math.isfinite(near):
        return None
    around = (float(round(near)), near, math.nextafter(near, -math.inf), math.nextafter(near, math.inf))
    return next((_number(alpha) for alpha in around if alpha / divisor == scaling.value), None)


def _number(alpha: float) -> Number:
    return int(alpha) if alpha == int(alpha) and abs(alpha) < 2**53 else alpha


def _still_right(config: Json, ranks: Mapping[str, int], alphas: Mapping[str, Number], rslora: bool) -> bool:
    """Read the fields as peft will, keys sorted, and compare every module."""
    if config.get("lora_alpha") is None or config.get("use_rslora", False) is not rslora:
        return False
    fields = {name: _sorted(config[name]) for name in FIELDS if name in config}
    settings = read_settings(fields, "")
    return all(settings.rank_of(path) == n for path, n in ranks.items()) and all(
        settings.alpha_of(path) == n for path, n in alphas.items()
    )


def _sorted(value: Value) -> Value:
    return dict(sorted(value.items())) if isinstance(value, dict) else value


def _common(values: Mapping[str, Number], carried: Value) -> Number:
    """Return the value for all modules: the config's own where a module has it, else the most frequent."""
    counts = Counter(values.values())
    if isinstance(carried, int | float) and carried in counts:
        return carried
    return min(counts, key=lambda value: (-counts[value], value))


def _keys(special: Mapping[str, Number], everything: Mapping[str, Number]) -> dict[str, Value]:
    """Return a key for each module with a value of its own: its path, or an anchored one where that says too much.

    A plain path is a regular expression whose dots match anything and whose start is open; older versions of peft
    compare it as text, so it is preferred wherever it selects no other module.
    """
    simple = {path for path in special if re.fullmatch(r"[\w.-]+", path)}
    table = KeyTable(simple)
    for path, value in everything.items():
        simple -= {key for key in table.matching(path) if special[key] != value}
    return {path if path in simple else f"^{re.escape(path)}": value for path, value in special.items()}
