"""Compare adapters module by module from their files alone: bits where factors correspond, thin deltas where not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..arithmetic import floats, numerics
from ..arithmetic.floats import Numbers
from ..axes import Expr
from ..dialects.adapter import Adapter, LoraModule
from ..dtypes import DType
from ..errors import MappingError
from ..tensors import Source
from . import bounds
from .sides import bits_of, numbers_of
from .thin import Difference, Thin, difference, norm, thin
from .verify_report import Check, ModuleRow

Step = Callable[[int], None]
Likeness = Literal["rounded", "near", "factored", "different"]
"""DST's factors are SRC's, each rounded at most once; rounded more often, as other programs do; another factorization;
or neither."""
NOTES = {"rounded": "rounded once", "near": "equal to within rounding", "factored": "another factorization"}


@dataclass(frozen=True, slots=True)
class Both:
    """The adapters of SRC, in DST's names, and of DST, each over its own file."""

    first: Adapter
    first_file: Source
    second: Adapter
    second_file: Source

    def pairs(self) -> Iterator[tuple[LoraModule | None, LoraModule | None]]:
        """Yield modules with equal paths and weights, then those that only one side has."""
        mine = {(m.path, _weight(m)): m for m in self.first.modules}
        theirs = {(m.path, _weight(m)): m for m in self.second.modules}
        for key, module in theirs.items():
            yield mine.get(key), module
        for key, module in mine.items():
            if key not in theirs:
                yield module, None


def _weight(module: LoraModule) -> str:
    """Name the weight; what only says that a layer is an embedding is its kind."""
    return "weight" if module.kind == "embedding" else module.weight


def compare(both: Both, step: Step) -> tuple[ModuleRow, ...]:
    """Compare every module; ``step`` is called with the bytes of each."""
    rows: list[ModuleRow] = []
    kept: dict[str, tuple[LoraModule, LoraModule]] = {}
    for first, second in both.pairs():
        if first is None or second is None:
            rows.append(_alone(first, second))
            continue
        row = _compare(first, both.first_file, second, both.second_file)
        rows.append(row)
        if row.ok is False:
            kept[row.path] = first, second
        step(sum(term.a.shape[0] * (term.a.shape[-1] + module.out) for module in (first, second)
                 for term in module.terms) * 4)  # fmt: skip
    return tuple(_exchanged(row, kept, both) for row in rows)


def _alone(first: LoraModule | None, second: LoraModule | None) -> ModuleRow:
    module = first or second
    assert module is not None
    note = "only SRC has this module" if second is None else "only DST has this module"
    return ModuleRow(module.path, module.kind, False, rank=module.scaling.rank, scaling=module.scaling.value, note=note)


def _compare(first: LoraModule, mine: Source, second: LoraModule, theirs: Source) -> ModuleRow:
    row = ModuleRow(second.path, second.kind, True, origin=_origin(first), rank=second.scaling.rank,
                    scaling=second.scaling.value)  # fmt: skip
    try:
        one, two = _aligned(first, mine, second, theirs)
    except MappingError as error:
        return replace(row, ok=False, note=error.problem)
    if first.kind != second.kind or one.a.shape[1] != two.a.shape[1] or one.b.shape[0] != two.b.shape[0]:
        return replace(row, ok=False, note=f"{_shape(first, one)} in SRC, {_shape(second, two)} in DST")
    row = _deltas(row, one, two, same_bits=_same_bits(first, mine, second, theirs))
    for what, x, y in (("DoRA magnitude", first.magnitude, second.magnitude),
                       ("lora_bias", first.lora_bias, second.lora_bias)):  # fmt: skip
        problem = _beside(what, x, mine, y, theirs)
        if problem:
            row = replace(row, ok=False, note="; ".join(filter(None, (row.note, problem))))
    return row


def _origin(module: LoraModule) -> str:
    """Name the tensors that a module of SRC is made of, since its path is in DST's names."""
    from ..axes import reads

    names = dict.fromkeys(name for term in module.terms for expr in (term.a, term.b) for name in reads(expr))
    return ", ".join(names)


