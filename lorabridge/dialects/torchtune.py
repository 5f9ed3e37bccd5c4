"""torchtune's adapters: ``adapter_model.pt`` (``adapter_0.pt`` ...) with names of its own, beside adapter_config.json.

``layers.N.attn.q_proj.lora_a.weight[r, in]``, ``.lora_b.weight[out, r]``, ``.magnitude[out]`` for DoRA; one rank, one
alpha (``alpha / rank``) and the same modules in every layer. The config is peft's in little: ``r``, ``lora_alpha``,
``target_modules``, ``peft_type``. Module names and, in Llama's, the order of q's and k's rows are torchtune's, so a
table such as ``llama_torchtune`` leads from and to transformers' names; DoRA magnitudes follow their rows, which
torchtune's own export to peft forgets. Source: torchtune 0.6.1, modules/peft and models/convert_weights.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from ..axes import Expr
from ..errors import MappingError, counted
from . import factors
from .adapter import Adapter, Content, Fact, Facts, LoraModule, Value, Written
from .loralib import parse_bare
from .pairs import MERGE, Problems, group, in_mindspore

ROLES = {"lora_a.weight": ("a", "weight"), "lora_b.weight": ("b", "weight"), "magnitude": ("magnitude", "weight")}
IN_PEFT = {
    "q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj", "w1": "gate_proj",
    "w2": "down_proj", "w3": "up_proj", "output": "lm_head",
}  # fmt: skip
"""What ``target_modules`` calls a module (torchtune 0.6.1, ``_TO_PEFT_TARGET_MODULES``)."""
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
BIASES = "torchtune's magnitude scales a layer's bias too, peft's does not: layers with biases compute something else"


class Torchtune:
    """Read and write torchtune's adapters."""

    name = "torchtune"
    framework: Literal["torch", "mindspore"] = "torch"

    def detect(self, content: Content) -> str | None:
        """Claim files outside MindSpore with ``P.lora_a.weight``."""
        found = [name for name in content.specs if name.endswith(".lora_a.weight")]
        return f"{counted(len(found), 'tensor')} such as {found[0]}" if found and not in_mindspore(content) else None

    def parse(self, content: Content) -> Adapter:
        """Read every adapted module; rank and alpha come from the config, else from facts."""
        config = content.config or {}
        stated = tuple(
            Fact("*", fact, config[field])
            for field, fact in (("r", "rank"), ("lora_alpha", "alpha"))
            if isinstance(config.get(field), int | float)
        )
        known = Facts((Fact("*", "kind", "linear"), Fact("*", "enable_lora", [True]), *stated))
        adapter = parse_bare(replace(content, facts=known.then(content.facts)), group(content, ROLES))
        if adapter.extras:
            raise MappingError(
                "tensors beside the factors are no part of a torchtune adapter",
                where=[extra.name for extra in adapter.extras],
                hint="name the adapter's file, not the model's",
            )
        carried: dict[str, Value] = {}
        if isinstance(config.get("base_model_name_or_path"), str):
            carried["base_model_name_or_path"] = config["base_model_name_or_path"]
        return replace(adapter, config=carried, warnings=(*adapter.warnings, *_dora(adapter.modules)))

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell an adapter with one rank and alpha; MappingError for what torchtune's builders cannot make."""
        _refuse(adapter)
        modules, top, shared, notes = factors.uniform_as_told(adapter.modules, facts)
        whole = factors.as_written(shared)
        last = sorted({module.path.rpartition(".")[2] for module in modules})
        targets: list[Value] = [IN_PEFT[name] for name in last]
        config: dict[str, Value] = {"r": top, "lora_alpha": whole, "target_modules": targets, "peft_type": "LORA"}
        if isinstance(adapter.config.get("base_model_name_or_path"), str):
            config["base_model_name_or_path"] = adapter.config["base_model_name_or_path"]
        attention = [name for name in last if name.endswith("_proj")]
        recipe = (
            f"build the model with lora_attn_modules={attention}, apply_lora_to_mlp={'w1' in last}, "
            f"apply_lora_to_output={'output' in last}, lora_rank={top}, lora_alpha={whole}"
            + (", use_dora=True" if modules and modules[0].magnitude is not None else "")
        )
        tensors = [row for module in modules for row in _named(module)]
        return Written(tensors, config, notes=(recipe, *notes, *_dora(modules)), modules=modules)


def _named(module: LoraModule) -> list[tuple[str, Expr]]:
    (term,) = module.terms
    rows = [(f"{module.path}.lora_a.weight", term.a), (f"{module.path}.lora_b.weight", term.b)]
    return rows if module.magnitude is None else [*rows, (f"{module.path}.magnitude", module.magnitude)]


def _dora(modules: Sequence[LoraModule]) -> tuple[str, ...]:
    return (BIASES,) if any(module.magnitude is not None for module in modules) else ()


def _refuse(adapter: Adapter) -> None:
    problems = Problems("properties of the adapter have no place in torchtune")
    layers: dict[str, set[str]] = {}
    for module in adapter.modules:
        layer, last = _LAYER.fullmatch(module.path), module.path.rpartition(".")[2]
        if layer:
            layers.setdefault(layer[2], set()).add(layer[1])
        if last not in IN_PEFT or (layer is None and module.path != "output"):
            problems.add(
                "torchtune adapts no module of this name", module.path, "leave it out with --exclude, or merge"
            )
        elif module.kind != "linear" or module.weight != "weight":
            problems.add(f"torchtune has no LoRA for {module.kind}", module.path, MERGE)
        if module.lora_bias is not None:
            problems.add("torchtune has no bias on the B factor", module.path, MERGE)
    for extra in adapter.extras:
        cure = "leave them out with --adapter-only" if extra.kind == "base" else MERGE
        problems.add("torchtune saves factors and nothing beside them", extra.name, cure)
    if len({module.magnitude is None for module in adapter.modules}) > 1:
        problems.add("torchtune adapts all modules with DoRA or none", "some modules have no magnitude", MERGE)
    problems.raise_any()
    _check_layers(layers)


def _check_layers(layers: dict[str, set[str]]) -> None:
    """Refuse modules that are adapted in some layers only, and an MLP that is not adapted as a whole."""
    found_in = set().union(*layers.values()) if layers else set()
    every = {str(number) for number in range(max(map(int, found_in), default=-1) + 1)}
    lacking = [
        f"{name}: not in layer {min(every - found, key=int)}" for name, found in layers.items() if found != every
    ]
    parts = Counter(name.rpartition(".")[2] for name in layers if name.startswith("mlp."))
    if 0 < len(parts) < 3:
        lacking.append(f"mlp: only {', '.join(sorted(parts))} of w1, w2 and w3")
    if lacking:
        raise MappingError(
            "torchtune adapts the same modules in every layer, and an MLP as a whole", where=lacking, hint=MERGE
        )
