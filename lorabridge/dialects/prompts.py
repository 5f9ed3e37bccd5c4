"""Prefixes and prompts: MindPet's PrefixEncoder and PromptTuning, and peft's PREFIX_TUNING, PROMPT_TUNING, P_TUNING.

peft 0.21.2 writes one tensor, ``prompt_embeddings``, whatever computed it in training: for prefix tuning
``[n, layers * 2 * token_dim]``, which ``PeftModel.get_prompt`` views as ``[n, layers * 2, heads, head]``; for the
others ``[n * submodules, token_dim]``. MindPet's PrefixEncoder (P-Tuning v2) has the same rows in
``P.mindpet_delta_ptuning2_embedding.embedding_table`` unless its projection computes them; PromptTuning has
``P.mindpet_delta_prompttuning_embedding.embedding_table``. Bits are copied.
"""

from __future__ import annotations

import re
from typing import Literal

from ..axes import Compute, read
from ..errors import MappingError, counted
from ..tensors import TensorSpec
from .adapter import Adapter, Content, Extra, Fact, Facts, Json, Value, Written
from .deltas import PREFIX, PROMPT, deltas, require
from .optimizer import training_state
from .pairs import Problems, in_mindspore
from .prompts_folded import FOLDED, Computed

TENSOR = "prompt_embeddings"
KINDS = {"PREFIX_TUNING": PREFIX, "PROMPT_TUNING": PROMPT, "P_TUNING": PROMPT}
_TABLE = re.compile(
    r"^(?P<path>.*?)\.?(?:mindpet|tk)_delta_(?P<kind>ptuning2|prompttuning)_embedding\.embedding_table$"
)
_INDEX = re.compile(r"(^|\.)(mindpet|tk)_delta_ptuning2_prefix$")
_REPARAMETRISED = re.compile(r"(^|\.)(mindpet|tk)_delta_prefixtuning_")
CELL = "prefix_encoder"
"""What MindPet's guide and MindFormers' GLM2 call their PrefixEncoder."""


class PeftPrompts:
    """Read and write peft's prompt methods."""

    name = "peft-prompt"
    framework: Literal["torch", "mindspore"] = "torch"

    def detect(self, content: Content) -> str | None:
        """Claim files with peft's ``prompt_embeddings``."""
        return f"tensor {TENSOR}" if TENSOR in content.specs and not in_mindspore(content) else None

    def parse(self, content: Content) -> Adapter:
        """Read the rows; MappingError without a config, for other prompt methods, and shapes that contradict it."""
        config = content.config or {}
        kind = KINDS.get(str(config.get("peft_type")))
        problems = Problems()
        if kind is None:
            said = f"peft_type is {config['peft_type']}" if "peft_type" in config else "no adapter_config.json says"
            problems.add(f"{said} what {TENSOR} is", content.path, f"known: {', '.join(KINDS)}; name it with --config")
        for name in content.specs:
            if name != TENSOR:
                problems.add("trained beside the prompt, which has no place in the target", name, "save it by itself")
        spec = content.specs.get(TENSOR)
        if spec is None:
            problems.add(f"the file has no {TENSOR}", content.path, "check --from")
        elif kind is not None:
            _check_shape(config, kind, spec.shape, problems)
        problems.raise_any(content.path)
        assert spec is not None
        assert kind is not None
        return Adapter((), (Extra("", kind, read(spec), "delta"),), dict(config))

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell a prefix or prompt; what the config leaves out peft takes from the base model."""
        require(adapter, self.name, ((PREFIX,), (PROMPT,)))
        extra = _single(adapter)
        known = adapter.config.get("peft_type")
        fitting = [name for name, kind in KINDS.items() if kind == extra.parameter]
        config: dict[str, Value] = {
            "inference_mode": True,
            "num_virtual_tokens": extra.value.shape[0],
            **adapter.config,
        }
        config["peft_type"] = known if known in fitting else fitting[0]
        if extra.parameter == PREFIX:
            config["prefix_projection"] = False
        notes = () if config.get("task_type") else ("adapter_config.json has no task_type, which peft needs: add it",)
        return Written([(TENSOR, extra.value)], config, notes=notes)


class MindpetPrompts:
    """Read and write the embeddings of MindPet's PrefixEncoder and PromptTuning."""

    name = "mindpet-prompt"
    framework: Literal["torch", "mindspore"] = "mindspore"

    def detect(self, content: Content) -> str | None:
        """Claim files with MindPet's prefixes or prompts."""
        found = [n for n in content.specs if _TABLE.match(n) or _REPARAMETRISED.search(n)]
        return f"{counted(len(found), 'parameter')} such as {found[0]}" if found else None

    def parse(self, content: Content) -> Adapter:
        """Read the rows, or compute what layers of their own make of them (see ``prompts_folded``).

        MappingError: tensors beside them, parts that are missing, several prefixes, and PrefixLayers without a config.
        """
        left_out = training_state(content.specs)
        skipped = {name for name, _ in left_out}
        tables: list[tuple[str, str, TensorSpec]] = []
        computed, problems = Computed(), Problems()
        for name, spec in content.specs.items():
            match = _TABLE.match(name)
            if name in skipped or computed.take(name, spec):
                continue
            if match is not None:
                tables.append((match["path"], PREFIX if match["kind"] == "ptuning2" else PROMPT, spec))
            elif _INDEX.search(name):
                left_out.append((name, "the numbers 0, 1, 2 ..., which the cell makes itself"))
            else:
                problems.add("trained beside the prompt, which has no place in the target", name, "save it by itself")
        extras = [
            Extra("", kind, computed.through(path, read(spec), problems) if kind == PREFIX else read(spec), "delta")
            for path, kind, spec in tables
        ]
        together = computed.whole(content.config or {}, problems)
        if together is not None:
            extras.append(Extra("", PREFIX, together, "delta"))
        computed.finish(problems)
        if len(extras) > 1:
            cells = [*(path for path, _, _ in tables), *computed.layers]
            problems.add("several prefixes or prompts in one file", ", ".join(cells), "convert them apart")
        problems.raise_any(content.path)
        folded = any(isinstance(extra.value, Compute) for extra in extras) or together is not None
        config = dict(content.config or {})
        warnings = (FOLDED,) if folded else ()
        return Adapter((), tuple(extras), config, (*left_out, *computed.left_out), warnings)

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell a prefix or prompt below the cell that ``facts`` name; a prompt's must be named."""
        require(adapter, self.name, ((PREFIX,), (PROMPT,)))
        extra = _single(adapter)
        prefix = extra.parameter == PREFIX
        stated = facts.get("*", "cell")
        cell = CELL if stated is None and prefix else stated
        if not isinstance(cell, str):
            raise MappingError(
                "where the network has its PromptTuning is not known", where=extra.name,
                hint="pass --cell PATH, such as --cell prompt_tuning; an empty path for the network itself",
            )  # fmt: skip
        dot = f"{cell}." if cell else ""
        name = f"{dot}mindpet_delta_{'ptuning2' if prefix else 'prompttuning'}_embedding.embedding_table"
        return Written(
            [(name, extra.value)], facts=Facts((Fact("*", "cell", cell),)), notes=_build(adapter.config, extra)
        )


