"""Write what an inspection found as one HTML page."""

from __future__ import annotations

import hashlib
import time
from io import BufferedReader
from pathlib import Path

from .. import __version__
from ..errors import OutputError, UsageError
from ..files.placeholders import spoken
from ..files.uploading import staged
from ..formats.untrusted import open_regular
from ..reports.inspect_html import MARK, page
from .inspect_report import InspectReport

HEAD = 4096
"""Bytes in which a page's own mark stands."""


def check_path(path: Path) -> None:
    """Refuse, before anything is read, a path to which no page can be written.

    Raises UsageError for another suffix, OutputError for a missing directory and for an existing file that is no page
    of an inspection.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError("the page is HTML", where=str(path), hint="let its name end in .html")
    if not path.parent.is_dir():
        raise OutputError("there is no such directory", where=str(path.parent), hint="create it first")
    if path.exists() and not _is_page(path):
        raise OutputError(
            "the file exists and is not a page of lorabridge inspect", where=str(path), hint="choose another name"
        )


def _is_page(path: Path) -> bool:
    if not path.is_file():
        return False
    with BufferedReader(open_regular(path)) as file:
        return MARK.encode() in file.read(HEAD)


def write_page(report: InspectReport, path: Path) -> None:
    """Write a page, all of it or nothing; an earlier one of the same name is replaced. Errors as in check_path."""
    check_path(path)
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    data = spoken(page(report, foot=f"lorabridge {__version__} · {when}")).encode("utf-8", "replace")
    with staged(path, digest=hashlib.sha256(data).hexdigest(), overwrite=True, directory=False) as staging:
        file = staging.create(path.name)
        file.write(0, data)
        file.close()
        staging.commit()
