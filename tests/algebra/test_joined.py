"""Several sources as one: names, rows, and expressions that are lifted from one of them."""

from __future__ import annotations

import numpy as np
import pytest

from lorabridge import axes, numerics
from lorabridge.dtypes import BY_NAME
from lorabridge.joined import Joined, under
from lorabridge.spool import Spool

F32 = BY_NAME["float32"]


def test_joined_sources_read_as_their_parts_do():
    first, second = Spool(), Spool()
    joined = Joined({"base": first, "made": second})
    x = first.put("w", np.arange(6.0).reshape(3, 2), F32)
    y = second.put("w", np.arange(4.0).reshape(2, 2) + 10, F32)
    assert list(joined.specs) == ["base/w", "made/w"]
    tree = axes.join([axes.transpose(under("base", axes.cut(x, 0, 0, 2))), under("made", y)], 1)
    lifted = under("base", axes.cast(axes.join([x, axes.zeros(F32, (1, 2))], 0), BY_NAME["float64"]))
    run = numerics.kernels("", numerics.Notes(), {})
    assert axes.evaluate(tree, joined.read, run).view(np.float32).tolist() == [[0, 2, 10, 11], [1, 3, 12, 13]]
    assert axes.evaluate(lifted, joined.read, run).view(np.float64)[3].tolist() == [0, 0]
    assert joined.read("made/w", (1, 2)).view(np.float32).tolist() == [[12, 13]]
    assert axes.reads(tree) == ("base/w", "made/w")
    assert joined.extents("base/w") == ()
    joined.close()
    with pytest.raises(ValueError, match="slash"):
        Joined({"a/b": first})
