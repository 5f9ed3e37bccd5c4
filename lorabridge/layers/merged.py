"""Fused linear layers with LoRA on some of their blocks: loralib's MergedLinear."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from .binding import DType, Tensor, float32, ops, wide
from .initial import check_kind, check_lora, check_sizes
from .linear import Projection


class MergedLinear(Projection):
    """Adapt some blocks of the output rows of a fused linear layer: loralib 0.1.2's ``MergedLinear``.

    ``enable_lora`` names the L blocks of ``out / L`` rows each; the n enabled ones have factors of their own:
    ``lora_A`` ``[r * n, in]``, ``lora_B`` ``[out / L * n, r]``, in the order of the blocks. The other parameters and
    options are those of ``Linear``. With no block enabled the layer is a plain linear one, where loralib fails; DoRA
    needs all blocks enabled, since its magnitudes belong to all rows. Raises TypeError and ValueError for arguments
    out of range, such as an ``enable_lora`` whose length does not divide ``out_features``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
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
        enabled = _checked(enable_lora, out_features)
        count, rows = sum(enabled), out_features // len(enabled)
        rank = r if count else 0
        check_kind(rank, use_dora, lora_bias)
        if use_dora and count < len(enabled):
            raise ValueError("use_dora needs all blocks in enable_lora, since its magnitudes belong to all rows")
        super().__init__(
            in_features, out_features, rank, lora_alpha, lora_dropout,
            shapes=((rank * count, in_features), (rows * count, rank)), fan_in_fan_out=fan_in_fan_out,
            merge_weights=merge_weights, bias=bias, use_rslora=use_rslora, use_dora=use_dora, lora_bias=lora_bias,
            dtype=dtype,
        )  # fmt: skip
        self.enable_lora = enabled
        self.rows = rows
        self.runs = _runs(enabled)
        if use_dora:
            self.reset_magnitude()

    def low_rank(self, x: Tensor) -> Tensor:
        """Return ``x A_i^T B_i^T`` side by side for the blocks, zeros where a block is not enabled."""
        hidden: Tensor = ops.matmul(x, self.lora_A.astype(x.dtype).T)
        factor = self.lora_B.astype(x.dtype)
        r, rows = self.r, self.rows
        parts: tuple[Tensor, ...] = ()
        for block, length in self.runs:
            if block < 0:
                parts = (*parts, ops.zeros((*x.shape[:-1], rows * length), x.dtype))
            else:
                b = factor[block * rows : (block + 1) * rows]
                parts = (*parts, ops.matmul(hidden[..., block * r : (block + 1) * r], b.T))
        y: Tensor = ops.concat(parts, -1)
        return y

    def product(self) -> Tensor:
        """Return the blocks ``B_i A_i`` one above the other, shape ``[out, in]``, in at least float32."""
        a, b = wide(self.lora_A), wide(self.lora_B)
        r, rows = self.r, self.rows
        parts: tuple[Tensor, ...] = ()
        for block, length in self.runs:
            if block < 0:
                parts = (*parts, ops.zeros((rows * length, self.in_features), a.dtype))
            else:
                part = ops.matmul(b[block * rows : (block + 1) * rows], a[block * r : (block + 1) * r])
                parts = (*parts, part)
        product: Tensor = ops.concat(parts, 0)
        return product


def _checked(enable_lora: Sequence[bool], out_features: int) -> tuple[bool, ...]:
    enabled = tuple(enable_lora)
    if not enabled or not all(isinstance(on, bool) for on in enabled):
        raise TypeError(f"enable_lora must be a list of True and False, not {enable_lora!r}")
    if out_features % len(enabled):
        raise ValueError(f"the length of enable_lora, {len(enabled)}, must divide out_features, {out_features}")
    return enabled


def _runs(enabled: Sequence[bool]) -> tuple[tuple[int, int], ...]:
    """Return (index among the enabled blocks, 1) for each enabled block, (-1, length) for each run of others."""
    out: list[tuple[int, int]] = []
    count = 0
    for on, group in groupby(enabled):
        length = len(list(group))
        if on:
            out += [(count + i, 1) for i in range(length)]
            count += length
        else:
            out.append((-1, length))
    return tuple(out)