def _aligned(first: LoraModule, mine: Source, second: LoraModule, theirs: Source) -> tuple[Thin, Thin]:
    """Read both in one form: as they are where their forms agree, else conv factors in peft's."""
    both_loralib = first.conv_form == second.conv_form == "loralib" and first.groups == second.groups
    one, two = thin(first, mine, peft_form=not both_loralib), thin(second, theirs, peft_form=not both_loralib)
    if one.a.shape != two.a.shape:
        one, two = one.compact(), two.compact()
    return one, two


def _shape(module: LoraModule, delta: Thin) -> str:
    return f"{module.kind} [{delta.b.shape[0]}, {delta.a.shape[1]}]"


def _same_bits(first: LoraModule, mine: Source, second: LoraModule, theirs: Source) -> bool:
    """Say whether both files hold the same factors, term for term, bit for bit."""
    if len(first.terms) != len(second.terms) or first.conv_form != second.conv_form:
        return False
    for x, y in zip(first.terms, second.terms, strict=True):
        if (x.start, x.stop) != (y.start, y.stop):
            return False
        for one, two in ((x.a, y.a), (x.b, y.b)):
            if not _equal_bits(one, mine, two, theirs):
                return False
    return True


def _equal_bits(one: Expr, mine: Source, two: Expr, theirs: Source) -> bool:
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return bits_of(one, mine).tobytes() == bits_of(two, theirs).tobytes()


def _deltas(row: ModuleRow, one: Thin, two: Thin, *, same_bits: bool) -> ModuleRow:
    """Decide whether two deltas are equal, and measure how far they are apart."""
    if same_bits and one.scaling == two.scaling:
        note = "" if one.finite else "NaN or infinite values, equal on both sides"
        return replace(row, delta_norm=norm(two), max_abs=0.0, max_rel=0.0, ulps=0.0, cosine=_one(two), bound=0.0,
                       ratio=0.0, note=note)  # fmt: skip
    like, allowed, how = _held_against(one, two)
    found = difference(one, two)
    apart = 0.0 if like == "rounded" and _values_equal(one, two) else found.apart
    noise = bounds.qr_noise(one.b.shape[0], one.a.shape[1], one.a.shape[0] + two.a.shape[0]) * _mass(one, two)
    bound = allowed + noise
    ok = like != "different" and (like == "rounded" or apart <= bound)
    larger = max(found.first, found.second)
    row = replace(
        row, ok=ok, delta_norm=found.second, max_abs=apart, max_rel=apart / larger if larger else 0.0,
        cosine=found.cosine, bound=0.0 if apart == 0 else bound,
        ratio=0.0 if apart == 0 else apart / bound if bound else math.inf,
    )  # fmt: skip
    if ok:
        return replace(row, note="" if apart == 0 and like == "rounded" else NOTES[like])
    if not (one.finite and two.finite):
        return replace(row, note=_nonfinite(one, two), ratio=math.nan, bound=0.0)
    if like == "different":  # factor by factor they must agree: any error is beyond the bound
        row = replace(row, bound=0.0, ratio=math.inf)
    return replace(row, note=_diagnosis(one, two, found) or how)


def _mass(one: Thin, two: Thin) -> float:
    """Return a bound of the size of the stacked factors' product, for the noise of double precision."""
    left = math.hypot(float(np.linalg.norm(one.b)) * one.scaling, float(np.linalg.norm(two.b)) * two.scaling)
    return left * math.hypot(float(np.linalg.norm(one.a)), float(np.linalg.norm(two.a)))


def _one(delta: Thin) -> float | None:
    return 1.0 if delta.finite and delta.b.any() and delta.a.any() else None


def _values_equal(one: Thin, two: Thin) -> bool:
    """Say whether the products agree factor by factor, a power of two between the scalings apart."""
    if one.a.shape != two.a.shape or not np.array_equal(one.a, two.a):
        return False
    (m1, e1), (m2, e2) = math.frexp(one.scaling), math.frexp(two.scaling)
    return m1 == m2 and np.array_equal(np.ldexp(one.b, e1 - e2), two.b)


