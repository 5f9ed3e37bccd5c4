"""Deltas are made once for all blocks of a weight, and to the precision that their use needs."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from lorabridge.arithmetic.deltas import Delta
from lorabridge.arithmetic.recipe import Recipe, Update
from lorabridge.merging.prepared import READY, Prepared, deltas_of


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("magnitude", [False, True])
def test_a_normalised_sum_gets_all_bits_of_its_factors_because_none_can_be_added_later(
    magnitude: bool, exact: bool
) -> None:
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(shape).astype(np.float32).astype(float) for shape in ((4, 30), (20, 4)))
    operands = [a, b, np.ones(20)] if magnitude else [a, b]
    recipe = Recipe("w", (Update(0.5, (0,), magnitude=magnitude),), 20, exact=exact)
    (delta,) = deltas_of(recipe, 30, operands)
    assert bool(delta.rest) == (not magnitude and not exact)
    if magnitude or exact:
        assert np.abs(delta.rows(0, 20) - b @ a / 2).max() < 1e-13


def test_a_delta_is_made_once_and_others_need_not_wait_for_it() -> None:
    prepared, made = Prepared(), []
    started, go_on = threading.Event(), threading.Event()

    def slow() -> tuple[Delta, ...]:
        made.append("slow")
        started.set()
        assert go_on.wait(10)
        return ()

    threads = [threading.Thread(target=prepared.get, args=("slow", slow)) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert started.wait(10)
    for number in range(READY - 1):
        assert prepared.get(number, tuple) == ()
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert made == ["slow"]


def test_a_delta_that_could_not_be_made_is_tried_again() -> None:
    prepared = Prepared()

    def broken() -> tuple[Delta, ...]:
        raise ValueError("once")

    with pytest.raises(ValueError, match="once"):
        prepared.get("key", broken)
    assert prepared.get("key", tuple) == ()
