"""Let Megatron judge: adapters that Megatron-Bridge's LoRA, DoRA and CanonicalLoRA saved, and what it loads of ours.

    python judge_megatron.py [make|judge]       writes into megatron_files/

Judged with megatron-bridge 0.3.1 on megatron-core 0.16.1, torch 2.13.0, transformers 5.23 and peft 0.21.2, one process
on the CPU. Transformer Engine is stubbed: Megatron's own layers run (``get_gpt_layer_local_spec``). A tiny Llama of
transformers gets its weights into a GPTModel by Megatron-Bridge's ``merge_qkv_weights``; both compute the same logits.
``lora``, ``dora``, ``canonical``: the state dict that ``adapter_key_filter`` keeps (``torch.save``), and for LoRA the
``torch_dist`` checkpoint of its sharded state; ``logits.npy`` is what the adapted GPTModel computed. ``judged.json``:
the largest difference between those and peft's logits with what lorabridge made of the file, and between peft's
and the GPTModel's after it loaded what lorabridge made of a peft adapter, with a digest of that file.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import os
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent / "megatron_files"
FIELDS = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "tie_word_embeddings": False, "rope_theta": 10000.0, "rms_norm_eps": 1e-5,
}  # fmt: skip
RANK, ALPHA = 3, 6
KINDS = ("lora", "dora", "canonical")
TOKENS = torch.tensor([[1, 5, 9, 2, 11, 3, 17]])


def start() -> None:
    """Answer for the GPU and Transformer Engine, open the packages without their __init__, and start one process."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.is_available = lambda: False
    torch.cuda.get_rng_state = lambda *args, **named: torch.zeros(1, dtype=torch.uint8)
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *args, **named: None
    import megatron.core
    import megatron.core.models.gpt.gpt_model
    from megatron.core.models.gpt import gpt_layer_specs  # noqa: F401  (both decide that Transformer Engine is absent)

    base = Path(megatron.core.__file__).parents[1] / "bridge"
    for name in ("", ".models", ".models.conversion"):
        package = types.ModuleType(f"megatron.bridge{name}")
        package.__path__ = [str(base.joinpath(*name.split(".")[1:]))]
        sys.modules[package.__name__] = package
    layer = type("Linear", (torch.nn.Module,), {})
    engine, engine_torch = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    engine.pytorch, engine_torch.Linear, engine_torch.LayerNormLinear = engine_torch, layer, layer  # type: ignore[attr-defined]
    engine_torch.LayerNormMLP = layer  # type: ignore[attr-defined]
    engine_torch.ops = types.SimpleNamespace(Sequential=layer)  # type: ignore[attr-defined]
    for module in (engine, engine_torch):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    from megatron.bridge.peft import utils

    utils.HAVE_TE = False
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29647", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random

    parallel_state.initialize_model_parallel()
    random.initialize_rng_tracker()
    random.get_cuda_rng_tracker().fork = lambda *args: torch.random.fork_rng(devices=[])


def llama() -> torch.nn.Module:
    """Build the network of transformers; the same weights in every run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**FIELDS)).eval()


def megatron() -> torch.nn.Module:
    """Build the GPTModel of the same weights, as Megatron-Bridge fuses them."""
    from megatron.bridge.models.conversion.param_mapping import merge_qkv_weights
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=2, hidden_size=16, ffn_hidden_size=20, num_attention_heads=4, num_query_groups=2, kv_channels=6,
        use_cpu_initialization=True, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, normalization="RMSNorm", layernorm_epsilon=1e-5, hidden_dropout=0.0,
        attention_dropout=0.0, bias_activation_fusion=False, masked_softmax_fusion=False, persist_layer_norm=False,
    )  # fmt: skip
    model = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=24, max_sequence_length=16,
        share_embeddings_and_output_weights=False, position_embedding_type="rope", rotary_base=10000,
    )  # fmt: skip
    hf = llama().state_dict()
    own = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "output_layer.weight": hf["lm_head.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    for i in range(2):
        here, there = f"decoder.layers.{i}", f"model.layers.{i}"
        q, k, v = (hf[f"{there}.self_attn.{n}_proj.weight"] for n in "qkv")
        own[f"{here}.self_attention.linear_qkv.weight"] = merge_qkv_weights(config, q, k, v)
        own[f"{here}.self_attention.linear_proj.weight"] = hf[f"{there}.self_attn.o_proj.weight"]
        own[f"{here}.mlp.linear_fc1.weight"] = torch.cat([hf[f"{there}.mlp.{n}_proj.weight"] for n in ("gate", "up")])
        own[f"{here}.mlp.linear_fc2.weight"] = hf[f"{there}.mlp.down_proj.weight"]
        own[f"{here}.input_layernorm.weight"] = hf[f"{there}.input_layernorm.weight"]
        own[f"{here}.pre_mlp_layernorm.weight"] = hf[f"{there}.post_attention_layernorm.weight"]
    wrong = model.load_state_dict(own, strict=False)
    assert not wrong.unexpected_keys, wrong
    assert not [n for n in wrong.missing_keys if "_extra_state" not in n], wrong
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Run either network on fixed tokens."""
    with torch.no_grad():
        if not hasattr(model, "decoder"):
            return model(input_ids=TOKENS).logits
        places = torch.arange(TOKENS.shape[1])[None]
        mask = torch.triu(torch.ones(1, 1, places.shape[1], places.shape[1]), 1).bool()
        return model(TOKENS, places, mask)


