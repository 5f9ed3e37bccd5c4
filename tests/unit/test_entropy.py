"""The entropy coder: what goes in comes out, near the entropy, and damaged data are refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lorabridge.arithmetic.entropy import MalformedError, decode, encode, entropy_bits

SHAPES = hnp.array_shapes(min_dims=1, max_dims=1, min_side=0, max_side=700)


def contexts_of(size: int, kinds: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, kinds, size).astype(np.uint8)


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.uint64, SHAPES), st.integers(1, 256), st.integers(0, 9))
def test_any_values_come_back(values: np.ndarray, kinds: int, seed: int) -> None:
    contexts = contexts_of(values.size, kinds, seed)
    back = decode(encode(values, contexts), contexts)
    assert back.dtype == np.uint64
    assert np.array_equal(back, values)


@settings(deadline=None, max_examples=40)
@given(hnp.arrays(np.uint64, SHAPES, elements=st.integers(0, 40)), st.integers(1, 5))
def test_small_values_come_back(values: np.ndarray, kinds: int) -> None:
    contexts = contexts_of(values.size, kinds)
    assert np.array_equal(decode(encode(values, contexts), contexts), values)


@pytest.mark.parametrize("width", range(65))
def test_every_length_comes_back_at_its_ends(width: int) -> None:
    ends = {0, (1 << width) - 1, 1 << max(width - 1, 0), (1 << width) // 3}
    values = np.array(sorted(v for v in ends if v < 1 << 64), np.uint64)
    contexts = np.zeros(values.size, np.uint8)
    assert np.array_equal(decode(encode(values, contexts), contexts), values)


@pytest.mark.parametrize("rate", [0.5, 0.1, 0.02])
def test_the_size_is_near_the_entropy(rate: float) -> None:
    values = (np.random.default_rng(1).random(300_000) < rate).astype(np.uint64)
    size = len(encode(values, np.zeros(values.size, np.uint8)))
    assert size <= 1.25 * entropy_bits(values) / 8


def test_wide_values_are_near_the_entropy() -> None:
    values = np.random.default_rng(2).geometric(0.001, 300_000).astype(np.uint64)
    assert len(encode(values, np.zeros(values.size, np.uint8))) <= 1.04 * entropy_bits(values) / 8


def test_contexts_save_what_they_say() -> None:
    contexts = contexts_of(200_000, 8)
    values = np.random.default_rng(3).integers(0, 1 << contexts.astype(np.int64)).astype(np.uint64)
    told = len(encode(values, contexts))
    assert told <= 1.04 * float(contexts.sum()) / 8
    assert told < 0.9 * len(encode(values, np.zeros(values.size, np.uint8)))


def test_a_context_that_never_surprises_costs_almost_nothing() -> None:
    assert len(encode(np.full(1_000_000, 7, np.uint64), np.zeros(1_000_000, np.uint8))) < 2400


def test_entropy_of_known_distributions() -> None:
    assert entropy_bits(np.array([0, 1] * 50)) == pytest.approx(100)
    assert entropy_bits(np.arange(8)) == pytest.approx(24)
    assert entropy_bits(np.zeros(9)) == 0
    assert entropy_bits(np.zeros(0)) == 0


def sample() -> tuple[bytes, np.ndarray, np.ndarray]:
    contexts = contexts_of(2000, 3)
    values = np.random.default_rng(4).integers(0, 60, 2000).astype(np.uint64)
    return encode(values, contexts), values, contexts


def test_truncated_data_are_refused() -> None:
    data, _, contexts = sample()
    for size in range(0, len(data), 7):
        with pytest.raises(MalformedError):
            decode(data[:size], contexts)


def test_flipped_bits_are_refused_or_give_other_values_but_never_crash() -> None:
    data, values, contexts = sample()
    refused = 0
    for at in range(0, len(data), 11):
        broken = bytearray(data)
        broken[at] ^= 0x10
        try:
            assert not np.array_equal(decode(bytes(broken), contexts), values)
        except MalformedError:
            refused += 1
    assert refused > 20


def test_other_contexts_are_refused() -> None:
    data, _, contexts = sample()
    with pytest.raises(MalformedError):
        decode(data, contexts[:-1])
    with pytest.raises(MalformedError):
        decode(data, (contexts + np.uint8(1)) % np.uint8(3))
    with pytest.raises(MalformedError):
        decode(data, np.zeros(contexts.size, np.uint8))


def test_a_header_that_asks_for_much_is_refused_before_anything_is_made() -> None:
    _, _, contexts = sample()
    with pytest.raises(MalformedError):
        decode(struct.pack("<III", 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF), contexts)
