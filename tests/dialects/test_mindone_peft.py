"""MindOne's peft: what is written was loaded and run by MindOne, what it saved is read, what it lacks is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorabridge import ConvertOptions, convert
from lorabridge.actions.inspect import inspect
from lorabridge.errors import MappingError

FOLDER = Path(__file__).parent / "mindone_peft"
JUDGED = json.loads((FOLDER / "judged.json").read_text())["cases"]
FAMILY = {case: f"{case.split('_')[0]}_mindone" for case in JUDGED}


def converted(case: str, folder: Path) -> Path:
    convert(FOLDER / case, folder / case, ConvertOptions(target_dialect="mindone-peft", family=FAMILY[case]))
    return folder / case


def config(adapter: Path) -> dict[str, object]:
    return json.loads((adapter / "adapter_config.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", JUDGED)
def test_mindone_loaded_this_file_and_computed_what_peft_computes(case: str, tmp_path: Path) -> None:
    from judge_mindone_peft import digest

    assert digest(converted(case, tmp_path)) == JUDGED[case]["digest"]
    assert JUDGED[case]["converted"] < 1e-6


def test_peft_directories_alone_fail_in_mindone_where_cells_are_native() -> None:
    """What the conversion is for."""
    assert JUDGED["gpt2_bias"]["peft"] > 1e-3
    assert JUDGED["gpt2_ln_f"]["peft"] == "KeyError: 'base_model.model.transformer.ln_f.gamma'"
    assert "embed_tokens.embedding_table" in JUDGED["qwen2_embed"]["peft"]


@pytest.mark.parametrize("case", JUDGED)
@pytest.mark.parametrize("with_manifest", [True, False])
def test_the_way_back_has_the_same_tensors(case: str, with_manifest: bool, tmp_path: Path) -> None:
    there = converted(case, tmp_path)
    if not with_manifest:
        (there / "lorabridge.json").unlink()
    options = ConvertOptions(source_dialect="mindone-peft", target_dialect="peft", family=FAMILY[case])
    convert(there, tmp_path / "back", options)
    before = load_file(FOLDER / case / "adapter_model.safetensors")
    after = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    if with_manifest:
        original = (FOLDER / case / "adapter_model.safetensors").read_bytes()
        assert (tmp_path / "back" / "adapter_model.safetensors").read_bytes() == original


def test_names_container_and_config_are_those_that_mindone_looks_for(tmp_path: Path) -> None:
    folder = converted("gpt2_patterns", tmp_path)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    said = config(folder)
    assert said["rank_pattern"] == {"transformer.h.0.attn.c_attn": 4}
    assert said["alpha_pattern"] == {"transformer.h.0.mlp.c_proj": 1, "transformer.h.1.mlp.c_proj": 1}
    assert config(converted("gpt2", tmp_path)) | {"rank_pattern": {}, "alpha_pattern": {}} == config(tmp_path / "gpt2")
    with safe_open(converted("gpt2_bias", tmp_path) / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "base_model.model.transformer.h.1.ln_2.beta" in names
    assert "base_model.model.transformer.h.1.attn.c_attn.base_layer.bias" in names


def test_what_mindone_saved_is_recognised_and_read(tmp_path: Path) -> None:
    report = inspect(FOLDER / "gpt2_ln_f.mindone")
    assert (report.dialect, report.families) == ("mindone-peft", ("gpt2_mindone",))
    convert(
        FOLDER / "gpt2_ln_f.mindone", tmp_path / "back", ConvertOptions(target_dialect="peft", family="gpt2_mindone")
    )
    before = load_file(FOLDER / "gpt2_ln_f" / "adapter_model.safetensors")
    after = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=19, n_positions=12)
    )
    loaded = peft.PeftModel.from_pretrained(model, str(tmp_path / "back"))
    assert torch.equal(
        loaded.base_model.model.transformer.ln_f.modules_to_save["default"].weight,
        before["base_model.model.transformer.ln_f.weight"],
    )


def test_factors_alone_are_peft_s_own_file(tmp_path: Path) -> None:
    assert inspect(FOLDER / "qwen2.mindone").dialect == "peft"
    before = load_file(FOLDER / "qwen2" / "adapter_model.safetensors")
    after = load_file(FOLDER / "qwen2.mindone" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_names_that_stayed_transformers_are_noted(tmp_path: Path) -> None:
    report = convert(FOLDER / "gpt2_ln_f", tmp_path / "out", ConvertOptions(target_dialect="mindone-peft"))
    assert any("--family NAME_mindone gives its names" in note for note in report.notes)
    report = convert(
        FOLDER / "gpt2_ln_f", tmp_path / "named", ConvertOptions(target_dialect="mindone-peft", family="gpt2_mindone")
    )
    assert not any("NAME_mindone" in note for note in report.notes)


def changed(folder: Path, fields: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(FOLDER / "gpt2", folder)
    (folder / "adapter_config.json").write_text(json.dumps(config(folder) | fields))
    save_file(load_file(folder / "adapter_model.safetensors") | tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("problem", "fields", "tensors"),
    [
        ("MindOne has no DoRA", {"use_dora": True},
         {f"h.{i}.{m}.lora_magnitude_vector": torch.ones(n) for i in (0, 1)
          for m, n in (("attn.c_attn", 24), ("attn.c_proj", 8), ("mlp.c_proj", 8))}),
        ("MindOne has no LoRA for embedding", {"target_modules": ["c_attn", "c_proj", "wte"]},
         {"wte.lora_embedding_A": torch.ones(2, 19), "wte.lora_embedding_B": torch.ones(8, 2)}),
        ("replaces single rows of an embedding", {"trainable_token_indices": {"wte": [1, 3]}},
         {"wte.token_adapter.trainable_tokens_delta": torch.ones(2, 8)}),
        ("MindOne does not know init_lora_weights='lora_ga'", {"init_lora_weights": "lora_ga"}, {}),
    ],
)  # fmt: skip
def test_what_mindone_cannot_hold_is_refused_with_the_cure(
    problem: str, fields: dict[str, object], tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    named = {f"base_model.model.transformer.{name}": tensor for name, tensor in tensors.items()}
    source = changed(tmp_path / "given", fields, named)
    with pytest.raises(MappingError) as error:
        convert(source, tmp_path / "out", ConvertOptions(target_dialect="mindone-peft", family="gpt2_mindone"))
    assert problem in error.value.text()
    assert "merge" in error.value.hint
    assert not (tmp_path / "out").exists()
