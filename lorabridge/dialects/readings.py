"""What the shapes of a bare factor pair can mean: the one reading that fits, or the statement that is missing."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import cast

from ..axes import ShapeError, read
from ..tensors import TensorSpec
from . import factors
from .adapter import LoraModule, ModuleKind, Term
from .pairs import EMBEDDING_WEIGHTS, Reader, flag, in_mindspore, weight_names

KINDS = ("linear", "embedding", "conv1d", "conv2d", "conv3d")
EMBEDDING_WORDS = ("emb", "wte", "wpe")
CONV_NAME = re.compile(r"(^|_)conv(\d?d)?\d*($|_)")
"""Last components that name a convolution, whose bare factors look like those of a linear layer."""
Specs = Mapping[str, TensorSpec]


def read_pair(reader: Reader, path: str, weight: str, specs: Specs) -> LoraModule | None:
    """Read one module; None after noting a problem in ``reader``."""
    base = next((reader.rest[name] for name in weight_names(path, weight) if name in reader.rest), None)
    kind = _kind(reader, path, specs, base)
    if kind is None:
        return None
    if kind == "linear":
        module = _linear(reader, path, weight, specs, base)
    elif kind == "embedding":
        module = _embedding(reader, path, specs, base)
    elif len(specs["a"].shape) > 2:
        module = _peft_conv(reader, path, kind, specs)
    else:
        module = _loralib_conv(reader, path, kind, specs, base)
    return module


def _kind(reader: Reader, path: str, specs: Specs, base: TensorSpec | None) -> ModuleKind | None:
    stated = reader.fact(path, "kind")
    if stated is not None:
        if stated in KINDS:
            return cast(ModuleKind, stated)
        reader.problems.add(f"unknown kind {stated!r}", path, f"correct --kind: one of {', '.join(KINDS)}")
        return None
    dot = f"{path}." if path else ""
    axes = len(specs["a"].shape)
    if axes == 2 and base is not None:
        axes = len(base.shape)
    if axes > 5:
        reader.problems.add(f"{axes} axes are more than a convolution has", path, "check the file")
        return None
    if axes > 2:
        return cast(ModuleKind, f"conv{axes - 2}d")
    if any(dot + name in reader.rest for name in EMBEDDING_WEIGHTS):
        return "embedding"
    if base is not None:
        return _matrix_kind(reader, path, specs, base)
    if f"{dot}conv.bias" in reader.rest or reader.fact(path, "kernel_size") is not None:
        return _conv_kind(reader, path)
    if _embedding_like(path):
        _asked(reader, path, "nothing in the file says whether")
    elif CONV_NAME.search(path.rpartition(".")[2].lower()):
        reader.problems.add(
            "nothing in the file says whether the layer is a convolution or linear",
            path,
            "give --kernel-size (PATTERN=K for one module), or say --kind PATTERN=linear",
        )
    else:
        return "linear"
    return None


def _embedding_like(path: str) -> bool:
    last = path.rpartition(".")[2].lower()
    return any(word in last for word in EMBEDDING_WORDS)


def _asked(reader: Reader, path: str, why: str) -> None:
    reader.problems.add(
        f"{why} the layer is an embedding or linear",
        path,
        "say which with --kind PATTERN=embedding or --kind PATTERN=linear",
    )


def _matrix_kind(reader: Reader, path: str, specs: Specs, base: TensorSpec) -> ModuleKind | None:
    """Tell a linear weight ``[out, in]`` from an embedding ``[num, dim]``, which a transposed linear one looks like."""
    a, b = specs["a"].shape, specs["b"].shape
    if a[0] != b[1] or base.shape != (a[1], b[0]):
        return "linear"
    if base.shape == (b[0], a[1]) and not _embedding_like(path):
        return "linear"
    if reader.fact(path, "fan_in_fan_out") is True and not _embedding_like(path):
        return "linear"
    _asked(reader, path, "the shapes do not tell whether")
    return None


def _conv_kind(reader: Reader, path: str) -> ModuleKind | None:
    kernel = _stated_kernel(reader, path)
    if kernel is None:
        reader.problems.add(
            "the kernel size is not stored in the file", path, "give it with --kernel-size, or include conv.weight"
        )
        return None
    if len(kernel) in (2, 3):
        return "conv2d" if len(kernel) == 2 else "conv3d"
    if kernel[0] > 1:
        return "conv2d"  # the only convolution of loralib that runs with a kernel above 1
    reader.problems.add("kernel 1 fits conv1d, conv2d and conv3d", path, "say which with --kind")
    return None


def _stated_kernel(reader: Reader, path: str) -> tuple[int, ...] | None:
    value = reader.fact(path, "kernel_size")
    sizes = value if isinstance(value, list) else [value]
    if value is None or not sizes:
        return None
    if not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes):
        reader.problems.add(f"kernel_size {value!r} is not positive integers", path, "correct --kernel-size")
        return None
    return tuple(cast("list[int]", sizes))


def _misfit(reader: Reader, path: str, specs: Specs, base: TensorSpec | None = None) -> None:
    tensors = [*specs.values(), *([base] if base else [])]
    shapes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in tensors)
    reader.problems.add("shapes do not fit together", f"{path}: {shapes}", "check --kind, --kernel-size and the file")


def _beside(specs: Specs) -> dict[str, object]:
    """Return DoRA's magnitude and the bias on B, for the dialects that have them."""
    return {
        field: read(specs[role]) for role, field in (("magnitude", "magnitude"), ("bias", "lora_bias")) if role in specs
    }


