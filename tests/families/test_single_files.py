"""Autoencoders and text encoders of diffusion pipelines in single files and in MindOne's own checkpoints."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from lorabridge import axes, inversion
from lorabridge.actions.convert import ConvertOptions, convert
from lorabridge.dialects.adapter import Adapter, Extra
from lorabridge.dtypes import BY_NAME
from lorabridge.errors import MappingError, UsageError
from lorabridge.families import pipelines, tables

from .conftest import Store, model, reread
from .make_mindone_lists import PARTS, digest
from .square import KINDS, square

HERE = Path(__file__).parent
KNOWN = json.loads(gzip.decompress((HERE / "diffusion_names.json.gz").read_bytes()))
LISTS = json.loads((HERE / "mindone_lists.json").read_text())
MINDONE_05 = json.loads((HERE / "mindone_diffusers.json").read_text())
FLOAT = BY_NAME["float16"]
VAE = {"attention": "to_q"}
TEXT = {
    "v1": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "projection_dim": 768},
    "v2": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "projection_dim": 512},
}
SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11,
         "max_position_embeddings": 5, "projection_dim": 7}  # fmt: skip
ENCODERS = [
    ("sd_openclip", "mindone", "conditioner.embedders.1.model."),
    ("sd_openclip", "original", "conditioner.embedders.1.model."),
    ("sd_openclip", "original", "cond_stage_model.model."),
    ("sd_clip", "mindone_v2", "cond_stage_model.transformer."),
    ("sd_clip", "mindone_xl", "conditioner.embedders.0.transformer."),
    ("sd_clip", "original", "cond_stage_model.transformer."),
    ("sd_clip", "original", "text_encoders.clip_l.transformer."),
]


def text_sizes(family: str, fields: dict[str, int]) -> dict[str, int]:
    config = {"vocab_size": 49408, "max_position_embeddings": 77, **fields}
    return tables.sizes_from_config(tables.load_family(family), config)


def lines(names: dict[str, tuple[int, ...]], known: dict[str, tuple[int, ...]]) -> list[str]:
    """Return ``name shape`` of every parameter; what the table leaves open is taken from the real network."""
    shapes = {n: tuple(known[n][k] if size < 0 else size for k, size in enumerate(s)) for n, s in names.items()}
    return [f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items()]


def vae_model() -> Adapter:
    shapes = {name: tuple(shape) for name, shape in KNOWN["sd_vae"]["network"].items()}
    return Adapter((), tuple(Extra(*n.rpartition(".")[::2], axes.Read(n, FLOAT, s), "base") for n, s in shapes.items()))


def vae(names: str, whole: Adapter | None = None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the autoencoder's names in a single file: of which tensor of diffusers each is made, and its shape."""
    table = tables.load_family("sd_vae")
    made = tables.map_adapter(table, whole or vae_model(), to="ms", layout={"names": names})
    return {extra.name: (axes.reads(extra.value)[0], extra.value.shape) for extra in made.extras}


@pytest.mark.parametrize(("family", "key"), [("sd15", "unet_v1"), ("sd21", "unet_v2")])
@pytest.mark.parametrize("names", ["mindone", "original"])
def test_the_u_nets_have_the_names_and_shapes_of_mindone_s_lists(family: str, key: str, names: str) -> None:
    found = tables.names(tables.load_family(family), {}, "ms", layout={"names": names}, optional=True)
    assert len(found) == LISTS[key]["count"]
    assert digest(lines(found, {})) == LISTS[key][names]


@pytest.mark.parametrize(("family", "key"), [("sd15", "unet_v1"), ("sd21", "unet_v2")])
def test_the_u_nets_names_correspond_as_mindone_pairs_them(family: str, key: str) -> None:
    table = tables.load_family(family)
    hf = tables.names(table, {}, "hf", layout={"names": "original"}, optional=True)
    whole = [Extra(*n.rpartition(".")[::2], axes.Read(n, FLOAT, s), "base") for n, s in hf.items()]
    both = []
    for names in ("original", "mindone"):
        made = tables.map_adapter(table, Adapter((), tuple(whole)), to="ms", layout={"names": names})
        both.append({axes.reads(extra.value)[0]: extra.name for extra in made.extras})
    assert digest(f"{both[0][name]} {both[1][name]}" for name in hf) == LISTS[key]["pairs"]


