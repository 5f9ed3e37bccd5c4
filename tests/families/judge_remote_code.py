"""Compare the names that were read in published modelling code with those of its classes, built on the meta device.

    python judge_remote_code.py FOLDER     FOLDER holds one folder of Python files for each model below

Run with torch 2.13.0, transformers 4.54.1 and 4.57.6, and einops 0.8.2 on the files of Baichuan2-13B-Chat, chatglm-6b,
chatglm2-6b and Qwen-7B, and with 4.57.6 on those of InternLM-7B (the project's repository, 2024-01; its folder has to
be on PYTHONPATH, too), InternLM2 (as InternVL publishes it), TeleChat-7B, 12B and 52B and TeleChat2-115B: all agree.
The state of each class for causal language models, built from the ``config`` of ``names/*.hf.json``, has to have
exactly the ``parameters`` there. The published code of TeleChat3 was not found.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel

NAMES = Path(__file__).parent / "names"
CLASSES = {
    "baichuan2": ("baichuan", "configuration_baichuan.BaichuanConfig", "modeling_baichuan.BaichuanForCausalLM"),
    "glm": ("chatglm", "configuration_chatglm.ChatGLMConfig", "modeling_chatglm.ChatGLMForConditionalGeneration"),
    "glm2": ("chatglm2", "configuration_chatglm.ChatGLMConfig", "modeling_chatglm.ChatGLMForConditionalGeneration"),
    "qwen": ("qwen", "configuration_qwen.QWenConfig", "modeling_qwen.QWenLMHeadModel"),
    "internlm": ("internlm", "configuration_internlm.InternLMConfig", "modeling_internlm.InternLMForCausalLM"),
    "internlm2": ("internlm2", "configuration_internlm2.InternLM2Config", "modeling_internlm2.InternLM2ForCausalLM"),
    "telechat_7b": ("telechat_7b", "configuration_telechat.TelechatConfig", "modeling_telechat.TelechatForCausalLM"),
    "telechat_12b": ("telechat_12b", "configuration_telechat.TelechatConfig", "modeling_telechat.TelechatForCausalLM"),
    "telechat2": ("telechat2_115b", "configuration_telechat.TelechatConfig", "modeling_telechat.TelechatForCausalLM"),
    "telechat_52b": ("telechat_52b", "configuration_telechat.TELECHATConfig", "modeling_telechat.TELECHAT"),
}


UNSAID = {"original_rope": True, "seq_length": 64, "use_logn_attn": False, "use_dynamic_ntk": False}
"""Fields that a model's own config.json has, its configuration class has not, and no shape depends on."""


STATED: dict[str, dict[str, object]] = {"internlm2": {"bias": False}}
"""Settings of the published models whose config.json is not among the files, where their class has other defaults."""
BODIES = ("telechat_7b",)
"""Models whose files hold the body alone; the head is tied."""
NOT_SHAPES = ("model_type", "auto_map", "architectures", "torch_dtype")
"""Fields that are no settings of a network."""
FLASH = "flash_attn_unpadded_func"
"""What TeleChat's code imports from flash-attn, where that is installed."""


def found(
    folder: str, config: str, model: str, fields: dict[str, object], listed: set[str]
) -> dict[str, list[int]]:  # fmt: skip
    """Build a class with its model's config.json, where that is in the folder, and ``fields``; return names and shapes.

    They are those of its state: parameters, tied ones included, and the buffers that are among ``listed``.
    """
    made = []
    for name in (config, model):
        module, _, cls = name.partition(".")
        code = importlib.import_module(f"{folder}.{module}")
        if getattr(code, FLASH, code) is None:
            setattr(code, FLASH, print)  # asked for when the network is built, called when it runs
        made.append(getattr(code, cls))
    published = Path(str(sys.modules[made[0].__module__].__file__)).with_name("config.json")
    own = json.loads(published.read_text("utf-8")) if published.exists() else {}
    settings = made[0](**{name: value for name, value in (own | fields).items() if name not in NOT_SHAPES})
    for name, value in UNSAID.items():
        if not hasattr(settings, name):
            setattr(settings, name, value)
    with torch.device("meta"):
        network = made[1](settings)
    buffers = {name for name, _ in network.named_buffers()} - listed
    return {name: list(tensor.shape) for name, tensor in network.state_dict().items() if name not in buffers}


def main() -> None:
    """Print for each family whether they agree, and what does not."""
    for family, (folder, config, model) in CLASSES.items():
        said = json.loads((NAMES / f"{family}.hf.json").read_text("utf-8"))
        try:
            real = found(folder, config, model, {**said["config"], **STATED.get(family, {})}, {*said["parameters"]})
        except (ImportError, AttributeError, TypeError, ValueError, NotImplementedError, RuntimeError) as error:
            print(family, "not built:", type(error).__name__, error)
            continue
        if family in BODIES:
            real = {
                name.removeprefix("transformer."): shape for name, shape in real.items() if name != "lm_head.weight"
            }
        wrong = {n: (real.get(n), said["parameters"].get(n)) for n in {*real, *said["parameters"]}
                 if real.get(n) != said["parameters"].get(n)}  # fmt: skip
        print(family, len(real), "agree" if not wrong else f"(class, file): {wrong}")


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    torch.Tensor.cuda = lambda tensor, *_: tensor  # type: ignore[method-assign]
    PreTrainedModel.init_weights = lambda network: None  # what has no values is not initialised
    main()
