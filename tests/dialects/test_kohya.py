"""sd-scripts' files: names looked up, alpha per module, and the delta of sd-scripts' own formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorabridge import ConvertOptions, convert
from lorabridge.dialects import flattened, flattened_spelling, flattened_tables
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError, UsageError

JUDGED = json.loads((Path(__file__).parent / "diffusers_judged.json").read_text("utf-8"))
TO_Q = "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
Tensors = dict[str, torch.Tensor]


def lora(name: str, out: int, inner: int, rank: int, alpha: float | None, *kernel: int) -> Tensors:
    """Make one module as sd-scripts saves it, in float16."""
    g = torch.Generator().manual_seed(out + inner + rank)
    ones = (1,) * len(kernel)
    made = {
        f"{name}.lora_down.weight": torch.randn(rank, inner, *kernel, generator=g).half(),
        f"{name}.lora_up.weight": torch.randn(out, rank, *ones, generator=g).half(),
    }
    if alpha is not None:
        made[f"{name}.alpha"] = torch.tensor(alpha).half()
    return made


SD15 = {
    **lora("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", 320, 320, 8, 4.0),
    **lora("lora_unet_down_blocks_0_attentions_0_proj_in", 320, 320, 8, 4.0, 1, 1),
    **lora("lora_unet_down_blocks_0_resnets_0_conv1", 320, 320, 4, None, 3, 3),
    **lora("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, 768, 8, 3.0),
}
SDXL = {
    **lora("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", 640, 2048, 4, 1.0),
    **lora("lora_unet_middle_block_1_proj_in", 1280, 1280, 4, 1.0),
    **lora("lora_te1_text_model_encoder_layers_11_mlp_fc1", 3072, 768, 4, 1.0),
    **lora("lora_te2_text_model_encoder_layers_31_mlp_fc1", 5120, 1280, 4, 1.0),
}


def converted(
    tensors: Tensors, folder: Path, *facts: Fact, target: str = "peft", metadata: dict[str, str] | None = None
) -> tuple[dict[str, tuple[int, float]], Tensors]:
    """Convert a file and return (rank and scaling by path, tensors)."""
    save_file(tensors, folder / "in.safetensors", metadata)
    out = folder / "out.safetensors"
    done = convert(folder / "in.safetensors", out, ConvertOptions(target_dialect=target, facts=Facts(facts)))
    return {m.path: (m.rank, m.scaling) for m in done.modules}, load_file(out)


def test_alpha_is_the_module_s_own_and_a_missing_one_is_the_rank(tmp_path: Path) -> None:
    modules, tensors = converted(SD15, tmp_path)
    assert modules == {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (8, 0.5),
        "unet.down_blocks.0.attentions.0.proj_in": (8, 0.5),
        "unet.down_blocks.0.resnets.0.conv1": (4, 1.0),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (8, 0.375),
    }
    name = "base_model.model.unet.down_blocks.0.resnets.0.conv1"
    assert torch.equal(
        tensors[f"{name}.lora_A.weight"], SD15["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"]
    )


def test_an_alpha_of_zero_is_the_rank_and_said(tmp_path: Path) -> None:
    save_file(lora(f"lora_unet_{TO_Q}", 640, 640, 4, 0.0), tmp_path / "in.safetensors")
    done = convert(tmp_path / "in.safetensors", tmp_path / "out", ConvertOptions(target_dialect="peft"))
    assert [m.scaling for m in done.modules] == [1.0]
    assert any("an alpha of 0 means alpha = rank" in warning for warning in done.warnings)


def test_the_original_names_of_xl_become_diffusers(tmp_path: Path) -> None:
    modules, _ = converted(SDXL, tmp_path)
    assert set(modules) == {
        "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k",
        "unet.mid_block.attentions.0.proj_in",
        "text_encoder.text_model.encoder.layers.11.mlp.fc1",
        "text_encoder_2.text_model.encoder.layers.31.mlp.fc1",
    }


@pytest.mark.parametrize("tensors", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_the_way_over_diffusers_and_back_gives_the_same_names_and_factors(tensors: Tensors, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "in.safetensors")
    facts = Facts((Fact("*", "alpha_in", "config"),))
    convert(tmp_path / "in.safetensors", tmp_path / "d", ConvertOptions(target_dialect="diffusers", facts=facts))
    (tmp_path / "d" / "lorabridge.json").unlink()
    convert(tmp_path / "d", tmp_path / "back.safetensors", ConvertOptions(target_dialect="kohya"))
    back = load_file(tmp_path / "back.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(back[name].float(), tensor.float()), name
    assert set(back) - set(tensors) == {
        name.replace("lora_down.weight", "alpha")
        for name in tensors
        if name.endswith("down.weight") and name.replace("lora_down.weight", "alpha") not in tensors
    }


@pytest.mark.parametrize("tensors", [SD15, SDXL], ids=["sd15", "sdxl"])
def test_the_way_back_from_mindspore_restores_every_bit(tensors: Tensors, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "in.safetensors", {"ss_network_dim": "8", "ss_tag": "kept"})
    done = convert(tmp_path / "in.safetensors", tmp_path / "out.ckpt", ConvertOptions(target_dialect="mindone"))
    assert done.left_out == ()
    back = tmp_path / "back.safetensors"
    done = convert(tmp_path / "out.ckpt", back)
    assert "restored bit for bit from the manifest" in done.notes
    found = load_file(back)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert safe_open(back, "pt").metadata()["ss_tag"] == "kept"


def delta(tensors: Tensors, name: str) -> torch.Tensor:
    """Compute what sd-scripts adds to the weight (networks/lora.py, merge_to)."""
    down, up = tensors[f"{name}.lora_down.weight"].double(), tensors[f"{name}.lora_up.weight"].double()
    rank = down.shape[0]
    alpha = float(tensors.get(f"{name}.alpha", torch.tensor(rank))) or rank
    if down.dim() == 2:
        made = up @ down
    else:
        made = torch.nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
    return made * alpha / rank


@pytest.mark.parametrize("source", ["mixed_float16", "uniform_float16"])
def test_written_files_have_the_deltas_of_sd_scripts_formula(source: str, tmp_path: Path) -> None:
    from judge_diffusers import FOLDER, written

    file = FOLDER / f"kohya_{source}.safetensors"
    original, found = load_file(file), load_file(written(file, tmp_path)["kohya"])
    names = {name.partition(".")[0] for name in original}
    assert {name.partition(".")[0] for name in found} == names
    for name in names:
        torch.testing.assert_close(delta(found, name), delta(original, name), rtol=0, atol=0)
        assert found[f"{name}.alpha"].shape == ()


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_every_module_is_called_as_diffusers_own_converter_calls_it(family: str) -> None:
    judged = JUDGED["names"][family]
    assert len(judged) > 280
    places, pipelines = flattened.resolve(dict.fromkeys(judged), family, "")
    assert {name: place.path for name, place in places.items()} == judged
    assert pipelines == (family,)
    spelled = flattened_spelling.spell(dict.fromkeys(judged.values()), family)
    assert {path: name for name, path in judged.items()} == dict(spelled.names)


def test_metadata_says_what_sd_scripts_would(tmp_path: Path) -> None:
    converted(SDXL, tmp_path, target="kohya")
    said = safe_open(tmp_path / "out.safetensors", "pt").metadata()
    assert said["ss_network_module"] == "networks.lora"
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("4", "1.0")
    assert said["ss_base_model_version"] == "sdxl_base_v1-0"


def test_unknown_names_are_listed_and_the_base_is_asked_for(tmp_path: Path) -> None:
    tensors = {**SD15, **lora("lora_unet_strange_block_0_to_q", 4, 4, 2, 1.0)}
    with pytest.raises(MappingError, match="1 of 5 names not found among the modules of sd15") as caught:
        converted(tensors, tmp_path)
    assert caught.value.where[0] == "lora_unet_strange_block_0_to_q"
    assert "--names-of PATH" in caught.value.hint


def test_a_name_with_another_model_s_shape_is_told(tmp_path: Path) -> None:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    with pytest.raises(MappingError) as caught:
        converted(lora(name, 320, 999, 4, 1.0), tmp_path)
    assert "has another shape than 320 x 999" in caught.value.where[0]


def test_names_that_all_pipelines_read_alike_need_no_word() -> None:
    name = "lora_unet_output_blocks_3_1_transformer_blocks_0_attn1_to_q"
    places, pipelines = flattened.resolve({name: None}, None, "")
    assert places[name].path == "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert pipelines == ("sd15", "sd21", "sdxl")
    assert flattened.resolve({name: (640, 640)}, None, "")[1] == ("sdxl",)


def test_names_that_pipelines_read_differently_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = flattened_tables.Pipeline("other", (flattened_tables.Part("lora_unet_", "transformer", "sdxl"),), "hf", "")
    monkeypatch.setattr(flattened, "PIPELINES", (flattened_tables.pipeline_named("sdxl"), other))
    name = f"lora_unet_{TO_Q}"
    with pytest.raises(MappingError, match="1 name can stand for different modules") as caught:
        flattened.resolve({name: None}, None, "file")
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert caught.value.where == (f"{name}: unet.{path} (sdxl), transformer.{path} (other)", "in file")
    assert "--names-of: sdxl, other" in caught.value.hint


def test_two_names_for_one_module_are_refused(tmp_path: Path) -> None:
    one, two = f"lora_unet_{TO_Q}", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    with pytest.raises(MappingError, match="two names of the file mean one module"):
        converted({**lora(one, 640, 640, 4, 1.0), **lora(two, 640, 640, 4, 1.0)}, tmp_path)


def test_modules_that_two_pipelines_spell_differently_need_a_word(tmp_path: Path) -> None:
    tensors = lora(f"lora_unet_{TO_Q}", 640, 640, 4, 1.0)
    with pytest.raises(MappingError, match="can belong to sd15 or sd21 or sdxl") as caught:
        converted(tensors, tmp_path, target="kohya")
    assert caught.value.hint == "say which with --names-of"
    _, found = converted(tensors, tmp_path, Fact("*", "names_of", "sdxl"), target="kohya")
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.alpha" in found


def test_a_model_that_nobody_knows_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'sd99' is no model whose names are known"):
        converted(SD15, tmp_path, Fact("*", "names_of", "sd99"))


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "unet.", ""])
def test_a_base_of_its_own_decides_by_its_names(prefix: str, tmp_path: Path) -> None:
    base = {f"{prefix}down_blocks.0.odd_name_.to.q.weight": torch.zeros(6, 4)}
    save_file(base, tmp_path / "base.safetensors")
    modules, _ = converted(
        lora("lora_unet_down_blocks_0_odd_name__to_q", 6, 4, 2, 1.0), tmp_path,
        Fact("*", "names_of", str(tmp_path / "base.safetensors")),
    )  # fmt: skip
    assert modules == {"unet.down_blocks.0.odd_name_.to.q": (2, 0.5)}


def test_a_pipeline_s_folder_gives_the_names_of_all_its_parts(tmp_path: Path) -> None:
    for part, name in (("transformer", "blocks.0.a_b"), ("text_encoder_2", "encoder.block.1.q")):
        (tmp_path / "base" / part).mkdir(parents=True)
        save_file({f"{name}.weight": torch.zeros(4, 4)}, tmp_path / "base" / part / "model.safetensors")
    tensors = {**lora("lora_unet_blocks_0_a_b", 4, 4, 2, 1.0), **lora("lora_te3_encoder_block_1_q", 4, 4, 2, 1.0)}
    modules, _ = converted(tensors, tmp_path, Fact("*", "names_of", str(tmp_path / "base")))
    assert set(modules) == {"transformer.blocks.0.a_b", "text_encoder_2.encoder.block.1.q"}


def test_a_base_in_which_two_modules_flatten_alike_is_ambiguous(tmp_path: Path) -> None:
    save_file(
        {"unet.a_b.c.weight": torch.zeros(4, 4), "unet.a.b_c.weight": torch.zeros(4, 4)}, tmp_path / "b.safetensors"
    )
    with pytest.raises(MappingError, match="1 name can stand for several modules") as caught:
        converted(
            lora("lora_unet_a_b_c", 4, 4, 2, 1.0), tmp_path, Fact("*", "names_of", str(tmp_path / "b.safetensors"))
        )
    (place,) = caught.value.where
    assert {*place.removeprefix("lora_unet_a_b_c: ").split(" or ")} == {"unet.a_b.c", "unet.a.b_c"}


def test_what_sd_scripts_cannot_say_is_refused(tmp_path: Path) -> None:
    names = {"lora_A.weight": torch.zeros(2, 4), "lora_B.weight": torch.zeros(4, 2), "lora_B.bias": torch.zeros(4)}
    save_file({f"base_model.model.unet.a.{name}": t for name, t in names.items()}, tmp_path / "in.safetensors")
    facts = Facts((Fact("*", "alpha", 4),))
    with pytest.raises(MappingError, match="no bias on the B factor"):
        convert(
            tmp_path / "in.safetensors", tmp_path / "o.safetensors", ConvertOptions(target_dialect="kohya", facts=facts)
        )


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_flattening_a_module_of_a_known_pipeline_and_looking_it_up_gives_it_back(data: st.DataObject) -> None:
    family = data.draw(st.sampled_from(["sd15", "sdxl"]))
    paths = data.draw(st.lists(st.sampled_from(sorted(JUDGED["names"][family].values())), min_size=1, unique=True))
    spelled = flattened_spelling.spell(dict.fromkeys(paths), family).names
    places, _ = flattened.resolve(dict.fromkeys(spelled.values()), family, "")
    assert {place.path for place in places.values()} == set(paths)


FUSED = JUDGED["fused"]
FLUX = {
    **lora("lora_unet_double_blocks_0_img_attn_qkv", 9216, 3072, 2, 1.0),
    **lora("lora_unet_double_blocks_18_txt_mlp_0", 12288, 3072, 2, 1.0),
    **lora("lora_unet_single_blocks_37_linear1", 21504, 3072, 2, 1.0),
    **lora("lora_te1_text_model_encoder_layers_0_mlp_fc1", 3072, 768, 2, 1.0),
    **lora("lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0", 10240, 4096, 2, 1.0),
}


def test_every_module_of_flux_falls_apart_as_diffusers_lets_it() -> None:
    from lorabridge.axes import Read, Slice
    from lorabridge.dialects.adapter import LoraModule, Scaling, Term
    from lorabridge.dialects.kohya_write import split
    from lorabridge.dtypes import BY_NAME

    half = BY_NAME["float16"]
    places, pipelines = flattened.resolve(dict.fromkeys(FUSED), None, "")
    assert pipelines == ("flux",)
    modules = []
    for name, rows in FUSED.items():
        out = rows[-1][2]
        term = Term(Read(f"{name}.a", half, (2, 3072)), Read(f"{name}.b", half, (out, 2)), 0, out)
        modules.append(LoraModule(places[name].path, "linear", out, (term,), Scaling(2, 2)))
    fused = {place.path: place.fused for place in places.values() if place.fused}
    assert len(fused) == 19 * 2 + 38
    found: dict[str, list[object]] = {}
    for module in split(modules, fused):
        b = module.terms[0].b
        name, start = (b.x.name, b.start) if isinstance(b, Slice) else (b.name, 0)
        found.setdefault(name.removesuffix(".b"), []).append([module.path, start, start + module.out])
    assert {name: sorted(rows, key=lambda row: row[1]) for name, rows in found.items()} == FUSED


def applied(tensors: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    """Run a linear module's delta without forming it."""
    down, up = tensors[f"{name}.lora_down.weight"].double(), tensors[f"{name}.lora_up.weight"].double()
    return up @ (down @ x) * float(tensors[f"{name}.alpha"]) / down.shape[0]


