"""BERT (Devlin et al. 2019) with the parameter names of MindFormers 0.3 ... 1.5; see mappings/bert.toml."""

from __future__ import annotations

from dataclasses import dataclass

from ..binding import Cell, DType, Tensor, nn, ops
from ..initial import zeros
from .blocks import Attention, FeedForward
from .parts import (
    ACTIVATIONS,
    activate,
    dense,
    embedding,
    layer_norm,
    positions_of,
    require_length,
    table,
    tanh,
    visible,
)
from .settings import Fields

ARCHITECTURES = ("BertModel", "BertForTokenClassification", "BertForSequenceClassification", "BertForQuestionAnswering",
                 "BertForMaskedLM")  # fmt: skip
POOLED = ("BertModel", "BertForSequenceClassification")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a BERT config says."""

    vocab: int
    positions: int
    types: int
    hidden: int
    inner: int
    layers: int
    heads: int
    epsilon: float
    activation: str
    labels: int


def network(fields: Fields, dtype: DType) -> Cell:
    """Build one of the ARCHITECTURES; the defaults are those of transformers' BertConfig.

    The layout of the masked-LM head is the table's ``mlm_head=cell``.
    """
    architecture = fields.architecture(ARCHITECTURES)
    shape = Shape(
        vocab=fields.integer("vocab_size"),
        positions=fields.integer("max_position_embeddings"),
        types=fields.integer("type_vocab_size", 2),
        hidden=fields.integer("hidden_size"),
        inner=fields.integer("intermediate_size"),
        layers=fields.integer("num_hidden_layers"),
        heads=fields.integer("num_attention_heads"),
        epsilon=fields.number("layer_norm_eps", 1e-12),
        activation=fields.choice("hidden_act", "gelu", ACTIVATIONS),
        labels=fields.labels(),
    )
    fields.divides(shape.hidden, shape.heads, "num_attention_heads")
    fields.only("position_embedding_type", "absolute")
    if architecture == "BertForMaskedLM":
        fields.only("tie_word_embeddings", True)
    fields.inert("tie_word_embeddings", "pad_token_id", "attention_probs_dropout_prob", "hidden_dropout_prob",
                 "classifier_dropout", "directionality", "pooler_fc_size", "pooler_num_attention_heads",
                 "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type")  # fmt: skip
    fields.finish()
    base = Bert(shape, architecture in POOLED, dtype)
    if architecture == "BertModel":
        return Network(base)
    if architecture == "BertForMaskedLM":
        return MaskedLM(base, shape, dtype)
    if architecture == "BertForQuestionAnswering":
        return QuestionAnswering(base, shape, dtype)
    return Classifier(base, shape, architecture == "BertForSequenceClassification", dtype)


class Network(Cell):
    """BERT without a head."""

    def __init__(self, base: Bert) -> None:
        super().__init__()
        self.bert = base

    def construct(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return hidden states ``[batch, time, hidden]`` and the pooled output ``[batch, hidden]``."""
        x = self.bert.hidden(input_ids, attention_mask, token_type_ids, position_ids)
        return x, self.bert.pool(x)


