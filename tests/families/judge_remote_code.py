"""Compare the names that were read in published modelling code with those of its classes, built on the meta device.

    python judge_remote_code.py FOLDER     FOLDER holds one folder of Python files for each model below

Run with torch 2.13.0 and transformers 4.54.1 on the files of Baichuan2-13B-Chat, chatglm-6b, chatglm2-6b and Qwen-7B:
all agree. The parameters of each class for causal language models, built from the ``config`` of ``names/*.hf.json``,
have to be exactly the ``parameters`` there.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch

NAMES = Path(__file__).parent / "names"
CLASSES = {
    "baichuan2": ("baichuan", "configuration_baichuan.BaichuanConfig", "modeling_baichuan.BaichuanForCausalLM"),
    "glm": ("chatglm", "configuration_chatglm.ChatGLMConfig", "modeling_chatglm.ChatGLMForConditionalGeneration"),
    "glm2": ("chatglm2", "configuration_chatglm.ChatGLMConfig", "modeling_chatglm.ChatGLMForConditionalGeneration"),
    "qwen": ("qwen", "configuration_qwen.QWenConfig", "modeling_qwen.QWenLMHeadModel"),
}


UNSAID = {"original_rope": True, "seq_length": 64, "use_logn_attn": False, "use_dynamic_ntk": False}
"""Fields that a model's own config.json has, its configuration class has not, and no shape depends on."""


def found(folder: str, config: str, model: str, fields: dict[str, object]) -> dict[str, list[int]]:
    """Build a class and return its parameters' names and shapes."""
    made = []
    for name in (config, model):
        module, _, cls = name.partition(".")
        made.append(getattr(importlib.import_module(f"{folder}.{module}"), cls))
    settings = made[0](**{name: value for name, value in fields.items() if name != "model_type"})
    for name, value in UNSAID.items():
        if not hasattr(settings, name):
            setattr(settings, name, value)
    with torch.device("meta"):
        network = made[1](settings)
    return {name: list(parameter.shape) for name, parameter in network.named_parameters()}


def main() -> None:
    """Print for each family whether they agree, and what does not."""
    for family, (folder, config, model) in CLASSES.items():
        said = json.loads((NAMES / f"{family}.hf.json").read_text("utf-8"))
        try:
            real = found(folder, config, model, said["config"])
        except (ImportError, AttributeError, TypeError, ValueError, NotImplementedError, RuntimeError) as error:
            print(family, "not built:", type(error).__name__, error)
            continue
        wrong = {n: (real.get(n), said["parameters"].get(n)) for n in {*real, *said["parameters"]}
                 if real.get(n) != said["parameters"].get(n)}  # fmt: skip
        print(family, len(real), "agree" if not wrong else f"(class, file): {wrong}")


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    main()
