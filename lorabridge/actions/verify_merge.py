"""Hold a merged checkpoint against its base and its adapter: merged == base + scaling * B A, rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from ..arithmetic import floats, numerics
from ..arithmetic.floats import Bits
from ..axes import Expr
from ..dialects.adapter import Adapter, Extra, LoraModule, Value
from ..dialects.pairs import weight_names
from ..dtypes import BY_NAME, DType
from ..errors import MappingError
from ..tensors import Source
from .merged_values import Merged, Sums, expected_rows
from .sides import bits_of, numbers_of
from .thin import Thin, norm, thin
from .verify_report import Check, ModuleRow

Step = Callable[[int], None]
BLOCK = 1 << 21
"""Elements of one block of rows; a few arrays of this size in double precision are held."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The adapter and the base, in the names of the merged checkpoint, each over its own file."""

    adapter: Adapter
    adapter_file: Source
    base: Mapping[str, Expr]
    base_file: Source
    merged: Mapping[str, Expr]
    merged_file: Source
    done: set[str] = field(default_factory=set)


def merge_rows(parts: Parts, step: Step) -> tuple[ModuleRow, ...]:
    """Check the weight of every adapted module; ``step`` is called with the bytes of each."""
    rows = []
    for module in _oriented(parts):
        names = weight_names(module.path, module.weight)
        name = next((n for n in names if n in parts.merged), None)
        original = next((n for n in names if n in parts.base), None)
        if name is None or original is None:
            lacking = "DST" if name is None else "BASE"
            rows.append(_row(module, False, note=f"{lacking} has no weight for this module"))
            continue
        parts.done.add(name)
        rows.append(_weight(parts, module, original, name))
        step(parts.merged_file.specs[name].nbytes if name in parts.merged_file.specs else 0)
        if module.lora_bias is not None:
            rows.append(_bias(parts, module))
    return tuple(rows)


def _oriented(parts: Parts) -> list[LoraModule]:
    """Take square weights of which nothing is said to be stored as the others of the file are, as a merge does."""
    seen = set()
    for module in parts.adapter.modules:
        name = next((n for n in weight_names(module.path, module.weight) if n in parts.merged), None)
        shape = () if name is None else parts.merged[name].shape
        if module.kind == "linear" and module.fan_in_fan_out is None and len(shape) == 2 and shape[0] != shape[1]:
            seen.add(stored_in_out(module, shape))
    if len(seen) != 1:
        return list(parts.adapter.modules)
    (turned,) = seen
    return [
        replace(module, fan_in_fan_out=turned) if module.kind == "linear" and module.fan_in_fan_out is None else module
        for module in parts.adapter.modules
    ]


def _row(module: LoraModule, ok: bool | None, note: str = "") -> ModuleRow:
    return ModuleRow(module.path, module.kind, ok, rank=module.scaling.rank, scaling=module.scaling.value, note=note)


def _weight(parts: Parts, module: LoraModule, original: str, name: str) -> ModuleRow:
    """Compare one merged weight with base plus delta, block of rows by block of rows."""
    base, merged = parts.base[original], parts.merged[name]
    if base.shape != merged.shape:
        return _row(module, False, f"{list(merged.shape)} in DST, {list(base.shape)} in BASE")
    if module.kind.startswith("conv") and module.conv_form == "peft" and module.groups > 1:
        return _row(module, None, "peft's factors of a grouped convolution have no single kernel")
    delta = thin(module, parts.adapter_file, peft_form=False)
    turned = stored_in_out(module, merged.shape)
    if not delta.finite:
        return _row(module, False, "the factors hold NaN or infinite values")
    shapes = merged.shape[::-1] if turned else (merged.shape[0], math.prod(merged.shape[1:]))
    loralib = module.conv_form == "loralib" and module.kind.startswith("conv")
    if not loralib and (delta.b.shape[0], delta.a.shape[1]) != shapes:
        return _row(
            module, False, f"the delta is {[delta.b.shape[0], delta.a.shape[1]]}, the weight {list(merged.shape)}"
        )
    magnitude = None if module.magnitude is None else numbers_of(module.magnitude, parts.adapter_file).ravel()
    case = Merged(delta, turned, loralib, magnitude, _halves(merged.dtype, delta))
    sums = Sums(merged.dtype)
    base_bits = bits_of(base, parts.base_file)
    merged_bits = bits_of(merged, parts.merged_file)
    for w, m, expected in expected_rows(case, base_bits, base.dtype, merged_bits, merged.dtype, BLOCK):
        sums.add(w, m, expected)
    return _judged(module, delta, sums)


