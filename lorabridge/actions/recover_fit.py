"""Fit a factor pair to the change of a weight: the reading, the scaling and the residual, by least squares.

With ``P = B @ A`` in some reading and ``D`` the change of the weight, the scaling that fits best is
``s = <D, P> / <P, P>``, and what it leaves is ``||D - s P||``. Inner products go block by block through
``<D, L R> = <L^T D, R>``, so that neither product is ever formed whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..arithmetic.floats import Numbers

Changes = Callable[[], Iterator[tuple[int, Numbers]]]
"""Yield (first row, rows of the change) of a weight as a matrix, each time it is called."""
MAX_BLOCKS = 12


@dataclass(frozen=True, slots=True)
class Reading:
    """One meaning of a pair: products ``left[i] @ right[i]`` that fill some of ``slots`` equal intervals of an axis.

    ``left[i]`` ``[rows, rank]``, ``right[i]`` ``[rank, columns]``, over the weight as it is stored. ``turned``: the
    weight is stored as the transpose of ``B @ A``. One product and one slot is a plain pair.
    """

    left: tuple[Numbers, ...]
    right: tuple[Numbers, ...]
    rank: int
    turned: bool = False
    slots: int = 1
    axis: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a reading explains a change.

    ``scaling``: of the best fit; ``error``: its standard error; ``residual``: relative to the change's norm. ``mask``:
    which slots the products fill.
    """

    reading: Reading
    mask: tuple[bool, ...]
    scaling: float
    error: float
    residual: float


def readings(
    a: Numbers, b: Numbers, shape: tuple[int, ...], *, orders: tuple[bool, ...] = (False, True)
) -> list[Reading]:
    """Return every reading of ``a`` and ``b`` (as stored) that gives a weight of ``shape``.

    Plain pairs of linear layers and embeddings, loralib's MergedLinear, and convolutions in peft's and loralib's form
    (one group). ``orders``: which storage orders to try: ``[out, in]`` (False), ``[in, out]`` (True).
    """
    rows, columns = shape[0], math.prod(shape[1:])
    found = []
    if a.ndim > 2 or b.ndim > 2 or len(shape) > 2:
        return _convolutions(a, b, shape)
    for turned in orders:
        out, inner = (columns, rows) if turned else (rows, columns)
        if a.shape[1] == inner and a.shape[0] == b.shape[1] and b.shape[0] == out:
            found.append(_plain(a, b, turned))
        found += _merged(a, b, out, inner, turned)
    return found


def _plain(a: Numbers, b: Numbers, turned: bool) -> Reading:
    left, right = (np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)) if turned else (b, a)
    return Reading((left,), (right,), a.shape[0], turned)


