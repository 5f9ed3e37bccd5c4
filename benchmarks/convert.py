"""Measure `lorabridge convert` against a plain copy with fsync and against what people use today.

    python benchmarks/convert.py [--dir DIR] [--times 3] [--gb 2]

Every job is a whole process, start-up included, in turns with the others. The peers are MindSpore's own
`safetensors_to_ckpt`, and torch.load followed by mindspore.save_checkpoint. Needs the `verify` extra and 4 times
--gb of free disk.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

from measure import COPY, apart, arguments, interleaved, table

TABLE = """
schema = 1
family = "bench"
match = { model_type = ["bench"] }

[sizes]
hidden = "hidden_size"
inner = "intermediate_size"
layers = "num_hidden_layers"

[holes]
i = "layers"

[[linear]]
hf = "model.layers.{i}.self_attn.{m:q_proj|k_proj|v_proj|o_proj}"
ms = "model.layers.{i}.attention.{m:wq|wk|wv|wo}"
out = "hidden"
in = "hidden"

[[linear]]
hf = "model.layers.{i}.mlp.{m:gate_proj|up_proj}"
ms = "model.layers.{i}.feed_forward.{m:w1|w3}"
out = "inner"
in = "hidden"

[[linear]]
hf = "model.layers.{i}.mlp.down_proj"
ms = "model.layers.{i}.feed_forward.w2"
out = "hidden"
in = "inner"
"""

GUARD = "import mindspore as ms; ms.train.serialization._get_available_memory = lambda: None\n"
SAFETENSORS_TO_CKPT = GUARD + "import sys; ms.safetensors_to_ckpt(sys.argv[1], sys.argv[2])"
TORCH_AND_SAVE = (
    GUARD
    + """
import sys, torch, numpy as np
src, dst = sys.argv[1:]
state = torch.load(src, weights_only=True)
def tensor(t):
    return ms.Tensor(t.float().numpy(), ms.bfloat16) if t.dtype == torch.bfloat16 else ms.Tensor(t.numpy())
ms.save_checkpoint([{"name": k, "data": tensor(v)} for k, v in state.items()], dst)
"""
)


def layers(count: int) -> dict[str, tuple[int, int]]:
    """Return names and shapes of a Llama-like stack (hidden 2048, intermediate 5632)."""
    shapes = {}
    for i in range(count):
        p = f"model.layers.{i}."
        for name in "qkvo":
            shapes[f"{p}self_attn.{name}_proj.weight"] = (2048, 2048)
        for name, shape in {"gate": (5632, 2048), "up": (5632, 2048), "down": (2048, 5632)}.items():
            shapes[f"{p}mlp.{name}_proj.weight"] = shape
    return shapes


def gpt2_shapes(count: int, hidden: int = 2048) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a GPT-2 body, whose fused Conv1D weights are split and transposed."""
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (50257, hidden),
        "transformer.wpe.weight": (1024, hidden),
        "transformer.ln_f.weight": (hidden,),
        "transformer.ln_f.bias": (hidden,),
    }
    for i in range(count):
        p = f"transformer.h.{i}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{p}{norm}.weight": (hidden,), f"{p}{norm}.bias": (hidden,)}
        for name, (a, b) in {
            "attn.c_attn": (hidden, 3 * hidden), "attn.c_proj": (hidden, hidden),
            "mlp.c_fc": (hidden, 4 * hidden), "mlp.c_proj": (4 * hidden, hidden),
        }.items():  # fmt: skip
            shapes |= {f"{p}{name}.weight": (a, b), f"{p}{name}.bias": (b,)}
    return shapes


def write(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write random tensors as safetensors and, beside, as a torch file."""
    import numpy as np
    import torch
    from safetensors.numpy import save_file
    from safetensors.torch import load_file

    rng = np.random.default_rng(0)
    save_file({name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}, path)
    torch.save(load_file(path), path.with_suffix(".bin"))


def adapter(folder: Path, mb: int) -> None:
    """Write a peft adapter of rank 16 on query and value projections, as large as asked."""
    folder.mkdir()
    shapes = {}
    i = 0
    while sum(4 * math.prod(shape) for shape in shapes.values()) < mb * 10**6:
        for name in "qv":
            p = f"base_model.model.model.layers.{i}.self_attn.{name}_proj."
            shapes |= {f"{p}lora_A.weight": (16, 2048), f"{p}lora_B.weight": (2048, 16)}
        i += 1
    apart(write, folder / "adapter_model.safetensors", shapes)
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.bin").rename(folder.with_suffix(".bin"))


def compare(title: str, source: Path, torch_file: Path, out: Path, options: list[str], times: int) -> None:
    """Run one case against its peers and print the result."""
    python = sys.executable
    weights = source / "adapter_model.safetensors" if source.is_dir() else source
    jobs = {
        "copy + fsync": lambda: [python, "-S", "-c", COPY, str(weights), str(out)],
        "lorabridge": lambda: [python, "-m", "lorabridge", "convert", str(source), str(out), "--overwrite", *options],
        "mindspore.safetensors_to_ckpt": lambda: [
            python, "-c", SAFETENSORS_TO_CKPT, str(weights), str(out.with_suffix(""))
        ],
        "torch.load + mindspore.save_checkpoint": lambda: [python, "-c", TORCH_AND_SAVE, str(torch_file), str(out)],
    }  # fmt: skip
    print(table(title, interleaved(jobs, out, times), weights.stat().st_size), flush=True)


def main() -> None:
    """Make the data, run the cases, print Markdown."""
    parser = arguments(__doc__, times=3, gb=2.0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as name:
        work = Path(name)
        out = work / "out.ckpt"
        (work / "tables").mkdir()
        (work / "tables" / "bench.toml").write_text(TABLE)
        count = round(args.gb * 1e9 / (4 * sum(a * b for a, b in layers(1).values())))
        apart(write, work / "model.safetensors", layers(count))
        compare("model, rename only", work / "model.safetensors", work / "model.bin", out,
                ["--family", "bench", "--mappings", str(work / "tables")], args.times)  # fmt: skip
        blocks = round((args.gb * 1e9 / 4 - 51281 * 2048) / (12 * 2048 * 2048))
        apart(write, work / "model.safetensors", gpt2_shapes(blocks))
        compare("GPT-2 model, split and transposed", work / "model.safetensors", work / "model.bin", out,
                ["--family", "gpt2"], args.times)  # fmt: skip
        adapter(work / "adapter", 20)
        compare("adapter", work / "adapter", work / "adapter.bin", out, [], args.times)
        apart(write, work / "tiny.safetensors", {f"block.{i}.weight": (8, 8) for i in range(10_000)})
        compare("10,000 tiny tensors", work / "tiny.safetensors", work / "tiny.bin", out,
                ["--family", "identity"], args.times)  # fmt: skip


if __name__ == "__main__":
    main()
