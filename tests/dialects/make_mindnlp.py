"""Let MindNLP 0.3.1 and 0.4.1 write adapters, and compute with one of ours.

    python make_mindnlp.py ours     where lorabridge, torch 2.13, transformers 5.23 and peft 0.21.2 are
    python make_mindnlp.py          where mindnlp 0.3.1 (Python 3.9), 0.4.1 or 0.5.1 (3.11) is, on mindspore 2.7.0, CPU

Into ``mindnlp_files``: ``base.npz``, a tiny BERT classifier; ``peft``, an adapter of peft with ranks and alphas by
pattern, and ``ours``, what lorabridge makes of it for MindNLP. Into ``mindnlp_files/VERSION``: ``lora`` (in 0.4.1 also
``dora`` and ``half``, float16), saved by MindNLP, with ``logits.npy``, and ``ours.npy``, its logits with ``ours``. Both
releases are older than MindSpore 2.7; what it no longer has is put back below. 0.3.1 can load no adapter at all (it
looks for the adapter_model.bin that MindSpore refuses), so its loader is given the name that 0.3.0 and 0.4 have.
0.5.1 runs peft 0.17.1 and transformers 4.57.1 themselves on MindSpore, as they are; its ``lora`` is peft's.
"""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent / "mindnlp_files"
FIELDS = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 24, "num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
LORA = {
    "task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value", "dense"],
    "rank_pattern": {"value": 2}, "alpha_pattern": {"query": 5},
}  # fmt: skip
IDS = np.array([[1, 2, 3, 4, 7]])


