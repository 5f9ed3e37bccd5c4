"""docs/support.md is what docs/support.py finds, and what it finds is so."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lorabridge.dialects import DIALECTS
from lorabridge.families.tables import family_names

DOCS = Path(__file__).parents[1] / "docs"
found = importlib.util.spec_from_file_location("docs_support", DOCS / "support.py")
assert found is not None
assert found.loader is not None
support = importlib.util.module_from_spec(found)
found.loader.exec_module(support)


def test_the_page_is_up_to_date() -> None:
    assert support.PAGE.read_text("utf-8") == support.page(), "run python docs/support.py"


def test_every_dialect_and_every_family_has_a_row() -> None:
    page = support.PAGE.read_text("utf-8")
    assert all(f"| `{dialect.name}` |" in page for dialect in DIALECTS)
    assert all(f"| `{name}` |" in page for name in family_names())


def test_every_dialect_of_lora_holds_linear_layers() -> None:
    page = support.PAGE.read_text("utf-8")
    other = ("adapterhub-bottleneck", "mindpet-adapter", "peft-prompt", "mindpet-prompt")
    for dialect in DIALECTS:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{dialect.name}` |"))
        assert (row.split(" | ")[2] in ("yes", "folded")) == (dialect.name not in other), row
