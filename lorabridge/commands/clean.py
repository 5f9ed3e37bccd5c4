"""The command ``lorabridge clean``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..reports import plain
from ._group import Command, Manual, documented
from ._options import output_options
from ._terminal import Output
from ._values import LOCATION

if TYPE_CHECKING:
    from ..files.staging import StagingArea


@documented(
    Manual(
        arguments={"DIR": "The directory that outputs were written into."},
        groups={"Output": ("json", "quiet", "verbose")},
        examples=("lorabridge clean --dry-run out/", "lorabridge clean out/"),
    )
)
@click.command("clean", cls=Command)
@click.argument("directory", metavar="DIR", type=LOCATION)
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be removed.")
@output_options
def clean(directory: Path, dry_run: bool, json: bool, quiet: bool, verbose: bool) -> None:
    """Remove what killed conversions left in a directory.

    A killed run leaves at most one staging directory beside its target, which the same conversion takes up again;
    this removes those that no running conversion holds. Finished outputs are never touched.
    """
    from ..actions.clean import clean as run

    out = Output("clean", json, quiet, verbose)
    done = run(directory, dry_run=dry_run)
    if json:
        areas = {"removed": [_row(area) for area in done.removed], "held": [_row(area) for area in done.held]}
        out.document({"directory": done.directory, "dry_run": done.dry_run, "nbytes": done.nbytes, **areas})
        return
    verb = "would remove" if dry_run else "removed"
    for area in done.removed:
        out.summary(f"{verb} {plain.escape(str(area.path))} ({plain.size(area.size)}, {_age(area.age)} old)")
    if not done.removed:
        out.summary(f"nothing to remove in {plain.escape(str(directory))}")
    for area in done.held:
        out.hint(f"{area.path} belongs to a running conversion", label="note: ")
    if dry_run and done.removed:
        out.hint("run again without --dry-run to remove", label="next: ")


def _row(area: StagingArea) -> dict[str, object]:
    return {"path": area.path, "nbytes": area.size, "age_seconds": round(area.age, 1)}


def _age(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"
