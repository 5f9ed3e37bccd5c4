"""Adapted forms of cells that the layer set has no class for; ``replace_layers`` puts them in."""

from __future__ import annotations

from .binding import Cell, DType, Parameter, Primitive, Tensor, float32, initializers, ops
from .embedding import Embedding
from .linear import Linear
from .mindpet import LoRADense


class ActivatedLinear(Linear):
    """A :class:`Linear` followed by the activation of the ``mindspore.nn.Dense`` that it stands for."""

    def __init__(
        self, in_features: int, out_features: int, r: int, lora_alpha: float, lora_dropout: float = 0.0, *,
        activation: Cell | Primitive, merge_weights: bool = True, bias: bool = True, use_rslora: bool = False,
        use_dora: bool = False, lora_bias: bool = False, dtype: DType = float32,
    ) -> None:  # fmt: skip
        super().__init__(
            in_features, out_features, r, lora_alpha, lora_dropout, merge_weights=merge_weights, bias=bias,
            use_rslora=use_rslora, use_dora=use_dora, lora_bias=lora_bias, dtype=dtype,
        )  # fmt: skip
        self.activation = activation

    def construct(self, x: Tensor) -> Tensor:
        """Return the activated output, ``[..., out]``."""
        return self.activation(super().construct(x))


class TokenEmbedding(Embedding):
    """An :class:`Embedding` whose table is called ``embedding_weight``, as in MindFormers' Llama."""

    adapted = "embedding_weight"
    embedding_weight: Parameter

    def __init__(
        self, num_embeddings: int, embedding_dim: int, r: int, lora_alpha: float, merge_weights: bool = True, *,
        use_rslora: bool = False, use_dora: bool = False, dtype: DType = float32,
    ) -> None:  # fmt: skip
        super().__init__(
            num_embeddings, embedding_dim, r, lora_alpha, merge_weights, use_rslora=use_rslora, use_dora=use_dora,
            dtype=dtype,
        )  # fmt: skip
        table = self._params.pop("embedding_table")
        table.name = "embedding_weight"
        self.embedding_weight = table

    @property
    def base(self) -> Parameter:
        """The original table, under its first name while the base class makes it."""
        return self._params["embedding_table" if "embedding_table" in self._params else self.adapted]

    @property
    def embedding_table(self) -> Parameter:  # type: ignore[override]
        """The table under the name that the layer's formulas use."""
        return self.embedding_weight


class InOutLoRADense(LoRADense):
    """A :class:`LoRADense` whose weight is stored [in, out], as MindFormers' ``Linear(transpose_b=False)`` has it."""

    out_axis = 1

    def __init__(
        self, in_channels: int, out_channels: int, lora_rank: int, lora_alpha: float, lora_dropout: float = 0.0, *,
        param_init_type: DType = float32, compute_dtype: DType = float32, merge_weights: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, lora_rank, lora_alpha, lora_dropout, param_init_type=param_init_type,
            compute_dtype=compute_dtype, weight_init="zeros", merge_weights=merge_weights,
        )  # fmt: skip
        start = initializers.initializer("zeros", [in_channels, out_channels], param_init_type)
        self.weight = Parameter(start, name="weight")
        self.matmul = ops.MatMul()

    def delta(self) -> Tensor:
        """Return ``alpha/rank * (B A)^T``, shape ``[in, out]``, in at least float32."""
        return super().delta().T
