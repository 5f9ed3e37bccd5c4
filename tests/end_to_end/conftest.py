from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))


@pytest.fixture(scope="session")
def mindspore():
    """MindSpore with its memory guard (which counts the page cache as used memory) out of the way."""
    import mindspore

    mindspore.train.serialization._get_available_memory = lambda: None
    return mindspore
