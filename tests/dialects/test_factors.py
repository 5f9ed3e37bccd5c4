"""The factor algebra against the deltas that loralib and peft themselves compute, in double precision."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import loralib as lora
import numpy as np
import peft
import pytest
import torch
from bare import content, evaluated
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lorabridge import axes
from lorabridge.dialects import factors
from lorabridge.dialects.adapter import LoraModule, Scaling, Term
from lorabridge.dialects.loralib import Loralib
from lorabridge.dialects.loralib_ms import LoralibMs
from lorabridge.dtypes import BY_NAME
from lorabridge.errors import MappingError
from lorabridge.inversion import invert
from lorabridge.tensors import TensorSpec


def linear(ranks, rows, *, out, alpha=3.0, rank=2, features=5, dtype="float64", path="m", seed=0):
    """A module of random blocks, and its tensors; small integers, so that products are exact in any order."""
    torch.manual_seed(seed)
    terms, tensors = [], {}
    for i, (r, (start, stop)) in enumerate(zip(ranks, rows, strict=True)):
        shapes = {f"{path}.a{i}": (r, features), f"{path}.b{i}": (stop - start, r)}
        tensors |= {name: torch.randint(-9, 10, shape).to(getattr(torch, dtype)) for name, shape in shapes.items()}
        a, b = (axes.read(TensorSpec(name, BY_NAME[dtype], shape)) for name, shape in shapes.items())
        terms.append(Term(a, b, start, stop))
    return LoraModule(path, "linear", out, tuple(terms), Scaling(alpha, rank)), tensors


def delta(module, tensors):
    """The scaled delta of a linear module, as the hub defines it."""
    total = 0
    for term in module.terms:
        made = evaluated([("a", term.a), ("b", term.b)], tensors)
        block = torch.zeros(module.out, made["a"].shape[1], dtype=torch.float64)
        block[term.start : term.stop] = made["b"].double() @ made["a"].double()
        total = total + block * module.scaling.value
    return total


@given(
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    gaps=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    alpha=st.integers(1, 64),
)
@settings(deadline=None, max_examples=60)
def test_growing_keeps_the_delta(ranks, lengths, gaps, alpha):
    rows, at = [], gaps[0]
    for length, gap in zip(lengths, gaps[1:], strict=True):
        rows.append((at, at + length))
        at += length + gap
    module, tensors = linear(ranks, rows[: len(ranks)], out=at, alpha=alpha, rank=4)
    grown = factors.grow(module)
    assert grown.plain
    assert grown.terms[0].rank == sum(ranks)
    assert grown.scaling.value == module.scaling.value
    assert torch.equal(delta(grown, tensors), delta(module, tensors))
    back = invert({"a": grown.terms[0].a, "b": grown.terms[0].b})
    assert not back.lost


def test_growing_blocks_of_several_types_is_refused():
    module, _ = linear([2], [(0, 3)], out=6)
    other, _ = linear([2], [(3, 6)], out=6, dtype="float32")
    with pytest.raises(MappingError, match="cannot be stacked"):
        factors.grow(replace(module, terms=module.terms + other.terms))


@given(value=st.floats(1e-6, 1e6), rank=st.integers(1, 600))
@settings(deadline=None, max_examples=300)
def test_exact_alpha_is_exact_or_none(value, rank):
    alpha = factors.exact_alpha(value, rank)
    if alpha is None:
        near = value * rank
        for _ in range(3):
            near = math.nextafter(near, -math.inf)
        for _ in range(7):
            assert near / rank != value
            near = math.nextafter(near, math.inf)
    else:
        assert alpha / rank == value


@given(alpha=st.integers(1, 512), rank=st.integers(1, 512), times=st.integers(1, 9))
@settings(deadline=None, max_examples=200)
def test_multiples_of_a_rank_keep_an_integer_alpha(alpha, rank, times):
    assert factors.exact_alpha(alpha / rank, rank * times) == alpha * times


def test_a_scaling_without_an_exact_alpha_is_refused():
    rank, value = next(
        (r, a / math.sqrt(r))
        for r in range(3, 99)
        for a in range(1, 99)
        if factors.exact_alpha(a / math.sqrt(r), r) is None
    )
    module, _ = linear([1], [(0, 4)], out=4)
    with pytest.raises(MappingError, match="no alpha gives the scaling") as caught:
        factors.rescaled(replace(module, scaling=Scaling(value, 1)), rank)
    assert "power of two" in caught.value.hint


def test_padding_keeps_the_delta_and_refuses_a_lower_rank():
    module, tensors = linear([3], [(0, 4)], out=4, rank=3)
    padded = factors.pad_rank(module, 8)
    assert padded.terms[0].a.shape == (8, 5)
    assert padded.scaling == Scaling(8.0, 8)
    assert torch.equal(delta(padded, tensors), delta(module, tensors))
    with pytest.raises(MappingError, match="rank 3 does not fit rank 2"):
        factors.pad_rank(module, 2)


def many(*given_scalings, dtype="float32"):
    """Modules with one (alpha, rank, rslora) each."""
    modules, tensors = [], {}
    for i, (alpha, rank, *rs) in enumerate(given_scalings):
        module, own = linear([rank], [(0, 4)], out=4, dtype=dtype, path=f"m{i}", seed=i)
        modules.append(replace(module, scaling=Scaling(alpha, rank, bool(rs and rs[0]))))
        tensors |= own
    return modules, tensors


@pytest.mark.parametrize(
    ("scalings", "expected", "notes", "exact"),
    [
        ([(16, 8), (16, 8)], (8, 16.0), 0, True),
        ([(16, 8), (8, 4)], (8, 16.0), 0, True),  # one scaling, two ranks: zero rows only
        ([(16, 8), (16, 8), (32, 8)], (8, 16.0), 1, True),  # a power of two goes into B without rounding
        ([(16, 8), (16, 8), (24, 8)], (8, 16.0), 1, False),
        ([(4, 4, True), (4, 4, True)], (4, 8.0), 0, True),  # rank-stabilised: 4 / sqrt(4) = 8 / 4
        ([(1, 3)], (3, 1.0), 0, True),
    ],
)
def test_uniform_rank_and_alpha(scalings, expected, notes, exact):
    modules, tensors = many(*scalings)
    made, rank, alpha, said = factors.uniform(modules)
    assert (rank, alpha) == expected
    assert len(said) == notes
    assert all("rounded" in note for note in said) is not exact or not said
    for old, new in zip(modules, made, strict=True):
        assert new.scaling == Scaling(alpha, rank)
        assert new.terms[0].rank == rank
        close = {"rtol": 0, "atol": 0} if exact else {"rtol": 3e-7, "atol": 1e-12}
        torch.testing.assert_close(delta(new, tensors), delta(old, tensors), **close)


def test_uniform_takes_the_users_rank_and_alpha():
    modules, tensors = many((16, 8), (6, 3))
    made, rank, alpha, said = factors.uniform(modules, rank=16, alpha=16)
    assert (rank, alpha) == (16, 16.0)
    assert said == ("scaling 2 folded into B as the power of two 2 (2 modules)",)
    for old, new in zip(modules, made, strict=True):
        torch.testing.assert_close(delta(new, tensors), delta(old, tensors), rtol=0, atol=0)
    with pytest.raises(MappingError, match="rank 8 does not fit rank 4"):
        factors.uniform(modules, rank=4)
    with pytest.raises(MappingError, match="zero or infinity") as caught:
        factors.uniform([modules[0], replace(modules[1], scaling=Scaling(0.0, 3))])
    assert caught.value.where == ("m1",)
    with pytest.raises(MappingError, match="cannot share"):
        factors.uniform(modules, alpha=0)


def test_uniform_grows_blocks():
    module, tensors = linear([2, 2], [(0, 2), (4, 6)], out=6, dtype="float32", alpha=6.0, rank=2)
    (made,), rank, alpha, said = factors.uniform([module])
    assert (rank, alpha, said) == (4, 12.0, ())
    torch.testing.assert_close(delta(made, tensors), delta(module, tensors), rtol=0, atol=0)


@given(mask=st.lists(st.booleans(), min_size=1, max_size=5).filter(any), rank=st.integers(1, 3), rows=st.integers(1, 3))
@settings(deadline=None, max_examples=60)
def test_blocks_and_as_merged_undo_each_other(mask, rank, rows):
    a = axes.read(TensorSpec("a", BY_NAME["float32"], (rank * sum(mask), 4)))
    b = axes.read(TensorSpec("b", BY_NAME["float32"], (rows * sum(mask), rank)))
    terms, out = factors.blocks(a, b, mask)
    module = LoraModule("m", "linear", out, terms, Scaling(1.0, rank))
    assert factors.as_merged(module) == (a, b, tuple(mask))


def test_uneven_blocks_are_no_merged_linear():
    for ranks, rows in (([2, 3], [(0, 2), (2, 4)]), ([2, 2], [(0, 2), (2, 5)]), ([2], [(1, 3)])):
        module, _ = linear(ranks, rows, out=6)
        with pytest.raises(MappingError, match="not a MergedLinear"):
            factors.as_merged(module)


def loralib_conv(side, groups, channels, out, rank, kind=lora.Conv2d):
    """A loralib convolution as the hub reads it, its tensors, and the delta that loralib computes."""
    torch.manual_seed(side + groups)
    made = kind(channels, out, side, r=rank, lora_alpha=5, groups=groups).double()
    nn.init.normal_(made.lora_A)
    nn.init.normal_(made.lora_B)
    state = made.state_dict()
    rows = [("alpha", 5), ("merged", False)]
    (module,) = Loralib().parse(content(state, *rows)).modules
    wanted = (made.lora_B @ made.lora_A).view(made.conv.weight.shape) * made.scaling
    return module, state, wanted.detach()


class Conv(nn.Module):
    """One convolution for peft to adapt."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


