"""diffusers' files: every spelling is read, and what is written is what diffusers itself judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from judge_diffusers import FOLDER, digest, written
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorabridge import ConvertOptions, convert
from lorabridge.actions.inspect import inspect
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError

JUDGED = json.loads((Path(__file__).parent / "diffusers_judged.json").read_text("utf-8"))["forward"]
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_model.encoder.layers.0.self_attn"
Tensors = dict[str, torch.Tensor]


def pair(a: str, b: str, rank: int = 4, width: int = 6) -> Tensors:
    g = torch.Generator().manual_seed(rank)
    return {a: torch.randn(rank, width, generator=g), b: torch.randn(width, rank, generator=g)}


def stated(**facts: str) -> Facts:
    return Facts(tuple(Fact("*", name, value) for name, value in facts.items()))


def modules(tensors: Tensors, folder: Path, metadata: dict[str, str] | None = None) -> dict[str, tuple[int, float]]:
    """Convert to peft; return rank and scaling by path."""
    save_file(tensors, folder / "in.safetensors", metadata)
    done = convert(folder / "in.safetensors", folder / "out.safetensors", ConvertOptions(target_dialect="peft"))
    assert done.source_dialect == "diffusers"
    return {m.path: (m.rank, m.scaling) for m in done.modules}


@pytest.mark.parametrize("source", ["mixed_float16", "uniform_float16"])
def test_what_is_written_today_is_what_diffusers_judged(source: str, tmp_path: Path) -> None:
    for case, path in written(FOLDER / f"kohya_{source}.safetensors", tmp_path).items():
        verdict = JUDGED[f"{source} {case}"]
        assert digest(path) == verdict["digest"], case
        if case != "kohya" or source.startswith("uniform"):  # diffusers misreads alphas that differ in such files
            assert verdict["difference"] < 3e-6 < 1 < verdict["change"], case
    assert JUDGED["mixed_float16 original"]["difference"] > 0.1  # so the conversion is worth something


@pytest.mark.parametrize(
    ("tensors", "path"),
    [
        (pair(f"unet.{Q}.to_q.lora_A.weight", f"unet.{Q}.to_q.lora_B.weight"), f"unet.{Q}.to_q"),
        (pair(f"unet.{Q}.to_q.lora.down.weight", f"unet.{Q}.to_q.lora.up.weight"), f"unet.{Q}.to_q"),
        (pair(f"unet.{Q}.processor.to_q_lora.down.weight", f"unet.{Q}.processor.to_q_lora.up.weight"),
         f"unet.{Q}.to_q"),
        (pair(f"{Q}.processor.to_out_lora.down.weight", f"{Q}.processor.to_out_lora.up.weight"),
         f"unet.{Q}.to_out.0"),
        (pair(f"text_encoder.{TEXT}.q_proj.lora_linear_layer.down.weight",
              f"text_encoder.{TEXT}.q_proj.lora_linear_layer.up.weight"), f"text_encoder.{TEXT}.q_proj"),
        (pair(f"text_encoder.{TEXT}.to_out_lora.down.weight", f"text_encoder.{TEXT}.to_out_lora.up.weight"),
         f"text_encoder.{TEXT}.out_proj"),
        (pair("transformer.transformer_blocks.0.attn.to_k.lora_A.weight",
              "transformer.transformer_blocks.0.attn.to_k.lora_B.weight"),
         "transformer.transformer_blocks.0.attn.to_k"),
    ],
)  # fmt: skip
def test_every_spelling_is_read_and_alpha_is_the_rank(tensors: Tensors, path: str, tmp_path: Path) -> None:
    assert modules(tensors, tmp_path) == {path: (4, 1.0)}


def test_a_file_that_mixes_spellings_is_read_whole_and_said(tmp_path: Path) -> None:
    mixed = {
        **pair(f"unet.{Q}.to_q.lora.down.weight", f"unet.{Q}.to_q.lora.up.weight"),
        **pair(f"unet.{Q}.to_k.lora_A.weight", f"unet.{Q}.to_k.lora_B.weight"),
    }
    save_file(mixed, tmp_path / "in.safetensors")
    done = convert(tmp_path / "in.safetensors", tmp_path / "out", ConvertOptions(target_dialect="diffusers"))
    assert any("mixes the spellings lora.down and lora_A" in warning for warning in done.warnings)
    found = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert set(found) == {f"unet.{Q}.{x}.lora_{y}.weight" for x in ("to_q", "to_k") for y in "AB"}


def test_alphas_in_tensors_count(tmp_path: Path) -> None:
    tensors = {
        **pair(f"unet.{Q}.to_q.lora_A.weight", f"unet.{Q}.to_q.lora_B.weight"),
        f"unet.{Q}.to_q.alpha": torch.tensor(2.0),
        **pair(f"unet.{Q}.to_k.lora_A.weight", f"unet.{Q}.to_k.lora_B.weight"),
    }  # fmt: skip
    assert modules(tensors, tmp_path) == {f"unet.{Q}.to_q": (4, 0.5), f"unet.{Q}.to_k": (4, 1.0)}


def test_an_alpha_without_a_module_is_refused(tmp_path: Path) -> None:
    tensors = pair(f"unet.{Q}.to_q.lora_A.weight", f"unet.{Q}.to_q.lora_B.weight")
    with pytest.raises(MappingError, match="1 alpha is not one number of a module with factors"):
        modules({**tensors, f"unet.{Q}.to_v.alpha": torch.tensor(2.0)}, tmp_path)


def real_metadata(tmp_path: Path) -> tuple[Tensors, dict[str, str]]:
    """Save an adapter's config as diffusers does: LoraConfig.to_dict below the component, sets as lists."""
    from peft import LoraConfig

    patterns = {"rank_pattern": {f"{Q}.to_k": 2}, "alpha_pattern": {f"{Q}.to_k": 3}}
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"], **patterns).to_dict()
    packed = {f"unet.{k}": list(v) if isinstance(v, set) else v for k, v in config.items()}
    tensors = {
        **pair(f"unet.{Q}.to_q.lora_A.weight", f"unet.{Q}.to_q.lora_B.weight"),
        **pair(f"unet.{Q}.to_k.lora_A.weight", f"unet.{Q}.to_k.lora_B.weight", 2),
    }
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(packed, indent=2, sort_keys=True)}


