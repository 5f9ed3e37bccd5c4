"""The peft directories that vLLM and vllm-mindspore serve as their trainers meant them.

vLLM reads ``r``, ``lora_alpha``, ``use_rslora`` and little else of adapter_config.json (vllm/lora/peft_helper.py):
it refuses ``modules_to_save`` and ``use_dora``, and releases before 0.33 may pass over ``rank_pattern`` and
``alpha_pattern``, so that modules with values of their own are scaled wrongly in silence. Written here is what every
release reads alike, one rank and one alpha: ranks are padded with zeros, differing scalings, rank-stabilised ones among
them, folded into B. vLLM 0.33 reads the patterns, and one head called ``classifier`` or ``score``, from peft's own
directory; a refused head says so.
vllm-mindspore (0.5.1, its models of 2026-04) adapts the projections of Qwen2's attention and MLP only and has no LoRA
for embeddings and heads.

Reading is peft's; ``vllm`` and ``vllm-mindspore`` are targets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from . import factors
from .adapter import Adapter, Content, Facts, Value, Written
from .pairs import MERGE, Problems
from .peft import PEFT
from .peft_config import DEFAULTS, changes_base
from .peft_write import write

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank may be (``vllm/config/lora.py``)."""
SERVED = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
"""Modules that vllm-mindspore adapts."""
KEPT = frozenset(
    {"base_model_name_or_path", "revision", "task_type", "lora_dropout", "fan_in_fan_out", "inference_mode"}
)
"""Fields that are carried as they are."""
HEADS = ("classifier", "score")
"""Whole modules that vLLM takes since a release of which 0.33 is known (``PEFTHelper._validate_features``)."""


@dataclass(frozen=True, slots=True)
class Vllm:
    """Write a peft directory within a server's limits; ``name``: "vllm" or "vllm-mindspore"."""

    name: str = "vllm"
    framework: Literal["torch", "mindspore"] = "torch"

    def detect(self, content: Content) -> str | None:
        """Claim nothing: such a file is peft's."""
        return None

    def parse(self, content: Content) -> Adapter:
        """Resolve names and config exactly as for peft."""
        return PEFT.parse(content)

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell an adapter with one rank and one alpha; MappingError names what the server would refuse or ignore."""
        _refuse(adapter, self.name)
        modules, top, _, notes = factors.uniform_as_told(adapter.modules, facts)
        kept: dict[str, Value] = {name: value for name, value in adapter.config.items() if name in KEPT}
        chosen = adapter.config.get("target_modules")
        narrowed = adapter.config.get("exclude_modules") or adapter.config.get("layers_to_transform") is not None
        if isinstance(chosen, list) and not narrowed:
            kept["target_modules"] = chosen
        written = write(replace(adapter, modules=modules, config={**DEFAULTS, **kept}), Facts())
        least = next((choice for choice in RANKS if choice >= top), None)
        start = f"start vLLM with --enable-lora and --max-lora-rank {least} or more"
        if least is None:
            start = (
                f"rank {top} is more than vLLM's largest --max-lora-rank, {RANKS[-1]}: make it smaller with --compress"
            )
        return replace(written, notes=(start, *notes, *written.notes))


def _newer(adapter: Adapter) -> str:
    """Say what newer releases do with the one head that is trained beside the factors, if that is all there is."""
    trained = [extra for extra in adapter.extras if extra.kind != "base"]
    heads = {extra.path for extra in trained}
    if len(heads) != 1 or {extra.kind for extra in trained} != {"modules_to_save"}:
        return ""
    head = heads.pop().rpartition(".")[2]
    return f"; vLLM 0.33 loads one {head!r} beside the factors of a peft directory (--to peft)" if head in HEADS else ""


def _refuse(adapter: Adapter, server: str) -> None:
    problems = Problems(f"properties of the adapter are refused or ignored by {server}")
    for module in adapter.modules:
        last = module.path.rpartition(".")[2]
        if module.magnitude is not None:
            problems.add(f"{server} has no DoRA", module.path, MERGE)
        if module.lora_bias is not None:
            problems.add(f"{server} has no bias on the B factor", module.path, MERGE)
        if module.kind not in ("linear", "embedding") or module.weight != "weight":
            what = module.kind if module.weight == "weight" else module.weight
            problems.add(f"{server} has no LoRA for {what}", module.path, MERGE)
        elif server == "vllm-mindspore" and last not in SERVED:
            problems.add(
                f"{server} ignores factors of {last}", module.path, f"{MERGE}, or leave them out with --exclude"
            )
    cure = f"{MERGE}{_newer(adapter)}" if server == "vllm" else MERGE
    for extra in adapter.extras:
        if extra.kind == "base":
            problems.add(
                f"{server} takes no base weights in an adapter", extra.name, "leave them out with --adapter-only"
            )
        else:
            what = "biases" if extra.kind == "bias" else "whole modules and token rows"
            problems.add(f"{server} takes no trained {what} beside the factors", extra.name, cure)
    init = changes_base(adapter.config)
    if init:
        cure = "convert the adapter to plain LoRA in peft first (path_initial_model_for_weight_conversion), or merge it"
        problems.add(
            f"init_lora_weights={init!r} changed the base, and {server} serves the original one", "config", cure
        )
    if adapter.config.get("layer_replication"):
        problems.add(f"{server} does not replicate layers (layer_replication)", "config", MERGE)
    problems.raise_any()
