"""Unmerging: with the undo file the base's bits come back; without it, what is said about the result is true."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import DTYPES, adapter, bits, gpt2, plain_adapter, plain_model

from lorabridge.actions.base_check import UNMERGED_KEY
from lorabridge.actions.merge import merge
from lorabridge.actions.merge_inputs import MergeOptions
from lorabridge.actions.switch import switch
from lorabridge.actions.undo import UndoSummary, UndoWriter
from lorabridge.actions.unmerge import unmerge
from lorabridge.errors import DifferentError, InputError, LorabridgeError, MappingError, OutputError

by_type = pytest.mark.parametrize("dtype", DTYPES)


def merged_with_undo(
    base: Path, adapters: list[Path], out: Path | str, undo: Path, **options: object
) -> UndoSummary:  # fmt: skip
    given = MergeOptions(**options)  # type: ignore[arg-type]
    writer = UndoWriter(undo, given)
    merge(base, adapters, out, given, watch=writer)
    assert writer.summary is not None
    return writer.summary


def adversarial(dtype: str, rows: int, columns: int) -> torch.Tensor:
    """Return numbers of every kind that a merge takes: subnormals, zeros of both signs, infinities, NaN payloads."""
    rng = np.random.default_rng(3)
    width = 32 if dtype == "float32" else 16
    raw = rng.integers(0, 1 << width, (rows, columns), dtype=np.uint64).astype(f"u{width // 8}")
    raw[: rows // 4] &= raw.dtype.type(0x7F)  # subnormals
    raw[rows // 4 : rows // 2] &= raw.dtype.type(1 << (width - 1))  # zeros
    found = torch.from_numpy(raw.view(f"i{width // 8}")).view(DTYPES[dtype])
    large = found.float().abs() > 1e4
    return torch.where(large & found.isfinite(), torch.tensor(-0.0, dtype=found.dtype), found)


@by_type
@pytest.mark.parametrize("size", [1e-7, 1e-2, 1e2])
def test_adversarial_weights_come_back_bit_for_bit(tmp_path: Path, dtype: str, size: float) -> None:
    rng = np.random.default_rng(1)
    base = plain_model(
        tmp_path / "base.safetensors",
        {"a.weight": adversarial(dtype, 96, 80), "b.weight": torch.randn(80, 96).to(DTYPES[dtype]) * 0.02},
    )
    factors = {
        "a": (rng.standard_normal((4, 80), np.float32), rng.standard_normal((96, 4), np.float32) * size),
        "b": (rng.standard_normal((4, 96), np.float32), rng.standard_normal((80, 4), np.float32) * size),
    }
    given = plain_adapter(tmp_path / "adapter", factors)
    merged_with_undo(base, [given], tmp_path / "out.safetensors", tmp_path / "u")
    assert bits(tmp_path / "out.safetensors") != bits(base)
    done = unmerge(tmp_path / "out.safetensors", [given], tmp_path / "back.safetensors", undo=tmp_path / "u")
    assert done.exact
    assert set(done.restored) == {"a.weight", "b.weight"}
    assert bits(tmp_path / "back.safetensors") == bits(base)


KINDS: dict[str, dict[str, object]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 8},
    "dora": {"use_dora": True},
    "biases": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "embedding": {"target_modules": ["wte", "c_attn"]},
    "head": {"target_modules": ["lm_head", "c_attn"], "fan_in_fan_out": False},
    "replaced": {"modules_to_save": ["ln_f", "wpe"]},
    "tokens": {"trainable_token_indices": {"wte": [3, 7, 8]}},
    "patterns": {"rank_pattern": {"c_proj": 2}, "alpha_pattern": {"c_attn": 3}},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {dtype: gpt2(folder / dtype, dtype) for dtype in DTYPES}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_bit_for_bit(tmp_path: Path, bases: dict[str, Path], kind: str) -> None:
    base = bases[["bfloat16", "float16", "float32"][list(KINDS).index(kind) % 3]]
    given = adapter(base, tmp_path / "adapter", **KINDS[kind])
    summary = merged_with_undo(base, [given], tmp_path / "merged", tmp_path / "u")
    assert bits(tmp_path / "merged") != bits(base)
    assert bool(summary.whole) == (kind in ("dora", "biases", "replaced", "tokens"))
    done = unmerge(tmp_path / "merged", [given], tmp_path / "back", undo=tmp_path / "u")
    assert done.exact
    assert bits(tmp_path / "back") == bits(base)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((base / "config.json").read_text())
    assert not (tmp_path / "back/lorabridge.json").exists(), "the base is no merged model"


def test_several_adapters_with_weights_come_back(tmp_path: Path, bases: dict[str, Path]) -> None:
    base = bases["bfloat16"]
    both = [adapter(base, tmp_path / f"a{seed}", seed=seed) for seed in (1, 2)]
    merged_with_undo(base, both, tmp_path / "merged", tmp_path / "u", weights=(0.7, -1.5), exact=True)
    unmerge(tmp_path / "merged", both, tmp_path / "back", undo=tmp_path / "u")
    assert bits(tmp_path / "back") == bits(base)
    with pytest.raises(MappingError, match="not that of this merged model"):
        unmerge(tmp_path / "merged", both[::-1], tmp_path / "no", undo=tmp_path / "u")
    with pytest.raises(InputError, match="2 adapters were merged, 1 are given"):
        unmerge(tmp_path / "merged", both[:1], tmp_path / "no", undo=tmp_path / "u")


@pytest.mark.parametrize("kind", ["plain", "replaced", "dora"])
def test_a_model_merged_into_the_other_frameworks_file_comes_back(
    tmp_path: Path, bases: dict[str, Path], kind: str
) -> None:
    base = bases["bfloat16"]
    given = adapter(base, tmp_path / "adapter", **KINDS[kind])
    merged_with_undo(base, [given], tmp_path / "merged.ckpt", tmp_path / "u", family="gpt2")
    options = MergeOptions(family="gpt2", config=base / "config.json")
    unmerge(tmp_path / "merged.ckpt", [given], f"{tmp_path}/back/", options, undo=tmp_path / "u")
    assert bits(tmp_path / "back") == bits(base)


@pytest.mark.parametrize("workers", [1, 3])
def test_blocks_and_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr("lorabridge.conversion.tasks.MERGED", 50_000)
    monkeypatch.setattr("lorabridge.merging.undo.BLOCK", 50_000)
    rng = np.random.default_rng(workers)
    base = plain_model(tmp_path / "b.safetensors", {"a.weight": (torch.randn(700, 300) * 0.02).to(torch.bfloat16)})
    factors = {"a": (rng.standard_normal((4, 300), np.float32), rng.standard_normal((700, 4), np.float32) * 1e-3)}
    given = plain_adapter(tmp_path / "adapter", factors)
    options = MergeOptions(workers=workers)
    merged_with_undo(base, [given], tmp_path / "m.safetensors", tmp_path / "u", workers=workers)
    merged_with_undo(base, [given], tmp_path / "n.safetensors", tmp_path / "v", workers=4 - workers)
    assert (tmp_path / "u").read_bytes() == (tmp_path / "v").read_bytes()
    unmerge(tmp_path / "m.safetensors", [given], tmp_path / "r.safetensors", options, undo=tmp_path / "u")
    assert bits(tmp_path / "r.safetensors") == bits(base)


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Return a base, an adapter and their merge, with the undo file ``u``."""
    rng = np.random.default_rng(8)
    weights = {name: (torch.randn(256, 128) * 0.02).to(torch.bfloat16) for name in ("a.weight", "b.weight")}
    base = plain_model(tmp_path / "base.safetensors", {**weights, "norm.weight": torch.ones(128)})
    factors = {
        path: (rng.standard_normal((4, 128), np.float32), rng.standard_normal((256, 4), np.float32) * 1e-3)
        for path in ("a", "b")
    }
    given = plain_adapter(tmp_path / "adapter", factors)
    merged_with_undo(base, [given], tmp_path / "merged.safetensors", tmp_path / "u")
    return base, given, tmp_path / "merged.safetensors"


