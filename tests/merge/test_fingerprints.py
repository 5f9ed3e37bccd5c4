"""Which base an adapter belongs to and which adapter a model holds: known from the files, checked, never guessed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import plain_adapter, plain_model

from lorabridge.actions.base_check import mindformers_fingerprint
from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.combine import CombineOptions, combine
from lorabridge.actions.convert import convert
from lorabridge.actions.extract import ExtractOptions, extract
from lorabridge.actions.merge import MergeOptions, merge
from lorabridge.actions.resize import resize
from lorabridge.actions.switch import switch
from lorabridge.actions.undo import UndoWriter
from lorabridge.actions.unmerge import unmerge
from lorabridge.errors import MappingError
from lorabridge.merging.identity import BASE_KEY, MERGED_KEY

NAMES = ("h.0.attn.q", "h.0.attn.k", "h.1.attn.q")


def weights(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    found = {f"{name}.weight": torch.randn(24, 16).to(dtype) for name in NAMES}
    return {**found, "norm.weight": torch.ones(16, dtype=dtype)}


def factors(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(seed)
    return {name: (random.standard_normal((4, 16), np.float32), random.standard_normal((24, 4), np.float32) * 0.01)
            for name in NAMES}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Return a base, another base, and an adapter that was extracted from the first."""
    base = plain_model(tmp_path / "base.safetensors", weights(1))
    other = plain_model(tmp_path / "other.safetensors", weights(2))
    merge(base, [plain_adapter(tmp_path / "made", factors(3))], tmp_path / "tuned.safetensors")
    extract(base, tmp_path / "tuned.safetensors", tmp_path / "adapter", ExtractOptions(rank=4))
    return base, other, tmp_path / "adapter"


def mark(path: Path, key: str) -> dict[str, object]:
    with safe_open(path, "pt") as file:
        found: dict[str, object] = json.loads(file.metadata()[key])
    return found


def test_extract_records_the_base_and_merge_refuses_another(tmp_path: Path, files: tuple[Path, Path, Path]) -> None:
    base, other, adapter = files
    merge(base, [adapter], tmp_path / "right.safetensors")
    with pytest.raises(MappingError, match="not the base that the adapter records") as error:
        merge(other, [adapter], tmp_path / "wrong.safetensors")
    text = error.value.text()
    assert "made for base.safetensors" in text
    assert "3 of 3 weights differ, first h.0.attn.k.weight" in text
    assert "--any-base" in text
    digests = [line.split()[i] for line, i in zip(error.value.where, (2, 2), strict=True)]
    assert len({digest.strip(",;") for digest in digests}) == 2
    assert not (tmp_path / "wrong.safetensors").exists()
    report = merge(other, [adapter], tmp_path / "wrong.safetensors", MergeOptions(any_base=True))
    assert any("--any-base" in warning for warning in report.warnings)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors", "/"])
def test_the_container_of_the_base_does_not_matter(tmp_path: Path, files: tuple[Path, Path, Path], suffix: str) -> None:
    base, other, adapter = files
    copy = f"{tmp_path}/copy{suffix}"
    convert(base, copy, ConvertOptions(max_shard_size=2000 if suffix == "/" else None, target_dialect="hf"))
    merge(Path(copy), [adapter], tmp_path / "right.safetensors")
    wrong = f"{tmp_path}/wrong{suffix}"
    convert(other, wrong, ConvertOptions(target_dialect="hf"))
    with pytest.raises(MappingError, match="not the base"):
        merge(Path(wrong), [adapter], tmp_path / "x.safetensors")


def test_another_element_type_is_said_not_to_be_compared(tmp_path: Path, files: tuple[Path, Path, Path]) -> None:
    half = plain_model(tmp_path / "half.safetensors", weights(1, torch.bfloat16))
    report = merge(half, [files[2]], tmp_path / "out.safetensors")
    assert any("in float32, this one is bfloat16: not compared" in warning for warning in report.warnings)


