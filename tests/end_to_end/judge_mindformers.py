"""Let MindFormers itself judge what is written for it: names, selection by its own matching code, and the logits.

Two steps, since MindFormers and transformers want different environments:

    python tests/end_to_end/judge_mindformers.py prepare DIR    # where lorabridge, torch, peft and transformers are
    python tests/end_to_end/judge_mindformers.py judge DIR      # where mindformers is; writes mindformers_judged.json

Judged with mindformers 2.1.0 on mindspore 2.10.0 and numpy 1.26.4, on the CPU, where two kernels are missing: RmsNorm
and a broadcasting BatchMatMul are put together from others. Of Qwen3 every adapted cell is run by itself, those for
graph mode step by step. The tests compare what is written today with what was judged.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).parent
RECORD = HERE / "mindformers_judged.json"
SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3 = {**SIZES, "head_dim": 8}
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    # name: (model, adapted, dialect, family, layout)
    "llama-off": ("llama", EVERY, "mindpet", "llama", {"qkv_concat": "off"}),
    "llama-grouped": ("llama", EVERY, "mindpet", "llama", {"qkv_concat": "grouped"}),
    "llama-contiguous": ("llama", EVERY, "mindpet", "llama", {"qkv_concat": "contiguous"}),
    "llama-q-v": ("llama", ["q_proj", "v_proj"], "mindpet", "llama", {"qkv_concat": "grouped"}),
    "qwen3-mcore": ("qwen3", [*EVERY, "lm_head"], "mcore", "qwen3_mcore", {"qkv": "grouped", "fc1": "interleaved"}),
    "qwen3-pynative": ("qwen3", [*EVERY, "lm_head"], "pynative", "qwen3_mcore",
                       {"qkv": "grouped", "fc1": "interleaved"}),
    "llama-slora": ("llama", [*EVERY, "lm_head", "embed_tokens"], "slora", "llama", {"qkv_concat": "off"}),
}  # fmt: skip
IDS = (np.arange(8, dtype=np.int32)[None] * 7 + 3) % 40


def tensors(model: str, adapted: list[str]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return a base's weights and an adapter's factors, spelled as transformers and peft save them."""
    random = np.random.default_rng(5)
    hidden, inner, vocab, head = 32, 48, 40, 8
    shapes = {"q_proj": (32, hidden), "k_proj": (16, hidden), "v_proj": (16, hidden), "o_proj": (hidden, 32),
              "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}  # fmt: skip
    base: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden),
                                        "model.norm.weight": (hidden,)}  # fmt: skip
    for layer in range(2):
        at = f"model.layers.{layer}."
        for name, shape in shapes.items():
            base[f"{at}{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}.weight"] = shape
        norms = ["input_layernorm", "post_attention_layernorm"]
        base |= {f"{at}{norm}.weight": (hidden,) for norm in norms}
        if model == "qwen3":
            base |= {f"{at}self_attn.{norm}.weight": (head,) for norm in ("q_norm", "k_norm")}
    weights = {n: random.standard_normal(shape).astype(np.float32) / (4 if len(shape) > 1 else 1) for n, shape in
               base.items()}  # fmt: skip
    factors = {}
    for name, shape in base.items():
        path = name.removesuffix(".weight")
        last = path.rpartition(".")[2]
        if last in adapted:
            a, b = ("lora_embedding_A", "lora_embedding_B") if last == "embed_tokens" else (
                "lora_A.weight", "lora_B.weight")  # fmt: skip
            out, into = shape[::-1] if last == "embed_tokens" else shape
            factors[f"base_model.model.{path}.{a}"] = random.standard_normal((4, into)).astype(np.float32) / 4
            factors[f"base_model.model.{path}.{b}"] = random.standard_normal((out, 4)).astype(np.float32) / 4
    return weights, factors


def write_sources(folder: Path, model: str, adapted: list[str]) -> None:
    """Write a base and a peft adapter as transformers and peft do."""
    from safetensors.numpy import save_file

    weights, factors = tensors(model, adapted)
    architecture = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[model]
    sizes = {"llama": SIZES, "qwen3": QWEN3}[model]
    config = {"model_type": model, "architectures": [architecture], "rms_norm_eps": 1e-6, **sizes}
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": adapted, "lora_dropout": 0.05,
               "task_type": "CAUSAL_LM", "bias": "none"}  # fmt: skip
    for name, values, file, about in (
        ("base", weights, "model.safetensors", ("config.json", config)),
        ("adapter", factors, "adapter_model.safetensors", ("adapter_config.json", adapter)),
    ):
        (folder / name).mkdir(parents=True)
        save_file(values, folder / name / file, {"format": "pt"})
        (folder / name / about[0]).write_text(json.dumps(about[1]))


