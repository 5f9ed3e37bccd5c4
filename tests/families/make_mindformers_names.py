"""Build small networks of MindFormers on the CPU and write their parameters' names and shapes beside this file.

``python make_mindformers_names.py RELEASE [RESEARCH]`` writes ``names/FAMILY.RELEASE.CASE.json`` for the release that
``import mindformers`` finds; RESEARCH is the folder ``research`` of MindFormers' repository at that tag, for models
that the wheel does not hold. Run with mindspore 2.10.0 on the CPU. The releases before 1.6 ask for older MindSpores;
the few names that they import and no cell needs are stood in for here. The tests read what this wrote, never run it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

OUT = Path(__file__).parent / "names"
LLAMA = {"hidden_size": 24, "num_layers": 2, "num_heads": 4, "n_kv_heads": 2, "intermediate_size": 28, "vocab_size": 40,
         "seq_length": 16}  # fmt: skip
GLM2 = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 8, "ffn_hidden_size": 28,
        "padded_vocab_size": 40, "seq_length": 16, "multi_query_attention": True, "multi_query_group_num": 2,
        "add_qkv_bias": True}  # fmt: skip
MCORE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96, "vocab_size": 128, "max_position_embeddings": 64,
         "tie_word_embeddings": False}  # fmt: skip
WIDE = MCORE | {"head_dim": 32}
CORE = "mindformers.models"


class StandIn(types.ModuleType):
    """A module that has every name, each a class that takes anything and does nothing."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__init__": lambda self, *_, **__: None})
        setattr(self, name, made)
        return made


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import stand-ins for a package that is not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        mine = name == self.package or name.startswith(self.package + ".")
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if mine else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stand_in() -> None:
    """Add the names that MindFormers before 1.6 imports and MindSpore 2.10 has not, and hyper_parallel."""
    import mindspore.dataset.transforms as transforms
    import mindspore.dataset.vision as vision

    for package in (transforms, vision):
        for name in ("py_transforms", "c_transforms"):
            if not hasattr(package, name):
                module = StandIn(f"{package.__name__}.{name}")
                module.__dict__.update({k: v for k, v in vars(package).items() if not k.startswith("__")})
                setattr(package, name, module)
                sys.modules[module.__name__] = module
    sys.meta_path += [Finder("mindspore.nn.layer.flash_attention"), Finder("hyper_parallel")]


def network(module: str, cls: str, config_module: str, config: str, **fields: object) -> object:
    """Build one network from its classes' places and its configuration."""
    made = getattr(importlib.import_module(config_module), config)(**fields)
    return getattr(importlib.import_module(module), cls)(made)


def llama(**fields: object) -> object:
    return network(f"{CORE}.llama", "LlamaForCausalLM", f"{CORE}.llama", "LlamaConfig", **LLAMA, **fields)


def like_llama(module: str, cls: str, config_module: str, config: str, **fields: object) -> object:
    return network(module, cls, config_module, config, **LLAMA | fields)


def glm2(**fields: object) -> object:
    return network(
        f"{CORE}.glm2", "ChatGLM2ForConditionalGeneration", f"{CORE}.glm2", "ChatGLM2Config", **GLM2, **fields
    )


def telechat(name: str, kv_heads: int, **fields: object) -> object:
    return like_llama("research.telechat.telechat", "TelechatForCausalLM", "research.telechat.telechat_config",
                      "TelechatConfig", model_name=name, net_name=name, n_kv_heads=kv_heads, **fields)  # fmt: skip


def telechat2(**fields: object) -> object:
    return like_llama("research.telechat2.telechat", "TelechatForCausalLM", "research.telechat2.telechat_config",
                      "TelechatConfig", **fields)  # fmt: skip


def wizardcoder() -> object:
    """Build WizardCoder, whose attention refuses every device but Ascend; parameters are the same everywhere."""
    from mindspore import context

    real = context.get_context
    context.get_context = lambda key: "Ascend" if key == "device_target" else real(key)
    try:
        return network("wizardcoder", "WizardCoderLMHeadModel", "wizardcoder_config", "WizardCoderConfig",
                       seq_length=16, n_position=16, vocab_size=40, hidden_size=24, num_layers=2, num_heads=4,
                       batch_size=1)  # fmt: skip
    finally:
        context.get_context = real


def baichuan(size: int, **fields: object) -> object:
    return like_llama(f"baichuan2_{size}b", f"Baichuan{size}BV2ForCausalLM", f"{CORE}.llama", "LlamaConfig",
                      n_kv_heads=None, **fields)  # fmt: skip


def internlm2(**fields: object) -> object:
    return like_llama("internlm2", "InternLM2ForCausalLM", "internlm2_config", "InternLM2Config", **fields)


def mcore(folder: str, stem: str, config: str, cls: str, part: str, **fields: object) -> object:
    where = f"{CORE}.{folder}"
    return network(f"{where}.modeling_{stem}_{part}", cls, f"{where}.configuration_{stem}", config, **fields)


def graph_training(folder: str, stem: str, config: str, cls: str, **fields: object) -> object:
    """Build a training network as a run that says use_legacy=False does."""
    layers = importlib.import_module("mindformers.parallel_core.training_graph.transformer.utils")
    layers.is_legacy_model = lambda: False
    return mcore(folder, stem, config, cls, "train", **fields)