def test_another_adapter_is_refused(tmp_path: Path, small: tuple[Path, Path, Path]) -> None:
    _, given, merged = small
    factors = load_file(given / "adapter_model.safetensors")
    first = next(iter(factors))
    factors[first].view(torch.int32)[0, 0] ^= 1
    other = tmp_path / "other"
    other.mkdir()
    save_file(factors, other / "adapter_model.safetensors")
    (other / "adapter_config.json").write_text((given / "adapter_config.json").read_text())
    with pytest.raises(MappingError, match="another delta was merged into it"):
        unmerge(merged, [other], tmp_path / "back.safetensors", undo=tmp_path / "u")
    config = json.loads((given / "adapter_config.json").read_text())
    (given / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 9}))
    with pytest.raises(MappingError, match="another delta was merged into it"):
        unmerge(merged, [given], tmp_path / "back.safetensors", undo=tmp_path / "u")
    assert not (tmp_path / "back.safetensors").exists()


@pytest.mark.parametrize("row", [0, 255])
def test_a_changed_merged_file_is_refused(tmp_path: Path, small: tuple[Path, Path, Path], row: int) -> None:
    _, given, merged = small
    tensors = load_file(merged)
    tensors["a.weight"].view(torch.int16)[row, 5] ^= 1
    save_file(tensors, merged, metadata={"format": "pt"})
    with pytest.raises((DifferentError, InputError)):
        unmerge(merged, [given], tmp_path / "back.safetensors", undo=tmp_path / "u")
    assert not (tmp_path / "back.safetensors").exists()


