"""LoRA adapters in GGUF files, as llama.cpp loads them (``--lora``).

``blk.N.attn_q.weight.lora_a[r, in]``, ``.lora_b[out, r]``; the embedding's A is turned around
(``token_embd.weight.lora_a[vocabulary, r]``). Pairs: ``general.type`` "adapter", ``adapter.type`` "lora",
``general.architecture`` and one ``adapter.lora.alpha`` in float32; each module is scaled by alpha over the rank of its
own B, and alpha 0 means a scaling of 1. Names, and for the architecture llama the order of q's and k's rows, are
llama.cpp's: tables such as ``llama_gguf`` lead from and to transformers' names. Source: llama.cpp,
convert_lora_to_gguf.py and src/llama-adapter.cpp (2026).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from ..axes import Expr, read, reorder
from ..errors import MappingError, counted
from ..tensors import TensorSpec
from . import factors
from .adapter import Adapter, Content, Extra, Facts, LoraModule, Scaling, Term, Written
from .pairs import MERGE, Problems

EMBEDDING = "token_embd"
A, B = ".weight.lora_a", ".weight.lora_b"
TABLE = "_gguf"


class Gguf:
    """Read and write GGUF adapters: linear layers and the token embedding."""

    name = "gguf"
    framework: Literal["torch", "mindspore"] = "torch"

    def detect(self, content: Content) -> str | None:
        """Claim GGUF files with factors."""
        found = [name for name in content.specs if name.endswith(A)]
        held = content.metadata.get("container") == "gguf" and found
        return f"{counted(len(found), 'tensor')} such as {found[0]}, in a GGUF file" if held else None

    def parse(self, content: Content) -> Adapter:
        """Read every pair; a MappingError names half pairs, a missing alpha and what is no adapter."""
        problems = Problems()
        alpha = _alpha(content, problems)
        pairs: dict[str, dict[str, TensorSpec]] = {}
        extras = []
        for name, spec in content.specs.items():
            for suffix in (A, B):
                if name.endswith(suffix):
                    pairs.setdefault(name.removesuffix(suffix), {})[suffix] = spec
            if not name.endswith((A, B)):
                path, _, last = name.rpartition(".")
                extras.append(Extra(path, last, read(spec), "modules_to_save"))
        modules = [_module(path, specs, alpha, problems) for path, specs in pairs.items()]
        if not modules:
            raise MappingError("the file holds no LoRA factors", where=content.path, hint="check --from")
        problems.raise_any(content.path)
        said = [f"{extra.name}: llama.cpp itself leaves whole parameters in an adapter aside" for extra in extras]
        return Adapter(tuple(m for m in modules if m is not None), tuple(extras), warnings=tuple(said))

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell an adapter with one alpha; ranks may differ. MappingError for what llama.cpp cannot load."""
        _refuse(adapter)
        table = facts.get("*", "table")
        if not isinstance(table, str) or not table.endswith(TABLE):
            raise MappingError(
                "a GGUF adapter names the architecture of its base, which a table knows",
                hint="write a peft adapter, and convert that with --to gguf --family llama_gguf",
            )
        modules, alpha, notes = _one_alpha(adapter.modules, facts)
        (stored,) = struct.unpack("<f", struct.pack("<f", alpha))
        if stored != alpha:
            notes = (*notes, f"alpha {alpha!r} is stored as the float32 {stored!r}")
        metadata = {
            "general.architecture": table.removesuffix(TABLE), "general.type": "adapter", "adapter.type": "lora",
            "adapter.lora.alpha": f"f32:{stored!r}",
        }  # fmt: skip
        base = adapter.config.get("base_model_name_or_path")
        if isinstance(base, str) and base:
            metadata |= {"general.base_model.count": "u32:1", "general.base_model.0.name": base}
        tensors = [row for module in modules for row in _named(module)]
        return Written(tensors, notes=notes, modules=modules, metadata=metadata)


