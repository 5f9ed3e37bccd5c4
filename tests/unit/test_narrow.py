"""Adding to bfloat16 weights: one rounding of the exact sum, for whatever numbers and thresholds."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge.arithmetic import addition, narrow
from lorabridge.arithmetic.addition import Change, added
from lorabridge.arithmetic.deltas import Delta, Factors, Matrix, prepare
from lorabridge.arithmetic.floats import encode, rounded, values
from lorabridge.dtypes import BY_NAME

BFLOAT16 = BY_NAME["bfloat16"]
Bits = np.ndarray


def exactly(weight: Bits, deltas: list[Delta]) -> Bits:
    """Return what every element is defined to be: its sum in float64 with all residues, rounded once."""
    rows, columns = weight.shape
    i, j = np.divmod(np.arange(weight.size), columns)
    with np.errstate(all="ignore"):
        sums = deltas[0].rows(0, rows)
        for delta in deltas[1:]:
            sums = sums + delta.rows(0, rows)
        sums = sums + values(weight, BFLOAT16) + 0.0
        for delta in deltas:
            sums = sums + delta.residue(i, j).reshape(weight.shape)
        out = encode(rounded(sums, BFLOAT16), BFLOAT16)
    odd = (weight & 0x7FFF) >= 0x7F80
    out[odd] = weight[odd]
    return out


def bits_of(numbers: Matrix) -> Bits:
    with np.errstate(all="ignore"):
        return encode(rounded(numbers, BFLOAT16), BFLOAT16)


def factors(random: np.random.Generator, rows: int, rank: int, columns: int, size: float, precision: type) -> Factors:
    b, a = random.standard_normal((rows, rank)), random.standard_normal((rank, columns)) * size
    return Factors(b.astype(precision).astype(float), a.astype(precision).astype(float))


def codes(random: np.random.Generator, shape: tuple[int, int]) -> Bits:
    """Every bfloat16 alike: subnormals, zeros of both signs, infinities and NaNs among them."""
    return random.integers(0, 1 << 16, shape).astype(np.uint16)


WEIGHTS: dict[str, Callable[[np.random.Generator, Matrix], Bits]] = {
    "usual": lambda random, delta: bits_of(random.standard_normal(delta.shape)),
    "with outliers": lambda random, delta: bits_of(random.standard_cauchy(delta.shape) ** 3),
    "any code": lambda random, delta: codes(random, delta.shape),
    "taken away again": lambda random, delta: bits_of(-delta),
    "tiny": lambda random, delta: bits_of(random.standard_normal(delta.shape) * 1e-39),
    "zeros": lambda random, delta: (random.integers(0, 2, delta.shape) << 15).astype(np.uint16),
    "constant": lambda random, delta: np.full(delta.shape, 0x3F80, np.uint16),
}


@pytest.mark.parametrize("precision", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("size", [1e-42, 1e-20, 1e-3, 1.0, 1e30, 1e38])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_every_element_is_its_exact_sum_rounded_once(kind: str, size: float, precision: type) -> None:
    random = np.random.default_rng(7)
    size = size if precision is not np.float16 or 1e-7 < size < 1e3 else 0.5
    delta = prepare([factors(random, 40, 5, 64, size, precision)], 40, 1.7)
    weight = WEIGHTS[kind](random, delta.rows(0, 40))
    got, change = added(weight, BFLOAT16, [delta], start=0)
    assert np.array_equal(got, exactly(weight, [delta]))
    assert change.changed == np.count_nonzero(got != weight)
    finite = (weight & 0x7FFF) < 0x7F80
    assert change.odd == np.count_nonzero(~finite)
    assert change.broken == np.count_nonzero(finite & ((got & 0x7FFF) >= 0x7F80))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6), rank=st.integers(1, 70), columns=st.integers(1, 50), block=st.integers(1, 4000),
    count=st.integers(1, 3), scaling=st.sampled_from([1.0, -0.25, 0.7]),
    transposed=st.booleans(), kind=st.sampled_from(sorted(WEIGHTS)),
)  # fmt: skip
def test_blocks_and_thresholds_change_no_bit(
    seed: int, rank: int, columns: int, block: int, count: int, scaling: float, transposed: bool, kind: str
) -> None:
    random = np.random.default_rng(seed)
    rows = 30
    sizes = [10.0 ** random.integers(-6, 2) for _ in range(count)]
    height, width = (columns, rows) if transposed else (rows, columns)
    terms = [factors(random, height, rank, width, size, np.float32) for size in sizes]
    deltas = [prepare([term], height, scaling, transposed=transposed) for term in terms]
    weight = WEIGHTS[kind](random, sum((d.rows(0, rows) for d in deltas), np.zeros((rows, columns))))
    want = exactly(weight, deltas)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(addition, "BLOCK", block)
        for usual in (narrow.USUAL, 0.01, 1e4):
            patch.setattr(narrow, "USUAL", usual)
            for cut in (rows, 7):
                parts = [added(weight[s : s + cut], BFLOAT16, deltas, start=s)[0] for s in range(0, rows, cut)]
                assert np.array_equal(np.concatenate(parts), want)


def test_results_are_correctly_rounded() -> None:
    random = np.random.default_rng(1)
    term = factors(random, 60, 16, 80, 0.1, np.float32)
    weight = bits_of(random.standard_normal((60, 80)))
    got, _ = added(weight, BFLOAT16, [prepare([term], 60, 0.5)], start=0)
    for i, j in np.ndindex(weight.shape):
        pairs = zip(term.b[i], term.a[:, j], strict=True)
        exact = Fraction(values(weight[i, j : j + 1], BFLOAT16)[0])
        exact += sum((Fraction(x) * Fraction(y) for x, y in pairs), Fraction(0)) / 2
        steps = np.array([int(got[i, j]) + k for k in (-1, 0, 1)], np.uint16)
        off = [abs(Fraction(x) - exact) for x in values(steps, BFLOAT16)]
        assert off[1] < min(off[0], off[2])


def test_middles_go_to_even_unless_a_residue_decides() -> None:
    """1 + 2**-8 lies in the middle; residues are below the fixed point's last place, 2**-24 of the largest factor."""
    least = 2.0**-30
    for residue, ends in ((0.0, 0x3F80), (least, 0x3F81), (-least, 0x3F80)):
        b = np.array([[1.0], [2.0**-8 + residue * 2.0**-8]])
        delta = prepare([Factors(b, np.array([[1.0, 1.0 - 2.0**-24]]))], 2)
        got, _ = added(np.full((2, 2), 0x3F80, np.uint16), BFLOAT16, [delta], start=0)
        assert np.array_equal(got, exactly(np.full((2, 2), 0x3F80, np.uint16), [delta]))
        assert got[1, 0] == ends


