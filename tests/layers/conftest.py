from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("mindspore", exc_type=ImportError)
pytest.importorskip("torch")


@pytest.fixture(params=["pynative", "graph"])
def mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test in both of MindSpore's modes."""
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE if request.param == "graph" else ms.PYNATIVE_MODE)
    yield request.param
    ms.set_context(mode=ms.PYNATIVE_MODE)


@pytest.fixture(autouse=True)
def _pynative_and_seeded() -> None:
    import mindspore as ms
    import torch

    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.set_seed(7)
    torch.manual_seed(7)
