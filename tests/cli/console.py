"""What the tests of the command line share: results of runs, a clean environment, small factors."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Invoke = Callable[..., Result]


def clean_environ() -> dict[str, str]:
    """Return this environment without what would change the output."""
    dropped = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM", "LANG", "LC_ALL")
    return {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("LORABRIDGE_")}


def factors(rng: np.random.Generator, rank: int = 4, out: int = 6, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    a = rng.standard_normal((rank, width)).astype(np.float32)
    return a, rng.standard_normal((out, rank)).astype(np.float32)
