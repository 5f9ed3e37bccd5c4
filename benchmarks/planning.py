"""How long planning takes for thousands of ranks: python benchmarks/planning.py [STAGES GRID TENSORS]...

Nothing is read or written: the pieces are made up. ``GRID`` is a stage's device matrix, 16x8; ``TENSORS`` how many it
has. Four kinds of layout take turns: cut by rows, by columns, by rows and optimizer shards, and whole. Seconds of CPU
for finding every slice (reassemble) and for cutting the whole again (reshard), and the most memory that was held.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from lorabridge.axes import Expr, Read, read
from lorabridge.conversion import plan
from lorabridge.distributed.assembled import Assembled
from lorabridge.distributed.layout import ALL, Layout, slices_of
from lorabridge.distributed.ranks import _Arranging
from lorabridge.distributed.strategy import Strategy
from lorabridge.dtypes import BY_NAME
from lorabridge.tensors import TensorSpec

CASES = [("16", "16x8", "62"), ("1", "64x32", "1000")]


def kinds(grid: tuple[int, ...]) -> list[Layout]:
    last = len(grid) - 1
    return [
        Layout(grid, ((last,), ())),
        Layout(grid, ((), (last,))),
        Layout(grid, ((last,), ()), ALL),
        Layout(grid, ((),)),
    ]


def measure(stages: int, grid: tuple[int, ...], tensors: int) -> str:
    layouts = kinds(grid)
    devices, held, files = math.prod(grid), {}, {}
    said = {s: {f"layers.{s}.{i}": layouts[i % len(layouts)] for i in range(tensors)} for s in range(stages)}
    for stage, named in said.items():
        shapes = {n: layout.local_shape((1 << 16, 4096)[: len(layout.cuts)]) or () for n, layout in named.items()}
        for rank in range(stage * devices, (stage + 1) * devices):
            files[rank] = f"rank_{rank}/checkpoint.safetensors"
            held[files[rank]] = {n: TensorSpec(n, BY_NAME["bfloat16"], shape) for n, shape in shapes.items()}

    def piece(file: str, name: str) -> Expr:
        spec = held[file][name]
        return Read(f"{file}/{name}", spec.dtype, spec.shape)

    pieces = SimpleNamespace(held=held, stated={file: {} for file in held}, piece=piece, format="safetensors", specs={})
    started = time.process_time()
    arrangement = _Arranging(pieces, files, Strategy(said, (Path("strategy"),))).arrange()  # type: ignore[arg-type]
    source = Assembled(Path("ranks"), pieces, arrangement)  # type: ignore[arg-type]
    plan.build(source.specs, [(name, read(spec)) for name, spec in source.specs.items()], seed="whole")
    between = time.process_time()
    outputs: list[tuple[str, Expr]] = []
    for number, named in said.items():
        for name, layout in named.items():
            cut = slices_of(read(source.specs[name]), layout)
            outputs += ((f"rank_{number * devices + rank}/{name}", expr) for rank, expr in enumerate(cut))
    plan.build(source.specs, outputs, seed="reshard")
    ended = time.process_time()
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return (
        f"{stages * devices} ranks in {stages} stages, {stages * tensors} tensors, {len(outputs)} pieces: "
        f"reassemble {between - started:.1f} s, reshard {ended - between:.1f} s, {size:.1f} GB"
    )


if __name__ == "__main__":
    given = sys.argv[1:]
    for one in [given[i : i + 3] for i in range(0, len(given), 3)] or CASES:
        print(measure(int(one[0]), tuple(map(int, one[1].split("x"))), int(one[2])))
