"""Let MindOne judge: its peft loads what lorabridge wrote, and computes what peft computes in torch.

    python judge_mindone_peft.py write FOLDER     with torch, transformers and peft: models, adapters, peft's outputs
    python judge_mindone_peft.py judge FOLDER     with mindone 0.5.0 and mindspore 2.10.0: loads, runs, compares

``write`` puts the adapters beside this file (``mindone_peft/CASE``), which the tests convert again; ``judge`` writes
``mindone_peft/judged.json``: for every case the largest difference between the two frameworks' outputs, with the
adapter as lorabridge converted it and with torch's own directory, and a digest of the converted file, so that tests
can tell whether lorabridge still writes what was judged. ``CASE.mindone`` is what MindOne itself saved. The operations
of mint that MindSpore 2.10 has for Ascend only are stood in for by numpy and older operations of MindSpore.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "mindone_peft"
GPT2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 19, "n_positions": 12, "bos_token_id": 0,
        "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
QWEN2 = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 19,
         "intermediate_size": 12, "max_position_embeddings": 16, "tie_word_embeddings": False}  # fmt: skip
LORA = {"r": 2, "lora_alpha": 6, "init_lora_weights": False}
ATTN = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
CASES: dict[str, tuple[str, Mapping[str, object]]] = {
    "gpt2": ("gpt2", ATTN),
    "gpt2_patterns": ("gpt2", ATTN | {"rank_pattern": {"h.0.attn.c_attn": 4}, "alpha_pattern": {"mlp.c_proj": 1}}),
    "gpt2_rslora": ("gpt2", ATTN | {"use_rslora": True}),
    "gpt2_ln_f": ("gpt2", ATTN | {"modules_to_save": ["ln_f"]}),
    "gpt2_bias": ("gpt2", ATTN | {"bias": "all"}),
    "qwen2": ("qwen2", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "qwen2_embed": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
}
SAVED = ("gpt2_ln_f", "qwen2")
IDS = [[3, 1, 4, 1, 5, 9, 2, 6]]


def digest(folder: Path) -> str:
    """Return a digest of an adapter's tensors, its container's format and the config's fields that decide the delta."""
    from safetensors import safe_open

    made = hashlib.sha256()
    with safe_open(folder / "adapter_model.safetensors", "numpy") as file:
        made.update(str((file.metadata() or {}).get("format")).encode())
        for name in sorted(file.keys()):
            value = file.get_tensor(name)
            made.update(f"{name} {value.dtype} {value.shape}".encode() + value.tobytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    fields = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save",
              "bias", "fan_in_fan_out")  # fmt: skip
    made.update(json.dumps({name: config.get(name) for name in fields}, sort_keys=True).encode())
    return made.hexdigest()


def without_place(adapter: Path) -> None:
    """Leave out where the model lay when an adapter was saved, and the model card."""
    (adapter / "README.md").unlink(missing_ok=True)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": None}
    path.write_text(json.dumps(config, indent=2) + "\n")


def write(folder: Path) -> None:
    """Save models and random adapters, and what peft computes with them."""
    import peft
    import torch
    import transformers

    from lorabridge import ConvertOptions, convert

    shutil.rmtree(FOLDER, ignore_errors=True)
    (folder / "converted").mkdir()
    for name, (family, options) in CASES.items():
        torch.manual_seed(0)
        if family == "gpt2":
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
        else:
            model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**QWEN2))
        model.save_pretrained(folder / family)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**LORA, **options))  # type: ignore[arg-type]
        torch.manual_seed(1)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter) * 0.3
        wrapped.save_pretrained(FOLDER / name)
        without_place(FOLDER / name)
        with torch.no_grad():
            logits = wrapped.eval()(torch.tensor(IDS)).logits
        np.save(folder / f"{name}.npy", logits.numpy())
        convert(FOLDER / name, folder / "converted" / name,
                ConvertOptions(target_dialect="mindone-peft", family=f"{family}_mindone"))  # fmt: skip


