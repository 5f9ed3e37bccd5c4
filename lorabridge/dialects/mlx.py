"""MLX-LM: ``adapters.safetensors`` with ``P.lora_a[in, r]``, ``P.lora_b[r, out]``, beside adapter_config.json.

The config holds ``fine_tune_type`` ("lora", "dora"; "full" is no adapter), ``num_layers`` and ``lora_parameters``: one
``rank``, one ``scale``, which is multiplied as it is (no alpha), and ``keys``, the adapted modules. A DoRA magnitude is
``P.m[out]``; experts are in ``mlx_experts``. Module paths are those of mlx_lm's models, which follow transformers'.
Source: mlx-lm 0.32.2, tuner/lora.py, dora.py and utils.py (``load_adapters`` refuses every tensor that is none of
these).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from ..errors import MappingError, counted
from . import factors, mlx_experts
from .adapter import Adapter, Content, Facts, Json, LoraModule, Scaling, Value, Written
from .pairs import MERGE, Problems, in_mindspore
from .transposed import Spelling, read_modules, sort_names, turned

SPELLING = Spelling("lora_a", "lora_b", "m")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class Mlx:
    """Read and write MLX-LM's adapters: linear layers, embeddings and experts, DoRA on linear layers."""

    name = "mlx"
    framework: Literal["torch", "mindspore"] = "torch"

    def detect(self, content: Content) -> str | None:
        """Claim files outside MindSpore with bare ``P.lora_a``, or with MLX's config beside them."""
        if in_mindspore(content) or content.metadata.get("container") == "gguf":
            return None
        found = [name for name in content.specs if name.rpartition(".")[2] == SPELLING.a]
        if found:
            return f"{counted(len(found), 'parameter')} such as {found[0]}"
        config = content.config or {}
        return "adapter_config.json has lora_parameters" if "lora_parameters" in config else None

    def parse(self, content: Content) -> Adapter:
        """Read every adapted layer; MappingError for a missing scale and for tensors that are no part of LoRA."""
        pairs, rest = sort_names(content, SPELLING)
        config = content.config or {}
        if not pairs or config.get("fine_tune_type") == "full":
            raise MappingError(
                "the file holds no lora_a and lora_b"
                if not pairs
                else "fine_tune_type is full: these are whole weights",
                where=content.path,
                hint="check --from; whole weights are a model: --from hf",
            )
        problems = Problems()
        for name in rest:
            problems.add("tensors beside the factors, which MLX itself does not load", name, "check --from")
        scale, dropout = _parameters(content, config, problems)
        stacks = {path: specs for path, specs in pairs.items() if mlx_experts.is_stack(path, specs)}
        pairs = {path: specs for path, specs in pairs.items() if path not in stacks}
        modules = read_modules(content, pairs, {}, problems)
        for path, specs in stacks.items():
            modules += mlx_experts.read_stack(path, specs, problems)
        marked = {module.path for module in modules if module.magnitude is not None}
        if (config.get("fine_tune_type") == "dora" or marked) and len(marked) < len(modules):
            where = ", ".join(module.path for module in modules if module.path not in marked)
            problems.add("some layers have a DoRA magnitude and some have none", where, "check the file")
        modules = tuple(_scaled(content, module, scale, problems) for module in modules)
        problems.raise_any(content.path)
        carried: dict[str, Value] = {"lora_dropout": dropout} if dropout else {}
        if isinstance(config.get("model"), str):
            carried["base_model_name_or_path"] = config["model"]
        return Adapter(modules, config=carried, warnings=_tied(modules))

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell an adapter with one rank and one scale (see ``factors.uniform``) and MLX's config."""
        _refuse(adapter)
        modules, top, _, notes = factors.uniform_as_told(adapter.modules, facts)
        plain, experts, stacks = mlx_experts.spell_stacks(modules)
        paths: list[Value] = [*sorted([*(module.path for module in plain), *stacks])]
        layers = {match[1] for module in modules if (match := _LAYER.search(module.path))}
        scale = modules[0].scaling.value if modules else 1.0
        dropout = adapter.config.get("lora_dropout")
        config: dict[str, Value] = {
            "fine_tune_type": "dora" if any(module.magnitude is not None for module in modules) else "lora",
            "num_layers": max(len(layers), 1),
            "lora_parameters": {
                "rank": top, "scale": factors.as_written(scale),
                "dropout": dropout if isinstance(dropout, int | float) else 0.0, "keys": paths,
            },
        }  # fmt: skip
        if isinstance(adapter.config.get("base_model_name_or_path"), str):
            config["model"] = adapter.config["base_model_name_or_path"]
        notes = (*notes, *_tied(modules))
        return Written([*turned(plain, SPELLING), *experts], config, notes=notes, modules=modules)


