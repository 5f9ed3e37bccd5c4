"""Depth *layers*: run each adapted layer with its own library on both sides, on the same inputs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .. import frameworks
from ..arithmetic.floats import Numbers
from ..axes import Expr
from ..dialects.adapter import LoraModule
from ..dialects.pairs import weight_names
from ..dialects.peft_config import unsupported_fields
from ..dtypes import DType
from ..errors import LorabridgeError, MappingError
from ..tensors import Source
from . import bounds
from .layer_bounds import Rounded, layer_bound, rounded_between
from .layer_groups import Group, Wire, groups
from .layer_inputs import generator, inputs, random_base, weight_shape
from .layer_side import NEEDS, Array, Base, Layer, runner, stored, widened, worker
from .sides import Side, bits_of
from .thin import norm, thin
from .verify_case import Case, Progress
from .verify_inputs import VerifyOptions
from .verify_merge import stored_in_out
from .verify_report import DepthResult, ModuleRow
from .verify_tensors import meter

Parameters = Mapping[str, Expr]
LIBRARY_FAILURES = (LorabridgeError, RuntimeError, ValueError, TypeError, KeyError, NotImplementedError)
"""What a library raises when it cannot hold or run a layer: a finding about the files, not about lorabridge."""


def inapplicable(case: Case) -> str:
    """Say why two files have no adapted layers to compare; empty where they have."""
    if case.relation in ("merge", "record"):
        return "a merged checkpoint has no adapter to run"
    if not (case.first.is_adapter and case.second.is_adapter):
        return "the files hold no adapter"
    return ""


def refusal(case: Case) -> str:
    """Say what is missing to run the layers of two files; empty where nothing is."""
    names = sorted({side.dialect.name for side in (case.first, case.second)} - NEEDS.keys())
    if names:
        return f"layers run as {', '.join(NEEDS)}, not as {', '.join(names)}"
    for side in (case.first, case.second):
        odd = unsupported_fields(side.adapter.config)
        if odd:
            return f"{side.role}: {odd[0][0]}: {odd[0][1]}"
    return frameworks.refusal(*_libraries(case))


def _libraries(case: Case) -> list[str]:
    return sorted({name for side in (case.first, case.second) for name in NEEDS[side.dialect.name]})


@dataclass(frozen=True, slots=True)
class _Work:
    """One run: the first file's modules, and the base's parameters in the names of either file."""

    case: Case
    seed: int
    modules: tuple[LoraModule, ...]
    first_base: Parameters
    second_base: Parameters


def verify_layers(case: Case, options: VerifyOptions, progress: Progress | None = None) -> DepthResult:
    """Run every adapted layer on both sides and hold the outputs against a bound derived from types and widths.

    One group of layers is in memory at a time. Raises MappingError where a table refuses the base, UsageError where a
    framework cannot be imported.
    """
    started = time.perf_counter()
    modules, joined, only_first, only_second = groups(case)
    work = _Work(case, options.seed, modules, *(_carried(case, side) for side in (case.first, case.second)))
    step = meter("layers", sum(_weight_bytes(group) for group in joined), progress)
    rows: list[ModuleRow] = []
    libraries = _libraries(case)
    for name in libraries:
        frameworks.load(name)
    with frameworks.exact_arithmetic(*libraries), frameworks.prompt_collection() as collect:
        for group in joined:
            rows += _group(work, group)
            collect()
            step(_weight_bytes(group))
    for paths, role in ((only_first, case.first.role), (only_second, case.second.role)):
        rows += [ModuleRow(path, "", False, note=f"only {role} has this module") for path in paths]
    order = {module.path: i for i, module in enumerate(case.second.adapter.modules)}
    rows.sort(key=lambda row: order.get(row.path, len(order)))
    return DepthResult("layers", "run", "", _proved(case, modules), (), tuple(rows), time.perf_counter() - started)


def _weight_bytes(group: Group) -> int:
    return sum(4 * int(np.prod(weight_shape(module))) for module, _ in group.second)


def _carried(case: Case, side: Side) -> Parameters:
    if case.base is None:
        return {}
    adapter = case.route.carry(case.base.adapter, case.base.names, side.names)
    return {extra.name: extra.value for extra in adapter.extras}


def _proved(case: Case, modules: Sequence[LoraModule]) -> tuple[str, ...]:
    libraries = {"peft": "torch and peft", "loralib": "torch and loralib"}
    sides = [libraries.get(side.dialect.name, "lorabridge's MindSpore cells") for side in (case.first, case.second)]
    said = [f"{case.first.role} run by {sides[0]}, {case.second.role} by {sides[1]}, each from its own file"]
    if case.base is None:
        said.append("frozen weights are random, as large as the deltas, since no --base was given")
    factors = (e for m in (*modules, *case.second.adapter.modules) for t in m.terms for e in (t.a, t.b))
    narrow = sorted({e.dtype.name for e in factors} - {"float32", "float64"})
    if narrow:
        said.append(
            f"{' and '.join(narrow)} factors were widened to float32, exactly, and run in float32 on both sides"
        )
    return tuple(said)


def _group(work: _Work, group: Group) -> Iterator[ModuleRow]:
    """Run one group and compare the layers of the second file row by row."""
    case = work.case
    firsts = {number: work.modules[number] for number in group.first}
    why = _not_run(work, firsts.values(), group)
    for module, wires in group.second:
        if why:
            yield replace(_row(module, wires, firsts), ok=None, note=why)
    if why:
        return
    dtype = worker(*firsts.values(), *(module for module, _ in group.second))
    rng = generator(work.seed, group.second[0][0].path)
    try:
        bases = {n: _first_base(work, module, dtype, rng) for n, module in firsts.items()}
        x = inputs(next(iter(firsts.values())), next(iter(bases.values())), rng, dtype)
        outputs = {n: _side(case.first, module, bases[n], x, dtype) for n, module in firsts.items()}
    except LIBRARY_FAILURES as error:
        failed = f"{case.first.role} cannot be run: {_text(error)}"
        yield from (replace(_row(m, wires, firsts), ok=False, note=failed) for m, wires in group.second)
        return
    for module, wires in group.second:
        row = _row(module, wires, firsts)
        try:
            base = _second_base(work, module, wires, bases, rng, dtype)
            between = _between(firsts, module, wires)
            found = _side(case.second, module, base, x, dtype, between)
        except LIBRARY_FAILURES as error:
            yield replace(row, ok=False, note=f"{case.second.role} cannot be run: {_text(error)}")
            continue
        yield _compared(row, found, _wired(outputs, wires, base, x, module, dtype), dtype)


def _text(error: BaseException) -> str:
    text = error.problem if isinstance(error, LorabridgeError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]


def _row(module: LoraModule, wires: Sequence[Wire], firsts: Mapping[int, LoraModule]) -> ModuleRow:
    origin = ", ".join(dict.fromkeys(firsts[wire.number].path for wire in wires))
    return ModuleRow(
        module.path, module.kind, True, origin, rank=module.scaling.rank, scaling=module.scaling.value
    )  # fmt: skip


def _not_run(work: _Work, firsts: object, group: Group) -> str:
    """Say why the layers of a group are not run, for lack of a layer that computes what they mean."""
    modules = [work.modules[n] for n in group.first] + [module for module, _ in group.second]
    fused = {m.path for m in (*work.modules, *work.case.second.adapter.modules) if m.weight == "in_proj_weight"}
    if any(m.path in fused or m.path.rpartition(".")[0] in fused for m in modules):
        return "projections of nn.MultiheadAttention have no layer of their own; depth tensors compares them"
    kept = work.case.kept
    if kept is not None and any(f"compress.{module.path}" in kept.options for module, _ in group.second):
        return "compressed on purpose: its outputs differ by what was left out"
    return ""


@dataclass(frozen=True, slots=True)
class _Output:
    """What one layer computed, ``[n, out]``, and how far each element may be from the exact one."""

    y: Numbers
    bound: Numbers
    delta_norm: float


def _side(
    side: Side, module: LoraModule, base: Base, x: Array, dtype: DType, between: Rounded | None = None
) -> _Output:  # fmt: skip
    tensors = stored(module, side.source, dtype)
    bound, size = layer_bound(module, side.source, base, x, dtype, between or Rounded())
    layer = Layer(module, side.dialect.name, tensors, base, side.adapter.config)
    y = runner(side.dialect.name)(layer, x)
    if module.kind.startswith("conv"):
        y = np.moveaxis(y, 1, -1).reshape(-1, module.out)
    return _Output(y.astype(np.float64), bound, size)


def _first_base(work: _Work, module: LoraModule, dtype: DType, rng: np.random.Generator) -> Base:
    if work.case.base is not None:
        return _real_base(work.first_base, work.case.base.source, module, dtype)
    return random_base(module, norm(thin(module, work.case.first.source, peft_form=False)), rng, dtype)


def _second_base(
    work: _Work, module: LoraModule, wires: Sequence[Wire], bases: Mapping[int, Base], rng: np.random.Generator,
    dtype: DType,
) -> Base:  # fmt: skip
    """Return the second file's frozen layer: from the base's file by the table, or rows of the first's."""
    if work.case.base is not None:
        return _real_base(work.second_base, work.case.base.source, module, dtype)
    one = bases[wires[0].number]
    same_rows = len(wires) == 1 and np.array_equal(wires[0].here, wires[0].there)
    if same_rows and len(wires[0].here) == module.out and one.weight.shape == weight_shape(module):
        return one
    made = random_base(module, norm(thin(module, work.case.second.source, peft_form=False)), rng, dtype)
    for wire in wires:
        made.weight[wire.there] = bases[wire.number].weight[wire.here]
        given = bases[wire.number].bias
        if made.bias is not None and given is not None:
            made.bias[wire.there] = given[wire.here]
    return made


