"""Measure `lorabridge reassemble` against a plain copy with fsync and against MindSpore's own tools.

    python benchmarks/reassemble.py [--dir DIR] [--times 2] [--gb 4]

Eight ranks, tensor parallel 4 and optimizer shards of 2, float16 weights in the shape of Llama 7B: q, k, v, gate and up
cut by rows, o and down by columns, every rank's slices cut again by rows for the optimizer. Every job is a whole
process, start-up included, in turns with the others. The copy copies the eight files. Needs mindspore and 3 times --gb
of disk.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from measure import COPY, apart, arguments, interleaved, table

TRANSFORM = """
import sys, mindspore
source, strategy, out = sys.argv[1:]
mindspore.transform_checkpoints(source, out, "whole", strategy, None, output_format="safetensors")
"""
UNIFIED = """
import sys, mindspore
source, strategy, out = sys.argv[1:]
mindspore.unified_safetensors(source, strategy, out)
"""
FLAT_COPY = COPY.replace("os.mkdir(dst)", "os.makedirs(dst)").replace(
    "copy(os.path.join(src, name), os.path.join(dst, name))",
    "copy(os.path.join(src, name, 'net.safetensors'), os.path.join(dst, name))",
)
RANKS = 8


def make(work: Path, gb: float) -> None:
    """Write the ranks' files and the strategy."""
    import numpy as np
    from safetensors.numpy import save_file

    from lorabridge.distributed.layout import Layout
    from lorabridge.distributed.strategy import write_strategy

    hidden, inner = 4096, 11008
    column, row = Layout((2, 4), ((1,), ()), 2), Layout((2, 4), ((), (1,)), 2)
    layer = {
        **dict.fromkeys(("attention.wq", "attention.wk", "attention.wv"), (column, (hidden, hidden))),
        "attention.wo": (row, (hidden, hidden)),
        **dict.fromkeys(("feed_forward.w1", "feed_forward.w3"), (column, (inner, hidden))),
        "feed_forward.w2": (row, (hidden, inner)),
    }
    count = round(gb * 1e9 / sum(2 * shape[0] * shape[1] for _, shape in layer.values()))
    tensors = {f"model.layers.{i}.{name}.weight": about for i in range(count) for name, about in layer.items()}
    (work / "strategy.ckpt").write_bytes(write_strategy(0, {name: layout for name, (layout, _) in tensors.items()}))
    noise = np.random.default_rng(0).integers(0, 2**16, 1 << 24, dtype=np.uint16).view(np.float16)
    for rank in range(RANKS):
        held = {}
        for number, (name, (layout, shape)) in enumerate(tensors.items()):
            local = layout.local_shape(shape)
            assert local is not None
            start = (number * 7919 + rank * 104729) % (1 << 20)
            held[name] = noise[start : start + local[0] * local[1]].reshape(local)
        folder = work / "ranks" / f"rank_{rank}"
        folder.mkdir(parents=True)
        save_file(held, folder / "net.safetensors", metadata={"format": "ms"})


def main() -> None:
    """Make the data, run the jobs, print Markdown."""
    parser = arguments(__doc__, times=2, gb=4.0)
    parser.add_argument("--no-peers", action="store_true", help="measure lorabridge and the copy only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        work = Path(name)
        apart(make, work, args.gb)
        ranks, strategy, out = (str(work / part) for part in ("ranks", "strategy.ckpt", "out"))
        python, ours = sys.executable, [sys.executable, "-m", "lorabridge", "reassemble"]
        jobs = {
            "copy + fsync": lambda: [python, "-S", "-c", FLAT_COPY, ranks, out],
            "lorabridge": lambda: [
                "sh",
                "-c",
                'mkdir "$0"; exec "$@"',
                out,
                *ours,
                ranks,
                f"{out}/whole.safetensors",
                "--strategy",
                strategy,
            ],
            "mindspore.unified_safetensors": lambda: [python, "-c", UNIFIED, ranks, strategy, out],
            "mindspore.transform_checkpoints": lambda: [python, "-c", TRANSFORM, ranks, strategy, out],
        }
        if args.no_peers:
            jobs = dict(list(jobs.items())[:2])
        nbytes = sum(path.stat().st_size for path in (work / "ranks").glob("*/*.safetensors"))
        print(
            table(
                f"Reassemble, {RANKS} ranks (tensor parallel 4, optimizer shards 2)",
                interleaved(jobs, work / "out", args.times),
                nbytes,
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
