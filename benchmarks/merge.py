"""Measure `lorabridge merge` against a plain copy with fsync and against what people use today.

    python benchmarks/merge.py [--dir DIR] [--times 3] [--gb 2]

The base is bfloat16 in the shape of Llama (hidden 2048, intermediate 5632) in shards of 500 MB, the adapter has rank 16
on the seven projections of every layer. Every job is a whole process, start-up included, in turns with the others. The
peer is peft: load, merge_and_unload, save_pretrained. Needs the `verify` extra and 3 times --gb of free disk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from pathlib import Path

from measure import COPY, Run, interleaved

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="500MB")
"""


def make(work: Path, gb: float) -> None:
    """Write the base and the adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    layer = 2 * (4 * 2048 * 2048 + 3 * 2048 * 5632)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000,
        num_hidden_layers=round((gb * 1e9 - 4 * 32000 * 2048) / layer), tie_word_embeddings=False,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(work / "base", max_shard_size="500MB")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.02)
    adapted.save_pretrained(work / "adapter")


def table(runs: dict[str, Run], nbytes: int) -> str:
    """Return the comparison as Markdown: times, ratios to the copy and to us, and peak memory."""
    ours, copy = runs["lorabridge"], runs["copy + fsync"]
    lines = [
        f"\n### Merge, Llama-shaped bfloat16 base, rank 16 on seven targets ({nbytes / 1e6:.0f} MB)\n",
        "| command | wall s | CPU s | peak MB | copy's time / its time | times lorabridge's |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {run.wall:.2f} | {run.cpu:.2f} | {run.peak_mb:.0f} "
        f"| {copy.wall / run.wall:.2f} | {run.wall / ours.wall:.1f} |"
        for name, run in runs.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Make the data, run the jobs, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=None, help="where to work (default: a temporary directory)")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--no-peers", action="store_true", help="measure lorabridge and the copy only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        work = Path(name)
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(work, args.gb))
        maker.start()
        maker.join()
        if maker.exitcode:
            sys.exit("could not write the benchmark's data")
        base, adapter, out = (str(work / part) for part in ("base", "adapter", "out"))
        python = sys.executable
        jobs = {
            "copy + fsync": lambda: [python, "-S", "-c", COPY, base, out],
            "lorabridge": lambda: [python, "-m", "lorabridge", "merge", base, adapter, out],
            "peft": lambda: [python, "-c", PEFT, base, adapter, out],
        }
        if args.no_peers:
            del jobs["peft"]
        nbytes = sum(path.stat().st_size for path in (work / "base").glob("*.safetensors"))
        print(table(interleaved(jobs, work / "out", args.times), nbytes), flush=True)


if __name__ == "__main__":
    main()