@pytest.mark.parametrize("way", ["converted", "resized", "combined", "returned"])
def test_the_record_travels_with_the_adapter(tmp_path: Path, files: tuple[Path, Path, Path], way: str) -> None:
    base, other, adapter = files
    made = tmp_path / "made.ckpt"
    if way == "resized":
        resize(adapter, made, rank=2)
    elif way == "combined":
        combine([adapter, plain_adapter(tmp_path / "second", factors(8))], made, CombineOptions())
    else:
        convert(adapter, made)
    if way == "returned":
        convert(made, tmp_path / "returned")
        made = tmp_path / "returned"
        assert (
            load_file(made / "adapter_model.safetensors").keys()
            == load_file(adapter / "adapter_model.safetensors").keys()
        )
    merge(base, [made], tmp_path / "right.safetensors")
    with pytest.raises(MappingError, match="not the base"):
        merge(other, [made], tmp_path / "wrong.safetensors")


def test_adapters_of_different_bases_are_combined_with_a_warning(
    tmp_path: Path, files: tuple[Path, Path, Path]
) -> None:
    _, other, adapter = files
    merge(other, [tmp_path / "made"], tmp_path / "tuned2.safetensors")
    extract(other, tmp_path / "tuned2.safetensors", tmp_path / "two", ExtractOptions(rank=4))
    report = combine([adapter, tmp_path / "two"], tmp_path / "both")
    assert any("different bases" in warning for warning in report.warnings)
    with safe_open(tmp_path / "both" / "adapter_model.safetensors", "pt") as file:
        assert BASE_KEY not in file.metadata()


def test_a_second_adapter_is_held_against_the_base_and_not_the_merged_model(
    tmp_path: Path, files: tuple[Path, Path, Path]
) -> None:
    base, _, adapter = files
    first = plain_adapter(tmp_path / "first", factors(5))
    merge(base, [first], tmp_path / "one.safetensors")
    merge(tmp_path / "one.safetensors", [adapter], tmp_path / "two.safetensors", MergeOptions(onto_merged=True))
    held = mark(tmp_path / "two.safetensors", MERGED_KEY)
    assert [row["adapter"] for row in held["adapters"]] == ["first", "adapter"]  # type: ignore[attr-defined]
    assert all(len(row) == 3 for row in held["weights"].values())  # type: ignore[attr-defined]
    unmerge(tmp_path / "two.safetensors", [adapter], tmp_path / "back.safetensors")
    assert [row["adapter"] for row in mark(tmp_path / "back.safetensors", MERGED_KEY)["adapters"]] == ["first"]  # type: ignore[attr-defined]


