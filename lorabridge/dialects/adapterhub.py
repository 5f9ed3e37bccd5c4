"""AdapterHub's ``adapters`` library: LoRA as ``P.loras.NAME.lora_A`` and ``.lora_B``, beside adapter_config.json.

P is a module of transformers, factors are torch's, a fused projection (GPT-2's ``c_attn``) holds loralib's MergedLinear
of the blocks that ``attn_matrices`` lists. The config has one rank, one alpha and switches for places
(``attn_matrices``, ``intermediate_lora``, ``output_lora``, ``leave_out``), not names. A prediction head lies in a file
of its own and is not carried. Source: adapters 1.3.0, methods/lora.py and configuration/adapter_config.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..axes import Expr, cut
from ..errors import MappingError, counted
from ..tensors import TensorSpec
from . import factors
from .adapter import Adapter, Content, Fact, Facts, Json, LoraModule, Term, Value, Written
from .loralib import parse_bare
from .pairs import MERGE, Problems, group

ROLES = {"lora_A": ("a", "weight"), "lora_B": ("b", "weight")}
NAME = "default"
"""What an adapter is called in a written file."""
FUSED = ("c_attn",)
MATRICES = {
    "q": ("query", "q_proj", "q_lin", "query_proj"), "k": ("key", "k_proj", "k_lin", "key_proj"),
    "v": ("value", "v_proj", "v_lin", "value_proj"),
}  # fmt: skip
UP = ("intermediate.dense", "up_proj", "c_fc", "fc1", "lin1")
DOWN = ("output.dense", "down_proj", "mlp.c_proj", "fc2", "lin2")
OTHER = {
    "vera_d": "VeRA",
    "vera_b": "VeRA",
    "use_gating": "a gate",
    "use_dora": "its own DoRA, whose norm leaves alpha out",
}
_NAME = re.compile(r"(.+)\.loras\.([^.]+)\.(lora_[AB])")
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|block)\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a module lies: its layer, and a matrix ("q", "k", "v"), "up", "down", or "" for no place of LoRA."""

    layer: int
    part: str


class AdapterHub:
    """Read and write LoRA of the adapters library."""

    name = "adapterhub"
    framework: Literal["torch", "mindspore"] = "torch"

    def detect(self, content: Content) -> str | None:
        """Claim files with ``.loras.NAME.lora_A``."""
        found = [name for name in content.specs if _NAME.fullmatch(name)]
        if found:
            return f"{counted(len(found), 'tensor')} such as {found[0]}"
        held = (content.config or {}).get("config")
        method = held.get("architecture") if isinstance(held, dict) else None
        return f"adapter_config.json: architecture is {method!r}" if method in ("lora", *METHODS) else None

    def parse(self, content: Content) -> Adapter:
        """Read every module; MappingError for other methods of the library and for several adapters in one file."""
        held = _held(content)
        specs, names = _renamed(content)
        if len(names) > 1:
            raise MappingError(
                f"the file holds {len(names)} adapters: {', '.join(sorted(names))}",
                where=content.path, hint="save them one at a time with save_adapter",
            )  # fmt: skip
        chosen = held.get("attn_matrices", [])
        mask: list[Value] = [m in chosen for m in MATRICES] if isinstance(chosen, list) else []
        known = [Fact(f"*.{last}", "enable_lora", mask) for last in FUSED if mask]
        known += [Fact("*", "kind", "linear"), Fact("*", "enable_lora", [True])]
        for field, fact in (("r", "rank"), ("alpha", "alpha")):
            value = held.get(field)
            known += [Fact("*", fact, value)] if isinstance(value, int | float) else []
        renamed = replace(content, specs=specs, facts=Facts(tuple(known)).then(content.facts))
        adapter = parse_bare(renamed, group(renamed, ROLES))
        if adapter.extras:
            raise MappingError(
                "tensors beside the factors are no part of LoRA",
                where=[extra.name for extra in adapter.extras], hint="check that the adapter is one of LoRA",
            )  # fmt: skip
        carried: dict[str, Value] = {}
        if isinstance(held.get("dropout"), int | float) and held["dropout"]:
            carried["lora_dropout"] = held["dropout"]
        base = (content.config or {}).get("model_name")
        if isinstance(base, str) and base:
            carried["base_model_name_or_path"] = base
        return replace(adapter, config=carried)

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell an adapter with one rank and alpha; MappingError for places that the library does not adapt."""
        places = _refuse(adapter)
        split = tuple(_blocks(module) for module in adapter.modules)
        merged = {m.path for m in split if len(m.terms) > 1}
        modules, top, shared, notes = factors.uniform_as_told(tuple(m for m in split if m.path not in merged), facts)
        if merged:
            fixed = facts.get("*", "rank") is not None
            modules, top, shared, notes = _with_blocks(split, modules, top, shared, notes, fixed=fixed)
        tensors = [row for module in modules for row in _named(module)]
        inner = _config(places, top, shared, adapter)
        config: dict[str, Value] = {"config": inner, "name": NAME, "version": "adapters.1.3.0"}
        base = adapter.config.get("base_model_name_or_path")
        if isinstance(base, str):
            config["model_name"] = base
        return Written(tensors, config, notes=notes, modules=modules)


METHODS = {
    "prefix_tuning": (
        "a prefix before every attention's keys and values",
        "train it with peft's PrefixTuningConfig, whose file converts (peft-prompt)",
    ),
    "prompt_tuning": (
        "virtual tokens before the input", "train it with peft's PromptTuningConfig, whose file converts (peft-prompt)"
    ),
    "reft": ("an edit of hidden states, which no weight holds", "it stays in AdapterHub"),
    "union": ("several methods at once", "train LoRA and Houlsby's adapters by themselves, which convert"),
}  # fmt: skip
"""AdapterHub's methods beside bottleneck adapters and LoRA (adapters 1.3.0, ADAPTER_CONFIG_MAP), and their cures."""


