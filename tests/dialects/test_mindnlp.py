"""MindNLP's adapter directories: files that 0.2.4 saved, files by the rules of 0.3.1 and 0.4.1, and ours for them."""

from __future__ import annotations

import json
from pathlib import Path

import mindspore
import numpy as np
import pytest
import torch
from peft_models import CASES, Dense, load
from safetensors.torch import load_file

from lorabridge import ConvertOptions, convert, inspect, open_checkpoint
from lorabridge.dialects.mindnlp import LATER, SHARED
from lorabridge.errors import MappingError
from lorabridge.formats.wire import record_header

REAL = Path(__file__).parent / "mindnlp_024"
EVERY = {
    "lora_bias": "no bias on the B factor",
    "trainable tokens": "replaces single rows",
    "conv": "no LoRA for conv",
    "conv dora": "no LoRA for conv",
    "grouped conv": "no LoRA for conv",
    "attention": "no LoRA for in_proj_weight",
    "attention bias": "no LoRA for in_proj_weight",
    "attention pattern": "no LoRA for in_proj_weight",
}
OLDEST = {
    **EVERY,
    "dora": "no DoRA",
    "embedding dora": "no DoRA",
    "layer_replication": "passes over",
    "pissa": "does not know",
    "olora": "does not know",
}
REFUSED = {("mindnlp", case): words for case, words in EVERY.items()}
REFUSED |= {("mindnlp-0.2", case): words for case, words in OLDEST.items()}
"""(release, case): what the error says."""


@pytest.fixture(autouse=True)
def no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mindspore.train.serialization, "_get_available_memory", lambda: None)


def test_what_mindnlp_saved_becomes_a_peft_adapter_of_the_same_effect(tmp_path: Path) -> None:
    """The fixture's logits were computed by MindNLP 0.2.4; transformers and peft have to agree from the files."""
    from peft import PeftModel
    from transformers import BertConfig, BertForSequenceClassification

    report = convert(REAL, tmp_path / "out")
    assert (report.source_dialect, report.source_format, report.target_dialect) == ("mindnlp", "mindspore", "peft")
    known = np.load(REAL / "outputs.npz")
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=24, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    state = {k.removeprefix("base:"): torch.from_numpy(known[k]) for k in known if k.startswith("base:")}
    lacking = model.load_state_dict(state, strict=False)
    assert (lacking.missing_keys, lacking.unexpected_keys) == ([], [])
    adapted = PeftModel.from_pretrained(model, str(tmp_path / "out")).eval()
    with torch.no_grad():
        logits = adapted(torch.from_numpy(known["ids"])).logits.numpy()
    assert np.abs(logits - known["logits"]).max() < 2e-6


def test_the_way_back_to_mindnlp_is_its_own_file(tmp_path: Path) -> None:
    convert(REAL, tmp_path / "out")
    back = convert(tmp_path / "out", tmp_path / "back")
    assert "restored bit for bit" in back.notes[0]
    ours = mindspore.load_checkpoint(str(tmp_path / "back" / "adapter_model.ckpt"))
    theirs = mindspore.load_checkpoint(str(REAL / "adapter_model.ckpt"))
    assert {n: v.asnumpy().tobytes() for n, v in ours.items()} == {n: v.asnumpy().tobytes() for n, v in theirs.items()}
    configs = [json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path / "back", REAL)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("release", ["mindnlp", "mindnlp-0.2"])
@pytest.mark.parametrize("name", list(CASES))
def test_peft_adapters_go_to_mindnlp_and_back(name: str, release: str, tmp_path: Path) -> None:
    case = CASES[name]
    adapted = case.adapted()
    adapted.save_pretrained(tmp_path / "peft")
    if (release, name) in REFUSED:
        with pytest.raises(MappingError, match=REFUSED[release, name]) as error:
            convert(tmp_path / "peft", tmp_path / "out", ConvertOptions(target_dialect=release))
        assert error.value.hint
        return
    convert(tmp_path / "peft", tmp_path / "out", ConvertOptions(target_dialect=release))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config) <= (LATER if release == "mindnlp" else SHARED)
    written = mindspore.load_checkpoint(str(tmp_path / "out" / "adapter_model.ckpt"))
    assert all(name.startswith("base_model.model.") for name in written)
    convert(tmp_path / "out", tmp_path / "restored")
    first, second = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("peft", "restored"))
    assert all(torch.equal(first[n], second[n]) for n in second)
    (tmp_path / "out" / "lorabridge.json").unlink()
    convert(tmp_path / "out", tmp_path / "plain", ConvertOptions(target_dialect="peft"))
    there = case.output(load(case, tmp_path / "plain"))
    expected = case.output(adapted)
    assert torch.equal(there, expected) or (release == "mindnlp-0.2" and torch.allclose(there, expected, atol=1e-5))