def _real_base(parameters: Parameters, source: Source, module: LoraModule, dtype: DType) -> Base:
    name = next((n for n in weight_names(module.path, module.weight) if n in parameters), None)
    if name is None:
        raise MappingError("BASE has no weight for the layer", where=module.path, hint="check --base and --family")
    expr, shape = parameters[name], weight_shape(module)
    weight = widened(bits_of(expr, source), expr.dtype, dtype, where=name)
    if module.kind == "linear" and len(expr.shape) == 2 and stored_in_out(module, expr.shape):
        weight = np.ascontiguousarray(weight.T)
    if module.kind == "conv1d" and weight.ndim == 4:
        weight = weight[:, :, 0]
    if weight.shape != shape:
        raise MappingError(f"BASE has {list(weight.shape)}, the factors need {list(shape)}", where=name)
    beside = f"{module.path}.bias"
    bias = parameters.get(beside) if module.kind != "embedding" else None
    values = None if bias is None else widened(bits_of(bias, source), bias.dtype, dtype, where=beside)
    return Base(weight, values)


def _between(firsts: Mapping[int, LoraModule], module: LoraModule, wires: Sequence[Wire]) -> Rounded:
    found = [rounded_between(firsts[wire.number], module) for wire in wires]
    return Rounded(max(r.delta for r in found), max(r.beside for r in found))


