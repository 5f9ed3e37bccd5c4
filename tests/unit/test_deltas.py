"""The laws of the delta product: exact, the same for any blocking, transposition, stacking and thread count."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge.arithmetic.deltas import DIGITS, Factors, Matrix, delta_rows, prepare, product


def factors(rows: int, rank: int, columns: int, seed: int = 0, *, wide: bool = False) -> tuple[Matrix, Matrix]:
    """Return float32 values; ``wide`` spreads them over many orders of magnitude."""
    random = np.random.default_rng(seed)
    b, a = random.standard_normal((rows, rank)), random.standard_normal((rank, columns))
    if wide:
        b, a = (x * 2.0 ** random.integers(-30, 30, x.shape) for x in (b, a))
    return b.astype(np.float32).astype(float), a.astype(np.float32).astype(float)


def exact_product(b: Matrix, a: Matrix) -> list[list[Fraction]]:
    return [[sum(Fraction(x) * Fraction(y) for x, y in zip(row, col, strict=True)) for col in a.T] for row in b]


def bits(x: Matrix) -> bytes:
    return np.ascontiguousarray(x).tobytes()


def test_fixed_point_values_multiply_exactly() -> None:
    random = np.random.default_rng(1)
    b, a = (random.integers(-(2**DIGITS), 2**DIGITS, shape).astype(float) for shape in ((7, 32), (32, 9)))
    assert [[Fraction(x) for x in row] for row in product(b, a)] == exact_product(b, a)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 32, 70])
def test_the_error_is_below_what_is_documented(rank: int, wide: bool, exact: bool) -> None:
    b, a = factors(6, rank, 8, wide=wide)
    got, want = product(b, a, exact=exact), exact_product(b, a)
    for i, j in np.ndindex(got.shape):
        size = rank * np.abs(b[i]).max() * np.abs(a[:, j]).max()
        error = abs(Fraction(got[i, j]) - want[i][j])
        assert error <= (2.0**-48 if exact else 2.0**-24) * size + 2.0**-50 * abs(want[i][j])


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40), rank=st.integers(1, 70), columns=st.integers(1, 40), seed=st.integers(0, 9),
    start=st.integers(0, 39), length=st.integers(0, 40), exact=st.booleans(),
    scaling=st.sampled_from([1.0, 2.0, -0.25, 1.7]),
)  # fmt: skip
def test_any_rows_equal_the_same_rows_of_the_whole(
    rows: int, rank: int, columns: int, seed: int, start: int, length: int, exact: bool, scaling: float
) -> None:
    b, a = factors(rows, rank, columns, seed)
    start = min(start, rows)
    stop = min(start + length, rows)
    whole = delta_rows([Factors(b, a)], scaling=scaling, start=0, stop=rows, exact=exact)
    part = delta_rows([Factors(b, a)], scaling=scaling, start=start, stop=stop, exact=exact)
    assert bits(part) == bits(whole[start:stop])
    lone = delta_rows([Factors(b[start:stop], a)], scaling=scaling, start=0, stop=stop - start, exact=exact)
    assert bits(lone) == bits(part)


@pytest.mark.parametrize("exact", [False, True])
def test_the_transposed_delta_is_the_transpose(exact: bool) -> None:
    b, a = factors(33, 40, 21)
    terms = [Factors(b[:10], a, 0), Factors(b[10:] * 3, a + 1, 10)]
    whole = delta_rows(terms, scaling=1.3, start=0, stop=33, exact=exact)
    turned = delta_rows(terms, scaling=1.3, start=0, stop=21, exact=exact, transposed=True)
    assert bits(turned.T) == bits(whole)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_stacked_factors_give_the_bits_of_each_alone(exact: bool, groups: int) -> None:
    pairs = [factors(8, 6, 20, seed) for seed in range(3)]
    pairs = [(b * 7**k, a * 11**k) for k, (b, a) in enumerate(pairs)]
    b = np.zeros((24, 18))
    order = np.arange(24).reshape(3, groups, 8 // groups).transpose(1, 0, 2).reshape(-1)
    for k, (part, _) in enumerate(pairs):
        b[8 * k : 8 * k + 8, 6 * k : 6 * k + 6] = part
    got = product(b[order], np.vstack([a for _, a in pairs]), exact=exact)
    alone = np.vstack([product(part, a, exact=exact) for part, a in pairs])
    assert bits(got) == bits(alone[order])


def test_padded_ranks_and_zero_rows_change_nothing() -> None:
    b, a = factors(12, 4, 9)
    wide_b, wide_a = np.zeros((14, 7)), np.full((7, 9), 1e6)
    wide_b[1:13, :4], wide_a[:4] = b, a
    assert bits(product(wide_b, wide_a)[1:13]) == bits(product(b, a))
    assert not product(np.zeros((3, 2)), np.ones((2, 5))).any()


def test_zeros_are_positive() -> None:
    zero = product(np.array([[0.0], [1.0]]), np.array([[-1.0, -0.0]]))
    assert not np.signbit(zero[zero == 0]).any()


def test_not_finite_factors_are_seen() -> None:
    b, a = factors(4, 3, 5)
    a[1, 2] = np.inf
    assert not np.isfinite(product(b, a)[:, 2]).any()


def test_factors_that_do_not_fit_are_refused() -> None:
    b, a = factors(4, 3, 5)
    for terms, height in (([Factors(b, a, 1)], 4), ([Factors(b, a.T)], 4), ([], 4)):
        with pytest.raises(ValueError, match=r"delta needs|do not fit"):
            prepare(terms, height)


def test_the_bits_do_not_depend_on_blas_threads() -> None:
    code = (
        "import hashlib, numpy as np; from lorabridge.arithmetic.deltas import product; r = np.random.default_rng(3);"
        "b = r.standard_normal((700, 48)); a = r.standard_normal((48, 900));"
        "print(hashlib.sha256(product(b, a, exact=True).tobytes() + product(b, a).tobytes()).hexdigest())"
    )
    found = set()
    for threads, kernel in (("1", "Haswell"), ("2", "SkylakeX"), ("2", "Nehalem")):
        env = os.environ | {"OPENBLAS_NUM_THREADS": threads, "OPENBLAS_CORETYPE": kernel}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        found.add(done.stdout)
    assert len(found) == 1


def scattered(rows: int, columns: int, seed: int) -> Matrix:
    """Return numbers without any library's generator."""
    x = (np.arange(1, rows * columns + 1, dtype=np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    return ((x >> np.uint64(20)).astype(np.float64) * 2.0**-43 - 1.0).reshape(rows, columns)


def test_undo_files_written_before_find_the_same_delta() -> None:
    """The digest is that of an earlier version; with another, the undo files that were written with it are useless."""
    digest = hashlib.sha256()
    for rank in (1, 16, 32, 70):
        b, a = scattered(60, rank, 1), scattered(rank, 50, 2)
        terms = [Factors(b[:30], a, 0), Factors(b[30:] * 3, a * 0.7 + 1, 25)]
        for exact in (False, True):
            for transposed in (False, True):
                for scaling in (2.0, -0.25, 1.7):
                    delta = prepare(terms, 60, scaling, exact=exact, transposed=transposed)
                    digest.update(bits(delta.rows(0, delta.shape[0]) + 0.0))
    assert digest.hexdigest() == "39008a0c0e86017d0f115126d805030260607c9423f8c67069cdeb576134444f"
