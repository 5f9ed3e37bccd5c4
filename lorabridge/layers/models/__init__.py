"""Reference networks: GPT-2, BERT and Llama/Qwen2 shapes as plain MindSpore cells with MindFormers' parameter names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ...errors import MappingError, UsageError
from ..binding import Cell, DType, float32, must_upcast
from . import bert, gpt2, llama
from .settings import Fields

__all__ = ["build"]

FAMILIES: Mapping[str, Callable[[Fields, DType], Cell]] = {
    "bert": bert.network,
    "gpt2": gpt2.network,
    "llama": llama.network,
    "qwen2": llama.network,
}


def build(config: Mapping[str, object], *, architecture: str = "", dtype: DType = float32) -> Cell:
    """Build the network that a Hugging Face config.json describes, for inference: without dropout, weights zero.

    ``config``: the content of config.json, of transformers 4 or 5. ``architecture``: the class, where ``architectures``
    does not say it. ``dtype``: float32 or float16, of the parameters and of the computation (softmax and RMS norms in
    float32). The parameters are those that the family table of the same name writes, no more and no fewer.

    The cell takes ``(input_ids, attention_mask=None, ...)``, integers ``[batch, time]``, mask 1 or 0, and returns the
    logits; a class without a head returns its hidden states, BertModel those and the pooled output. Raises
    MappingError listing every field of the config that the network does not follow, UsageError for a dtype that the
    device does not compute.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise MappingError(
            "there is no reference network for this model",
            where=f"model_type: {kind!r}",
            hint=f"there are networks for {', '.join(FAMILIES)}",
        )
    if must_upcast(dtype):
        raise UsageError(
            f"this device does not compute in {dtype}", hint="build the network in float32, which holds such weights"
        )
    return FAMILIES[str(kind)](Fields(config, architecture), dtype).set_train(False)
