"""Synthetic checkpoints with a different bit pattern in every element, and adapters on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

from lorabridge import axes
from lorabridge.dialects.adapter import Adapter, Extra, LoraModule, Scaling, Term
from lorabridge.dtypes import BY_NAME
from lorabridge.families.tables import Table, load_tables
from lorabridge.tensors import TensorSpec

F64 = BY_NAME["float64"]


@pytest.fixture(scope="session")
def tables() -> dict[str, Table]:
    return load_tables()


@dataclass
class Store:
    """Tensors by name; every new one continues counting, so that no two elements have the same bits."""

    bits: dict[str, npt.NDArray[np.generic]] = field(default_factory=dict)
    at: int = 0

    def read(self, name: str, shape: Iterable[int]) -> axes.Expr:
        spec = TensorSpec(name, F64, tuple(shape))
        self.bits[name] = np.arange(self.at, self.at + spec.size, dtype="<u8").reshape(spec.shape)
        self.at += spec.size
        return axes.read(spec)

    def random(self, name: str, shape: Iterable[int]) -> axes.Expr:
        expr = self.read(name, shape)
        values = np.random.default_rng(len(self.bits)).normal(size=expr.shape)
        self.bits[name] = np.asarray(values).view("<u8")
        return expr

    def value(self, expr: axes.Expr) -> np.ndarray:
        """Evaluate to float64."""
        return np.ascontiguousarray(axes.evaluate(expr, self.bits.__getitem__, {})).view("<f8").reshape(expr.shape)


@pytest.fixture
def store() -> Store:
    return Store()


def model(store: Store, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Return a full model as extras."""
    extras = [Extra(*name.rpartition(".")[::2], store.read(name, shape), "base") for name, shape in shapes.items()]
    return Adapter((), tuple(extras))


def lora(
    store: Store, path: str, out: int, inner: int, *, rank: int = 2, dora: bool = False, alpha: float = 3.0,
    rows: Iterable[tuple[int, int]] = (), name: str = "", bias: bool = False,
) -> LoraModule:  # fmt: skip
    """Return a random module with one term over all rows, or one for each interval of ``rows``."""
    name = name or path
    terms = [
        Term(
            store.random(f"{name}.a{k}", (rank, inner)), store.random(f"{name}.b{k}", (stop - start, rank)), start, stop
        )
        for k, (start, stop) in enumerate(rows or [(0, out)])
    ]
    magnitude = store.random(f"{name}.m", (out,)) if dora else None
    lora_bias = store.random(f"{name}.lb", (out,)) if bias else None
    return LoraModule(path, "linear", out, tuple(terms), Scaling(alpha, rank), magnitude=magnitude, lora_bias=lora_bias)


def delta(store: Store, module: LoraModule, inner: int) -> np.ndarray:
    """Return ``scaling * B @ A`` of all rows, [out, in]."""
    total = np.zeros((module.out, inner))
    for term in module.terms:
        total[term.start : term.stop] += store.value(term.b) @ store.value(term.a)
    return module.scaling.value * total


def reread(adapter: Adapter) -> tuple[Adapter, dict[str, axes.Expr]]:
    """Pretend that a converted model was written and opened again; the second result is what its tensors hold."""
    said = {extra.name: extra.value for extra in adapter.extras}
    extras = [
        Extra(e.path, e.parameter, axes.Read(e.name, e.value.dtype, e.value.shape), e.kind) for e in adapter.extras
    ]
    return Adapter((), tuple(extras)), said
