from __future__ import annotations

import loralib
import mindspore as ms
import numpy as np
import pytest
import torch
from judges import TORCH, array, assert_within, give, randomise, tensor
from peft import LoraConfig, get_peft_model
from steps import descend_mindspore, descend_torch

from lorabridge.layers import MergedLinear

IN, OUT, RANK, ALPHA = 12, 24, 3, 6
TERMS = 2 * IN + RANK + 8
MASKS = [
    [True],
    [True, True],
    [True, False, True],
    [False, True, False],
    [True, True, True],
    [False, False, True, True],
    [False, True, False, False, False, True],
]


def make_judge(mask: list[bool], *, fan_in_fan_out: bool = False, bias: bool = True) -> loralib.MergedLinear:
    judge = loralib.MergedLinear(
        IN, OUT, RANK, lora_alpha=ALPHA, enable_lora=mask, fan_in_fan_out=fan_in_fan_out, bias=bias
    )
    randomise(judge.lora_A, judge.lora_B)
    return judge


def mass_of(judge: loralib.MergedLinear, x: torch.Tensor, mask: list[bool], fan_in_fan_out: bool) -> np.ndarray:
    """Return the sum of the absolute values of all terms, block by block."""
    weight = np.abs(array(judge.weight))
    rows = OUT // len(mask)
    product = np.zeros((OUT, IN))
    a, b = np.abs(array(judge.lora_A)), np.abs(array(judge.lora_B))
    for i, block in enumerate(np.flatnonzero(mask)):
        product[block * rows : (block + 1) * rows] = b[i * rows : (i + 1) * rows] @ a[i * RANK : (i + 1) * RANK]
    total = (weight if fan_in_fan_out else weight.T) + product.T * judge.scaling
    return np.abs(array(x)) @ total + (0.0 if judge.bias is None else np.abs(array(judge.bias)))


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: "".join("FT"[on] for on in mask))
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dtype", [ms.float32, ms.float16], ids=str)
def test_forward_is_loralibs(mask: list[bool], fan_in_fan_out: bool, dtype: object) -> None:
    judge = make_judge(mask, fan_in_fan_out=fan_in_fan_out, bias=len(mask) != 2).to(TORCH[dtype])
    cell = MergedLinear(
        IN, OUT, RANK, ALPHA, enable_lora=mask, fan_in_fan_out=fan_in_fan_out, bias=len(mask) != 2, dtype=dtype
    )
    give(cell, dict(judge.named_parameters()))
    x = torch.randn(2, 5, IN).to(TORCH[dtype])
    mass = mass_of(judge, x, mask, fan_in_fan_out)
    assert_within(cell(tensor(x, dtype)), judge(x), mass, TERMS, dtype)
    judge.eval()
    cell.set_train(False)
    assert cell.merged
    assert_within(cell(tensor(x, dtype)), judge(x), mass, TERMS, dtype)


def test_forward_is_loralibs_in_both_modes(mode: str) -> None:
    mask = [True, False, True]
    judge = make_judge(mask)
    cell = MergedLinear(IN, OUT, RANK, ALPHA, enable_lora=mask)
    give(cell, dict(judge.named_parameters()))
    x = torch.randn(5, IN)
    mass = mass_of(judge, x, mask, False)
    assert_within(cell(tensor(x)), judge(x), mass, TERMS, ms.float32)
    cell.set_train(False)
    assert_within(cell(tensor(x)), judge(x), mass, TERMS, ms.float32)