def _halves(dtype: DType, delta: Thin) -> DType:
    """Return the type in which the delta is taken to have been computed: at least float32."""
    wide = dtype.name == "float64" and delta.a_type == delta.b_type == dtype
    return BY_NAME["float64" if wide else "float32"]


def stored_in_out(module: LoraModule, shape: tuple[int, ...]) -> bool:
    """Say whether the weight is stored ``[in, out]``; MappingError where nothing tells."""
    if module.kind == "embedding":
        return True
    if module.kind != "linear":
        return False
    if module.fan_in_fan_out is not None and (not module.fan_in_fan_out or len(set(shape)) == 1):
        return module.fan_in_fan_out
    columns = module.terms[0].a.shape[1]
    if shape == (module.out, columns) != (columns, module.out):
        return False
    if shape == (columns, module.out) != (module.out, columns):
        return True
    if module.fan_in_fan_out is None and shape == (module.out, columns):
        raise MappingError(
            "nothing says whether a square weight is stored [out, in] or [in, out]",
            where=module.path,
            hint="pass --fan-in-fan-out no (nn.Linear) or --fan-in-fan-out yes (transformers' Conv1D)",
        )
    return bool(module.fan_in_fan_out)


def _judged(module: LoraModule, delta: Thin, sums: Sums) -> ModuleRow:
    ok = sums.broken == 0 and sums.ratio <= 1
    share = (
        f"{sums.inexact} of {sums.elements} elements ({sums.inexact / max(sums.elements, 1):.2g}) not rounded correctly"
    )
    note = (share if sums.inexact else "rounded once") if ok else sums.diagnosis(delta.scaling)
    return ModuleRow(
        module.path, module.kind, ok, rank=module.scaling.rank, scaling=delta.scaling, delta_norm=norm(delta),
        max_abs=sums.max_abs, max_rel=sums.max_rel, ulps=sums.ulps, cosine=sums.cosine, bound=sums.bound,
        ratio=math.nan if sums.broken else sums.ratio, elements=sums.elements, note=note,
    )  # fmt: skip


def _bias(parts: Parts, module: LoraModule) -> ModuleRow:
    """Check base bias plus scaling times the bias of B."""
    name = f"{module.path}.bias"
    assert module.lora_bias is not None
    if name not in parts.base or name not in parts.merged:
        return _row(module, False, f"{name}: the bias of B needs a bias in BASE and in DST")
    parts.done.add(name)
    base, merged = parts.base[name], parts.merged[name]
    if base.shape != merged.shape or merged.shape != module.lora_bias.shape:
        return _row(module, False, f"{name}: {list(merged.shape)} in DST, {list(base.shape)} in BASE")
    b = numbers_of(module.lora_bias, parts.adapter_file).reshape(-1, 1)
    delta = Thin(np.ones((1, 1)), b, module.scaling.value, BY_NAME["float32"], module.lora_bias.dtype)
    case = Merged(delta, False, False, None, BY_NAME["float32"])
    sums = Sums(merged.dtype)
    shape = (merged.shape[0], 1)
    base_bits, merged_bits = (bits_of(base, parts.base_file), bits_of(merged, parts.merged_file))
    for w, m, expected in expected_rows(
        case, base_bits.reshape(shape), base.dtype, merged_bits.reshape(shape), merged.dtype, BLOCK
    ):
        sums.add(w, m, expected)
    row = _judged(module, delta, sums)
    return replace(row, path=name, kind="bias", delta_norm=norm(delta))


def frozen(parts: Parts, step: Step) -> Check:
    """Check every parameter that no factor changes: equal to the base's, or to what the adapter replaces it with."""
    replaced = {extra.name: extra for extra in parts.adapter.extras if extra.kind not in ("trainable_tokens", "buffer")}
    tokens = {extra.path: extra for extra in parts.adapter.extras if extra.kind == "trainable_tokens"}
    wrong: list[str] = []
    same = 0
    for name, expr in parts.merged.items():
        if name in parts.done:
            continue
        path = name.rpartition(".")[0]
        if path in tokens and name in parts.base:
            wrong += _rows_replaced(parts, name, tokens[path])
        elif name in replaced:
            extra = replaced[name]
            wrong += _unlike(name, expr, parts.merged_file, extra.value, parts.adapter_file, "the adapter's")
        elif name in parts.base:
            wrong += _unlike(name, expr, parts.merged_file, parts.base[name], parts.base_file, "BASE's")
        elif not _tied(expr, parts):
            wrong.append(f"{name}: BASE has no such parameter")
        same += 1
        step(parts.merged_file.specs[name].nbytes if name in parts.merged_file.specs else 0)
    known = parts.merged.keys() | parts.done
    for name, expr in parts.base.items():
        if name not in known and not _tied_in_base(name, expr, parts):
            wrong.append(f"{name}: missing in DST")
    return Check("parameters without factors are the base's", not wrong, f"{same} compared", tuple(wrong))


