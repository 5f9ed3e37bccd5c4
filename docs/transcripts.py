"""Run the transcripts of the pages as they stand: `python docs/transcripts.py [--write]` from the checkout's root.

A transcript is a fenced block without a language whose lines that begin with `$ ` are commands. Those of a page
run one after another in one scratch directory. Without --write, a difference is printed and the exit code is 1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```\n(\$ .*?)^```$", re.MULTILINE | re.DOTALL)
NAMES = ("verify", "unmerge", "mindformers", "diffusion", "other-dialects", "distributed", "mindpet")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES))
NUMBER = r"\d+(?:\.\d+)?(?:e[-+]\d+)?"
VARYING = re.compile(
    rf"(?<=in )\d+\.\d s\b|(?<=error at most ){NUMBER}|(?<=within ){NUMBER}|(?<=by up to ){NUMBER}"
    rf"|{NUMBER}(?= (?:of its bound|bounds)\b)"
)
"""Seconds and rounding errors, which are not the same on every machine."""
PROGRESS = re.compile(r" of .* \(\d+ %\), .*/s, .* left$")
"""What a command says every 30 seconds, which a fast machine never shows."""


def rerun(text: str) -> str:
    """Return the page with every transcript as it is printed now."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "examples").symlink_to(ROOT / "examples")
        (Path(name) / "dialects").symlink_to(ROOT / "tests" / "dialects")
        (Path(name) / "diffusion").symlink_to(ROOT / "tests" / "dialects" / "diffusers")
        (Path(name) / "lycoris").symlink_to(ROOT / "tests" / "dialects" / "lycoris")
        (Path(name) / "mindformers").symlink_to(ROOT / "tests" / "dialects" / "mindformers_files")
        (Path(name) / "distributed").symlink_to(ROOT / "tests" / "distributed" / "data")
        return BLOCK.sub(lambda found: f"```\n{_transcript(found[1], name)}\n```", text)


def _transcript(block: str, folder: str) -> str:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    lines = []
    for command in (line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")):
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        lines += [f"$ {command}", *(line for line in done.stdout.rstrip().splitlines() if not PROGRESS.search(line))]
    return "\n".join(lines)


def same(one: str, two: str) -> bool:
    """Compare pages; how long a command took and by how much results were rounded does not count."""
    return VARYING.sub("N", one) == VARYING.sub("N", two)


def main() -> int:
    """Check or rewrite the pages."""
    old = []
    for page in PAGES:
        text = page.read_text("utf-8")
        now = rerun(text)
        if "--write" in sys.argv[1:]:
            page.write_text(now, "utf-8")
        elif not same(text, now):
            old.append(page.name)
    if old:
        print(f"the transcripts of {', '.join(old)} are not what the commands print; run with --write")
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
