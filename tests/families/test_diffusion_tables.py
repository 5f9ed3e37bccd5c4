"""The tables of diffusion pipelines: names and shapes of the real networks, and the way there and back."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from lorabridge.axes import Read
from lorabridge.dialects.adapter import Adapter, Extra, LoraModule, Scaling, Term
from lorabridge.dtypes import BY_NAME
from lorabridge.families import tables

KNOWN = json.loads(gzip.decompress((Path(__file__).parent / "diffusion_names.json.gz").read_bytes()))
UNETS = ["sd15", "sd21", "sdxl"]
FLOAT = BY_NAME["float16"]


@pytest.mark.parametrize("family", UNETS)
def test_a_u_net_s_names_and_shapes_are_those_of_diffusers(family: str) -> None:
    names = tables.names(tables.load_family(family), {}, "hf", layout={"hf_prefix": ""})
    assert {name: list(shape) for name, shape in names.items()} == KNOWN[family]["network"]


@pytest.mark.parametrize("family", UNETS)
def test_every_original_name_is_what_diffusers_takes_it_for(family: str) -> None:
    table = tables.load_family(family)
    hf, ms = (tables.names(table, {}, side, layout={"hf_prefix": ""}) for side in ("hf", "ms"))
    assert dict(zip(hf, ms, strict=True)) == KNOWN[family]["original"]


@pytest.mark.parametrize("prefix", ["", "unet."])
@pytest.mark.parametrize("family", UNETS)
def test_a_whole_u_net_goes_there_and_back(family: str, prefix: str) -> None:
    table = tables.load_family(family)
    names = tables.names(table, {}, "hf", layout={"hf_prefix": prefix})
    extras = []
    for name, shape in names.items():
        path, _, parameter = name.rpartition(".")
        extras.append(Extra(path, parameter, Read(name, FLOAT, shape), "base"))
    there = tables.map_adapter(table, Adapter((), tuple(extras)), to="ms", sizes={})
    assert all(extra.name.startswith("model.diffusion_model.") for extra in there.extras)
    assert any(extra.parameter == "gamma" for extra in there.extras)
    back = tables.map_adapter(table, there, to="hf", sizes={}, layout={"hf_prefix": prefix})
    assert {extra.name: extra.value for extra in back.extras} == {extra.name: extra.value for extra in extras}
    assert not tables.check_complete(table, dict(names), side="hf", sizes={}).problems


@pytest.mark.parametrize("family", UNETS)
def test_every_linear_module_goes_there_and_back(family: str) -> None:
    table = tables.load_family(family)
    shapes = {n.removesuffix(".weight"): s for n, s in KNOWN[family]["network"].items() if len(s) == 2}
    modules = []
    for path, (out, inner) in shapes.items():
        term = Term(Read(f"{path}.a", FLOAT, (4, inner)), Read(f"{path}.b", FLOAT, (out, 4)), 0, out)
        modules.append(LoraModule(f"unet.{path}", "linear", out, (term,), Scaling(4, 4)))
    there = tables.map_adapter(table, Adapter(tuple(modules)), to="ms", sizes={})
    back = tables.map_adapter(table, there, to="hf", sizes={})
    assert {m.path: m.terms for m in back.modules} == {m.path: m.terms for m in modules}


@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_clip_s_names_and_shapes_are_those_of_transformers(name: str) -> None:
    import transformers

    config = transformers.CLIPTextConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, vocab_size=11,
        max_position_embeddings=5, projection_dim=7,
    )  # fmt: skip
    with torch.device("meta"):
        network = getattr(transformers, name)(config)
    table = tables.load_family("clip_text")
    sizes = tables.sizes_from_config(table, json.loads(config.to_json_string(use_diff=False)))
    names = tables.names(table, sizes, "hf", architecture=name)
    real = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    plain = {
        key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}": s for key, s in real.items()
    }
    assert names == plain
    ms = tables.names(table, sizes, "ms", architecture=name)
    renamed = {n.rpartition(".")[2] for n in ms} - {n.rpartition(".")[2] for n in names}
    assert renamed == {"gamma", "beta", "embedding_table"}
