"""Text, JSON and HTML forms of reports and errors, safe for any terminal or notebook that shows them."""

from __future__ import annotations

import json
import math
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from ..errors import counted

if TYPE_CHECKING:
    from ..errors import LorabridgeError

count = counted

# Cc: control; Cf: bidi marks, zero-width, tags; Cs: lone surrogates; Co, Cn: unassigned; Zl, Zp: line separators.
_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def escape(text: str, *, keep: str = "") -> str:
    """Spell control, bidirectional and invisible characters as backslash escapes, except those in ``keep``.

    Tensor names come from files: an unescaped one could move the cursor, hide text or forge a line of a report.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_spell(c) if c not in keep and unicodedata.category(c) in _UNSAFE else c for c in text)


def _spell(char: str) -> str:
    number = ord(char)
    short = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(char)
    return short or (f"\\x{number:02x}" if number < 256 else _wide(number))


def _wide(number: int) -> str:
    return f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"


def size(nbytes: int) -> str:
    """Spell a number of bytes with three digits and decimal units (1 MB = 10**6 bytes)."""
    value, unit = float(nbytes), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    if unit == 0:
        return f"{nbytes} byte{'' if nbytes == 1 else 's'}"
    return f"{value:.3g} {_UNITS[unit]}"


def number(value: float | None) -> str:
    """Spell a number with up to six significant digits; ``?`` when it is unknown."""
    if value is None:
        return "?"
    return f"{value:.6g}"


def shape(dims: Sequence[int]) -> str:
    """Spell a shape as ``[768, 8]``."""
    return "[" + ", ".join(str(n) for n in dims) + "]"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: str = "", width: int | None = None) -> str:
    """Align rows under a header, cells escaped; wider than ``width``, each row becomes a small list instead.

    ``right`` holds one letter per column, ``r`` for those aligned to the right. Nothing is ever cut off.
    """
    cells = [[escape(cell) for cell in row] for row in rows]
    widths = [max(_columns(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    if width is not None and sum(widths) + 2 * (len(widths) - 1) > width:
        return _stacked(header, cells, width)
    right = right.ljust(len(header))
    return "\n".join(
        "  ".join(_pad(cell, widths[i], right[i] == "r") for i, cell in enumerate(row)).rstrip()
        for row in [list(header), *cells]
    )


def _stacked(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> str:
    lines = []
    for row in rows:
        lines.append(row[0])
        rest = ", ".join(f"{name} {cell}" for name, cell in zip(header[1:], row[1:], strict=True) if cell)
        lines += textwrap.wrap(
            rest,
            max(width, 20),
            initial_indent="  ",
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def _columns(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - _columns(text))
    return space + text if right else text + space


def error_text(error: LorabridgeError) -> str:
    """Spell an error as its lines (problem, places, hint) with every part escaped."""
    plain = type(error)(escape(error.problem), where=[escape(place) for place in error.where], hint=escape(error.hint))
    return plain.text()


def json_text(document: Mapping[str, object]) -> str:
    """Spell a document as indented JSON in ASCII.

    Frozen dataclasses become objects, paths strings as given, NaN and infinities the strings "NaN", "Infinity" and
    "-Infinity" (JSON has no such numbers). Keys keep their order.
    """
    return json.dumps(plain(document), indent=2, ensure_ascii=True, allow_nan=False).replace("\x7f", "\\u007f")


def plain(value: object) -> object:
    """Reduce a value to what JSON can say; a TypeError names a type that has no JSON form."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [plain(item) for item in items]
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    raise TypeError(f"{type(value).__name__} has no JSON form")


def html_text(text: object) -> str:
    """Escape a value for HTML: control characters first, then markup."""
    import html

    return html.escape(escape(str(text)), quote=True)


def table_html(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return an HTML table under a title, every cell escaped; no scripts, no styles."""
    head = "".join(f"<th>{html_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><caption>{html_text(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def list_html(title: str, items: Iterable[str]) -> str:
    """Return a titled list with every item escaped."""
    return f"<p>{html_text(title)}</p><ul>" + "".join(f"<li>{html_text(item)}</li>" for item in items) + "</ul>"
