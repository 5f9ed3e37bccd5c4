"""Distributed checkpoints in other commands: merged, converted, verified and compared without a whole one between."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.convert import convert
from lorabridge.actions.merge import merge
from lorabridge.actions.merge_inputs import MergeOptions
from lorabridge.actions.reassemble import reassemble
from lorabridge.actions.reshard import ReshardOptions, reshard
from lorabridge.commands._run import run
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.distributed.parallel import Sizes
from lorabridge.errors import InputError


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama of four layers, a peft adapter, what peft merges, and both as MindFormers' ranks.

    The base is cut for tensor parallel 2 in two stages, the adapter, tuned by another run, for tensor parallel 4.
    """
    work = tmp_path_factory.mktemp("composition")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4, vocab_size=64,
        num_hidden_layers=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(work / "base")
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj", "down_proj"]))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.05)
    tuned.save_pretrained(work / "adapter")
    tuned.merge_and_unload().save_pretrained(work / "theirs")
    given = ConvertOptions(family="llama", config=work / "base" / "config.json")
    convert(work / "base", work / "base_ms.safetensors", ConvertOptions(target_dialect="ms", family="llama"))
    convert(
        work / "adapter", work / "lora.safetensors",
        ConvertOptions(target_dialect="mindpet", family="llama", config=given.config),
    )  # fmt: skip
    reshard(work / "base_ms.safetensors", work / "base_ranks", ReshardOptions(sizes=Sizes(2, 2)))
    reshard(work / "lora.safetensors", work / "lora_ranks", ReshardOptions(sizes=Sizes(4)))
    return work


def test_ranks_of_two_runs_with_a_strategy_each_merge_in_one_pass(work: Path, tmp_path: Path) -> None:
    alpha = Facts((Fact("*", "alpha", 8.0),))
    merge(work / "base_ranks", [work / "lora_ranks"], tmp_path / "merged.safetensors", MergeOptions(facts=alpha))
    merge(
        work / "base_ms.safetensors",
        [work / "lora.safetensors"],
        tmp_path / "one.safetensors",
        MergeOptions(facts=alpha),
    )
    ours, whole = load_file(tmp_path / "merged.safetensors"), load_file(tmp_path / "one.safetensors")
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], whole[name]) for name in ours)


