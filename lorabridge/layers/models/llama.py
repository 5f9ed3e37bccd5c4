"""Llama (Touvron et al. 2023) and Qwen2 with the names of MindFormers' Llama cells; see mappings/llama.toml."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .. import binding as ms
from ..binding import Cell, DType, Tensor, float32, nn, ops
from ..initial import zeros
from .parts import ACTIVATIONS, activate, attend, dense, positions_of, require_length, split_heads, table, visible
from .settings import Fields

ARCHITECTURES = {"llama": ("LlamaForCausalLM", "LlamaModel"), "qwen2": ("Qwen2ForCausalLM", "Qwen2Model")}


@dataclass(frozen=True, slots=True)
class Shape:
    """What a Llama or Qwen2 config says. ``qkv_bias``: query, key and value have biases."""

    vocab: int
    positions: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    epsilon: float
    theta: float
    activation: str
    qkv_bias: bool


def network(fields: Fields, dtype: DType) -> Cell:
    """Build the causal LM or the bare model; the defaults are those of LlamaConfig and Qwen2Config."""
    architecture = fields.architecture(ARCHITECTURES[fields.model_type])
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    shape = Shape(
        vocab=fields.integer("vocab_size"),
        positions=fields.integer("max_position_embeddings"),
        hidden=hidden,
        inner=fields.integer("intermediate_size"),
        layers=fields.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head=fields.integer("head_dim", max(1, hidden // heads)),
        epsilon=fields.number("rms_norm_eps", 1e-6),
        theta=_theta(fields),
        activation=fields.choice("hidden_act", "silu", ACTIVATIONS),
        qkv_bias=fields.model_type == "qwen2",
    )
    if fields.config.get("head_dim") is None:
        fields.divides(hidden, heads, "num_attention_heads")
    fields.divides(heads, shape.kv_heads, "num_key_value_heads")
    fields.divides(shape.head, 2, "head_dim")
    _unsupported(fields)
    tied = fields.flag("tie_word_embeddings", False)
    fields.finish()
    return Network(shape, architecture.endswith("ForCausalLM"), tied, dtype)


def _theta(fields: Fields) -> float:
    """Return RoPE's base: ``rope_theta`` (transformers 4), or that in ``rope_parameters`` (transformers 5)."""
    given = fields.nested("rope_parameters")
    old = fields.nested("rope_scaling")
    for rope in (given, old):
        rope.choice("rope_type", "default", ("default",))
        rope.choice("type", "default", ("default",))
        rope.only("partial_rotary_factor", 1, 1.0)
    top = fields.number("rope_theta", 10000.0)
    theta = given.number("rope_theta", top)
    if "rope_theta" in fields.config and theta != top:
        fields.problems.append(f"rope_theta: is {top:g}, but rope_parameters has {theta:g}")
    fields.merge(given, old)
    return theta


def _unsupported(fields: Fields) -> None:
    """Refuse what MindFormers' cells do not have, or the network does not compute."""
    fields.only("partial_rotary_factor", 1, 1.0)
    fields.only("attention_bias", False)
    fields.only("mlp_bias", False)
    fields.only("use_sliding_window", False)
    fields.only("use_mrope", False)
    kinds = fields.config.get("layer_types")
    fields.inert("layer_types", "sliding_window", "max_window_layers", "attention_dropout", "pad_token_id", "id2label",
                 "num_labels")  # fmt: skip
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        fields.problems.append("layer_types: every layer must be 'full_attention'")
    if fields.model_type == "llama" and fields.config.get("sliding_window") is not None:
        fields.problems.append("sliding_window: must be null for llama")


