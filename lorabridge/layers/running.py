"""Reference networks with weights and adapters from checkpoints, run block by block."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import LorabridgeError
from . import binding as ms
from .binding import Cell, Tensor, context, nn
from .models import build
from .replace import Dialect, replace_layers

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class AdaptedCell:
    """One adapted cell as a checkpoint states it; ``enable``: the blocks of a MergedLinear, empty otherwise."""

    path: str
    r: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    bias: bool = False
    enable: tuple[bool, ...] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A network, and what of the checkpoint did not fit: ``missing`` parameters, ``unexpected`` tensors or cells."""

    network: Cell
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def blocks(self) -> list[str]:
        """Return the paths of the transformer's blocks, first to last."""
        for path, cell in self.network.cells_and_names():
            if isinstance(cell, nn.CellList):
                return [f"{path}.{i}" for i in range(len(cell))]
        return []


def load(
    config: Mapping[str, object],
    architecture: str,
    base: Mapping[str, Array],
    cells: Sequence[AdaptedCell] = (),
    adapter: Mapping[str, Array] | None = None,
    *,
    dialect: Dialect = "loralib-ms",
) -> Loaded:
    """Build the network of a config in float32 and load base parameters and an adapter by their names.

    ``base``, ``adapter``: numbers by parameter name; those of the adapter replace the base's, none may be left over.
    Raises MappingError for a config that has no reference network.
    """
    network = build(config, architecture=architecture)
    unexpected = []
    for cell in cells:
        try:
            replace_layers(
                network, re.escape(cell.path), r=cell.r, lora_alpha=cell.alpha, dialect=dialect,
                use_rslora=cell.rslora, use_dora=cell.dora, lora_bias=cell.bias, enable_lora=cell.enable or None,
            )  # fmt: skip
        except (LorabridgeError, TypeError, ValueError) as error:
            unexpected.append(f"{cell.path}: {' '.join(str(error).split())}")
    parameters = {parameter.name: parameter for _, parameter in network.parameters_and_names()}
    given = {**base, **(adapter or {})}
    for name, value in given.items():
        place = parameters.pop(name, None)
        if place is None:
            unexpected.append(f"{name}: the network has no such parameter")
        elif tuple(place.shape) != value.shape:
            unexpected.append(f"{name}: shape {list(value.shape)}, the network's is {list(place.shape)}")
        else:
            place.set_data(_tensor(value))
    return Loaded(network.set_train(False), tuple(parameters), tuple(unexpected))


def run(
    loaded: Loaded, ids: Array, mask: Array | None = None, types: Array | None = None
) -> tuple[dict[str, Array], tuple[Array, ...]]:
    """Return the output of every block by its path, and the network's own outputs, all float64.

    ``types``: token types, for BERT only. PyNative mode, whatever mode is set; the mode is set back afterwards.
    """
    seen: dict[str, Array] = {}

    def keep(path: str) -> object:
        def hook(cell: Cell, given: object, out: Tensor | tuple[Tensor, ...]) -> None:
            seen[path] = (out[0] if isinstance(out, tuple) else out).asnumpy().astype(np.float64)

        return hook

    cells = dict(loaded.network.cells_and_names())
    with _pynative():
        handles = [cells[path].register_forward_hook(keep(path)) for path in loaded.blocks()]  # type: ignore[attr-defined]
        try:
            kept = np.ones_like(ids) if mask is None and types is not None else mask
            integers = [_integers(value) for value in (ids, kept, types) if value is not None]
            made: Tensor | tuple[Tensor, ...] = loaded.network(*integers)
        finally:
            for handle in handles:
                handle.remove()
    outputs = made if isinstance(made, tuple) else (made,)
    return seen, tuple(out.asnumpy().astype(np.float64) for out in outputs)


def _tensor(value: Array) -> Tensor:
    return ms.Tensor(np.ascontiguousarray(value, np.float32))  # type: ignore[call-arg]


def _integers(value: Array) -> Tensor:
    return ms.Tensor(np.ascontiguousarray(value, np.int32))  # type: ignore[call-arg]


@contextmanager
def _pynative() -> Iterator[None]:
    before = context.get_context("mode")
    context.set_context(mode=context.PYNATIVE_MODE)
    try:
        yield
    finally:
        context.set_context(mode=before)
