"""The tables of diffusion pipelines: names and shapes of the real networks, and the way there and back."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from lorabridge.axes import Expr, Join, Read, Slice
from lorabridge.dialects.adapter import Adapter, Extra, LoraModule, Scaling, Term
from lorabridge.dtypes import BY_NAME
from lorabridge.families import tables

KNOWN = json.loads(gzip.decompress((Path(__file__).parent / "diffusion_names.json.gz").read_bytes()))
UNETS = ["sd15", "sd21", "sdxl"]
TRANSFORMERS = ["sd3", "sd35_medium", "sd35_large", "flux", "hunyuan_video", "wan"]
SIZES = {"wan": {"layers": 2, "hidden": 24, "inner": 40, "text": 16, "freq": 8, "time": 144}}
FLOAT = BY_NAME["float16"]
ANY_ROWS = 16


def known_names(family: str, side: str, **layout: str) -> dict[str, tuple[int, ...]]:
    """Return names and shapes, the original code's unless said otherwise; sizes that a table leaves open are 16."""
    table = tables.load_family(family)
    if family in UNETS:
        layout = {"names": "original", **layout}
    names = tables.names(table, SIZES.get(family, {}), side, layout=layout, optional=True)
    return {name: tuple(ANY_ROWS if n < 0 else n for n in shape) for name, shape in names.items()}


def model(names: dict[str, tuple[int, ...]]) -> Adapter:
    """Make a whole model of reads."""
    extras = []
    for name, shape in names.items():
        path, _, parameter = name.rpartition(".")
        extras.append(Extra(path, parameter, Read(name, FLOAT, shape), "base"))
    return Adapter((), tuple(extras))


def runs(expr: Expr) -> list[list[object]]:
    """Return which rows of which tensors an expression consists of, as the fixture has them."""
    if isinstance(expr, Read):
        return [[expr.name, 0, expr.shape[0] if expr.shape else 1]]
    if isinstance(expr, Slice):
        assert expr.axis == 0
        ((name, first, _),) = runs(expr.x)
        return [[name, first + expr.start, first + expr.stop]]
    assert isinstance(expr, Join)
    assert expr.axis == 0
    return [run for part in expr.parts for run in runs(part)]


@pytest.mark.parametrize("family", [*UNETS, *TRANSFORMERS])
def test_a_network_s_names_and_shapes_are_those_of_diffusers(family: str) -> None:
    real = {name: tuple(shape) for name, shape in KNOWN[family]["network"].items()}
    table, sizes = tables.load_family(family), SIZES.get(family, {})
    spelled = {"names": "original"} if family in UNETS else {}
    found = tables.names(table, sizes, "hf", layout={"hf_prefix": "", **spelled}, optional=True)
    assert {n: tuple(r if k < 0 else k for k, r in zip(s, real[n], strict=True)) for n, s in found.items()} == real


@pytest.mark.parametrize("family", [*UNETS, *TRANSFORMERS])
def test_every_row_comes_from_where_diffusers_takes_it(family: str) -> None:
    names = known_names(family, "ms")
    made = tables.map_adapter(tables.load_family(family), model(names), to="hf", sizes=SIZES.get(family, {}),
                               layout={"hf_prefix": ""})  # fmt: skip
    found = {extra.name: runs(extra.value) for extra in made.extras}
    judged = KNOWN[family]["original"]
    assert set(found) == set(judged)
    for name, rows in found.items():
        whole = len(rows) == len(judged[name]) == 1 and rows[0][1:] == [0, names[str(rows[0][0])][0]]
        assert rows == judged[name] or (whole and rows[0][0] == judged[name][0][0]), name


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("family", [*UNETS, *TRANSFORMERS])
def test_a_whole_network_goes_there_and_back(family: str, bare: bool) -> None:
    table = tables.load_family(family)
    prefix = "" if bare else table.hf_prefix.text
    whole = model(known_names(family, "hf", hf_prefix=prefix))
    for names in ["mindone", "original"] if family in UNETS else [""]:
        spelled = {"names": names} if names else {}
        there = tables.map_adapter(table, whole, to="ms", sizes=SIZES.get(family, {}), layout=spelled)
        assert {e.name for e in there.extras} == set(known_names(family, "ms", **spelled))
        back = tables.map_adapter(table, there, to="hf", sizes=SIZES.get(family, {}), layout={"hf_prefix": prefix})
        assert {e.name: e.value for e in back.extras} == {e.name: e.value for e in whole.extras}
    shapes = {extra.name: extra.value.shape for extra in whole.extras}
    assert not tables.check_complete(table, shapes, side="hf", sizes=SIZES.get(family, {})).problems


@pytest.mark.parametrize("family", [*UNETS, *TRANSFORMERS])
def test_every_module_goes_there_and_back(family: str) -> None:
    table = tables.load_family(family)
    weights = known_names(family, "hf")
    shapes = {n.removesuffix(".weight"): s for n, s in weights.items() if n.endswith(".weight") and len(s) > 1}
    modules = []
    for path, (out, inner, *kernel) in shapes.items():
        a = Read(f"{path}.a", FLOAT, (4, inner, *kernel))
        b = Read(f"{path}.b", FLOAT, (out, 4, *(1,) * len(kernel)))
        kind = f"conv{len(kernel)}d" if kernel else "linear"
        term = Term(a, b, 0, out)
        modules.append(LoraModule(path, kind, out, (term,), Scaling(4, 4), kernel_size=tuple(kernel)))
    there = tables.map_adapter(table, Adapter(tuple(modules)), to="ms", sizes=SIZES.get(family, {}))
    back = tables.map_adapter(table, there, to="hf", sizes=SIZES.get(family, {}))
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


def test_t5_s_names_and_shapes_are_those_of_transformers() -> None:
    import transformers

    config = transformers.T5Config(
        d_model=8, d_kv=3, d_ff=12, num_layers=2, num_heads=2, vocab_size=11, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        network = transformers.T5EncoderModel(config)
    table = tables.load_family("t5_encoder")
    sizes = tables.sizes_from_config(table, json.loads(config.to_json_string(use_diff=False)))
    names = tables.names(table, sizes, "hf")
    real = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    real.pop("encoder.embed_tokens.weight", None)
    assert names == real
