"""MindSpore as the layers use it: typed names, and one clear error where it is missing.

MindSpore ships no type information, so a type checker sees the small classes below instead of it; at run time the
same names are MindSpore's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UsageError


class MissingMindSporeError(UsageError, ImportError):
    """MindSpore is needed and not installed."""


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    class DType:
        """An element type such as ``mindspore.float32``."""

    class Tensor:
        """The part of ``mindspore.Tensor`` that the layers use."""

        shape: tuple[int, ...]
        dtype: DType
        ndim: int
        T: Tensor

        def __getitem__(self, index: object) -> Tensor: ...
        def __eq__(self, other: object) -> Tensor: ...  # type: ignore[override]
        def astype(self, dtype: DType) -> Tensor: ...  # noqa: D102
        def reshape(self, shape: Sequence[int]) -> Tensor: ...  # noqa: D102
        def asnumpy(self) -> npt.NDArray[np.generic]: ...  # noqa: D102
        def __add__(self, other: Tensor | float) -> Tensor: ...
        def __sub__(self, other: Tensor | float) -> Tensor: ...
        def __mul__(self, other: Tensor | float) -> Tensor: ...
        def __truediv__(self, other: Tensor | float) -> Tensor: ...

    class Parameter(Tensor):
        """The part of ``mindspore.Parameter`` that the layers use."""

        name: str
        requires_grad: bool

        def __init__(self, value: Tensor, name: str | None = None, requires_grad: bool = True) -> None: ...
        def set_data(self, data: Tensor, slice_shape: bool = False) -> Parameter: ...  # noqa: D102

    class Cell:
        """The part of ``mindspore.nn.Cell`` that the layers use."""

        training: bool
        _params: dict[str, Parameter]

        def __init__(self) -> None: ...
        def __call__(self, *inputs: Tensor) -> Tensor: ...  # noqa: D102
        def set_train(self, mode: bool = True) -> Cell: ...  # noqa: D102
        def add_flags_recursive(self, **flags: bool) -> Cell: ...  # noqa: D102
        def cells_and_names(self) -> Iterator[tuple[str, Cell]]: ...  # noqa: D102
        def parameters_and_names(self) -> Iterator[tuple[str, Parameter]]: ...  # noqa: D102

    class Dense(Cell):
        """The part of ``mindspore.nn.Dense`` that the layers use."""

        in_channels: int
        out_channels: int
        has_bias: bool
        weight: Parameter
        bias: Parameter
        matmul: Primitive
        bias_add: Primitive
        activation: Cell | Primitive
        activation_flag: bool

        def __init__(
            self, in_channels: int, out_channels: int, *, activation: Activation | None = None, **options: object
        ) -> None: ...

    class Primitive:
        """The part of ``mindspore.ops.Primitive`` that the layers use."""

        def shard(self, in_strategy: tuple[object, ...]) -> Primitive: ...  # noqa: D102
        def __call__(self, *inputs: Tensor) -> Tensor: ...  # noqa: D102

    Initializer = object
    Activation = str | Cell | Primitive
    float16: DType
    float32: DType
    float64: DType
    bfloat16: DType
    int32: DType
    int64: DType
    nn: Any
    ops: Any
    initializers: Any
    context: Any
else:
    try:
        from mindspore import Parameter, Tensor, bfloat16, context, float16, float32, float64, int32, int64, nn, ops
    except ModuleNotFoundError as error:
        if error.name != "mindspore":
            raise
        raise MissingMindSporeError(
            "the layers need MindSpore, which is not installed",
            where="lorabridge.layers",
            hint="run: pip install 'lorabridge[mindspore]'",
        ) from error
    from mindspore.common import initializer as initializers
    from mindspore.nn import Cell, Dense
    from mindspore.ops import Primitive

    DType = type(float32)
    Initializer = initializers.Initializer
    Activation = object

__all__ = [
    "FLOATS", "HALF", "Activation", "Cell", "DType", "Dense", "Initializer", "MissingMindSporeError", "Parameter",
    "Primitive", "Tensor", "bfloat16", "context", "float16", "float32", "float64", "initializers", "int32", "int64",
    "lift", "must_upcast", "nn", "ops", "wide",
]  # fmt: skip

HALF = (float16, bfloat16)
FLOATS = (float16, bfloat16, float32, float64)


def wide(x: Tensor) -> Tensor:
    """Return the tensor in at least float32, exactly."""
    return x.astype(float32) if x.dtype in HALF else x


def lift(x: Tensor, upcast: bool) -> Tensor:
    """Return the tensor in the type to compute in: float32 for bfloat16 if ``upcast``; usable inside ``construct``."""
    return x.astype(float32) if upcast and x.dtype == bfloat16 else x


def must_upcast(dtype: DType) -> bool:
    """Say whether the device has no kernels for a type: MindSpore's CPU computes nothing in bfloat16."""
    return bool(dtype == bfloat16 and context.get_context("device_target") == "CPU")
