"""Measure `lorabridge merge` against a plain copy with fsync and against what people use today.

    python benchmarks/merge.py [--times 3] [--gb 2] [--mergekit PYTHON] [--axolotl PYTHON] [--unsloth PYTHON]

The base is bfloat16 in the shape of Llama (hidden 2048, intermediate 5632) in shards of 500 MB, the adapter has rank 16
on the seven projections of every layer. Every job is a whole process, start-up included, in turns with the others. The
peers are peft (load, merge_and_unload, save_pretrained); the few lines of torch and safetensors that a person writes,
one shard at a time; and, where an environment of theirs is named by its interpreter, mergekit (mergekit-yaml,
passthrough), axolotl (merge_lora_sharded_efficient, what its merge-lora command does on a CPU) and unsloth
(merge_and_overwrite_lora, what save_pretrained_merged calls). Needs the `verify` extra and 5 times --gb of free disk.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

from measure import COPY, apart, arguments, interleaved, table

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="500MB")
"""

BY_HAND = """
import glob, json, os, sys, torch
from safetensors import safe_open
from safetensors.torch import save_file
base, adapter, out = sys.argv[1:]
config = json.load(open(f"{adapter}/adapter_config.json"))
scaling = config["lora_alpha"] / config["r"]
os.mkdir(out)
with safe_open(f"{adapter}/adapter_model.safetensors", "pt") as lora:
    names = set(lora.keys())
    for path in sorted(glob.glob(f"{base}/*.safetensors")):
        tensors = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():
                tensors[name] = file.get_tensor(name)
                key = "base_model.model." + name.removesuffix("weight")
                if f"{key}lora_A.weight" in names:
                    a, b = (lora.get_tensor(f"{key}lora_{x}.weight").float() for x in "AB")
                    tensors[name] = torch.addmm(tensors[name].float(), b, a, alpha=scaling).to(tensors[name].dtype)
        save_file(tensors, f"{out}/{os.path.basename(path)}", metadata={"format": "pt"})
"""
MERGEKIT = """
import os, sys, tempfile
from mergekit.scripts.run_yaml import main
base, adapter, out = sys.argv[1:]
with tempfile.TemporaryDirectory(dir=os.path.dirname(out)) as place:
    with open(f"{place}/job.yaml", "w") as file:
        print("merge_method: passthrough", "dtype: bfloat16", "models:", sep=chr(10), file=file)
        print(f"  - model: {base}+{adapter}", file=file)
    options = ["--no-copy-tokenizer", "--out-shard-size", "500M", "--lora-merge-cache", f"{place}/cache"]
    main([f"{place}/job.yaml", out, *options])
"""
AXOLOTL = """
import sys
from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient
merge_lora_sharded_efficient(*sys.argv[1:])
"""
UNSLOTH = """
import os, sys, torch
base, adapter, out = map(os.path.abspath, sys.argv[1:])
os.chdir(os.path.dirname(out))  # where it leaves a cache
import unsloth
from peft import PeftModel
from transformers import AutoModelForCausalLM
from unsloth_zoo.saving_utils import merge_and_overwrite_lora
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter)
merge_and_overwrite_lora(lambda name, load_in_4bit: name, model, save_directory=out, output_dtype=torch.bfloat16)
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


def main() -> None:
    """Make the data, run the jobs, print Markdown."""
    parser = arguments(__doc__, times=3, gb=2.0)
    parser.add_argument("--no-peers", action="store_true", help="measure lorabridge and the copy only")
    parser.add_argument("--mergekit", metavar="PYTHON", help="an interpreter that has mergekit")
    parser.add_argument("--axolotl", metavar="PYTHON", help="an interpreter that has axolotl")
    parser.add_argument("--unsloth", metavar="PYTHON", help="an interpreter that has unsloth")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        work = Path(name)
        apart(make, work, args.gb)
        places = [str(work / part) for part in ("base", "adapter", "out")]
        python = sys.executable
        jobs = {
            "copy + fsync": [python, "-S", "-c", COPY, places[0], places[2]],
            "lorabridge": [python, "-m", "lorabridge", "merge", *places],
        }
        if not args.no_peers:
            jobs["torch and safetensors, by hand"] = [python, "-c", BY_HAND, *places]
            jobs["peft"] = [python, "-c", PEFT, *places]
        for name, code in (("mergekit", MERGEKIT), ("axolotl", AXOLOTL), ("unsloth", UNSLOTH)):
            if (other := getattr(args, name)) is not None:
                jobs[name] = [other, "-c", code, *places]
        nbytes = sum(path.stat().st_size for path in (work / "base").glob("*.safetensors"))
        runs = interleaved({name: partial(list, job) for name, job in jobs.items()}, work / "out", args.times)
        print(table("Merge, Llama-shaped bfloat16 base, rank 16 on seven targets", runs, nbytes), flush=True)


if __name__ == "__main__":
    main()