def test_the_config_in_the_metadata_says_alpha_module_by_module(tmp_path: Path) -> None:
    tensors, metadata = real_metadata(tmp_path)
    assert modules(tensors, tmp_path, metadata) == {f"unet.{Q}.to_q": (4, 2.0), f"unet.{Q}.to_k": (2, 1.5)}


def test_a_config_that_contradicts_the_factors_is_refused(tmp_path: Path) -> None:
    tensors, metadata = real_metadata(tmp_path)
    tensors |= pair(f"unet.{Q}.to_q.lora_A.weight", f"unet.{Q}.to_q.lora_B.weight", 3)
    with pytest.raises(MappingError, match="does not fit together") as caught:
        modules(tensors, tmp_path, metadata)
    assert "the factors have rank 3, adapter_config.json says 4" in str(caught.value)


def test_alphas_in_tensors_and_metadata_at_once_are_refused(tmp_path: Path) -> None:
    tensors, metadata = real_metadata(tmp_path)
    with pytest.raises(MappingError, match="alpha is in the metadata and in tensors at once"):
        modules({**tensors, f"unet.{Q}.to_q.alpha": torch.tensor(2.0)}, tmp_path, metadata)


@pytest.mark.parametrize("dialect", ["diffusers", "mindone"])
def test_the_written_config_is_one_that_peft_and_mindone_build(dialect: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    tensors, metadata = real_metadata(tmp_path)
    save_file(tensors, tmp_path / "in.safetensors", metadata)
    options = ConvertOptions(target_dialect=dialect, facts=stated(alpha_in="config"))
    convert(tmp_path / "in.safetensors", tmp_path / "out", options)
    said = safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "pt").metadata()["lora_adapter_metadata"]
    packed = {key.removeprefix("unet."): value for key, value in json.loads(said).items()}
    config = LoraConfig(**packed)  # as diffusers builds it
    assert (config.r, config.lora_alpha) in ((4, 8), (2, 3))
    assert packed["rank_pattern"] is not None  # MindOne 0.5 asks for both
    assert packed["alpha_pattern"] is not None


def test_alpha_in_the_weights_is_exact_for_powers_of_two_and_said_otherwise(tmp_path: Path) -> None:
    tensors, metadata = real_metadata(tmp_path)
    save_file(tensors, tmp_path / "in.safetensors", metadata)
    options = ConvertOptions(target_dialect="diffusers", facts=stated(alpha_in="weights"))
    done = convert(tmp_path / "in.safetensors", tmp_path / "out", options)
    assert "scaling 2.0 multiplied into B, a power of two (1 module)" in done.notes
    assert "scaling 1.5 multiplied into B, rounded once to float32 or wider (1 module)" in done.notes
    found = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert torch.equal(found[f"unet.{Q}.to_q.lora_B.weight"], tensors[f"unet.{Q}.to_q.lora_B.weight"] * 2)
    assert found[f"unet.{Q}.to_k.lora_A.weight"].shape == (4, 6)  # padded: older readers know one rank without alpha
    a, b = (found[f"unet.{Q}.to_k.lora_{x}.weight"] for x in "AB")
    wanted = 1.5 * tensors[f"unet.{Q}.to_k.lora_B.weight"] @ tensors[f"unet.{Q}.to_k.lora_A.weight"]
    torch.testing.assert_close(b @ a, wanted, rtol=1e-6, atol=1e-6)
    assert (
        "lora_adapter_metadata" not in safe_open(tmp_path / "out" / "pytorch_lora_weights.safetensors", "pt").metadata()
    )


