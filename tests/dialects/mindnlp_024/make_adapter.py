"""Let MindNLP 0.2.4 on MindSpore 2.0.0 (Python 3.9) save an adapter, or load one of ours.

python make_adapter.py save DIR       a tiny BERT classifier with LoRA: DIR/adapter_model.ckpt, DIR/adapter_config.json,
                                      DIR/outputs.npz (input ids, logits, the base's and the adapter's parameters)
python make_adapter.py load DIR NPZ   the adapter in DIR over the base in NPZ: the largest difference of the logits

Environment: mindspore==2.0.0, mindnlp==0.2.4 (--no-deps), numpy<1.24, pillow<10, protobuf<4, pytest==7.2.0,
tokenizers==0.19.1; datasets is not needed. MindSpore 2.0.0 lacks ops.Dense, which LoRA's forward of 0.2.4 calls.
"""

import importlib.machinery
import sys
import types

import mindspore
import numpy as np


class Absent(types.ModuleType):
    def __getattr__(self, name):
        return None if not name.startswith("__") else super().__getattribute__(name)


sys.modules["datasets"] = Absent("datasets")
sys.modules["datasets"].__spec__ = importlib.machinery.ModuleSpec("datasets", None)

from mindnlp.peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from mindnlp.transformers import BertConfig, BertForSequenceClassification  # noqa: E402

CONFIG = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 24, "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def dense(x, weight, bias=None):
    out = mindspore.ops.matmul(x, weight.swapaxes(0, 1))
    return out if bias is None else out + bias


mindspore.ops.dense = dense


def base():
    return BertForSequenceClassification(BertConfig(**CONFIG)).set_train(False)


def logits(model, ids):
    model.set_train(False)
    return model(mindspore.Tensor(ids, mindspore.int32))[0].asnumpy()


def save(folder):
    rng = np.random.default_rng(24)
    model = base()
    for _, parameter in model.parameters_and_names():
        parameter.set_data(mindspore.Tensor((rng.standard_normal(parameter.shape) * 0.1).astype(np.float32)))
    start = {name: p.asnumpy().copy() for name, p in model.parameters_and_names()}
    adapted = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=5, target_modules=["query", "value"], task_type="SEQ_CLS")
    )
    for name, parameter in adapted.parameters_and_names():
        if "lora_" in name or "modules_to_save" in name:
            parameter.set_data(mindspore.Tensor((rng.standard_normal(parameter.shape) * 0.3).astype(np.float32)))
    ids = rng.integers(1, 40, (2, 7))
    out = logits(adapted, ids)
    adapted.save_pretrained(folder)
    trained = {f"adapted:{n}": p.asnumpy() for n, p in adapted.parameters_and_names() if "lora_" in n or "save" in n}
    np.savez(f"{folder}/outputs.npz", ids=ids, logits=out, **{f"base:{k}": v for k, v in start.items()}, **trained)
    print(sorted(trained))


def load(folder, arrays):
    known = np.load(arrays)
    model = base()
    for name, parameter in model.parameters_and_names():
        parameter.set_data(mindspore.Tensor(known[f"base:{name}"]))
    adapted = PeftModel.from_pretrained(model, folder)
    for name, parameter in adapted.parameters_and_names():
        if "modules_to_save" in name:  # 0.2.4 does not load its own saved modules
            parameter.set_data(mindspore.Tensor(known[f"adapted:{name}"]))
    print(np.abs(logits(adapted, known["ids"]) - known["logits"]).max())


if __name__ == "__main__":
    {"save": save, "load": load}[sys.argv[1]](*sys.argv[2:])