def _held_against(one: Thin, two: Thin) -> tuple[Likeness, float, str]:
    """Say how DST's factors come from SRC's, what that may change in the delta, and why they are different."""
    ratio = one.scaling / two.scaling if two.scaling else math.nan
    if one.a.shape != two.a.shape:
        return "factored", _reach(one, two), ""
    sides = (("A", one.a, one.a_type, two.a, two.a_type, 1.0), ("B", one.b, one.b_type, two.b, two.b_type, ratio))
    rounded = [_is_rounded(*side[1:]) for side in sides]
    if all(rounded):
        return "rounded", _reach(one, two), ""
    near = [fits or _is_near(*side[1:]) for fits, side in zip(rounded, sides, strict=True)]
    if all(near):
        return "near", 3 * _reach(one, two), ""
    if any(near):
        if near[0] and np.array_equal(one.b, two.b):
            return "different", 0.0, f"the factors agree, the scaling is {two.scaling:g} instead of {one.scaling:g}"
        other = "B" if near[0] else "A"
        return "different", 0.0, f"lora_{other} differs in {_count(one, two, other)}"
    return "factored", _reach(one, two), ""


def _is_near(x: Numbers, x_type: DType | None, y: Numbers, y_type: DType | None, factor: float) -> bool:
    """Say whether ``y`` is ``factor * x`` to within three roundings (as others scale), or ``x`` is ``y`` rounded."""
    if y_type is None or x_type is None or not math.isfinite(factor):
        return False
    if factor == 1.0:
        return x_type != y_type and bool(np.array_equal(floats.rounded(y, x_type), x))
    allowed, wanted = bounds.gamma(3, bounds.roundoff(y_type)), x * factor
    return bool((np.abs(y - wanted) <= allowed * np.abs(wanted) + bounds.smallest(y_type)).all())


def _count(one: Thin, two: Thin, which: str) -> str:
    x, y = (one.a, two.a) if which == "A" else (one.b, two.b)
    off = x.view(np.int64) != y.view(np.int64)
    return f"{int(off.sum())} of {off.size} elements"


def _is_rounded(x: Numbers, x_type: DType | None, y: Numbers, y_type: DType | None, factor: float) -> bool:
    """Say whether ``y`` is ``factor * x`` rounded once to its type; bit for bit where nothing rounds."""
    if factor == 1.0 and (x_type == y_type or y_type is None):
        return bool(np.array_equal(x.view(np.int64), y.view(np.int64)))
    if y_type is None or x_type is None or not math.isfinite(factor):
        return False
    if factor == 1.0:
        return bool(np.array_equal(floats.rounded(x, y_type), y))
    try:
        made, _ = numerics.scaled(floats.encode(x, x_type), x_type, factor, y_type)
    except MappingError:
        return False
    return bool(np.array_equal(numerics.values(made, y_type), y))


def _reach(one: Thin, two: Thin) -> float:
    """Bound what one rounding of each element to DST's types changes: ``(1 + u_a)(1 + u_b) - 1`` of ``|b| |a|``."""
    u = [0.0, 0.0]
    for i, (x, y, moved) in enumerate(
        ((one.a_type, two.a_type, False), (one.b_type, two.b_type, one.scaling != two.scaling))
    ):
        if y is not None and (x != y or moved):
            u[i] = max(bounds.roundoff(y), bounds.roundoff(x) if x is not None else 0.0)
    return (u[0] + u[1] + u[0] * u[1]) * (one.reach() if one.finite else 0.0)


def _nonfinite(one: Thin, two: Thin) -> str:
    sides = [name for name, delta in (("SRC", one), ("DST", two)) if not delta.finite]
    return f"NaN or infinite values in {' and '.join(sides)}"


