"""What the reference networks are made of: [in, out] layers, attention, masks, activations."""

from __future__ import annotations

from ..binding import Cell, DType, Parameter, Tensor, float32, initializers, nn, ops
from ..initial import zeros

ACTIVATIONS = ("gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh",
               "quick_gelu")  # fmt: skip
"""The activations that :func:`activate` knows, by transformers' names."""

LOWEST = -3.0e38
"""What stands for minus infinity in a mask: a row without any key becomes uniform instead of NaN."""


class InOutDense(Cell):
    """Compute ``x W + bias`` with ``weight`` ``[in, out]``: MindFormers' ``Linear(transpose_b=False)``."""

    def __init__(self, in_channels: int, out_channels: int, dtype: DType) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.has_bias = in_channels, out_channels, True
        self.weight = zeros("weight", (in_channels, out_channels), dtype)
        self.bias: Parameter = zeros("bias", (out_channels,), dtype)

    def construct(self, x: Tensor) -> Tensor:
        """Return ``[..., out]``."""
        y: Tensor = ops.matmul(x, self.weight) + self.bias
        return y


def dense(in_channels: int, out_channels: int, dtype: DType, bias: bool = True) -> Cell:
    """Make a ``mindspore.nn.Dense``, weight ``[out, in]``, all zero."""
    made: Cell = nn.Dense(in_channels, out_channels, weight_init="zeros", bias_init="zeros", has_bias=bias, dtype=dtype)
    return made


def embedding(rows: int, columns: int, dtype: DType) -> Cell:
    """Make a ``mindspore.nn.Embedding``, ``embedding_table`` ``[rows, columns]``, all zero."""
    # nn.Embedding applies its dtype only to a table that it is given.
    start = initializers.initializer("zeros", [rows, columns], dtype)
    made: Cell = nn.Embedding(rows, columns, embedding_table=start, dtype=dtype)
    return made


def table(cell: Cell, name: str = "embedding_table") -> Tensor:
    """Return an embedding's base table, for a head that shares it; an adapter on the embedding is not in it."""
    return cell._params[name]


def layer_norm(width: int, epsilon: float, dtype: DType) -> Cell:
    """Make a layer norm over the last axis with ``gamma`` and ``beta``."""
    made: Cell = nn.LayerNorm((width,), epsilon=epsilon, dtype=dtype)
    return made


def activate(x: Tensor, form: str) -> Tensor:
    """Apply an activation by transformers' name; the tanh forms of GELU are one function."""
    y: Tensor
    if form in ("gelu", "gelu_python"):
        y = ops.gelu(x, approximate="none")
    elif form in ("gelu_new", "gelu_fast", "gelu_pytorch_tanh"):
        y = ops.gelu(x, approximate="tanh")
    elif form == "relu":
        y = ops.relu(x)
    elif form in ("silu", "swish"):
        y = ops.silu(x)
    elif form == "quick_gelu":
        y = x * ops.sigmoid(x * 1.702)
    else:
        y = tanh(x)
    return y


def tanh(x: Tensor) -> Tensor:
    """Return the hyperbolic tangent: MindSpore 2.10's own on the CPU is 1e-4 off near 5, where it jumps to 1."""
    y: Tensor = ops.sigmoid(x * 2.0) * 2.0 - 1.0
    return y


def positions_of(ids: Tensor, given: Tensor | None) -> Tensor:
    """Return position numbers ``[1 or batch, time]``: those given, or 0, 1, 2 ... whatever the mask."""
    if given is not None:
        return given
    numbers: Tensor = ops.arange(ids.shape[1]).reshape((1, -1))
    return numbers


def visible(ids: Tensor, attention_mask: Tensor | None, causal: bool) -> Tensor:
    """Return which keys each query sees: booleans ``[1 or batch, 1, time or 1, time]``."""
    time = ids.shape[1]
    seen: Tensor = ops.ones((1, 1, time, time), float32) > 0.0
    if causal:
        at = ops.arange(time)
        seen = (at.reshape((-1, 1)) >= at.reshape((1, -1))).reshape((1, 1, time, time))
    if attention_mask is not None:
        kept = ops.not_equal(attention_mask.reshape((-1, 1, 1, time)), 0)
        seen = ops.logical_and(seen, kept)
    return seen


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Return attention's output ``[batch, time, heads * head]``.

    ``query`` ``[batch, heads, time, head]``; ``key`` and ``value`` may have fewer heads, each then serves a run of
    neighbouring query heads (grouped-query attention, Ainslie et al. 2023). The softmax is taken in float32.
    """
    batch, heads, time, head = query.shape
    groups = key.shape[1]
    if groups != heads:
        key, value = _shared(key, heads // groups), _shared(value, heads // groups)
    scores = ops.matmul(query, ops.swapaxes(key, 2, 3)) * scale
    scores = ops.where(seen, scores.astype(float32), LOWEST)
    weights = ops.softmax(scores, -1).astype(value.dtype)
    mixed = ops.swapaxes(ops.matmul(weights, value), 1, 2)
    out: Tensor = mixed.reshape((batch, time, heads * head))
    return out


def _shared(x: Tensor, times: int) -> Tensor:
    batch, groups, time, head = x.shape
    wide = ops.broadcast_to(x.reshape((batch, groups, 1, time, head)), (batch, groups, times, time, head))
    out: Tensor = wide.reshape((batch, groups * times, time, head))
    return out


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Turn ``[batch, time, heads * head]`` into ``[batch, heads, time, head]``."""
    batch, time, width = x.shape
    out: Tensor = ops.swapaxes(x.reshape((batch, time, heads, width // heads)), 1, 2)
    return out


def require_length(ids: Tensor, limit: int, name: str) -> None:
    """Raise ValueError for a sequence longer than the position table, which MindSpore would read beyond."""
    if ids.shape[1] > limit:
        raise ValueError(f"a sequence of {ids.shape[1]} tokens exceeds {name} = {limit}")
