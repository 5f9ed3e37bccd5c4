"""MindPet's adapters as its user guide specifies them and version 1.0.4 computes them: Houlsby's, and one of low rank.

Sources: Houlsby et al. 2019 (bottleneck adapter after a dense layer), Karimi Mahabadi et al. 2021 (Compacter, of which
the low-rank adapter is the form with one factor). Parameters have MindPet's names and orientations.
"""

from __future__ import annotations

from collections import OrderedDict

from .binding import (
    Activation,
    Cell,
    Dense,
    DType,
    Initializer,
    Parameter,
    Primitive,
    Tensor,
    float16,
    float32,
    initializers,
    must_upcast,
    nn,
    ops,
)  # fmt: skip
from .initial import check_sizes
from .mindpet import Strategy, activation_strategies, check_types, set_strategies


class Sampler(Cell):
    """Project as MindFormers' ``Linear`` does: ``x W^T + b`` in ``compute_dtype``, returned in the input's type.

    Parameters: ``weight`` ``[out, in]``, normal with a deviation of 0.01, ``bias`` ``[out]``, zero.
    """

    def __init__(self, in_channels: int, out_channels: int, param_init_type: DType, compute_dtype: DType) -> None:
        super().__init__()
        weight = initializers.initializer(initializers.Normal(0.01), [out_channels, in_channels], param_init_type)
        self.weight = Parameter(weight, name="weight")
        self.bias = Parameter(initializers.initializer("zeros", [out_channels], param_init_type), name="bias")
        self.matmul, self.bias_add = ops.MatMul(transpose_b=True), ops.Add()
        self.compute_dtype = float32 if must_upcast(compute_dtype) else compute_dtype

    def construct(self, x: Tensor) -> Tensor:
        """Return the projection of ``[rows, in]``, ``[rows, out]``."""
        y: Tensor = self.matmul(x.astype(self.compute_dtype), self.weight.astype(self.compute_dtype))
        y = self.bias_add(y, self.bias.astype(self.compute_dtype))
        return y.astype(x.dtype)


class AdapterLayer(Cell):
    """Adapt what a layer returns: ``x + act(x W_down^T + b_down) W_up^T + b_up``, MindPet's ``AdapterLayer``.

    Parameters, below ``mindpet_delta_adapter_block``: ``mindpet_delta_adapter_down_sampler.weight``
    ``[bottleneck, hidden]`` and ``.bias``, ``mindpet_delta_adapter_up_sampler.weight`` ``[hidden, bottleneck]`` and
    ``.bias``. ``non_linearity``: a name that ``mindspore.nn.get_activation`` knows; its gelu is the approximation
    through tanh. Products are computed in ``compute_dtype``, the rest in the input's type.

    Raises TypeError for sizes that are no integers, a ``non_linearity`` that is no text and other types than float16,
    bfloat16 and float32; ValueError for sizes that are not positive and unknown activations.
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int = 64,
        non_linearity: str = "gelu",
        param_init_type: DType = float32,
        compute_dtype: DType = float16,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size=hidden_size, bottleneck_size=bottleneck_size)
        check_types(param_init_type=param_init_type, compute_dtype=compute_dtype)
        self.bottleneck_size = bottleneck_size
        block = OrderedDict(
            mindpet_delta_adapter_down_sampler=Sampler(hidden_size, bottleneck_size, param_init_type, compute_dtype),
            mindpet_delta_adapter_non_linear=named_activation(non_linearity),
            mindpet_delta_adapter_up_sampler=Sampler(bottleneck_size, hidden_size, param_init_type, compute_dtype),
        )
        self.mindpet_delta_adapter_block = nn.SequentialCell(block)
        self.residual_add = ops.Add()

    def construct(self, x: Tensor) -> Tensor:
        """Return the adapted ``[..., hidden]`` in the input's type."""
        shape = x.shape
        rows = x.reshape((-1, shape[-1]))
        y: Tensor = self.residual_add(rows, self.mindpet_delta_adapter_block(rows))
        return y.reshape(shape).astype(x.dtype)

    def shard(
        self,
        strategy_matmul_down_sampler: Strategy = None,
        strategy_bias_down_sampler: Strategy = None,
        strategy_non_linearity: Strategy = None,
        strategy_matmul_up_sampler: Strategy = None,
        strategy_bias_up_sampler: Strategy = None,
        strategy_residual_add: Strategy = None,
    ) -> None:
        """Set the strategy of each operator, one tuple per input; in effect in (semi-)automatic parallel mode only.

        Raises TypeError for a strategy that is not a tuple, ValueError for LogSoftmax and other activations that one
        strategy cannot shard.
        """
        down, activation, up = list(self.mindpet_delta_adapter_block)
        act = activation_strategies(activation, strategy_non_linearity)
        set_strategies([
            ("strategy_matmul_down_sampler", down.matmul, strategy_matmul_down_sampler),
            ("strategy_bias_down_sampler", down.bias_add, strategy_bias_down_sampler),
            *(("strategy_non_linearity", operator, strategy) for operator, strategy in act),
            ("strategy_matmul_up_sampler", up.matmul, strategy_matmul_up_sampler),
            ("strategy_bias_up_sampler", up.bias_add, strategy_bias_up_sampler),
            ("strategy_residual_add", self.residual_add, strategy_residual_add),
        ])  # fmt: skip


