"""Depth model: whole networks of transformers and peft against MindSpore's, and the faults that it must see."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mindspore
import numpy as np
import pytest
from small import SMALL, build, converted, save, with_config

from lorabridge.actions.convert import ConvertOptions, convert
from lorabridge.actions.verify import verify
from lorabridge.actions.verify_architecture import batches
from lorabridge.actions.verify_inputs import VerifyOptions
from lorabridge.actions.verify_report import DepthResult, VerifyReport

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model_depth")


def saved(name: str, work: Path) -> Path:
    """Return a folder with ``base``, ``adapter`` and ``out.ckpt`` of a small model, made once."""
    folder = work / name
    if not folder.exists():
        folder.mkdir()
        save(SMALL[name], folder)
        converted(SMALL[name], folder)
    return folder


def depth(report: VerifyReport) -> DepthResult:
    found = report.depth("model")
    assert found is not None
    return found


def run(source: Path, target: Path, base: Path | None = None, **more: object) -> VerifyReport:
    options = VerifyOptions(base=base, depths=("model",), **more)  # type: ignore[arg-type]
    return verify(source, target, options)


def rewritten(checkpoint: Path, target: Path, names: dict[str, str] | None = None, drop: str = "?") -> Path:
    """Write a .ckpt again with other names, or without those that begin with ``drop``; its sidecar goes along."""
    names = names or {}
    state = mindspore.load_checkpoint(str(checkpoint))
    kept = [{"name": swapped(name, names), "data": value} for name, value in state.items() if not name.startswith(drop)]
    mindspore.save_checkpoint(kept, str(target))
    return target


def swapped(name: str, names: dict[str, str]) -> str:
    for one, other in [*names.items(), *((other, one) for one, other in names.items())]:
        if one in name:
            return name.replace(one, other)
    return name


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


FAULTS = [
    ("gpt2", {"attention.dense1": "attention.dense2"}, "?"),
    ("bert", {"attention.dense1": "attention.dense2"}, "?"),
    ("llama", {"attention.wq": "attention.wk"}, "?"),
    ("llama", {"feed_forward.w1": "feed_forward.w3"}, "?"),
    ("qwen2", {"feed_forward.w1": "feed_forward.w3"}, "?"),
    ("gpt2", {}, "backbone.blocks.1.attention.dense3"),
    ("llama", {}, "model.layers.0.feed_forward.w2"),
]


@pytest.mark.parametrize(("name", "names", "drop"), FAULTS)
def test_exchanged_or_missing_modules_are_seen(
    name: str, names: dict[str, str], drop: str, work: Path, tmp_path: Path
) -> None:
    folder = saved(name, work)
    bad = rewritten(folder / "out.ckpt", tmp_path / "bad.ckpt", names, drop)
    lora = SMALL[name].lora
    facts = {"alpha": 10, **({"use_rslora": True} if "use_rslora" in lora else {})}
    report = run(folder / "adapter", bad, folder / "base", facts=said(facts), family=SMALL[name].family)
    assert report.exit_code == 1
    found = depth(report)
    assert found.failed
    assert max(row.ratio for row in found.failed if row.ratio is not None) > 100
    assert report.verdict == "different"


def said(facts: dict[str, object]) -> object:
    from lorabridge.dialects.adapter import Fact, Facts

    return Facts(tuple(Fact("*", key, value) for key, value in facts.items()))  # type: ignore[arg-type]


def test_a_wrong_alpha_is_seen(work: Path, tmp_path: Path) -> None:
    folder = saved("gpt2", work)
    bad = rewritten(folder / "out.ckpt", tmp_path / "bad.ckpt")
    report = run(folder / "adapter", bad, folder / "base", facts=said({"alpha": 11}), family="gpt2")
    assert report.exit_code == 1
    right = run(folder / "adapter", bad, folder / "base", facts=said({"alpha": 10}), family="gpt2")
    assert right.exit_code == 0


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [("gpt2", "layer_norm_epsilon", 1e-6), ("llama", "rms_norm_eps", 1e-5), ("gpt2", "activation_function", "gelu")],
)
def test_another_epsilon_or_activation_in_the_config_beside_the_checkpoint_is_seen(
    name: str, field: str, value: object, work: Path, tmp_path: Path
) -> None:
    folder = saved(name, work)
    converted_dir = tmp_path / "ms"
    convert(folder / "base", converted_dir, ConvertOptions(family=SMALL[name].family, target_dialect="ms"))
    config = json.loads((folder / "base" / "config.json").read_text())
    (converted_dir / "config.json").write_text(json.dumps(config))
    assert run(folder / "base", converted_dir).exit_code == 0
    (converted_dir / "config.json").write_text(json.dumps(config | {field: value}))
    report = run(folder / "base", converted_dir)
    assert report.exit_code == 1
    assert depth(report).failed


def test_a_whole_model_is_compared_without_a_base_and_its_names_are_checked(work: Path, tmp_path: Path) -> None:
    folder = saved("qwen2", work)
    target = tmp_path / "base.ckpt"
    convert(folder / "base", target, ConvertOptions(family="llama", layout={"head": "tied"}))
    assert run(folder / "base", target).ok
    bad = rewritten(target, tmp_path / "bad.ckpt", {"attention.wk": "attention.wv"})
    report = run(folder / "base", bad, family="llama", layout={"head": "tied"})
    assert report.exit_code == 1
    short = rewritten(target, tmp_path / "short.ckpt", drop="model.norm_out")
    report = run(folder / "base", short, family="llama", layout={"head": "tied"})
    assert report.exit_code == 1
    missing = next(check for check in depth(report).checks if check.name.startswith("every parameter"))
    assert missing.where == ("model.norm_out.weight",)


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


def test_the_base_of_another_model_is_seen_in_a_merged_checkpoint(work: Path, tmp_path: Path) -> None:
    folder = saved("gpt2", work)
    build(SMALL["gpt2"], seed=9).save_pretrained(tmp_path / "other")
    convert(folder / "base", tmp_path / "base.ckpt", ConvertOptions(family="gpt2"))
    report = run(tmp_path / "other", tmp_path / "base.ckpt")
    assert report.exit_code == 1


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
    reason = refused(folder / "adapter", bare, odd, facts=said({"alpha": 10}), family="bert")
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