def test_zeros_are_positive_unless_the_weight_stays_negative_zero_for_want_of_a_sum() -> None:
    delta = prepare([Factors(np.array([[0.0], [1.0]]), np.array([[-0.0, 1.0]]))], 2)
    got, _ = added(np.full((2, 2), 0x8000, np.uint16), BFLOAT16, [delta], start=0)
    assert got.tolist() == [[0, 0], [0, 0x3F80]]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.floats(width=64), min_size=1, max_size=30), st.floats(0, 1e3))
def test_what_is_decided_holds_for_all_numbers_within_the_doubt(numbers: list[float], doubt: float) -> None:
    x = np.array(numbers)
    with np.errstate(all="ignore"):
        near, unsure = narrow.decided(x.copy(), doubt)
        for end in (x - doubt, x, x + doubt):
            sure = ~unsure & np.isfinite(end)
            assert np.array_equal(near[sure], bits_of(end)[sure])


def test_change_measures_what_rounding_did() -> None:
    random = np.random.default_rng(3)
    delta = prepare([factors(random, 90, 4, 300, 1e-3, np.float32)], 90)
    weight = bits_of(random.standard_normal((90, 300)))
    got, change = added(weight, BFLOAT16, [delta], start=0)
    sums = values(weight, BFLOAT16) + delta.rows(0, 90)
    error = float(np.abs(sums - values(got, BFLOAT16)).max())
    assert error * 0.99 < change.error < error * 1.01
    assert change.weight == pytest.approx(np.sum(values(weight, BFLOAT16) ** 2), rel=1e-5)
    assert change.delta == pytest.approx(np.sum(delta.rows(0, 90) ** 2), rel=1e-5)
    assert (change.elements, change.reached) == (27000, 27000)
    assert change.vanished == 27000 - change.changed > 0


def test_the_bounds_hold() -> None:
    random = np.random.default_rng(5)
    for wide in (0, 20):
        b, a = random.standard_normal((50, 40)), random.standard_normal((40, 60))
        b, a = (x * 2.0 ** random.integers(-wide, wide + 1, x.shape) for x in (b, a))
        delta, exact = (prepare([Factors(b, a)], 50, 1.7, exact=e) for e in (False, True))
        assert np.abs(delta.rows(0, 50)).max() <= delta.bound
        off = np.abs(exact.rows(0, 50) - delta.rows(0, 50)).max()
        assert 0 < off <= delta.doubt
        assert exact.doubt == 0.0


def test_threads_have_buffers_of_their_own() -> None:
    random = np.random.default_rng(2)
    delta = prepare([factors(random, 200, 8, 300, 0.1, np.float32)], 200)
    weight = bits_of(random.standard_normal((200, 300)))
    want = added(weight, BFLOAT16, [delta], start=0)
    found: list[tuple[Bits, Change]] = []
    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=lambda: found.extend(added(weight, BFLOAT16, [delta], start=0) for _ in range(20)))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(often)
    assert len(found) == 80
    assert all(np.array_equal(bits, want[0]) and change == want[1] for bits, change in found)
