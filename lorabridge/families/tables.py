"""Family tables: TOML text to a proved :class:`Table`, and where the tables that ship with the package lie."""

from __future__ import annotations

import tomllib
from pathlib import Path

from ..errors import InputError, MappingError
from ..formats.untrusted import read_small
from .completeness import check_complete, tied_checks
from .grammar import Item, Reader, table_of
from .mapping import map_adapter
from .models import detect_family, names, sizes_from_config
from .proofs import prove
from .respelling import relaid, respell
from .rules import Table
from .variants import layout_from_config, resolve

__all__ = [
    "Table", "check_complete", "detect_family", "family_names", "layout_from_config", "load_family", "load_table",
    "load_tables", "map_adapter", "names", "read_table", "relaid", "resolve", "respell", "sizes_from_config",
    "tied_checks",
]  # fmt: skip

LARGEST_FILE = 256 * 1024
MOST_FILES = 200


def load_tables(extra_dir: Path | None = None) -> dict[str, Table]:
    """Return every table by family, those of ``extra_dir`` beside the shipped ones.

    An InputError names a malformed table, or a family that two files claim.
    """
    found: dict[str, Table] = {}
    for folder in [_shipped(), *([extra_dir] if extra_dir is not None else [])]:
        for path in _files(folder, extra_dir):
            _add(found, load_table(path, proved=folder == _shipped()), path)
    return found


def load_family(family: str, extra_dir: Path | None = None) -> Table:
    """Return one family's table without loading every other: a shipped table's file has its family's name.

    Raises MappingError listing the known families when there is none, InputError as :func:`load_tables` does.
    """
    own: dict[str, Table] = {}
    for path in _files(extra_dir, extra_dir) if extra_dir is not None else ():
        _add(own, load_table(path), path)
    shipped = {path.stem: path for path in _files(_shipped(), None)}
    if family in shipped:
        _add(own, load_table(shipped[family], proved=True), shipped[family])
    if family not in own:
        raise MappingError(
            f"no table for the family {family!r}",
            where=f"known families: {', '.join(family_names(extra_dir))}",
            hint="pick one with --family, or give your own table with --mappings DIR",
        )
    return own[family]


def family_names(extra_dir: Path | None = None) -> list[str]:
    """Return the known families, sorted; the shipped tables are not opened for it."""
    own = [load_table(path).family for path in _files(extra_dir, extra_dir)] if extra_dir is not None else []
    return sorted({*own, *(path.stem for path in _files(_shipped(), None))})


def _files(folder: Path, extra_dir: Path | None) -> list[Path]:
    paths = sorted(path for path in folder.glob("*.toml") if path.is_file())
    if len(paths) > MOST_FILES or (folder is extra_dir and not folder.is_dir()):
        raise InputError(
            f"not a directory of at most {MOST_FILES} tables", where=str(folder), hint="give --mappings a directory"
        )
    return paths


def _add(found: dict[str, Table], table: Table, path: Path) -> None:
    if table.family in found:
        raise InputError(
            f"two tables claim the family {table.family!r}",
            where=(found[table.family].file, str(path)),
            hint="give your table a family name of its own and choose it with --family",
        )
    found[table.family] = table


def load_table(path: Path, *, proved: bool = False) -> Table:
    """Read and prove one table file; an InputError lists every problem with file and line.

    ``proved``: it ships with the package, whose tests have proved it; that takes most of the time.
    """
    raw, size = read_small(path, LARGEST_FILE)
    if size > LARGEST_FILE:
        raise InputError(f"the table is larger than {LARGEST_FILE} bytes", where=str(path))
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("the table is not UTF-8 text", where=f"{path}, byte {error.start}") from None
    return read_table(text, path.name, proved=proved)


def read_table(text: str, file: str, *, proved: bool = False) -> Table:
    """Turn a table's text into a proved value; an InputError lists every problem with ``file`` and line.

    ``proved``: the laws are known to hold, the grammar is checked all the same.
    """
    try:
        data: Item = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError("the table is not TOML", where=f"{file}: {problem[:200]}") from None
    reader = Reader(file, text.splitlines())
    table = table_of(reader, data)
    problems = reader.problems or ([] if proved else prove(table))
    if problems:
        raise InputError(f"{file} is not a valid table", where=problems, hint="see mappings/README.md for the grammar")
    return table


def _shipped() -> Path:
    """Return the folder of tables inside the wheel, or beside the package in a checkout."""
    here = Path(__file__).parents[1]
    inside = here / "mappings"
    return inside if inside.is_dir() else here.parent / "mappings"
