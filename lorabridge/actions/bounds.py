"""Error bounds of verification: how far two correct computations of the same thing can lie apart.

The model is the standard one (Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, chapters 2 and 3):
``fl(a op b) = (a op b)(1 + d)``, ``|d| <= u``. A term that goes through n operations carries at most
``gamma(n) = n u / (1 - n u)`` of its own size, in whatever order a library adds, with or without fused
multiply-add (Lemma 3.1 and section 3.1). Derivations for each layer: docs/verify.md.
"""

from __future__ import annotations

import math

import numpy as np

from ..arithmetic.floats import LAYOUTS, Numbers
from ..dtypes import DType

SLACK = 8
"""Operations on a term beside its dot products: scaling (and its own rounding), sums with base and biases, a norm."""


def roundoff(dtype: DType) -> float:
    """Return u, half the distance from 1 to the next number; 0 for types that do not round."""
    layout = LAYOUTS.get(dtype.name)
    return 0.0 if layout is None else 2.0 ** -(layout.mantissa + 1)


def smallest(dtype: DType) -> float:
    """Return the smallest positive number of a type: what an underflow can lose at most."""
    layout = LAYOUTS[dtype.name]
    return 2.0 ** max(layout.least - layout.mantissa, -1074)


def gamma(n: int, u: float) -> float:
    """Return ``n u / (1 - n u)``; infinite where the bound says nothing."""
    return n * u / (1 - n * u) if n * u < 1 else math.inf


def qr_noise(rows: int, columns: int, width: int, u: float = 2.0**-53) -> float:
    """Bound the relative error of ``||L R||`` computed through thin QR factorizations, ``L[rows, width]``.

    Householder QR returns the exact R of a matrix perturbed by ``gamma(c m n)`` in the Frobenius norm (Higham, Theorem
    19.4, with c = 4 here); the core product adds ``gamma(width)``, the scaling one rounding. Relative to
    ``||L||_F ||R||_F``.
    """
    left, right = gamma(4 * rows * width, u), gamma(4 * columns * width, u)
    return left + right + left * right + gamma(width + 2, u) * (1 + left) * (1 + right)


def ulps(difference: Numbers, numbers: Numbers, dtype: DType) -> Numbers:
    """Return absolute differences in units in the last place that ``numbers`` have in ``dtype``."""
    layout = LAYOUTS[dtype.name]
    _, exponent = np.frexp(np.where(np.isfinite(numbers), numbers, 1.0))
    place = np.ldexp(1.0, np.maximum(exponent - 1, layout.least) - layout.mantissa)
    return np.asarray(np.abs(difference) / place)
