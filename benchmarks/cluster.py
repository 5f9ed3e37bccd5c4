"""Measure `--engine ray` against `--engine process`: a local cluster of two nodes with one CPU each.

    python benchmarks/cluster.py [--dir DIR] [--times 2] [--gb 1.5]

The ranks of benchmarks/reassemble.py are put together, as they are and with a cast to float32. Every job is a whole
process; the cluster runs before the first, and the workers of each job start anew.
Needs ray and 3 times --gb of disk.
"""

from __future__ import annotations

import filecmp
import os
import sys
import tempfile
from pathlib import Path

from measure import Run, apart, arguments, interleaved, once
from reassemble import make

CPUS = 1


def measure(name: str, command: list[str], out: Path, address: str, times: int) -> None:
    """Run one job with either engine in turns, compare the outputs, print a row for each."""
    file = out / "whole.safetensors"

    def job(*engine: str) -> list[str]:
        return ["sh", "-c", 'mkdir "$0"; exec "$@"', str(out), *command, str(file), *engine]

    ray = ("--engine", "ray", "--address", address)
    best = interleaved({"process": job, "ray": lambda: job(*ray)}, out, times)
    other = out.with_name("other.safetensors")
    once(job())
    file.rename(other)
    once([*command, str(file), *ray])
    if not filecmp.cmp(file, other, shallow=False):
        sys.exit(f"{name}: the files differ")
    size = other.stat().st_size
    other.unlink()
    print(*(row(name, engine, run, size) for engine, run in best.items()), sep="\n", flush=True)


def row(name: str, engine: str, run: Run, size: int) -> str:
    """Return one row of the table."""
    return f"| {name} ({size / 1e6:.0f} MB) | {engine} | {run.wall:.2f} | {run.cpu:.2f} | {run.peak_mb:.0f} |"


def main() -> None:
    """Make the data, start the cluster, run the jobs, print Markdown."""
    parser = arguments(__doc__, times=2, gb=1.5)
    args = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(dir=args.dir) as held:
        work = Path(held)
        apart(make, work, args.gb)
        node = {"num_cpus": CPUS, "object_store_memory": 80 << 20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        try:
            cluster.add_node(**node)
            base = [sys.executable, "-m", "lorabridge"]
            ranks = [str(work / "ranks"), "--strategy", str(work / "strategy.ckpt"), "--no-check-replicas"]
            print("| job | engine | wall s | driver's CPU s | driver's peak MB |\n|---|---|---|---|---|", flush=True)
            for name, options in (("reassemble", []), ("reassemble to float32", ["--dtype", "fp32"])):
                command = [*base, "reassemble", *ranks, *options]
                measure(name, command, work / "out", cluster.address, args.times)
        finally:
            cluster.shutdown()


if __name__ == "__main__":
    main()