def peft_conv(conv, rank, **config):
    """A peft-adapted convolution, its layer and its factors."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, lora_alpha=5, target_modules=["conv"], **config)
    model = peft.get_peft_model(Conv(conv).double(), config)
    made = model.base_model.model.conv
    nn.init.normal_(made.lora_B["default"].weight)
    made = made.double()
    return made, {"a": made.lora_A["default"].weight.detach(), "b": made.lora_B["default"].weight.detach()}


def peft_module(tensors, kernel, *, groups=1, kind="conv2d"):
    """The hub's reading of peft's conv factors."""
    a, b = (axes.read(TensorSpec(n, BY_NAME["float64"], tuple(t.shape))) for n, t in tensors.items())
    rank = tensors["a"].shape[0]
    out = tensors["b"].shape[0]
    return LoraModule("conv", kind, out, (Term(a, b, 0, out),), Scaling(5.0, rank), kernel_size=kernel, groups=groups)


@pytest.mark.parametrize(("side", "channels", "out", "rank"), [(1, 3, 4, 2), (2, 3, 4, 2), (3, 2, 5, 1), (3, 4, 6, 2)])
def test_loralib_convolutions_become_peft_ones(side, channels, out, rank):
    module, state, wanted = loralib_conv(side, 1, channels, out, rank)
    turned = factors.conv_to_peft(module)
    assert turned.terms[0].rank == rank * side * side
    made, _ = peft_conv(nn.Conv2d(channels, out, side), rank * side * side)
    parts = evaluated([("a", turned.terms[0].a), ("b", turned.terms[0].b)], state)
    made.lora_A["default"].weight.data = parts["a"]
    made.lora_B["default"].weight.data = parts["b"]
    made.scaling["default"] = turned.scaling.value
    torch.testing.assert_close(made.get_delta_weight("default"), wanted, rtol=1e-13, atol=1e-13)
    assert not invert({"a": turned.terms[0].a, "b": turned.terms[0].b}).lost


@pytest.mark.parametrize(("side", "groups", "channels", "out"), [(2, 2, 4, 6), (3, 3, 6, 9), (4, 2, 2, 4)])
def test_grouped_loralib_convolutions_compute_the_same_in_peft(side, groups, channels, out):
    """peft cannot merge grouped convolutions, so its forward pass is the judge."""
    module, state, wanted = loralib_conv(side, groups, channels, out, 2)
    turned = factors.conv_to_peft(module)
    base = nn.Conv2d(channels, out, side, groups=groups)
    made, _ = peft_conv(base, turned.terms[0].rank)
    parts = evaluated([("a", turned.terms[0].a), ("b", turned.terms[0].b)], state)
    assert made.lora_B["default"].weight.shape == parts["b"].shape
    made.lora_A["default"].weight.data = parts["a"]
    made.lora_B["default"].weight.data = parts["b"]
    made.scaling["default"] = turned.scaling.value
    x = torch.randn(2, channels, 7, 7, dtype=torch.float64)
    by_hand = nn.functional.conv2d(x, base.weight.detach() + wanted, base.bias, groups=groups)
    torch.testing.assert_close(made(x), by_hand, rtol=1e-11, atol=1e-11)


def test_groups_that_do_not_divide_the_kernel_are_refused():
    module, _, _ = loralib_conv(3, 2, 4, 6, 2)
    with pytest.raises(MappingError, match="no exact pair of conv factors"):
        factors.conv_to_peft(module)


@pytest.mark.parametrize(("side", "channels", "out", "rank"), [(1, 3, 4, 2), (2, 3, 4, 3), (3, 2, 5, 2)])
def test_peft_convolutions_become_loralib_ones(side, channels, out, rank):
    made, tensors = peft_conv(nn.Conv2d(channels, out, side), rank)
    module = peft_module(tensors, (side, side))
    turned = factors.conv_to_loralib(module)
    assert turned.scaling == module.scaling
    layer = lora.Conv2d(channels, out, side, r=rank, lora_alpha=5).double()
    parts = evaluated([("lora_A", turned.terms[0].a), ("lora_B", turned.terms[0].b)], tensors)
    assert layer.lora_A.shape == parts["lora_A"].shape
    layer.load_state_dict(parts, strict=False)
    own = (layer.lora_B @ layer.lora_A).view(layer.conv.weight.shape) * layer.scaling
    torch.testing.assert_close(own.detach(), made.get_delta_weight("default").detach(), rtol=1e-13, atol=1e-13)
    assert not invert({"a": turned.terms[0].a, "b": turned.terms[0].b}).lost
    there = factors.conv_to_peft(turned)
    again = evaluated([("a", there.terms[0].a), ("b", there.terms[0].b)], tensors)
    product = torch.einsum("or,rikl->oikl", again["b"][:, :, 0, 0], again["a"]) * there.scaling.value
    torch.testing.assert_close(product, made.get_delta_weight("default").detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("conv", "kind", "problem"),
    [
        (nn.Conv1d(3, 4, 3), "conv1d", "itself fails on conv1d"),
        (nn.Conv3d(2, 4, 2), "conv3d", "itself fails on conv3d"),
        (nn.Conv2d(3, 4, (1, 3)), "conv2d", "not of one side length"),
    ],
)  # fmt: skip
def test_what_loralib_cannot_run_is_refused(conv, kind, problem):
    _, tensors = peft_conv(conv, 2)
    with pytest.raises(MappingError, match=problem):
        factors.conv_to_loralib(peft_module(tensors, tuple(conv.kernel_size), kind=kind))
    if kind != "conv2d":  # loralib's own failure, as the message says
        broken = getattr(lora, kind.capitalize())(3, 4, 3, r=2)
        with pytest.raises(RuntimeError, match="shape"):
            broken(torch.zeros(1, 3, *(8,) * int(kind[4])))


def test_grouped_peft_convolutions_are_refused_and_padded_group_by_group():
    made, tensors = peft_conv(nn.Conv2d(4, 6, 3, groups=2), 4)
    module = peft_module(tensors, (3, 3), groups=2)
    with pytest.raises(MappingError, match="grouped convolution"):
        factors.conv_to_loralib(module)
    padded = factors.pad_rank(module, 8)
    parts = evaluated([("a", padded.terms[0].a), ("b", padded.terms[0].b)], tensors)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    wide = nn.functional.conv2d(nn.functional.conv2d(x, parts["a"]), parts["b"], groups=2) * padded.scaling.value
    own = made(x) - made.base_layer(x)
    torch.testing.assert_close(wide, own.detach(), rtol=1e-11, atol=1e-11)
    with pytest.raises(MappingError, match="groups do not divide"):
        factors.pad_rank(module, 7)


def test_loralib_rank_one_convolutions_in_one_and_three_dimensions():
    for kind, dims in ((lora.Conv1d, 1), (lora.Conv3d, 3)):
        module, state, wanted = loralib_conv(1, 1, 3, 4, 2, kind)
        turned = factors.conv_to_peft(module)
        parts = evaluated([("a", turned.terms[0].a), ("b", turned.terms[0].b)], state)
        assert parts["a"].shape == (2, 3, *(1,) * dims)
        made = (parts["b"].flatten(1) @ parts["a"].flatten(1)).view(wanted.shape) * turned.scaling.value
        torch.testing.assert_close(made, wanted, rtol=1e-13, atol=1e-13)


def test_padding_loralib_conv_factors_counts_ranks_as_loralib_does():
    module, state, wanted = loralib_conv(3, 1, 2, 5, 2)
    padded = factors.pad_rank(module, 4)
    assert padded.terms[0].a.shape == (12, 6)
    parts = evaluated([("a", padded.terms[0].a), ("b", padded.terms[0].b)], state)
    torch.testing.assert_close((parts["b"] @ parts["a"]).view(wanted.shape) * padded.scaling.value, wanted)


@pytest.mark.parametrize(
    ("conv", "kind"), [(nn.Conv1d(3, 4, 3), "conv1d"), (nn.Conv3d(2, 4, 2), "conv3d"), (nn.Conv1d(3, 4, 2), "conv1d")]
)
def test_our_layers_extend_loralibs_form_to_other_dimensions(conv, kind):
    """The delta stays ``(b @ a).view(weight.shape)``, with as many rows of b as that needs."""
    made, tensors = peft_conv(conv, 2)
    wanted = made.get_delta_weight("default").detach()
    turned = factors.conv_to_loralib(peft_module(tensors, tuple(conv.kernel_size), kind=kind), extended=True)
    side = conv.kernel_size[0]
    parts = evaluated([("m.lora_A", turned.terms[0].a), ("m.lora_B", turned.terms[0].b)], tensors)
    assert parts["m.lora_A"].shape == (turned.scaling.rank * side, conv.in_channels * side)
    delta = (parts["m.lora_B"] @ parts["m.lora_A"]).view(conv.weight.shape) * turned.scaling.value
    torch.testing.assert_close(delta, wanted, rtol=1e-13, atol=1e-13)
    rows = [("alpha", turned.scaling.alpha), ("kind", kind), ("kernel_size", side)]
    (read,) = LoralibMs().parse(content(parts, *rows, container="mindspore")).modules
    back = factors.conv_to_peft(read)
    again = evaluated([("a", back.terms[0].a), ("b", back.terms[0].b)], parts)
    product = (again["b"].flatten(1) @ again["a"].flatten(1)).view(wanted.shape) * back.scaling.value
    torch.testing.assert_close(product, wanted, rtol=1e-13, atol=1e-13)
    with pytest.raises(MappingError, match="not defined for"):
        Loralib().parse(content(parts, *rows))


def test_compressing_a_grown_convolution_brings_the_rank_back():
    """Growing from peft's form to loralib's and back multiplies the rank by k*k; the delta's own rank is r."""
    made, tensors = peft_conv(nn.Conv2d(3, 6, 2), 2)
    grown = factors.conv_to_peft(factors.conv_to_loralib(peft_module(tensors, (2, 2))))
    assert grown.terms[0].rank == 8
    small = factors.compress(grown, 2)
    parts = evaluated([("a", small.terms[0].a), ("b", small.terms[0].b)], tensors)
    assert parts["a"].shape == (2, 3, 2, 2)
    assert parts["b"].shape == (6, 2, 1, 1)
    product = torch.einsum("or,rikl->oikl", parts["b"][:, :, 0, 0], parts["a"]) * small.scaling.value
    torch.testing.assert_close(product, made.get_delta_weight("default").detach(), rtol=1e-11, atol=1e-11)


