"""One side of a layer: what its own library needs to run it, read from its own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..arithmetic.numerics import values
from ..axes import Expr, reads
from ..dialects.adapter import Json, LoraModule
from ..dtypes import BY_NAME, DType
from ..errors import MappingError
from ..tensors import Source

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Base:
    """A frozen layer: ``weight`` ``[out, in]`` (embedding ``[num, dim]``, convolution ``[out, in / groups, *kernel]``)
    whatever its storage order, and ``bias`` ``[out]``, None for embeddings and layers without one."""

    weight: Array
    bias: Array | None


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapted module with its factors as the file names and shapes them.

    ``module``: as its dialect reads it. ``tensors``: "a", "b", "magnitude" and "bias", widened exactly to float32 or
    float64. ``config``: the adapter's config, where the dialect has one.
    """

    module: LoraModule
    dialect: str
    tensors: Mapping[str, Array]
    base: Base
    config: Json | None


Run = Callable[[Layer, Array], Array]
"""Compute a layer's output; linear ``[n, in]`` to ``[n, out]``, embedding ids ``[n]`` to ``[n, dim]``, convolution
``[n, in, *size]`` to ``[n, out, *size]``."""


def runner(dialect: str) -> Run:
    """Return what runs the layers of a dialect."""
    if dialect == "peft":
        from .run_torch import run_peft

        return run_peft
    if dialect == "loralib":
        from .run_torch import run_loralib

        return run_loralib
    from .run_mindspore import run_cell

    return run_cell


NEEDS = {
    "peft": ("torch", "peft", "transformers"),
    "loralib": ("torch", "loralib"),
    "loralib-ms": ("mindspore",),
    "mindpet": ("mindspore",),
}
"""Libraries that running a dialect's layers takes."""


def roles(module: LoraModule) -> dict[str, tuple[Expr, ...]]:
    """Return a module's tensors by role, as expressions; terms share one stored factor each."""
    found = {"a": tuple(term.a for term in module.terms), "b": tuple(term.b for term in module.terms)}
    if module.magnitude is not None:
        found["magnitude"] = (module.magnitude,)
    if module.lora_bias is not None:
        found["bias"] = (module.lora_bias,)
    return found


def stored(module: LoraModule, source: Source, dtype: DType) -> dict[str, Array]:
    """Read the tensors behind a module as the file holds them, widened to ``dtype``, exactly.

    MappingError for a type that is not one of its subsets.
    """
    out = {}
    for role, exprs in roles(module).items():
        names = {name for expr in exprs for name in reads(expr)}
        if len(names) != 1:
            raise MappingError(f"{role} is made of {len(names)} tensors", where=module.path, hint="report this defect")
        (name,) = names
        out[role] = widened(source.read(name), source.specs[name].dtype, dtype, where=name)
    return out


def widened(bits: Array, given: DType, dtype: DType, *, where: str) -> Array:
    """Return the values of bits in a wider type, exactly."""
    wanted = np.dtype(dtype.name)
    if given == dtype:
        return bits.view(wanted)
    if given.kind != "float" or given.bits >= dtype.bits:
        raise MappingError(f"{given} is not run as {dtype}", where=where, hint="verify it at depth tensors only")
    if given.name == "float16":
        return np.ascontiguousarray(bits).view(np.float16).astype(wanted)
    return values(bits, given).astype(wanted)


def worker(*modules: LoraModule) -> DType:
    """Return the type in which modules run: float64 where a factor is, else float32."""
    kinds = {expr.dtype.name for module in modules for exprs in roles(module).values() for expr in exprs}
    return BY_NAME["float64" if "float64" in kinds else "float32"]
