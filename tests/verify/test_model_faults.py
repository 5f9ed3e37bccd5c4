"""Depth model must see faults: names exchanged, modules missing, another alpha, another config, another model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_runs import depth, rewritten, run, said, saved
from small import SMALL, build

from lorabridge.actions.convert import ConvertOptions, convert


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model_faults")


FAULTS = [
    ("gpt2", {"attention.dense1": "attention.dense2"}, "?"),
    ("bert", {"attention.dense1": "attention.dense2"}, "?"),
    ("llama", {"attention.wq": "attention.wk"}, "?"),
    ("llama", {"feed_forward.w1": "feed_forward.w3"}, "?"),
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
    report = run(folder / "adapter", bad, folder / "base", facts=said(**facts), family=SMALL[name].family)
    assert report.exit_code == 1
    found = depth(report)
    assert found.failed
    assert max(row.ratio for row in found.failed if row.ratio is not None) > 100
    assert report.verdict == "different"


def test_a_wrong_alpha_is_seen(work: Path, tmp_path: Path) -> None:
    folder = saved("gpt2", work)
    bad = rewritten(folder / "out.ckpt", tmp_path / "bad.ckpt")
    report = run(folder / "adapter", bad, folder / "base", facts=said(alpha=11), family="gpt2")
    assert report.exit_code == 1


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


def test_the_base_of_another_model_is_seen_in_a_merged_checkpoint(work: Path, tmp_path: Path) -> None:
    folder = saved("gpt2", work)
    build(SMALL["gpt2"], seed=9).save_pretrained(tmp_path / "other")
    convert(folder / "base", tmp_path / "base.ckpt", ConvertOptions(family="gpt2"))
    report = run(tmp_path / "other", tmp_path / "base.ckpt")
    assert report.exit_code == 1
