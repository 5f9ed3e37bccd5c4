"""Extracting adapters from whole models, read back and merged by transformers and peft."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft_adapters import Net, apart
from safetensors.torch import load_file, save_file

from lorabridge.actions.extract import ExtractOptions, extract
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import InputError, LorabridgeError, MappingError, OutputError, UsageError


def two_models(folder: Path, changes: dict[str, float], rank: int = 2, dtype=torch.float32) -> tuple[Path, Path, Net]:
    """Save Net and a tuned copy in which each named parameter moved (matrices by a low-rank amount)."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    folder.mkdir(exist_ok=True)
    save_file(net.state_dict(), folder / "base.safetensors")
    with torch.no_grad():
        for name, size in changes.items():
            weight = net.get_parameter(name)
            delta = torch.randn(weight.shape)
            if weight.dim() > 1:
                flat = weight.flatten(1)
                delta = (torch.randn(flat.shape[0], rank) @ torch.randn(rank, flat.shape[1])).reshape(weight.shape)
            weight += (size * delta).to(dtype)
    save_file(net.state_dict(), folder / "tuned.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors", net


def merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Let peft load an adapter onto the base and merge it."""
    from peft import PeftModel

    torch.manual_seed(3)
    net = Net()
    net.load_state_dict(load_file(base))
    return PeftModel.from_pretrained(net, adapter).merge_and_unload().state_dict()


def test_a_low_rank_change_comes_back_through_peft(tmp_path: Path) -> None:
    names = ("q.weight", "k.weight", "emb.weight", "conv.weight", "k.bias", "head.weight", "head.bias")
    base, tuned, net = two_models(tmp_path, dict.fromkeys(names, 0.1))
    report = extract(base, tuned, tmp_path / "out", ExtractOptions(rank=2))
    assert {row.path: row.kind for row in report.modules} == {
        "q": "linear", "k": "linear", "head": "linear", "emb": "embedding", "conv": "conv2d",
    }  # fmt: skip
    assert all(row.energy > 1 - 1e-12 and row.rank == 2 for row in report.modules)
    assert report.beside == ("head.bias", "k.bias")
    assert report.unchanged == 2
    state, made = net.state_dict(), merged(base, tmp_path / "out")
    for name in state:
        assert torch.allclose(made[name], state[name], atol=1e-6), name


def test_norms_and_biases_without_factors_are_saved_whole(tmp_path: Path) -> None:
    base, tuned, net = two_models(tmp_path, {"q.weight": 0.1, "k.bias": 0.1})
    report = extract(base, tuned, tmp_path / "out", ExtractOptions(rank=2))
    assert report.beside == ("k.bias", "k.weight")
    made = merged(base, tmp_path / "out")
    assert torch.equal(made["k.bias"], net.k.bias)
    extract(base, tuned, tmp_path / "q", ExtractOptions(rank=2, exclude=("k",)))
    with pytest.raises(MappingError, match="no matrix changed"):
        extract(base, tuned, tmp_path / "saved", ExtractOptions(rank=2, save=("q",)))


def test_the_energy_decides_the_rank_and_the_residual_is_true(tmp_path: Path) -> None:
    base, tuned, net = two_models(tmp_path, {"q.weight": 0.1, "k.weight": 0.2}, rank=8)
    report = extract(base, tuned, tmp_path / "out", ExtractOptions(energy=0.9))
    made, before, state = merged(base, tmp_path / "out"), load_file(base), net.state_dict()
    for row in report.modules:
        name = f"{row.path}.weight"
        change = (state[name] - before[name]).double()
        found = (made[name] - before[name]).double()
        assert 1 <= row.rank < 8
        assert row.energy >= 0.9
        assert row.norm == pytest.approx(float(change.norm()), rel=1e-6)
        assert row.residual == pytest.approx(float((change - found).norm()), rel=1e-4)
        values = np.linalg.svd(change.numpy(), compute_uv=False)
        assert row.residual == pytest.approx(np.linalg.norm(values[row.rank :]), rel=1e-5)
    assert report.energy >= 0.9


def test_the_same_run_gives_the_same_bytes_and_a_dry_run_none(tmp_path: Path) -> None:
    base, tuned, _ = two_models(tmp_path, {"q.weight": 0.1}, rank=5)
    for name in ("one", "two"):
        extract(base, tuned, tmp_path / name, ExtractOptions(rank=3, seed=7))
    one, two = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two
    report = extract(base, tuned, tmp_path / "three", ExtractOptions(rank=3, dry_run=True))
    assert not (tmp_path / "three").exists()
    assert report.modules[0].energy < 1


def test_large_matrices_stream_and_sketch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorabridge.actions import extract as module
    from lorabridge.actions import sides

    monkeypatch.setattr(module, "KEPT_BYTES", 0)
    monkeypatch.setattr(sides, "BLOCK_BYTES", 100_000)
    rng = np.random.default_rng(0)
    base = rng.standard_normal((700, 600)).astype(np.float32)
    delta = (rng.standard_normal((700, 6)) @ rng.standard_normal((6, 600))).astype(np.float32)
    for name, weight in (("a", base), ("b", base + delta)):
        save_file({"x.q.weight": torch.from_numpy(weight)}, tmp_path / f"{name}.safetensors")
    report = extract(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "out", ExtractOptions(rank=6))
    assert report.modules[0].energy > 1 - 1e-10
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    a, b = (made[f"base_model.model.x.q.lora_{side}.weight"].double().numpy() for side in "AB")
    assert apart(b @ a, delta.astype(float)) < 1e-5


def test_transposed_weights_are_known_from_the_table_or_said(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=12, n_layer=2, n_head=2)
    model = GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for block in model.transformer.h:
            weight = block.attn.c_proj.weight
            weight += torch.randn(12, 2) @ torch.randn(2, 12)
    model.save_pretrained(tmp_path / "tuned")
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "out", ExtractOptions(rank=2))
    assert len(report.modules) == 2
    loaded = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "out")
    made, tokens = loaded.merge_and_unload().eval(), torch.arange(10)[None]
    state = model.state_dict()
    assert all(torch.allclose(made.state_dict()[name], state[name], atol=1e-5) for name in state)
    assert torch.allclose(made(tokens).logits, model.eval()(tokens).logits, atol=1e-4)


def test_a_mindspore_target_gets_mindspore_names(tmp_path: Path) -> None:
    from lorabridge import convert

    base, tuned, net = two_models(tmp_path, {"q.weight": 0.1})
    with pytest.raises(UsageError, match="other names"):
        extract(base, tuned, tmp_path / "out.ckpt", ExtractOptions(rank=2))
    extract(base, tuned, tmp_path / "out.ckpt", ExtractOptions(rank=2, family="identity"))
    convert(tmp_path / "out.ckpt", tmp_path / "back")
    assert torch.allclose(merged(base, tmp_path / "back")["q.weight"], net.q.weight, atol=1e-6)


def test_half_precision_models_and_factors(tmp_path: Path) -> None:
    base, tuned, _ = two_models(tmp_path, {"q.weight": 0.5}, dtype=torch.bfloat16)
    report = extract(base, tuned, tmp_path / "out", ExtractOptions(rank=2, dtype="bf16"))
    assert 0.99 < report.modules[0].energy < 1
    wide = {name: tensor.float() for name, tensor in load_file(tuned).items()}
    save_file(wide, tmp_path / "wide.safetensors")
    mixed = extract(base, tmp_path / "wide.safetensors", tmp_path / "mixed", ExtractOptions(rank=2))
    assert [row.path for row in mixed.modules] == ["q"]
    assert any("another type" in warning for warning in mixed.warnings)


def test_changes_that_no_adapter_holds_are_listed(tmp_path: Path) -> None:
    def save(name: str, **tensors: torch.Tensor) -> Path:
        save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / f"{name}.safetensors")
        return tmp_path / f"{name}.safetensors"

    weight = torch.eye(4)
    base = save("base", **{"q.weight": weight, "token": weight[0], "ids": torch.arange(3), "emb.weight": weight})
    tuned = save("tuned", **{"q.weight": weight + 1, "token": weight[1], "ids": torch.arange(3) + 1,
                             "emb.weight": torch.ones(5, 4), "new.weight": weight * 3})  # fmt: skip
    with pytest.raises(MappingError) as raised:
        extract(base, tuned, tmp_path / "out", ExtractOptions(rank=1))
    assert {place.partition(":")[0] for place in raised.value.where} == {
        "token", "ids", "emb.weight", "new.weight", "a parameter without a module"
    } - {"a parameter without a module"}  # fmt: skip
    report = extract(
        base, tuned, tmp_path / "out", ExtractOptions(rank=1, exclude=("token", "ids", "emb", "new"))
    )  # fmt: skip
    assert {name for name, _ in report.left_out} >= {"token", "ids", "emb.weight", "new.weight"}


def test_a_tied_copy_is_left_out_and_said(tmp_path: Path) -> None:
    weight = torch.randn(5, 4)
    for name, moved in (("base", weight), ("tuned", weight + torch.ones(5, 4))):
        tensors = {"emb.weight": moved, **({"head.weight": moved.clone()} if name == "tuned" else {})}
        save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / f"{name}.safetensors")
    report = extract(
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "out", ExtractOptions(rank=1)
    )
    assert [name for name, _ in report.left_out] == ["head.weight"]
    assert any("embedding by its name" in warning for warning in report.warnings)
    told = ExtractOptions(rank=1, facts=Facts((Fact("emb", "kind", "linear"),)))
    again = extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "lin", told)
    assert again.modules[0].kind == "linear"
    assert again.warnings == ()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (ExtractOptions(), UsageError),
        (ExtractOptions(rank=0), UsageError),
        (ExtractOptions(energy=1.5), UsageError),
        (ExtractOptions(rank=1, exclude=("nothing",)), MappingError),
        (ExtractOptions(rank=1, target_dialect="hf"), UsageError),
        (ExtractOptions(rank=1, dtype="int8"), UsageError),
    ],
)
def test_impossible_wishes_are_told(options: ExtractOptions, error: type[LorabridgeError], tmp_path: Path) -> None:
    base, tuned, _ = two_models(tmp_path, {"q.weight": 0.1})
    with pytest.raises(error):
        extract(base, tuned, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_inputs_are_checked(tmp_path: Path) -> None:
    base, tuned, net = two_models(tmp_path, {"q.weight": 0.1})
    with pytest.raises(InputError, match="do not differ"):
        extract(base, base, tmp_path / "out", ExtractOptions(rank=1))
    with pytest.raises(OutputError):
        extract(base, tuned, tuned, ExtractOptions(rank=1, target_dialect="loralib"))
    extract(base, tuned, tmp_path / "out", ExtractOptions(rank=1))
    with pytest.raises(InputError, match="whole models"):
        extract(base, tmp_path / "out", tmp_path / "again", ExtractOptions(rank=1))
    state = net.state_dict()
    state["q.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(InputError, match="not finite"):
        extract(base, tmp_path / "nan.safetensors", tmp_path / "nan", ExtractOptions(rank=1))