def refuse_method(held: Json, where: str) -> None:
    """Raise MappingError where a config says another method of the library, with the cure."""
    method = held.get("architecture")
    if method in METHODS:
        what, cure = METHODS[str(method)]
        raise MappingError(f"AdapterHub's {method} is {what}", where=where, hint=cure)
    if held.get("init_weights") == "vera":
        raise MappingError(
            "AdapterHub's VeRA draws its projections anew, and the file has none", where=where,
            hint="merge it in adapters (merge_adapter), and convert the model",
        )  # fmt: skip


def _held(content: Content) -> Json:
    """Return the config's inner part; MappingError for other methods than plain LoRA."""
    held = (content.config or {}).get("config", {})
    if not isinstance(held, dict):
        raise MappingError("config is no object", where=content.path, hint="repair adapter_config.json")
    refuse_method(held, content.path)
    odd = [f"{field}: {what}" for field, what in OTHER.items() if held.get(field) not in (None, False)]
    odd += [f"{f} = {held[f]!r}" for f, plain in (("architecture", "lora"), ("composition_mode", "add"))
            if held.get(f, plain) != plain]  # fmt: skip
    if odd:
        raise MappingError(
            "the adapter is not plain LoRA", where=[content.path, *odd], hint="merge it in adapters (merge_adapter)"
        )
    return held


def _renamed(content: Content) -> tuple[dict[str, TensorSpec], set[str]]:
    specs, names = {}, set()
    for name, spec in content.specs.items():
        match = _NAME.fullmatch(name)
        if match:
            names.add(match[2])
        specs[f"{match[1]}.{match[3]}" if match else name] = spec
    return specs, names


def _place(path: str) -> _Place:
    layer = _LAYER.search(f"{path}.")
    number, last = int(layer[1]) if layer else -1, path.rpartition(".")[2]
    for matrix, names in MATRICES.items():
        if last in names:
            return _Place(number, matrix)
    if last in FUSED:
        return _Place(number, "fused")
    if any(path.endswith(f".{end}") for end in UP):
        return _Place(number, "up")
    down = any(path.endswith(f".{end}") for end in DOWN) and "attention" not in path.split(".")[-3:-1]
    return _Place(number, "down" if down else "")


def _refuse(adapter: Adapter) -> dict[str, _Place]:
    problems = Problems("properties of the adapter have no place in AdapterHub's LoRA")
    places = {module.path: _place(module.path) for module in adapter.modules}
    for module in adapter.modules:
        place = places[module.path]
        if module.magnitude is not None:
            problems.add("AdapterHub's DoRA is another: its norm leaves alpha out", module.path, MERGE)
        if module.lora_bias is not None:
            problems.add("AdapterHub's LoRA has no bias on the B factor", module.path, MERGE)
        if module.kind != "linear" or module.weight != "weight":
            problems.add(f"AdapterHub has no LoRA for {module.kind}", module.path, MERGE)
        elif not place.part or place.layer < 0:
            problems.add(
                "AdapterHub adapts q, k, v and the two layers of an MLP, none of this name", module.path,
                f"{MERGE}, or leave it out with --exclude",
            )  # fmt: skip
    for extra in adapter.extras:
        cure = "leave them out with --adapter-only" if extra.kind == "base" else MERGE
        problems.add("AdapterHub's LoRA is factors and nothing beside them", extra.name, cure)
    problems.raise_any()
    return places


