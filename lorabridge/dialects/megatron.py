"""LoRA of NeMo and Megatron-Bridge: ``P.adapter.linear_in.weight[r, in]``, ``P.adapter.linear_out.weight[out, r]``.

P is one of Megatron's layers (``decoder.layers.N.self_attention.linear_qkv``), whose fused rows a table such as
``llama_megatron`` takes apart; DoRA adds ``P.adapter.weight_magnitude[out]``; the frozen weight of a wrapped layer is
``P.to_wrap.weight``. CanonicalLoRA has ``P.adapter.adapter_q.linear_in.weight`` and so on, read and written as modules
``P.adapter_q`` with ``--layout lora=canonical``. NeMo 1's ``adapter_layer.lora_kqv_adapter`` and its kin are read.
Experts are those of SequentialMLP, ``experts.local_experts.N``; see ``qwen3_moe_megatron``. Rank (``dim``) and
``alpha`` are in the run's yaml, one for all. Tensor-parallel shards have to be put together first.
Sources: megatron-bridge 0.3.1, peft/lora.py, canonical_lora.py, utils.py; for NeMo 1.x its published names.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Literal

from ..axes import Expr
from ..errors import MappingError, counted
from ..tensors import TensorSpec
from . import factors
from .adapter import Adapter, Content, Fact, Facts, LoraModule, Written
from .loralib import parse_bare
from .pairs import MERGE, Problems, group, in_mindspore
from .spelling import spell_extras

ROLES = {
    "linear_in.weight": ("a", "weight"), "linear_out.weight": ("b", "weight"),
    "weight_magnitude": ("magnitude", "weight"),
}  # fmt: skip
IN_NEMO_1 = {
    "lora_kqv_adapter": "linear_qkv", "lora_dense_attention_adapter": "linear_proj", "lora_hto4h_adapter": "linear_fc1",
    "lora_4htoh_adapter": "linear_fc2",
}  # fmt: skip
_PREFIX = re.compile(r"(?:(?:module|model)\.)+")
_ADAPTER = re.compile(r"(.+)\.adapter\.(?:(adapter_[a-z0-9]+)\.)?(linear_(?:in|out)\.weight|weight_magnitude)")
_GROUPED = re.compile(
    r"\.mlp\.experts\.linear_fc[12]\.(?:adapter_[a-z0-9]+\.)?(linear_(in|out)\.weight|weight_magnitude)$"
)
"""Experts that one grouped layer holds (TEGroupedMLP); those of SequentialMLP are ``local_experts.N``."""
_NEMO_1 = re.compile(r"(.+)\.adapter_layer\.([a-z0-9_]+)\.(linear_(?:in|out)\.weight)")


class Megatron:
    """Read and write the adapters of Megatron-Bridge and NeMo 2; read NeMo 1's names too."""

    name = "megatron"
    framework: Literal["torch", "mindspore"] = "torch"

    def detect(self, content: Content) -> str | None:
        """Claim files outside MindSpore with ``adapter.linear_in.weight`` or NeMo 1's names."""
        found = [name for name in content.specs if _ADAPTER.fullmatch(name) or _NEMO_1.fullmatch(name)]
        return f"{counted(len(found), 'tensor')} such as {found[0]}" if found and not in_mindspore(content) else None

    def parse(self, content: Content) -> Adapter:
        """Read every adapted layer; alpha comes from facts. MappingError names what is missing."""
        specs = _renamed(content)
        known = (Fact("*", "kind", "linear"), Fact("*", "enable_lora", [True]))
        never = Facts((Fact("*", "merged", False),))
        facts = Facts(known).then(content.facts).then(never)
        return parse_bare(replace(content, specs=specs, facts=facts), group(replace(content, specs=specs), ROLES))

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell an adapter with one rank and alpha; both become facts beside the file."""
        _refuse(adapter)
        modules, top, shared, notes = factors.uniform_as_told(adapter.modules, facts)
        whole = factors.as_written(shared)
        paths = {module.path for module in modules}
        tensors = [row for module in modules for row in _named(module)]
        for name, expr in spell_extras(adapter.extras):
            path, _, last = name.rpartition(".")
            tensors.append((f"{path}.to_wrap.{last}" if path in paths else name, expr))
        said = Facts((Fact("*", "rank", top), Fact("*", "alpha", whole)))
        targets = sorted({module.path.rpartition(".")[2] for module in modules})
        note = f"apply LoRA with dim={top}, alpha={whole}, target_modules={targets}: the file cannot say them"
        return Written(tensors, facts=said, notes=(note, *notes), modules=modules)


def _renamed(content: Content) -> dict[str, TensorSpec]:
    """Return the tensors by module path and role, without wrappers' prefixes and levels."""
    found = {match[0] if (match := _PREFIX.match(name)) else "" for name in content.specs}
    prefix = found.pop() if len(found) == 1 else ""
    specs: dict[str, TensorSpec] = {}
    problems = Problems()
    names: dict[str, list[str]] = {}
    for name, spec in content.specs.items():
        bare = name.removeprefix(prefix)
        if match := _ADAPTER.fullmatch(bare):
            path = f"{match[1]}.{match[2]}" if match[2] else match[1]
            bare = f"{path}.{match[3]}"
        elif match := _NEMO_1.fullmatch(bare):
            layer = IN_NEMO_1.get(match[2])
            if layer is None:
                problems.add(f"{match[2]} is no adapter of LoRA that is known", name, MERGE)
                continue
            bare = f"{match[1]}.{layer}.{match[3]}"
        if _GROUPED.search(bare):
            problems.add(
                "one pair for all the experts that a rank holds, where others have one for each",
                name,
                "let Megatron-Bridge export it for transformers (AutoBridge.export_adapter_weights), expert by expert",
            )
        bare = bare.replace(".to_wrap.", ".")
        names.setdefault(bare, []).append(name)
        specs[bare] = spec
    for several in names.values():
        if len(several) > 1:
            problems.add(
                "one parameter occurs twice under different names", " and ".join(several), "remove one of them"
            )
    problems.raise_any(content.path)
    return specs


def _named(module: LoraModule) -> list[tuple[str, Expr]]:
    (term,) = module.terms
    path, _, last = module.path.rpartition(".")
    stem = f"{path}.adapter.{last}" if last.startswith("adapter_") else f"{module.path}.adapter"
    rows = [(f"{stem}.linear_in.weight", term.a), (f"{stem}.linear_out.weight", term.b)]
    return rows if module.magnitude is None else [*rows, (f"{stem}.weight_magnitude", module.magnitude)]


def _refuse(adapter: Adapter) -> None:
    problems = Problems("properties of the adapter have no place in Megatron's LoRA")
    for module in adapter.modules:
        if module.kind != "linear" or module.weight != "weight":
            problems.add(f"Megatron has no LoRA for {module.kind}", module.path, MERGE)
        if module.lora_bias is not None:
            problems.add("Megatron's LoRA has no bias on the B factor", module.path, MERGE)
    for extra in adapter.extras:
        if extra.kind != "base":
            problems.add("Megatron saves factors and nothing trained beside them", extra.name, MERGE)
    if adapter.merged:
        problems.add("the base weights hold the delta already", "base weights", "leave them out with --adapter-only")
    if len({module.magnitude is None for module in adapter.modules}) > 1:
        problems.add("Megatron adapts all layers with DoRA or none", "some layers have no magnitude", MERGE)
    problems.raise_any()
    twice = [path for path, times in Counter(module.path for module in adapter.modules).items() if times > 1]
    if twice:
        raise MappingError("a layer is adapted twice", where=twice, hint="report this")
