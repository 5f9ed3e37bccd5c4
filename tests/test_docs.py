"""What the pages print is what the commands print."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("page", "commands"),
    [
        ("README.md", 7),
        ("docs/verify.md", 4),
        ("docs/unmerge.md", 5),
        ("docs/mindformers.md", 4),
        ("docs/diffusion.md", 8),
        ("docs/other-dialects.md", 10),
        ("docs/distributed.md", 9),
        ("docs/mindpet.md", 4),
        ("docs/ray.md", 1),
    ],
)
def test_transcripts_are_real(page: str, commands: int) -> None:
    spec = importlib.util.spec_from_file_location("transcripts", ROOT / "docs" / "transcripts.py")
    assert spec is not None
    assert spec.loader is not None
    transcripts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(transcripts)
    text = (ROOT / page).read_text("utf-8")
    now = transcripts.rerun(text)
    assert now.count("\n$ ") >= commands
    assert transcripts.same(text, now)


def test_every_link_of_the_docs_leads_somewhere() -> None:
    import re

    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "mappings" / "README.md"]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_page_on_the_api_names_what_there_is() -> None:
    import re

    import lorabridge

    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    named = set(re.findall(r"^\| `(\w+)\(", text, re.MULTILINE)) | set(re.findall(r"`(\w+Options)`", text))
    assert named <= set(lorabridge.__all__)
    assert {name for name in lorabridge.__all__ if name.islower() or name.endswith("Options")} <= named
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(code, "docs/api.md", "exec")
