"""Bring the parameters of bottleneck adapters through a family table: by the names of the layers that they follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from ..axes import read
from ..dialects.adapter import Adapter, Extra, LoraModule, Scaling, Term
from ..dialects.deltas import deltas
from ..dtypes import BY_NAME
from ..errors import MappingError
from ..families import tables
from ..tensors import TensorSpec


def map_deltas(
    adapter: Adapter, table: tables.Table, *, to: Literal["hf", "ms"], layout: Mapping[str, str]
) -> tuple[Extra, ...]:
    """Return the parameters with their layers' names on the other side.

    A linear layer stands in for each; MappingError for layers that the other side fuses, splits or lays out otherwise:
    an adapter after a part of an output is none after the whole.
    """
    found = deltas(adapter)
    paths = list(dict.fromkeys(extra.path for extra in found if extra.path))
    mapped = tables.map_adapter(table, Adapter(tuple(_stand_in(path) for path in paths)), to=to, layout=layout)
    names = {path: module.path for module in mapped.modules for path in paths if _is(module, path)}
    fused = [path for path in paths if path not in names]
    if fused:
        raise MappingError(
            f"the {table.family} table does not take these layers over one by one", where=fused,
            hint="choose a layout that keeps them apart (--layout): an adapter after a fused layer is another function",
        )  # fmt: skip
    return tuple(replace(extra, path=names.get(extra.path, extra.path)) for extra in found)


def _stand_in(path: str) -> LoraModule:
    dtype = BY_NAME["float32"]
    a, b = (read(TensorSpec(f"{path} {name}", dtype, shape)) for name, shape in (("a", (1, 1)), ("b", (1, 1))))
    return LoraModule(path, "linear", 1, (Term(a, b, 0, 1),), Scaling(1.0, 1))


def _is(module: LoraModule, path: str) -> bool:
    """Say whether a mapped module is the stand-in of a path, untouched."""
    (term,) = module.terms if len(module.terms) == 1 else (None,)
    own = _stand_in(path).terms[0]
    return term is not None and module.out == 1 and (term.a, term.b) == (own.a, own.b)
