"""Depth model: whole networks of transformers and peft against MindSpore's, and the faults that it must see."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from model_runs import depth, run, said, saved
from small import SMALL, build, converted, with_config

from lorabridge.actions.convert import ConvertOptions, convert
from lorabridge.actions.verify import verify
from lorabridge.actions.verify_architecture import batches
from lorabridge.actions.verify_inputs import VerifyOptions


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model_depth")


@pytest.mark.parametrize("name", SMALL)
def test_a_converted_adapter_computes_what_peft_computes(name: str, work: Path) -> None:
    folder = saved(name, work)
    report = run(folder / "adapter", folder / "out.ckpt", folder / "base")
    found = depth(report)
    assert report.exit_code == 0
    assert found.state == "run"
    assert all(check.ok for check in found.checks)
    blocks = [row for row in found.modules if row.kind == "block"]
    outputs = [row for row in found.modules if row.kind == "logits"]
    assert (len(blocks), len(outputs)) == (2, 6)
    for row in found.modules:
        assert row.max_abs is not None
        assert row.bound is not None
        assert row.cosine is not None
        assert 0 < row.max_abs <= row.bound
        assert row.cosine > 1 - 1e-6
    assert outputs[0].bound < 1e-3  # type: ignore[operator]
    assert any("adapter changes the logits by up to" in line for line in found.proved)


def test_a_mindpet_checkpoint_runs_as_loradense(work: Path) -> None:
    folder = saved("gpt2", work)
    target = converted(SMALL["gpt2"], folder, "mindpet.ckpt", target_dialect="mindpet")
    assert run(folder / "adapter", target, folder / "base").ok


def test_the_way_back_is_compared_the_other_way_round(work: Path) -> None:
    folder = saved("llama", work)
    convert(folder / "out.ckpt", folder / "back", ConvertOptions())
    assert run(folder / "out.ckpt", folder / "back", folder / "base").ok


def test_a_merged_checkpoint_is_compared_with_base_and_adapter(work: Path, tmp_path: Path) -> None:
    import peft

    folder = saved("llama", work)
    module = build(SMALL["llama"])
    merged = peft.PeftModel.from_pretrained(module, str(folder / "adapter")).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    convert(tmp_path / "merged", tmp_path / "merged.ckpt", ConvertOptions(family="llama"))
    assert run(folder / "adapter", tmp_path / "merged.ckpt", folder / "base").ok
    convert(folder / "base", tmp_path / "plain.ckpt", ConvertOptions(family="llama"))
    assert not run(folder / "adapter", tmp_path / "plain.ckpt", folder / "base").ok


def refused(source: Path, target: Path, base: Path | None, **more: object) -> str:
    options = VerifyOptions(base=base, model=True, depths=("tensors",), **more)  # type: ignore[arg-type]
    report = verify(source, target, options)
    assert depth(report).state == "refused"
    return depth(report).reason


def test_what_cannot_run_is_refused_by_name(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("bert", work)
    assert "--base BASE" in refused(folder / "adapter", folder / "out.ckpt", None)
    other = with_config(folder / "base", model_type="mamba")
    assert "'mamba'" in refused(folder / "adapter", folder / "out.ckpt", other)
    shutil.rmtree(other)
    odd = with_config(folder / "base", position_embedding_type="relative_key")
    bare = tmp_path / "bare.ckpt"
    shutil.copy(folder / "out.ckpt", bare)
    reason = refused(folder / "adapter", bare, odd, facts=said(alpha=10), family="bert")
    assert "position_embedding_type: is 'relative_key'" in reason
    from lorabridge import frameworks

    monkeypatch.setattr(frameworks, "_installed", lambda name: name != "mindspore")
    assert "mindspore not installed" in refused(folder / "adapter", folder / "out.ckpt", folder / "base")


def test_the_depth_is_left_out_unless_it_is_asked_for(work: Path) -> None:
    folder = saved("bert", work)
    report = verify(folder / "adapter", folder / "out.ckpt", VerifyOptions(base=folder / "base"))
    assert depth(report).state == "left out"


def test_an_adapter_without_effect_is_said_to_prove_nothing(work: Path, tmp_path: Path) -> None:
    import peft

    folder = saved("gpt2", work)
    untrained = peft.LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM")
    peft.get_peft_model(build(SMALL["gpt2"]), untrained).save_pretrained(tmp_path / "zero")
    convert(tmp_path / "zero", tmp_path / "zero.ckpt", ConvertOptions(family="gpt2"))
    report = run(tmp_path / "zero", tmp_path / "zero.ckpt", folder / "base")
    assert report.ok
    assert any("too little to prove" in line for line in depth(report).proved)


def test_tokens_depend_on_the_seed_alone_and_stay_in_the_vocabulary() -> None:
    config = {"model_type": "bert", "vocab_size": 7, "type_vocab_size": 2, "max_position_embeddings": 9}
    first, again, other = batches(config, 1), batches(config, 1), batches(config, 2)
    assert all((a.ids == b.ids).all() for a, b in zip(first, again, strict=True))
    assert any((a.ids != b.ids).any() for a, b in zip(first, other, strict=True))
    assert max(batch.ids.max() for batch in first) < 7
    assert [batch.ids.shape[1] for batch in first] == [9, 9, 1]
    mask = first[0].mask
    assert mask is not None
    assert (mask[0] == 1).all()
    assert mask[1, -1] == 0
    assert mask[2, 0] == 0
    assert np.array_equal(mask[3], [1, 1, *[0] * 7])


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_conversion_that_rounds_is_compared_with_rounded_numbers(dtype: str, work: Path, tmp_path: Path) -> None:
    folder = saved("bert", work)
    target = converted(SMALL["bert"], folder, f"{dtype}.ckpt", dtype=dtype)
    report = run(folder / "adapter", target, folder / "base")
    assert report.ok
    assert "numbers of SRC are rounded to" in depth(report).proved[0]
    model = tmp_path / "model.ckpt"
    convert(folder / "base", model, ConvertOptions(family="bert", dtype=dtype))
    assert run(folder / "base", model).ok


def test_a_loralib_state_is_merged_and_two_peft_adapters_run_one_on_each_side(work: Path, tmp_path: Path) -> None:
    folder = saved("llama", work)
    loralib = tmp_path / "lora.pt"
    convert(folder / "adapter", loralib, ConvertOptions(target_dialect="loralib"))
    assert run(loralib, folder / "out.ckpt", folder / "base").ok
    twin = tmp_path / "twin"
    shutil.copytree(folder / "adapter", twin)
    assert run(folder / "adapter", twin, folder / "base").ok


def test_classes_that_no_reference_network_has_are_refused_before_anything_is_loaded(work: Path) -> None:
    folder = saved("gpt2", work)
    odd = with_config(folder / "base", architectures=["Trainer"])
    convert(folder / "base", folder / "whole.ckpt", ConvertOptions(family="gpt2"))
    assert "the class 'Trainer'" in refused(odd, folder / "whole.ckpt", None)


def test_a_base_of_another_shape_is_refused_in_peft_s_own_words(work: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    folder = saved("gpt2", work)
    wider = replace(SMALL["gpt2"], fields=SMALL["gpt2"].fields | {"n_embd": 48})
    build(wider).save_pretrained(tmp_path / "wider")
    reason = refused(folder / "adapter", folder / "out.ckpt", tmp_path / "wider")
    assert "size mismatch" in reason or "does not" in reason