def _wired(
    outputs: Mapping[int, _Output], wires: Sequence[Wire], base: Base, x: Array, module: LoraModule, dtype: DType
) -> _Output:
    """Put the first file's outputs where the second's rows are; rows that nothing adapts are the frozen layer's."""
    first = outputs[wires[0].number]
    y, bound = np.full((len(first.y), module.out), np.nan), np.zeros((len(first.y), module.out))
    for wire in wires:
        y[:, wire.there] = outputs[wire.number].y[:, wire.here]
        bound[:, wire.there] = outputs[wire.number].bound[:, wire.here]
    bare = np.setdiff1d(np.arange(module.out), np.concatenate([wire.there for wire in wires]))
    if bare.size:
        y[:, bare] = x.astype(np.float64) @ base.weight[bare].astype(np.float64).T
        y[:, bare] += 0.0 if base.bias is None else base.bias[bare]
    return _Output(y, bound, first.delta_norm)


def _compared(row: ModuleRow, found: _Output, wanted: _Output, dtype: DType) -> ModuleRow:
    """Hold two outputs against the sum of their bounds."""
    row = replace(row, delta_norm=found.delta_norm, elements=found.y.size)
    if found.y.shape != wanted.y.shape:
        return replace(row, ok=False, note=f"outputs of shape {list(wanted.y.shape)} and {list(found.y.shape)}")
    allowed = found.bound + wanted.bound
    finite = np.isfinite(found.y) & np.isfinite(wanted.y) & np.isfinite(allowed)
    if not finite.all():
        bad = int((~finite).sum())
        note = f"{bad} of {finite.size} outputs are NaN or infinite"
        return replace(row, ok=False, note=note, max_abs=float("nan"), ratio=float("nan"))
    error = np.abs(found.y - wanted.y)
    larger = np.maximum(np.abs(found.y), np.abs(wanted.y))
    ratio = np.divide(error, allowed, out=np.where(error > 0, np.inf, 0.0), where=allowed > 0)
    worst = int(np.argmax(ratio))
    relative = np.divide(error, larger, out=np.zeros_like(error), where=larger > 0)
    size = float(np.linalg.norm(found.y) * np.linalg.norm(wanted.y))
    return replace(
        row,
        ok=bool(ratio.max() <= 1),
        max_abs=float(error.max()),
        max_rel=float(relative.max()),
        ulps=float(bounds.ulps(error, larger, dtype).max()),
        cosine=float(np.vdot(found.y, wanted.y)) / size if size else None,
        bound=float(allowed.flat[worst]),
        ratio=float(ratio.flat[worst]),
        note="" if ratio.max() <= 1 else "outputs differ by more than rounding explains",
    )