def convert_case(name: str, folder: Path) -> dict[str, str]:
    """Convert a case's adapter and return the digests of what was written; places outside DIR do not matter."""
    from lorabridge import ConvertOptions, convert

    model, adapted, dialect, family, layout = CASES[name]
    write_sources(folder, model, adapted)
    config = folder / "base" / "config.json"
    options = ConvertOptions(target_dialect=dialect, family=family, layout=layout, config=config)
    convert(folder / "adapter", folder / "written", options)
    base = ConvertOptions(family=family, layout=layout, target_dialect="ms", config=config)
    convert(folder / "base", folder / "base.ckpt", base)
    digests = {}
    for path in sorted((folder / "written").iterdir()):
        if path.name not in ("lorabridge.json", "lora_adapter.json"):
            digests[path.name] = digest_of(path)
    return digests


def digest_of(path: Path) -> str:
    """Return a digest of a text, or of a checkpoint's names, types, shapes and values."""
    from lorabridge import open_checkpoint

    if path.suffix in (".json", ".yaml"):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    with open_checkpoint(path) as checkpoint:
        for name, spec in sorted(checkpoint.specs.items()):
            digest.update(f"{name} {spec.dtype} {spec.shape}".encode())
            digest.update(checkpoint[name].tobytes())
    return digest.hexdigest()


def prepare(root: Path) -> None:
    """Write every case with the logits that transformers and peft compute."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for name in CASES:
        folder = root / name
        digests = convert_case(name, folder)
        net = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter")
        with torch.no_grad():
            logits = net.eval()(torch.from_numpy(IDS).long()).logits[0].numpy()
        np.save(folder / "logits.npy", logits)
        (folder / "digests.json").write_text(json.dumps(digests))


class Norm:
    """RmsNorm put together from kernels that the CPU has."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def __call__(self, x, weight):
        from mindspore import ops

        return x * ops.rsqrt(ops.mean(x * x, -1, True) + self.eps) * weight, None

    def shard(self, *strategies, **options):
        return self


class Product:
    """BatchMatMul that broadcasts."""

    def __init__(self, transpose_a=False, transpose_b=False) -> None:
        self.turned = transpose_a, transpose_b

    def __call__(self, x, y):
        from mindspore import ops

        x = x.swapaxes(-1, -2) if self.turned[0] else x
        y = y.swapaxes(-1, -2) if self.turned[1] else y
        return ops.matmul(x, y)

    def shard(self, *strategies, **options):
        return self

    add_prim_attr = shard


class Direct:
    """Morph, which only graph mode has: the function it stands for."""

    def __init__(self, function, *inference) -> None:
        self.function = function

    def __call__(self, *values):
        return self.function(*values)

    def shard(self, *strategies, **options):
        return self

    add_prim_attr = shard


def section(folder: Path, key: str) -> dict:
    import yaml

    return yaml.safe_load((folder / "written" / f"{key}.yaml").read_text())[key]


def difference(folder: Path, logits) -> float:
    """Return how far the logits are from those of transformers and peft, relative to the largest of them."""
    expected = np.load(folder / "logits.npy")
    got = logits.asnumpy().astype(np.float32).reshape(expected.shape)
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def load(net, *files: Path) -> set[str]:
    """Load checkpoints into a network; every parameter of theirs must have a place there."""
    import mindspore as ms

    values = {}
    for file in files:
        kind = {"format": "safetensors"} if file.suffix == ".safetensors" else {}
        values |= ms.load_checkpoint(str(file), **kind)
    missing, unused = ms.load_param_into_net(net, values)
    assert not unused, unused
    assert not [name for name in missing if "lora" in name], missing
    return set(values)


def adapted_in(net) -> list[str]:
    return sorted(
        p.name for p in net.get_parameters() if p.name.endswith(("lora_a", "lora_A.weight")) and "lora" in p.name
    )