def test_the_base_itself_or_another_model_is_refused(tmp_path: Path, small: tuple[Path, Path, Path]) -> None:
    base, given, merged = small
    with pytest.raises(LorabridgeError):
        unmerge(base, [given], tmp_path / "back.safetensors", undo=tmp_path / "u")
    tensors = load_file(merged)
    tensors["a.weight"] = tensors["a.weight"].float()
    other = plain_model(tmp_path / "other.safetensors", tensors)
    with pytest.raises(MappingError, match=r"is float32 \(256, 128\), was bfloat16"):
        unmerge(other, [given], tmp_path / "back.safetensors", undo=tmp_path / "u")
    assert not (tmp_path / "back.safetensors").exists()


def test_a_damaged_undo_file_is_refused(tmp_path: Path, small: tuple[Path, Path, Path]) -> None:
    _, given, merged = small
    whole = (tmp_path / "u").read_bytes()
    for broken in (whole[:-1], whole[: len(whole) // 2], whole[:-40] + bytes([whole[-40] ^ 4]) + whole[-39:], b""):
        (tmp_path / "u").write_bytes(broken)
        with pytest.raises(InputError):
            unmerge(merged, [given], tmp_path / "back.safetensors", undo=tmp_path / "u")


def test_without_an_undo_file_the_result_is_never_called_exact(tmp_path: Path, small: tuple[Path, Path, Path]) -> None:
    base, given, merged = small
    done = unmerge(merged, [given], tmp_path / "near.safetensors")
    assert not done.exact
    assert done.warnings
    said = " ".join([done.summary(), *done.warnings, json.dumps(done.as_json())])
    assert "bit for bit" not in said
    assert "approximately" in done.summary()
    true, near = load_file(base), load_file(tmp_path / "near.safetensors")
    for row in done.rows:
        differ = true[row.parameter] != near[row.parameter]
        share = differ.double().mean().item()
        assert 0 < share <= row.blurred
        assert share == pytest.approx(row.wrong, rel=0.15)
        assert (true[row.parameter].double() - near[row.parameter].double()).abs().max().item() <= row.error
    assert torch.equal(true["norm.weight"], near["norm.weight"])
    with safe_open(tmp_path / "near.safetensors", "pt") as file:
        assert "not the base" in file.metadata()[UNMERGED_KEY]


def test_what_was_written_over_cannot_be_computed_back(tmp_path: Path, bases: dict[str, Path]) -> None:
    base = bases["float32"]
    given = adapter(base, tmp_path / "dora", **KINDS["dora"])
    merge(base, [given], tmp_path / "merged")
    with pytest.raises(MappingError, match="DoRA normalised it"):
        unmerge(tmp_path / "merged", [given], tmp_path / "no")
    other = adapter(base, tmp_path / "other", seed=5)
    with pytest.raises(MappingError, match="DoRA normalised it"):
        switch(tmp_path / "merged", [given], [other], tmp_path / "no")


def test_what_cannot_be_computed_back_is_named_and_stays_as_merged(tmp_path: Path, bases: dict[str, Path]) -> None:
    base = bases["float32"]
    given = adapter(base, tmp_path / "adapter", **KINDS["replaced"])
    merge(base, [given], tmp_path / "merged")
    with pytest.raises(MappingError, match="matches no parameter"):
        unmerge(tmp_path / "merged", [given], tmp_path / "no", MergeOptions(leave=("*wpe*", "nothing*")))
    done = unmerge(tmp_path / "merged", [given], tmp_path / "back", MergeOptions(leave=("*wpe*",)))
    said = next(text for text in done.warnings if "the adapter replaced it" in text)
    assert said.startswith("2 parameters as in the merged model, not as in the base")
    assert said.endswith(": transformer.ln_f.bias, transformer.ln_f.weight")
    assert set(done.left_merged) == {"transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"}
    assert any("as in the merged model" in warning for warning in done.warnings)
    back, merged = bits(tmp_path / "back"), bits(tmp_path / "merged")
    assert all(back[name] == merged[name] for name in done.left_merged)


def test_dora_says_what_is_gone_and_the_rest_can_be_restored(tmp_path: Path, bases: dict[str, Path]) -> None:
    base = bases["float32"]
    given = adapter(base, tmp_path / "adapter", use_dora=True)
    merge(base, [given], tmp_path / "merged")
    with pytest.raises(MappingError, match="the norm of each of its outputs in the base is gone") as error:
        unmerge(tmp_path / "merged", [given], tmp_path / "no")
    assert "--leave" in error.value.hint
    done = unmerge(tmp_path / "merged", [given], tmp_path / "back", MergeOptions(leave=("*.h.*",)))
    assert bits(tmp_path / "back") == bits(tmp_path / "merged")
    assert len(done.left_merged) == 6


@pytest.mark.parametrize("reached", ["wte", "lm_head"])
def test_an_untied_head_is_tied_again_and_the_untouched_matrix_is_exact(
    tmp_path: Path, bases: dict[str, Path], reached: str
) -> None:
    base = bases["bfloat16"]
    given = adapter(base, tmp_path / "adapter", target_modules=[reached], fan_in_fan_out=False)
    merge(base, [given], tmp_path / "merged")
    assert "lm_head.weight" in bits(tmp_path / "merged")
    unmerge(tmp_path / "merged", [given], tmp_path / "back")
    assert bits(tmp_path / "back") == bits(base)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((base / "config.json").read_text())


REPEATED = {"twice": [[0, 2], [0, 2]], "overlap": [[0, 1], [0, 2], [1, 2]], "turned": [[1, 2], [0, 1]]}


@pytest.mark.parametrize("case", REPEATED)
def test_repeated_layers_come_back(tmp_path: Path, bases: dict[str, Path], case: str) -> None:
    base = bases["bfloat16"]
    given = repeated(base, tmp_path / "adapter", REPEATED[case])
    summary = merged_with_undo(base, [given], tmp_path / "merged", tmp_path / "u")
    assert (summary.whole, summary.raw) == ((), ()), "the first copy of a layer gives it back"
    done = unmerge(tmp_path / "merged", [given], tmp_path / "back", undo=tmp_path / "u")
    assert done.exact
    assert bits(tmp_path / "back") == bits(base)
    config = json.loads((base / "config.json").read_text())
    assert json.loads((tmp_path / "back/config.json").read_text()) == config
    unmerge(tmp_path / "merged", [given], tmp_path / "near")
    true, near = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "near"))
    assert true.keys() == near.keys()
    assert all(torch.allclose(true[name].float(), near[name].float(), rtol=0.02, atol=1e-3) for name in true)
    assert json.loads((tmp_path / "near/config.json").read_text()) == config


