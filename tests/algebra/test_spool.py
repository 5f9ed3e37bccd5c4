"""Tensors made on the way: what was put is read back, whole and by rows, rounded once."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from lorabridge.dtypes import BY_NAME
from lorabridge.errors import MappingError
from lorabridge.spool import Spool


def test_tensors_come_back_whole_and_by_rows():
    numbers = np.random.default_rng(0).standard_normal((7, 3))
    spool = Spool()
    try:
        for name in ("float32", "bfloat16", "float64"):
            expr = spool.put(name, numbers, BY_NAME[name])
            assert (expr.dtype.name, expr.shape) == (name, (7, 3))
        assert spool.read("float32").view(np.float32).tolist() == numbers.astype(np.float32).tolist()
        halves = spool.read("bfloat16", (2, 5)).view(ml_dtypes.bfloat16)
        assert np.abs(halves.astype(float) - numbers[2:5]).max() < 2**-7
        assert spool.read("float64", (0, 0)).shape == (0, 3)
        assert list(spool.specs) == ["float32", "bfloat16", "float64"]
        assert spool.extents("float32") == ()
        with pytest.raises(ValueError, match="before"):
            spool.put("float32", numbers, BY_NAME["float32"])
        with pytest.raises(MappingError, match="fit float16"):
            spool.put("big", np.full((1,), 1e6), BY_NAME["float16"], where="layer")
    finally:
        spool.close()


def test_the_digest_is_of_the_content():
    def digest(value):
        spool = Spool()
        spool.put("x", np.full((2,), value), BY_NAME["float32"])
        spool.close()
        return spool.digest

    assert digest(1.0) == digest(1.0) != digest(2.0)
