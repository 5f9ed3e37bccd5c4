"""Depth tensors: conversions both ways, adapters without a manifest, whole models; nothing but numpy is needed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import Net, checked, configure, converted, edit, factor, notes, peft_adapter, stated, without_manifest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge.actions import bounds
from lorabridge.actions.thin import Thin, difference, norm
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import UsageError

ALPHA = stated(alpha=8)


def tensors_ok(source: Path, target: Path, **options: object):
    report = checked(source, target, "tensors", **options)
    assert report.verdict == "equal", report.summary()
    found = report.depth("tensors")
    assert found is not None
    return report, found


CONVERSIONS = {
    "plain": ({}, {}),
    "dtype": ({}, {"dtype": "bf16"}),
    "wider": ({}, {"dtype": "fp64"}),
    "compressed": ({}, {"compress": "2"}),
    "selected": ({}, {"include": ("*.0.*",)}),
    "one alpha for all": ({"alpha_pattern": {"k_proj": 16, "v_proj": 12}}, {"target_dialect": "mindpet"}),
    "dora": ({"use_dora": True}, {}),
    "whole modules beside": ({"modules_to_save": ["up"]}, {}),
    "biases": ({"bias": "lora_only"}, {}),
    "convolutions": ({"target_modules": ["line", "image", "grouped", "volume", "tokens"]}, {}),
}


@pytest.mark.parametrize("name", list(CONVERSIONS))
def test_a_conversion_holds_in_both_orders(name: str, tmp_path: Path) -> None:
    made, asked = CONVERSIONS[name]
    source = peft_adapter(tmp_path / "peft", **made)
    target = converted(source, tmp_path / "out.ckpt", **asked)
    for one, other in ((source, target), (target, source)):
        report, found = tensors_ok(one, other)
        assert report.relation == "conversion"
        assert {check.name for check in found.checks} >= {
            "plan", "every source tensor is accounted for", "every target tensor is produced",
            "forward: SRC's bits make DST's", "backward: DST's bits make SRC's", "recorded checksums",
        }  # fmt: skip
        assert found.modules


def test_a_safetensors_target_and_the_restored_source(tmp_path: Path) -> None:
    """A manifest in the metadata counts as well; the way back leaves none, and compares as an adapter."""
    source = peft_adapter(tmp_path / "peft")
    target = converted(source, tmp_path / "out.safetensors", target_dialect="loralib-ms")
    back = converted(target, tmp_path / "back", target_dialect="peft")
    assert tensors_ok(source, target)[0].relation == "conversion"
    assert tensors_ok(target, back)[0].relation == "conversion"
    report, found = tensors_ok(source, back)
    assert report.relation == "adapters"
    assert all(row.max_abs == 0 for row in found.modules)


@pytest.mark.parametrize("name", ["plain", "dora", "biases", "whole modules beside", "dtype", "wider"])
def test_adapters_without_a_manifest(name: str, tmp_path: Path) -> None:
    made, asked = CONVERSIONS[name]
    source = peft_adapter(tmp_path / "peft", **made)
    target = without_manifest(converted(source, tmp_path / "out.ckpt", **asked))
    report, found = tensors_ok(source, target, facts=ALPHA)
    assert report.relation == "adapters"
    assert {row.note for row in found.modules} == ({"rounded once"} if name == "dtype" else {""})
    if name != "dtype":
        assert tensors_ok(target, source, facts=ALPHA)


def test_a_folded_scaling_is_equal_and_rounded_once(tmp_path: Path) -> None:
    source = peft_adapter(tmp_path / "peft", alpha_pattern={"k_proj": 16, "v_proj": 12})
    target = without_manifest(converted(source, tmp_path / "out.ckpt", target_dialect="mindpet"))
    alpha = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["lora_alpha"]
    _, found = tensors_ok(source, target, facts=stated(alpha=alpha))
    said = {row.path.rpartition(".")[2]: (row.note, row.max_abs) for row in found.modules}
    assert said["q_proj"] == said["k_proj"] == ("", 0)  # 16 is 8 times a power of two
    assert said["v_proj"][0] == "rounded once"
    assert 0 < said["v_proj"][1] < 1e-6

    def bump(tensors: dict[str, np.ndarray]) -> None:
        tensors[factor("layers.0.v_proj", "B")][5, 2] *= np.float32(1 + 4e-7)

    edit(source, bump)
    assert not checked(source, target, "tensors", facts=stated(alpha=alpha)).ok


def test_other_factorizations_of_the_same_delta(tmp_path: Path) -> None:
    """Factors turned by an orthogonal matrix are equal to within rounding; turned by another one they are not."""
    source = peft_adapter(tmp_path / "peft")
    target = without_manifest(converted(source, tmp_path / "out.ckpt", dtype="fp64"))
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))

    def turned(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {n: (turn @ t if "lora_A" in n else t @ turn.T) for n, t in tensors.items()}

    edit(source, lambda t: {n: v.astype(np.float64) for n, v in t.items()})
    edit(source, turned)
    _, found = tensors_ok(source, target, facts=ALPHA)
    assert {row.note for row in found.modules} == {"another factorization"}
    assert all(row.ratio < 0.1 and row.max_abs < 1e-14 for row in found.modules)
    edit(source, lambda t: {n: v * (1 + 1e-6) if "lora_A" in n else v for n, v in t.items()})
    report = checked(source, target, "tensors", facts=ALPHA)
    assert len(report.depths[0].failed) == 6
    assert "DST's delta is" in notes(report, "tensors")


def test_grown_ranks_and_conv_forms(tmp_path: Path) -> None:
    """loralib's MergedLinear and convolution against peft's single pairs, without a manifest."""
    import loralib
    from torch import nn

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fused = loralib.MergedLinear(12, 36, r=4, lora_alpha=6, enable_lora=[True, False, True])
            self.image = loralib.Conv2d(4, 6, 3, r=4, lora_alpha=6)

    torch.manual_seed(0)
    net = Both()
    for name, parameter in net.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    torch.save(loralib.lora_state_dict(net), tmp_path / "lora.pt")
    facts = Facts((
        Fact("fused", "enable_lora", [True, False, True]), Fact("image", "kind", "conv2d"),
        Fact("image", "kernel_size", [3, 3]), Fact("*", "kind", "linear"), Fact("*", "alpha", 6),
    ))  # fmt: skip
    target = converted(tmp_path / "lora.pt", tmp_path / "peft", facts=facts, target_dialect="peft")
    (target / "lorabridge.json").unlink()
    report, found = tensors_ok(tmp_path / "lora.pt", target, facts=facts)
    assert report.relation == "adapters"
    assert [(row.path, row.max_abs) for row in found.modules] == [("fused", 0), ("image", 0)]
    edit(target, lambda t: t.update({factor("image", "A"): t[factor("image", "A")] * np.float32(1.0001)}))
    assert [r.path for r in checked(tmp_path / "lora.pt", target, "tensors", facts=facts).depths[0].failed] == ["image"]


def test_a_table_leads_from_one_file_to_the_other(tmp_path: Path) -> None:
    """Without a manifest the fitting table is found, and --family says it where several fit."""
    model, folder = gpt2(tmp_path)
    source = peft_adapter(tmp_path / "peft", model, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    target = without_manifest(converted(source, tmp_path / "out.ckpt", family="gpt2", config=folder / "config.json"))
    report, found = tensors_ok(source, target, facts=ALPHA)
    assert "table gpt2" in " ".join(report.compared)
    assert len(found.modules) == 4
    assert {row.max_abs for row in found.modules} == {0}
    with pytest.raises(UsageError, match="no table"):
        checked(source, converted(peft_adapter(tmp_path / "other"), tmp_path / "other.ckpt"), "tensors")


def gpt2(folder: Path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    fields = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 20, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**fields, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(folder / "gpt2")
    return model, folder / "gpt2"


@pytest.mark.parametrize("manifest", [True, False])
def test_whole_models(manifest: bool, tmp_path: Path) -> None:
    _, source = gpt2(tmp_path)
    target = converted(source, tmp_path / "ms", family="gpt2")
    if not manifest:
        (target / "lorabridge.json").unlink()
    report, _ = tensors_ok(source, target)
    assert report.relation == ("conversion" if manifest else "models")
    file = next(target.glob("*.ckpt"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    report = checked(source, target, "tensors")
    wrong = [check for check in report.depths[0].checks if not check.ok]
    assert {check.name for check in wrong} == {"forward: SRC's bits make DST's", "backward: DST's bits make SRC's"} or (
        {check.name for check in wrong} == {"forward: SRC's bits make DST's"}
    )
    assert "1 of" in wrong[0].where[0]


def test_a_parameter_missing_in_a_model(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    _, source = gpt2(tmp_path)
    target = converted(source, tmp_path / "ms.safetensors", family="gpt2", target_dialect="ms")
    from safetensors.torch import load_file

    tensors = load_file(target)
    tensors.pop("backbone.layernorm.beta")
    save_file(tensors, tmp_path / "less.safetensors", metadata={"format": "ms"})
    report = checked(source, tmp_path / "less.safetensors", "tensors", family="gpt2")
    assert report.verdict == "different"
    assert "backbone.layernorm.beta: missing" in report.depths[0].checks[1].where


def test_extras_beside_the_factors(tmp_path: Path) -> None:
    source = peft_adapter(tmp_path / "peft", modules_to_save=["up"])
    target = without_manifest(converted(source, tmp_path / "out.ckpt"))
    name = "base_model.model.layers.1.up.weight"
    edit(source, lambda t: t.update({name: np.where(np.arange(t[name].size).reshape(t[name].shape) == 7, 9, t[name])}))
    report = checked(source, target, "tensors", facts=ALPHA)
    (check,) = report.depths[0].checks
    assert check.where == ("layers.1.up.weight: the parameter differs in 1 of 960 elements",)
    edit(source, lambda t: {n: v for n, v in t.items() if n != name})
    configure(source, modules_to_save=["layers.0.up"])
    (check,) = checked(source, target, "tensors", facts=ALPHA).depths[0].checks
    assert check.where == ("layers.1.up.weight: only DST has it",)


def test_untrained_factors_are_compared_though_their_delta_is_zero(tmp_path: Path) -> None:
    source = peft_adapter(tmp_path / "peft")
    edit(source, lambda t: {n: v * 0 if "lora_B" in n else v for n, v in t.items()})
    target = without_manifest(converted(source, tmp_path / "out.ckpt"))
    tensors_ok(source, target, facts=ALPHA)
    edit(source, lambda t: {n: v * 2 if "q_proj.lora_A" in n else v for n, v in t.items()})
    report = checked(source, target, "tensors", facts=ALPHA)
    assert [row.path for row in report.depths[0].failed] == ["layers.0.q_proj", "layers.1.q_proj"]


def test_no_framework_is_imported(tmp_path: Path) -> None:
    source = peft_adapter(tmp_path / "peft")
    target = converted(source, tmp_path / "out.ckpt")
    code = (
        "import sys; from lorabridge.actions.verify import verify; from lorabridge.actions.verify_inputs import *;"
        f"r = verify({str(source)!r}, {str(target)!r}, VerifyOptions(depths=('tensors',)));"
        "assert r.ok; print({'torch', 'mindspore', 'peft', 'transformers', 'loralib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def matrices(rng: np.random.Generator, rows: int, columns: int, rank: int) -> Thin:
    return Thin(rng.standard_normal((rank, columns)), rng.standard_normal((rows, rank)), 0.5 + rng.random(), None, None)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5))
def test_thin_differences_are_dense_ones(seed: int, rows: int, columns: int, r1: int, r2: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = matrices(rng, rows, columns, r1), matrices(rng, rows, columns, r2)
    dense = [t.b @ t.a * t.scaling for t in (one, two)]
    found = difference(one, two)
    wanted = [np.linalg.norm(dense[0]), np.linalg.norm(dense[1]), np.linalg.norm(dense[0] - dense[1])]
    np.testing.assert_allclose([found.first, found.second, found.apart], wanted, rtol=1e-11, atol=1e-12)
    assert math.isclose(found.inner, float(np.vdot(*dense)), rel_tol=1e-10, abs_tol=1e-11)
    assert math.isclose(norm(one), wanted[0], rel_tol=1e-12)
    assert one.reach() >= wanted[0] * (1 - 1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(1, 40), st.integers(1, 6))
def test_the_noise_of_thin_differences_is_bounded(seed: int, rows: int, columns: int, rank: int) -> None:
    """The same delta in another factorization differs by no more than the bound says."""
    rng = np.random.default_rng(seed)
    one = matrices(rng, rows, columns, rank)
    turn, _ = np.linalg.qr(rng.standard_normal((rank, rank)))
    two = Thin(turn @ one.a, one.b @ turn.T, one.scaling, None, None)
    size = np.linalg.norm(np.hstack([one.b, two.b])) * one.scaling * np.linalg.norm(np.vstack([one.a, two.a]))
    assert difference(one, two).apart <= bounds.qr_noise(rows, columns, 2 * rank) * size


def test_gamma() -> None:
    u = 2.0**-24
    assert bounds.gamma(1, u) == pytest.approx(u, rel=1e-6)
    assert bounds.gamma(10**9, u) == math.inf
    assert bounds.ulps(np.array([2.0**-23]), np.array([1.5]), bounds_dtype("float32")).tolist() == [1.0]
    assert bounds.smallest(bounds_dtype("float16")) == 2.0**-24


def bounds_dtype(name: str):
    from lorabridge.dtypes import BY_NAME

    return BY_NAME[name]


def test_the_net_is_what_the_cases_name() -> None:
    assert {name for name, _ in Net().named_children()} == {"tokens", "layers", "line", "image", "grouped", "volume"}
