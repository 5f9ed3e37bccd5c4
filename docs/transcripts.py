"""Run the transcripts of the pages as they stand, and say where a page does not show what is printed now.

A transcript is a fenced block without a language whose lines that begin with `$ ` are commands. Those of a page
run one after another in one scratch directory. `lorabridge` is this checkout's, run by the Python that runs this
script. A difference is printed and the exit code is 1; with --write the pages are brought up to date.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
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
        with tempfile.TemporaryDirectory() as programs:
            _program(Path(programs) / "lorabridge")
            return BLOCK.sub(lambda found: f"```\n{_transcript(found[1], name, programs)}\n```", text)


def _program(path: Path) -> None:
    """Write what runs this checkout's command line, whether or not it is installed."""
    python = shlex.quote(sys.executable)
    path.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {python} -m lorabridge "$@"\n', "utf-8")
    path.chmod(0o755)


def _transcript(block: str, folder: str, programs: str) -> str:
    path = os.pathsep.join([programs, str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    env = {k: v for k, v in os.environ.items() if not k.startswith("LORABRIDGE_")}
    env |= {"PATH": path, "COLUMNS": "120"}
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
    parser = argparse.ArgumentParser(prog="docs/transcripts.py", description=__doc__)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="pages to run; all that have transcripts by default")
    parser.add_argument("--write", action="store_true", help="write what is printed now into the pages")
    given = parser.parse_args()
    probe = subprocess.run([sys.executable, "-m", "lorabridge", "--version"], cwd=ROOT, capture_output=True, text=True)
    if probe.returncode:
        print(f"{sys.executable} cannot run lorabridge: {probe.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return 2
    old = []
    for page in [Path(name) for name in given.pages] or PAGES:
        text = page.read_text("utf-8")
        now = rerun(text)
        if same(text, now):
            continue
        if given.write:
            page.write_text(now, "utf-8")
            print(f"wrote {page}")
        else:
            old.append(page.name)
            one, two = (VARYING.sub("N", content).splitlines() for content in (text, now))
            print("\n".join(difflib.unified_diff(one, two, f"{page} as it stands", "as printed now", n=1, lineterm="")))
    if old:
        print(f"the transcripts of {', '.join(old)} are not what the commands print; run with --write")
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