class LowRankLinear(Cell):
    """Project with a weight of two factors: ``x (left right) + b``, MindPet's cell of this name.

    Parameters: ``mindpet_delta_low_rank_adapter_weight_left`` ``[in, rank]``,
    ``mindpet_delta_low_rank_adapter_weight_right`` ``[rank, out]``, ``bias`` ``[out]``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, rank: int, init: str | Initializer, kind: DType, compute: DType
    ) -> None:
        super().__init__()
        stem = "mindpet_delta_low_rank_adapter_weight"
        left = initializers.initializer(init, [in_channels, rank], kind)
        right = initializers.initializer(init, [rank, out_channels], kind)
        self.mindpet_delta_low_rank_adapter_weight_left = Parameter(left, name=f"{stem}_left")
        self.mindpet_delta_low_rank_adapter_weight_right = Parameter(right, name=f"{stem}_right")
        self.bias = Parameter(initializers.initializer("zeros", [out_channels], kind), name="bias")
        self.matmul_weight, self.matmul_input, self.bias_add = ops.MatMul(), ops.MatMul(), ops.BiasAdd()
        self.compute_dtype = float32 if must_upcast(compute) else compute

    def construct(self, x: Tensor) -> Tensor:
        """Return the projection of ``[rows, in]``, ``[rows, out]``, in the input's type."""
        compute = self.compute_dtype
        left = self.mindpet_delta_low_rank_adapter_weight_left.astype(compute)
        right = self.mindpet_delta_low_rank_adapter_weight_right.astype(compute)
        y: Tensor = self.matmul_input(x.astype(compute), self.matmul_weight(left, right))
        y = self.bias_add(y, self.bias.astype(compute))
        return y.astype(x.dtype)


class LowRankAdapterLayer(Cell):
    """Adapt what a layer returns: ``x + act(x (L1 R1) + b1) (L2 R2) + b2``, MindPet's ``LowRankAdapterLayer``.

    Parameters: those of :class:`LowRankLinear` below ``mindpet_delta_low_rank_adapter_down_sampler`` (hidden to
    ``hidden_size // reduction_factor``) and ``mindpet_delta_low_rank_adapter_up_sampler`` (back). All start at random,
    as in MindPet: a new layer is not the identity. The guide's formula leaves the biases out that its code has.

    Raises TypeError and ValueError as :class:`AdapterLayer` does, TypeError for a ``low_rank_w_init`` that is no name
    or Initializer, ValueError for a ``reduction_factor`` over ``hidden_size``.
    """

    def __init__(
        self,
        hidden_size: int,
        reduction_factor: int,
        low_rank_size: int = 1,
        low_rank_w_init: str | Initializer = "xavier_uniform",
        non_linearity: str = "gelu",
        param_init_type: DType = float32,
        compute_dtype: DType = float16,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size=hidden_size, reduction_factor=reduction_factor, low_rank_size=low_rank_size)
        check_types(param_init_type=param_init_type, compute_dtype=compute_dtype)
        if not isinstance(low_rank_w_init, str | initializers.Initializer):
            raise TypeError(f"low_rank_w_init must be a name or an Initializer, not {low_rank_w_init!r}")
        if reduction_factor > hidden_size:
            raise ValueError(f"reduction_factor must not be over hidden_size {hidden_size}, not {reduction_factor}")
        self.bottleneck_size = inner = hidden_size // reduction_factor
        options = (low_rank_size, low_rank_w_init, param_init_type, compute_dtype)
        self.mindpet_delta_low_rank_adapter_down_sampler = LowRankLinear(hidden_size, inner, *options)
        self.mindpet_delta_low_rank_adapter_non_linear = named_activation(non_linearity)
        self.mindpet_delta_low_rank_adapter_up_sampler = LowRankLinear(inner, hidden_size, *options)
        self.residual_add = ops.Add()

    def construct(self, x: Tensor) -> Tensor:
        """Return the adapted ``[..., hidden]`` in the input's type."""
        shape = x.shape
        rows = x.reshape((-1, shape[-1]))
        inner = self.mindpet_delta_low_rank_adapter_down_sampler(rows)
        inner = self.mindpet_delta_low_rank_adapter_non_linear(inner)
        y: Tensor = self.residual_add(rows, self.mindpet_delta_low_rank_adapter_up_sampler(inner))
        return y.reshape(shape).astype(x.dtype)

    def shard(
        self,
        strategy_matmul_down_sampler_weight: Strategy = None,
        strategy_matmul_down_sampler_input: Strategy = None,
        strategy_bias_down_sampler: Strategy = None,
        strategy_non_linearity: Strategy = None,
        strategy_matmul_up_sampler_weight: Strategy = None,
        strategy_matmul_up_sampler_input: Strategy = None,
        strategy_bias_up_sampler: Strategy = None,
        strategy_residual_add: Strategy = None,
    ) -> None:
        """Set the strategy of each operator; see :meth:`AdapterLayer.shard`."""
        down, up = self.mindpet_delta_low_rank_adapter_down_sampler, self.mindpet_delta_low_rank_adapter_up_sampler
        act = activation_strategies(self.mindpet_delta_low_rank_adapter_non_linear, strategy_non_linearity)
        set_strategies([
            ("strategy_matmul_down_sampler_weight", down.matmul_weight, strategy_matmul_down_sampler_weight),
            ("strategy_matmul_down_sampler_input", down.matmul_input, strategy_matmul_down_sampler_input),
            ("strategy_bias_down_sampler", down.bias_add, strategy_bias_down_sampler),
            *(("strategy_non_linearity", operator, strategy) for operator, strategy in act),
            ("strategy_matmul_up_sampler_weight", up.matmul_weight, strategy_matmul_up_sampler_weight),
            ("strategy_matmul_up_sampler_input", up.matmul_input, strategy_matmul_up_sampler_input),
            ("strategy_bias_up_sampler", up.bias_add, strategy_bias_up_sampler),
            ("strategy_residual_add", self.residual_add, strategy_residual_add),
        ])  # fmt: skip


