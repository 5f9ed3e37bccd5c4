"""What every test may rely on: the terminal's width and the user's settings do not reach it."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a terminal, a test runner or a user has set (pytest-xdist sets COLUMNS in its workers)."""
    kept = {"LORABRIDGE_WITNESS"}
    for name in set(os.environ) - kept:
        if name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR") or name.startswith("LORABRIDGE_"):
            monkeypatch.delenv(name)