Case = Callable[[], object]
CASES: dict[str, dict[str, Case]] = {
    "1.0.2": {
        "glm2.1.0.2": glm2,
        "wizardcoder.1.0.2": wizardcoder,
    },
    "1.3.2": {
        "bloom.1.3.2": lambda: network(
            f"{CORE}.bloom", "BloomLMHeadModel", f"{CORE}.bloom", "BloomConfig", seq_length=16, vocab_size=40,
            hidden_size=24, num_layers=2, num_heads=4, hidden_act="gelu"),
        "glm.1.3.2": lambda: network(
            f"{CORE}.glm", "GLMForPreTraining", f"{CORE}.glm", "GLMConfig", vocab_size=40, hidden_size=24, num_layers=2,
            num_heads=4, inner_hidden_size=28, hidden_size_per_attention_head=6),
        "glm2.1.3.2": glm2,
        "llama.1.3.2.off": llama,
        "llama.1.3.2.contiguous": lambda: llama(qkv_concat=True),
        "baichuan2.1.3.2.7b": lambda: baichuan(7),
        "baichuan2.1.3.2.7b_concat": lambda: baichuan(7, qkv_concat=True),
        "baichuan2.1.3.2.13b": lambda: baichuan(13),
        "internlm.1.3.2": lambda: like_llama(
            "internlm", "InternLMForCausalLM", "internlm_config", "InternLMConfig", has_bias=True, n_kv_heads=None),
        "internlm2.1.3.2.on": internlm2,
        "internlm2.1.3.2.off": lambda: internlm2(qkv_concat=False),
        "qwen.1.3.2": lambda: like_llama(
            "qwen_model", "QwenForCausalLM", "qwen_config", "QwenConfig", emb_dropout_prob=0.0, n_kv_heads=None),
    },
    "1.4.0-beta1": {
        "telechat.1.4.0-beta1.7b": lambda: telechat("telechat_7b", 4),
        "telechat.1.4.0-beta1.12b": lambda: telechat("telechat_12b", 4),
        "telechat_52b.1.4.0-beta1": lambda: telechat(
            "telechat_52b", 8, hidden_size=32, num_heads=8, intermediate_size=24, wo_has_bias=False),
    },
    "1.5.0": {
        "telechat.1.5.0.telechat2": telechat2,
        "telechat.1.5.0.telechat2_concat": lambda: telechat2(qkv_concat=True),
    },
    "2.1.0": {
        "llama.2.1.0.off": llama,
        "llama.2.1.0.grouped": lambda: llama(qkv_concat=True),
        "glm2.2.1.0.concat": glm2,
        "glm2.2.1.0.split": lambda: glm2(qkv_concat=False, mlp_concat=False),
        "qwen2_mcore.2.1.0.predict": lambda: mcore(
            "qwen2", "qwen2", "Qwen2Config", "InferenceQwen2ForCausalLM", "infer", add_qkv_bias=True, **MCORE),
        "qwen3_mcore.2.1.0.predict": lambda: mcore(
            "qwen3", "qwen3", "Qwen3Config", "InferenceQwen3ForCausalLM", "infer", **WIDE),
        "qwen3_mcore.2.1.0.graph": lambda: graph_training(
            "qwen3", "qwen3", "Qwen3Config", "TrainingQwen3ForCausalLM", **WIDE),
        "qwen3_mcore.2.1.0.graph_tied": lambda: graph_training(
            "qwen3", "qwen3", "Qwen3Config", "TrainingQwen3ForCausalLM", **WIDE | {"tie_word_embeddings": True}),
        "qwen3_mcore.2.1.0.pynative": lambda: mcore(
            "qwen3", "qwen3", "Qwen3Config", "PyNativeQwen3ForCausalLM", "train_pynative", **WIDE),
        "glm4_mcore.2.1.0.predict": lambda: mcore(
            "glm4", "glm4", "Glm4Config", "InferenceGlm4ForCausalLM", "infer", attention_bias=True, **WIDE),
        "telechat2_mcore.2.1.0.predict": lambda: mcore(
            "telechat2", "telechat2", "Telechat2Config", "InferenceTelechat2ForCausalLM", "infer",
            **MCORE | {"ffn_hidden_size": 96}),
        "telechat3_mcore.2.1.0.predict": lambda: mcore(
            "telechat3", "telechat3", "TeleChat3Config", "InferenceTelechat3ForCausalLM", "infer", **WIDE),
        "telechat3_mcore.2.1.0.graph": lambda: graph_training(
            "telechat3", "telechat3", "TeleChat3Config", "TrainingTeleChat3ForCausalLM", **WIDE),
    },
}  # fmt: skip


def write(release: str, wanted: Sequence[str]) -> None:
    """Write every case of a release, those of ``wanted`` only where it names any; print what was written."""
    for name, build in CASES[release].items():
        if wanted and name not in wanted:
            continue
        os.environ["RUN_MODE"] = "predict" if "predict" in name else "train"
        net = build()
        parameters = {p.name: list(p.shape) for p in net.get_parameters()}  # type: ignore[attr-defined]
        said = {"release": release, "network": f"{type(net).__module__}.{type(net).__name__}", "mindspore": "2.10.0"}
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(shape)}" for key, shape in parameters.items())
        head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in said.items())
        (OUT / f"{name}.json").write_text(f'{{\n{head} "parameters": {{\n{lines}\n }}\n}}\n')
        print(f"{name}: {len(parameters)} parameters")


if __name__ == "__main__":
    import mindspore

    mindspore.set_context(mode=mindspore.GRAPH_MODE, device_target="CPU")
    stand_in()
    if len(sys.argv) > 2:
        folder = Path(sys.argv[2])
        sys.path[:0] = [str(folder.parent), *(str(path) for path in folder.iterdir() if path.is_dir())]
    write(sys.argv[1], sys.argv[3:])
