"""The two cells that MindFormers' GPT-2 and BERT have in common, by the names of its transformer module."""

from __future__ import annotations

from ..binding import Cell, DType, Tensor
from .parts import InOutDense, activate, attend, dense, split_heads


class Attention(Cell):
    """Self-attention; ``dense1``, ``dense2``, ``dense3`` are query, key, value; ``projection`` is stored [in, out]."""

    def __init__(self, hidden: int, heads: int, scale: float, dtype: DType) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.dense1 = dense(hidden, hidden, dtype)
        self.dense2 = dense(hidden, hidden, dtype)
        self.dense3 = dense(hidden, hidden, dtype)
        self.projection: Cell = InOutDense(hidden, hidden, dtype)

    def construct(self, x: Tensor, seen: Tensor) -> Tensor:
        """Return ``[batch, time, hidden]``."""
        query = split_heads(self.dense1(x), self.heads)
        key = split_heads(self.dense2(x), self.heads)
        value = split_heads(self.dense3(x), self.heads)
        return self.projection(attend(query, key, value, seen, self.scale))


class FeedForward(Cell):
    """``mapping`` to the inner width and ``projection`` back, both stored [in, out], around an activation."""

    def __init__(self, hidden: int, inner: int, activation: str, dtype: DType) -> None:
        super().__init__()
        self.activation = activation
        self.mapping: Cell = InOutDense(hidden, inner, dtype)
        self.projection: Cell = InOutDense(inner, hidden, dtype)

    def construct(self, x: Tensor) -> Tensor:
        """Return ``[batch, time, hidden]``."""
        return self.projection(activate(self.mapping(x), self.activation))