class AdaptedDense(Dense):
    """Share what AdapterDense and LowRankAdapterDense have in common: a dense layer whose output is adapted."""

    compute_dtype: DType

    def project(self, x: Tensor) -> Tensor:
        """Return ``act(x W^T + b)`` of rows ``[rows, in]`` in ``compute_dtype``."""
        y: Tensor = self.matmul(x.astype(self.compute_dtype), self.weight.astype(self.compute_dtype))
        if self.has_bias:
            y = self.bias_add(y, self.bias.astype(self.compute_dtype))
        return self.activation(y) if self.activation_flag else y

    def shard_base(self, matmul: Strategy, bias: Strategy, activation: Strategy) -> None:
        """Set the strategies of the dense layer's own operators."""
        act = activation_strategies(self.activation, activation) if self.activation_flag else []
        operators: list[tuple[str, Primitive | None, Strategy]] = [
            ("strategy_matmul_org", self.matmul, matmul),
            ("strategy_bias_org", self.bias_add if self.has_bias else None, bias),
            *(("strategy_activation_org", operator, strategy) for operator, strategy in act),
        ]
        set_strategies(operators)


class AdapterDense(AdaptedDense):
    """Adapt a dense layer: ``AdapterLayer(act(x W^T + b))``, MindPet's ``AdapterDense``.

    Parameters: ``weight`` ``[out, in]`` and ``bias`` ``[out]`` of ``mindspore.nn.Dense`` in float32, and those of
    :class:`AdapterLayer` below ``mindpet_delta_adapter``. Everything but the output is in ``compute_dtype``.
    Raises as :class:`AdapterLayer` and ``mindspore.nn.Dense`` do.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        weight_init: Tensor | str | Initializer = "normal",
        bias_init: Tensor | str | Initializer = "zeros",
        has_bias: bool = True,
        activation: Activation | None = None,
        bottleneck_size: int = 64,
        non_linearity: str = "gelu",
        param_init_type: DType = float32,
        compute_dtype: DType = float16,
    ) -> None:
        super().__init__(
            in_channels, out_channels, weight_init=weight_init, bias_init=bias_init, has_bias=has_bias,
            activation=activation,
        )  # fmt: skip
        self.mindpet_delta_adapter = AdapterLayer(
            out_channels, bottleneck_size, non_linearity, param_init_type, compute_dtype
        )
        self.compute_dtype = float32 if must_upcast(compute_dtype) else compute_dtype

    def construct(self, x: Tensor) -> Tensor:
        """Return the layer's output, ``[..., out]`` in the input's type."""
        y = self.mindpet_delta_adapter(self.project(x.reshape((-1, x.shape[-1]))))
        return y.reshape((*x.shape[:-1], -1)).astype(x.dtype)

    def shard(
        self,
        strategy_matmul_org: Strategy = None,
        strategy_bias_org: Strategy = None,
        strategy_activation_org: Strategy = None,
        strategy_matmul_down_sampler: Strategy = None,
        strategy_bias_down_sampler: Strategy = None,
        strategy_non_linearity: Strategy = None,
        strategy_matmul_up_sampler: Strategy = None,
        strategy_bias_up_sampler: Strategy = None,
        strategy_residual_add: Strategy = None,
    ) -> None:
        """Set the strategy of each operator; see :meth:`AdapterLayer.shard`."""
        self.shard_base(strategy_matmul_org, strategy_bias_org, strategy_activation_org)
        self.mindpet_delta_adapter.shard(
            strategy_matmul_down_sampler, strategy_bias_down_sampler, strategy_non_linearity,
            strategy_matmul_up_sampler, strategy_bias_up_sampler, strategy_residual_add,
        )  # fmt: skip


class LowRankAdapterDense(AdaptedDense):
    """Adapt a dense layer: ``LowRankAdapterLayer(act(x W^T + b))``, MindPet's ``LowRankAdapterDense``.

    Parameters: ``weight`` ``[out, in]`` and ``bias`` ``[out]`` of ``mindspore.nn.Dense`` in float32, and those of
    :class:`LowRankAdapterLayer` below ``mindpet_delta_low_rank_adapter``. Raises as these two do.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        weight_init: Tensor | str | Initializer = "normal",
        bias_init: Tensor | str | Initializer = "zeros",
        has_bias: bool = True,
        activation: Activation | None = None,
        reduction_factor: int = 1,
        low_rank_size: int = 1,
        low_rank_w_init: str | Initializer = "xavier_uniform",
        non_linearity: str = "gelu",
        param_init_type: DType = float32,
        compute_dtype: DType = float16,
    ) -> None:
        super().__init__(
            in_channels, out_channels, weight_init=weight_init, bias_init=bias_init, has_bias=has_bias,
            activation=activation,
        )  # fmt: skip
        self.mindpet_delta_low_rank_adapter = LowRankAdapterLayer(
            out_channels, reduction_factor, low_rank_size, low_rank_w_init, non_linearity, param_init_type,
            compute_dtype,
        )  # fmt: skip
        self.compute_dtype = float32 if must_upcast(compute_dtype) else compute_dtype

    def construct(self, x: Tensor) -> Tensor:
        """Return the layer's output, ``[..., out]`` in the input's type."""
        y = self.mindpet_delta_low_rank_adapter(self.project(x.reshape((-1, x.shape[-1]))))
        return y.reshape((*x.shape[:-1], -1)).astype(x.dtype)

    def shard(
        self,
        strategy_matmul_org: Strategy = None,
        strategy_bias_org: Strategy = None,
        strategy_activation_org: Strategy = None,
        strategy_matmul_down_sampler_weight: Strategy = None,
        strategy_matmul_down_sampler_input: Strategy = None,
        strategy_bias_down_sampler: Strategy = None,
        strategy_non_linearity: Strategy = None,
        strategy_matmul_up_sampler_weight: Strategy = None,
        strategy_matmul_up_sampler_input: Strategy = None,
        strategy_bias_up_sampler: Strategy = None,
        strategy_residual_add: Strategy = None,
    ) -> None:
        """Set the strategy of each operator; see :meth:`AdapterLayer.shard`."""
        self.shard_base(strategy_matmul_org, strategy_bias_org, strategy_activation_org)
        self.mindpet_delta_low_rank_adapter.shard(
            strategy_matmul_down_sampler_weight, strategy_matmul_down_sampler_input, strategy_bias_down_sampler,
            strategy_non_linearity, strategy_matmul_up_sampler_weight, strategy_matmul_up_sampler_input,
            strategy_bias_up_sampler, strategy_residual_add,
        )  # fmt: skip


def named_activation(name: str) -> Cell:
    """Return MindSpore's activation of a name; TypeError for what is no text, ValueError for an unknown name."""
    if not isinstance(name, str):
        raise TypeError(f"non_linearity must be the name of an activation, not {name!r}")
    try:
        found: Cell = nn.get_activation(name)
    except KeyError as error:
        raise ValueError(f"non_linearity {name!r} is unknown to mindspore.nn.get_activation") from error
    return found
