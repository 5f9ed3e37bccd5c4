"""Strategies made from sizes: tensor parallel, pipeline stages and optimizer shards for models of known names.

Rules: mindformers 2.1.0 (models/llama, parallel_core/training_graph) and Megatron-LM cut a column-parallel weight by
its output axis, a row-parallel one by its input axis, embeddings and heads by the vocabulary, and keep norms whole.
LoRA factors follow the base weight: ``A[rank, in]`` is cut where the weight's input is, ``B[out, rank]`` where its
output is. A stage holds consecutive layers; the embedding lies on the first, what follows the layers on the last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import MappingError, UsageError
from ..tensors import TensorSpec
from .layout import ALL, Layout

COLUMN = (
    "wq", "wk", "wv", "w1", "w3", "w_qkv", "w_gate_hidden", "wq_b", "linear_qkv", "linear_q", "linear_k", "linear_v",
    "linear_q_up_proj", "linear_kv_up_proj", "linear_fc1", "q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj",
    "up_proj", "gate_up_proj", "query_key_value", "dense_h_to_4h", "dense1", "dense2", "dense3",
)  # fmt: skip
UNFUSED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("wo", "w2", "linear_proj", "linear_fc2", "o_proj", "down_proj", "dense_4h_to_h")
VOCABULARY = ("tok_embeddings", "word_embeddings", "embed_tokens", "lm_head", "output_layer")
WHOLE = re.compile(r"norm|layernorm|ln_\d|ln_f|rope|inv_freq|router|\bgate\b")
_LORA = re.compile(r"(?P<module>.+)\.(?:(?:mindpet|tk)_delta_)?lora_(?P<factor>[abAB])(?:\.(?:default\.)?weight)?$")
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
_STATE = re.compile(r"^(?:adam_[mv]|moments?[12]?|accu_grads)\.")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Degrees of parallelism. ``replicas``: data parallel copies; ``optimizer``: parts that they share."""

    tensor: int = 1
    stages: int = 1
    optimizer: int = 1
    replicas: int = 0

    @property
    def copies(self) -> int:
        """Data parallel size: as told, else as many as the optimizer shards need."""
        return self.replicas or self.optimizer


def strategies(
    specs: Mapping[str, TensorSpec],
    sizes: Sizes,
    cuts: Sequence[tuple[str, int | None]] = (),
    known: Mapping[str, Layout] | None = None,
) -> dict[int, dict[str, Layout]]:
    """Return the layouts of every stage for the given tensors.

    ``cuts``: (regular expression of a name, axis or None for whole), which outrank all else; the first that is found
    in a name counts. ``known``: how tensors were cut so far, whose axis is kept. A vector follows the output axis of
    its module. Tensors of one element are left to every rank. MappingError lists names that no rule knows, axes that
    do not divide, and layers that do not divide into stages.
    """
    if min(sizes.tensor, sizes.stages, sizes.optimizer, sizes.copies) < 1 or sizes.copies % sizes.optimizer:
        raise UsageError(
            f"{sizes.optimizer} optimizer shards do not divide {sizes.copies} replicas",
            hint="give positive sizes, and replicas that are a multiple of the optimizer shards",
        )
    count = 1 + max((int(m[1]) for name in specs if (m := _LAYER.search(name))), default=-1)
    problems: list[str] = []
    if sizes.stages > 1 and (not count or count % sizes.stages):
        problems.append(f"{count} layers do not divide into {sizes.stages} stages")
    found: dict[int, dict[str, Layout]] = {stage: {} for stage in range(sizes.stages)}
    for name, spec in specs.items():
        if spec.size == 1:
            continue
        try:
            layout = _layout(name, spec, sizes, cuts, (known or {}).get(name))
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        found[_stage(name, sizes.stages, count)][name] = layout
    if problems:
        raise MappingError(
            "the sizes do not fit the tensors",
            where=problems,
            hint="choose other sizes, or say how a tensor is cut: --cut 'NAME=AXIS', --cut 'NAME=whole'",
        )
    return found


def _layout(
    name: str, spec: TensorSpec, sizes: Sizes, cuts: Sequence[tuple[str, int | None]], known: Layout | None
) -> Layout:
    axis = _axis(_STATE.sub("", name), len(spec.shape), cuts, known) if sizes.tensor > 1 else None
    grid = (sizes.copies, sizes.tensor)
    if axis is not None and axis >= len(spec.shape):
        raise ValueError(f"it has no axis {axis}")
    held = tuple((1,) if i == axis else () for i in range(len(spec.shape)))
    for optimizer in dict.fromkeys((0 if sizes.optimizer == 1 else sizes.optimizer, 0)):
        layout = Layout(grid, held, ALL if 1 < optimizer == sizes.copies else optimizer, spec.shape)
        if layout.local_shape(spec.shape) is not None:
            return layout  # MindSpore too leaves a tensor whole for the optimizer where its rows do not divide
    raise ValueError(f"axis {axis} of {list(spec.shape)} does not divide by {sizes.tensor}")


def _axis(name: str, rank: int, cuts: Sequence[tuple[str, int | None]], known: Layout | None) -> int | None:
    """Return the axis that tensor parallelism cuts, or None for a tensor that is whole on every rank."""
    for pattern, axis in cuts:
        if re.search(pattern, name):
            return axis
    cut_so_far = [axis for axis, held in enumerate(known.cuts) if held] if known else []
    if len(cut_so_far) == 1:
        return cut_so_far[0]
    match = _LORA.fullmatch(name)
    if match is not None:
        role = _role(match["module"])
        if role == "column":
            return 0 if match["factor"] in "bB" else None
        if role == "row":
            return None if match["factor"] in "bB" else 1
        raise ValueError("no rule says how its module is cut")
    module, _, parameter = name.rpartition(".")
    role = _role(module)
    if role == "vocabulary":
        return 0
    if role == "column":
        return 0
    if role == "row":
        return 1 if rank > 1 else None
    if WHOLE.search(name) or (rank == 1 and parameter in ("gamma", "beta")):
        return None
    raise ValueError("no rule says how it is cut")


def module_axis(name: str, axes: int) -> int | None:
    """Return the axis that tensor parallelism cuts of a Hugging Face layer that fuses nothing; None: it is whole.

    ValueError for other names: what is fused is cut in one way by one project and in another by the next, and so are
    embeddings and heads.
    """
    module, _, parameter = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    if leaf in UNFUSED:
        return 0
    if leaf in ("o_proj", "down_proj"):
        return 1 if axes > 1 else None
    if WHOLE.search(name) or (axes == 1 and parameter in ("gamma", "beta")):
        return None
    raise ValueError("no rule says how tensor parallelism cut it")


def _role(module: str) -> str:
    leaf = module.rpartition(".")[2]
    for role, names in (("column", COLUMN), ("row", ROW), ("vocabulary", VOCABULARY)):
        if leaf in names:
            return role
    return ""


def _stage(name: str, stages: int, count: int) -> int:
    match = _LAYER.search(name)
    if match is not None:
        return int(match[1]) * stages // count
    first = any(word in name for word in ("embed", "wte", "wpe"))
    return 0 if first else stages - 1