def _merged(a: Numbers, b: Numbers, out: int, inner: int, turned: bool) -> list[Reading]:
    """Read loralib's MergedLinear: A of n blocks stacked, B of n blocks stacked, in a weight of more or as many."""
    rank = b.shape[1]
    if a.shape[1] != inner or not rank or a.shape[0] < rank or a.shape[0] % rank:
        return []
    count = a.shape[0] // rank
    rows = b.shape[0] // count
    if b.shape[0] % count or not rows or out % rows or not max(count, 2) <= out // rows <= MAX_BLOCKS:
        return []
    blocks = [(a[i * rank : (i + 1) * rank], b[i * rows : (i + 1) * rows]) for i in range(count)]
    if turned:
        left = tuple(np.ascontiguousarray(x.T) for x, _ in blocks)
        right = tuple(np.ascontiguousarray(y.T) for _, y in blocks)
    else:
        left, right = tuple(y for _, y in blocks), tuple(x for x, _ in blocks)
    return [Reading(left, right, rank, turned, out // rows, 1 if turned else 0, f"MergedLinear of {out // rows} parts")]


def _convolutions(a: Numbers, b: Numbers, shape: tuple[int, ...]) -> list[Reading]:
    out, size = shape[0], math.prod(shape)
    if a.ndim > 2 and a.shape[1:] == shape[1:] and b.shape[:2] == (out, a.shape[0]):
        return [Reading((b.reshape(out, -1),), (a.reshape(a.shape[0], -1),), a.shape[0], note="peft's convolution")]
    if a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] and b.shape[0] * a.shape[1] == size:
        # loralib views b @ a as the weight: some rows of the product make one row of it
        steps = b.shape[0] // out if b.shape[0] % out == 0 else 0
        side = shape[-1]
        if steps and a.shape[0] % side == 0:
            rank = a.shape[0] // side
            wide = np.kron(np.eye(steps), a)
            return [Reading((b.reshape(out, -1),), (wide,), rank, note="loralib's convolution")]
    return []


def fit(reading: Reading, changes: Changes, shape: tuple[int, int]) -> Fit | None:
    """Fit one reading; None where its product is zero, or the change is."""
    inner, total = _inner(reading, changes, shape)
    norms = [float(np.vdot(x.T @ x, y @ y.T)) for x, y in zip(reading.left, reading.right, strict=True)]
    whole = sum(norms)
    if whole <= 0 or total <= 0 or not math.isfinite(whole):
        return None
    count = len(reading.left)
    best = max(
        itertools.combinations(range(reading.slots), count),
        key=lambda slots: abs(sum(inner[i, slot] for i, slot in enumerate(slots))),
    )
    scaling = sum(inner[i, slot] for i, slot in enumerate(best)) / whole
    mask = tuple(slot in best for slot in range(reading.slots))
    rest = math.sqrt(_rest(reading, best, scaling, changes, shape))
    error = rest / math.sqrt(whole * shape[0] * shape[1])
    return Fit(reading, mask, float(scaling), error, rest / math.sqrt(total))


def _inner(reading: Reading, changes: Changes, shape: tuple[int, int]) -> tuple[Numbers, float]:
    """Return ``<D, P_i in slot j>`` for every product and slot, and the square of the change's norm."""
    slots, axis = reading.slots, reading.axis
    width = shape[axis] // slots
    sums = [[np.zeros((x.shape[1], y.shape[1])) for _ in range(slots)]
            for x, y in zip(reading.left, reading.right, strict=True)]  # fmt: skip
    total = 0.0
    for first, block in changes():
        last = first + block.shape[0]
        total += float(np.vdot(block, block))
        for j in range(slots):
            if axis == 1:
                part, low, high = block[:, j * width : (j + 1) * width], first, last
            else:
                low, high = max(first, j * width), min(last, (j + 1) * width)
                if low >= high:
                    continue
                part = block[low - first : high - first]
                low, high = low - j * width, high - j * width
            for i, x in enumerate(reading.left):
                sums[i][j] += x[low:high].T @ part
    inner = [[float(np.vdot(s, y)) for s in row] for row, y in zip(sums, reading.right, strict=True)]
    return np.array(inner), total


def _rest(reading: Reading, chosen: tuple[int, ...], scaling: float, changes: Changes, shape: tuple[int, int]) -> float:
    """Return the square of ``||D - s P||``, from the numbers themselves."""
    width = shape[reading.axis] // reading.slots
    square = 0.0
    for first, block in changes():
        rest, last = block.copy(), first + block.shape[0]
        for i, j in enumerate(chosen):
            if reading.axis == 1:
                rest[:, j * width : (j + 1) * width] -= scaling * (reading.left[i][first:last] @ reading.right[i])
                continue
            low, high = max(first, j * width), min(last, (j + 1) * width)
            if low < high:
                part = reading.left[i][low - j * width : high - j * width] @ reading.right[i]
                rest[low - first : high - first] -= scaling * part
        square += float(np.vdot(rest, rest))
    return square


def nearest(value: float, error: float) -> tuple[float, bool]:
    """Return the simplest number within four standard errors (at least one part in a million), and if one is near.

    Simple: whole, then multiples of 0.5, 0.25, 0.1, 0.05, 0.01.
    """
    allowed = max(4 * error, 1e-6 * abs(value))
    for step in (1.0, 0.5, 0.25, 0.1, 0.05, 0.01):
        near = round(value / step) * step
        if near and abs(near - value) <= allowed:
            return float(f"{near:.10g}"), True
    return float(f"{value:.6g}"), False