def judge_llama(folder: Path, layout: str) -> dict:
    import mindspore as ms
    from mindformers.models.llama import LlamaConfig, LlamaForCausalLM
    from mindformers.pet import LoraConfig, get_pet_model

    told = section(folder, "pet_config")
    sizes = {
        "num_layers": 2, "hidden_size": 32, "num_heads": 4, "n_kv_heads": 2, "vocab_size": 40, "intermediate_size": 48,
        "seq_length": 8, "batch_size": 1, "use_flash_attention": False, "rms_norm_eps": 1e-6, "theta": 10000.0,
        **{f"{kind}_type": "float32" for kind in ("param_init", "layernorm_compute", "softmax_compute")},
        "compute_dtype": "float32", "rotary_dtype": "float32",
    }  # fmt: skip
    base = LlamaForCausalLM(LlamaConfig(qkv_concat=layout != "off", **sizes))
    told.pop("pet_type")
    net = get_pet_model(base, LoraConfig(**told))
    net.set_train(False)
    load(net, folder / "base.ckpt", folder / "written" / "adapter_model.ckpt")
    found = {"adapted": adapted_in(net)}
    if layout != "contiguous":  # a layout of older releases: 2.1 would read its rows wrongly
        found["difference"] = difference(folder, net(ms.Tensor(IDS))[0])
    return found


def judge_qwen3(folder: Path, mode: str) -> dict:
    import mindspore as ms
    from mindformers.models.qwen3.configuration_qwen3 import Qwen3Config

    parts = ("compute_", "params_", "layernorm_compute_", "softmax_compute_", "rotary_", "embedding_params_")
    config = Qwen3Config(seq_length=8, use_flash_attention=False, rms_norm_eps=1e-6, **QWEN3,
                         **{f"{part}dtype": "float32" for part in parts})  # fmt: skip
    if mode == "mcore":
        from mindformers.models.qwen3.modeling_qwen3_train import TrainingQwen3ForCausalLM
        from mindformers.pet import LoraConfig, get_pet_model

        told = section(folder, "pet_config")
        told.pop("pet_type")
        net = get_pet_model(TrainingQwen3ForCausalLM(config), LoraConfig(**told))
        load(net, folder / "base.ckpt", folder / "written" / "adapter_model.ckpt")
    else:
        from mindformers.checkpoint.checkpoint import load_checkpoint
        from mindformers.models.qwen3.modeling_qwen3_train_pynative import PyNativeQwen3ForCausalLM
        from mindformers.pynative.config.config import LoraConfig as Config
        from mindformers.pynative.pet.lora_adapter import build_lora_model

        net = build_lora_model(PyNativeQwen3ForCausalLM(config), Config(**section(folder, "lora_config")))
        load(net, folder / "base.ckpt", folder / "written" / "adapter_model.safetensors")
        before = {p.name: p.asnumpy().copy() for p in net.get_parameters() if "lora_" in p.name}
        for parameter in net.get_parameters():
            if "lora_" in parameter.name:
                parameter.set_data(ms.ops.zeros_like(parameter))
        load_checkpoint(str(folder / "written"), net)  # MindFormers' own way to load a directory
        assert all(np.array_equal(p.asnumpy(), before[p.name]) for p in net.get_parameters() if p.name in before)
    net.set_train(False)
    return {"adapted": adapted_in(net), "difference": max(cell_differences(net))}


