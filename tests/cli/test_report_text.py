from __future__ import annotations

import json
import math
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge.errors import MappingError
from lorabridge.reports import plain

HOSTILE = "a\x1b[31m\x9b2J\u202eb\u2066\u200b\n\r\t\x00\x7f\u2028\ud800\U000e0041é漢"


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters()))
def test_escaped_text_holds_no_character_that_a_terminal_obeys(text: str) -> None:
    escaped = plain.escape(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in escaped)


def test_escape_keeps_letters_of_every_script_and_spells_the_rest() -> None:
    escaped = plain.escape(HOSTILE)
    assert escaped == (r"a\x1b[31m\x9b2J\u202eb\u2066\u200b\n\r\t\x00\x7f\u2028\ud800\U000e0041" + "é漢")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1 kB"), (999_499, "999 kB"), (999_500, "1 MB"),
     (498_000_000, "498 MB"), (5 * 10**9, "5 GB"), (10**18, "1e+03 PB")],
)  # fmt: skip
def test_sizes_are_decimal_with_three_digits(nbytes: int, text: str) -> None:
    assert plain.size(nbytes) == text


def test_table_aligns_columns_by_display_width() -> None:
    text = plain.table(("name", "n"), [("漢字", "1"), ("a", "100")], right=" r")
    assert text.split("\n") == ["name    n", "漢字    1", "a     100"]


def test_a_table_too_wide_becomes_a_list_that_loses_nothing() -> None:
    rows = [("layers.0.attention.query", "linear", "8"), ("layers.1.attention.query", "linear", "16")]
    text = plain.table(("module", "kind", "rank"), rows, width=20)
    assert text.split("\n") == [
        "layers.0.attention.query", "  kind linear, rank", "  8",
        "layers.1.attention.query", "  kind linear, rank", "  16",
    ]  # fmt: skip


def test_a_name_cannot_forge_a_row() -> None:
    assert len(plain.table(("name",), [("a\nerror: forged",)]).split("\n")) == 2


def test_error_text_escapes_each_part_and_keeps_its_lines() -> None:
    error = MappingError("no \x1b[2J", where=[f"t\n{i}" for i in range(12)], hint="look\r")
    lines = plain.error_text(error).split("\n")
    assert lines[0] == r"no \x1b[2J"
    assert lines[1] == r"  t\n0"
    assert lines[-2] == "  and 2 more (--json lists all)"
    assert lines[-1] == r"hint: look\r"


def test_json_is_ascii_and_strict() -> None:
    text = plain.json_text(
        {"a": math.nan, "b": [math.inf, -math.inf, 1.5], "c": Path("x/y"), "d": HOSTILE, "e": {3, 1}}
    )
    assert text.isascii()
    assert "\x7f" not in text
    parsed = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert parsed == {"a": "NaN", "b": ["Infinity", "-Infinity", 1.5], "c": "x/y", "d": HOSTILE, "e": [1, 3]}


def test_json_refuses_what_has_no_json_form() -> None:
    with pytest.raises(TypeError, match="bytes"):
        plain.json_text({"a": b"x"})


def test_html_holds_no_markup_from_names() -> None:
    name = "<script>alert(1)</script>\x1b\"'&"
    html = plain.table_html(name, (name,), [(name, 3)]) + plain.list_html(name, [name])
    assert "<script" not in html
    assert "\x1b" not in html
    assert html.count("&lt;script&gt;") == 5
