"""slora: one adapter of the folder that MindFormers' S-LoRA serving loads (1.3 ... 2.1, Llama and Qwen2.5 cells).

The folder named by ``pet_config.adapter_path`` holds ``lora_adapter.json``, a map from an adapter's name to its
directory, and each directory ``adapter_config.json`` and ``adapter_model.ckpt``. Sources: pet/tuners/slora_adapter.py
(``init_slora_config``, ``process``) and trainer/utils.py (``load_slora_ckpt``) of 2.1.0.

| parameter | shape |
|---|---|
| ``model.layers.N.attention.wq.lora_a``, ``.lora_b`` | ``[r, in]``, ``[out, r]`` |
| ``model.tok_embeddings.lora_a``, ``.lora_b`` | ``[r, vocabulary]``, ``[hidden, r]`` |
| ``lm_head.lora_a``, ``.lora_b`` | ``[r, hidden]``, ``[vocabulary, r]`` |
| ``lm_head.lora_embedding``, ``model.tok_embeddings.lora_embedding`` | ``[added tokens, hidden]`` |

The loader pads ranks with zeros and multiplies B by ``alpha / r`` (``alpha / sqrt(r)`` with ``use_rslora``); a name
that its network does not have is dropped in silence, and a cell without factors gets zeros.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import MappingError, counted
from .adapter import DIRECTORY, TITLE, Adapter, Content, Fact, Facts, LoraModule, Value, Written
from .mindformers import LLAMA_CELLS, LOWER_ROLES, factor_names, llama_cells, lower_case, parse_pairs
from .mindformers_write import Shared, dropout_of, refuse, shared
from .pairs import MERGE, Problems

EMBEDDINGS = ("tok_embeddings",)
KINDS = Facts((
    Fact("*tok_embeddings", "kind", "embedding"), Fact("*", "kind", "linear"), Fact("*", "enable_lora", [True]),
))  # fmt: skip
SERVED = frozenset(LLAMA_CELLS | {"lm_head"})
CALLED = {"tok_embeddings": "embed_tokens"}
"""What ``target_modules`` calls a cell, where that is not its own name."""


@dataclass(frozen=True, slots=True)
class Slora:
    """Read and write one adapter directory of S-LoRA serving."""

    name: str = "slora"
    framework: Literal["torch", "mindspore"] = "mindspore"

    def detect(self, content: Content) -> str | None:
        """Claim MindSpore files with ``P.lora_a`` of Llama cells."""
        found = lower_case(content)
        return (
            f"{counted(len(found), 'parameter')} such as {found[0]} in a MindSpore file" if llama_cells(found) else None
        )

    def parse(self, content: Content) -> Adapter:
        """Read every adapted cell; the scaling is that of the adapter_config.json beside."""
        added = [name for name in content.specs if name.rpartition(".")[2] == "lora_embedding"]
        if added:
            raise MappingError(
                "rows of added tokens are whole embeddings and no low-rank factors",
                where=added,
                hint="resize the base's embedding with these rows, then convert the adapter without them",
            )
        return parse_pairs(content, LOWER_ROLES, "S-LoRA", KINDS, served=True)

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell an adapter with one rank and one integer alpha, with the folder's files.

        MappingError for cells that S-LoRA does not serve, and for whole parameters, which its loader drops in silence.
        """
        refuse(adapter, "S-LoRA", kinds=("linear", "embedding"), weights=("weight", "embedding_weight"))
        _refuse(adapter)
        made = shared(adapter, facts, whole_alpha=True)
        kinds = tuple(Fact(module.path, "kind", "embedding") for module in made.modules if module.kind == "embedding")
        notes = (
            "S-LoRA reads a folder: to serve this adapter beside others, add its entry to their lora_adapter.json",
            *made.notes,
        )
        return Written(
            factor_names(made.modules, "lora_a", "lora_b"),
            facts=Facts((*kinds, *made.facts.entries)),
            notes=notes,
            modules=made.modules,
            files=_files(adapter, made),
        )


def _refuse(adapter: Adapter) -> None:
    problems = Problems("parts of the adapter are not served by S-LoRA")
    for module in adapter.modules:
        if module.path.rpartition(".")[2] not in SERVED:
            problems.add(
                "S-LoRA serves MindFormers' Llama cells only",
                module.path,
                "name the modules as they are there with --family llama, or leave others out with --exclude",
            )
        elif (module.kind == "embedding") != (module.path.rpartition(".")[2] in EMBEDDINGS):
            problems.add(f"S-LoRA has no LoRA for {module.kind} here", module.path, MERGE)
    for extra in adapter.extras:
        problems.add(
            "S-LoRA loads factors only, and drops other parameters in silence",
            extra.name,
            "leave base weights out with --adapter-only and other parameters with --exclude",
        )
    problems.raise_any()


def _files(adapter: Adapter, made: Shared) -> Mapping[str, str]:
    cells = dict.fromkeys(_called(module) for module in made.modules)
    config: dict[str, Value] = {
        "bias": "none",
        "lora_alpha": int(made.alpha),
        "lora_dropout": dropout_of(adapter),
        "peft_type": "LORA",
        "r": made.rank,
        "target_modules": list(cells),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    return {
        "adapter_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        "lora_adapter.json": json.dumps({TITLE: DIRECTORY}, indent=2, ensure_ascii=False) + "\n",
    }


def _called(module: LoraModule) -> str:
    cell = module.path.rpartition(".")[2]
    return CALLED.get(cell, cell)
