"""Which class of transformers a model is run as, and the tokens that it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..dialects.adapter import Adapter, Json
from ..errors import MappingError
from .verify_torch import Batch

MODELS = ("gpt2", "bert", "llama", "qwen2")
TASKS = {
    ("gpt2", "CAUSAL_LM"): "GPT2LMHeadModel",
    ("llama", "CAUSAL_LM"): "LlamaForCausalLM",
    ("qwen2", "CAUSAL_LM"): "Qwen2ForCausalLM",
    ("bert", "TOKEN_CLS"): "BertForTokenClassification",
    ("bert", "SEQ_CLS"): "BertForSequenceClassification",
    ("bert", "QUESTION_ANS"): "BertForQuestionAnswering",
    ("gpt2", "FEATURE_EXTRACTION"): "GPT2Model",
    ("bert", "FEATURE_EXTRACTION"): "BertModel",
    ("llama", "FEATURE_EXTRACTION"): "LlamaModel",
    ("qwen2", "FEATURE_EXTRACTION"): "Qwen2Model",
}
"""peft's task types, and the class whose head an adapter of that task is trained with."""

CLASSES = (*dict.fromkeys(TASKS.values()), "BertForMaskedLM")
"""The classes that have a reference network in MindSpore."""

HEADS = ("classifier.weight", "qa_outputs.weight")
LONGEST = 48
"""Tokens of the longest sequence that is tried."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A class of transformers; ``labels``: how many the adapter's own head has, 0 where the config says it.

    ``layout``: the choices that the reference network of the family follows in its table.
    """

    name: str
    labels: int
    layout: Mapping[str, str]

    def adjusted(self, config: Json) -> Json:
        """Return a config with the labels of the adapter's head."""
        named = config.get("id2label")
        if not self.labels or (isinstance(named, dict) and len(named) == self.labels):
            return config
        names = {str(i): f"LABEL_{i}" for i in range(self.labels)}
        rest = {key: value for key, value in config.items() if key not in ("num_labels", "id2label", "label2id")}
        return {**rest, "id2label": dict(names), "label2id": {name: int(key) for key, name in names.items()}}


def architecture(config: Json, adapters: Sequence[Adapter]) -> Architecture:
    """Choose the class: that of the adapter's task, else the one that config.json names.

    Raises MappingError for a model type without a reference network, a task that none of its classes does, and a
    config that names no class.
    """
    kind = config.get("model_type")
    if kind not in MODELS:
        raise MappingError(
            f"there is no reference network for the model type {kind!r}", where=f"there are {', '.join(MODELS)}"
        )
    tasks = {str(adapter.config["task_type"]) for adapter in adapters if adapter.config.get("task_type")}
    labels = max((_labels(adapter) for adapter in adapters), default=0)
    layout = {"qkv_concat": "off", "mlm_head": "cell"}
    if config.get("tie_word_embeddings") is True:
        layout["head"] = "tied"
    if len(tasks) == 1:
        task = tasks.pop()
        if (kind, task) not in TASKS:
            raise MappingError(f"there is no reference network for the task {task} of the model type {kind}")
        return Architecture(TASKS[str(kind), task], labels, layout)
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1:
        raise MappingError("the config.json names no class", where=f"architectures: {named!r}")
    if named[0] not in CLASSES:
        raise MappingError(f"there is no reference network for the class {str(named[0])[:80]!r}")
    return Architecture(str(named[0]), labels, layout)


def _labels(adapter: Adapter) -> int:
    return max((extra.value.shape[0] for extra in adapter.extras if extra.name.endswith(HEADS)), default=0)


def batches(config: Json, seed: int) -> tuple[Batch, ...]:
    """Return random tokens: a padded batch of four lengths, a long sequence without a mask, and a single token.

    The padded batch has a whole sequence, one padded at the end, one padded at the start, and one of two tokens.
    BERT gets random token types too.
    """
    vocabulary, kinds = int(str(config["vocab_size"])), int(str(config.get("type_vocab_size") or 1))
    limit = next(
        (int(str(config[key])) for key in ("n_positions", "max_position_embeddings") if key in config), LONGEST
    )
    random = np.random.default_rng(seed)
    time, long = min(limit, 24), min(limit, LONGEST)

    def made(count: int, length: int, mask: np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None) -> Batch:
        ids = random.integers(0, vocabulary, (count, length))
        types = random.integers(0, kinds, (count, length)) if config.get("model_type") == "bert" else None
        return Batch(ids, mask, types)

    mask = np.ones((4, time), np.int64)
    mask[1, -(time // 3) :] = 0
    mask[2, : time // 4] = 0
    mask[3, 2:] = 0
    return made(4, time, mask), made(1, long, None), made(1, 1, None)