class Network(Cell):
    """A Llama with its own head, with the embedding as head, or without."""

    def __init__(self, shape: Shape, head: bool, tied: bool, dtype: DType) -> None:
        super().__init__()
        self.positions, self.head, self.tied = shape.positions, head, tied
        self.model = Model(shape, dtype)
        if head and not tied:
            self.lm_head = dense(shape.hidden, shape.vocab, dtype, bias=False)

    def construct(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return logits ``[batch, time, vocab]``; without a head, hidden states."""
        require_length(input_ids, self.positions, "max_position_embeddings")
        seen = visible(input_ids, attention_mask, True)
        x = self.model(input_ids, positions_of(input_ids, position_ids), seen)
        if not self.head:
            return x
        if not self.tied:
            return self.lm_head(x)
        y: Tensor = ops.matmul(x, table(self.model.tok_embeddings, "embedding_weight").T)
        return y


class Model(Cell):
    """The transformer without a head."""

    def __init__(self, shape: Shape, dtype: DType) -> None:
        super().__init__()
        self.tok_embeddings: Cell = TokenEmbedding(shape.vocab, shape.hidden, dtype)
        self.layers = nn.CellList([Layer(shape, dtype) for _ in range(shape.layers)])
        self.norm_out = RMSNorm(shape.hidden, shape.epsilon, dtype)
        self.dtype = dtype
        # Rounded from float64; torch computes the power in float32, at most one unit in the last place beside.
        powers = np.arange(0, shape.head, 2, dtype=np.float64) / shape.head
        self.frequencies = ms.Tensor((1.0 / shape.theta**powers).astype(np.float32))  # type: ignore[call-arg]

    def construct(self, ids: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """Return hidden states ``[batch, time, hidden]``."""
        x = self.tok_embeddings(ids)
        turns = ops.expand_dims(positions.astype(float32), -1) * self.frequencies
        turns = ops.expand_dims(ops.concat((turns, turns), -1), 1)
        cos, sin = ops.cos(turns).astype(self.dtype), ops.sin(turns).astype(self.dtype)
        for layer in self.layers:
            x = layer(x, seen, cos, sin)
        return self.norm_out(x)


class TokenEmbedding(Cell):
    """Word embeddings under MindFormers' name ``embedding_weight``, ``[vocab, hidden]``."""

    def __init__(self, vocab_size: int, embedding_size: int, dtype: DType) -> None:
        super().__init__()
        self.vocab_size, self.embedding_size = vocab_size, embedding_size
        self.embedding_weight = zeros("embedding_weight", (vocab_size, embedding_size), dtype)

    def construct(self, ids: Tensor) -> Tensor:
        """Return ``[batch, time, hidden]``."""
        y: Tensor = ops.gather(self.embedding_weight, ids, 0)
        return y


class RMSNorm(Cell):
    """Divide by the root mean square over the last axis (Zhang and Sennrich 2019), taken in float32."""

    def __init__(self, width: int, epsilon: float, dtype: DType) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = zeros("weight", (width,), dtype)

    def construct(self, x: Tensor) -> Tensor:
        """Return x in its own shape and type."""
        wide = x.astype(float32)
        square = ops.mean(wide * wide, -1, True)
        y: Tensor = self.weight * (wide * ops.rsqrt(square + self.epsilon)).astype(x.dtype)
        return y


class Layer(Cell):
    """A pre-norm block."""

    def __init__(self, shape: Shape, dtype: DType) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(shape.hidden, shape.epsilon, dtype)
        self.ffn_norm = RMSNorm(shape.hidden, shape.epsilon, dtype)
        self.attention = Attention(shape, dtype)
        self.feed_forward = FeedForward(shape, dtype)

    def construct(self, x: Tensor, seen: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the block's output."""
        x = x + self.attention(self.attention_norm(x), seen, cos, sin)
        return x + self.feed_forward(self.ffn_norm(x))


class Attention(Cell):
    """Grouped-query attention with rotary positions (Su et al. 2021), the halves of a head turned together."""

    def __init__(self, shape: Shape, dtype: DType) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.scale = shape.heads, shape.kv_heads, shape.head**-0.5
        self.wq = dense(shape.hidden, shape.heads * shape.head, dtype, shape.qkv_bias)
        self.wk = dense(shape.hidden, shape.kv_heads * shape.head, dtype, shape.qkv_bias)
        self.wv = dense(shape.hidden, shape.kv_heads * shape.head, dtype, shape.qkv_bias)
        self.wo = dense(shape.heads * shape.head, shape.hidden, dtype, bias=False)

    def construct(self, x: Tensor, seen: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return ``[batch, time, hidden]``."""
        query = turned(split_heads(self.wq(x), self.heads), cos, sin)
        key = turned(split_heads(self.wk(x), self.kv_heads), cos, sin)
        value = split_heads(self.wv(x), self.kv_heads)
        return self.wo(attend(query, key, value, seen, self.scale))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head / 2) of the last axis by the angles."""
    first, second = ops.chunk(x, 2, -1)
    y: Tensor = x * cos + ops.concat((-second, first), -1) * sin
    return y


class FeedForward(Cell):
    """SwiGLU (Shazeer 2020): ``w2(act(w1(x)) * w3(x))``; w1 is the gate, w3 up, w2 down."""

    def __init__(self, shape: Shape, dtype: DType) -> None:
        super().__init__()
        self.activation = shape.activation
        self.w1 = dense(shape.hidden, shape.inner, dtype, bias=False)
        self.w2 = dense(shape.inner, shape.hidden, dtype, bias=False)
        self.w3 = dense(shape.hidden, shape.inner, dtype, bias=False)

    def construct(self, x: Tensor) -> Tensor:
        """Return ``[batch, time, hidden]``."""
        return self.w2(activate(self.w1(x), self.activation) * self.w3(x))
