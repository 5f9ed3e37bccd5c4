"""Progress of long work: a bar on a terminal, a line now and then in a log, nothing where it is not wanted."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from ..reports import plain
from ._terminal import write

if TYPE_CHECKING:
    from tqdm import tqdm

    Bar = tqdm[NoReturn]

INTERVAL = 30.0
"""Seconds between two lines in a log."""


class Progress:
    """Show bytes done of bytes in total on stderr; call it with both from any thread."""

    def __init__(self, label: str, *, enabled: bool = True) -> None:
        self._label = label
        self._enabled = enabled and sys.stderr is not None
        self._lock = threading.Lock()
        self._bar: Bar | None = None
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes are done."""
        if not self._enabled:
            return
        with self._lock:
            if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
                self._show_bar(done, total)
            elif time.monotonic() - self._last >= INTERVAL:
                self._last = time.monotonic()
                write(sys.stderr, self._line(done, total))

    def _show_bar(self, done: int, total: int) -> None:
        if self._bar is None:
            if done >= total:
                return  # over before there was anything to watch
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=self._label, unit="B", unit_scale=True, leave=False, file=sys.stderr)
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def _line(self, done: int, total: int) -> str:
        rate = done / max(time.monotonic() - self._start, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if rate > 0 else ""
        share = 100 * done // total if total else 100
        return f"{self._label}: {plain.size(done)} of {plain.size(total)} ({share} %), {plain.size(int(rate))}/s{left}"