def test_a_layer_that_was_left_out_comes_back_from_the_undo_file_alone(tmp_path: Path, bases: dict[str, Path]) -> None:
    base = bases["bfloat16"]
    given = repeated(base, tmp_path / "adapter", [[1, 2], [1, 2]])
    merged_with_undo(base, [given], tmp_path / "merged", tmp_path / "u")
    unmerge(tmp_path / "merged", [given], tmp_path / "back", undo=tmp_path / "u")
    assert bits(tmp_path / "back") == bits(base)
    with pytest.raises(MappingError, match="layers of the base are not in the merged model"):
        unmerge(tmp_path / "merged", [given], tmp_path / "no")


def repeated(base: Path, folder: Path, ranges: list[list[int]]) -> Path:
    """Write an adapter that repeats layers, as peft spells it; peft itself repeats those of Llama and a few others."""
    random = np.random.default_rng(6)
    count = sum(stop - start for start, stop in ranges)
    factors = {f"transformer.h.{i}.attn.c_attn": (random.standard_normal((4, 32), np.float32),
               random.standard_normal((96, 4), np.float32) * 0.01) for i in range(count)}  # fmt: skip
    made = plain_adapter(folder, factors)
    path = made / "adapter_config.json"
    said = {"layer_replication": ranges, "fan_in_fan_out": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    return made


def test_the_undo_file_is_small_for_a_usual_adapter(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    size = 1024
    base = plain_model(tmp_path / "b.safetensors", {"a.weight": (torch.randn(size, size) * 0.02).to(torch.bfloat16)})
    a = rng.uniform(-1, 1, (16, size)).astype(np.float32) * (3 / size) ** 0.5  # as peft starts it
    b = rng.standard_normal((size, 16)).astype(np.float32) * 1e-3  # as some thousand steps of training leave it
    given = plain_adapter(tmp_path / "adapter", {"a": (a, b)}, alpha=32)
    summary = merged_with_undo(base, [given], tmp_path / "m.safetensors", tmp_path / "u")
    assert summary.nbytes < 0.03 * summary.restores
    assert "2.10 MB" not in summary.sentence()


def test_an_existing_undo_file_is_kept_and_nothing_is_merged(tmp_path: Path, small: tuple[Path, Path, Path]) -> None:
    base, given, _ = small
    with pytest.raises(OutputError, match="the undo file exists"):
        merged_with_undo(base, [given], tmp_path / "again.safetensors", tmp_path / "u")
    assert not (tmp_path / "again.safetensors").exists()


def test_a_dry_run_writes_nothing(tmp_path: Path, small: tuple[Path, Path, Path]) -> None:
    _, given, merged = small
    done = unmerge(merged, [given], tmp_path / "no.safetensors", MergeOptions(dry_run=True), undo=tmp_path / "u")
    assert done.exact
    assert "would" in done.summary()
    assert not (tmp_path / "no.safetensors").exists()


def test_an_output_on_the_input_is_refused(tmp_path: Path, small: tuple[Path, Path, Path]) -> None:
    _, given, merged = small
    with pytest.raises(OutputError):
        unmerge(merged, [given], merged, MergeOptions(overwrite=True), undo=tmp_path / "u")
