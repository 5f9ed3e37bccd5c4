"""Embeddings with LoRA: loralib's Embedding."""

from __future__ import annotations

import math

from .binding import Cell, DType, Tensor, bfloat16, float32, lift, must_upcast, ops, wide
from .initial import check_kind, check_lora, check_sizes, normal, zeros
from .state import Merging, norm_beside


class Embedding(Merging, Cell):
    """Adapt an embedding: loralib 0.1.2's ``Embedding``, ``y = table[ids] + scaling * (A^T)[ids] B^T``.

    Parameters: ``embedding_table`` ``[num, dim]`` (as ``mindspore.nn.Embedding`` names it; it does not train when
    ``r > 0``), ``lora_A`` ``[r, num]`` zero, ``lora_B`` ``[dim, r]`` standard normal: the other way round than
    linear layers. ``padding_idx``: a row that starts as zero and whose column of A gets no gradient, as torch has it.
    ``use_rslora``: scaling ``alpha / sqrt(r)``. ``use_dora``: ``lora_magnitude_vector`` ``[dim]``, norms taken over
    the vocabulary (peft 0.21); call ``reset_magnitude()`` after loading a base to start training from. Input: ids
    int32 or int64 of any shape; output ``[..., dim]`` in the table's type. Raises TypeError and ValueError for
    arguments out of range.
    """

    adapted = "embedding_table"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        *,
        padding_idx: int | None = None,
        use_rslora: bool = False,
        use_dora: bool = False,
        dtype: DType = float32,
    ) -> None:
        check_sizes(num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        check_lora(r, lora_alpha, 0.0, dtype)
        check_kind(r, use_dora, False)
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx {padding_idx} is not one of {num_embeddings} rows")
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.r, self.lora_alpha, self.merge_weights = r, lora_alpha, merge_weights
        self.use_rslora, self.use_dora = use_rslora, use_dora
        self.out_axis = 1
        self.upcast = must_upcast(bfloat16)
        self.scaling = 0.0
        self.embedding_table = normal("embedding_table", (num_embeddings, embedding_dim), dtype)
        if self.padding_idx is not None:
            kept = ops.expand_dims(ops.arange(num_embeddings) != self.padding_idx, 1)
            first = wide(self.embedding_table)
            self.embedding_table.set_data(ops.where(kept, first, ops.zeros_like(first)).astype(dtype))
        if r:
            self.embedding_table.requires_grad = False
            self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
            self.lora_A = zeros("lora_A", (r, num_embeddings), dtype)
            self.lora_B = normal("lora_B", (embedding_dim, r), dtype)
            if use_dora:
                self.lora_magnitude_vector = zeros("lora_magnitude_vector", (embedding_dim,), dtype)
                self.reset_magnitude()

    def delta(self) -> Tensor:
        """Return ``scaling * (B A)^T``, shape ``[num, dim]``, in at least float32."""
        product: Tensor = ops.matmul(wide(self.lora_B), wide(self.lora_A))
        return product.T * self.scaling

    def construct(self, ids: Tensor) -> Tensor:
        """Return the rows of ids, shape ``[*ids, dim]``."""
        kind = self.embedding_table.dtype
        y: Tensor = self.held(ops.gather(lift(self.embedding_table, self.upcast), ids, 0), ids)
        if not self.r or self.merged:
            return y.astype(kind)
        after_a = self.held(ops.gather(lift(self.lora_A, self.upcast).T, ids, 0), ids)
        update: Tensor = ops.matmul(after_a, self.lora_B.astype(after_a.dtype).T) * self.scaling
        if not self.use_dora:
            return (y + update).astype(kind)
        norm: Tensor = ops.stop_gradient(norm_beside(wide(self.embedding_table) + self.delta(), self.out_axis))
        scale = (wide(self.lora_magnitude_vector) / norm.reshape((-1,))).astype(y.dtype)
        return (scale * y + scale * update).astype(kind)

    def held(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return the rows, the padding row's as constants."""
        if self.padding_idx is None:
            return rows
        padding = ops.expand_dims(ids == self.padding_idx, -1)
        held: Tensor = ops.where(padding, ops.stop_gradient(rows), rows)
        return held