def old_ckpt(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write records as MindNLP 0.4.1 does: ``mindspore.float32`` for ``Float32``."""
    records = [
        record_header(name, value.shape, f"mindspore.{value.dtype.name}", value.nbytes) + value.tobytes()
        for name, value in tensors.items()
    ]
    path.write_bytes(b"".join(records))


@pytest.mark.parametrize("file", ["adapter_model.ckpt", "adapter_model.bin"])
def test_files_that_mindnlp_itself_cannot_load_again(tmp_path: Path, file: str) -> None:
    """0.4.1 stores types that MindSpore refuses; 0.3.1 calls its MindSpore file .bin."""
    rng = np.random.default_rng(3)
    stem = "base_model.model.layers.0.q"
    tensors = {
        f"{stem}.lora_A.weight": rng.standard_normal((2, 16)).astype(np.float16),
        f"{stem}.lora_B.weight": rng.standard_normal((24, 2)).astype(np.float32),
        f"{stem}.lora_magnitude_vector.weight": rng.standard_normal(24).astype(np.float32),
    }
    source = tmp_path / "old"
    source.mkdir()
    old_ckpt(source / file, tensors)
    with pytest.raises(ValueError, match=r"mindspore\.float|format must same"):
        mindspore.load_checkpoint(str(source / file))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["q"]}
    (source / "adapter_config.json").write_text(json.dumps(config))
    assert inspect(source).dialect == "mindnlp"
    convert(source, tmp_path / "out")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found[f"{stem}.lora_A.weight"].dtype == torch.float16
    assert (
        found[f"{stem}.lora_magnitude_vector"].numpy().tobytes()
        == tensors[f"{stem}.lora_magnitude_vector.weight"].tobytes()
    )
    convert(source, tmp_path / "fixed", ConvertOptions(target_dialect="mindnlp"))
    again = mindspore.load_checkpoint(str(tmp_path / "fixed" / "adapter_model.ckpt"))
    assert {n: v.asnumpy().tobytes() for n, v in again.items()} == {n: v.tobytes() for n, v in tensors.items()}


def adapted(tmp_path: Path, **config: object) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = {"r": 2, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["q", "k"], **config}
    get_peft_model(Dense(), LoraConfig(**settings)).save_pretrained(tmp_path / "peft")  # type: ignore[arg-type]
    return tmp_path / "peft"


def test_patterns_are_spelled_so_that_the_old_lookup_finds_them(tmp_path: Path) -> None:
    """0.3 and 0.4 take the first key that ends a path, for rank and alpha alike."""
    source = adapted(tmp_path, rank_pattern={"q": 4}, alpha_pattern={"layers.1.q": 5, "k": 7})
    convert(source, tmp_path / "out", ConvertOptions(target_dialect="mindnlp"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    import re
    from itertools import chain

    def looked_up(path: str) -> tuple[int, int]:  # tuners/lora/model.py, _create_and_replace
        keys = list(chain(config["rank_pattern"], config["alpha_pattern"]))
        key = next(filter(lambda key: re.match(rf".*\.{key}$", path), keys), path)
        return config["rank_pattern"].get(key, config["r"]), config["alpha_pattern"].get(key, config["lora_alpha"])

    assert [looked_up(f"layers.{i}.{m}") for i in (0, 1) for m in "qk"] == [(4, 6), (2, 7), (4, 5), (2, 7)]


def test_one_rank_and_alpha_for_the_oldest_release(tmp_path: Path) -> None:
    source = adapted(tmp_path, rank_pattern={"q": 4}, alpha_pattern={"q": 12}, use_rslora=False)
    report = convert(source, tmp_path / "out", ConvertOptions(target_dialect="mindnlp-0.2"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 12)
    assert {module.rank for module in report.modules} == {4}


def test_exclusions_are_spelled_out(tmp_path: Path) -> None:
    source = adapted(tmp_path, exclude_modules=["layers.0.q"])
    convert(source, tmp_path / "out", ConvertOptions(target_dialect="mindnlp"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["layers.0.k", "layers.1.k", "layers.1.q"]
    assert "exclude_modules" not in config


@pytest.mark.parametrize(
    ("config", "release", "words"),
    [
        ({"init_lora_weights": "olora"}, "mindnlp-0.2", "does not know init_lora_weights='olora'"),
        ({"init_lora_weights": "pissa"}, "mindnlp-0.2", "changed the base"),
        ({"use_dora": True}, "mindnlp-0.2", "no DoRA"),
        ({"lora_bias": True}, "mindnlp", "no bias on the B factor"),
    ],
)
def test_refusals_name_the_cure(tmp_path: Path, config: dict[str, object], release: str, words: str) -> None:
    source = adapted(tmp_path, **config)
    with pytest.raises(MappingError, match=words) as error:
        convert(source, tmp_path / "out", ConvertOptions(target_dialect=release))
    assert "merge" in error.value.hint
    assert not (tmp_path / "out").exists()


def test_saved_modules_that_mindnlp_would_misplace_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = torch.nn.ModuleDict({"score_proj": torch.nn.Linear(4, 4), "score": torch.nn.Linear(4, 2)})
    config = LoraConfig(r=2, target_modules=["score_proj"], modules_to_save=["score"])
    get_peft_model(model, config).save_pretrained(tmp_path / "peft")
    with pytest.raises(MappingError, match="a part of a name") as error:
        convert(tmp_path / "peft", tmp_path / "out", ConvertOptions(target_dialect="mindnlp"))
    assert "score_proj.lora_A.weight" in error.value.text()


def test_a_whole_wrapped_state_dict_in_an_npz_is_read(tmp_path: Path) -> None:
    """MindNLP's OCR trainer saves ``np.savez(**model.state_dict())`` of the wrapped model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(Dense(), LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=["q", "k"]))
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "adapter_model.npz", **{n: t.numpy() for n, t in model.state_dict().items()})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "lora_dropout": 0.05, "target_modules": ["q", "k"],
              "task_type": "CAUSAL_LM"}  # fmt: skip
    (tmp_path / "npz" / "adapter_config.json").write_text(json.dumps(config))
    with open_checkpoint(tmp_path / "npz") as checkpoint:
        assert checkpoint.format == "npz"
        assert len(checkpoint) == len(model.state_dict())
    report = convert(tmp_path / "npz", tmp_path / "out", ConvertOptions(target_dialect="peft", adapter_only=True))
    assert (report.source_format, report.source_dialect) == ("npz", "peft")
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    expected = {n.replace(".default", ""): t for n, t in model.state_dict().items() if "lora_" in n}
    assert set(found) == set(expected)
    assert all(torch.equal(found[n], expected[n]) for n in found)
