"""The kinds of updates in files of sd-scripts and LyCORIS: what each is made of, and which are pairs of factors.

| kind | tensors below a flattened name | delta of the weight ``[out, in, *k]`` |
|---|---|---|
| LoRA, LoCon | ``lora_down.weight[r, in, *k]``, ``lora_up.weight[out, r, 1, ...]`` | ``up @ down`` |
| with a core | and ``lora_mid.weight[r, r, *k]``; down ``[r, in, 1, ...]`` | ``up[o, p] mid[p, q, *k] down[q, i]`` |
| LoHa | ``hada_w1_a[out, r]``, ``hada_w1_b[r, in * k]``, ``hada_w2_a``, ``hada_w2_b`` | ``(w1_a w1_b) * (w2_a w2_b)`` |
| with cores | ``hada_t1[r, r, *k]``, ``hada_t2``; a ``[r, out]``, b ``[r, in]`` | each product as the core says |
| LoKr | ``lokr_w1[m, n]`` or ``_a``, ``_b``; ``lokr_w2[p, q, *k]`` or ``_a``, ``_b``, ``lokr_t2`` | ``kron(w1, w2)`` |
| full | ``diff[out, in, *k]`` | itself |

The scaling is ``alpha / r`` (LyCORIS' rank-stabilised option is folded into the stored alpha), 1 for ``diff`` and for a
LoKr of two whole matrices. Sources: sd-scripts of 2026-02 (``networks/lora.py``), LyCORIS 4.1.3 (``lycoris/modules``).
Everything but plain LoRA is the product of other matrices, so it becomes LoRA only on request (``as = lora``),
exactly, of the rank that this takes; ``products`` says which. A core alone keeps its rank: it is contracted at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..arithmetic import products
from ..axes import Expr, ShapeError, read, reshape, transpose
from ..tensors import TensorSpec

Specs = Mapping[str, TensorSpec]

LORA = ("lora_down.weight", "lora_up.weight", "lora_mid.weight")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
BESIDE = ("alpha", "dora_scale")
OTHERS = {
    "diff_b": "a change of the bias",
    "w_norm": "a change of a norm's weight",
    "b_norm": "a change of a norm's bias",
    "a1.weight": "GLoRA, whose delta depends on the base weight",
    "on_input": "IA3, which multiplies the weight",
    "oft_blocks": "OFT, which rotates the weight",
    "oft_diag": "OFT, which rotates the weight",
    "lokr_t1": "a LoKr with a core in its first factor, which LyCORIS itself does not read",
    "scalar": "a learned scalar, which LyCORIS multiplies into the factors when it saves",
}
"""Tensors that make an update something else than a product of factors, and what it is."""
KNOWN = frozenset((*LORA, *LOHA, *LOKR, *BESIDE, "diff", *OTHERS, "a2.weight", "b1.weight", "b2.weight", "bm.weight",
                   "weight", "rescale"))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Update:
    """One module's update as a pair: ``a`` ``[rank, in, *kernel]``, ``b`` ``[out, rank, 1, ...]``.

    ``kind``: its name. ``dim``: what alpha is divided by, None where the scaling is 1. ``plain``: the tensors are the
    pair, none had to be multiplied.
    """

    kind: str
    a: Expr
    b: Expr
    dim: int | None
    plain: bool = False


def kind_of(specs: Specs) -> str:
    """Return what a module's tensors are: "lora", "loha", "lokr", "full", or "" for none of them."""
    named = {"lora_up.weight": "lora", "hada_w1_a": "loha", "lokr_w1": "lokr", "lokr_w1_a": "lokr", "diff": "full"}
    return next((kind for name, kind in named.items() if name in specs), "")


def axes_of(specs: Specs) -> tuple[int | None, ...] | None:
    """Return the axes of the weight that a module's tensors show: (out, in, *kernel).

    The input is None where it is flattened together with a kernel that may be there; None where nothing fits.
    """
    try:
        made = _MAKERS[kind_of(specs)](specs)
    except (KeyError, ShapeError, IndexError):
        return None
    flattened = len(made.a.shape) == 2 and kind_of(specs) in ("loha", "lokr")
    return (made.b.shape[0], None if flattened else made.a.shape[1], *made.a.shape[2:])


