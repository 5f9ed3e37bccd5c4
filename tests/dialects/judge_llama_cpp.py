"""Let llama.cpp judge: adapters that its converter wrote, and the logits that it computes with ours.

    python judge_llama_cpp.py LLAMA_CPP [make|judge]       writes into llama_cpp_files/

LLAMA_CPP is the folder vendor/llama.cpp of llama-cpp-python's source release 0.3.36, whose library runs here
(``pip install llama-cpp-python==0.3.36``); transformers 5.23, peft 0.21.2, torch 2.13.0. For a tiny Llama and a tiny
Qwen2 of transformers ``peft`` is an adapter of peft and ``theirs.gguf`` what convert_lora_to_gguf.py made of it.
``judged.json``: the largest differences of logits from peft's, on the base that convert_hf_to_gguf.py wrote (without a
vocabulary: tokens are given by number), with no adapter, with ``theirs.gguf`` and with what lorabridge made of the
adapter, and a digest of that file's tensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent / "llama_cpp_files"
FIELDS = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip
TOKENS = [1, 5, 9, 2, 11, 3, 17]
SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {
    "llama": {"target_modules": [*SEVEN, "embed_tokens", "lm_head"], "rank_pattern": {"q_proj": 5}},
    "qwen2": {"target_modules": SEVEN},
}


def network(kind: str) -> torch.nn.Module:
    """Build a network of transformers; the same weights in every run, biases other than zero."""
    import transformers

    torch.manual_seed(0)
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }[kind]
    made = model(config(**FIELDS)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) / 4 + (1 if "norm" in name else 0))
    return made


def adapted(kind: str) -> torch.nn.Module:
    """Put peft's LoRA in, A and B other than zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **LORA[kind])  # type: ignore[arg-type]
    return get_peft_model(network(kind), config).eval()


def logits(model: torch.nn.Module) -> np.ndarray:
    """Run a network of transformers on the tokens."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([TOKENS])).logits[0].numpy()


def base(kind: str, source: Path, folder: Path) -> Path:
    """Let convert_hf_to_gguf.py write the base without a vocabulary."""
    network(kind).save_pretrained(folder / kind)
    out = folder / f"{kind}.gguf"
    code = (
        "import sys, runpy; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/gguf-py']; "
        "from conversion import base, llama, qwen; "
        "size = lambda self: self.gguf_writer.add_vocab_size(self.hparams['vocab_size']); "
        "llama.LlamaModel.set_vocab = lambda self: self._set_vocab_none(); "
        "qwen.Qwen2Model.set_vocab = lambda self: (self._set_vocab_none(), size(self)); "
        "sys.argv = sys.argv[2:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = str(source / "convert_hf_to_gguf.py")
    command = [sys.executable, "-c", code, str(source), script, str(folder / kind), "--outfile", str(out)]
    subprocess.run([*command, "--outtype", "f32"], check=True, capture_output=True)
    return out


def theirs(kind: str, source: Path, folder: Path) -> None:
    """Let convert_lora_to_gguf.py convert the adapter."""
    command = [sys.executable, str(source / "convert_lora_to_gguf.py"), str(HERE / kind / "peft"), "--outtype", "f32"]
    out = ["--base", str(folder / kind), "--outfile", str(HERE / kind / "theirs.gguf")]
    subprocess.run([*command, *out], check=True, capture_output=True)


def ours(kind: str, out: Path) -> Path:
    """Convert the adapter with lorabridge."""
    from lorabridge import ConvertOptions, convert

    config = HERE / kind / "config.json"
    options = ConvertOptions(target_dialect="gguf", family=f"{kind}_gguf", config=config)
    convert(HERE / kind / "peft", out, options)
    return out


def run(model: Path, adapter: Path | None) -> np.ndarray:
    """Let llama.cpp compute the logits of every token, with an adapter or without."""
    import llama_cpp as lib

    lib.llama_log_set(SILENT, ctypes.c_void_p(0))
    loaded = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
    settings = lib.llama_context_default_params()
    settings.n_ctx, settings.n_threads, settings.n_threads_batch = 64, 1, 1
    settings.type_k = settings.type_v = lib.GGML_TYPE_F32
    settings.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = lib.llama_init_from_model(loaded, settings)
    if adapter is not None:
        held = lib.llama_adapter_lora_init(loaded, str(adapter).encode())
        assert held, f"llama.cpp does not load {adapter}"
        if hasattr(lib, "llama_set_adapters_lora"):
            wrong = lib.llama_set_adapters_lora(context, (type(held) * 1)(held), 1, (ctypes.c_float * 1)(1.0))
        else:
            wrong = lib.llama_set_adapter_lora(context, held, 1.0)
        assert wrong == 0
    batch = lib.llama_batch_init(len(TOKENS), 0, 1)
    batch.n_tokens = len(TOKENS)
    for place, token in enumerate(TOKENS):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    assert lib.llama_decode(context, batch) == 0
    rows = [
        np.ctypeslib.as_array(lib.llama_get_logits_ith(context, place), (FIELDS["vocab_size"],)).copy()
        for place in range(len(TOKENS))
    ]
    lib.llama_free(context)
    lib.llama_model_free(loaded)
    return np.stack(rows)


def digest(file: Path) -> str:
    """Return a digest of the fields and tensors of a GGUF file."""
    import gguf

    reader = gguf.GGUFReader(str(file))
    made = hashlib.sha256()
    for tensor in sorted(reader.tensors, key=lambda tensor: tensor.name):
        shape = [int(axis) for axis in tensor.shape]
        made.update(f"{tensor.name} {int(tensor.tensor_type)} {shape}".encode() + tensor.data.tobytes())
    for name in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        made.update(f"{name} {reader.fields[name].contents()}".encode())
    return made.hexdigest()


def main(source: Path, steps: list[str]) -> None:
    """Write the fixtures and judge."""
    judged = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in LORA:
            model, folder = base(kind, source, Path(scratch)), HERE / kind
            if "make" in steps:
                folder.mkdir(parents=True, exist_ok=True)
                adapted(kind).save_pretrained(folder / "peft", save_embedding_layers=False)
                (folder / "peft" / "README.md").unlink(missing_ok=True)
                network(kind).config.save_pretrained(folder)
                theirs(kind, source, Path(scratch))
            wanted, plain = logits(adapted(kind)), logits(network(kind))
            made = ours(kind, Path(scratch) / f"{kind}_lora.gguf")
            found = {
                "base": float(np.abs(run(model, None) - plain).max()),
                "theirs": float(np.abs(run(model, folder / "theirs.gguf") - wanted).max()),
                "ours": float(np.abs(run(model, made) - wanted).max()),
                "effect": float(np.abs(wanted - plain).max()),
            }
            judged[kind] = {**found, "digest": digest(made)}
            print(kind, judged[kind], "as theirs:", digest(made) == digest(folder / "theirs.gguf"))
    (HERE / "judged.json").write_text(json.dumps(judged, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["make", "judge"])
