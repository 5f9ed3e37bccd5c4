"""Run commands as whole processes and measure wall time, CPU time and peak memory."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

COPY = """
import os, sys
def copy(src, dst):
    with open(src, "rb") as a, open(dst, "wb") as b:
        while os.copy_file_range(a.fileno(), b.fileno(), 1 << 30):
            pass
        os.fsync(b.fileno())
src, dst = sys.argv[1:]
if os.path.isdir(src):
    os.mkdir(dst)
    for name in sorted(os.listdir(src)):
        copy(os.path.join(src, name), os.path.join(dst, name))
else:
    copy(src, dst)
"""
"""A plain copy with fsync: what the disk allows."""


@dataclass(frozen=True)
class Run:
    """Best of several runs: seconds of wall and CPU time, and the largest resident set in MB (10^6 bytes)."""

    wall: float
    cpu: float
    peak_mb: float


def once(command: Sequence[str]) -> Run:
    """Run a command to its end; a failure stops the benchmark with its output.

    Bytecode is cached, as it is for every installed package.
    """
    start = time.perf_counter()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)[:300]}\n{output.decode()[-3000:]}")
    return Run(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6)


def arguments(description: str | None, *, times: int, gb: float) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark is told, with its defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: a temporary directory)")
    parser.add_argument("--times", type=int, default=times)
    parser.add_argument("--gb", type=float, default=gb)
    return parser


def apart(make: Callable[..., None], *args: object) -> None:
    """Make data in a process of its own: what a child may claim as its peak memory starts at its parent's."""
    process = multiprocessing.get_context("spawn").Process(target=make, args=args)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit("could not write the benchmark's data")


def remove(path: Path) -> None:
    """Remove what an earlier run wrote."""
    for old in [path, *path.parent.glob(f"{path.name}.lorabridge.json")]:
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)


def interleaved(jobs: dict[str, Callable[[], Sequence[str]]], out: Path, times: int) -> dict[str, Run]:
    """Run every job ``times`` times, in turns so that all meet the same machine; keep the best wall time of each."""
    best: dict[str, Run] = {}
    for _ in range(times):
        for name, command in jobs.items():
            remove(out)
            os.sync()
            run = once(command())
            if name not in best or run.wall < best[name].wall:
                best[name] = run
    remove(out)
    return best


def table(title: str, runs: dict[str, Run], nbytes: int) -> str:
    """Return one comparison as Markdown: times, ratios to the copy and to us, and peak memory."""
    ours, copy = runs["lorabridge"], runs["copy + fsync"]
    lines = [
        f"\n### {title} ({nbytes / 1e6:.0f} MB)\n",
        "| command | wall s | CPU s | peak MB | copy's time / its time | times lorabridge's |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {run.wall:.2f} | {run.cpu:.2f} | {run.peak_mb:.0f} "
        f"| {copy.wall / run.wall:.2f} | {run.wall / ours.wall:.1f} |"
        for name, run in runs.items()
    ]
    return "\n".join(lines)