@pytest.mark.parametrize("key", ["vae_v1", "vae_v2"])
def test_the_autoencoder_is_that_of_mindone_s_lists(key: str) -> None:
    original, mindone = vae("original"), vae("mindone")
    for names, made in (("original", original), ("mindone", mindone)):
        assert digest(f"{n} {'x'.join(map(str, s))}" for n, (_, s) in made.items()) == LISTS[key][names]
    paired = {source: name for name, (source, _) in mindone.items()}
    assert digest(f"{name} {paired[source]}" for name, (source, _) in original.items()) == LISTS[key]["pairs"]


def test_every_tensor_of_the_autoencoder_comes_from_where_diffusers_takes_it() -> None:
    made = {source: (name, shape) for name, (source, shape) in vae("original").items()}
    assert set(made) == set(KNOWN["sd_vae"]["original"])
    for source, rows in KNOWN["sd_vae"]["original"].items():
        ((name, first, _),) = rows
        assert (name, first) == (made[source][0], 0)


@pytest.mark.parametrize("names", ["mindone", "original"])
@pytest.mark.parametrize("prefix", ["first_stage_model.", "", "vae."])
def test_the_autoencoder_goes_there_and_back(names: str, prefix: str) -> None:
    table, whole = tables.load_family("sd_vae"), vae_model()
    there = tables.map_adapter(table, whole, to="ms", layout={"names": names, "ms_prefix": prefix})
    assert all(extra.name.startswith(prefix) for extra in there.extras)
    written, said = reread(there)
    back = tables.map_adapter(table, written, to="hf", layout=VAE)
    assert len(back.extras) == len(whole.extras)
    shapes = {extra.name: extra.value.shape for extra in whole.extras}
    for extra in back.extras:
        assert axes.substitute(extra.value, said) == axes.Read(extra.name, FLOAT, shapes[extra.name])
    older = {e.name for e in tables.map_adapter(table, written, to="hf", layout={"attention": "query"}).extras}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in older


def test_autoencoders_without_quantisation_are_complete() -> None:
    """Those of SD 3 and FLUX.1 have 16 channels and neither convolution."""
    shapes = {n: tuple(s) for n, s in KNOWN["sd_vae"]["network"].items() if "quant_conv" not in n}
    shapes |= {"encoder.conv_out.weight": (32, 512, 3, 3), "encoder.conv_out.bias": (32,)}
    shapes |= {"decoder.conv_in.weight": (512, 16, 3, 3)}
    assert not tables.check_complete(tables.load_family("sd_vae"), shapes, side="hf").problems
    del shapes["decoder.conv_in.bias"]
    missing = tables.check_complete(tables.load_family("sd_vae"), shapes, side="hf").missing
    assert missing == ("decoder.conv_in.bias",)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_mindone_s_text_encoders_have_the_names_and_shapes_of_its_lists(version: str) -> None:
    sizes = text_sizes("sd_clip", TEXT[version])
    found = tables.names(tables.load_family("sd_clip"), sizes, "ms", layout={"names": "mindone_v2"})
    assert all(name.startswith(PARTS["text"]) for name in found)
    assert digest(lines(found, {})) == LISTS[f"text_{version}"]["mindone"]
    family = {"v1": "sd_clip", "v2": "sd_openclip"}[version]
    prefix = {"v1": "cond_stage_model.transformer.", "v2": "cond_stage_model.model."}[version]
    layout = {"names": "original", "ms_prefix": prefix}
    theirs = tables.names(tables.load_family(family), text_sizes(family, TEXT[version]), "ms", layout=layout)
    assert digest(lines(theirs, {})) == LISTS[f"text_{version}"]["original"]


def test_the_second_encoder_of_xl_comes_from_where_diffusers_takes_it() -> None:
    """The judge's rows of a turned projection are its columns."""
    table = tables.load_family("sd_openclip")
    network = KNOWN["sd_openclip"]["network"]
    config = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1280}
    sizes = text_sizes("sd_openclip", config)
    known = tables.names(table, sizes, "hf", layout={"names": "original"}, architecture="CLIPTextModelWithProjection")
    plain = {
        n if n.startswith(("text_model.", "text_projection")) else f"text_model.{n}": s for n, s in network.items()
    }
    assert {name: list(shape) for name, shape in known.items()} == plain
    ms = tables.names(table, sizes, "ms", layout={"names": "original"}, architecture="CLIPTextModelWithProjection")
    given = [Extra(*n.rpartition(".")[::2], axes.Read(n, FLOAT, s), "base") for n, s in ms.items()]
    made = tables.map_adapter(table, Adapter((), tuple(given)), to="hf", sizes=sizes)
    judged = KNOWN["sd_openclip"]["original"]
    assert {extra.name for extra in made.extras} == set(judged)
    for extra in made.extras:
        ((name, first, last),) = judged[extra.name]
        ranges = axes.reads(extra.value)
        assert ranges == (name,)
        if ".attn.in_proj" in name:
            assert isinstance(extra.value, axes.Slice)
            assert (extra.value.start, extra.value.stop) == (first, last)
        else:
            assert first == 0
    turned = next(extra.value for extra in made.extras if extra.name == "text_projection.weight")
    assert isinstance(turned, axes.Reorder)


