"""``--base-name`` states what an adapter calls its base model, wherever a target has a place for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabridge import ConvertOptions, convert
from lorabridge.commands._run import run
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import UsageError

NAME = "someone/some-model"
ALPHA = Facts((Fact("*", "alpha", 4),))


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """loralib's factors, which name no base."""
    path = "model.layers.0.self_attn.q_proj"
    save_file({f"{path}.lora_A": torch.randn(2, 4), f"{path}.lora_B": torch.randn(4, 2)}, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


@pytest.fixture
def adapter(bare: Path) -> Path:
    """The same in peft's form, without a base's name."""
    convert(bare, bare.parent / "peft", ConvertOptions(source_dialect="loralib", target_dialect="peft", facts=ALPHA))
    return bare.parent / "peft"


def config_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    return found


def test_an_adapter_without_a_base_s_name_is_given_one(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["convert", str(bare), "--alpha", "4", "--to", "peft"]
    assert run([*given, f"{bare.parent / 'without'}/"]) == 0
    assert "--base-name" in capsys.readouterr().err
    assert run([*given, f"{bare.parent / 'with'}/", "--base-name", NAME]) == 0
    assert "--base-name" not in capsys.readouterr().err
    without, named = config_of(bare.parent / "without"), config_of(bare.parent / "with")
    assert without["base_model_name_or_path"] is None
    assert named == {**without, "base_model_name_or_path": NAME}


def test_peft_reads_the_name(adapter: Path, tmp_path: Path) -> None:
    from peft import PeftConfig

    convert(adapter, tmp_path / "named", ConvertOptions(target_dialect="peft", base_name=NAME))
    assert PeftConfig.from_pretrained(str(tmp_path / "named")).base_model_name_or_path == NAME


@pytest.mark.parametrize(
    ("dialect", "file", "field"),
    [("vllm", "adapter_config.json", "base_model_name_or_path"), ("mlx", "adapter_config.json", "model"),
     ("mindone-peft", "adapter_config.json", "base_model_name_or_path"),
     ("mindnlp", "adapter_config.json", "base_model_name_or_path")],
)  # fmt: skip
def test_other_directories_have_it_in_their_own_field(
    dialect: str, file: str, field: str, adapter: Path, tmp_path: Path
) -> None:
    convert(adapter, tmp_path / "out", ConvertOptions(target_dialect=dialect, base_name=NAME))
    assert json.loads((tmp_path / "out" / file).read_text("utf-8"))[field] == NAME


@pytest.mark.parametrize(("target", "dialect"), [("a.safetensors", "kohya"), ("a.pt", "loralib")])
def test_a_file_without_a_place_for_it_refuses(target: str, dialect: str, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no place for the base model's name"):
        convert(adapter, tmp_path / target, ConvertOptions(target_dialect=dialect, base_name=NAME))
    assert not (tmp_path / target).exists()


def test_what_is_restored_bit_for_bit_may_be_renamed_on_the_way(adapter: Path, tmp_path: Path) -> None:
    convert(adapter, tmp_path / "there.ckpt")
    done = convert(tmp_path / "there.ckpt", tmp_path / "back", ConvertOptions(target_dialect="peft", base_name=NAME))
    assert any("bit for bit" in note for note in done.notes)
    assert config_of(tmp_path / "back") == {**config_of(adapter), "base_model_name_or_path": NAME}
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "back"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_way_back_does_not_mind_the_name(bare: Path, tmp_path: Path) -> None:
    options = ConvertOptions(source_dialect="loralib", target_dialect="peft", facts=ALPHA, base_name=NAME)
    convert(bare, tmp_path / "named", options)
    done = convert(tmp_path / "named", tmp_path / "back.safetensors", ConvertOptions(target_dialect="loralib"))
    assert done.notes == ("restored bit for bit from the manifest",)
    assert (tmp_path / "back.safetensors").exists()
