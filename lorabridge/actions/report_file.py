"""Write the report of a verification into a file: HTML, Markdown or PNG, by its suffix."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable
from importlib import metadata
from io import BufferedReader
from pathlib import Path

from .. import __version__
from ..conversion.repository import ADAPTER_CONFIG, MODEL_CONFIG, open_input
from ..errors import OutputError, UsageError
from ..files.placeholders import spoken
from ..files.uploading import staged
from ..formats.untrusted import open_regular
from ..manifest import sidecar
from ..reports.html import MARK, Digests
from .verify_report import VerifyReport

SUFFIXES = (".html", ".htm", ".md", ".png")
LIBRARIES = ("numpy", "torch", "transformers", "peft", "loralib", "mindspore")
READ = 1 << 20
"""Bytes per read where a whole file is hashed."""
HEAD = 4096
"""Bytes in which a report's own mark stands."""


def check_path(path: Path) -> None:
    """Refuse, before anything is compared, a path to which no report can be written.

    Raises UsageError for another suffix and for .png without matplotlib, OutputError for a missing directory and for an
    existing file that is not a report.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            "a report is HTML, Markdown or PNG", where=str(path), hint=f"let its name end in {', '.join(SUFFIXES)}"
        )
    if path.suffix.lower() == ".png":
        from ..reports.png import available

        if why := available():
            raise UsageError("a PNG needs matplotlib", where=why, hint="write FILE.html or FILE.md instead")
    if not path.parent.is_dir():
        raise OutputError("there is no such directory", where=str(path.parent), hint="create it first")
    if path.exists() and not _is_report(path):
        raise OutputError(
            "the file exists and is not a report of lorabridge verify", where=str(path), hint="choose another name"
        )


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with BufferedReader(open_regular(path)) as file:
        return MARK.encode() in file.read(HEAD)


def write_report(report: VerifyReport, path: Path) -> None:
    """Write a report, all of it or nothing; an earlier report of the same name is replaced.

    The digests are those of the inputs as they are now, read once more. Errors as in :func:`check_path`.
    """
    check_path(path)
    data = render(report, path.suffix.lower())
    with staged(path, digest=hashlib.sha256(data).hexdigest(), overwrite=True, directory=False) as staging:
        file = staging.create(path.name)
        file.write(0, data)
        file.close()
        staging.commit()


def render(report: VerifyReport, suffix: str) -> bytes:
    """Return the content of a report file."""
    if suffix == ".png":
        from ..reports.png import png

        return png(report)
    from ..reports.html import page
    from ..reports.markdown import markdown

    spell: Callable[..., str] = markdown if suffix == ".md" else page
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    text = spell(report, digests=digests(report), versions=versions(report), when=when)
    return spoken(text).encode("utf-8", "replace")


def digests(report: VerifyReport) -> Digests:
    """Return the SHA-256 of every file of every input: weights, configs and manifests."""
    return {file.role: [(path.name, _sha256(path)) for path in _files(Path(file.path))] for file in report.files}


def _files(path: Path) -> list[Path]:
    opened = open_input(path)
    try:
        source = opened.source
        found = {extent.path for name in source.specs for extent in source.extents(name)} or {source.path}
    finally:
        opened.source.close()
    folder = path if path.is_dir() else path.parent
    beside = [folder / name for name in (ADAPTER_CONFIG, MODEL_CONFIG)]
    beside += [folder / "lorabridge.json"] if path.is_dir() else [sidecar(path)]
    return [*sorted(found), *(one for one in beside if one.is_file())]


def _sha256(path: Path) -> str:
    with BufferedReader(open_regular(path), READ) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions(report: VerifyReport) -> dict[str, str]:
    """Return the versions of what took part: frameworks where a depth that needs them ran."""
    ran = {depth.name for depth in report.depths if depth.state == "run"}
    names = LIBRARIES if ran & {"layers", "model"} else LIBRARIES[:1]
    found = {"lorabridge": __version__, "python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
