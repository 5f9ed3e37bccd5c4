"""Tables that are inferred from two checkpoints of one network convert that network as the shipped tables do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.convert import convert
from lorabridge.actions.infer import infer
from lorabridge.actions.infer_text import counts, problems, table_text
from lorabridge.commands._group import cli
from lorabridge.families.tables import read_table


def distinct(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter values of its own: trained norms and biases are not all ones and zeros."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    return model


def models(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=3, n_head=4, vocab_size=50, n_positions=20))
    if name == "bert":
        return BertForMaskedLM(
            BertConfig(
                hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=50,
                max_position_embeddings=24,
            )
        )  # fmt: skip
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
            num_hidden_layers=2,
        )
    )  # fmt: skip


def pair(work: Path, name: str, layout: dict[str, str]) -> tuple[Path, Path]:
    distinct(models(name)).save_pretrained(work / "hf")
    options = ConvertOptions(target_dialect="ms", family=name, layout=layout)
    convert(work / "hf", work / "ms.safetensors", options)
    return work / "hf", work / "ms.safetensors"


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gpt2", {}),
        ("llama", {"qkv_concat": "off"}),
        ("llama", {"qkv_concat": "contiguous"}),
        ("llama", {"qkv_concat": "grouped"}),
        ("bert", {"mlm_head": "cell"}),
    ],
)
def test_the_inferred_table_converts_to_the_same_bits(name: str, layout: dict[str, str], tmp_path: Path) -> None:
    hf, ms = pair(tmp_path, name, layout)
    found = infer(hf, ms)
    text = table_text(found, "mine")
    assert problems(text) == []
    assert counts(found)["equal contents"] == counts(found)["shapes"] == 0
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "mine.toml").write_text(text)
    options = ConvertOptions(target_dialect="ms", family="mine", mappings=tmp_path / "tables")
    convert(hf, tmp_path / "again.safetensors", options)
    ours, theirs = load_file(tmp_path / "again.safetensors"), load_file(ms)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_orders_and_groups_are_read_from_the_values(tmp_path: Path) -> None:
    hf, ms = pair(tmp_path, "llama", {"qkv_concat": "grouped"})
    text = table_text(infer(hf, ms), "mine")
    assert 'groups = "num_key_value_heads"' in text
    assert 'groups = "intermediate_size"' in text
    (tmp_path / "b").mkdir()
    hf, ms = pair(tmp_path / "b", "gpt2", {})
    table = read_table(table_text(infer(hf, ms), "mine"), "mine")
    orders = [(rule.hf.order, rule.ms.order) for rule in table.rules if rule.kind == "linear"]
    assert ("in out", "out in") in orders
    assert ("in out", "in out") in orders


def test_different_values_are_matched_by_shape_and_marked(tmp_path: Path) -> None:
    hf, _ = pair(tmp_path, "llama", {})
    (tmp_path / "other").mkdir()
    torch.manual_seed(5)
    other = models("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    other.save_pretrained(tmp_path / "other" / "hf")
    convert(
        tmp_path / "other" / "hf", tmp_path / "other.safetensors", ConvertOptions(target_dialect="ms", family="llama")
    )
    found = infer(hf, tmp_path / "other.safetensors")
    assert counts(found)["contents"] == 0
    text = table_text(found, "mine")
    assert text.count("BY SHAPE AND NAME ONLY") >= counts(found)["shapes"]
    assert problems(text) == []


def test_norms_that_are_all_ones_are_marked_ambiguous(tmp_path: Path) -> None:
    models("llama").save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ms.safetensors", ConvertOptions(target_dialect="ms", family="llama"))
    found = infer(tmp_path / "hf", tmp_path / "ms.safetensors")
    assert counts(found)["equal contents"] == 2
    assert "AMBIGUOUS: equal contents, chosen by name; as well: model.layers.{i}.post_attention_layernorm.weight" in (
        table_text(found, "mine")
    )


def test_the_command_writes_the_table_and_says_what_is_left(tmp_path: Path) -> None:
    hf, ms = pair(tmp_path, "llama", {})
    done = CliRunner().invoke(cli, ["tables", "infer", str(hf), str(ms), "-o", str(tmp_path / "mine.toml")])
    assert done.exit_code == 0, done.output
    checked = CliRunner().invoke(cli, ["tables", "check", str(tmp_path / "mine.toml")])
    assert checked.exit_code == 0, checked.output
    tensors = load_file(ms)
    tensors["stranger.weight"] = torch.ones(3, 9)
    from safetensors.torch import save_file

    save_file(tensors, ms, metadata={"format": "ms"})
    again = CliRunner().invoke(cli, ["tables", "infer", str(hf), str(ms)])
    assert again.exit_code == 1
    assert "NOT MATCHED" in again.output
    assert 'ms = "stranger.weight"' in again.output