def _blocks(module: LoraModule) -> LoraModule:
    """Return a fused projection as three blocks that share A, any other module as one pair."""
    if module.path.rpartition(".")[2] not in FUSED:
        return factors.grow(module)
    third = module.out // 3
    if not module.plain:
        return module
    (term,) = module.terms
    parts = [Term(term.a, cut(term.b, 0, i * third, (i + 1) * third), i * third, (i + 1) * third) for i in range(3)]
    return replace(module, terms=tuple(parts))


def _with_blocks(
    split: Sequence[LoraModule], plain: Sequence[LoraModule], rank: int, alpha: float, notes: tuple[str, ...], *,
    fixed: bool,
) -> tuple[tuple[LoraModule, ...], int, float, tuple[str, ...]]:  # fmt: skip
    """Bring fused projections to the rank and alpha of the others; their scaling must be the same."""
    fused = [m for m in split if len(m.terms) > 1]
    top = max([term.rank for m in fused for term in m.terms] + ([rank] if plain or fixed else []))
    value = plain[0].scaling.value if plain else fused[0].scaling.value
    if any(m.scaling.value != value for m in fused):
        raise MappingError(
            "fused projections have another scaling than the rest, and AdapterHub has one alpha",
            where=[m.path for m in fused if m.scaling.value != value], hint=MERGE,
        )  # fmt: skip
    exact = factors.exact_alpha(value, top)
    if exact is None:
        raise MappingError(
            f"no alpha gives the scaling {value!r} exactly at rank {top}", hint="choose a power of two with --rank"
        )
    ready = {m.path: factors.pad_rank(m, top) for m in (*plain, *fused)}
    return tuple(ready[m.path] for m in split), top, exact, notes


def _named(module: LoraModule) -> list[tuple[str, Expr]]:
    stem = f"{module.path}.loras.{NAME}"
    if len(module.terms) > 1:
        a, b, _ = factors.as_merged(module)
    else:
        (term,) = module.terms
        a, b = term.a, term.b
    return [(f"{stem}.lora_A", a), (f"{stem}.lora_B", b)]


def _config(places: dict[str, _Place], rank: int, alpha: float, adapter: Adapter) -> dict[str, Value]:
    """Say where LoRA is; MappingError where the library's switches would put it elsewhere too."""
    parts = {place.part for place in places.values()}
    layers = {place.layer for place in places.values()}
    fused = [m for m in adapter.modules if places[m.path].part == "fused"]
    matrices = [m for m in MATRICES if m in parts]
    if fused:
        masks = {factors.as_merged(_blocks(m))[2] for m in fused}
        if len(masks) > 1:
            raise MappingError("fused projections adapt different blocks", where=[m.path for m in fused], hint=MERGE)
        matrices = [m for m, on in zip(MATRICES, masks.pop(), strict=True) if on]
    lacking = [
        f"layer {layer}: no {part}" for layer in sorted(layers) for part in sorted(parts)
        if not any(p == _Place(layer, part) for p in places.values())
    ]  # fmt: skip
    if lacking:
        raise MappingError(
            "AdapterHub adapts the same places in every layer that it does not leave out", where=lacking, hint=MERGE
        )
    absent: list[Value] = [layer for layer in range(max(layers, default=-1) + 1) if layer not in layers]
    dropout = adapter.config.get("lora_dropout")
    chosen: list[Value] = [*matrices]
    return {
        "architecture": "lora", "selfattn_lora": bool(matrices), "intermediate_lora": "up" in parts,
        "output_lora": "down" in parts, "leave_out": absent, "r": rank,
        "alpha": factors.as_written(alpha),
        "dropout": dropout if isinstance(dropout, int | float) else 0.0, "attn_matrices": chosen,
        "composition_mode": "add", "init_weights": "lora", "init_weights_seed": None, "use_gating": False,
        "use_dora": False, "vera_d": None, "vera_b": None, "dtype": None,
    }  # fmt: skip
