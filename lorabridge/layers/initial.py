"""First values of the layers' parameters, distributed as in loralib 0.1.2 and torch 2; checks of options.

``kaiming_uniform_`` with ``a = sqrt(5)`` is the uniform distribution on ``(-1/sqrt(fan_in), 1/sqrt(fan_in))``
(He et al. 2015; torch.nn.init).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from .binding import FLOATS, DType, Parameter, initializers


def uniform(name: str, shape: Sequence[int], fan_in: int, dtype: DType) -> Parameter:
    """Make a parameter with values uniform on +-1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
    return Parameter(initializers.initializer(initializers.Uniform(bound), list(shape), dtype), name=name)


def normal(name: str, shape: Sequence[int], dtype: DType) -> Parameter:
    """Make a parameter with standard normal values."""
    return Parameter(initializers.initializer(initializers.Normal(1.0, 0.0), list(shape), dtype), name=name)


def zeros(name: str, shape: Sequence[int], dtype: DType) -> Parameter:
    """Make a parameter of zeros."""
    return Parameter(initializers.initializer("zeros", list(shape), dtype), name=name)


def check_sizes(**sizes: int) -> None:
    """Raise TypeError unless all are integers, ValueError unless all are positive."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, not {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be positive, not {value}")


def check_lora(r: int, alpha: float, dropout: float, dtype: DType) -> None:
    """Raise TypeError or ValueError for a rank, alpha, dropout probability or element type that no layer can have."""
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be an integer, not {r!r}")
    if r < 0:
        raise ValueError(f"r must not be negative, not {r}; 0 means no adapter")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"lora_alpha must be a number, not {alpha!r}")
    if not math.isfinite(alpha):
        raise ValueError(f"lora_alpha must be finite, not {alpha}")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float):
        raise TypeError(f"lora_dropout must be a number, not {dropout!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout must be at least 0 and below 1, not {dropout}")
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, not {dtype}")


def check_kind(r: int, use_dora: bool, lora_bias: bool) -> None:
    """Raise ValueError for DoRA together with a bias on B, which peft refuses too, and for either without a rank."""
    if use_dora and lora_bias:
        raise ValueError("use_dora and lora_bias exclude each other, as in peft; leave one out")
    if not r and (use_dora or lora_bias):
        raise ValueError("use_dora and lora_bias need an adapter; give r, or leave them out")