def test_compressing_blocks_loralib_convolutions_and_too_high_ranks():
    module, tensors = linear([2, 2], [(0, 3), (3, 6)], out=6)
    small = factors.compress(factors.single_pair(module, "peft"), 3)
    best = np.linalg.svd(delta(module, tensors).numpy(), compute_uv=False)[3:]
    assert np.linalg.norm(delta(small, tensors) - delta(module, tensors)) == pytest.approx(np.linalg.norm(best))
    conv, _, _ = loralib_conv(3, 1, 4, 5, 2)
    assert factors.compress(conv, 2).terms[0].rank == 3  # one loralib rank is three rows
    assert factors.compress(conv, 6) is conv
    grouped, _, _ = loralib_conv(2, 2, 4, 6, 2)
    with pytest.raises(MappingError, match="grouped conv"):
        factors.compress(factors.conv_to_peft(grouped), 2)


def test_single_pair_takes_the_form_of_the_target():
    conv, _, _ = loralib_conv(2, 1, 3, 4, 2)
    forms = {name: factors.single_pair(conv, name).conv_form for name in ("peft", "loralib", "loralib-ms", "mindpet")}
    assert forms == {"peft": "peft", "loralib": "loralib", "loralib-ms": "loralib", "mindpet": "loralib"}
    assert list(itertools.chain(factors.single_pair(conv, "peft").kernel_size)) == [2, 2]
