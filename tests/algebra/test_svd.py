"""Randomized factors against the whole decomposition: errors, energies, determinism, and how often rows are read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge.arithmetic import svd


def blocks_of(matrix, step=100):
    return lambda: ((i, matrix[i : i + step]) for i in range(0, matrix.shape[0], step))


def decaying(m, n, seed=0, power=1.0):
    rng = np.random.default_rng(seed)
    k = min(m, n)
    u, v = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (m, n))
    return u * (1.0 / np.arange(1, k + 1) ** power) @ v.T


@given(m=st.integers(1, 20), n=st.integers(1, 20), rank=st.integers(1, 25), seed=st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_small_matrices_get_the_best_factors(m, n, rank, seed):
    matrix = np.random.default_rng(seed).standard_normal((m, n))
    found = svd.factorize(blocks_of(matrix, 3), (m, n), rank=rank)
    values = np.linalg.svd(matrix, compute_uv=False)
    best = np.linalg.norm(values[rank:])
    assert found.rank == min(rank, m, n)
    assert found.total == pytest.approx(np.linalg.norm(matrix))
    assert np.linalg.norm(matrix - found.b @ found.a) == pytest.approx(best, abs=1e-12)
    assert found.dropped == pytest.approx(best, abs=1e-6)
    assert svd.residual(blocks_of(matrix, 4), found.a, found.b) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_sketch_comes_within_a_hair_of_the_best(power):
    matrix = decaying(700, 600, power=power)
    found = svd.factorize(blocks_of(matrix), matrix.shape, rank=16, seed=3)
    values = np.linalg.svd(matrix, compute_uv=False)
    best = np.linalg.norm(values[16:])
    assert best <= svd.residual(blocks_of(matrix), found.a, found.b) <= best * 1.001
    assert found.dropped == pytest.approx(svd.residual(blocks_of(matrix), found.a, found.b), rel=1e-6)


def test_an_exact_low_rank_matrix_comes_back_to_double_precision():
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((900, 8)) @ rng.standard_normal((8, 500))
    found = svd.factorize(blocks_of(matrix), matrix.shape, rank=8)
    assert svd.residual(blocks_of(matrix), found.a, found.b) < 1e-12 * found.total
    by_energy = svd.factorize(blocks_of(matrix), matrix.shape, energy=1.0)
    assert by_energy.rank == 8


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
def test_energy_takes_the_smallest_rank(energy):
    matrix = decaying(600, 500, power=0.6)
    values = np.linalg.svd(matrix, compute_uv=False)
    share = np.cumsum(values**2) / np.sum(values**2)
    found = svd.factorize(blocks_of(matrix), matrix.shape, energy=energy)
    assert abs(found.rank - (int(np.searchsorted(share, energy)) + 1)) <= 1
    assert 1 - (found.dropped / found.total) ** 2 >= energy - 1e-9
    limited = svd.factorize(blocks_of(matrix), matrix.shape, energy=energy, rank=2)
    assert limited.rank == min(2, found.rank)


def test_the_seed_decides_the_bits_and_zero_is_rank_one():
    matrix = decaying(400, 300)
    first, again = (svd.factorize(blocks_of(matrix), matrix.shape, rank=4, seed=5) for _ in range(2))
    assert first.a.tobytes() == again.a.tobytes()
    assert first.b.tobytes() == again.b.tobytes()
    nothing = svd.factorize(blocks_of(np.zeros((400, 300))), (400, 300), energy=0.9)
    assert nothing.rank == 1
    assert not (nothing.b @ nothing.a).any()