def _diagnosis(one: Thin, two: Thin, found: Difference) -> str:
    """Guess what went wrong, where a simple mistake explains the difference entirely."""
    factor = found.factor
    close = 1e-6 * max(found.first, found.second)
    if factor is not None and factor != 1 and found.beside(factor) <= max(close, 1e-7 * found.second):
        root = math.sqrt(one.a.shape[0])
        hint = ", as if rsLoRA were set on one side only" if _near(factor, root) or _near(factor * root, 1) else ""
        return f"DST's delta is {factor:.6g} times SRC's{hint}"
    if one.a.shape != two.a.shape:
        return ""
    if one.b.shape == two.a.T.shape and np.array_equal(one.a.T, two.b) and np.array_equal(one.b.T, two.a):
        return "A and B are exchanged and transposed"
    for name, x, y, same in (("A", one.a, two.a, np.array_equal(one.b, two.b)),
                             ("B", one.b, two.b, np.array_equal(one.a, two.a))):  # fmt: skip
        if same and np.array_equal(x.T.reshape(x.shape), y):
            return f"lora_{name} is transposed"
    return ""


def _near(x: float, y: float) -> bool:
    return abs(x - y) <= 1e-6 * abs(y)


def _exchanged(row: ModuleRow, kept: Mapping[str, tuple[LoraModule, LoraModule]], both: Both) -> ModuleRow:
    """Say so where a module that differs holds what belongs to another one that differs."""
    if row.path not in kept or not row.delta_norm or not math.isfinite(row.delta_norm):
        return row
    module = kept[row.path][1]
    for path, (first, _) in kept.items():
        if path != row.path and first.out == module.out and len(first.terms) == len(module.terms):
            shapes = [(t.a.shape, t.b.shape) for m in (first, module) for t in m.terms]
            if shapes[: len(shapes) // 2] == shapes[len(shapes) // 2 :] and _same_bits(
                first, both.first_file, module, both.second_file
            ):
                return replace(row, note=f"holds what SRC has for {path}")
    return row


def _beside(what: str, x: Expr | None, mine: Source, y: Expr | None, theirs: Source) -> str:
    """Compare a vector beside the factors; empty where it is equal."""
    if x is None and y is None:
        return ""
    if x is None or y is None:
        values = numbers_of(y, theirs) if y is not None else numbers_of(x, mine) if x is not None else np.zeros(0)
        if what == "lora_bias" and not values.any():
            return ""
        return f"only {'DST' if x is None else 'SRC'} has a {what}"
    one, two = numbers_of(x, mine).ravel(), numbers_of(y, theirs).ravel()
    if one.shape != two.shape:
        return f"the {what} has {one.size} elements in SRC, {two.size} in DST"
    if _equal_bits(x, mine, y, theirs) or _is_rounded(one, x.dtype, two, y.dtype, 1.0):
        return ""
    off = int((one.view(np.int64) != two.view(np.int64)).sum())
    return f"the {what} differs in {off} of {one.size} elements"


def extras(both: Both) -> Check:
    """Compare the tensors beside the factors by name: whole modules, biases, token rows, base weights."""
    mine = {(e.name, e.kind == "trainable_tokens"): e for e in both.first.extras}
    theirs = {(e.name, e.kind == "trainable_tokens"): e for e in both.second.extras}
    wrong = [f"{key[0]}: only SRC has it" for key in mine if key not in theirs]
    wrong += [f"{key[0]}: only DST has it" for key in theirs if key not in mine]
    for key in mine.keys() & theirs.keys():
        x, y = mine[key].value, theirs[key].value
        if x.shape != y.shape:
            wrong.append(f"{key[0]}: {list(x.shape)} in SRC, {list(y.shape)} in DST")
        elif not _equal_bits(x, both.first_file, y, both.second_file):
            problem = (
                _beside("parameter", x, both.first_file, y, both.second_file) if x.dtype.kind == "float" else "bits"
            )
            if problem or x.dtype == y.dtype:
                wrong.append(f"{key[0]}: {problem or 'bits differ'}")
    count = len(mine.keys() & theirs.keys())
    return Check("tensors beside the factors", not wrong, f"{count} compared", tuple(sorted(wrong)))