def _parameters(content: Content, config: Json, problems: Problems) -> tuple[float | None, float]:
    """Return the scale and the dropout of a config; None for a scale that is not stated."""
    held = config.get("lora_parameters")
    if held is None:
        return None, 0.0
    if not isinstance(held, dict):
        problems.add("lora_parameters is no object", content.path, "repair adapter_config.json")
        return None, 0.0
    scale, dropout = held.get("scale"), held.get("dropout")
    if scale is not None and not _number(scale):
        problems.add(f"scale {scale!r} is no number", content.path, "repair adapter_config.json")
        scale = None
    given = float(scale) if isinstance(scale, int | float) else None
    return given, float(dropout) if isinstance(dropout, int | float) and _number(dropout) else 0.0


def _number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _scaled(content: Content, module: LoraModule, scale: float | None, problems: Problems) -> LoraModule:
    """Give a module its scaling: the config's scale, else a stated alpha over the rank."""
    rank = module.terms[0].rank
    alpha = content.facts.get(module.path, "alpha")
    if scale is None:
        if isinstance(alpha, int | float) and _number(alpha):
            return replace(module, scaling=Scaling(float(alpha), rank))
        problems.add(
            "the scale is not stored in the file", module.path,
            "give the adapter_config.json with --config, or --alpha (scale times rank)",
        )  # fmt: skip
        return module
    exact = factors.exact_alpha(scale, rank)
    if exact is not None:
        return replace(module, scaling=Scaling(exact, rank))
    wide = 1 << (rank - 1).bit_length()  # at a power of two alpha / rank is any number
    padded = factors.pad_rank(replace(module, scaling=Scaling(0.0, rank)), wide)
    return replace(padded, scaling=Scaling(scale * wide, wide))


def _tied(modules: Sequence[LoraModule]) -> tuple[str, ...]:
    adapted = [module.path for module in modules if module.kind == "embedding"]
    said = "where the head is tied to it, MLX applies the factors to both and peft to the embedding only"
    return tuple(f"{path}: {said}" for path in adapted)


def _refuse(adapter: Adapter) -> None:
    problems = Problems("properties of the adapter have no place in MLX-LM")
    plain = [module.path for module in adapter.modules if module.magnitude is None]
    for module in adapter.modules:
        if module.stack is not None:
            cure = "name them one by one with --family NAME --layout hf_experts=disk --config config.json"
            problems.add("MLX-LM's experts are those of single modules", module.stack.parameter, cure)
        if module.kind not in ("linear", "embedding") or module.weight != "weight":
            what = module.kind if module.weight == "weight" else module.weight
            problems.add(f"MLX-LM has no LoRA for {what}", module.path, MERGE)
        if module.magnitude is not None and module.kind == "embedding":
            problems.add(
                "MLX-LM's DoRA of embeddings has a magnitude per token, peft's per feature", module.path, MERGE
            )
        if module.lora_bias is not None:
            problems.add("MLX-LM has no bias on the B factor", module.path, MERGE)
    if 0 < len(plain) < len(adapter.modules):
        cure = "convert the two kinds of modules separately with --include"
        for path in plain:
            problems.add("MLX-LM adapts all layers with DoRA or none, this one has no magnitude", path, cure)
    for extra in adapter.extras:
        cure = "leave them out with --adapter-only" if extra.kind == "base" else MERGE
        problems.add("MLX-LM loads factors and nothing beside them", extra.name, cure)
    problems.raise_any()