def ours() -> None:
    """Write the base, peft's adapter, and what lorabridge makes of it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    from lorabridge import ConvertOptions, convert

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**FIELDS)).eval()
    HERE.mkdir(exist_ok=True)
    np.savez(HERE / "base.npz", **{name: tensor.numpy() for name, tensor in model.state_dict().items()})
    torch.manual_seed(1)
    get_peft_model(model, LoraConfig(init_lora_weights=False, **LORA)).save_pretrained(HERE / "peft")  # type: ignore[arg-type]
    (HERE / "peft" / "README.md").unlink(missing_ok=True)
    convert(HERE / "peft", HERE / "ours", ConvertOptions(target_dialect="mindnlp"))


def older_mindspore() -> None:
    """Put back into MindSpore 2.7 what MindNLP 0.3 and 0.4 use."""
    os.environ["DEVICE_TARGET"] = "CPU"
    import mindspore
    import mindspore._c_expression as native
    import mindspore.common as common

    stub = types.ModuleType("mindspore.common._stub_tensor")
    stub.StubTensor, stub.stub_sync = type("StubTensor", (), {}), lambda tensor: tensor
    sys.modules[stub.__name__] = common._stub_tensor = stub
    if not hasattr(native, "Tensor"):
        native.Tensor = native.TensorPy
    if not hasattr(mindspore.nn.Cell, "to"):
        mindspore.nn.Cell.to = lambda self, *args, **named: self
    import mindnlp
    from mindnlp.peft import peft_model
    from mindnlp.peft.tuners.lora import model as lora_model

    for cls, inner in ((peft_model.PeftModel, "base_model"), (lora_model.LoraModel, "model")):
        _without_recursion(cls, inner)
    if hasattr(mindnlp, "core"):
        from mindnlp.core import ops

        def empty(*size: object, dtype: object = None, **named: object) -> object:
            shape = tuple(size[0]) if len(size) == 1 and isinstance(size[0], (tuple, list)) else size
            return mindspore.Tensor(np.zeros(shape, np.float32)).astype(dtype or mindspore.float32)

        ops.empty = ops.creation.empty = empty
        usual = mindspore.ops.norm

        def norm(tensor: object, ord: object = None, dim: object = None, *more: object, **named: object) -> object:
            return usual(tensor, None if ord == "fro" and isinstance(dim, int) else ord, dim, *more, **named)

        mindspore.ops.norm = norm


def _without_recursion(cls: type, inner: str) -> None:
    """Let ``__getattr__`` fail before the inner model is set, as cells of MindSpore 2.7 ask while they are made."""
    usual = cls.__getattr__

    def look(self: object, name: str) -> object:
        if name == inner and not any(name in self.__dict__.get(held, {}) for held in ("_cells", "_modules")):
            raise AttributeError(name)
        return usual(self, name)

    cls.__getattr__ = look


def network() -> object:
    """Build MindNLP's BERT of the base's weights."""
    import mindspore
    from mindnlp.transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**FIELDS))
    model.set_train(False)
    base = np.load(HERE / "base.npz")
    own = dict(parameters(model))
    assert set(base) == set(own), set(base) ^ set(own)
    for name, parameter in own.items():
        put(parameter, mindspore.Tensor(base[name]))
    return model


def put(parameter: object, value: object) -> None:
    """Give a parameter of either release a value."""
    (getattr(parameter, "set_data", None) or parameter.assign_value)(value)


def parameters(model: object) -> list[tuple[str, object]]:
    """Return names and parameters in either release."""
    return list(model.named_parameters() if hasattr(model, "named_parameters") else model.parameters_and_names())


def logits(model: object) -> np.ndarray:
    """Run a network of MindNLP."""
    import mindspore

    model.set_train(False)
    return model(mindspore.Tensor(IDS)).logits.asnumpy()


def adapt(kind: str, folder: Path) -> None:
    """Let MindNLP adapt its network, fill the factors, and save."""
    import mindspore
    from mindnlp.peft import LoraConfig, get_peft_model

    model = get_peft_model(network(), LoraConfig(use_dora=kind == "dora", **LORA))
    rng = np.random.default_rng(5)
    for name, parameter in parameters(model):
        if ".lora_" in name:
            value, noise = parameter.asnumpy(), rng.standard_normal(parameter.shape).astype(np.float32)
            made = value * (1 + noise / 8) if "magnitude" in name else noise / 4
            dtype = mindspore.float16 if kind == "half" else mindspore.float32
            put(parameter, mindspore.Tensor(made).astype(dtype))
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder))
    if kind != "half":
        np.save(folder / "logits.npy", logits(model))


def by_peft(folder: Path) -> None:
    """Let MindNLP 0.5 run peft: save an adapter and its logits."""
    import mindnlp  # noqa: F401  (makes torch its own)
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification

    model = BertForSequenceClassification(BertConfig(**FIELDS)).eval()
    model.load_state_dict({name: torch.tensor(value) for name, value in np.load(HERE / "base.npz").items()})
    adapted = get_peft_model(model, LoraConfig(init_lora_weights=False, **LORA)).eval()  # type: ignore[arg-type]
    adapted.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    np.save(folder / "logits.npy", adapted(input_ids=torch.tensor(IDS)).logits.detach().numpy())


def main() -> None:
    """Write what the installed release writes and computes."""
    from importlib.metadata import version

    if version("mindnlp") == "0.5.1":
        by_peft(HERE / "051" / "lora")
        return
    older_mindspore()
    from mindnlp import peft
    from mindnlp.peft.utils import save_and_load

    folder = HERE / version("mindnlp").replace(".", "")
    for kind in ("lora",) if version("mindnlp") == "0.3.1" else ("lora", "half", "dora"):
        adapt(kind, folder / kind)
    save_and_load.WEIGHTS_NAME = "adapter_model.ckpt"
    np.save(folder / "ours.npy", logits(peft.PeftModel.from_pretrained(network(), str(HERE / "ours"))))
    print(folder, sorted(path.name for path in folder.rglob("*")), json.dumps(np.load(folder / "ours.npy").tolist()))


if __name__ == "__main__":
    if sys.argv[1:]:
        ours()
    else:
        main()
