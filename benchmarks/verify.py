"""Measure ``lorabridge verify`` on an adapter of all linear layers of a Llama of 7 billion parameters.

    python benchmarks/verify.py [--layers 32] [--rank 16] [--dtype bfloat16] [--keep DIR]

Depth tensors is measured as a command. Depth layers is measured as a command too (wall time, peak memory), and module
by module against the bare forward cost: one multiplication of the same inputs with the same frozen weight, in torch,
on this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import once, remove

HIDDEN, INNER = 4096, 11008
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
"""Rows and columns of each adapted weight of one layer."""


def make_adapter(folder: Path, layers: int, rank: int, dtype: str) -> None:
    """Write a peft adapter with random factors."""
    import ml_dtypes
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    kind = np.dtype(getattr(ml_dtypes, dtype)) if dtype == "bfloat16" else np.dtype(dtype)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in SHAPES.items():
            place = f"base_model.model.model.layers.{layer}.{name}"
            for letter, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                tensors[f"{place}.lora_{letter}.weight"] = (0.02 * rng.standard_normal(shape, np.float32)).astype(kind)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none",
              "target_modules": sorted({name.rpartition(".")[2] for name in SHAPES})}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def bare_forward(rows: int, columns: int) -> float:
    """Return the seconds of one multiplication of as many inputs as verify uses with a frozen weight; best of three."""
    import torch

    x, weight = torch.randn(65, columns), torch.randn(rows, columns)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        x @ weight.T
        times.append(time.perf_counter() - start)
    return min(times)


def per_module(source: Path, target: Path) -> None:
    """Time the layers depth module by module in this process, and print it beside the bare forward cost."""
    from lorabridge.actions.verify import verify
    from lorabridge.actions.verify_inputs import VerifyOptions

    marks: list[tuple[int, float]] = []

    def note(depth: str, done: int, total: int) -> None:
        marks.append((done, time.perf_counter()))

    start = time.perf_counter()
    report = verify(source, target, VerifyOptions(depths=("layers",)), progress=note)
    assert report.ok, report.summary()
    modules = report.depth("layers").modules  # type: ignore[union-attr]
    spent: dict[str, list[float]] = {}
    last = start
    for row, (_, now) in zip(modules, marks, strict=True):
        spent.setdefault(next(name for name in SHAPES if row.path.endswith(name)), []).append(now - last)
        last = now
    print(f"\n{'module':20}{'weight':>14}{'verify':>10}{'bare forward':>14}{'factor':>8}")
    for name, (rows, columns) in SHAPES.items():
        typical, bare = sorted(spent[name])[len(spent[name]) // 2], bare_forward(rows, columns)
        print(f"{name:20}{f'{rows}x{columns}':>14}{typical:>8.2f} s{bare * 1000:>11.1f} ms{typical / bare:>8.0f}")


def main() -> None:
    """Make the files, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--keep", type=Path, help="directory for the files, kept for the next run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(exist_ok=True)
        source, target = folder / f"adapter-{given.layers}-{given.rank}-{given.dtype}", folder / "out.ckpt"
        if not source.exists():
            make_adapter(source, given.layers, given.rank, given.dtype)
        remove(target)
        command = [sys.executable, "-m", "lorabridge"]
        once([*command, "convert", str(source), str(target), "--overwrite"])
        size = sum(path.stat().st_size for path in source.iterdir())
        print(f"{given.layers * len(SHAPES)} modules, rank {given.rank}, {given.dtype}, {size / 1e6:.0f} MB")
        for depth in ("tensors", "layers"):
            run = once([*command, "verify", str(source), str(target), "--depth", depth, "--json", "--no-progress"])
            print(f"depth {depth:8}{run.wall:8.1f} s{run.cpu:8.1f} s CPU{run.peak_mb:8.0f} MB at most")
        per_module(source, target)


if __name__ == "__main__":
    main()
