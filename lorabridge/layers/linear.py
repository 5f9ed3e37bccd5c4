"""Linear layers with LoRA: loralib's Linear, and what it shares with MergedLinear."""

from __future__ import annotations

import math

from .binding import Cell, DType, Parameter, Tensor, bfloat16, float32, lift, must_upcast, nn, ops, wide
from .initial import check_kind, check_lora, check_sizes, uniform, zeros
from .state import Merging, norm_beside


class Projection(Merging, Cell):
    """Share what Linear and MergedLinear have in common: ``y = x W^T + bias + scaling * drop(x) A^T B^T``.

    A subclass gives :meth:`low_rank` and :meth:`product`, and calls ``reset_magnitude`` once these work.
    """

    lora_bias: Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float,
        dropout: float,
        *,
        shapes: tuple[tuple[int, int], tuple[int, int]],
        fan_in_fan_out: bool,
        merge_weights: bool,
        bias: bool,
        use_rslora: bool,
        use_dora: bool,
        lora_bias: bool,
        dtype: DType,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.r, self.lora_alpha = rank, alpha
        self.fan_in_fan_out, self.merge_weights = fan_in_fan_out, merge_weights
        self.use_rslora, self.use_dora = use_rslora, use_dora
        self.out_axis = 1 if fan_in_fan_out else 0
        self.upcast = must_upcast(bfloat16)
        shape = (in_features, out_features) if fan_in_fan_out else (out_features, in_features)
        self.weight = uniform("weight", shape, in_features, dtype)
        self.bias = uniform("bias", (out_features,), in_features, dtype) if bias else None
        self.lora_bias = None
        self.scaling = 0.0
        self.lora_dropout: Cell | None = nn.Dropout(p=float(dropout)) if dropout and rank else None
        if rank:
            self.weight.requires_grad = False
            self.scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
            self.lora_A = uniform("lora_A", shapes[0], in_features, dtype)
            self.lora_B = zeros("lora_B", shapes[1], dtype)
            if lora_bias:
                self.lora_bias = zeros("lora_bias", (out_features,), dtype)
            if use_dora:
                self.lora_magnitude_vector = zeros("lora_magnitude_vector", (out_features,), dtype)

    def low_rank(self, x: Tensor) -> Tensor:
        """Return ``x A^T B^T``, shape ``[..., out]``."""
        raise NotImplementedError

    def product(self) -> Tensor:
        """Return ``B A``, shape ``[out, in]``, in at least float32."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """Return ``scaling * B A`` in the base's storage order, in at least float32."""
        product = self.product()
        return (product.T if self.fan_in_fan_out else product) * self.scaling

    def project(self, x: Tensor) -> Tensor:
        """Return x times the base weight (or the merged one), without bias."""
        weight = self.weight.astype(x.dtype)
        y: Tensor = ops.matmul(x, weight if self.fan_in_fan_out else weight.T)
        return y

    def construct(self, x: Tensor) -> Tensor:
        """Return the layer's output, shape ``[..., out]``, in the input's type."""
        kind = x.dtype
        x = lift(x, self.upcast)
        y = self.project(x)
        if self.r and not self.merged:
            y = self.adapt(x, y)
        if self.bias is not None:
            y = y + self.bias.astype(y.dtype)
        if self.lora_bias is not None:
            y = y + self.lora_bias.astype(y.dtype) * self.scaling
        return y.astype(kind)

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the adapter's part to ``y = x W^T``."""
        dropped = x if self.lora_dropout is None else self.lora_dropout(x)
        update = self.low_rank(dropped) * self.scaling
        if not self.use_dora:
            return y + update
        # The norm counts as a constant: DoRA, Liu et al. 2024, section 4.3. With dropout peft 0.21 scales the
        # base's product with the dropped input.
        norm: Tensor = ops.stop_gradient(norm_beside(wide(self.weight) + self.delta(), self.out_axis))
        scale = (wide(self.lora_magnitude_vector) / norm.reshape((-1,))).astype(y.dtype)
        plain = y if self.lora_dropout is None else self.project(dropped)
        return y + (scale - 1.0) * plain + scale * update


class Linear(Projection):
    """Adapt a linear layer: loralib 0.1.2's ``Linear``.

    Parameters: ``weight`` ``[out, in]`` (``[in, out]`` with ``fan_in_fan_out``), ``bias`` ``[out]``, ``lora_A``
    ``[r, in]`` uniform on +-1/sqrt(in), ``lora_B`` ``[out, r]`` zero; the weight does not train when ``r > 0``, the
    bias does. ``use_rslora``: scaling ``alpha / sqrt(r)``. ``use_dora``: ``lora_magnitude_vector`` ``[out]``; call
    ``reset_magnitude()`` after loading a base to start training from. ``lora_bias``: a bias on B, ``[out]``.
    ``dtype``: the parameters' type, float16, bfloat16, float32 or float64. Input ``[..., in]``; everything is computed
    in the input's type, bfloat16 on the CPU in float32 with one rounding at the end. Raises TypeError and ValueError
    for arguments out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        bias: bool = True,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        dtype: DType = float32,
    ) -> None:
        check_sizes(in_features=in_features, out_features=out_features)
        check_lora(r, lora_alpha, lora_dropout, dtype)
        check_kind(r, use_dora, lora_bias)
        super().__init__(
            in_features, out_features, r, lora_alpha, lora_dropout, shapes=((r, in_features), (out_features, r)),
            fan_in_fan_out=fan_in_fan_out, merge_weights=merge_weights, bias=bias, use_rslora=use_rslora,
            use_dora=use_dora, lora_bias=lora_bias, dtype=dtype,
        )  # fmt: skip
        if use_dora:
            self.reset_magnitude()

    def low_rank(self, x: Tensor) -> Tensor:
        """Return ``x A^T B^T``, shape ``[..., out]``."""
        y: Tensor = ops.matmul(ops.matmul(x, self.lora_A.astype(x.dtype).T), self.lora_B.astype(x.dtype).T)
        return y

    def product(self) -> Tensor:
        """Return ``B A``, shape ``[out, in]``, in at least float32."""
        product: Tensor = ops.matmul(wide(self.lora_B), wide(self.lora_A))
        return product
