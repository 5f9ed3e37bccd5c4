from __future__ import annotations

import subprocess
import sys

import loralib
import mindspore as ms
import numpy as np
import pytest
import torch
from judges import ROUNDOFF, TORCH, array, assert_within, give, randomise, tensor
from mindspore import nn
from peft import LoraConfig, get_peft_model
from steps import descend_mindspore, descend_torch

from lorabridge.layers import Linear

IN, OUT, RANK, ALPHA = 16, 12, 4, 6


def named(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters())


def mass_of(module: torch.nn.Module, x: torch.Tensor, fan_in_fan_out: bool) -> np.ndarray:
    """Return the sum of the absolute values of all terms."""
    p = {name: np.abs(array(value)) for name, value in module.named_parameters()}
    x_abs = np.abs(array(x))
    base = x_abs @ (p["weight"] if fan_in_fan_out else p["weight"].T)
    update = x_abs @ p["lora_A"].T @ p["lora_B"].T * module.scaling
    return base + update + p.get("bias", 0.0)


TERMS = 2 * IN + RANK + 8


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16], ids=str)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_is_loralibs(dtype: object, fan_in_fan_out: bool, bias: bool) -> None:
    judge = loralib.Linear(IN, OUT, RANK, lora_alpha=ALPHA, fan_in_fan_out=fan_in_fan_out, bias=bias)
    judge = judge.to(TORCH[dtype])
    randomise(judge.lora_A, judge.lora_B)
    cell = Linear(IN, OUT, RANK, ALPHA, fan_in_fan_out=fan_in_fan_out, bias=bias, dtype=dtype)
    give(cell, named(judge))
    x = torch.randn(3, 5, IN).to(TORCH[dtype])
    mass = mass_of(judge, x, fan_in_fan_out)
    assert_within(cell(tensor(x, dtype)), judge(x), mass, TERMS, dtype)
    judge.eval()
    cell.set_train(False)
    assert cell.merged
    assert_within(cell(tensor(x, dtype)), judge(x), mass, TERMS, dtype)
    weight_mass = np.abs(array(judge.weight)) + 1.0
    assert_within(cell.weight, judge.weight, weight_mass, RANK + 4, dtype)


def test_the_bound_notices_an_alpha_that_is_off_by_a_thousandth() -> None:
    judge = loralib.Linear(IN, OUT, RANK, lora_alpha=ALPHA)
    randomise(judge.lora_A, judge.lora_B)
    cell = Linear(IN, OUT, RANK, ALPHA * 1.001)
    give(cell, named(judge))
    x = torch.randn(3, IN)
    with pytest.raises(AssertionError, match="times the bound"):
        assert_within(cell(tensor(x)), judge(x), mass_of(judge, x, False), TERMS, ms.float32)


@pytest.mark.parametrize("kind", ["plain", "rslora", "dora", "lora_bias", "rslora dora"])
@pytest.mark.parametrize("merged", [False, True])
def test_forward_is_pefts(kind: str, merged: bool, mode: str) -> None:
    options = {f"use_{name}": True for name in ("rslora", "dora") if name in kind}
    options |= {"lora_bias": True} if kind == "lora_bias" else {}
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    judge = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], **options)).eval()
    layer = judge.base_model.model[0]
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    randomise(*a.parameters(), *b.parameters())
    values = {"weight": layer.base_layer.weight, "bias": layer.base_layer.bias, "lora_A": a.weight, "lora_B": b.weight}
    if "dora" in kind:
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.data *= torch.linspace(0.5, 2, OUT)
        values["lora_magnitude_vector"] = magnitude
    if kind == "lora_bias":
        values["lora_bias"] = b.bias
    cell = Linear(IN, OUT, RANK, ALPHA, **options)
    give(cell, values)
    cell.set_train(not merged)
    assert cell.merged is merged
    x = torch.randn(7, IN)
    p = {name: np.abs(array(value)) for name, value in values.items()}
    scaling = layer.scaling["default"]
    mass = np.abs(array(x)) @ (p["weight"] + scaling * p["lora_B"] @ p["lora_A"]).T
    if "dora" in kind:  # (scale - 1) * plain + plain, and the rounding of the norm in scale
        norm = np.linalg.norm(array(layer.base_layer.weight) + scaling * array(b.weight) @ array(a.weight), axis=1)
        mass *= 2 + p["lora_magnitude_vector"] / norm
    mass = mass + p["bias"] + scaling * p.get("lora_bias", 0.0)
    assert_within(cell(tensor(x)), judge(x), mass, 2 * TERMS, ms.float32)