def _module(path: str, kind: ModuleKind, out: int, terms: tuple[Term, ...], specs: Specs, **more: object) -> LoraModule:
    return LoraModule(path, kind, out, terms, **more, **_beside(specs))  # type: ignore[arg-type]


def _whole(specs: Specs, out: int) -> tuple[Term, ...]:
    return (Term(read(specs["a"]), read(specs["b"]), 0, out),)


def _embedding(reader: Reader, path: str, specs: Specs, base: TensorSpec | None) -> LoraModule | None:
    a, b = specs["a"].shape, specs["b"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (base is not None and base.shape != (a[1], b[0])):
        _misfit(reader, path, specs, base)
        return None
    return _module(path, "embedding", b[0], _whole(specs, b[0]), specs, scaling=reader.scaling(path, a[0]))


def _linear(reader: Reader, path: str, weight: str, specs: Specs, base: TensorSpec | None) -> LoraModule | None:
    """Read Linear or MergedLinear; which blocks are enabled must be stated unless the shapes leave one possibility."""
    a, b = specs["a"].shape, specs["b"].shape
    count = a[0] // b[1] if len(a) == len(b) == 2 and b[1] else 0
    if not count or a[0] % b[1] or b[0] % count:
        _misfit(reader, path, specs)
        return None
    rows = b[0] // count
    fits = _base_readings(reader, path, a[1], b[0], rows, base)
    stated = reader.number(path, "out_features")
    outs = {out for out, _ in fits} & ({stated} if stated else {out for out, _ in fits})
    if base is not None and not outs:
        _misfit(reader, path, specs, base)
        return None
    if base is None and stated:
        outs = {stated}
    mask = _mask(reader, path, count, rows, outs)
    if mask is None:
        return None
    try:
        terms, out = factors.blocks(read(specs["a"]), read(specs["b"]), mask)
    except ShapeError:
        _misfit(reader, path, specs)
        return None
    orders = {order for found, order in fits if found == out}
    order = orders.pop() if len(orders) == 1 else reader.switch(path, "fan_in_fan_out")
    scaling = reader.scaling(path, b[1])
    return _module(path, "linear", out, terms, specs, scaling=scaling, weight=weight, fan_in_fan_out=order)


def _base_readings(
    reader: Reader, path: str, features: int, least: int, rows: int, base: TensorSpec | None
) -> set[tuple[int, bool]]:
    """Return the (out, fan_in_fan_out) that a base weight allows."""
    if base is None or len(base.shape) != 2:
        return set()
    (x, y), stated = base.shape, reader.switch(path, "fan_in_fan_out")
    both = {(x, False, y), (y, True, x)}
    fits = {(out, turned) for out, turned, inner in both if inner == features and out >= least and out % rows == 0}
    return {fit for fit in fits if stated is None or fit[1] == stated}


def _mask(reader: Reader, path: str, count: int, rows: int, outs: set[int]) -> tuple[bool, ...] | None:
    stated = reader.fact(path, "enable_lora")
    if stated is not None and not (isinstance(stated, list) and all(isinstance(on, bool) for on in stated)):
        reader.problems.add(f"enable_lora {stated!r} is not a list of yes and no", path, "correct --enable-lora")
        return None
    mask = tuple(bool(on) for on in stated) if isinstance(stated, list) else ()
    if sum(mask) == count and (not outs or rows * len(mask) in outs):
        return mask
    plain = count == 1 and (not outs or rows in outs)
    if plain:
        return (True,)
    lengths = {out // rows for out in outs}
    if not mask and lengths == {count}:
        return (True,) * count
    if mask:
        told = f"enable_lora {list(mask)} does not fit {count} enabled blocks of {rows} rows"
        reader.problems.add(told, path, "correct --enable-lora")
        return None
    of = f" of {lengths.pop()}" if len(lengths) == 1 else ""
    reader.problems.add(
        f"{count}{of} blocks of a MergedLinear are enabled, and the file does not say which",
        path,
        "list them with --enable-lora, for example --enable-lora T,F,T",
    )
    return None


def _loralib_conv(
    reader: Reader, path: str, kind: ModuleKind, specs: Specs, base: TensorSpec | None
) -> LoraModule | None:
    """Read ``A[r*k, in*k]``, ``B[out/groups * k**(d-1), r*k]`` with k from the base weight or a fact."""
    dims, a, b = int(kind[4]), specs["a"].shape, specs["b"].shape
    kernel = base.shape[2:] if base is not None else _stated_kernel(reader, path)
    if kernel is None:
        reader.problems.add("the kernel size is not stored in the file", path, "give it with --kernel-size")
        return None
    if dims == 1 and len(kernel) == 2 and kernel[0] == 1:
        kernel = kernel[1:]  # MindSpore stores 1d kernels as [out, in, 1, k]
    if len(set(kernel)) != 1 or len(kernel) not in (1, dims):
        reader.problems.add(f"kernel {list(kernel)} is none of loralib's", path, f"correct {flag('kernel_size')}")
        return None
    side, ours = kernel[0], in_mindspore(reader.content)
    if side > 1 and dims != 2 and not ours:
        told = f"loralib's factorization is not defined for {kind} with kernel {side}"
        reader.problems.add(told, path, "check --kind and --kernel-size")
        return None
    groups, steps = reader.number(path, "groups") or 1, side ** (dims - 1)
    if base is not None and base.shape[1]:
        groups = a[1] // side // base.shape[1]
    fits = len(b) == 2 and groups and not (a[0] % side or a[1] % (side * groups) or b[0] % steps) and b[1] == a[0]
    out = b[0] // steps * groups
    if not fits or (base is not None and base.shape[:2] != (out, a[1] // side // groups)):
        _misfit(reader, path, specs, base)
        return None
    return _module(
        path, kind, out, _whole(specs, out), specs, scaling=reader.scaling(path, a[0] // side),
        conv_form="loralib", kernel_size=(side,) * dims, groups=groups,
    )  # fmt: skip


def _peft_conv(reader: Reader, path: str, kind: ModuleKind, specs: Specs) -> LoraModule | None:
    """Read ``A[r, in, *kernel]``, ``B[out, r/groups, 1, ...]``."""
    dims, a, b = int(kind[4]) if kind.startswith("conv") else 0, specs["a"].shape, specs["b"].shape
    if len(a) != dims + 2 or len(b) != len(a) or math.prod(b[2:]) != 1 or a[0] % b[1] or b[0] % (a[0] // b[1]):
        _misfit(reader, path, specs)
        return None
    return _module(
        path, kind, b[0], _whole(specs, b[0]), specs, scaling=reader.scaling(path, a[0]),
        conv_form="peft", kernel_size=a[2:], groups=a[0] // b[1],
    )  # fmt: skip
