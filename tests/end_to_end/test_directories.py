"""Directories: shards on both sides, and the configs that belong to what is in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dialects.peft_models import CASES, bert

from lorabridge import ConvertOptions, convert
from lorabridge.errors import InputError, UsageError


def test_a_sharded_model_comes_back_whole_with_its_config(tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "hf", max_shard_size="10KB")
    convert(tmp_path / "hf", f"{tmp_path}/ms/", ConvertOptions(family="bert", max_shard_size=10_000, crc=True))
    assert len(list((tmp_path / "ms").glob("*.ckpt"))) > 1
    convert(tmp_path / "ms", f"{tmp_path}/back/", ConvertOptions(max_shard_size=10_000))
    again = type(model).from_pretrained(tmp_path / "back")
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "hf", max_shard_size="10KB")
    gone = sorted((tmp_path / "hf").glob("*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(InputError, match="missing") as raised:
        convert(tmp_path / "hf", tmp_path / "out.ckpt", ConvertOptions(family="bert"))
    assert gone.name in raised.value.where[0]


def test_a_directory_with_a_dot_in_its_name(tmp_path: Path) -> None:
    CASES["linear"].adapted().save_pretrained(tmp_path / "peft")
    with pytest.raises(UsageError) as raised:
        convert(tmp_path / "peft", tmp_path / "v1.0")
    assert "slash" in raised.value.hint
    convert(tmp_path / "peft", f"{tmp_path}/v1.0/", ConvertOptions(target_dialect="loralib-ms"))
    assert (tmp_path / "v1.0" / "adapter_model.ckpt").is_file()
