"""MindPet's LoRADense as its user guide specifies it and version 1.0.4 computes it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .binding import (
    Activation,
    Dense,
    DType,
    Initializer,
    Parameter,
    Primitive,
    Tensor,
    bfloat16,
    float16,
    float32,
    initializers,
    must_upcast,
    nn,
    ops,
    wide,
)  # fmt: skip
from .initial import check_sizes
from .state import Merging

DTYPES = (float16, float32, bfloat16)
Strategy = tuple[object, ...] | None


class LoRADense(Merging, Dense):
    """Adapt a dense layer: MindPet 1.0.4's ``LoRADense``, ``act(x W^T + b + alpha/rank * drop(x) A^T B^T)``.

    Parameters: ``weight`` ``[out, in]`` and ``bias`` ``[out]`` of ``mindspore.nn.Dense``, ``mindpet_delta_lora_a``
    ``[rank, in]``, ``mindpet_delta_lora_b`` ``[out, rank]``. As in MindPet all of them train until ``freeze_delta``
    says otherwise, and a layer that is itself the network names its factors ``mindpet_delta_lora_A`` and ``_B``. The
    factors are stored in ``param_init_type``; everything is computed in ``compute_dtype`` (bfloat16 on the CPU in
    float32) and returned in the input's type. ``merge_weights=True`` merges on ``set_train(False)``, which MindPet
    does not know.

    Raises TypeError for arguments of the wrong type (``lora_rank`` an integer, ``lora_alpha`` a number,
    ``lora_dropout`` a float, types float16, bfloat16 or float32, ``activation`` a name, Cell or Primitive) and
    ValueError for sizes that are not positive, an alpha of zero, a dropout outside [0, 1), an unknown initialiser and
    a given tensor of the wrong shape.
    """

    factors = ("mindpet_delta_lora_a", "mindpet_delta_lora_b")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        lora_rank: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        lora_a_init: Tensor | str | Initializer | None = None,
        lora_b_init: Tensor | str | Initializer = "zeros",
        param_init_type: DType = float32,
        compute_dtype: DType = float16,
        *,
        weight_init: Tensor | str | Initializer = "normal",
        bias_init: Tensor | str | Initializer = "zeros",
        has_bias: bool = True,
        activation: Activation | None = None,
        merge_weights: bool = False,
    ) -> None:
        super().__init__(
            in_channels, out_channels, weight_init=weight_init, bias_init=bias_init, has_bias=has_bias,
            activation=activation,
        )  # fmt: skip
        check_sizes(lora_rank=lora_rank)
        _check_numbers(lora_alpha, lora_dropout)
        check_types(param_init_type=param_init_type, compute_dtype=compute_dtype)
        shapes = {"lora_a_init": (lora_rank, in_channels), "lora_b_init": (out_channels, lora_rank)}
        a_init = initializers.HeUniform(negative_slope=math.sqrt(5)) if lora_a_init is None else lora_a_init
        for (name, shape), given in zip(shapes.items(), (a_init, lora_b_init), strict=True):
            check_shape(name, given, shape)
        self.lora_rank = self.r = lora_rank
        self.lora_alpha, self.merge_weights = lora_alpha, merge_weights
        self.scaling = lora_alpha / lora_rank
        self.compute_dtype = float32 if must_upcast(compute_dtype) else compute_dtype
        self.lora_dropout = nn.Dropout(p=lora_dropout) if lora_dropout else None
        a = initializers.initializer(a_init, list(shapes["lora_a_init"]), param_init_type)
        b = initializers.initializer(lora_b_init, list(shapes["lora_b_init"]), param_init_type)
        self.mindpet_delta_lora_a = Parameter(a, name="mindpet_delta_lora_A")
        self.mindpet_delta_lora_b = Parameter(b, name="mindpet_delta_lora_B")
        self.lora_a_matmul = ops.MatMul(transpose_b=True)
        self.lora_b_matmul = ops.MatMul(transpose_b=True)
        self.mul, self.add = ops.Mul(), ops.Add()

    def delta(self) -> Tensor:
        """Return ``alpha/rank * B A``, shape ``[out, in]``, in at least float32."""
        product: Tensor = ops.matmul(wide(self.mindpet_delta_lora_b), wide(self.mindpet_delta_lora_a))
        return product * self.scaling

    def construct(self, x: Tensor) -> Tensor:
        """Return the layer's output, ``[..., out]`` in the input's type; the input has at least two axes."""
        kind, shape, compute = x.dtype, x.shape, self.compute_dtype
        if len(shape) < 2:
            raise ValueError(f"LoRADense needs an input of at least two axes, not {len(shape)}")
        x = x.astype(compute).reshape((-1, shape[-1]))
        y = self.matmul(x, self.weight.astype(compute))
        if self.has_bias:
            y = self.bias_add(y, self.bias.astype(compute))
        if not self.merged:
            dropped = x if self.lora_dropout is None else self.lora_dropout(x)
            hidden = self.lora_a_matmul(dropped, self.mindpet_delta_lora_a.astype(compute))
            update = self.lora_b_matmul(hidden, self.mindpet_delta_lora_b.astype(compute))
            y = self.add(y, self.mul(update, self.scaling))
        if self.activation_flag:
            y = self.activation(y)
        return y.reshape((*shape[:-1], -1)).astype(kind)

    def shard(
        self,
        strategy_org_dense_matmul: Strategy = None,
        strategy_org_bias_add: Strategy = None,
        strategy_lora_dropout: Strategy = None,
        strategy_lora_a_matmul: Strategy = None,
        strategy_lora_b_matmul: Strategy = None,
        strategy_lora_mul: Strategy = None,
        strategy_lora_add: Strategy = None,
        strategy_activation: Strategy = None,
    ) -> None:
        """Set the strategy of each operator, one tuple per input; in effect in (semi-)automatic parallel mode only.

        Raises TypeError for a strategy that is not a tuple, and ValueError for an activation that cannot be sharded
        by one strategy, such as LogSoftmax.
        """
        activation = activation_strategies(self.activation, strategy_activation) if self.activation_flag else []
        dropout = getattr(self.lora_dropout, "dropout", None)
        wanted = [
            ("strategy_org_dense_matmul", self.matmul, strategy_org_dense_matmul),
            ("strategy_org_bias_add", self.bias_add if self.has_bias else None, strategy_org_bias_add),
            ("strategy_lora_dropout", dropout, strategy_lora_dropout),
            ("strategy_lora_a_matmul", self.lora_a_matmul, strategy_lora_a_matmul),
            ("strategy_lora_b_matmul", self.lora_b_matmul, strategy_lora_b_matmul),
            ("strategy_lora_mul", self.mul, strategy_lora_mul),
            ("strategy_lora_add", self.add, strategy_lora_add),
            *(("strategy_activation", operator, strategy) for operator, strategy in activation),
        ]
        set_strategies(wanted)


def set_strategies(wanted: Sequence[tuple[str, Primitive | None, Strategy]]) -> None:
    """Give operators their strategies, by the names of the options; TypeError for one that is no tuple."""
    for name, _, strategy in wanted:
        if strategy is not None and not isinstance(strategy, tuple):
            raise TypeError(f"{name} must be a tuple, not {strategy!r}")
    for _, operator, strategy in wanted:
        if operator is not None and strategy is not None:
            operator.shard(strategy)


def activation_strategies(activation: Activation, strategy: Strategy) -> list[tuple[Primitive, Strategy]]:
    """Return the activation's operators with their strategies."""
    if isinstance(activation, nn.LogSoftmax):
        raise ValueError(
            "LogSoftmax cannot run in semi-automatic or automatic parallel mode; choose another activation"
        )
    if strategy is None or isinstance(activation, Primitive):
        return [(activation, strategy)] if isinstance(activation, Primitive) else []
    members = {**vars(activation), **getattr(activation, "_primitives", {})}
    operators = {name: member for name, member in members.items() if isinstance(member, Primitive)}
    if len(operators) == 1:
        return [(operator, strategy) for operator in operators.values()]
    if not isinstance(activation, nn.LogSigmoid) or not isinstance(strategy, tuple):
        raise ValueError(
            f"{type(activation).__name__} has no single operator that one strategy could shard; "
            "give the activation as a primitive, such as mindspore.ops.GeLU()"
        )
    with_number = (strategy[0], ())
    return [(operator, with_number if name in ("mul", "add") else strategy) for name, operator in operators.items()]


def _check_numbers(alpha: float, dropout: float) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"lora_alpha must be an integer or a float, not {alpha!r}")
    if alpha == 0 or not math.isfinite(alpha):
        raise ValueError(f"lora_alpha must be finite and not zero, not {alpha}")
    if not isinstance(dropout, float):
        raise TypeError(f"lora_dropout must be a float, not {dropout!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout must be at least 0 and below 1, not {dropout}")


def check_types(**types: DType) -> None:
    """Raise TypeError for a type that MindPet's cells cannot have."""
    for name, dtype in types.items():
        if not any(dtype is known or dtype == known for known in DTYPES):
            raise TypeError(f"{name} must be mindspore.float16, bfloat16 or float32, not {dtype}")


def check_shape(name: str, given: object, shape: Sequence[int]) -> None:
    """Raise ValueError where a tensor is given that has another shape."""
    if isinstance(given, Tensor) and tuple(given.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape {tuple(shape)}, not {tuple(given.shape)}")