def judge(folder: Path) -> None:
    """Load and run every adapter in MindOne; write the differences."""
    stand_in()
    verdict = {}
    for name, (family, _) in CASES.items():
        wanted = np.load(folder / f"{name}.npy")
        verdict[name] = {
            "converted": difference(folder / family, folder / "converted" / name, wanted),
            "peft": difference(folder / family, FOLDER / name, wanted),
            "digest": digest(folder / "converted" / name),
        }
        print(name, verdict[name])
    said = {"mindone": "0.5.0", "mindspore": "2.10.0", "cases": verdict}
    (FOLDER / "judged.json").write_text(json.dumps(said, indent=1) + "\n")


def difference(base: Path, adapter: Path, wanted: np.ndarray) -> float | str:
    """Return the largest difference of the outputs, or the error with which MindOne stops."""
    import mindspore
    from mindone.peft import PeftModel
    from mindone.transformers import GPT2LMHeadModel, Qwen2ForCausalLM

    kind = GPT2LMHeadModel if base.name == "gpt2" else Qwen2ForCausalLM
    try:
        model = PeftModel.from_pretrained(kind.from_pretrained(str(base)), str(adapter))
        if adapter.name in SAVED and adapter.parent.name == "converted":
            model.save_pretrained(str(FOLDER / f"{adapter.name}.mindone"))
            without_place(FOLDER / f"{adapter.name}.mindone")
    except (KeyError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    model.set_train(False)
    logits = model(mindspore.Tensor(IDS, mindspore.int64), return_dict=False)[0]
    return float(np.abs(logits.asnumpy() - wanted).max())


def stand_in() -> None:
    """Give the CPU what the two models need; each is the operation's definition."""
    import mindspore
    from mindspore import Tensor, mint, ops

    def number(x: object) -> object:
        return x.asnumpy().item() if isinstance(x, Tensor) else x

    def arange(start: object, end: object = None, step: object = 1, *, dtype: object = None) -> Tensor:
        first, last = (0, start) if end is None else (start, end)
        values = np.arange(number(first), number(last), number(step))
        made = Tensor(values.astype(np.int64 if values.dtype.kind in "iu" else np.float32))
        return made if dtype is None else made.astype(dtype)

    def unchanged(self: Tensor, *_: object, **__: object) -> Tensor:
        return self

    def layer_norm(self: object, x: Tensor) -> Tensor:
        mean = x.mean(-1, keep_dims=True)
        spread = ((x - mean) ** 2).mean(-1, keep_dims=True)
        return (x - mean) / ops.sqrt(spread + self.eps) * self.weight + self.bias  # type: ignore[attr-defined]

    def addmm(a: Tensor, b: Tensor, c: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return beta * a + alpha * ops.matmul(b, c)

    def full(size: object, value: object, *, dtype: object = None) -> Tensor:
        return Tensor(np.full(size, value)).astype(dtype or mindspore.float32)

    def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, None]:
        return x * ops.rsqrt((x * x).mean(-1, keep_dims=True) + epsilon) * gamma, None

    ops.rms_norm = rms_norm
    replacements: dict[str, Callable[..., object]] = {
        "arange": arange, "mm": ops.matmul, "addmm": addmm, "full": full, "clone": lambda x: x.copy(),
        "einsum": lambda equation, *operands: Tensor(np.einsum(equation, *(o.asnumpy() for o in operands))),
    }  # fmt: skip
    for name, function in replacements.items():
        setattr(mint, name, function)
    mint.nn.LayerNorm.construct = layer_norm
    mint.nn.Embedding.construct = lambda self, x: ops.gather(self.weight, x, 0)
    mint.nn.Linear.construct = lambda self, x: (
        ops.matmul(x, self.weight.swapaxes(0, 1)) + (0 if self.bias is None else self.bias)
    )
    for name in ("normal_", "uniform_", "zero_", "fill_"):
        setattr(Tensor, name, unchanged)


if __name__ == "__main__":
    {"write": write, "judge": judge}[sys.argv[1]](Path(sys.argv[2]))
