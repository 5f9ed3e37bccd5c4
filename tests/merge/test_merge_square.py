"""The square on files, bit for bit: converting a merged model gives what merging the converted files gives.

For every kind of adapter, with the fused layouts of MindFormers' Llama, and for square weights stored [in, out].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.convert import convert
from lorabridge.actions.merge import MergeOptions, merge
from lorabridge.actions.undo import UndoWriter
from lorabridge.actions.unmerge import unmerge
from lorabridge.formats import open_source

HIDDEN, INNER, HEADS, KV, VOCAB = 16, 24, 4, 2, 30
HEAD = HIDDEN // HEADS
LAYOUTS = ("off", "contiguous", "grouped")
LINEAR = {
    "self_attn.q_proj": (HEADS * HEAD, HIDDEN), "self_attn.k_proj": (KV * HEAD, HIDDEN),
    "self_attn.v_proj": (KV * HEAD, HIDDEN), "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_attention_heads": HEADS, "num_key_value_heads": KV, "num_hidden_layers": 2, "vocab_size": VOCAB,
    "tie_word_embeddings": False, "attention_bias": True,
}  # fmt: skip
KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "some of a fused weight": {"targets": ["q_proj", "up_proj"]},
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"q_proj": 3, "v_proj": 3, "k_proj": 3}},
    "alpha pattern": {"alpha_pattern": {"layers.1.*": 5}, "targets": ["o_proj", "down_proj"]},
    "dora": {"use_dora": True},
    "bias": {"bias": "lora_only", "targets": [*ATTENTION]},
    "lora bias": {"lora_bias": True, "targets": [*ATTENTION]},
    "saved": {"modules_to_save": ["norm", "lm_head"]},
    "embedding": {"targets": ["embed_tokens", "lm_head"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [4, 0, 29]}},
    "replicated": {"layer_replication": [[0, 2], [1, 2]], "count": 3},
}  # fmt: skip
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def llama(folder: Path, dtype: torch.dtype) -> Path:
    torch.manual_seed(0)
    tensors = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,),
               "lm_head.weight": (VOCAB, HIDDEN)}  # fmt: skip
    for i in range(2):
        tensors |= {f"model.layers.{i}.{n}.weight": (HIDDEN,) for n in ("input_layernorm", "post_attention_layernorm")}
        for name, shape in LINEAR.items():
            tensors[f"model.layers.{i}.{name}.weight"] = shape
            if name.rpartition(".")[2] in ATTENTION:
                tensors[f"model.layers.{i}.{name}.bias"] = shape[:1]
    return written(folder, "model.safetensors", "config.json", CONFIG,
                   {name: torch.randn(shape).to(dtype) for name, shape in tensors.items()})  # fmt: skip


def written(
    folder: Path, file: str, config_file: str, config: Mapping[str, object], tensors: Mapping[str, torch.Tensor]
) -> Path:
    folder.mkdir()
    save_file(dict(tensors), folder / file, metadata={"format": "pt"})
    (folder / config_file).write_text(json.dumps(config))
    return folder


def adapter(folder: Path, base: Path, kind: str) -> Path:
    """Write a peft adapter of one kind, spelled as peft 0.21 spells it."""
    said = dict(KINDS[kind])
    targets, count = said.pop("targets", [name.rpartition(".")[2] for name in LINEAR]), said.pop("count", 2)
    torch.manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    names = {f"layers.{i}.{name}": shape for i in range(count) for name, shape in LINEAR.items()}  # type: ignore[arg-type]
    for path, (out, inner) in {**names, "embed_tokens": (HIDDEN, VOCAB), "lm_head": (VOCAB, HIDDEN)}.items():
        leaf = path.rpartition(".")[2]
        if leaf not in targets:  # type: ignore[operator]
            continue
        stem = f"base_model.model.{'' if leaf == 'lm_head' else 'model.'}{path}"
        rank = said.get("rank_pattern", {}).get(leaf, 2)  # type: ignore[attr-defined]
        a, b = torch.randn(rank, inner), torch.randn(out, rank) * 0.2
        if leaf == "embed_tokens":
            tensors |= {f"{stem}.lora_embedding_A": a, f"{stem}.lora_embedding_B": b}
            continue
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        if said.get("use_dora"):
            tensors[f"{stem}.lora_magnitude_vector"] = torch.rand(out) + 1
        if said.get("lora_bias"):
            tensors[f"{stem}.lora_B.bias"] = torch.randn(out)
        if said.get("bias") and leaf in ATTENTION:
            tensors[f"{stem}.bias"] = torch.randn(out)
    if kind == "saved":
        tensors |= {"base_model.model.model.norm.weight": torch.randn(HIDDEN),
                    "base_model.model.lm_head.weight": torch.randn(VOCAB, HIDDEN)}  # fmt: skip
    if kind == "tokens":
        tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = torch.randn(3, HIDDEN)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": targets, **said}
    return written(folder, "adapter_model.safetensors", "adapter_config.json", config, tensors)


def tensors(path: Path) -> dict[str, tuple[object, bytes]]:
    source = open_source(path)
    found = {name: (spec, source.read(name).tobytes()) for name, spec in source.specs.items()}
    source.close()
    return found


CONVERTIBLE = [kind for kind in KINDS if kind != "replicated"]
"""What .ckpt adapters can say; a layout of layers is not among it."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_square_closes_for_every_kind_and_layout(tmp_path: Path, kind: str, layout: str) -> None:
    dtype = list(TYPES)[(list(KINDS).index(kind) + LAYOUTS.index(layout)) % 3]
    base = llama(tmp_path / "base", TYPES[dtype])
    given = adapter(tmp_path / "adapter", base, kind)
    config, chosen = base / "config.json", {"qkv_concat": layout}
    there = ConvertOptions(family="llama", layout=chosen, config=config)
    across = MergeOptions(family="llama", layout=chosen)
    merge(base, [given], tmp_path / "merged")
    convert(tmp_path / "merged", tmp_path / "way1.ckpt",
            ConvertOptions(family="llama", layout=chosen, config=tmp_path / "merged" / "config.json"))  # fmt: skip
    merge(base, [given], tmp_path / "way2.ckpt", across)
    ways = [tensors(tmp_path / "way1.ckpt"), tensors(tmp_path / "way2.ckpt")]
    if kind in CONVERTIBLE:
        convert(base, tmp_path / "base.ckpt", there)
        convert(given, tmp_path / "adapter.ckpt", there)
        merge(tmp_path / "base.ckpt", [tmp_path / "adapter.ckpt"], tmp_path / "way3.ckpt")
        merge(tmp_path / "base.ckpt", [given], tmp_path / "way4.ckpt", MergeOptions(
            family="llama", layout=chosen, config=config))  # fmt: skip
        merge(base, [tmp_path / "adapter.ckpt"], tmp_path / "way5.ckpt", across)
        ways += [tensors(tmp_path / f"way{i}.ckpt") for i in (3, 4, 5)]
    for i, way in enumerate(ways[1:], 2):
        assert way == ways[0], f"way {i}"


