from __future__ import annotations

import math
import warnings

import loralib
import mindspore as ms
import numpy as np
import pytest
import torch
from judges import TORCH, array, assert_within, give, randomise, tensor
from peft import LoraConfig, get_peft_model
from steps import descend_mindspore, descend_torch

from lorabridge.layers import Conv1d, Conv2d, Conv3d

IN, OUT, RANK, ALPHA = 4, 6, 2, 3
CELLS = {1: Conv1d, 2: Conv2d, 3: Conv3d}
PLAIN = {1: torch.nn.Conv1d, 2: torch.nn.Conv2d, 3: torch.nn.Conv3d}
LORALIB = {1: loralib.Conv1d, 2: loralib.Conv2d, 3: loralib.Conv3d}
RUN = {1: torch.nn.functional.conv1d, 2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}

GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": 2},
    {"groups": 2, "padding": 1},
    {"groups": 2, "dilation": 2, "stride": 2, "padding": 1},
    {"padding": "same", "dilation": 2},
    {"padding": "valid", "bias": False},
]


def values_of(judge: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name.removeprefix("conv."): value for name, value in judge.named_parameters()}


def mass_of(
    dims: int, x: torch.Tensor, kernels: np.ndarray, bias: torch.Tensor | None, options: dict[str, object]
) -> np.ndarray:
    """Convolve absolute values; ``kernels`` already holds the sum of the absolute values that make each weight."""
    geometry = {name: value for name, value in options.items() if name in ("stride", "padding", "dilation", "groups")}
    bias = None if bias is None else bias.detach().double().abs()
    return RUN[dims](x.double().abs(), torch.from_numpy(kernels), bias, **geometry).numpy()


def terms_of(dims: int, kernel: int) -> int:
    return 2 * IN * kernel**dims + RANK * kernel + 8


def check_against_loralib(dims: int, kernel: int, options: dict[str, object], dtype: object, size: int = 7) -> None:
    judge = LORALIB[dims](IN, OUT, kernel, r=RANK, lora_alpha=ALPHA, **options).to(TORCH[dtype])
    randomise(judge.lora_A, judge.lora_B)
    cell = CELLS[dims](IN, OUT, kernel, RANK, ALPHA, dtype=dtype, **options)
    give(cell, values_of(judge))
    weight, a, b = (np.abs(array(value)) for value in (judge.conv.weight, judge.lora_A, judge.lora_B))
    kernels = weight + (b @ a).reshape(weight.shape) * judge.scaling
    for shape in ((2, IN, *(size,) * dims), (IN, *(size,) * dims)):
        x = torch.randn(shape).to(TORCH[dtype])
        mass = mass_of(dims, x, kernels, judge.conv.bias, options)
        judge.train()
        cell.set_train(True)
        assert_within(cell(tensor(x, dtype)), judge(x), mass, terms_of(dims, kernel), dtype)
        judge.eval()
        cell.set_train(False)
        assert cell.merged
        assert_within(cell(tensor(x, dtype)), judge(x), mass, terms_of(dims, kernel), dtype)


@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", [ms.float32, ms.float16], ids=str)
def test_two_dimensions_are_loralibs(options: dict[str, object], dtype: object) -> None:
    check_against_loralib(2, 3, options, dtype)


def test_an_even_kernel_pads_the_odd_zero_where_torch_does() -> None:
    check_against_loralib(2, 2, {"padding": "same"}, ms.float32)
    check_against_loralib(2, 4, {"padding": "same", "groups": 2}, ms.float32)


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("options", [{}, {"groups": 2, "stride": 2}], ids=str)
def test_one_and_three_dimensions_are_loralibs_where_loralib_runs(dims: int, options: dict[str, object]) -> None:
    check_against_loralib(dims, 1, options, ms.float32)


