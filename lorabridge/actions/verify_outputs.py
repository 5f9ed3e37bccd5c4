"""Outputs of two networks, position by position, against a bound that is measured: torch's own rounding error.

Let r be what torch computes in float64, t in float32, and m what MindSpore computes in float32. The two float32 runs
do the same operations on the same numbers in other orders, so |m - r| and |t - r| are rounding errors of one kind and
one size, whatever the depth, the widths and the condition of the network. Held against each other are the largest
error over all positions, m's at most FACTOR times t's, and the root mean square, at most MEAN_FACTOR times. Where
torch's error is by chance below what UNITS operations of one rounding each would leave, that counts instead.
Derivation and measurements: docs/verify.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..arithmetic.floats import Numbers
from .verify_report import Check, ModuleRow

FACTOR = 8.0
MEAN_FACTOR = 4.0
UNITS = 4.0
ROUNDOFF = 2.0**-24
TOP = 5
"""Of how many best tokens the order is compared."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Site:
    """One place in the network, all its unmasked positions: ``[positions, width]`` from the three runs.

    ``sequence``: which input sequence each position belongs to; ``position``: its place there.
    """

    path: str
    origin: str
    kind: str
    exact: Numbers
    torch: Numbers
    mindspore: Numbers
    sequence: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]

    def allowed(self) -> tuple[float, float]:
        """Return the bounds of the largest error and of its root mean square."""
        floor = UNITS * ROUNDOFF
        largest = max(_largest(self.torch - self.exact), floor * _largest(self.exact))
        mean = max(_mean(self.torch - self.exact), floor * _mean(self.exact))
        return FACTOR * largest, MEAN_FACTOR * mean


def rows(site: Site) -> Iterator[ModuleRow]:
    """Yield one row for a block, and for the network's own output one for each input sequence."""
    if site.kind == "block":
        yield _row(site, np.ones(len(site.sequence), bool), site.path)
        return
    for number in np.unique(site.sequence):
        here: Mask = site.sequence == number
        yield _row(site, here, f"{site.path} of sequence {number}")


def _row(site: Site, here: Mask, path: str) -> ModuleRow:
    exact, ours = site.exact[here], site.mindspore[here]
    error = np.abs(ours - exact)
    bound, mean_bound = site.allowed()
    ratio = max(_over(_largest(error), bound), _over(_mean(error), mean_bound))
    worst = int(np.argmax(np.nan_to_num(error, nan=np.inf).max(axis=1)))
    where = f"position {site.position[here][worst]}"
    if site.kind == "block":
        where = f"sequence {site.sequence[here][worst]}, {where}"
    ok = bool(ratio <= 1)
    return ModuleRow(
        path, site.kind, ok, origin=site.origin, max_abs=_largest(error), max_rel=_relative(error, ours, exact),
        ulps=_ulps(error, exact), cosine=_cosine(ours, exact), bound=bound, ratio=ratio, elements=int(error.size),
        note=f"worst at {where}",
    )  # fmt: skip


def _largest(x: Numbers) -> float:
    return float(np.abs(x).max(initial=0.0))


def _mean(x: Numbers) -> float:
    return math.sqrt(float(np.mean(np.square(x)))) if x.size else 0.0


def _over(error: float, bound: float) -> float:
    if math.isnan(error):
        return math.inf
    return error / bound if bound > 0 else (0.0 if error == 0 else math.inf)


def _relative(error: Numbers, one: Numbers, two: Numbers) -> float:
    size = np.maximum(np.abs(one), np.abs(two))
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.where(size > 0, error / size, 0.0).max(initial=0.0))


def _ulps(error: Numbers, exact: Numbers) -> float:
    """Return the largest error in float32 units in the last place of the largest number at its position."""
    top = np.abs(exact).max(axis=1, initial=0.0, keepdims=True)
    _, exponent = np.frexp(np.where(np.isfinite(top) & (top > 0), top, 1.0))
    return float((error / np.ldexp(1.0, exponent - 24)).max(initial=0.0))


def _cosine(one: Numbers, two: Numbers) -> float:
    """Return the smallest cosine of all positions; 1 where both are zero."""
    sizes = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.where(sizes > 0, np.sum(one * two, axis=1) / sizes, 1.0)
    return float(np.clip(found, -1.0, 1.0).min(initial=1.0))


def top_check(site: Site, best: int = TOP) -> Check:
    """Check that the best tokens of every position are the same in the same order.

    Two may change places only where the exact numbers lie closer together than twice the bound of the error.
    """
    width = site.exact.shape[1]
    count = min(best, width)
    name = f"the best {count} of {width} at every position" if count > 1 else "the output"
    allowed = 2 * site.allowed()[0]
    want = np.argsort(-site.exact, axis=1, kind="stable")[:, :count]
    got = np.argsort(-site.mindspore, axis=1, kind="stable")[:, :count]
    same = (want == got).all(axis=1)
    gaps = np.take_along_axis(site.exact, want, 1) - np.take_along_axis(site.exact, got, 1)
    wrong = ~(same | (np.abs(gaps) <= allowed).all(axis=1)) | ~np.isfinite(site.mindspore).all(axis=1)
    close = int((~same & ~wrong).sum())
    detail = f"{int((~wrong).sum())} of {len(same)} positions agree"
    detail += f", {close} of them up to a tie within rounding" if close else ""
    places = [f"sequence {site.sequence[i]}, position {site.position[i]}" for i in np.flatnonzero(wrong)]
    return Check(name, not wrong.any(), detail, tuple(places))


def gather(
    kept: Sequence[Mask], path: str, origin: str, kind: str, runs: tuple[Sequence[Numbers], ...]
) -> Site:  # fmt: skip
    """Take the unmasked positions of one place out of all batches.

    ``kept``: for each batch ``[batch, time]``. ``runs``: float64 torch, float32 torch and MindSpore, each with one
    array ``[batch, time, width]`` per batch; ``[batch, width]`` of a pooled output has one position per sequence.
    """
    sequence, position, parts = [], [], [[] for _ in runs]  # type: ignore[var-annotated]
    first = 0
    for number, mask in enumerate(kept):
        pooled = runs[0][number].ndim == 2
        here = np.ones((len(mask), 1), bool) if pooled else mask
        rows, columns = np.nonzero(here)
        sequence.append(rows + first)
        position.append(columns)
        for part, run in zip(parts, runs, strict=True):
            part.append(run[number] if pooled else run[number][here])
        first += len(mask)
    exact, plain, ours = (np.concatenate(part) for part in parts)
    return Site(path, origin, kind, exact, plain, ours, np.concatenate(sequence), np.concatenate(position))
