"""Depth layers on every kind of layer: peft and loralib against the MindSpore cells, and against each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import loralib
import numpy as np
import pytest
import torch
from adapters import Net, checked, configure, converted, edit, factor, notes, peft_adapter, randomise, stated
from torch import nn

from lorabridge.actions.layer_bounds import Rounded, layer_bound
from lorabridge.actions.layer_side import Base
from lorabridge.actions.sides import Side
from lorabridge.actions.verify_report import VerifyReport
from lorabridge.dialects.adapter import Fact, Facts


def layers_equal(report: VerifyReport, count: int) -> None:
    found = report.depth("layers")
    assert found is not None
    assert found.ok, report.summary()
    assert len([row for row in found.modules if row.ok]) == count
    for row in found.modules:
        assert row.max_abs is not None
        assert row.ratio is not None
        assert row.cosine is not None
        assert row.cosine > 0.999999
        assert row.ratio < 1
        assert row.elements > 0


PEFT = {
    "linear": {"target_modules": ["q_proj", "up"]},
    "patterns": {"rank_pattern": {"up": 6}, "alpha_pattern": {r"0\.q_proj": 3, "up": 5},
                 "target_modules": ["q_proj", "up"]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "up"], "use_dora": True},
    "lora_bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "embedding": {"target_modules": ["tokens"]},
    "embedding dora": {"target_modules": ["tokens"], "use_dora": True},
    "conv": {"target_modules": ["line", "image", "volume"]},
    "conv dora": {"target_modules": ["line", "image", "volume"], "use_dora": True},
    "conv groups": {"target_modules": ["grouped"]},
}  # fmt: skip
COUNTS = {"linear": 4, "patterns": 4, "rslora": 2, "dora": 4, "lora_bias": 4, "embedding": 1, "embedding dora": 1,
          "conv": 3, "conv dora": 3, "conv groups": 1}  # fmt: skip


@pytest.mark.parametrize("name", list(PEFT))
def test_peft_against_cells(name: str, tmp_path: Path) -> None:
    source = peft_adapter(tmp_path / "peft", **PEFT[name])
    target = converted(source, tmp_path / "out.ckpt")
    layers_equal(checked(source, target, "layers"), COUNTS[name])


@pytest.mark.parametrize("name", ["linear", "dora", "embedding dora", "conv", "conv groups", "lora_bias", "conv dora"])
def test_a_scaling_off_by_a_hundredth_is_seen_everywhere(name: str, tmp_path: Path) -> None:
    """The bounds are sharp enough for every kind of layer."""
    source = peft_adapter(tmp_path / "peft", **PEFT[name])
    target = converted(source, tmp_path / "out.ckpt")
    configure(source, lora_alpha=8.08)
    found = checked(source, target, "layers").depth("layers")
    assert found is not None
    assert [row.ok for row in found.modules] == [False] * COUNTS[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    """Half types are widened exactly, which is said; float64 runs as such."""

    def narrow(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import ml_dtypes

        kinds = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float64: np.float64}
        return {name: value.astype(kinds[dtype]) for name, value in tensors.items()}

    source = edit(peft_adapter(tmp_path / "peft"), narrow)
    report = checked(source, converted(source, tmp_path / "out.ckpt"), "layers")
    layers_equal(report, 6)
    found = report.depth("layers")
    assert found is not None
    said = [text for text in found.proved if "widened" in text]
    assert bool(said) == (dtype != torch.float64)
    if dtype == torch.float64:
        assert all(row.max_abs is not None and row.max_abs < 1e-13 for row in found.modules)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_conversion_that_rounded_is_held_against_one_rounding(dtype: str, tmp_path: Path) -> None:
    source = peft_adapter(tmp_path / "peft")
    target = converted(source, tmp_path / "out.ckpt", dtype=dtype)
    report = checked(source, target)
    assert report.verdict == "equal"
    found = report.depth("layers")
    assert found is not None
    assert all(row.max_abs is not None and row.max_abs > 1e-5 for row in found.modules)
    configure(source, lora_alpha=8.4)
    assert not checked(source, target, "layers").ok


def test_compressed_layers_are_not_compared(tmp_path: Path) -> None:
    source = peft_adapter(tmp_path / "peft")
    report = checked(source, converted(source, tmp_path / "out.ckpt", compress="2"))
    assert report.verdict == "equal"
    found = report.depth("layers")
    assert found is not None
    assert {(row.ok, row.note.partition(":")[0]) for row in found.modules} == {(None, "compressed on purpose")}


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


LORALIB: dict[str, tuple[Callable[[], nn.Module], dict[str, object]]] = {
    "linear": (lambda: loralib.Linear(12, 20, r=4, lora_alpha=6), {"alpha": 6, "kind": "linear"}),
    "fan_in_fan_out": (
        lambda: loralib.Linear(12, 20, r=4, lora_alpha=6, fan_in_fan_out=True),
        {"alpha": 6, "kind": "linear", "fan_in_fan_out": True},
    ),
    "merged": (
        lambda: loralib.MergedLinear(12, 36, r=4, lora_alpha=6, enable_lora=[True, False, True]),
        {"alpha": 6, "kind": "linear", "enable_lora": [True, False, True]},
    ),
    "embedding": (lambda: loralib.Embedding(30, 8, r=4, lora_alpha=6), {"alpha": 6, "kind": "embedding"}),
    "conv2d": (
        lambda: loralib.Conv2d(4, 6, 3, r=2, lora_alpha=8),
        {"alpha": 8, "kind": "conv2d", "kernel_size": [3, 3]},
    ),
    "conv2d grouped": (
        lambda: loralib.Conv2d(4, 6, 3, r=2, lora_alpha=8, groups=2),
        {"alpha": 8, "kind": "conv2d", "kernel_size": [3, 3], "groups": 2},
    ),
}  # fmt: skip


def loralib_adapter(path: Path, name: str) -> tuple[Path, Facts]:
    build, facts = LORALIB[name]
    torch.manual_seed(0)
    torch.save(loralib.lora_state_dict(randomise(One(build()))), path)
    return path, stated(**facts)


@pytest.mark.parametrize("name", list(LORALIB))
def test_loralib_against_cells(name: str, tmp_path: Path) -> None:
    source, facts = loralib_adapter(tmp_path / "lora.pt", name)
    target = converted(source, tmp_path / "out.ckpt", facts=facts)
    layers_equal(checked(source, target, "layers", facts=facts), 1)


@pytest.mark.parametrize("name", ["linear", "merged", "embedding", "conv2d"])
def test_loralib_against_peft(name: str, tmp_path: Path) -> None:
    """Both sides run in torch, each with its own library; ranks grow and conv factors change their form."""
    source, facts = loralib_adapter(tmp_path / "lora.pt", name)
    target = converted(source, tmp_path / "peft", facts=facts, target_dialect="peft")
    report = checked(source, target, facts=facts)
    layers_equal(report, 1)
    assert report.verdict == "equal"


def test_a_wrong_mask_of_a_merged_linear(tmp_path: Path) -> None:
    source, facts = loralib_adapter(tmp_path / "lora.pt", "merged")
    target = converted(source, tmp_path / "out.ckpt", facts=facts)
    (target.with_name("out.ckpt.lorabridge.json")).unlink()
    wrong = Facts((Fact("*", "alpha", 6), Fact("*", "kind", "linear"), Fact("*", "enable_lora", [True, True, False])))
    from lorabridge.actions import verify_inputs

    opened = verify_inputs.opened

    def other(role: str, path: Path, options: verify_inputs.VerifyOptions, base: Side | None = None) -> Side:
        return opened(role, path, options if role == "SRC" else verify_inputs.VerifyOptions(facts=wrong), base)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorabridge.actions.verify.opened", other)
        report = checked(source, target, "tensors", "layers", facts=facts)
    assert [report.depth(depth).ok for depth in ("tensors", "layers")] == [False, False]


def test_mindpet_layers(tmp_path: Path) -> None:
    """Different alphas are folded into B for MindPet, which knows one."""
    source = peft_adapter(tmp_path / "peft", alpha_pattern={"k_proj": 16, "v_proj": 12})
    target = converted(source, tmp_path / "out.ckpt", target_dialect="mindpet")
    report = checked(source, target)
    assert report.verdict == "equal"
    layers_equal(report, 6)
    edit(
        source,
        lambda tensors: tensors.update(
            {factor("layers.0.v_proj", "B"): tensors[factor("layers.0.v_proj", "B")] * 1.01}
        ),
    )
    assert "layers.0.v_proj" in notes(checked(source, target, "layers"), "layers")


def test_a_fused_projection_is_compared_part_by_part(tmp_path: Path) -> None:
    """GPT-2's c_attn is one Conv1D in transformers and three cells in MindFormers' names; with and without base."""
    from transformers import GPT2Config, GPT2LMHeadModel

    fields = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 20, "n_positions": 8}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**fields, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path / "base")
    source = peft_adapter(
        tmp_path / "peft", model, target_modules=["c_attn", "c_proj", "wte"], fan_in_fan_out=True, use_dora=True
    )
    target = converted(source, tmp_path / "out.ckpt", family="gpt2", config=tmp_path / "base" / "config.json")
    layers_equal(checked(source, target, "layers"), 6)
    layers_equal(checked(source, target, "layers", base=tmp_path / "base"), 6)
    converted(tmp_path / "base", tmp_path / "ms", family="gpt2")
    report = checked(target, source, "layers", base=tmp_path / "ms")
    layers_equal(report, 6)
    assert {row.origin for row in report.depths[1].modules if "dense" in row.path} == {"transformer.h.0.attn.c_attn"}


def test_attention_projections_are_left_to_the_files(tmp_path: Path) -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.after = nn.MultiheadAttention(16, 2), nn.Linear(16, 16)

    source = peft_adapter(tmp_path / "peft", Attending(), target_modules=["attention", "after"])
    report = checked(source, converted(source, tmp_path / "out.ckpt"))
    assert report.verdict == "equal"
    found = report.depth("layers")
    assert found is not None
    assert {row.path: row.ok for row in found.modules} == {"after": True, "attention": None, "attention.out_proj": None}
    assert "2 not compared" in report.summary()


def test_a_base_of_other_shapes_is_a_finding(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    source = peft_adapter(tmp_path / "peft", target_modules=["up"])
    target = converted(source, tmp_path / "out.ckpt")
    weights = {f"layers.{i}.up.weight": np.ones((40, 25), np.float32) for i in range(2)}
    save_file(weights, tmp_path / "base.safetensors")
    report = checked(source, target, "layers", base=tmp_path / "base.safetensors")
    assert report.verdict == "different"
    assert "[40, 25]" in notes(report, "layers")


def test_inputs_and_frozen_weights_follow_the_seed(tmp_path: Path) -> None:
    source = peft_adapter(tmp_path / "peft", target_modules=["up"])
    target = converted(source, tmp_path / "out.ckpt")
    bounds = [checked(source, target, "layers", seed=seed).depths[1].modules[0].bound for seed in (0, 0, 1)]
    assert bounds[0] == bounds[1] != bounds[2]


def test_the_bound_holds_for_a_naive_sum_in_half_precision() -> None:
    """The bound is a theorem about any order of additions: float16 sums term by term keep to it, and come near it."""
    from lorabridge.axes import Read
    from lorabridge.dialects.adapter import LoraModule, Scaling, Term
    from lorabridge.dtypes import BY_NAME
    from lorabridge.tensors import TensorSpec

    rng = np.random.default_rng(0)
    half = BY_NAME["float16"]
    a, b = (rng.uniform(0.5, 1, shape).astype(np.float16) for shape in ((3, 64), (5, 3)))
    weight, x = rng.uniform(0.5, 1, (5, 64)).astype(np.float16), rng.uniform(0.5, 1, (1, 64)).astype(np.float16)

    class Memory:
        path = Path("memory")
        specs: ClassVar = {"a": TensorSpec("a", half, (3, 64)), "b": TensorSpec("b", half, (5, 3))}

        def read(self, name: str, rows: object = None) -> np.ndarray:
            return {"a": a, "b": b}[name].view(np.uint16)

    module = LoraModule(
        "m", "linear", 5, (Term(Read("a", half, (3, 64)), Read("b", half, (5, 3)), 0, 5),), Scaling(6, 3)
    )
    bound, _ = layer_bound(module, Memory(), Base(weight, None), x, half, Rounded())  # type: ignore[arg-type]

    def dot(rows: np.ndarray, y: np.ndarray) -> np.ndarray:
        total = np.zeros(len(rows), np.float16)
        for i in range(rows.shape[1]):
            total = (total + rows[:, i] * y[i]).astype(np.float16)
        return total

    computed = dot(weight, x[0]) + np.float16(2) * dot(b, dot(a, x[0]))
    exact = weight.astype(float) @ x[0].astype(float) + 2 * (b.astype(float) @ (a.astype(float) @ x[0].astype(float)))
    error = np.abs(computed.astype(float) - exact)
    assert (error <= bound[0]).all()
    assert (error > 0.01 * bound[0]).any()


def test_the_net_has_every_kind() -> None:
    assert {type(layer).__name__ for layer in Net().children()} >= {"Embedding", "Conv1d", "Conv2d", "Conv3d"}