def test_dora_starts_at_the_base_like_pefts() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    judge = get_peft_model(model, LoraConfig(r=RANK, target_modules=["0"], use_dora=True)).base_model.model[0]
    cell = Linear(IN, OUT, RANK, use_dora=True)
    cell.base.set_data(tensor(judge.base_layer.weight))
    cell.reset_magnitude()
    wanted = array(judge.lora_magnitude_vector["default"].weight)
    np.testing.assert_allclose(array(cell.lora_magnitude_vector), wanted, rtol=IN * ROUNDOFF[ms.float32])


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_training_moves_the_factors_as_loralib_does(fan_in_fan_out: bool) -> None:
    judge = loralib.Linear(IN, OUT, RANK, lora_alpha=ALPHA, fan_in_fan_out=fan_in_fan_out)
    cell = Linear(IN, OUT, RANK, ALPHA, fan_in_fan_out=fan_in_fan_out)
    give(cell, named(judge))
    before = cell.base.asnumpy().tobytes()
    x, target = torch.randn(20, IN), torch.randn(20, OUT)
    cell.set_train(True)
    descend_torch(judge, x, target, 8, 0.5)
    descend_mindspore(cell, x, target, 8, 0.5)
    assert cell.base.asnumpy().tobytes() == before
    for name in ("lora_A", "lora_B", "bias"):
        moved = array(getattr(judge, name))
        np.testing.assert_allclose(array(getattr(cell, name)), moved, atol=2e-6 * np.abs(moved).max(), rtol=0)
    assert np.abs(array(cell.lora_B)).max() > 1e-3, "training did nothing"


def test_dora_trains_as_pefts() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    judge = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=True))
    layer = judge.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    randomise(b)
    cell = Linear(IN, OUT, RANK, ALPHA, use_dora=True)
    base = layer.base_layer
    give(cell, {"weight": base.weight, "bias": base.bias, "lora_A": a, "lora_B": b, "lora_magnitude_vector": magnitude})
    cell.bias.requires_grad = False
    x, target = torch.randn(20, IN), torch.randn(20, OUT)
    cell.set_train(True)
    descend_torch(judge, x, target, 5, 0.3)
    descend_mindspore(cell, x, target, 5, 0.3)
    for name, moved in (("lora_A", a), ("lora_B", b), ("lora_magnitude_vector", magnitude)):
        wanted = array(moved)
        np.testing.assert_allclose(array(getattr(cell, name)), wanted, atol=5e-6 * np.abs(wanted).max(), rtol=0)


def test_only_the_factors_and_the_bias_train() -> None:
    assert [p.name for p in Linear(4, 4, 2).trainable_params()] == ["bias", "lora_A", "lora_B"]
    assert [p.name for p in Linear(4, 4, 0).trainable_params()] == ["weight", "bias"]