@pytest.mark.parametrize("dims", [1, 3])
def test_loralib_itself_fails_for_larger_kernels(dims: int) -> None:
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        LORALIB[dims](IN, OUT, 3, r=RANK)(torch.randn(1, IN, *(5,) * dims))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", [{"padding": 1}, {"groups": 2, "dilation": 2}], ids=str)
@pytest.mark.parametrize("dtype", [ms.float32, ms.float16], ids=str)
def test_the_natural_extension_is_torchs_convolution_with_the_viewed_product(
    dims: int, options: dict[str, object], dtype: object
) -> None:
    kernel, groups = 3, int(options.get("groups", 1))
    cell = CELLS[dims](IN, OUT, kernel, RANK, ALPHA, dtype=dtype, **options)
    assert cell.lora_A.shape == (RANK * kernel, IN * kernel)
    assert cell.lora_B.shape == (OUT // groups * kernel ** (dims - 1), RANK * kernel)
    factor = torch.randn(cell.lora_B.shape).to(TORCH[dtype])
    cell.lora_B.set_data(tensor(factor, dtype))
    weight, a, b = array(cell.weight), array(cell.lora_A), array(cell.lora_B)
    scaled = torch.from_numpy(weight + (b @ a).reshape(weight.shape) * (ALPHA / RANK))
    x = torch.randn(2, IN, *(6,) * dims).to(TORCH[dtype])
    wanted = RUN[dims](x.double(), scaled, torch.from_numpy(array(cell.bias)), **options)
    kernels = np.abs(weight) + (np.abs(b) @ np.abs(a)).reshape(weight.shape) * (ALPHA / RANK)
    mass = mass_of(dims, x, kernels, torch.from_numpy(array(cell.bias)), options)
    for train in (True, False):
        cell.set_train(train)
        assert_within(cell(tensor(x, dtype)), wanted, mass, terms_of(dims, kernel), dtype)


PEFT_CASES = [
    (1, 3, {"padding": 1}),
    (1, 3, {"padding": 1, "groups": 2}),
    (2, (3, 2), {"padding": (1, 0), "stride": 2}),
    (2, 3, {"groups": 2, "padding": 1, "bias": False}),
    (2, 1, {}),
    (3, 3, {"padding": 1}),
    (3, 2, {"groups": 2}),
]


def peft_layer(dims: int, kernel: object, options: dict[str, object], **config: object) -> torch.nn.Module:
    model = torch.nn.Sequential(PLAIN[dims](IN, OUT, kernel, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        judge = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], **config)).eval()
    layer = judge.base_model.model[0]
    randomise(layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    return layer


def peft_values(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    a, b, base = layer.lora_A["default"], layer.lora_B["default"], layer.base_layer
    values = {"weight": base.weight, "bias": base.bias, "lora_A": a.weight, "lora_B": b.weight, "lora_bias": b.bias}
    if "default" in layer.lora_magnitude_vector:
        values["lora_magnitude_vector"] = layer.lora_magnitude_vector["default"].weight
    return {name: value for name, value in values.items() if value is not None}


def peft_mass(dims: int, layer: torch.nn.Module, x: torch.Tensor, options: dict[str, object]) -> np.ndarray:
    p = {name: np.abs(array(value)) for name, value in peft_values(layer).items()}
    mass = mass_of(dims, x, p["weight"], layer.base_layer.bias, options)
    hidden = torch.from_numpy(mass_of(dims, x, p["lora_A"], None, {**options, "groups": 1}))
    update = RUN[dims](hidden, torch.from_numpy(p["lora_B"]), groups=int(options.get("groups", 1))).numpy()
    bias = p.get("lora_bias", np.zeros(OUT)).reshape(1, -1, *(1,) * dims)
    return mass + (update + bias) * layer.scaling["default"]


@pytest.mark.parametrize(("dims", "kernel", "options"), PEFT_CASES)
@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_pefts_factors_are_pefts(dims: int, kernel: object, options: dict[str, object], extra: dict[str, bool]) -> None:
    layer = peft_layer(dims, kernel, options, **extra)
    cell = CELLS[dims](IN, OUT, kernel, RANK, ALPHA, conv_form="peft", **options, **extra)
    give(cell, peft_values(layer))
    x = torch.randn(2, IN, *(6,) * dims)
    side = kernel if isinstance(kernel, int) else max(kernel)
    mass = peft_mass(dims, layer, x, options)
    for train in (True, False):
        cell.set_train(train)
        assert cell.merged == (not train and options.get("groups", 1) == 1)
        assert_within(cell(tensor(x)), layer(x), mass, 2 * terms_of(dims, side), ms.float32)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dora_is_pefts(dims: int) -> None:
    options = {"padding": 1}
    layer = peft_layer(dims, 3, options, use_dora=True)
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data *= torch.linspace(0.5, 2, OUT).reshape(magnitude.shape)
    cell = CELLS[dims](IN, OUT, 3, RANK, ALPHA, conv_form="peft", use_dora=True, **options)
    give(cell, peft_values(layer))
    x = torch.randn(2, IN, *(5,) * dims)
    values = {name: array(value) for name, value in peft_values(layer).items()}
    delta = (values["lora_B"].reshape(OUT, -1) @ values["lora_A"].reshape(RANK, -1)).reshape(values["weight"].shape)
    total = values["weight"] + layer.scaling["default"] * delta
    ratio = np.abs(array(magnitude)) / np.sqrt((total**2).reshape(OUT, -1).sum(1)).reshape(magnitude.shape)
    mass = peft_mass(dims, layer, x, options) * (2 + ratio)
    for train in (True, False):
        cell.set_train(train)
        assert_within(cell(tensor(x)), layer(x), mass, 3 * terms_of(dims, 3), ms.float32)


def test_dilation_is_kept_in_pefts_factors_as_pefts_merge_has_it() -> None:
    options = {"padding": "same", "dilation": 2}
    layer = peft_layer(2, 3, options)
    cell = Conv2d(IN, OUT, 3, RANK, ALPHA, conv_form="peft", **options)
    give(cell, peft_values(layer))
    x = torch.randn(2, IN, 6, 6)
    mass = peft_mass(2, layer, x, options)
    apart = layer(x)
    layer.merge()
    assert (apart - layer(x)).abs().max() > 0.01, "peft now keeps the dilation: say so in ConvLoRA"
    for train in (True, False):
        cell.set_train(train)
        assert_within(cell(tensor(x)), layer(x), mass, 2 * terms_of(2, 3), ms.float32)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("form", ["loralib", "peft"])
def test_both_modes_agree(dims: int, form: str, mode: str) -> None:
    cell = CELLS[dims](IN, OUT, 3, RANK, ALPHA, padding=1, groups=2 if form == "loralib" else 1, conv_form=form)
    cell.lora_B.set_data(tensor(torch.randn(cell.lora_B.shape)))
    x = torch.randn(1, IN, *(4,) * dims)
    cell.set_train(True)
    apart = cell(tensor(x))
    cell.set_train(False)
    kernel = torch.from_numpy(array(cell.weight))
    wanted = RUN[dims](x.double(), kernel, torch.from_numpy(array(cell.bias)), padding=1, groups=cell.groups)
    np.testing.assert_allclose(array(cell(tensor(x))), wanted.numpy(), atol=2e-5)
    np.testing.assert_allclose(array(apart), wanted.numpy(), atol=2e-5)


@pytest.mark.parametrize("options", [{"padding": 1}, {"groups": 2, "stride": 2}], ids=str)
def test_training_moves_the_factors_as_loralib_does(options: dict[str, object]) -> None:
    judge = loralib.Conv2d(IN, OUT, 3, r=RANK, lora_alpha=ALPHA, **options)
    cell = Conv2d(IN, OUT, 3, RANK, ALPHA, **options)
    give(cell, values_of(judge))
    before = cell.base.asnumpy().tobytes()
    x = torch.randn(4, IN, 7, 7)
    target = torch.randn(judge(x).shape)
    cell.set_train(True)
    descend_torch(judge, x, target, 5, 0.5)
    descend_mindspore(cell, x, target, 5, 0.5)
    assert cell.base.asnumpy().tobytes() == before
    for name, moved in (("lora_A", judge.lora_A), ("lora_B", judge.lora_B), ("bias", judge.conv.bias)):
        wanted = array(moved)
        np.testing.assert_allclose(array(getattr(cell, name)), wanted, atol=5e-6 * np.abs(wanted).max(), rtol=0)
    assert np.abs(array(cell.lora_B)).max() > 1e-3


@pytest.mark.parametrize("dims", [1, 3])
def test_training_moves_pefts_factors_as_peft_does(dims: int) -> None:
    layer = peft_layer(dims, 3, {"padding": 1})
    cell = CELLS[dims](IN, OUT, 3, RANK, ALPHA, padding=1, conv_form="peft")
    give(cell, peft_values(layer))
    cell.bias.requires_grad = False
    x = torch.randn(3, IN, *(5,) * dims)
    target = torch.randn(3, OUT, *(5,) * dims)
    cell.set_train(True)
    descend_torch(layer, x, target, 5, 0.5)
    descend_mindspore(cell, x, target, 5, 0.5)
    for name in ("lora_A", "lora_B"):
        wanted = array(getattr(layer, name)["default"].weight)
        np.testing.assert_allclose(array(getattr(cell, name)), wanted, atol=5e-6 * np.abs(wanted).max(), rtol=0)


def test_first_values_are_distributed_as_the_libraries_do() -> None:
    loralibs = loralib.Conv2d(32, 16, 3, r=16)
    pefts = get_peft_model(
        torch.nn.Sequential(torch.nn.Conv2d(32, 16, 3)), LoraConfig(r=16, target_modules=["0"])
    ).base_model.model[0]
    for form, theirs, fan_in in (
        ("loralib", loralibs.lora_A, 32 * 3),
        ("peft", pefts.lora_A["default"].weight, 32 * 9),
    ):
        cell = Conv2d(32, 16, 3, 16, conv_form=form)
        ours, bound = array(cell.lora_A), 1 / math.sqrt(fan_in)
        assert ours.shape == tuple(theirs.shape)
        assert 0.99 * bound < np.abs(ours).max() <= bound * (1 + 1e-6)
        assert np.var(ours) == pytest.approx(np.var(array(theirs)), rel=0.08)
        assert not array(cell.lora_B).any()
        assert np.var(array(cell.weight)) == pytest.approx(np.var(array(loralibs.conv.weight)), rel=0.08)


def test_conv1d_can_store_its_weight_as_mindspores_own_cell_does() -> None:
    native = ms.nn.Conv1d(IN, OUT, 3, pad_mode="pad", padding=1, has_bias=True)
    cell = Conv1d(IN, OUT, 3, RANK, ALPHA, padding=1, native_weight=True)
    assert cell.weight.shape == native.weight.shape == (OUT, IN, 1, 3)
    assert Conv1d(IN, OUT, 3).weight.shape == (OUT, IN, 3)
    cell.base.set_data(native.weight)
    cell.bias.set_data(native.bias)
    x = tensor(torch.randn(2, IN, 7))
    np.testing.assert_allclose(cell(x).asnumpy(), native(x).asnumpy(), atol=1e-6)
    cell.lora_B.set_data(tensor(torch.randn(cell.lora_B.shape)))
    apart = cell(x).asnumpy()
    cell.set_train(False)
    np.testing.assert_allclose(cell(x).asnumpy(), apart, atol=1e-5)


def test_a_plain_convolution_has_a_kernel_that_trains() -> None:
    assert [p.name for p in Conv2d(IN, OUT, 3).trainable_params()] == ["weight", "bias"]
    assert [p.name for p in Conv2d(IN, OUT, 3, RANK).trainable_params()] == ["bias", "lora_A", "lora_B"]


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (ValueError, {"groups": 3}), (ValueError, {"kernel_size": (3, 2)}), (ValueError, {"conv_form": "other"}),
        (ValueError, {"padding": "same", "stride": 2}), (ValueError, {"padding": -1}), (ValueError, {"stride": 0}),
        (TypeError, {"dilation": 1.5}), (ValueError, {"kernel_size": (3, 3, 3)}), (ValueError, {"native_weight": True}),
        (ValueError, {"conv_form": "peft", "groups": 2, "r": 3}), (ValueError, {"padding": "reflect"}),
        (ValueError, {"conv_form": "peft", "groups": 2, "use_dora": True}),
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(error: type[Exception], options: dict[str, object]) -> None:
    with pytest.raises(error):
        Conv2d(**{"in_channels": IN, "out_channels": OUT, "kernel_size": 3, "r": RANK, **options})
