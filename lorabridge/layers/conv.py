"""Convolutions with LoRA: loralib's ConvLoRA for one, two and three dimensions, and peft's factors beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from .binding import Cell, DType, Parameter, Tensor, bfloat16, float32, lift, must_upcast, nn, ops, wide
from .convolve import Convolution, Geometry, Sizes, checked_geometry
from .initial import check_kind, check_lora, check_sizes, uniform, zeros
from .state import Merging, norm_beside

Form = Literal["loralib", "peft"]


class ConvLoRA(Merging, Cell):
    """Share what the convolutions of all dimensions have in common; use ``Conv1d``, ``Conv2d`` or ``Conv3d``.

    Options are loralib 0.1.2's and torch's: ``stride``, ``padding`` (numbers, ``"same"``, ``"valid"``), ``dilation``,
    ``groups``, ``bias``; zeros are padded. Parameters: ``weight`` ``[out, in/groups, *kernel]`` (it does not train
    when ``r > 0``), ``bias`` ``[out]``, and factors in one of two forms:

    ``conv_form="loralib"``: ``lora_A`` ``[r*k, in*k]``, ``lora_B`` ``[out/groups * k**(dims-1), r*k]`` for a kernel
    of one side length k; the delta is ``(B @ A).view(weight.shape)`` and is added to the kernel, so ``lora_dropout``
    has no effect, as in loralib. In two dimensions this is loralib; in one and three dimensions loralib's own
    ``lora_B`` has ``out/groups * k`` rows, whose view fails for k above 1. Ours is the natural extension: as many rows
    as the view needs, everything else alike, so that k = 1 and two dimensions are loralib's.

    ``conv_form="peft"``: ``lora_A`` ``[r, in, *kernel]``, ``lora_B`` ``[out, r/groups, 1, ...]``, the convolution by A
    (with the layer's stride, padding and dilation) followed by the one by B. peft 0.21 leaves the dilation out of A,
    which fits neither its own merge nor, without ``"same"`` padding, the output's size; ours keeps it. With groups,
    A sees the channels of all groups: no single kernel holds that, so such a layer stays unmerged, as in peft.

    ``use_rslora``, ``use_dora`` (``lora_magnitude_vector`` ``[1, out, 1, ...]``; not for peft's form with groups) and
    ``lora_bias`` ``[out]`` are as in ``Linear``. Input ``[batch, in, *size]`` or ``[in, *size]``. Raises TypeError
    and ValueError for arguments out of range.
    """

    dims = 0

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        *,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        conv_form: Form = "loralib",
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        dtype: DType = float32,
        native_weight: bool = False,
    ) -> None:
        check_sizes(in_channels=in_channels, out_channels=out_channels, groups=groups)
        check_lora(r, lora_alpha, lora_dropout, dtype)
        check_kind(r, use_dora, lora_bias)
        geometry = checked_geometry(self.dims, kernel_size, stride, padding, dilation)
        _check_groups(in_channels, out_channels, groups)
        _check_form(conv_form, geometry.kernel, r, groups, use_dora)
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.geometry, self.kernel_size = geometry, geometry.kernel
        self.r, self.lora_alpha, self.merge_weights = r, lora_alpha, merge_weights
        self.conv_form, self.use_rslora, self.use_dora = conv_form, use_rslora, use_dora
        self.upcast = must_upcast(bfloat16)
        self.mergeable = conv_form == "loralib" or groups == 1
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r) if r else 0.0
        dropout = lora_dropout if r and conv_form == "peft" else 0.0
        self.lora_dropout: Cell | None = nn.Dropout(p=float(dropout)) if dropout else None
        self.kernel_shape = (out_channels, in_channels // groups, *geometry.kernel)
        fan_in = math.prod(self.kernel_shape[1:])
        self.weight = uniform("weight", self.stored_shape(native_weight), fan_in, dtype)
        self.bias = uniform("bias", (out_channels,), fan_in, dtype) if bias else None
        self.lora_bias: Parameter | None = None
        self.convolve = Convolution(geometry, out_channels, groups)
        if r:
            self.weight.requires_grad = False
            self.add_factors(dtype, lora_bias)

    def stored_shape(self, native: bool) -> tuple[int, ...]:
        """Return the shape in which the base weight is stored: torch's."""
        if native:
            raise ValueError("native_weight is for Conv1d; MindSpore's other kernels have torch's shape")
        return self.kernel_shape

    def add_factors(self, dtype: DType, lora_bias: bool) -> None:
        """Make the factors, and what goes with them."""
        r, ones = self.r, (1,) * self.dims
        if self.conv_form == "loralib":
            side, rows = self.kernel_size[0], self.out_channels // self.groups * self.kernel_size[0] ** (self.dims - 1)
            fan_in = self.in_channels * side
            self.lora_A = uniform("lora_A", (r * side, fan_in), fan_in, dtype)
            self.lora_B = zeros("lora_B", (rows, r * side), dtype)
        else:
            shape = (r, self.in_channels, *self.kernel_size)
            self.lora_A = uniform("lora_A", shape, math.prod(shape[1:]), dtype)
            self.lora_B = zeros("lora_B", (self.out_channels, r // self.groups, *ones), dtype)
            self.convolve_a = Convolution(self.geometry, r, 1)
            self.convolve_b = Convolution(Geometry.pointwise(self.dims), self.out_channels, self.groups)
        if lora_bias:
            self.lora_bias = zeros("lora_bias", (self.out_channels,), dtype)
        if self.use_dora:
            self.lora_magnitude_vector = zeros("lora_magnitude_vector", (1, self.out_channels, *ones), dtype)
            self.reset_magnitude()

    def delta(self) -> Tensor:
        """Return the scaled delta in the stored weight's shape, in at least float32."""
        a, b = wide(self.lora_A), wide(self.lora_B)
        if self.conv_form == "peft":
            a, b = a.reshape((self.r, -1)), b.reshape((self.out_channels, -1))
        product: Tensor = ops.matmul(b, a)
        return product.reshape(self.weight.shape) * self.scaling

    def construct(self, x: Tensor) -> Tensor:
        """Return the layer's output, ``[batch, out, *size]`` or ``[out, *size]``, in the input's type."""
        kind, single = x.dtype, x.ndim == self.dims + 1
        x = lift(ops.expand_dims(x, 0) if single else x, self.upcast)
        if not self.r or self.merged:
            y = self.convolve(x, self.kernel(self.weight.astype(x.dtype)))
        elif self.conv_form == "loralib":
            y = self.convolve(x, self.kernel(self.adapted_kernel().astype(x.dtype)))
        else:
            y = self.adapt(x, self.convolve(x, self.kernel(self.weight.astype(x.dtype))))
        ones = (1,) * self.dims
        if self.bias is not None:
            y = y + self.bias.astype(y.dtype).reshape((1, -1, *ones))
        if self.lora_bias is not None:
            y = y + self.lora_bias.astype(y.dtype).reshape((1, -1, *ones)) * self.scaling
        return y[0].astype(kind) if single else y.astype(kind)

    def kernel(self, weight: Tensor) -> Tensor:
        """Return a stored weight as ``[out, in/groups, *kernel]``."""
        return weight.reshape(self.kernel_shape)

    def adapted_kernel(self) -> Tensor:
        """Return base plus delta, with DoRA's magnitudes; gradients reach the factors, not the norms."""
        total = wide(self.weight) + self.delta()
        if not self.use_dora:
            return total
        norm: Tensor = ops.stop_gradient(norm_beside(total, 0))
        return total * (wide(self.lora_magnitude_vector).reshape(norm.shape) / norm)

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the adapter's part in peft's form to the base's convolution ``y``."""
        dropped = x if self.lora_dropout is None else self.lora_dropout(x)
        hidden = self.convolve_a(dropped, self.lora_A.astype(x.dtype))
        update = self.convolve_b(hidden, self.lora_B.astype(x.dtype)) * self.scaling
        if not self.use_dora:
            return y + update
        norm: Tensor = ops.stop_gradient(norm_beside(wide(self.weight) + self.delta(), 0))
        scale = (wide(self.lora_magnitude_vector) / norm.reshape((1, -1, *(1,) * self.dims))).astype(y.dtype)
        plain = y
        if self.lora_dropout is not None:
            plain = self.convolve(dropped, self.kernel(self.weight.astype(x.dtype)))
        return y + (scale - 1.0) * plain + scale * update


class Conv1d(ConvLoRA):
    """Adapt a one-dimensional convolution; options, parameters and forms are those of ``ConvLoRA``.

    The base weight is ``[out, in/groups, k]``, as torch, mint.nn and converted files have it; ``native_weight=True``
    stores it as ``[out, in/groups, 1, k]``, as ``mindspore.nn.Conv1d`` does, to stand in for that cell.
    """

    dims = 1

    def stored_shape(self, native: bool) -> tuple[int, ...]:
        """Return the shape in which the base weight is stored."""
        out, width, side = self.kernel_shape
        return (out, width, 1, side) if native else (out, width, side)


class Conv2d(ConvLoRA):
    """Adapt a two-dimensional convolution; options, parameters and forms are those of ``ConvLoRA``."""

    dims = 2


class Conv3d(ConvLoRA):
    """Adapt a three-dimensional convolution; options, parameters and forms are those of ``ConvLoRA``."""

    dims = 3


def _check_groups(in_channels: int, out_channels: int, groups: int) -> None:
    if in_channels % groups or out_channels % groups:
        raise ValueError(f"groups {groups} must divide in_channels {in_channels} and out_channels {out_channels}")


def _check_form(form: str, kernel: Sequence[int], r: int, groups: int, use_dora: bool) -> None:
    if form not in ("loralib", "peft"):
        raise ValueError(f"conv_form must be 'loralib' or 'peft', not {form!r}")
    if form == "loralib" and len(set(kernel)) > 1 and r:
        raise ValueError(
            f"loralib's factors need a kernel of one side length, not {tuple(kernel)}; use conv_form='peft'"
        )
    if form == "peft" and r % groups:
        raise ValueError(f"groups {groups} must divide r {r} in peft's form")
    if form == "peft" and use_dora and groups > 1:
        raise ValueError("use_dora needs a single kernel, which peft's factors of a grouped convolution have not")