def _alpha(content: Content, problems: Problems) -> float | None:
    said = content.metadata
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if said.get(key, wanted) != wanted:
            problems.add(f"{key} is {said[key]!r}, not {wanted!r}", content.path, "name a LoRA adapter")
    if "adapter.alora.invocation_tokens" in said:
        problems.add("the adapter acts on some tokens only (aLoRA)", content.path, "convert it from its source instead")
    word, _, text = said.get("adapter.lora.alpha", "").partition(":")
    stated = content.facts.get("*", "alpha")
    if word == "f32":
        return float(text)
    if isinstance(stated, int | float) and not isinstance(stated, bool):
        return float(stated)
    problems.add("adapter.lora.alpha is not stored in the file", content.path, "give it with --alpha")
    return None


def _module(
    path: str, specs: dict[str, TensorSpec], alpha: float | None, problems: Problems
) -> LoraModule | None:  # fmt: skip
    lacking = [name for name in (A, B) if name not in specs]
    if lacking:
        problems.add(f"{lacking[0][1:]} is missing", path, "convert the adapter again")
        return None
    embedding = path.rpartition(".")[2] == EMBEDDING
    a, b = specs[A], specs[B]
    shape = a.shape[::-1] if embedding else a.shape
    if len(shape) != 2 or len(b.shape) != 2 or shape[0] != b.shape[1]:
        problems.add("shapes are no pair of factors", f"{path}: {list(a.shape)} and {list(b.shape)}", "check the file")
        return None
    rank, out = shape[0], b.shape[0]
    scaling = Scaling(alpha or float(rank), rank)  # alpha 0 means a scaling of 1
    term = Term(reorder(read(a), (1, 0)) if embedding else read(a), read(b), 0, out)
    kind: Literal["embedding", "linear"] = "embedding" if embedding else "linear"
    return LoraModule(path, kind, out, (term,), scaling, fan_in_fan_out=None if embedding else False)


def _one_alpha(modules: Sequence[LoraModule], facts: Facts) -> tuple[tuple[LoraModule, ...], float, tuple[str, ...]]:
    """Return modules that share alpha, each over its own rank: as they are where that holds, else all of one rank."""
    single = [factors.grow(module) for module in modules]
    plain = {m.scaling.alpha for m in single if not m.scaling.rslora and m.scaling.rank == m.terms[0].rank}
    rank, alpha = facts.get("*", "rank"), facts.get("*", "alpha")
    kept = len(plain) == 1 and not any(m.scaling.rslora or m.scaling.rank != m.terms[0].rank for m in single)
    if kept and rank is None and alpha is None and math.isfinite(min(plain)) and min(plain) != 0:
        return tuple(single), plain.pop(), ()
    made, _, shared, notes = factors.uniform_as_told(single, facts)
    if shared == 0:
        raise MappingError(
            "every scaling is 0, and alpha 0 means 1 to llama.cpp", hint="leave the modules out with --exclude"
        )
    return tuple(replace(module) for module in made), shared, notes


def _named(module: LoraModule) -> list[tuple[str, Expr]]:
    (term,) = module.terms
    a = reorder(term.a, (1, 0)) if module.kind == "embedding" else term.a
    return [(f"{module.path}{A}", a), (f"{module.path}{B}", term.b)]


def _refuse(adapter: Adapter) -> None:
    problems = Problems("properties of the adapter have no place in llama.cpp")
    for module in adapter.modules:
        if module.magnitude is not None:
            problems.add("llama.cpp has no DoRA", module.path, MERGE)
        if module.lora_bias is not None:
            problems.add("llama.cpp has no bias on the B factor", module.path, MERGE)
        if module.kind not in ("linear", "embedding") or module.weight not in ("weight", "embedding_weight"):
            problems.add(f"llama.cpp has no LoRA for {module.kind}", module.path, MERGE)
        elif (module.kind == "embedding") != (module.path.rpartition(".")[2] == EMBEDDING):
            problems.add("llama.cpp has LoRA for one embedding, token_embd", module.path, MERGE)
    for extra in adapter.extras:
        cure = "leave them out with --adapter-only" if extra.kind == "base" else MERGE
        problems.add("llama.cpp loads factors and nothing beside them", extra.name, cure)
    problems.raise_any()