def test_unmerging_from_a_merge_onto_a_merged_model_gives_that_model(
    tmp_path: Path, files: tuple[Path, Path, Path]
) -> None:
    base, _, adapter = files
    merge(base, [plain_adapter(tmp_path / "first", factors(5))], tmp_path / "one.safetensors")
    options = MergeOptions(onto_merged=True)
    undo = UndoWriter(tmp_path / "u", options)
    merge(tmp_path / "one.safetensors", [adapter], tmp_path / "two.safetensors", options, watch=undo)
    unmerge(tmp_path / "two.safetensors", [adapter], tmp_path / "back.safetensors", undo=tmp_path / "u")
    assert mark(tmp_path / "back.safetensors", MERGED_KEY) == mark(tmp_path / "one.safetensors", MERGED_KEY)
    ours, theirs = (load_file(tmp_path / name) for name in ("back.safetensors", "one.safetensors"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(MappingError, match="merged model already"):
        merge(tmp_path / "back.safetensors", [adapter], tmp_path / "x.safetensors")


def test_another_adapter_is_not_taken_out(tmp_path: Path, files: tuple[Path, Path, Path]) -> None:
    base, _, adapter = files
    merge(base, [adapter], tmp_path / "merged.safetensors")
    other = plain_adapter(tmp_path / "first", factors(5))
    with pytest.raises(MappingError, match="another adapter was merged") as error:
        unmerge(tmp_path / "merged.safetensors", [other], tmp_path / "back.safetensors")
    assert "3 of 3 deltas differ" in error.value.text()
    with pytest.raises(MappingError, match="another adapter was merged"):
        switch(tmp_path / "merged.safetensors", [other], [adapter], tmp_path / "back.safetensors")
    with pytest.raises(MappingError, match="another adapter was merged"):
        unmerge(tmp_path / "merged.safetensors", [adapter], tmp_path / "b.safetensors", MergeOptions(weights=(2.0,)))
    options = MergeOptions(any_adapter=True)
    report = unmerge(tmp_path / "merged.safetensors", [other], tmp_path / "back.safetensors", options)
    assert any("--any-adapter" in warning for warning in report.warnings)


def test_nothing_is_taken_out_of_a_base(tmp_path: Path, files: tuple[Path, Path, Path]) -> None:
    base, _, adapter = files
    with pytest.raises(MappingError, match="nothing was merged into this model") as error:
        unmerge(base, [adapter], tmp_path / "back.safetensors")
    assert "it is the base of" in error.value.text()
    report = unmerge(base, [tmp_path / "made"], tmp_path / "near.safetensors")
    assert any("does not say that an adapter was merged" in warning for warning in report.warnings)
    again = merge(tmp_path / "near.safetensors", [tmp_path / "made"], tmp_path / "x.safetensors")
    assert any("best inverse of a merge, not the base itself" in warning for warning in again.warnings)


def test_one_adapter_may_be_given_as_it_is(tmp_path: Path, files: tuple[Path, Path, Path]) -> None:
    import lorabridge

    base, _, adapter = files
    report = lorabridge.merge(str(base), str(adapter), tmp_path / "m.safetensors", undo=tmp_path / "u")
    assert report.undo is not None
    assert report.undo.added == 3
    lorabridge.switch(tmp_path / "m.safetensors", adapter, tmp_path / "made", tmp_path / "s.safetensors")
    done = lorabridge.unmerge(tmp_path / "m.safetensors", adapter, tmp_path / "b.safetensors", undo=tmp_path / "u")
    assert done.exact


def test_the_adapter_may_come_in_another_dialect_than_that_of_the_merge(
    tmp_path: Path, files: tuple[Path, Path, Path]
) -> None:
    base, _, adapter = files
    merge(base, [adapter], tmp_path / "merged.safetensors")
    convert(adapter, tmp_path / "adapter.ckpt")
    unmerge(tmp_path / "merged.safetensors", [tmp_path / "adapter.ckpt"], tmp_path / "back.safetensors")


def test_switching_to_an_adapter_of_another_base_is_refused(tmp_path: Path, files: tuple[Path, Path, Path]) -> None:
    base, other, adapter = files
    first = plain_adapter(tmp_path / "first", factors(5))
    undo = UndoWriter(tmp_path / "u", MergeOptions())
    merge(other, [first], tmp_path / "merged.safetensors", watch=undo)
    with pytest.raises(MappingError, match="not the base"):
        switch(tmp_path / "merged.safetensors", [first], [adapter], tmp_path / "x.safetensors", undo=tmp_path / "u")
    undo = UndoWriter(tmp_path / "v", MergeOptions())
    merge(base, [first], tmp_path / "good.safetensors", watch=undo)
    switch(tmp_path / "good.safetensors", [first], [adapter], tmp_path / "y.safetensors", undo=tmp_path / "v")
    merge(base, [adapter], tmp_path / "direct.safetensors")
    switched, direct = (
        mark(tmp_path / name, MERGED_KEY)["weights"] for name in ("y.safetensors", "direct.safetensors")
    )
    assert switched == direct


def test_the_base_may_be_in_the_other_frameworks_names(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    for seed, name in ((1, "base"), (2, "other")):
        torch.manual_seed(seed)
        model = BertModel(BertConfig(vocab_size=30, max_position_embeddings=8, **sizes))
        model.save_pretrained(tmp_path / name)
    tuned = load_file(tmp_path / "base" / "model.safetensors")
    prefixed = {}
    for name, value in tuned.items():
        change = torch.randn(16, 2) @ torch.randn(2, 16) if name.endswith("query.weight") else torch.zeros_like(value)
        prefixed[name] = value + change
    shutil.copytree(tmp_path / "base", tmp_path / "tuned")
    save_file(prefixed, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", ExtractOptions(rank=2))
    there = ConvertOptions(family="bert", config=tmp_path / "base" / "config.json")
    options = MergeOptions(family="bert", config=tmp_path / "base" / "config.json")
    for name in ("base", "other"):
        convert(tmp_path / name, tmp_path / f"{name}.ckpt", there)
    merge(tmp_path / "base.ckpt", [tmp_path / "adapter"], tmp_path / "right.ckpt", options)
    with pytest.raises(MappingError, match="not the base"):
        merge(tmp_path / "other.ckpt", [tmp_path / "adapter"], tmp_path / "wrong.ckpt", options)


def mindformers_says(adapter: Path, fingerprint: str | None) -> None:
    (adapter.parent / "mindformers_adapter_config.json").write_text(
        json.dumps({"format": "mindformers_pynative_lora_adapter_v1", "base_fingerprint": fingerprint})
    )


def test_mindformers_fingerprint_is_checked(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    plain_model(tmp_path / "base" / "model.safetensors", weights(1))
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "run").mkdir()
    adapter = plain_adapter(tmp_path / "run" / "iteration_00000003", factors(3))
    mindformers_says(adapter, mindformers_fingerprint(tmp_path / "base"))
    merge(tmp_path / "base", [adapter], tmp_path / "right.safetensors")
    mindformers_says(adapter, mindformers_fingerprint(tmp_path / "base" / "model.safetensors"))
    merge(tmp_path / "base", [adapter], tmp_path / "right2.safetensors")
    mindformers_says(adapter, None)
    merge(tmp_path / "base", [adapter], tmp_path / "right3.safetensors")
    mindformers_says(adapter, "0" * 64)
    with pytest.raises(MappingError, match="not the base") as error:
        merge(tmp_path / "base", [adapter], tmp_path / "wrong.safetensors")
    assert "0" * 64 in error.value.text()
    assert mindformers_fingerprint(tmp_path / "base") in error.value.text()
    assert "file times" in error.value.text()
    merge(tmp_path / "base", [adapter], tmp_path / "wrong.safetensors", MergeOptions(any_base=True))


def test_the_fingerprint_is_that_of_mindformers(tmp_path: Path) -> None:
    """The value was computed by mindformers 2.1.0's get_base_checkpoint_fingerprint on these very files."""
    folder = tmp_path / "base"
    (folder / "sub").mkdir(parents=True)
    for name, raw in (("config.json", b"{}"), ("model.safetensors.index.json", b"[]"), ("b.safetensors", b"xy"),
                      ("sub/a.safetensors", b"z"), ("other.txt", b"n")):  # fmt: skip
        (folder / name).write_bytes(raw)
        os.utime(folder / name, ns=(10**18, 10**18 + 7))
    assert mindformers_fingerprint(folder) == FOLDER
    assert mindformers_fingerprint(folder / "b.safetensors") == FILE


FOLDER = "1d24caf02717ecbeecf3d6102cdac834263843816fda4c32452ff4420f63ca98"
FILE = "7de6e2cb19c978f23341663434db35f93794d3e374af5428a00689ae3f310ff6"


def test_an_adapter_of_another_kind_of_network_is_warned_about(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    plain_model(base / "model.safetensors", weights(1))
    adapter = plain_adapter(tmp_path / "made", factors(3))
    config = json.loads((adapter / "adapter_config.json").read_text())
    for made_for, known, said in (
        ("LlamaForCausalLM", "Qwen2ForCausalLM", 1), ("Qwen2ForSequenceClassification", "Qwen2ForCausalLM", 0),
        ("GPT2LMHeadModel", "GPT2Model", 0), ("BertModel", "BertForMaskedLM", 0),
    ):  # fmt: skip
        (base / "config.json").write_text(json.dumps({"architectures": [known]}))
        config["auto_mapping"] = {"base_model_class": made_for, "parent_library": "transformers"}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        done = merge(base, [adapter], tmp_path / f"out_{made_for}", MergeOptions())
        assert sum("was made for a" in line for line in done.warnings) == said, (made_for, known, done.warnings)
