"""What a file's own record saves its user from saying: origins, tables, layouts, adapters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from console import Invoke
from safetensors.numpy import save_file

HIDDEN, INNER, VOCAB = 8, 12, 10
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1, "vocab_size": VOCAB,
    "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    rng, shapes = np.random.default_rng(0), {f"model.layers.0.{name}.weight": shape for name, shape in SHAPES.items()}
    norms = ("model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm")
    shapes |= {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    shapes |= {f"{name}.weight": (HIDDEN,) for name in norms}
    folder = tmp_path / "llama"
    folder.mkdir()
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def adapter(folder: Path, seed: int = 1, *, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> Path:
    rng, tensors = np.random.default_rng(seed), {}
    for name, (out, width) in SHAPES.items():
        if name.endswith(targets):
            path = f"base_model.model.model.layers.0.{name}"
            tensors[f"{path}.lora_A.weight"] = rng.standard_normal((2, width)).astype(np.float32)
            tensors[f"{path}.lora_B.weight"] = rng.standard_normal((out, 2)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": sorted(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_merge_needs_no_table_where_the_base_names_one(invoke: Invoke, llama: Path, tmp_path: Path) -> None:
    lora, base = adapter(tmp_path / "lora"), tmp_path / "base.ckpt"
    layout = ("--layout", "qkv_concat=grouped")
    assert invoke("convert", llama, base, "--family", "llama", *layout, "-q").code == 0
    done = invoke("merge", base, lora, tmp_path / "merged.ckpt", "-q")
    assert (done.code, done.err) == (0, "")
    done = invoke("convert", tmp_path / "merged.ckpt", tmp_path / "back", "-q")
    assert (done.code, done.err) == (0, "")
    direct = invoke("merge", llama, lora, tmp_path / "direct", "-q")
    assert direct.code == 0
    assert invoke("diff", tmp_path / "back", tmp_path / "direct").code == 0
    record = json.loads((tmp_path / "merged.ckpt.lorabridge.json").read_text())
    assert record["options"] == {"family": "llama", "layout.qkv_concat": "grouped"}
    assert record["recipe"]["adapters"] == [{"name": "lora", "path": "lora", "weight": 1.0}]


def test_a_merge_is_verified_from_its_record(invoke: Invoke, llama: Path, tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two", 2, targets=("q_proj", "down_proj"))
    merged = tmp_path / "merged"
    assert invoke("merge", llama, one, two, merged, "--weights", "0.7,1", "-q").code == 0
    done = invoke("verify", llama, merged)
    assert done.code == 0
    assert f"DST says that it is llama with {one} times 0.7 and {two} merged into it" in done.out
    assert invoke("verify", merged, llama).code == 0
    (tmp_path / "two").rename(tmp_path / "gone")
    done = invoke("verify", llama, merged)
    assert (done.code, done.out) == (2, "")
    assert "merged from llama and one and two, which is not where it was" in done.err
    assert f"lorabridge verify ADAPTER {merged} --base {llama}" in done.err
    (merged / "lorabridge.json").unlink()
    done = invoke("verify", llama, merged)
    assert done.code == 2
    assert "DST holds one and two, and no manifest says where it lies" in done.err


def test_a_changed_merge_is_found(invoke: Invoke, llama: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    assert invoke("merge", llama, adapter(tmp_path / "one"), merged, "-q").code == 0
    file = merged / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    done = invoke("verify", llama, merged)
    assert done.code == 1
    assert "1 of" in done.out
    assert "elements differ" in done.out
    assert f"module by module: lorabridge verify {tmp_path / 'one'} {merged} --base {llama}" in done.out


def test_the_way_back_leads_over_several_files(invoke: Invoke, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora")
    steps = (("a.ckpt", "--to", "mindpet", "--family", "llama"), ("b.ckpt", "--crc"), ("c.ckpt", "--to", "loralib-ms"),
             ("d.ckpt",))  # fmt: skip
    at = lora
    for name, *options in steps:
        assert invoke("convert", at, tmp_path / name, *options, "-q").code == 0
        at = tmp_path / name
    done = invoke("convert", at, tmp_path / "back")
    assert done.code == 0
    assert "restored bit for bit" in done.err
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        again, first = ((folder / name).read_bytes() for folder in (tmp_path / "back", lora))
        assert again == first if name.endswith("safetensors") else json.loads(again) == json.loads(first)
    assert invoke("convert", at, tmp_path / "a2.ckpt", "--to", "mindpet", "-q").code == 0
    assert (tmp_path / "a2.ckpt").read_bytes() == (tmp_path / "a.ckpt").read_bytes()
    done = invoke("convert", tmp_path / "a2.ckpt", tmp_path / "back2")
    assert "restored bit for bit" in done.err


def test_a_config_disables_the_way_back_only_where_it_says_otherwise(invoke: Invoke, tmp_path: Path) -> None:
    lora, out = adapter(tmp_path / "lora"), tmp_path / "out.ckpt"
    assert invoke("convert", lora, out, "--to", "mindpet", "--family", "llama", "-q").code == 0
    config = lora / "adapter_config.json"
    done = invoke("convert", out, tmp_path / "one", "--config", config, "--alpha", "4")
    assert "restored bit for bit" in done.err
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    done = invoke("convert", out, tmp_path / "two", "--config", config)
    assert done.code == 0
    assert "not restored from the manifest: --config and the manifest differ in lora_alpha" in done.err
    done = invoke("convert", out, tmp_path / "three", "--layout", "qkv_concat=grouped")
    assert done.code == 2
    assert "--layout contradicts the manifest" in done.err


def test_a_models_config_of_other_sizes_contradicts(invoke: Invoke, llama: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "out.ckpt", tmp_path / "other.json"
    assert invoke("convert", llama, out, "--family", "llama", "-q").code == 0
    done = invoke("convert", out, tmp_path / "one", "--config", llama / "config.json")
    assert "restored bit for bit" in done.err
    config.write_text(json.dumps({**CONFIG, "num_attention_heads": 4, "hidden_size": 16}))
    done = invoke("convert", out, tmp_path / "two", "--config", config)
    assert done.code == 4
    assert "--config and the manifest differ in" in done.err


def test_every_layout_is_asked_for_at_once(invoke: Invoke, llama: Path, tmp_path: Path) -> None:
    done = invoke("convert", llama, tmp_path / "x.ckpt", "--family", "telechat3_mcore")
    assert done.code == 2
    assert "--layout fc1=interleaved: training" in done.err
    assert "--layout qkv=contiguous: inference" in done.err
    assert "hint: add, with one value of each: --layout fc1=interleaved|contiguous --layout qkv=" in done.err


def test_a_lone_file_that_is_restored_keeps_its_config(invoke: Invoke, tmp_path: Path) -> None:
    lora, out = adapter(tmp_path / "lora"), tmp_path / "out.ckpt"
    assert invoke("convert", lora, out, "--family", "llama", "-q").code == 0
    lone = tmp_path / "lone.safetensors"
    done = invoke("convert", out, lone)
    assert "restored bit for bit" in done.err
    assert lone.read_bytes() == (lora / "adapter_model.safetensors").read_bytes()
    assert invoke("convert", lone, tmp_path / "again.ckpt", "--to", "mindpet", "-q").code == 0
    assert invoke("verify", lora, tmp_path / "again.ckpt", "--depth", "tensors").code == 0


def test_names_of_another_project_in_the_same_framework(invoke: Invoke, llama: Path, tmp_path: Path) -> None:
    lora, out = adapter(tmp_path / "lora"), tmp_path / "a.gguf"
    sizes = ("--family", "llama_gguf", "--config", llama / "config.json")
    assert invoke("convert", lora, out, "--to", "gguf", *sizes, "-q").code == 0
    assert invoke("resize", out, tmp_path / "small.gguf", "--rank", "1", "-q").code == 0
    done = invoke("combine", lora, out, tmp_path / "both.gguf", "--to", "gguf", *sizes, "-q")
    assert (done.code, done.err) == (0, "")
    assert invoke("diff", lora, out).code == 0
    assert invoke("merge", llama, out, tmp_path / "one", "-q").code == 0
    assert invoke("merge", llama, lora, tmp_path / "two", "-q").code == 0
    assert invoke("diff", tmp_path / "one", tmp_path / "two").code == 0
    assert "llama_gguf" not in invoke("inspect", llama).out
    assert "llama_gguf" in invoke("inspect", out).out
    (tmp_path / "a.gguf.lorabridge.json").unlink()
    done = invoke("verify", lora, out)
    assert done.code == 2
    assert "several tables lead" in done.err
    assert invoke("verify", lora, out, *sizes).code == 0


def test_a_recorded_weight_counts_when_the_adapter_is_named(invoke: Invoke, llama: Path, tmp_path: Path) -> None:
    lora, merged = adapter(tmp_path / "lora"), tmp_path / "merged"
    assert invoke("merge", llama, lora, merged, "--weights", "0.5", "-q").code == 0
    done = invoke("verify", lora, merged, "--base", llama, "--depth", "tensors")
    assert done.code == 0
    assert "the deltas count 0.5 times, as DST's manifest says" in done.out
    (merged / "lorabridge.json").unlink()
    assert invoke("verify", lora, merged, "--base", llama, "--depth", "tensors").code == 1