def test_a_block_that_is_not_enabled_keeps_the_bits_of_the_base() -> None:
    mask = [True, False, True]
    cell = MergedLinear(IN, OUT, RANK, ALPHA, enable_lora=mask)
    give(cell, dict(make_judge(mask).named_parameters()))
    cell.set_train(False)
    rows = slice(OUT // 3, 2 * OUT // 3)
    merged, base = cell.weight.asnumpy(), cell.base.asnumpy()
    assert (merged[rows] == base[rows]).all()
    assert (merged != base).any(axis=1).sum() == 2 * OUT // 3


@pytest.mark.parametrize("mask", [[True, False, True], [True, True]], ids=str)
def test_training_moves_the_factors_as_loralib_does(mask: list[bool]) -> None:
    judge = make_judge(mask)
    cell = MergedLinear(IN, OUT, RANK, ALPHA, enable_lora=mask)
    give(cell, dict(judge.named_parameters()))
    x, target = torch.randn(20, IN), torch.randn(20, OUT)
    before = array(judge.lora_A)
    cell.set_train(True)
    descend_torch(judge, x, target, 6, 0.5)
    descend_mindspore(cell, x, target, 6, 0.5)
    for name in ("lora_A", "lora_B", "bias"):
        moved = array(getattr(judge, name))
        np.testing.assert_allclose(array(getattr(cell, name)), moved, atol=3e-6 * np.abs(moved).max(), rtol=0)
    assert np.abs(array(judge.lora_A) - before).max() > 1e-3


def test_one_block_is_a_linear_layer_of_peft_with_dora() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], use_dora=True, use_rslora=True)
    judge = get_peft_model(model, config).eval()
    layer = judge.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    randomise(a, b)
    cell = MergedLinear(IN, OUT, RANK, ALPHA, enable_lora=[True], use_dora=True, use_rslora=True)
    magnitude = layer.lora_magnitude_vector["default"].weight
    base = layer.base_layer
    give(cell, {"weight": base.weight, "bias": base.bias, "lora_A": a, "lora_B": b, "lora_magnitude_vector": magnitude})
    x = torch.randn(5, IN)
    scaling = layer.scaling["default"]
    mass = np.abs(array(x)) @ (np.abs(array(base.weight)) + scaling * np.abs(array(b)) @ np.abs(array(a))).T
    ratio = array(magnitude) / np.linalg.norm(array(base.weight) + scaling * array(b) @ array(a), axis=1)
    mass = mass * (2 + ratio) + np.abs(array(base.bias))
    for train in (True, False):
        cell.set_train(train)
        assert_within(cell(tensor(x)), judge(x), mass, 2 * TERMS, ms.float32)


def test_first_values_are_distributed_as_loralibs() -> None:
    cell = MergedLinear(256, 96, 32, enable_lora=[True, False, True])
    judge = loralib.MergedLinear(256, 96, 32, enable_lora=[True, False, True])
    ours, theirs = array(cell.lora_A), array(judge.lora_A)
    assert ours.shape == theirs.shape == (64, 256)
    assert 0.99 / 16 < np.abs(ours).max() <= 1 / 16
    assert np.var(ours) == pytest.approx(np.var(theirs), rel=0.08)
    assert cell.lora_B.shape == tuple(judge.lora_B.shape)
    assert not array(cell.lora_B).any()


def test_without_an_enabled_block_it_is_a_plain_linear_layer() -> None:
    cell = MergedLinear(IN, OUT, RANK, ALPHA, enable_lora=[False, False])
    assert [parameter.name for parameter in cell.trainable_params()] == ["weight", "bias"]
    x = tensor(torch.randn(5, IN))
    wanted = x.asnumpy() @ cell.weight.asnumpy().T + cell.bias.asnumpy()
    np.testing.assert_allclose(cell(x).asnumpy(), wanted, atol=1e-5)
    cell.set_train(False)
    np.testing.assert_allclose(cell(x).asnumpy(), wanted, atol=1e-5)


def test_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must divide out_features"):
        MergedLinear(IN, OUT, RANK, enable_lora=[True] * 5)
    with pytest.raises(TypeError, match="list of True and False"):
        MergedLinear(IN, OUT, RANK, enable_lora=[1, 0])
    with pytest.raises(ValueError, match="all blocks"):
        MergedLinear(IN, OUT, RANK, enable_lora=[True, False], use_dora=True)
