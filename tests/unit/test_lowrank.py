"""Norms and compression against dense linear algebra on the delta that lowrank never forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge.arithmetic import lowrank


def pair(m, n, r, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((r, n)), rng.standard_normal((m, r))


@given(m=st.integers(1, 12), n=st.integers(1, 12), r=st.integers(1, 14), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_norms_are_those_of_the_dense_delta(m, n, r, seed):
    a, b = pair(m, n, r, seed)
    found = lowrank.norms(a, b, -0.5)
    delta = -0.5 * b @ a
    assert found.a == pytest.approx(np.linalg.norm(a))
    assert found.b == pytest.approx(np.linalg.norm(b))
    assert found.delta == pytest.approx(np.linalg.norm(delta))
    assert found.spectral == pytest.approx(np.linalg.norm(delta, 2))


def test_norms_of_zero_huge_and_broken_factors():
    assert lowrank.norms(np.zeros((2, 3)), np.ones((4, 2)), 1.0).delta == 0.0
    huge = lowrank.norms(np.full((1, 2), 1e200), np.full((2, 1), 1e-200), 1.0)
    assert huge.a == pytest.approx(math.sqrt(2) * 1e200)
    assert huge.delta == pytest.approx(2.0)
    broken = lowrank.norms(np.array([[math.nan, 1.0]]), np.ones((2, 1)), 1.0)
    assert math.isnan(broken.delta)
    assert math.isnan(broken.a)


@given(m=st.integers(2, 12), n=st.integers(2, 12), r=st.integers(1, 8), k=st.integers(1, 8), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_compression_is_the_best_approximation(m, n, r, k, seed):
    a, b = pair(m, n, r, seed)
    small_a, small_b = lowrank.compress(a, b, k)
    assert small_a.shape == (k, n)
    assert small_b.shape == (m, k)
    values = np.linalg.svd(b @ a, compute_uv=False)
    error = np.linalg.norm(b @ a - small_b @ small_a)
    assert error == pytest.approx(np.linalg.norm(values[k:]), abs=1e-9)


def test_compression_does_not_depend_on_signs_of_the_factors():
    a, b = pair(9, 7, 4, 5)
    one, two = lowrank.compress(a, b, 2), lowrank.compress(-a, -b, 2)
    for x, y in zip(one, two, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-12)


def test_rank_for_a_tolerance():
    rng = np.random.default_rng(1)
    u, v = np.linalg.qr(rng.standard_normal((20, 5)))[0], np.linalg.qr(rng.standard_normal((30, 5)))[0]
    b, a = u * np.array([10.0, 5.0, 1.0, 1e-3, 0.0]), v.T.copy()
    assert lowrank.rank_for(a, b, 0.0)[0] == 4
    assert lowrank.rank_for(a, b, 1e-2) == (3, pytest.approx(1e-3 / math.sqrt(126)))
    assert lowrank.rank_for(a, b, 0.1)[0] == 2
    assert lowrank.rank_for(a, b * 0, 0.1) == (1, 0.0)
    assert lowrank.rank_for(a * math.nan, b, 0.1) == (5, 0.0)
