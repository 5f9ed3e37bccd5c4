"""What the tests of the Ray engine share, importable by workers: sources that can be watched, and runs of them."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lorabridge import formats
from lorabridge.axes import read
from lorabridge.conversion import engines, shares
from lorabridge.conversion.accounts import Numeric
from lorabridge.conversion.engines import Engine, Work
from lorabridge.conversion.plan import Plan, build
from lorabridge.conversion.shares import InputOpener
from lorabridge.files.fsio import Staging
from lorabridge.tensors import Source

TENSORS = 24


@dataclass(frozen=True)
class Slow:
    """An opener whose source takes its time for every tensor and notes which process read it.

    ``meet``: nobody goes on before so many processes read. ``deadly``: tensors whose first reader dies.
    """

    source: Path
    notes: Path
    seconds: float = 0.0
    meet: int = 0
    deadly: tuple[str, ...] = ()

    def open(self) -> Source:
        source = InputOpener(self.source).open()
        inner = source.read

        def read(name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
            first = self.notes / f"first-{name}"
            (self.notes / f"{name}-{os.getpid()}").touch()
            if name in self.deadly and not first.exists():
                first.touch()
                os._exit(1)
            self.wait()
            time.sleep(self.seconds)
            bits = inner(name, rows)
            (self.notes / f"done-{name}-{os.getpid()}").touch()
            return bits

        source.read = read  # type: ignore[method-assign]
        source.extents = lambda name: ()  # type: ignore[method-assign]
        return source

    def wait(self) -> None:
        until = time.monotonic() + 60
        while not (self.notes / "met").exists() and time.monotonic() < until:
            if len({path.name.rpartition("-")[2] for path in self.notes.iterdir()}) >= self.meet:
                (self.notes / "met").touch()
            time.sleep(0.01)


def model(folder: Path) -> Path:
    """Write a model of 100 MB and make a folder for notes."""
    rng = np.random.default_rng(11)
    tensors = {f"layers.{i}.weight": rng.standard_normal((1025, 1024)).astype(np.float32) for i in range(TENSORS)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "ms"})
    (folder / "notes").mkdir()
    return folder / "model.safetensors"


def whole(source: Source) -> Plan:
    return build(source.specs, [(name, read(spec)) for name, spec in source.specs.items()])


def written(opener: shares.Opener, target: Path, engine: Engine, progress: engines.Progress | None = None) -> bytes:
    source = opener.open()
    with Staging(target, digest="0" * 12, overwrite=False, directory=False) as staging:
        format = formats.format_for(target)
        sink = formats.make_sink(format, staging.create, target.name, flavour="ms")
        engines.run(whole(source), source, sink, engine=engine, work=Work(opener, staging.path, format),
                    arithmetic=Numeric(), metadata={}, workers=0, progress=progress)  # fmt: skip
        staging.commit()
    source.close()
    return target.read_bytes()


def llama(folder: Path) -> Path:
    """Write a small Llama with its config.json as transformers names it."""
    width, layers, words = 64, 2, 96
    shapes = {"model.embed_tokens": (words, width), "lm_head": (words, width), "model.norm": (width,)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{name}_proj": (width, width) for name in "qkvo"}
        shapes |= {f"{at}.mlp.{name}_proj": (3 * width, width) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj": (width, 3 * width)}
        shapes |= {f"{at}.{name}_layernorm": (width,) for name in ("input", "post_attention")}
    rng = np.random.default_rng(3)
    folder.mkdir()
    tensors = {f"{name}.weight": rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    sizes = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": width, "intermediate_size": 3 * width,
        "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": layers, "num_key_value_heads": 4,
        "tie_word_embeddings": False, "vocab_size": words,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder


def adapter(folder: Path) -> Path:
    """Write a LoRA adapter of the small Llama's attention as peft does."""
    rng = np.random.default_rng(4)
    folder.mkdir()
    modules = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"]
    shapes = {"lora_A": (4, 64), "lora_B": (64, 4)}
    tensors = {
        f"base_model.model.{module}.{factor}.weight": rng.standard_normal(shape).astype(np.float32)
        for module in modules
        for factor, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