class Classifier(Cell):
    """A linear classifier of the tokens, or of the pooled output."""

    def __init__(self, base: Bert, shape: Shape, pooled: bool, dtype: DType) -> None:
        super().__init__()
        self.pooled = pooled
        self.bert = base
        self.classifier = dense(shape.hidden, shape.labels, dtype)

    def construct(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return logits ``[batch, time, labels]``, or ``[batch, labels]`` of the pooled output."""
        x = self.bert.hidden(input_ids, attention_mask, token_type_ids, position_ids)
        return self.classifier(self.bert.pool(x) if self.pooled else x)


class QuestionAnswering(Cell):
    """Start and end of an answer."""

    def __init__(self, base: Bert, shape: Shape, dtype: DType) -> None:
        super().__init__()
        self.bert = base
        self.qa_outputs = dense(shape.hidden, shape.labels, dtype)

    def construct(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return ``[batch, time, labels]``; transformers gives the two columns apart."""
        return self.qa_outputs(self.bert.hidden(input_ids, attention_mask, token_type_ids, position_ids))


class MaskedLM(Cell):
    """The masked-LM head, which multiplies with the embedding table."""

    def __init__(self, base: Bert, shape: Shape, dtype: DType) -> None:
        super().__init__()
        self.bert = base
        self.mlmloss = Predictions(shape, dtype)

    def construct(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return logits ``[batch, time, vocab]``."""
        x = self.bert.hidden(input_ids, attention_mask, token_type_ids, position_ids)
        return self.mlmloss(x, table(self.bert.word_embedding))


class Predictions(Cell):
    """Transform hidden states and compare them with every word."""

    def __init__(self, shape: Shape, dtype: DType) -> None:
        super().__init__()
        self.activation = shape.activation
        self.dense = dense(shape.hidden, shape.hidden, dtype)
        self.layernorm = layer_norm(shape.hidden, shape.epsilon, dtype)
        self.output_bias = zeros("output_bias", (shape.vocab,), dtype)

    def construct(self, x: Tensor, table: Tensor) -> Tensor:
        """Return ``[batch, time, vocab]``."""
        x = self.layernorm(activate(self.dense(x), self.activation))
        y: Tensor = ops.matmul(x, table.T) + self.output_bias
        return y


class Bert(Cell):
    """Embeddings, encoder and, for the classes that have it, the pooler ``dense``."""

    def __init__(self, shape: Shape, pooled: bool, dtype: DType) -> None:
        super().__init__()
        self.positions = shape.positions
        self.word_embedding = embedding(shape.vocab, shape.hidden, dtype)
        self.embedding_postprocessor = Postprocessor(shape, dtype)
        self.bert_encoder = Wrapped(shape, dtype)
        if pooled:
            self.dense = dense(shape.hidden, shape.hidden, dtype)

    def hidden(
        self, ids: Tensor, attention_mask: Tensor | None, types: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        """Return hidden states ``[batch, time, hidden]``; without ``types`` all are 0."""
        require_length(ids, self.positions, "max_position_embeddings")
        seen = visible(ids, attention_mask, False)
        kinds = ops.zeros_like(ids) if types is None else types
        x = self.embedding_postprocessor(self.word_embedding(ids), kinds, positions_of(ids, positions))
        return self.bert_encoder(x, seen)

    def pool(self, x: Tensor) -> Tensor:
        """Return the pooled output ``[batch, hidden]``: the first token's."""
        return tanh(self.dense(x[:, 0]))


class Postprocessor(Cell):
    """Add types and positions to the words."""

    def __init__(self, shape: Shape, dtype: DType) -> None:
        super().__init__()
        self.token_type_embedding = embedding(shape.types, shape.hidden, dtype)
        self.full_position_embedding = embedding(shape.positions, shape.hidden, dtype)
        self.layernorm = layer_norm(shape.hidden, shape.epsilon, dtype)

    def construct(self, words: Tensor, types: Tensor, positions: Tensor) -> Tensor:
        """Return ``[batch, time, hidden]``."""
        return self.layernorm(words + self.token_type_embedding(types) + self.full_position_embedding(positions))


class Wrapped(Cell):
    """The encoder's outer name."""

    def __init__(self, shape: Shape, dtype: DType) -> None:
        super().__init__()
        self.encoder = Encoder(shape, dtype)

    def construct(self, x: Tensor, seen: Tensor) -> Tensor:
        """Return the encoder's output."""
        return self.encoder(x, seen)


class Encoder(Cell):
    """All blocks."""

    def __init__(self, shape: Shape, dtype: DType) -> None:
        super().__init__()
        self.blocks = nn.CellList([Block(shape, dtype) for _ in range(shape.layers)])

    def construct(self, x: Tensor, seen: Tensor) -> Tensor:
        """Return the last block's output."""
        for block in self.blocks:
            x = block(x, seen)
        return x


class Block(Cell):
    """A post-layernorm block: ``layernorm2`` follows the attention, ``layernorm1`` the feed-forward."""

    def __init__(self, shape: Shape, dtype: DType) -> None:
        super().__init__()
        self.layernorm1 = layer_norm(shape.hidden, shape.epsilon, dtype)
        self.layernorm2 = layer_norm(shape.hidden, shape.epsilon, dtype)
        self.attention = Attention(shape.hidden, shape.heads, (shape.hidden // shape.heads) ** -0.5, dtype)
        self.output = FeedForward(shape.hidden, shape.inner, shape.activation, dtype)

    def construct(self, x: Tensor, seen: Tensor) -> Tensor:
        """Return the block's output."""
        x = self.layernorm2(x + self.attention(x, seen))
        return self.layernorm1(x + self.output(x))