def test_without_a_word_nothing_is_rounded(tmp_path: Path) -> None:
    tensors, metadata = real_metadata(tmp_path)
    save_file(tensors, tmp_path / "in.safetensors", metadata)
    done = convert(tmp_path / "in.safetensors", tmp_path / "out", ConvertOptions(target_dialect="diffusers"))
    assert done.rounding == ()
    assert any("alpha is in the metadata" in note for note in done.notes)


def test_a_container_without_metadata_refuses_alpha_there(tmp_path: Path) -> None:
    tensors, metadata = real_metadata(tmp_path)
    save_file(tensors, tmp_path / "in.safetensors", metadata)
    with pytest.raises(MappingError, match="alpha would be in the metadata of a safetensors file") as caught:
        convert(
            tmp_path / "in.safetensors", tmp_path / "out.bin",
            ConvertOptions(target_dialect="diffusers", facts=stated(alpha_in="config")),
        )  # fmt: skip
    assert "--alpha-in weights" in caught.value.hint
    done = convert(tmp_path / "in.safetensors", tmp_path / "out.bin", ConvertOptions(target_dialect="diffusers"))
    assert any("multiplied into B" in note for note in done.notes)


def test_mindspore_reads_the_names_from_a_ckpt(tmp_path: Path) -> None:
    import mindspore

    tensors, metadata = real_metadata(tmp_path)
    save_file(tensors, tmp_path / "in.safetensors", metadata)
    convert(tmp_path / "in.safetensors", tmp_path / "o.ckpt", ConvertOptions(target_dialect="mindone"))
    found = mindspore.load_checkpoint(str(tmp_path / "o.ckpt"))
    assert set(found) == set(tensors)
    back = convert(tmp_path / "o.ckpt", tmp_path / "back")
    assert "restored bit for bit from the manifest" in back.notes
    again = load_file(tmp_path / "back" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_directories_hold_the_file_that_loaders_look_for(tmp_path: Path) -> None:
    tensors, metadata = real_metadata(tmp_path)
    save_file(tensors, tmp_path / "in.safetensors", metadata)
    for dialect in ("diffusers", "mindone"):
        convert(tmp_path / "in.safetensors", tmp_path / dialect, ConvertOptions(target_dialect=dialect))
        assert (tmp_path / dialect / "pytorch_lora_weights.safetensors").is_file()
        assert inspect(tmp_path / dialect).dialect == dialect


def test_gpt2_s_transformer_is_no_pipeline(tmp_path: Path) -> None:
    name = "transformer.h.0.attn.c_attn"
    save_file(pair(f"{name}.lora_A.weight", f"{name}.lora_B.weight"), tmp_path / "a.safetensors")
    assert inspect(tmp_path / "a.safetensors").dialect == "peft"


def test_modules_of_no_component_are_refused(tmp_path: Path) -> None:
    name = "base_model.model.h.0.attn"
    save_file(pair(f"{name}.lora_A.weight", f"{name}.lora_B.weight"), tmp_path / "a.safetensors")
    with pytest.raises(MappingError, match="do not say which network of a pipeline") as caught:
        convert(
            tmp_path / "a.safetensors", tmp_path / "out",
            ConvertOptions(target_dialect="diffusers", facts=Facts((Fact("*", "alpha", 4),))),
        )  # fmt: skip
    assert caught.value.where == ("h.0.attn",)


def test_dora_s_magnitude_goes_there_and_back(tmp_path: Path) -> None:
    tensors = pair(f"unet.{Q}.to_q.lora_A.weight", f"unet.{Q}.to_q.lora_B.weight")
    tensors[f"unet.{Q}.to_q.lora_magnitude_vector"] = torch.rand(6)
    save_file(tensors, tmp_path / "in.safetensors")
    facts = stated(names_of="sd15")
    with pytest.raises(MappingError, match="1 of 1 module not found in sd15"):
        convert(
            tmp_path / "in.safetensors", tmp_path / "k.safetensors", ConvertOptions(target_dialect="kohya", facts=facts)
        )
    done = convert(tmp_path / "in.safetensors", tmp_path / "k.safetensors", ConvertOptions(target_dialect="kohya"))
    assert any("those of no pipeline that is known" in note for note in done.notes)
    found = load_file(tmp_path / "k.safetensors")
    name = "lora_unet_" + f"{Q}.to_q".replace(".", "_")
    assert found[f"{name}.dora_scale"].shape == (6, 1)
    assert torch.equal(found[f"{name}.dora_scale"].reshape(-1), tensors[f"unet.{Q}.to_q.lora_magnitude_vector"])
