"""GPT-2 (Radford et al. 2019) with the parameter names of MindFormers 0.3 ... 1.5; see mappings/gpt2.toml."""

from __future__ import annotations

from dataclasses import dataclass

from ..binding import Cell, DType, Tensor, nn, ops
from .blocks import Attention, FeedForward
from .parts import ACTIVATIONS, embedding, layer_norm, positions_of, require_length, table, visible
from .settings import Fields

ARCHITECTURES = ("GPT2LMHeadModel", "GPT2Model")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a GPT-2 config says."""

    vocab: int
    positions: int
    hidden: int
    inner: int
    layers: int
    heads: int
    epsilon: float
    activation: str
    scaled: bool
    scaled_by_layer: bool


def network(fields: Fields, dtype: DType) -> Cell:
    """Build GPT2LMHeadModel or GPT2Model; the defaults are those of transformers' GPT2Config."""
    architecture = fields.architecture(ARCHITECTURES)
    hidden = fields.integer("n_embd")
    shape = Shape(
        vocab=fields.integer("vocab_size"),
        positions=fields.integer("n_positions"),
        hidden=hidden,
        inner=fields.integer("n_inner", 4 * hidden),
        layers=fields.integer("n_layer"),
        heads=fields.integer("n_head"),
        epsilon=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.choice("activation_function", "gelu_new", ACTIVATIONS),
        scaled=fields.flag("scale_attn_weights", True),
        scaled_by_layer=fields.flag("scale_attn_by_inverse_layer_idx", False),
    )
    fields.divides(hidden, shape.heads, "n_head")
    fields.only("reorder_and_upcast_attn", False)
    head = architecture == "GPT2LMHeadModel"
    if head:
        fields.only("tie_word_embeddings", True)
    fields.inert("tie_word_embeddings", "resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx", "pad_token_id", "id2label",
                 "num_labels", "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels",
                 "summary_first_dropout")  # fmt: skip
    fields.finish()
    return Network(shape, head, dtype)


class Network(Cell):
    """GPT-2 with or without the head, which multiplies with the embedding table."""

    def __init__(self, shape: Shape, head: bool, dtype: DType) -> None:
        super().__init__()
        self.head, self.positions = head, shape.positions
        self.backbone = Backbone(shape, dtype)

    def construct(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Return logits ``[batch, time, vocab]``; without the head, hidden states."""
        require_length(input_ids, self.positions, "n_positions")
        seen = visible(input_ids, attention_mask, True)
        x = self.backbone(input_ids, positions_of(input_ids, position_ids), seen)
        return ops.matmul(x, table(self.backbone.embedding.word_embedding).T) if self.head else x


class Backbone(Cell):
    """The transformer without a head."""

    def __init__(self, shape: Shape, dtype: DType) -> None:
        super().__init__()
        self.embedding = Embedding(shape, dtype)
        self.blocks = nn.CellList([Block(shape, i, dtype) for i in range(shape.layers)])
        self.layernorm = layer_norm(shape.hidden, shape.epsilon, dtype)

    def construct(self, ids: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """Return hidden states ``[batch, time, hidden]``."""
        x = self.embedding(ids, positions)
        for block in self.blocks:
            x = block(x, seen)
        return self.layernorm(x)


class Embedding(Cell):
    """Word and position embeddings."""

    def __init__(self, shape: Shape, dtype: DType) -> None:
        super().__init__()
        self.word_embedding = embedding(shape.vocab, shape.hidden, dtype)
        self.position_embedding = embedding(shape.positions, shape.hidden, dtype)

    def construct(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return their sum."""
        return self.word_embedding(ids) + self.position_embedding(positions)


class Block(Cell):
    """A pre-layernorm transformer block."""

    def __init__(self, shape: Shape, index: int, dtype: DType) -> None:
        super().__init__()
        scale = (shape.hidden // shape.heads) ** -0.5 if shape.scaled else 1.0
        self.layernorm1 = layer_norm(shape.hidden, shape.epsilon, dtype)
        self.layernorm2 = layer_norm(shape.hidden, shape.epsilon, dtype)
        self.attention = Attention(
            shape.hidden, shape.heads, scale / (index + 1) if shape.scaled_by_layer else scale, dtype
        )
        self.output = FeedForward(shape.hidden, shape.inner, shape.activation, dtype)

    def construct(self, x: Tensor, seen: Tensor) -> Tensor:
        """Return the block's output."""
        x = x + self.attention(self.layernorm1(x), seen)
        return x + self.output(self.layernorm2(x))
