"""Which LoRA cell stands in for which cell, and with which arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..errors import MappingError
from .binding import Activation, Cell, Dense, DType, Parameter, nn
from .conv import Conv1d, Conv2d, Conv3d, ConvLoRA, Form
from .embedding import Embedding
from .linear import Linear
from .merged import MergedLinear
from .mindpet import LoRADense
from .models.llama import TokenEmbedding as LlamaEmbedding
from .models.parts import InOutDense
from .standins import ActivatedLinear, InOutLoRADense, TokenEmbedding

if TYPE_CHECKING:

    class MintLinear(Cell):
        """The part of ``mindspore.mint.nn.Linear`` that is used."""

        in_features: int
        out_features: int
        weight: Parameter
        bias: Parameter | None
else:
    from mindspore.mint.nn import Linear as MintLinear


class Convolving(Protocol):
    """The part of ``mindspore.nn.Conv1d``, ``Conv2d`` and ``Conv3d`` that is used."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    pad_mode: str
    padding: int | tuple[int, ...]
    group: int
    has_bias: bool
    weight: Parameter


CONVOLUTIONS: dict[type, tuple[type[ConvLoRA], int]] = {
    nn.Conv1d: (Conv1d, 1), nn.Conv2d: (Conv2d, 2), nn.Conv3d: (Conv3d, 3)
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """The options of ``replace_layers``."""

    r: int
    alpha: float
    dropout: float
    mindpet: bool
    rslora: bool
    dora: bool
    bias: bool
    merge: bool
    enabled: tuple[bool, ...] | None
    conv_form: Form

    def refuse(self, **options: object) -> None:
        """Raise MappingError naming the options that are on."""
        given = [name for name, value in options.items() if value]
        if given:
            raise MappingError(f"has no form with {', '.join(given)}")


def adapted(cell: Cell, recipe: Recipe) -> Cell:
    """Return a LoRA cell of the same geometry and type, base parameters not yet the cell's; MappingError where none is.

    Only the exact classes are known: a subclass may compute something else.
    """
    kind = type(cell)
    if isinstance(cell, Dense) and kind is Dense:
        activation = cell.activation if cell.activation_flag else None
        return _linear(cell.in_channels, cell.out_channels, cell.has_bias, cell.weight.dtype, recipe, activation)
    if isinstance(cell, MintLinear) and kind is MintLinear:
        return _linear(cell.in_features, cell.out_features, cell.bias is not None, cell.weight.dtype, recipe, None)
    if isinstance(cell, InOutDense) and kind is InOutDense:
        return _in_out(cell, recipe)
    if kind in CONVOLUTIONS:
        return _convolution(cell, kind, recipe)  # type: ignore[arg-type]
    if kind is nn.Embedding or kind is LlamaEmbedding:
        return _embedding(cell, recipe)
    raise MappingError(f"{kind.__name__} has no adapted form")


def _linear(
    inner: int, out: int, bias: bool, dtype: DType, recipe: Recipe, activation: Activation | None
) -> Cell:  # fmt: skip
    if recipe.mindpet:
        _refuse_for_mindpet(recipe)
        return LoRADense(
            inner, out, recipe.r, recipe.alpha, float(recipe.dropout), param_init_type=dtype, compute_dtype=dtype,
            weight_init="zeros", has_bias=bias, activation=activation, merge_weights=recipe.merge,
        )  # fmt: skip
    if recipe.enabled is not None:
        recipe.refuse(activation=activation is not None)
        return MergedLinear(
            inner, out, recipe.r, recipe.alpha, recipe.dropout, recipe.enabled, merge_weights=recipe.merge, bias=bias,
            use_rslora=recipe.rslora, use_dora=recipe.dora, lora_bias=recipe.bias, dtype=dtype,
        )  # fmt: skip
    if activation is not None and not isinstance(activation, str):
        return ActivatedLinear(
            inner, out, recipe.r, recipe.alpha, recipe.dropout, activation=activation, merge_weights=recipe.merge,
            bias=bias, use_rslora=recipe.rslora, use_dora=recipe.dora, lora_bias=recipe.bias, dtype=dtype,
        )  # fmt: skip
    return Linear(
        inner, out, recipe.r, recipe.alpha, recipe.dropout, merge_weights=recipe.merge, bias=bias,
        use_rslora=recipe.rslora, use_dora=recipe.dora, lora_bias=recipe.bias, dtype=dtype,
    )  # fmt: skip


def _in_out(cell: InOutDense, recipe: Recipe) -> Cell:
    inner, out, dtype = cell.in_channels, cell.out_channels, cell.weight.dtype
    if recipe.mindpet:
        _refuse_for_mindpet(recipe)
        return InOutLoRADense(
            inner, out, recipe.r, recipe.alpha, float(recipe.dropout), param_init_type=dtype, compute_dtype=dtype,
            merge_weights=recipe.merge,
        )  # fmt: skip
    if recipe.enabled is not None:
        return MergedLinear(
            inner, out, recipe.r, recipe.alpha, recipe.dropout, recipe.enabled, True, recipe.merge,
            use_rslora=recipe.rslora, use_dora=recipe.dora, lora_bias=recipe.bias, dtype=dtype,
        )  # fmt: skip
    return Linear(
        inner, out, recipe.r, recipe.alpha, recipe.dropout, True, recipe.merge, use_rslora=recipe.rslora,
        use_dora=recipe.dora, lora_bias=recipe.bias, dtype=dtype,
    )  # fmt: skip


def _refuse_for_mindpet(recipe: Recipe) -> None:
    recipe.refuse(
        use_rslora=recipe.rslora, use_dora=recipe.dora, lora_bias=recipe.bias, enable_lora=recipe.enabled is not None
    )


def _embedding(cell: Cell, recipe: Recipe) -> Cell:
    recipe.refuse(
        mindpet=recipe.mindpet, lora_bias=recipe.bias, lora_dropout=recipe.dropout,
        enable_lora=recipe.enabled is not None, use_one_hot=getattr(cell, "use_one_hot", False),
    )  # fmt: skip
    made = TokenEmbedding if isinstance(cell, LlamaEmbedding) else Embedding
    table = cell._params[made.adapted]
    rows, columns = table.shape
    return made(
        rows, columns, recipe.r, recipe.alpha, recipe.merge, use_rslora=recipe.rslora, use_dora=recipe.dora,
        dtype=table.dtype,
    )  # fmt: skip


def _convolution(cell: Convolving, kind: type, recipe: Recipe) -> Cell:
    made, dims = CONVOLUTIONS[kind]
    recipe.refuse(mindpet=recipe.mindpet, enable_lora=recipe.enabled is not None)
    recipe.refuse(data_format=getattr(cell, "data_format", "NCHW") not in ("NCHW", "NCDHW", "NCL"))
    stride, dilation, kernel = (_last(sizes, dims) for sizes in (cell.stride, cell.dilation, cell.kernel_size))
    return made(
        cell.in_channels, cell.out_channels, kernel, recipe.r, recipe.alpha, recipe.dropout, recipe.merge,
        stride=stride, padding=_padding(cell, dims, stride), dilation=dilation, groups=cell.group, bias=cell.has_bias,
        conv_form=recipe.conv_form, use_rslora=recipe.rslora, use_dora=recipe.dora, lora_bias=recipe.bias,
        dtype=cell.weight.dtype, native_weight=dims == 1,
    )  # fmt: skip


def _last(sizes: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """Return one number per dimension; MindSpore's Conv1d has a 1 before its own, its Conv3d may have 1s too."""
    return (sizes,) * dims if isinstance(sizes, int) else tuple(sizes)[-dims:]


def _padding(cell: Convolving, dims: int, stride: tuple[int, ...]) -> tuple[int, ...] | str:
    """Return torch's padding; MindSpore's numbers are (before, after) for each dimension."""
    if cell.pad_mode == "valid":
        return "valid"
    if cell.pad_mode == "same":
        if set(stride) != {1}:
            raise MappingError("pad_mode 'same' with a stride pads by the size of the input, which has no LoRA form")
        return "same"
    if isinstance(cell.padding, int):
        return (cell.padding,) * dims
    pads = (
        tuple(cell.padding)[-2 * dims :] if len(cell.padding) > dims else tuple(p for p in cell.padding for _ in "ab")
    )
    before, after = pads[::2], pads[1::2]
    if before != after:
        raise MappingError(f"pads {pads} differ before and after, which has no LoRA form")
    return before