def cell_differences(net) -> Iterator[float]:
    """Run every adapted cell of Qwen3 by itself: the CPU lacks too many kernels of the whole network."""
    import mindspore as ms

    weights, factors = tensors("qwen3", [*EVERY, "lm_head"])

    def adapted(path: str) -> np.ndarray:
        a, b = (factors[f"base_model.model.{path}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        return weights[f"{path}.weight"] + 2 * b @ a

    def groups(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        parts = [part.reshape(2, -1, part.shape[1]) for part in (q, k, v)]
        return np.concatenate(parts, 1).reshape(-1, q.shape[1])

    expected = {"output_layer": adapted("lm_head")}
    for layer in range(2):
        attention, mlp, to = (
            f"model.layers.{layer}.self_attn.",
            f"model.layers.{layer}.mlp.",
            f"decoder.layers.{layer}.",
        )
        expected |= {
            f"{to}self_attention.linear_qkv": groups(*(adapted(f"{attention}{x}_proj") for x in "qkv")),
            f"{to}self_attention.linear_proj": adapted(f"{attention}o_proj"),
            f"{to}mlp.linear_fc1": np.stack([adapted(f"{mlp}gate_proj"), adapted(f"{mlp}up_proj")], 1).reshape(96, 32),
            f"{to}mlp.linear_fc2": adapted(f"{mlp}down_proj"),
        }
    found = {path.removeprefix("network.").removeprefix("network.").removeprefix("model."): cell
             for path, cell in net.cells_and_names()}  # fmt: skip
    random = np.random.default_rng(9)
    for path, matrix in expected.items():
        x = random.standard_normal((3, 1, matrix.shape[1])).astype(np.float32)
        out = found[path](ms.Tensor(x))
        out = (out[0] if isinstance(out, tuple) else out).asnumpy()
        wanted = x @ matrix.T
        yield float(np.abs(out - wanted).max() / np.abs(wanted).max())


def judge_slora(folder: Path) -> dict:
    """Let S-LoRA's own loader read the folder, and compare what its network gets with B times the scaling."""
    from mindformers.pet.tuners.slora_adapter import SLoraAdapter
    from mindformers.tools.register import DictConfig
    from mindformers.trainer.utils import load_slora_ckpt

    place = folder / "written"
    pet = DictConfig(pet_type="slora", adapter_path=str(place))
    config = SLoraAdapter.init_slora_config(pet)
    _, factors = tensors("llama", CASES["llama-slora"][1])
    shapes = {}
    import mindspore as ms

    written = ms.load_checkpoint(str(place / "adapter_model.ckpt"))
    for name, value in written.items():
        shape = value.shape if name.endswith("lora_a") else value.shape[::-1]
        shapes[name] = [config.lora_num, *shape]
    network = SimpleNamespace(
        lora_adapter=SimpleNamespace(registered_loras=shapes, adapter_names=SLoraAdapter.adapter_names)
    )
    run = DictConfig(model=DictConfig(model_config=DictConfig(pet_config=pet)), auto_trans_ckpt=False)
    run.use_parallel = False
    loaded = load_slora_ckpt({}, run, network)
    q = "model.layers.1.self_attn.q_proj"
    expected = {
        "model.layers.1.attention.wq.lora_a": factors[f"base_model.model.{q}.lora_A.weight"],
        "model.layers.1.attention.wq.lora_b": 2 * factors[f"base_model.model.{q}.lora_B.weight"].T,
        "model.tok_embeddings.lora_a": factors["base_model.model.model.embed_tokens.lora_embedding_A"],
        "lm_head.lora_b": 2 * factors["base_model.model.lm_head.lora_B.weight"].T,
    }
    for name, value in expected.items():
        assert np.array_equal(loaded[name].asnumpy()[1], value), name
        assert not loaded[name].asnumpy()[0].any()
    import re

    cells = sorted({name.rpartition(".")[0] for name in written})
    selected = [cell for cell in cells if re.match(config.target_modules, cell)]
    return {"rank": config.lora_rank, "alpha": config.lora_alpha, "targets": sorted(config.target_modules.split("|")),
            "cells": cells, "selected": selected}  # fmt: skip


def judge(root: Path) -> None:
    """Judge every case and write the record."""
    sys.path.insert(0, str(HERE.parent / "dialects"))
    import hyper_parallel_stub

    hyper_parallel_stub.install()
    import mindspore as ms
    from mindspore.ops import operations

    operations.RmsNorm, operations.BatchMatMul, operations.Morph = Norm, Product, Direct
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.set_device("CPU")
    import mindformers  # noqa: F401

    context = sys.modules["mindformers.core.context.build_context"]
    record = {}
    for name, (model, _, dialect, _, layout) in CASES.items():
        legacy = model == "llama"
        told = SimpleNamespace(get_context=lambda key, legacy=legacy: legacy if key == "use_legacy" else None)
        context.MFContextOperator.get_mf_ctx_instance = classmethod(lambda cls, told=told: told)
        folder = root / name
        if dialect == "slora":
            found = judge_slora(folder)
        elif legacy:
            found = judge_llama(folder, layout["qkv_concat"])
        else:
            found = judge_qwen3(folder, dialect)
        record[name] = {"digests": json.loads((folder / "digests.json").read_text()), **found}
        print(name, {k: v for k, v in found.items() if k != "adapted"})
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    {"prepare": prepare, "judge": judge}[sys.argv[1]](Path(sys.argv[2]).resolve())
