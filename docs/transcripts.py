"""Run the transcripts of the README as they stand: `python docs/transcripts.py [--write]` from the checkout's root.

A transcript is a fenced block without a language whose lines that begin with `$ ` are commands. All of them run one
after another in one scratch directory. Without --write, a difference is printed and the exit code is 1.
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
SECONDS = re.compile(r"in \d+\.\d s\b")


def rerun(text: str) -> str:
    """Return the page with every transcript as it is printed now."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "examples").symlink_to(ROOT / "examples")
        return BLOCK.sub(lambda found: f"```\n{_transcript(found[1], name)}\n```", text)


def _transcript(block: str, folder: str) -> str:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    lines = []
    for command in (line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")):
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        lines += [f"$ {command}", *done.stdout.rstrip().splitlines()]
    return "\n".join(lines)


def same(one: str, two: str) -> bool:
    """Compare pages; how long a command took does not count."""
    return SECONDS.sub("in S s", one) == SECONDS.sub("in S s", two)


def main() -> int:
    """Check or rewrite the README."""
    page = ROOT / "README.md"
    text = page.read_text("utf-8")
    now = rerun(text)
    if "--write" in sys.argv[1:]:
        page.write_text(now, "utf-8")
        return 0
    if same(text, now):
        return 0
    print("the README's transcripts are not what the commands print; run python docs/transcripts.py --write")
    return 1


if __name__ == "__main__":
    sys.exit(main())
