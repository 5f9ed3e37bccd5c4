"""Plain convolutions of one, two and three dimensions with torch's geometry, on MindSpore's primitives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .binding import Cell, Tensor, ops

Sizes = int | Sequence[int]


@dataclass(frozen=True, slots=True)
class Geometry:
    """Say how a kernel moves: one number per dimension; ``pads`` holds (before, after) pairs."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @staticmethod
    def pointwise(dims: int) -> Geometry:
        """Return the geometry of a kernel of size one."""
        ones = (1,) * dims
        return Geometry(ones, ones, ((0, 0),) * dims, ones)


def checked_geometry(dims: int, kernel: Sizes, stride: Sizes, padding: Sizes | str, dilation: Sizes) -> Geometry:
    """Read torch's arguments; "same" pads as torch does, the odd zero after. Raises TypeError or ValueError."""
    sizes = _per_dimension("kernel_size", kernel, dims, 1)
    strides = _per_dimension("stride", stride, dims, 1)
    dilations = _per_dimension("dilation", dilation, dims, 1)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be numbers, 'same' or 'valid', not {padding!r}")
        if padding == "same" and set(strides) != {1}:
            raise ValueError("padding 'same' needs stride 1, as in torch")
        totals = [d * (k - 1) if padding == "same" else 0 for k, d in zip(sizes, dilations, strict=True)]
        pads = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pads = tuple((pad, pad) for pad in _per_dimension("padding", padding, dims, 0))
    return Geometry(sizes, strides, pads, dilations)


def _per_dimension(name: str, value: Sizes, dims: int, least: int) -> tuple[int, ...]:
    sizes = (value,) * dims if isinstance(value, int) else tuple(value)
    if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise TypeError(f"{name} must be integers, not {value!r}")
    if len(sizes) == 1:
        sizes *= dims
    if len(sizes) != dims or min(sizes) < least:
        raise ValueError(f"{name} must be {dims} integers of at least {least}, not {value!r}")
    return sizes


class Convolution(Cell):
    """Convolve ``x [batch, in, *size]`` with a kernel ``[out, in/groups, *kernel]`` that is given at each call."""

    def __init__(self, geometry: Geometry, out_channels: int, groups: int) -> None:
        super().__init__()
        self.dims = len(geometry.kernel)
        # MindSpore's Conv3D has no groups on the CPU: the groups run one by one
        self.split = groups if self.dims == 3 else 1
        flat = _as_2d(geometry) if self.dims == 1 else geometry
        options = {
            "out_channel": out_channels // self.split,
            "kernel_size": flat.kernel,
            "pad_mode": "pad",
            "pad": tuple(side for pair in flat.pads for side in pair),
            "stride": flat.stride,
            "dilation": flat.dilation,
        }
        self.run = ops.Conv3D(**options) if self.dims == 3 else ops.Conv2D(**options, group=groups)

    def construct(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Return the convolution, ``[batch, out, *size]``."""
        if self.dims == 1:
            flat: Tensor = self.run(ops.expand_dims(x, 2), ops.expand_dims(kernel, 2))
            return ops.squeeze(flat, 2)  # type: ignore[no-any-return]
        if self.split == 1:
            return self.run(x, kernel)  # type: ignore[no-any-return]
        width, rows = x.shape[1] // self.split, kernel.shape[0] // self.split
        parts: tuple[Tensor, ...] = ()
        for group in range(self.split):
            part = self.run(x[:, group * width : (group + 1) * width], kernel[group * rows : (group + 1) * rows])
            parts = (*parts, part)
        y: Tensor = ops.concat(parts, 1)
        return y


def _as_2d(geometry: Geometry) -> Geometry:
    return Geometry((1, *geometry.kernel), (1, *geometry.stride), ((0, 0), *geometry.pads), (1, *geometry.dilation))