def _single(adapter: Adapter) -> Extra:
    found = deltas(adapter)
    if len(found) != 1 or len(found[0].value.shape) != 2:
        raise MappingError(
            "a prefix or prompt is one matrix", where=[f"{e.name}: {list(e.value.shape)}" for e in found],
            hint="convert one at a time",
        )  # fmt: skip
    return found[0]


def _build(config: Json, extra: Extra) -> tuple[str, ...]:
    """Say how to make the cell that loads the file."""
    n, width = extra.value.shape
    if extra.parameter == PROMPT:
        times = config.get("num_transformer_submodules")
        many = int(times) if isinstance(times, int) and times else 1
        return (
            f"build PromptTuning(num_virtual_tokens={n // many}, token_dim={width}, num_transformer_submodules={many})",
        )
    layers, heads = config.get("num_layers"), config.get("num_attention_heads")
    if not (isinstance(layers, int) and isinstance(heads, int) and layers and heads):
        return (f"build PrefixEncoder(pre_seq_len={n}, ...) with layers * 2 * heads * kv_channels = {width}",)
    head = width // (2 * layers * heads)
    text = f"pre_seq_len={n}, num_layers={layers}, num_heads={heads}, kv_channels={head}, prefix_projection=False"
    return (f"build PrefixEncoder({text})",)


def _check_shape(config: Json, kind: str, shape: tuple[int, ...], problems: Problems) -> None:
    tokens, width = config.get("num_virtual_tokens"), config.get("token_dim")
    layers, times = config.get("num_layers"), config.get("num_transformer_submodules") or 1
    whole = isinstance(tokens, int) and isinstance(width, int) and isinstance(layers, int) and isinstance(times, int)
    if len(shape) != 2:
        problems.add(f"{TENSOR} is no matrix", str(list(shape)), "check the file")
    elif (
        whole
        and isinstance(tokens, int)
        and isinstance(width, int)
        and isinstance(layers, int)
        and isinstance(times, int)
    ):
        wanted = [(tokens, layers * 2 * width)] if kind == PREFIX else [(tokens, width), (tokens * times, width)]
        if shape not in wanted:
            said = f"{list(shape)}, and the config says {list(wanted[-1])}"
            problems.add("shape and adapter_config.json contradict each other", said, "check the config")
