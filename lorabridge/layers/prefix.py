"""Prefixes and prompts: MindPet's PrefixLayer, PrefixEncoder (P-Tuning v2) and PromptTuning.

Sources: Li and Liang 2021 (prefix tuning), Liu et al. 2021 (P-Tuning v2), Lester et al. 2021 (prompt tuning); names
and shapes of MindPet 1.0.4. MindPet left PromptTuning out after its guide and its tests had it; here it is again.
"""

from __future__ import annotations

from .binding import Cell, DType, Parameter, Tensor, float16, initializers, int32, int64, nn, ops
from .initial import check_sizes


class PrefixLayer(Cell):
    """Prepend reparametrised keys and values in one attention: MindPet's ``PrefixLayer``, with a ``construct``.

    Parameters: ``input_tokens`` ``[tokens]`` (does not train), ``mindpet_delta_prefixtuning_wte.embedding_table``
    ``[tokens, embed]``, ``mindpet_delta_prefixtuning_control_trans.0`` and ``.2`` (Dense, embed to mid to hidden, tanh
    between). MindPet 1.0.4 computes its two matrices once, when the layer is made, so that they neither train nor
    follow a checkpoint, and its value is its key (both are element [0][0]). Here they are computed in every call.
    ``separate_value=False`` keeps MindPet's shapes, with the value equal to the key; True gives the last Dense
    ``2 * hidden`` rows, the key's before the value's, as the guide means it; such a layer's files are not MindPet's.

    Raises TypeError for sizes that are no integers, ValueError for sizes that are not positive, a ``prefix_token_num``
    that is no multiple of ``batch_size`` and a dropout outside [0, 1).
    """

    def __init__(
        self,
        prefix_token_num: int,
        batch_size: int,
        num_heads: int,
        hidden_dim: int,
        embed_dim: int,
        mid_dim: int = 512,
        dropout_rate: float = 0.1,
        *,
        separate_value: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(
            prefix_token_num=prefix_token_num, batch_size=batch_size, num_heads=num_heads, hidden_dim=hidden_dim,
            embed_dim=embed_dim, mid_dim=mid_dim,
        )  # fmt: skip
        _check_dropout("dropout_rate", dropout_rate)
        if prefix_token_num % batch_size:
            raise ValueError(f"prefix_token_num must be a multiple of batch_size {batch_size}, not {prefix_token_num}")
        self.prefix_token_num, self.batch_size, self.num_heads = prefix_token_num, batch_size, num_heads
        self.hidden_dim, self.embed_dim, self.mid_dim = hidden_dim, embed_dim, mid_dim
        self.dropout_rate, self.separate_value = dropout_rate, separate_value
        self.rows = prefix_token_num // batch_size
        self.dropout = nn.Dropout(p=float(dropout_rate))
        tokens = ops.arange(prefix_token_num).astype(int32)
        self.input_tokens = Parameter(tokens, name="mindpet_delta_prefixtuning_input_tokens", requires_grad=False)
        self.mindpet_delta_prefixtuning_wte = nn.Embedding(prefix_token_num, embed_dim)
        self.mindpet_delta_prefixtuning_control_trans = nn.SequentialCell(
            nn.Dense(embed_dim, mid_dim), nn.Tanh(), nn.Dense(mid_dim, hidden_dim * (2 if separate_value else 1))
        )

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return the prefix's key and value, ``[tokens, hidden]`` each: MindPet's ``past_key_reparam`` and its twin."""
        made = self.mindpet_delta_prefixtuning_wte(self.input_tokens)
        made = self.dropout(self.mindpet_delta_prefixtuning_control_trans(made))
        return made[:, : self.hidden_dim], made[:, -self.hidden_dim :]

    def construct(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return key and value with ``prefix_token_num // batch_size`` rows before those of each sequence.

        ``[batch * length, hidden]`` (the guide's), ``[batch, length, hidden]`` or ``[batch, heads, length, head]``.
        Sequence i gets the i-th share of the prefix. The guide's own ``concat`` along the first axis does this for a
        batch of one, and for larger ones mixes the sequences.
        """
        past_key, past_value = self.matrices()
        return self._prepend(past_key, key), self._prepend(past_value, value)

    def extend_mask(self, attention_mask: Tensor) -> Tensor:
        """Return a mask ``[..., length]`` with ones for the prefix before it."""
        ones = ops.ones((*attention_mask.shape[:-1], self.rows), attention_mask.dtype)
        mask: Tensor = ops.cat((ones, attention_mask), -1)
        return mask

    def _prepend(self, past: Tensor, x: Tensor) -> Tensor:
        past = past.astype(x.dtype).reshape((self.batch_size, self.rows, self.hidden_dim))
        if x.ndim == 4:
            heads = past.reshape((self.batch_size, self.rows, self.num_heads, self.hidden_dim // self.num_heads))
            four: Tensor = ops.cat((ops.transpose(heads, (0, 2, 1, 3)), x), 2)
            return four
        made: Tensor = ops.cat((past, x.reshape((self.batch_size, -1, self.hidden_dim))), 1)
        return made if x.ndim == 3 else made.reshape((-1, self.hidden_dim))


class PrefixEmbedding(Cell):
    """Look rows up in ``embedding_table`` ``[vocab, embedding]``."""

    def __init__(self, vocab_size: int, embedding_size: int) -> None:
        super().__init__()
        values = initializers.initializer("normal", [vocab_size, embedding_size])
        self.embedding_table = Parameter(values, name="embedding_table")
        self.gather = ops.Gather()

    def construct(self, ids: Tensor) -> Tensor:
        """Return the rows of ``ids``, ``[..., embedding]``."""
        rows: Tensor = self.gather(self.embedding_table, ids, 0)
        return rows


class PrefixEncoder(Cell):
    """Give every layer of a network its keys and values: MindPet's ``PrefixEncoder`` (P-Tuning v2).

    Parameters: ``mindpet_delta_ptuning2_prefix`` ``[pre_seq_len]`` (int64, does not train),
    ``mindpet_delta_ptuning2_embedding.embedding_table`` ``[pre_seq_len, layers * 2 * heads * kv_channels]``, and with
    ``prefix_projection`` the Dense layers ``mindpet_delta_ptuning2_trans.0`` and ``.2`` around a tanh.
    Raises TypeError for sizes that are no integers, ValueError for sizes that are not positive and for a dropout
    outside [0, 1).
    """

    def __init__(
        self,
        pre_seq_len: int,
        num_layers: int,
        num_heads: int,
        kv_channels: int,
        prefix_projection: bool,
        projection_dim: int,
        dropout_prob: float,
        *,
        out_perm: tuple[int, ...] = (2, 0, 3, 1, 4),
    ) -> None:
        super().__init__()
        check_sizes(pre_seq_len=pre_seq_len, num_layers=num_layers, num_heads=num_heads, kv_channels=kv_channels)
        _check_dropout("dropout_prob", dropout_prob)
        if prefix_projection:
            check_sizes(projection_dim=projection_dim)
        self.pre_seq_len, self.num_layers, self.num_heads = pre_seq_len, num_layers, num_heads
        self.kv_channels, self.prefix_projection, self.out_perm = kv_channels, bool(prefix_projection), tuple(out_perm)
        width = num_layers * 2 * num_heads * kv_channels
        self.dropout = nn.Dropout(p=float(dropout_prob))
        tokens = ops.arange(pre_seq_len).astype(int64)
        self.mindpet_delta_ptuning2_prefix = Parameter(
            tokens, name="mindpet_delta_ptuning2_prefix", requires_grad=False
        )
        self.mindpet_delta_ptuning2_embedding = PrefixEmbedding(pre_seq_len, width)
        if self.prefix_projection:
            self.mindpet_delta_ptuning2_trans = nn.SequentialCell(
                nn.Dense(width, projection_dim), nn.Tanh(), nn.Dense(projection_dim, width)
            )
        self.split_layers = ops.Split(axis=0, output_num=num_layers)

    def rows(self) -> Tensor:
        """Return what all layers get, ``[pre_seq_len, layers * 2 * heads * kv_channels]``: peft's prompt_embeddings."""
        made: Tensor = self.mindpet_delta_ptuning2_embedding(self.mindpet_delta_ptuning2_prefix)
        if self.prefix_projection:
            made = self.mindpet_delta_ptuning2_trans(made)
        return made

    def construct(self, batch_size: int, dtype: DType = float16) -> tuple[Tensor, ...]:
        """Return per layer ``[2, batch, heads, pre_seq_len, kv_channels]``: its keys, then its values."""
        rows = self.rows().astype(dtype)
        shape = (1, self.pre_seq_len, self.num_layers * 2, self.num_heads, self.kv_channels)
        many = self.dropout(ops.tile(rows.reshape(shape), (batch_size, 1, 1, 1, 1)))
        layers: tuple[Tensor, ...] = self.split_layers(ops.transpose(many, self.out_perm))
        return layers

    def folded(self) -> PrefixEncoder:
        """Return an encoder without projection that computes the same: what peft saves, and what can be converted."""
        plain = PrefixEncoder(
            self.pre_seq_len, self.num_layers, self.num_heads, self.kv_channels, False, 0, float(self.dropout.p),
            out_perm=self.out_perm,
        )  # fmt: skip
        plain.mindpet_delta_ptuning2_embedding.embedding_table.set_data(self.rows())
        return plain


class PromptTuning(Cell):
    """Hold virtual tokens: MindPet's ``PromptTuning``, ids ``[batch, n]`` to embeddings ``[batch, n, token_dim]``.

    Parameter: ``mindpet_delta_prompttuning_embedding.embedding_table``
    ``[num_virtual_tokens * num_transformer_submodules, token_dim]``. Raises TypeError for sizes that are no integers,
    ValueError for sizes that are not positive.
    """

    def __init__(self, num_virtual_tokens: int, token_dim: int, num_transformer_submodules: int = 1) -> None:
        super().__init__()
        check_sizes(
            num_virtual_tokens=num_virtual_tokens, token_dim=token_dim,
            num_transformer_submodules=num_transformer_submodules,
        )  # fmt: skip
        self.num_virtual_tokens, self.token_dim = num_virtual_tokens, token_dim
        self.num_transformer_submodules = num_transformer_submodules
        self.total_virtual_tokens = num_virtual_tokens * num_transformer_submodules
        self.mindpet_delta_prompttuning_embedding = nn.Embedding(self.total_virtual_tokens, token_dim)

    def construct(self, indices: Tensor) -> Tensor:
        """Return the embeddings of the virtual tokens ``indices``."""
        found: Tensor = self.mindpet_delta_prompttuning_embedding(indices)
        return found

    def prepend(self, embeddings: Tensor) -> Tensor:
        """Return ``[batch, length, token_dim]`` with the prompt before it, cut to its length: what the guide does."""
        table = self.mindpet_delta_prompttuning_embedding.embedding_table
        prompt = table[: self.num_virtual_tokens].astype(embeddings.dtype)
        many = ops.tile(prompt.reshape((1, *prompt.shape)), (embeddings.shape[0], 1, 1))
        joined: Tensor = ops.cat((many, embeddings), 1)
        return joined[:, : embeddings.shape[1]]


def _check_dropout(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, not {value}")