@pytest.mark.parametrize(("family", "names", "prefix"), ENCODERS)
def test_a_text_encoder_goes_there_and_back_on_bits(store: Store, family: str, names: str, prefix: str) -> None:
    table, sizes = tables.load_family(family), text_sizes(family, SMALL)
    architecture = "" if names == "mindone_v2" else "CLIPTextModelWithProjection"
    shapes = tables.names(table, sizes, "hf", layout={"names": names}, architecture=architecture)
    if (family, names) == ("sd_clip", "mindone_xl"):
        shapes.pop("text_projection.weight", None)
    layout = {"names": names, "ms_prefix": prefix}
    there = tables.map_adapter(table, model(store, shapes), to="ms", sizes=sizes, layout=layout)
    assert {e.name for e in there.extras} <= set(
        tables.names(table, sizes, "ms", layout=layout, architecture=architecture)
    )
    assert all(extra.name.startswith(prefix) for extra in there.extras)
    written, said = reread(there)
    back = tables.map_adapter(table, written, to="hf", sizes=sizes)
    assert {extra.name for extra in back.extras} == set(shapes)
    for extra in back.extras:
        whole = axes.substitute(extra.value, said)
        assert (axes.evaluate(whole, store.bits.__getitem__, {}) == store.bits[extra.name]).all()
    assert inversion.invert(said).lost == ()


def test_q_k_and_v_are_one_above_the_other_and_the_projection_is_turned(store: Store) -> None:
    table, sizes = tables.load_family("sd_openclip"), text_sizes("sd_openclip", SMALL)
    shapes = tables.names(table, sizes, "hf", layout={"names": "original"}, architecture="CLIPTextModelWithProjection")
    there = tables.map_adapter(table, model(store, shapes), to="ms", sizes=sizes, layout={"names": "original"})
    made = {e.name: axes.evaluate(e.value, store.bits.__getitem__, {}) for e in there.extras}
    block = "text_model.encoder.layers.1.self_attn"
    for parameter in ("weight", "bias"):
        parts = [store.bits[f"{block}.{n}_proj.{parameter}"] for n in "qkv"]
        fused = made[f"conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_{parameter}"]
        assert (fused == np.concatenate(parts)).all()
    projection = made["conditioner.embedders.1.model.text_projection"]
    assert (projection == store.bits["text_projection.weight"].T).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "names"), sorted({(family, names) for family, names, _ in ENCODERS}))
def test_merging_and_converting_commute(store: Store, family: str, names: str, kind: str) -> None:
    table, sizes = tables.load_family(family), text_sizes(family, SMALL)
    shapes = tables.names(table, sizes, "hf", layout={"names": names})
    assert square(store, table, shapes, sizes=sizes, layout={"names": names}, kind=kind) >= 8


def test_what_a_text_encoder_does_not_need_is_left_out_with_a_reason(store: Store) -> None:
    given = model(store, {"cond_stage_model.model.logit_scale": (), "cond_stage_model.model.ln_final.weight": (8,)})
    made = tables.map_adapter(tables.load_family("sd_openclip"), given, to="hf")
    assert [extra.name for extra in made.extras] == ["text_model.final_layer_norm.weight"]
    assert made.left_out[0][0] == "cond_stage_model.model.logit_scale"