def test_flux_goes_to_diffusers_and_back_with_the_same_deltas(tmp_path: Path) -> None:
    save_file(FLUX, tmp_path / "in.safetensors")
    facts = Facts((Fact("*", "alpha_in", "config"),))
    done = convert(tmp_path / "in.safetensors", tmp_path / "d", ConvertOptions(target_dialect="diffusers", facts=facts))
    paths = {module.path for module in done.modules}
    assert {f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"} < paths
    assert "transformer.single_transformer_blocks.37.proj_mlp" in paths
    assert "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wi_0" in paths
    (tmp_path / "d" / "lorabridge.json").unlink()
    convert(tmp_path / "d", tmp_path / "back.safetensors", ConvertOptions(target_dialect="kohya"))
    back = load_file(tmp_path / "back.safetensors")
    assert {name.partition(".")[0] for name in back} == {name.partition(".")[0] for name in FLUX}
    for name in {name.partition(".")[0] for name in FLUX}:
        probe = torch.linspace(-1, 1, FLUX[f"{name}.lora_down.weight"].shape[1], dtype=torch.float64)
        torch.testing.assert_close(applied(back, name, probe), applied(FLUX, name, probe), rtol=1e-12, atol=1e-12)


def test_one_of_three_projections_becomes_a_fused_module_with_zeros(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.3.attn.to_k"
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.lora_A.weight": torch.randn(2, 3072, generator=g),
        f"{name}.lora_B.weight": torch.randn(3072, 2),
    }
    save_file(tensors, tmp_path / "in.safetensors")
    options = ConvertOptions(target_dialect="kohya", facts=Facts((Fact("*", "names_of", "flux"),)))
    convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", options)
    found = load_file(tmp_path / "out.safetensors")
    up = found["lora_unet_double_blocks_3_img_attn_qkv.lora_up.weight"]
    assert up.shape == (9216, 2)
    assert torch.equal(up[3072:6144], tensors[f"{name}.lora_B.weight"])
    assert not up[:3072].any()
    assert not up[6144:].any()


def test_a_language_model_s_names_come_back_from_the_base_only(tmp_path: Path) -> None:
    path = "model.layers.0.self_attn.q_proj"
    tensors = {f"base_model.model.{path}.lora_{s}.weight": torch.randn(4, 4) for s in "AB"}
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "adapter_model.safetensors")
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA"}))
    done = convert(tmp_path / "in", tmp_path / "out.safetensors", ConvertOptions(target_dialect="kohya"))
    assert any("--names-of PATH" in note for note in done.notes)
    save_file(load_file(tmp_path / "out.safetensors"), tmp_path / "bare.safetensors")
    with pytest.raises(MappingError, match="not found") as caught:
        convert(tmp_path / "bare.safetensors", tmp_path / "back", ConvertOptions(target_dialect="peft"))
    assert "--names-of" in caught.value.hint
    save_file({f"{path}.weight": torch.zeros(4, 4)}, tmp_path / "base.safetensors")
    facts = Facts((Fact("*", "names_of", str(tmp_path / "base.safetensors")),))
    convert(tmp_path / "bare.safetensors", tmp_path / "back", ConvertOptions(target_dialect="peft", facts=facts))
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