def update(specs: Specs, kernel: tuple[int, ...] | None = None) -> Update:
    """Write a module's tensors as one pair.

    ``kernel``: of the module's weight, () for a linear layer, None where nobody says. LoHa and LoKr without cores
    flatten it; a kernel of ones is put in or left out. Raises KeyError for a tensor that is missing, ShapeError for
    shapes that do not fit.
    """
    made = _MAKERS[kind_of(specs)](specs)
    if kernel is None or kernel == made.a.shape[2:]:
        return made
    rank, columns, size = made.a.shape[0], math.prod(made.a.shape[1:]), math.prod(kernel)
    split = len(made.a.shape) == 2 and not made.plain and columns % size == 0
    if not split and not (size == 1 and math.prod(made.a.shape[2:]) == 1):
        raise ShapeError(f"the weight's kernel is {list(kernel)}, that of the factors {list(made.a.shape[2:])}")
    a = reshape(made.a, (rank, columns // size, *kernel))
    return Update(made.kind, a, reshape(made.b, (*made.b.shape[:2], *(1,) * len(kernel))), made.dim, made.plain)


def _lora(specs: Specs) -> Update:
    down, up = read(specs["lora_down.weight"]), read(specs["lora_up.weight"])
    if "lora_mid.weight" in specs:
        a, b = products.tucker_pair(read(specs["lora_mid.weight"]), down, up)
        return Update("LoRA with a core", a, _pointwise(b, a), down.shape[0])
    if len(down.shape) < 2 or len(up.shape) < 2 or down.shape[0] != up.shape[1] or math.prod(up.shape[2:]) != 1:
        raise ShapeError(f"lora_down {list(down.shape)} and lora_up {list(up.shape)} are no pair")
    return Update("LoRA", down, _pointwise(reshape(up, up.shape[:2]), down), down.shape[0], plain=True)


def _pointwise(b: Expr, a: Expr) -> Expr:
    """Give ``b`` ``[out, rank]`` as many axes as ``a``."""
    return reshape(b, (*b.shape[:2], *(1,) * (len(a.shape) - 2)))


def _loha(specs: Specs) -> Update:
    halves: list[products.Pair] = []
    kernel: tuple[int, ...] = ()
    for n in "12":
        w_a, w_b = read(specs[f"hada_w{n}_a"]), read(specs[f"hada_w{n}_b"])
        if f"hada_t{n}" in specs:
            a, b = products.tucker_pair(read(specs[f"hada_t{n}"]), w_b, transpose(w_a))
            kernel = a.shape[2:]
            halves.append((reshape(a, (a.shape[0], math.prod(a.shape[1:]))), b))
        else:
            halves.append((w_b, w_a))
    a, b = products.hadamard_pair(halves[0], halves[1])
    if kernel:
        a = reshape(a, (a.shape[0], a.shape[1] // math.prod(kernel), *kernel))
    return Update("LoHa", a, _pointwise(b, a), specs["hada_w1_b"].shape[0])


def _lokr(specs: Specs) -> Update:
    first, dim = _whole_or_pair(specs, "lokr_w1"), _dim(specs)
    kernel: tuple[int, ...] = ()
    if "lokr_t2" in specs:
        a, b = products.tucker_pair(
            read(specs["lokr_t2"]), read(specs["lokr_w2_b"]), transpose(read(specs["lokr_w2_a"]))
        )
        kernel = a.shape[2:]
        second: products.Pair | Expr = (reshape(a, (a.shape[0], math.prod(a.shape[1:]))), b)
    elif "lokr_w2" in specs:
        whole = read(specs["lokr_w2"])
        kernel = whole.shape[2:]
        second = reshape(whole, (whole.shape[0], math.prod(whole.shape[1:])))
    else:
        second = read(specs["lokr_w2_b"]), read(specs["lokr_w2_a"])
    a, b = products.kronecker_pair(first, second)
    if kernel:
        a = reshape(a, (a.shape[0], a.shape[1] // math.prod(kernel), *kernel))
    return Update("LoKr", a, _pointwise(b, a), dim)


def _whole_or_pair(specs: Specs, name: str) -> products.Pair | Expr:
    if name in specs:
        return read(specs[name])
    return read(specs[f"{name}_b"]), read(specs[f"{name}_a"])


def _dim(specs: Specs) -> int | None:
    """Return LoKr's rank as LyCORIS finds it; None where both matrices are whole, whose scaling is 1."""
    if "lokr_w1_b" in specs:
        return specs["lokr_w1_b"].shape[0]
    return specs["lokr_w2_b"].shape[0] if "lokr_w2_b" in specs else None


def _full(specs: Specs) -> Update:
    whole = read(specs["diff"])
    kernel = whole.shape[2:]
    a, b = products.whole_pair(reshape(whole, (whole.shape[0], math.prod(whole.shape[1:]))))
    a = reshape(a, (a.shape[0], whole.shape[1], *kernel))
    return Update("a full difference", a, _pointwise(b, a), None)


_MAKERS = {"lora": _lora, "loha": _loha, "lokr": _lokr, "full": _full}