def test_dropout_reaches_the_adapter_in_training_only() -> None:
    cell = Linear(IN, OUT, RANK, ALPHA, lora_dropout=0.5)
    cell.lora_B.set_data(tensor(torch.randn(OUT, RANK)))
    x = tensor(torch.randn(64, IN))
    cell.set_train(True)
    first, second = cell(x).asnumpy(), cell(x).asnumpy()
    assert (first != second).any()
    cell.lora_B.set_data(cell.lora_B * 0)
    assert (cell(x).asnumpy() == cell(x).asnumpy()).all()
    cell.set_train(False)
    assert (cell(x).asnumpy() == cell(x).asnumpy()).all()


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16, ms.bfloat16], ids=str)
def test_first_values_are_distributed_as_loralibs(dtype: object) -> None:
    cell = Linear(256, 96, 64, dtype=dtype)
    judge = loralib.Linear(256, 96, 64)
    bound = 1 / 16
    for name in ("weight", "lora_A"):
        ours, theirs = array(getattr(cell, name)).ravel(), array(getattr(judge, name)).ravel()
        assert 0.99 * bound < np.abs(ours).max() <= bound * (1 + 2**-8)
        assert abs(ours.mean()) < 4 * bound / np.sqrt(3 * ours.size)
        assert np.var(ours) == pytest.approx(bound**2 / 3, rel=0.05)
        assert np.var(ours) == pytest.approx(np.var(theirs), rel=0.08)
    assert np.abs(array(cell.bias)).max() <= bound * (1 + 2**-8)
    assert not array(cell.lora_B).any()


def test_bfloat16_is_stored_and_computed_in_float32_with_one_rounding() -> None:
    cell = Linear(IN, OUT, RANK, ALPHA, dtype=ms.bfloat16)
    cell.lora_B.set_data(tensor(torch.randn(OUT, RANK), ms.bfloat16))
    assert {p.dtype for p in cell.get_parameters()} == {ms.bfloat16}
    wide = Linear(IN, OUT, RANK, ALPHA)
    give(wide, {name: torch.tensor(array(value)) for name, value in cell._params.items()})
    x = tensor(torch.randn(5, IN), ms.bfloat16)
    assert cell(x).dtype == ms.bfloat16
    wanted = wide(x.astype(ms.float32)).astype(ms.bfloat16)
    assert (array(cell(x)) == array(wanted)).all()


@pytest.mark.parametrize(
    ("error", "arguments", "options"),
    [
        (ValueError, (0, 4), {}), (TypeError, (4.0, 4), {}), (ValueError, (4, 4, -1), {}), (TypeError, (4, 4, 2.5), {}),
        (TypeError, (4, 4, 2, "8"), {}), (ValueError, (4, 4, 2, float("nan")), {}), (ValueError, (4, 4, 2, 1, 1.0), {}),
        (TypeError, (4, 4, 2), {"dtype": ms.int32}), (ValueError, (4, 4, 2), {"use_dora": True, "lora_bias": True}),
        (ValueError, (4, 4, 0), {"use_dora": True}),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(
    error: type[Exception], arguments: tuple[object, ...], options: dict[str, object]
) -> None:
    with pytest.raises(error):
        Linear(*arguments, **options)


def test_parameters_have_the_dialects_names_inside_a_network() -> None:
    class Network(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.query = Linear(4, 4, 2, use_dora=True)
            self.value = Linear(4, 4, 2, lora_bias=True)

    names = [parameter.name for parameter in Network().get_parameters()]
    assert names == [
        "query.weight", "query.bias", "query.lora_A", "query.lora_B", "query.lora_magnitude_vector",
        "value.weight", "value.bias", "value.lora_A", "value.lora_B", "value.lora_bias",
    ]  # fmt: skip


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_mindspore_the_error_says_what_to_install() -> None:
    done = run_python(
        "import sys; sys.modules['mindspore'] = None\n"
        "from lorabridge.errors import LorabridgeError\n"
        "try:\n    import lorabridge.layers\n"
        "except ImportError as error:\n    assert isinstance(error, LorabridgeError)\n    print(error.hint)\n"
    )
    assert done.stdout.strip() == "run: pip install 'lorabridge[mindspore]'", done.stderr


def test_the_layers_import_no_other_framework() -> None:
    done = run_python(
        "import sys, lorabridge.layers\n"
        "print(sorted({'torch', 'peft', 'loralib', 'transformers', 'mindpet'} & set(sys.modules)))"
    )
    assert done.stdout.strip() == "[]", done.stderr