def _rows_replaced(parts: Parts, name: str, extra: Extra) -> list[str]:
    """Say where an embedding is not the base's with the adapter's token rows in the places that its config lists."""
    rows = _token_rows(parts.adapter.config.get("trainable_token_indices"), extra.path)
    merged, base = parts.merged[name], parts.base[name]
    if len(rows) != extra.value.shape[0] or len({merged.dtype, base.dtype, extra.value.dtype}) > 1:
        return [f"{name}: the adapter replaces {extra.value.shape[0]} rows of it, in another type or in unknown places"]
    wanted = bits_of(base, parts.base_file).copy()
    wanted[rows] = bits_of(extra.value, parts.adapter_file)
    off = (bits_of(merged, parts.merged_file) != wanted).any(axis=1)
    where = [int(row) for row in np.flatnonzero(off)[:3]]
    return [f"{name}: {int(off.sum())} rows are wrong, first {where}"] if off.any() else []


def _token_rows(given: Value, path: str) -> list[int]:
    """Return the token numbers that peft's config lists for an embedding, by the end of its path or as the only one."""
    if isinstance(given, dict):
        ends = [value for key, value in given.items() if path == key or path.endswith(f".{key}")]
        given = ends[0] if ends else next(iter(given.values())) if len(given) == 1 else []
    return [number for number in given if isinstance(number, int)] if isinstance(given, list) else []


def _unlike(name: str, one: Expr, mine: Source, two: Expr, theirs: Source, whose: str) -> list[str]:
    """Say where a parameter is not the other one, rounded once to its type."""
    if one.shape != two.shape:
        return [f"{name}: {list(one.shape)}, {whose} {list(two.shape)}"]
    x, y = bits_of(one, mine), bits_of(two, theirs)
    if one.dtype == two.dtype:
        off = 0 if x.tobytes() == y.tobytes() else int((x.reshape(-1) != y.reshape(-1)).sum())
    elif one.dtype.kind == two.dtype.kind == "float":
        off = _rounded_apart(x, one.dtype, y, two.dtype)
    else:
        return [f"{name}: {one.dtype}, {whose} {two.dtype}"]
    return [f"{name}: {off} of {x.size} elements are not {whose}"] if off else []


def _rounded_apart(x: Bits, x_type: DType, y: Bits, y_type: DType) -> int:
    flat, other, off = x.reshape(-1), y.reshape(-1), 0
    for span in floats.spans(flat.size):
        found, wanted = numerics.values(flat[span], x_type), numerics.values(other[span], y_type)
        rounded = floats.rounded(wanted, x_type)
        off += int((~((found == rounded) | (np.isnan(found) & np.isnan(rounded)))).sum())
    return off


def _tied(expr: Expr, parts: Parts) -> bool:
    """Say whether a parameter that BASE lacks is an embedding's second name: bits of BASE's table or of DST's."""
    bits = bits_of(expr, parts.merged_file).tobytes()
    return any(bits_of(e, f).tobytes() == bits for e, f in _twins(expr, parts))


def _tied_in_base(name: str, expr: Expr, parts: Parts) -> bool:
    """Say whether a parameter that DST lacks is, in BASE, the copy of another one."""
    bits = bits_of(expr, parts.base_file).tobytes()
    like = (e for other, e in parts.base.items() if other != name and (e.shape, e.dtype) == (expr.shape, expr.dtype))
    return len(expr.shape) == 2 and any(bits_of(e, parts.base_file).tobytes() == bits for e in like)


def _twins(expr: Expr, parts: Parts) -> Iterator[tuple[Expr, Source]]:
    for names, file in ((parts.base, parts.base_file), (parts.merged, parts.merged_file)):
        for other in names.values():
            if other is not expr and len(expr.shape) == 2 and (other.shape, other.dtype) == (expr.shape, expr.dtype):
                yield other, file