def adapted(
    kind: str, rank: int = RANK, alpha: float = ALPHA, targets: list[str] | None = None
) -> tuple[torch.nn.Module, object]:
    """Let Megatron-Bridge put its layers in; (network, its PEFT object)."""
    from megatron.bridge.peft.canonical_lora import CanonicalLoRA
    from megatron.bridge.peft.dora import DoRA
    from megatron.bridge.peft.lora import LoRA

    said = {"target_modules": targets} if targets else {}
    made = {"lora": LoRA, "dora": DoRA, "canonical": CanonicalLoRA}[kind](dim=rank, alpha=alpha, **said)
    model = made(megatron(), training=False)
    made.set_params_to_save(model)
    return model.eval(), made


def kept(model: torch.nn.Module, made: object) -> dict[str, torch.Tensor]:
    """Return what Megatron-Bridge's own filter saves."""
    state = model.state_dict()
    return {n: t for n, t in state.items() if made.adapter_key_filter(n) and isinstance(t, torch.Tensor)}  # type: ignore[attr-defined]


def make() -> None:
    """Write the files."""
    theirs, mine = logits(llama()), logits(megatron())
    print("base", float((theirs - mine).abs().max()), "of", float(theirs.abs().max()))
    for kind in KINDS:
        model, made = adapted(kind)
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".adapter." in name:
                    noise = torch.randn(parameter.shape, generator=g)
                    parameter.copy_(parameter * (1 + noise / 8) if "magnitude" in name else noise / 3)
        folder = HERE / kind
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(kept(model, made), folder / "adapter.pt")
        np.save(folder / "logits.npy", logits(model).numpy())
        if kind == "lora":
            from megatron.core import dist_checkpointing

            sharded = {n: t for n, t in model.sharded_state_dict().items() if made.adapter_key_filter(n)}
            place = folder / "torch_dist" / "iter_0000002"
            place.mkdir(parents=True, exist_ok=True)
            dist_checkpointing.save(sharded, str(place))
        print(kind, sorted(kept(model, made))[:3], float(np.abs(logits(model) - mine).max()))
    (HERE / "config.json").write_text(json.dumps({**FIELDS, "model_type": "llama"}, indent=1) + "\n", "utf-8")


def to_peft(kind: str, out: Path) -> Path:
    """Convert a saved adapter to peft."""
    from lorabridge import ConvertOptions, convert
    from lorabridge.dialects.adapter import Fact, Facts

    facts = Facts((Fact("*", "alpha", float(ALPHA)),))
    layout = {"lora": "canonical" if kind == "canonical" else "fused"}
    options = ConvertOptions(
        target_dialect="peft", family="llama_megatron", config=HERE / "config.json", facts=facts, layout=layout
    )
    convert(HERE / kind / "adapter.pt", out, options)
    return out


def from_peft(kind: str, source: Path, out: Path) -> tuple[int, float]:
    """Convert a peft directory to Megatron's names; (rank, alpha) of all layers."""
    from lorabridge import ConvertOptions, convert

    layout = {"lora": "canonical" if kind == "canonical" else "fused"}
    options = ConvertOptions(
        target_dialect="megatron", family="llama_megatron", config=HERE / "config.json", layout=layout
    )
    done = convert(source, out, options)
    ((rank, scaling),) = {(module.rank, module.scaling) for module in done.modules}
    return rank, rank * scaling


def peft_adapter(kind: str, folder: Path) -> torch.nn.Module:
    """Make an adapter of peft over every layer; its files go to ``folder``."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if kind == "dora":
        targets = ["o_proj", "down_proj"]
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=False, use_dora=kind == "dora"
    )
    model = get_peft_model(llama(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.25)
    model.save_pretrained(folder)
    return model.eval()


def loaded(kind: str, file: Path, rank: int, alpha: float) -> torch.nn.Module:
    """Load a file of ours into a network that Megatron-Bridge adapted."""
    model, _ = adapted(kind, rank, alpha, ["linear_proj", "linear_fc2"] if kind == "dora" else None)
    wrong = model.load_state_dict(torch.load(file), strict=False)
    assert not wrong.unexpected_keys, wrong
    assert not [n for n in wrong.missing_keys if ".adapter." in n and "_extra_state" not in n], wrong
    return model


def digest(file: Path) -> str:
    """Return a digest of a torch file's tensors."""
    made = hashlib.sha256()
    state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    for name, tensor in sorted(state.items()):
        made.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return made.hexdigest()


def judge() -> None:
    """Compare both ways."""
    from peft import PeftModel

    judged = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in KINDS:
            out = to_peft(kind, Path(scratch) / f"{kind}_peft")
            theirs = torch.from_numpy(np.load(HERE / kind / "logits.npy"))
            read = float((logits(PeftModel.from_pretrained(llama(), str(out)).eval()) - theirs).abs().max())
            source = HERE / kind / "peft"
            expected = logits(peft_adapter(kind, source))
            file = Path(scratch) / f"{kind}.pt"
            written = float((logits(loaded(kind, file, *from_peft(kind, source, file))) - expected).abs().max())
            judged[kind] = {"read": read, "written": written, "digest": digest(file)}
            print(kind, judged[kind], "largest logit", float(expected.abs().max()))
    (HERE / "judged.json").write_text(json.dumps(judged, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    start()
    for step in sys.argv[1:] or ("make", "judge"):
        {"make": make, "judge": judge}[step]()