def test_ranks_become_a_hugging_face_model_in_one_pass(work: Path, tmp_path: Path) -> None:
    options = ConvertOptions(target_dialect="hf", family="llama", config=work / "base" / "config.json")
    reassemble(work / "base_ranks", tmp_path / "model", options)
    ours, theirs = load_file(tmp_path / "model" / "model.safetensors"), load_file(work / "base" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    LlamaForCausalLM.from_pretrained(tmp_path / "model")


def test_adapter_ranks_become_a_peft_directory_in_one_pass(work: Path, tmp_path: Path) -> None:
    alpha = Facts((Fact("*", "alpha", 8.0),))
    options = ConvertOptions(target_dialect="peft", family="llama", facts=alpha, config=work / "base" / "config.json")
    reassemble(work / "lora_ranks", tmp_path / "adapter", options)
    ours = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    theirs = load_file(work / "adapter" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_merge_of_ranks_agrees_with_pefts(work: Path, tmp_path: Path) -> None:
    options = MergeOptions(target_dialect="hf", family="llama", config=work / "base" / "config.json")
    merge(work / "base_ranks", [work / "adapter"], tmp_path / "merged", options)
    ours, theirs = (
        load_file(tmp_path / "merged" / "model.safetensors"),
        load_file(work / "theirs" / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.allclose(ours[name], value, rtol=0, atol=2e-7), name


@pytest.fixture
def apart(work: Path, tmp_path: Path) -> Path:
    """Return the ranks of both runs with their strategies somewhere else."""
    for part in ("base", "lora"):
        shutil.copytree(work / f"{part}_ranks", tmp_path / "runs" / f"{part}_ranks")
        (tmp_path / "runs" / f"{part}_ranks" / "strategy").rename(tmp_path / f"{part}_strategy")
    return tmp_path


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run the command line; returns the exit code and what it says."""

    def call(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        code = run([str(word) for word in words])
        return code, "".join(capsys.readouterr())

    return call


def test_a_merge_is_told_the_strategies_of_both_runs(
    work: Path, apart: Path, command: Callable[..., tuple[int, str]]
) -> None:
    base, lora, out = apart / "runs" / "base_ranks", apart / "runs" / "lora_ranks", apart / "merged.safetensors"
    said = ["--strategy", f"BASE={apart / 'base_strategy'}"]
    code, text = command("merge", base, lora, out, "--alpha", 8, *said)
    assert code == 3
    assert "give --strategy" in text
    assert not out.exists()
    code, text = command(
        "merge", base, lora, out, "--alpha", 8, *said, "--strategy", f"ADAPTER={apart / 'lora_strategy'}"
    )
    assert code == 0, text
    merge(
        work / "base_ms.safetensors", [work / "lora.safetensors"], apart / "one.safetensors",
        MergeOptions(facts=Facts((Fact("*", "alpha", 8.0),))),
    )  # fmt: skip
    ours, whole = load_file(out), load_file(apart / "one.safetensors")
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_convert_diff_and_verify_are_told_a_strategy(
    work: Path, apart: Path, command: Callable[..., tuple[int, str]]
) -> None:
    base = apart / "runs" / "base_ranks"
    whole, said = apart / "whole.safetensors", ["--strategy", apart / "base_strategy"]
    assert command("convert", base, whole, "--from", "ms", "--to", "ms", *said)[0] == 0
    assert command("diff", base, whole)[0] == 3
    assert command("diff", base, whole, *said)[0] == 0
    assert command("diff", whole, base, "--strategy", f"B={apart / 'base_strategy'}")[0] == 0
    assert command("verify", base, whole, "--depth", "tensors", *said)[0] == 0


def test_unmerge_and_recover_are_told_the_strategies_of_both_runs(
    work: Path, apart: Path, command: Callable[..., tuple[int, str]]
) -> None:
    whole, lora, merged = work / "base_ms.safetensors", apart / "runs" / "lora_ranks", apart / "merged.safetensors"
    of_lora = ["--strategy", f"ADAPTER={apart / 'lora_strategy'}"]
    said, undo = ["--alpha", 8, *of_lora], ["--undo", apart / "undo"]
    code, text = command("merge", whole, lora, merged, *said, *undo)
    assert code == 0, text
    code, text = command("recover", apart / "runs" / "base_ranks", merged, lora, *of_lora)
    assert (code, "give --strategy" in text) == (3, True)
    of_base = ["--strategy", f"BASE={apart / 'base_strategy'}"]
    code, text = command("recover", apart / "runs" / "base_ranks", merged, lora, *of_base, *of_lora)
    assert (code, "--alpha 8" in text) == (0, True), text

    code, text = command("unmerge", merged, apart / "back.safetensors", "--adapter", lora, "--alpha", 8, *undo)
    assert (code, "give --strategy" in text) == (3, True)
    code, text = command("unmerge", merged, apart / "back.safetensors", "--adapter", lora, *said, *undo)
    assert code == 0, text
    ours, base = load_file(apart / "back.safetensors"), load_file(whole)
    assert all(torch.equal(ours[name], base[name]) for name in base)


def test_extract_and_combine_are_told_a_strategy(
    work: Path, apart: Path, command: Callable[..., tuple[int, str]]
) -> None:
    base, lora, tuned = apart / "runs" / "base_ranks", apart / "runs" / "lora_ranks", apart / "tuned.safetensors"
    alpha = Facts((Fact("*", "alpha", 8.0),))
    merge(work / "base_ms.safetensors", [work / "lora.safetensors"], tuned, MergeOptions(facts=alpha))
    assert command("extract", base, tuned, apart / "from_ranks.ckpt", "--rank", 4)[0] == 3
    said = ["--strategy", f"BASE={apart / 'base_strategy'}"]
    code, text = command("extract", base, tuned, apart / "from_ranks.ckpt", "--rank", 4, *said)
    assert code == 0, text
    assert command("extract", work / "base_ms.safetensors", tuned, apart / "from_one.ckpt", "--rank", 4)[0] == 0
    assert command("diff", apart / "from_ranks.ckpt", apart / "from_one.ckpt")[0] == 0

    both = [lora, work / "lora.safetensors"]
    assert command("combine", *both, apart / "sum.ckpt", "--alpha", 8)[0] == 3
    code, text = command("combine", *both, apart / "sum.ckpt", "--alpha", 8, "--strategy", apart / "lora_strategy")
    assert code == 0, text
    twice = [work / "lora.safetensors"] * 2
    assert command("combine", *twice, apart / "expected.ckpt", "--alpha", 8)[0] == 0
    assert command("diff", apart / "sum.ckpt", apart / "expected.ckpt")[0] == 0


def test_a_strategy_for_what_no_ranks_wrote_is_refused(
    work: Path, apart: Path, command: Callable[..., tuple[int, str]]
) -> None:
    whole = work / "base_ms.safetensors"
    for said in (f"{apart / 'base_strategy'}", f"A={apart / 'base_strategy'}"):
        code, text = command("diff", whole, whole, "--strategy", said)
        assert code == 2
        assert re.search("(no input is|A is not) a directory that ranks wrote", text)


def test_a_merge_compares_the_copies_of_ranks_first(work: Path, tmp_path: Path) -> None:
    ranks = Path(shutil.copytree(work / "base_ranks", tmp_path / "base_ranks"))
    file = ranks / "rank_1" / "checkpoint.safetensors"
    held = load_file(file)
    name = next(n for n in held if n.endswith("attention_norm.weight"))
    save_file({**held, name: held[name] + 1}, file, {"format": "ms"})
    with pytest.raises(InputError, match="differs between ranks that should hold copies"):
        merge(ranks, [work / "adapter"], tmp_path / "merged", MergeOptions(family="llama"))
    assert not (tmp_path / "merged").exists()
