"""Hadamard, Kronecker and Tucker updates as exact pairs: against torch, and as laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge.arithmetic import numerics, products
from lorabridge.axes import Expr, Read, ShapeError, evaluate
from lorabridge.dtypes import BY_NAME

FLOAT32 = BY_NAME["float32"]
sizes = st.integers(1, 5)


def matrix(seed: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    """Return small integers over 8, whose products and short sums every type here holds exactly."""
    return (np.random.default_rng(seed).integers(-9, 10, shape) / 8).astype(dtype)


class Bench:
    """Name arrays, and evaluate expressions over them."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.notes = numerics.Notes()

    def read(self, array: np.ndarray) -> Expr:
        name = f"t{len(self.arrays)}"
        self.arrays[name] = array
        return Read(name, BY_NAME[array.dtype.name], array.shape)

    def value(self, expr: Expr) -> np.ndarray:
        def source(name: str) -> np.ndarray:
            array = self.arrays[name]
            return array.view(f"u{array.itemsize}")

        bits = evaluate(expr, source, numerics.kernels("out", self.notes, {}))
        assert bits.shape == expr.shape
        return numerics.values(np.ascontiguousarray(bits), expr.dtype)


@settings(deadline=None, max_examples=30)
@given(out=sizes, inner=sizes, r1=sizes, r2=sizes, seed=st.integers(0, 99))
def test_a_hadamard_product_of_pairs_is_a_pair_of_rank_r1_r2(out: int, inner: int, r1: int, r2: int, seed: int) -> None:
    bench = Bench()
    a1, a2 = matrix(seed, r1, inner), matrix(seed + 1, r2, inner)
    b1, b2 = matrix(seed + 2, out, r1), matrix(seed + 3, out, r2)
    a, b = products.hadamard_pair((bench.read(a1), bench.read(b1)), (bench.read(a2), bench.read(b2)))
    assert (a.shape, b.shape) == ((r1 * r2, inner), (out, r1 * r2))
    t = [torch.from_numpy(x).double() for x in (a1, b1, a2, b2)]
    wanted = ((t[1] @ t[0]) * (t[3] @ t[2])).numpy()
    np.testing.assert_array_equal(bench.value(b) @ bench.value(a), wanted)
    np.testing.assert_array_equal(products.hadamard_delta(*(x.astype(float) for x in (a1, b1, a2, b2))), wanted)
    assert all(not rounding.inexact for rounding in bench.notes.rounding.values())


@settings(deadline=None, max_examples=40)
@given(m=sizes, n=sizes, p=sizes, q=sizes, ranks=st.tuples(*[st.integers(0, 3)] * 2), seed=st.integers(0, 99))
def test_a_kronecker_product_is_a_pair_of_the_smallest_rank_that_its_factors_show(
    m: int, n: int, p: int, q: int, ranks: tuple[int, int], seed: int
) -> None:
    bench, wholes, given_ = Bench(), [], []
    for i, (rank, rows, columns) in enumerate([(ranks[0], m, n), (ranks[1], p, q)]):
        if rank:
            a, b = matrix(seed + i, rank, columns), matrix(seed + i + 7, rows, rank)
            wholes.append(torch.from_numpy(b).double() @ torch.from_numpy(a).double())
            given_.append((bench.read(a), bench.read(b)))
        else:
            whole = matrix(seed + i, rows, columns)
            wholes.append(torch.from_numpy(whole).double())
            given_.append(bench.read(whole))
    a_expr, b_expr = products.kronecker_pair(*given_)
    assert a_expr.shape[0] == (ranks[0] or min(m, n)) * (ranks[1] or min(p, q))
    wanted = torch.kron(*wholes).numpy()
    np.testing.assert_array_equal(bench.value(b_expr) @ bench.value(a_expr), wanted)
    np.testing.assert_array_equal(products.kronecker_delta(wholes[0].numpy(), wholes[1].numpy()), wanted)


def test_a_kronecker_product_with_a_kernel_is_that_of_the_flattened_kernel() -> None:
    bench = Bench()
    w1, a2, b2 = matrix(1, 2, 3), matrix(2, 4, 5 * 9), matrix(3, 6, 4)
    a, b = products.kronecker_pair(bench.read(w1), (bench.read(a2), bench.read(b2)))
    w2 = (torch.from_numpy(b2) @ torch.from_numpy(a2)).reshape(6, 5, 3, 3)
    wanted = torch.kron(torch.from_numpy(w1)[:, :, None, None].contiguous(), w2).double().numpy()
    found = (bench.value(b) @ bench.value(a)).reshape(12, 15, 3, 3)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(products.kronecker_delta(w1.astype(float), w2.double().numpy()), wanted)


def test_a_tucker_update_is_three_convolutions_in_a_row() -> None:
    bench = Bench()
    core, down, up = matrix(1, 4, 3, 3, 5), matrix(2, 3, 6, 1, 1), matrix(3, 7, 4, 1, 1)
    a, b = products.tucker_pair(bench.read(core), bench.read(down), bench.read(up))
    assert (a.shape, b.shape) == ((4, 6, 3, 5), (7, 4))
    conv = torch.nn.functional.conv2d
    x = wanted = torch.from_numpy(matrix(4, 1, 6, 8, 9)).double()
    for weight in (down, core, up):
        wanted = conv(wanted, torch.from_numpy(weight).double())
    delta = torch.from_numpy(np.tensordot(bench.value(b), bench.value(a), 1))
    torch.testing.assert_close(conv(x, delta), wanted, rtol=0, atol=0)


def test_sixteen_bit_factors_lose_nothing_and_float32_ones_are_rounded_once() -> None:
    rng = np.random.default_rng(5)
    for dtype, inexact in (("float16", False), ("float32", True)):
        bench = Bench()
        x, y = (rng.standard_normal((3, 50)).astype(dtype) for _ in range(2))
        expr = products.khatri_rao(bench.read(x), bench.read(y), FLOAT32)
        exact = np.einsum("in,jn->ijn", x.astype(float), y.astype(float)).reshape(9, 50)
        np.testing.assert_array_equal(bench.value(expr), exact.astype(np.float32))
        assert bool(bench.notes.rounding["out"].inexact) is inexact


def test_constants_and_identities_have_no_source() -> None:
    bench = Bench()
    np.testing.assert_array_equal(bench.value(products.constant(0.5, BY_NAME["bfloat16"])), np.array(0.5))
    np.testing.assert_array_equal(bench.value(products.identity(3, FLOAT32)), np.eye(3))


def test_factors_that_do_not_fit_are_refused() -> None:
    bench = Bench()
    pair = bench.read(matrix(1, 2, 5)), bench.read(matrix(1, 4, 2))
    with pytest.raises(ShapeError, match="not of one shape"):
        products.hadamard_pair(pair, (bench.read(matrix(1, 2, 6)), bench.read(matrix(1, 4, 2))))
    with pytest.raises(ShapeError, match="no pair"):
        products.kronecker_pair(pair, (bench.read(matrix(1, 2, 6)), bench.read(matrix(1, 4, 3))))
    with pytest.raises(ShapeError, match="no axis in common"):
        products.contract(bench.read(matrix(1, 2, 5, 3, 3)), bench.read(matrix(1, 4, 2)), FLOAT32)
    with pytest.raises(ShapeError, match="does not follow"):
        products.tucker_pair(bench.read(matrix(1, 2, 5)), bench.read(matrix(1, 5, 2)), bench.read(matrix(1, 4, 3)))