def of_xl(folder: Path) -> dict[str, np.ndarray]:
    """Write a small file with the second encoder of XL, and a tensor each of its U-Net and its autoencoder."""
    from safetensors.numpy import save_file

    table, sizes = tables.load_family("sd_openclip"), text_sizes("sd_openclip", SMALL | {"vocab_size": 11})
    layout = {"names": "original"}
    shapes = tables.names(table, sizes, "ms", layout=layout, architecture="CLIPTextModelWithProjection")
    values = {n: np.random.default_rng(k).normal(size=s).astype(np.float32) for k, (n, s) in enumerate(shapes.items())}
    values["conditioner.embedders.1.model.logit_scale"] = np.ones((), np.float32)
    others = {"model.diffusion_model.label_emb.0.0.bias": 1280, "first_stage_model.decoder.conv_out.bias": 3}
    values |= {name: np.ones(count, np.float32) for name, count in others.items()}
    save_file(values, folder / "xl.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"vocab_size": 11, "max_position_embeddings": 5, **SMALL}))
    return values


def test_a_network_of_a_single_file_becomes_one_of_transformers_and_goes_back(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    values = of_xl(tmp_path)
    one = {"family": "sd_openclip", "config": tmp_path / "config.json"}
    options = ConvertOptions(source_dialect="ms", target_dialect="hf", include=("conditioner.embedders.1.*",), **one)
    convert(tmp_path / "xl.safetensors", tmp_path / "encoder.safetensors", options)
    made = load_file(tmp_path / "encoder.safetensors")
    known = CLIPTextModelWithProjection(CLIPTextConfig(**SMALL)).state_dict()
    names = {n if n.startswith(("text_model.", "text_projection")) else f"text_model.{n}": n for n in known}
    assert {n: v.shape for n, v in made.items()} == {n: tuple(known[own].shape) for n, own in names.items()}
    back = ConvertOptions(target_dialect="ms", layout={"names": "original"}, **one)
    save_file(made, tmp_path / "theirs.safetensors", {"format": "pt"})  # as transformers would, without a manifest
    convert(tmp_path / "theirs.safetensors", tmp_path / "back.safetensors", back)
    again = load_file(tmp_path / "back.safetensors")
    assert set(again) == {n for n in values if n.startswith("conditioner.") and not n.endswith("logit_scale")}
    assert all((again[name] == values[name]).all() for name in again)


def test_a_single_file_of_several_networks_is_refused_with_the_way_to_convert_each(tmp_path: Path) -> None:
    of_xl(tmp_path)
    said = (
        "this file holds several networks: convert each with --from ms --to hf and "
        "--family sdxl --include 'model.diffusion_model.*'; --family sd_vae --include 'first_stage_model.*'; "
        "--family sd_openclip --include 'conditioner.embedders.1.*'"
    )
    with pytest.raises(MappingError, match="not a whole sdxl model") as caught:
        convert(tmp_path / "xl.safetensors", tmp_path / "out.safetensors",
                ConvertOptions(source_dialect="ms", target_dialect="hf", family="sdxl"))  # fmt: skip
    assert caught.value.hint == said
    with pytest.raises(UsageError, match="needs a family table") as asked:
        convert(tmp_path / "xl.safetensors", tmp_path / "out.ckpt", ConvertOptions())
    assert asked.value.hint == said


def test_the_networks_of_single_files_are_known_by_their_prefixes() -> None:
    flux = tables.names(tables.load_family("flux"), {}, "ms", layout={"ms_prefix": "model.diffusion_model."})
    names = [*flux, "vae.decoder.conv_in.bias", "text_encoders.clip_l.transformer.text_model.final_layer_norm.bias",
             "text_encoders.t5xxl.transformer.shared.weight"]  # fmt: skip
    assert pipelines.networks(names) == {
        "model.diffusion_model.": ("flux",), "vae.": ("sd_vae",), "text_encoders.clip_l.": ("sd_clip",),
        "text_encoders.t5xxl.": ("sd_t5",),
    }  # fmt: skip
    assert pipelines.advice(flux) == ""


def test_t5_of_a_single_file_has_transformers_names_below_a_prefix(store: Store) -> None:
    fields = {"d_model": 8, "d_ff": 12, "num_heads": 2, "d_kv": 3, "relative_attention_num_buckets": 4,
              "num_layers": 2, "vocab_size": 11}  # fmt: skip
    table = tables.load_family("sd_t5")
    sizes = tables.sizes_from_config(table, fields)
    shapes = tables.names(table, sizes, "hf")
    assert shapes == tables.names(tables.load_family("t5_encoder"), sizes, "hf")
    there = tables.map_adapter(table, model(store, shapes), to="ms", sizes=sizes)
    assert {e.name for e in there.extras} == {f"text_encoders.t5xxl.transformer.{name}" for name in shapes}
    written, said = reread(there)
    back = tables.map_adapter(table, written, to="hf", sizes=sizes)
    assert {e.name: axes.substitute(e.value, said) for e in back.extras} == {
        e.name: e.value for e in model(Store(), shapes).extras
    }


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "flux", "sd3", "sd35_medium", "sd35_large", "sd_vae"])
def test_mindone_s_own_networks_have_the_names_and_shapes_of_diffusers(family: str) -> None:
    network = {name: tuple(shape) for name, shape in KNOWN[family]["network"].items()}
    assert digest(lines(network, {})) == MINDONE_05[family]
