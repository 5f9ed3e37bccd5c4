"""What depth *model* runs: which files make up either network, decided before a framework is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from .. import frameworks
from ..dialects.adapter import Adapter, Json
from ..dtypes import DType
from ..errors import LorabridgeError, MappingError, UsageError
from ..families import tables
from .bounds import roundoff
from .sides import Side
from .verify_architecture import Architecture, architecture
from .verify_case import Case

NEEDS = ("torch", "transformers", "mindspore")


@dataclass(frozen=True, slots=True)
class Half:
    """One framework's network: a whole model's weights, and an adapter on top with the file that holds it."""

    weights: Side
    holder: Side | None = None
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything decided before a framework is imported.

    ``rounded``: (the half whose numbers are rounded first, to what type), where the other half's file holds them in a
    coarser type.
    """

    torch: Half
    mindspore: Half
    table: tables.Table
    layout: Mapping[str, str]
    config: Json
    ms_config: Json
    architecture: Architecture
    rounded: tuple[Half, DType] | None = None

    def rounding(self, half: Half) -> DType | None:
        """Return the type to which a half's own numbers are rounded; None where they stay as they are."""
        return self.rounded[1] if self.rounded is not None and self.rounded[0] is half else None


def refusal(case: Case) -> str:
    """Say why the depth cannot run for two files, in one line; empty where it can."""
    try:
        setup = prepare(case)
    except LorabridgeError as error:
        return one_line(error)
    needed = [*NEEDS, *(["peft"] if is_peft(setup.torch) else [])]
    return frameworks.refusal(*needed)


def one_line(error: LorabridgeError) -> str:
    """Spell an error as the reason of a refusal: its problem and its first places."""
    return f"{error.problem} ({'; '.join(error.where[:3])})" if error.where else error.problem


def prepare(case: Case) -> Setup:
    """Decide which files make up either network; a LorabridgeError says what is missing or not supported."""
    torch, mindspore = _halves(case)
    config = torch.weights.given.model_config or mindspore.weights.given.model_config
    if config is None:
        raise UsageError("the model's config.json is not there", where=str(torch.weights.given.path))
    holders = [half.adapter for half in (torch, mindspore) if half.adapter is not None]
    chosen = architecture(config, holders)
    own = (mindspore.holder or mindspore.weights).given.model_config
    table = _table(case, str(config.get("model_type")))
    known = {layout.name for layout in table.layouts}
    layout = {name: choice for name, choice in chosen.layout.items() if name in known}
    sizes = tables.sizes_from_config(table, config)
    torch = _carried(torch, table, "torch", sizes, layout)
    mindspore = _carried(mindspore, table, "mindspore", sizes, layout)
    if torch.adapter is not None and not is_peft(torch):
        _check_mergeable(torch.adapter)
    return Setup(
        torch, mindspore, table, layout, chosen.adjusted(config), chosen.adjusted(own or config), chosen,
        _rounded(torch, mindspore),
    )  # fmt: skip


def _halves(case: Case) -> tuple[Half, Half]:
    first, second, base = case.first, case.second, case.base
    if case.kept is not None and any(name.startswith("compress.") for name in case.kept.options):
        raise UsageError(f"{second.role} was compressed on purpose and computes something else")
    if case.record is not None:
        raise UsageError("needs the adapter: verify ADAPTER MERGED --base BASE --model")
    if case.relation == "merge":
        if base is None:
            raise UsageError("needs the model itself: --base BASE")
        if case.weight != 1:
            raise UsageError(f"the deltas count {case.weight:g} times in {second.role}, and once in {first.role}")
        adapted, merged = Half(base, first, first.adapter), Half(second)
        return (merged, adapted) if second.dialect.framework == "torch" else (adapted, merged)
    if first.is_adapter:
        if base is None:
            raise UsageError("needs the model that the adapter belongs to: --base BASE")
        if first.adapter.merged or second.adapter.merged:
            raise UsageError("the base weights in the adapter's file already hold the delta")
        halves = Half(base, first, first.adapter), Half(base, second, second.adapter)
    else:
        halves = Half(first), Half(second)
    turned = first.dialect.framework == "mindspore" and second.dialect.framework == "torch"
    return (halves[1], halves[0]) if turned else halves


def _table(case: Case, model_type: str) -> tables.Table:
    """Return the family table: the one between the files, else the one that names the model's type."""
    if case.route.table is not None and not case.route.table.identity:
        return case.route.table
    for table in tables.load_tables().values():
        if model_type in table.model_types:
            return table
    raise MappingError(f"no table for the model type {model_type!r}")


def _carried(
    half: Half, table: tables.Table, framework: str, sizes: Mapping[str, int], layout: Mapping[str, str]
) -> Half:
    """Give an adapter the names of the framework that it is to run in."""
    if half.adapter is None or half.holder is None or half.holder.dialect.framework == framework:
        return half
    to = tables.map_adapter(
        table, half.adapter, to="hf" if framework == "torch" else "ms", sizes=sizes, layout=layout
    )  # fmt: skip
    return replace(half, adapter=to)


def _check_mergeable(adapter: Adapter) -> None:
    odd = [
        module.path
        for module in adapter.modules
        if module.magnitude is not None or module.lora_bias is not None or module.kind not in ("linear", "embedding")
    ]
    if odd:
        raise UsageError("DoRA, lora biases and convolutions run in torch as a peft adapter only", where=odd)


def _rounded(torch: Half, mindspore: Half) -> tuple[Half, DType] | None:
    """Find the half that holds finer numbers than the other; None where types agree or are mixed."""
    if (torch.adapter is None) != (mindspore.adapter is None):
        return None  # a merged checkpoint is rounded as a whole
    types = [{dtype for dtype in _types(half) if dtype.kind == "float"} for half in (torch, mindspore)]
    if len(types[0]) != 1 or len(types[1]) != 1 or types[0] == types[1]:
        return None
    one, other = types[0].pop(), types[1].pop()
    return (torch, other) if roundoff(other) > roundoff(one) else (mindspore, one)


def _types(half: Half) -> Iterator[DType]:
    held = half.adapter if half.adapter is not None else half.weights.adapter
    for module in held.modules:
        for term in module.terms:
            yield from (term.a.dtype, term.b.dtype)
    yield from (extra.value.dtype for extra in held.extras)


def is_peft(half: Half) -> bool:
    """Say whether peft itself can load the adapter."""
    return half.holder is not None and half.holder.dialect.name == "peft"