@pytest.mark.parametrize("kind", ["plain", "dora", "alpha pattern", "tokens", "bias", "embedding"])
def test_a_merge_into_fused_weights_is_undone(tmp_path: Path, kind: str) -> None:
    base = llama(tmp_path / "base", torch.bfloat16)
    given = adapter(tmp_path / "adapter", base, kind)
    config = base / "config.json"
    options = MergeOptions(family="llama", layout={"qkv_concat": "grouped"}, config=config)
    there = ConvertOptions(family="llama", layout=options.layout, config=config)
    convert(base, tmp_path / "base.ckpt", there)
    undo = UndoWriter(tmp_path / "u", options)
    merge(tmp_path / "base.ckpt", [given], tmp_path / "merged.ckpt", options, watch=undo)
    unmerge(tmp_path / "merged.ckpt", [given], tmp_path / "back.ckpt", options, undo=tmp_path / "u")
    assert tensors(tmp_path / "back.ckpt") == tensors(tmp_path / "base.ckpt")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_square_weights_are_merged_as_they_are_stored(tmp_path: Path, dtype: str, turned: bool, dora: bool) -> None:
    """A square shape does not show whether a weight is stored [in, out]; the adapter, or the others, say it."""
    torch.manual_seed(4)
    kind, size = TYPES[dtype], 24
    weight = torch.randn(size, size).to(kind)
    a, b, magnitude = torch.randn(3, size), torch.randn(size, 3) * 0.1, torch.rand(size) + 1
    factors = {"base_model.model.net.c.lora_A.weight": a, "base_model.model.net.c.lora_B.weight": b}
    if dora:
        factors["base_model.model.net.c.lora_magnitude_vector"] = magnitude
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 4, "target_modules": ["c"], "fan_in_fan_out": turned,
              "use_dora": dora}  # fmt: skip
    given = written(tmp_path / "adapter", "adapter_model.safetensors", "adapter_config.json", config, factors)
    save_file({"net.c.weight": weight}, tmp_path / "base.safetensors", metadata={"format": "pt"})
    merge(tmp_path / "base.safetensors", [given], tmp_path / "merged.safetensors")
    delta = (4 / 3) * (b.double() @ a.double())
    total = (weight.double().T if turned else weight.double()) + delta
    if dora:
        total = total * (magnitude.double() / total.norm(dim=1))[:, None]
    expected = total.T if turned else total
    source = open_source(tmp_path / "merged.safetensors")
    ours = torch.from_numpy(source.read("net.c.weight").view(f"i{kind.itemsize}").copy()).view(kind)
    source.close()
    places = {"float32": 24, "bfloat16": 8, "float16": 11}[dtype]
    assert ((ours.double() - expected).abs() <= expected.abs() * 2.0**-places * 1.001).all()
