"""Write the files of ``mindformers_files`` with MindFormers itself.

Made with mindformers 2.1.0 on mindspore 2.10.0 and numpy 1.26.4, on the CPU. hyper_parallel, which PyNative mode
imports, is in no package index and is stood in for. Every network is tiny and its factors are random. Usage, in an
environment that has mindformers:

    python tests/dialects/make_mindformers.py llama|mcore|pynative
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import hyper_parallel_stub

hyper_parallel_stub.install()
import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from mindspore import nn  # noqa: E402

FILES = Path(__file__).parent / "mindformers_files"
FP32 = {
    f"{part}dtype": "float32"
    for part in ("compute_", "params_", "layernorm_compute_", "softmax_compute_", "rotary_", "embedding_params_")
}
QWEN3 = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "seq_length": 8,
    "use_flash_attention": False, **FP32,
}  # fmt: skip
DEEPSEEK = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "num_nextn_predict_layers": 1, "n_group": 2, "topk_group": 1,
    "max_position_embeddings": 64, "seq_length": 8, "use_flash_attention": False, "moe_grouped_gemm": True, **FP32,
}  # fmt: skip


def randomize(net: nn.Cell) -> None:
    """Give every parameter values that tell it from all others."""
    random = np.random.default_rng(0)
    for parameter in net.get_parameters():
        if parameter.dtype in (ms.float32, ms.float16, ms.bfloat16):
            values = random.standard_normal(parameter.shape).astype(np.float32) / 8
            parameter.set_data(ms.Tensor(values, parameter.dtype))


def is_lora(name: str) -> bool:
    return "lora_" in name.rpartition(".layers.")[2] and "_proj.weight" not in name


def cells(net: nn.Cell) -> list[str]:
    """List every cell that MindFormers' adapters could meet, as ``path: class``."""
    return [f"{name}: {type(cell).__name__}" for name, cell in net.cells_and_names() if name]


def keep_config(folder: Path) -> None:
    """Take the adapter_config.json that PetModel left in its output directory."""
    shutil.copy("output/adapter_config.json", folder / "adapter_config.json")


def llama() -> None:
    from mindformers.models.llama import LlamaConfig, LlamaForCausalLM
    from mindformers.pet import LoraConfig, get_pet_model

    ms.set_context(mode=ms.GRAPH_MODE)
    sizes = {
        "num_layers": 2, "hidden_size": 32, "num_heads": 4, "n_kv_heads": 2, "vocab_size": 40, "intermediate_size": 48,
        "seq_length": 8, "batch_size": 1, "compute_dtype": "float32", "param_init_type": "float32",
    }  # fmt: skip
    for name, concat, targets in (
        ("llama", False, ".*wq|.*wv|.*w2"),
        ("llama_concat", True, ".*w_qkv|.*w_gate_hidden|.*wo"),
    ):
        base = LlamaForCausalLM(LlamaConfig(qkv_concat=concat, **sizes))
        folder = fresh(name)
        (folder / "cells.json").write_text(json.dumps(cells(base), indent=0))
        net = get_pet_model(base, LoraConfig(lora_rank=4, lora_alpha=8, target_modules=targets))
        randomize(net)
        keep_config(folder)
        ms.save_checkpoint(net, str(folder / "adapter.ckpt"), choice_func=is_lora)
        if not concat:
            training_state(net, folder / "llama_rank_0-1_3.ckpt")


def training_state(net: nn.Cell, path: Path) -> None:
    """Write base, factors and optimizer state together, with the counters that CheckpointMonitor appends."""
    from mindformers.core.optim import AdamW

    optimizer = AdamW(net.trainable_params())
    rows = {parameter.name: parameter for parameter in (*net.get_parameters(), *optimizer.get_parameters())}
    said = {"epoch_num": 1, "step_num": 3, "global_step": 3, "loss_scale": 1.0}
    ms.save_checkpoint(
        [{"name": name, "data": value} for name, value in rows.items()],
        str(path), append_dict={k: v for k, v in said.items() if k not in rows},
    )  # fmt: skip


