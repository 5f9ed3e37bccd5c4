"""Which layers of one file compute the same outputs as which layers of the other, row by row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..arithmetic.floats import Bits
from ..axes import Expr, Read, evaluate, reads
from ..conversion.forward import settings_from
from ..conversion.selection import select
from ..dialects.adapter import LoraModule, Scaling, Term
from ..dtypes import BY_NAME
from ..errors import MappingError
from .verify_case import Case

Rows = npt.NDArray[np.int64]
INDEX = BY_NAME["int64"]


@dataclass(frozen=True, slots=True)
class Wire:
    """Output rows ``there`` of a layer of the second file are rows ``here`` of layer ``number`` of the first."""

    number: int
    here: Rows
    there: Rows


@dataclass(frozen=True, slots=True)
class Group:
    """Layers of both files that share outputs: one each, or several where one side fuses what the other keeps apart."""

    first: tuple[int, ...]
    second: tuple[tuple[LoraModule, tuple[Wire, ...]], ...]


def first_modules(case: Case) -> tuple[LoraModule, ...]:
    """Return the first file's modules as its dialect reads them, without those a conversion did not select."""
    adapter = case.first.adapter
    if case.kept is not None:
        settings = settings_from(
            case.kept.options, mappings=None, model_config=None, target_facts=case.kept.chosen
        )  # fmt: skip
        adapter, _ = select(adapter, settings.selection)
    return adapter.modules


def groups(case: Case) -> tuple[tuple[LoraModule, ...], tuple[Group, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the first file's modules, the groups, and the paths that only the first or only the second file has.

    The table that carries factors carries row numbers here: each layer of the first file is given the factors ``a``
    of rank 1 and ``b = 1, 2, 3 ...``, and where these arrive is where its rows are.
    """
    modules = first_modules(case)
    markers = tuple(_marker(number, module) for number, module in enumerate(modules))
    carried = case.route.carry(
        replace(case.first.adapter, modules=markers, extras=()), case.first.names,
        case.second.names,
    )  # fmt: skip
    arrived = {(m.path, _weight(m)): m for m in carried.modules}
    theirs = {(m.path, _weight(m)): m for m in case.second.adapter.modules}
    wired = {key: _wires(arrived[key], modules) for key in theirs if key in arrived}
    return (
        modules,
        tuple(_joined([(theirs[key], wires) for key, wires in wired.items()])),
        tuple(path for path, weight in arrived if (path, weight) not in theirs),
        tuple(path for path, weight in theirs if (path, weight) not in arrived),
    )


def _weight(module: LoraModule) -> str:
    return "weight" if module.kind == "embedding" else module.weight


def _marker(number: int, module: LoraModule) -> LoraModule:
    a, b = module.terms[0].a, module.terms[0].b
    ones = b.shape[2:] if module.conv_form == "peft" else ()
    term = Term(
        Read(f"a{number}", INDEX, (1, *a.shape[1:])), Read(f"b{number}", INDEX, (module.out, 1, *ones)), 0, module.out
    )
    return replace(module, terms=(term,), scaling=Scaling(1, 1), magnitude=None, lora_bias=None)


def _wires(module: LoraModule, modules: tuple[LoraModule, ...]) -> tuple[Wire, ...]:
    wires = []
    for term in module.terms:
        for number in _numbers(term.b):
            numbers = _evaluated(term.b, number, modules[number].out)
            there = np.flatnonzero(numbers)
            wires.append(Wire(number, numbers[there] - 1, there + term.start))
    return tuple(wires)


def _numbers(expr: Expr) -> Iterable[int]:
    return dict.fromkeys(int(name[1:]) for name in reads(expr))


def _evaluated(expr: Expr, number: int, out: int) -> Rows:
    """Return, per row of an expression, the row of one layer that it is, counted from 1; 0 where it is none."""

    def source(name: str) -> Bits:
        count = np.arange(1, out + 1, dtype=np.uint64) if name == f"b{number}" else None
        if count is None:
            raise MappingError("rows of several layers are mixed", where=name, hint="report this defect")
        return count.reshape(-1, 1)

    return np.ascontiguousarray(evaluate(expr, source, {})).reshape(-1).astype(np.int64)


def _joined(wired: list[tuple[LoraModule, tuple[Wire, ...]]]) -> Iterable[Group]:
    """Put layers that have a layer of the first file in common into one group, in the order of the second file."""
    groups: list[tuple[set[int], list[tuple[LoraModule, tuple[Wire, ...]]]]] = []
    for module, wires in wired:
        numbers = {wire.number for wire in wires}
        touching = [group for group in groups if group[0] & numbers]
        for group in touching[1:]:
            touching[0][0].update(group[0])
            touching[0][1].extend(group[1])
            groups.remove(group)
        if touching:
            touching[0][0].update(numbers)
            touching[0][1].append((module, wires))
        else:
            groups.append((numbers, [(module, wires)]))
    return [Group(tuple(sorted(numbers)), tuple(members)) for numbers, members in groups]