def mcore() -> None:
    from mindformers.pet import LoraConfig, get_pet_model

    context = sys.modules["mindformers.core.context.build_context"]
    told = SimpleNamespace(get_context=lambda key: False if key == "use_legacy" else None)
    context.MFContextOperator.get_mf_ctx_instance = classmethod(lambda cls: told)
    from mindformers.models.deepseek3.configuration_deepseek_v3 import DeepseekV3Config
    from mindformers.models.deepseek3.modeling_deepseek_v3_train import TrainingDeepseekV3ForCausalLM
    from mindformers.models.qwen3.configuration_qwen3 import Qwen3Config
    from mindformers.models.qwen3.modeling_qwen3_train import TrainingQwen3ForCausalLM

    ms.set_context(mode=ms.GRAPH_MODE)
    frozen = {"freeze_include": ["*"], "freeze_exclude": ["*lora*"]}
    for name, base, targets in (
        ("qwen3", TrainingQwen3ForCausalLM(Qwen3Config(**QWEN3)), ".*linear_qkv|.*linear_fc1|.*linear_proj"),
        (
            "deepseek_v3",
            TrainingDeepseekV3ForCausalLM(DeepseekV3Config(mla_qkv_concat=False, **DEEPSEEK)),
            ".*linear_q_down_proj|.*linear_fc2|.*output_layer",
        ),
    ):
        folder = fresh(name)
        (folder / "cells.json").write_text(json.dumps(cells(base), indent=0))
        net = get_pet_model(base, LoraConfig(lora_rank=4, lora_alpha=8, target_modules=targets, **frozen))
        randomize(net)
        keep_config(folder)
        if name == "qwen3":
            ms.save_checkpoint(net, str(folder / "adapter"), choice_func=is_adapter, format="safetensors")
            ms.save_checkpoint(net, str(folder / "adapter.ckpt"), choice_func=is_adapter)
        else:
            ms.save_checkpoint(net, str(folder / "whole.ckpt"))
            names = [f"{p.name} {list(p.shape)} {p.dtype}" for p in net.get_parameters()]
            (folder / "names.json").write_text(json.dumps(names, indent=0))


def is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def pynative() -> None:
    from mindformers.checkpoint.checkpoint import CommonInfo, save_checkpoint
    from mindformers.core.optim import AdamW
    from mindformers.models.deepseek3.configuration_deepseek_v3 import DeepseekV3Config
    from mindformers.models.deepseek3.modeling_deepseek_v3_pynative import PyNativeDeepseekV3ForCausalLM
    from mindformers.models.qwen3.configuration_qwen3 import Qwen3Config
    from mindformers.models.qwen3.modeling_qwen3_train_pynative import PyNativeQwen3ForCausalLM
    from mindformers.pynative.callback.checkpoint_callback import CheckpointCallback
    from mindformers.pynative.config.config import LoraConfig
    from mindformers.pynative.pet.lora_adapter import build_lora_model, freeze_base_params
    from mindformers.pynative.pet.utils import is_lora_param_name

    ms.set_context(mode=ms.PYNATIVE_MODE)
    for name, base, targets in (
        ("qwen3_pynative", PyNativeQwen3ForCausalLM(Qwen3Config(**QWEN3)), r"linear_qkv|layers\.1\.mlp\.linear_fc1"),
        (
            "deepseek_v3_pynative",
            PyNativeDeepseekV3ForCausalLM(DeepseekV3Config(**DEEPSEEK)),
            r"linear_proj|mlp\.experts",
        ),
    ):
        folder = fresh(name)
        (folder / "cells.json").write_text(json.dumps(cells(base), indent=0))
        config = LoraConfig(target_modules=targets, lora_rank=4, lora_alpha=8, lora_dropout=0.05)
        net = build_lora_model(base, config)
        freeze_base_params(net)
        randomize(net)
        info = CommonInfo(epoch_num=1, step_num=7, global_step=7, loss_scale=1.0, global_batch_size=4,
                          consumed_samples=28)  # fmt: skip
        save_checkpoint(
            iteration=7, network=net, optimizer=AdamW(net.trainable_params()), common_info=info,
            save_checkpoint_path=str(folder), user_prefix="run", model_choice_func=is_lora_param_name,
            global_model_keys=set(net.parameters_dict()),
        )  # fmt: skip
        callback = CheckpointCallback(
            str(folder), save_trainable_only=True, base_load_path="base", lora_config=config, prefix="run"
        )
        callback._write_adapter_manifest(info)


def fresh(name: str) -> Path:
    folder = FILES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    os.chdir(tempfile.mkdtemp())
    sys.path.insert(0, str(Path(__file__).parent))
    ms.set_device("CPU")
    {"llama": llama, "mcore": mcore, "pynative": pynative}[sys.argv[1]]()
