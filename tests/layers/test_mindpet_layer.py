from __future__ import annotations

import importlib.util
import sys
import types

import mindspore as ms
import numpy as np
import pytest
import torch
from judges import array, tensor
from mindspore import Tensor, nn, ops

from lorabridge.layers import LoRADense

IN, OUT, RANK, ALPHA = 16, 10, 4, 6
NAMES = ("weight", "bias", "mindpet_delta_lora_a", "mindpet_delta_lora_b")


@pytest.fixture
def witness(monkeypatch: pytest.MonkeyPatch) -> type[nn.Cell]:
    """MindPet 1.0.4's own LoRADense; of MindFormers, which its package imports, three names are enough."""
    if importlib.util.find_spec("mindpet") is None:
        pytest.skip("mindpet is not installed")

    def decorate(*types_: object, **names: object) -> object:
        return lambda function: function

    layers = types.ModuleType("mindformers.modules.layers")
    layers.Linear = nn.Dense
    layers._args_type_validator_check = decorate
    layers._valid_value_checks = decorate
    if importlib.util.find_spec("mindformers") is None:
        for name in ("mindformers", "mindformers.modules"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, "mindformers.modules.layers", layers)
    from mindpet.delta.lora import LoRADense as Witness

    return Witness


def pair(witness: type[nn.Cell], **options: object) -> tuple[LoRADense, nn.Cell]:
    cell = LoRADense(IN, OUT, RANK, ALPHA, lora_b_init="normal", **options)
    judge = witness(IN, OUT, RANK, ALPHA, **options)
    for name in NAMES if options.get("has_bias", True) else ("weight", *NAMES[2:]):
        getattr(judge, name).set_data(getattr(cell, name))
    return cell, judge


@pytest.mark.parametrize("compute", [ms.float16, ms.float32], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_forward_is_mindpets_bit_for_bit(
    witness: type[nn.Cell], compute: object, activation: str | None, has_bias: bool
) -> None:
    cell, judge = pair(witness, compute_dtype=compute, activation=activation, has_bias=has_bias)
    for shape in ((3, IN), (2, 5, IN)):
        for kind in (ms.float32, ms.float16):
            x = Tensor(np.random.default_rng(0).normal(size=shape)).astype(kind)
            ours, theirs = cell(x), judge(x)
            assert ours.dtype == theirs.dtype == kind
            assert ours.shape == theirs.shape
            assert ours.asnumpy().tobytes() == theirs.asnumpy().tobytes()


def test_forward_is_mindpets_in_both_modes(witness: type[nn.Cell], mode: str) -> None:
    cell, judge = pair(witness, activation="relu", param_init_type=ms.float16)
    x = tensor(torch.randn(2, 3, IN))
    assert cell(x).asnumpy().tobytes() == judge(x).asnumpy().tobytes()


def test_parameters_have_mindpets_names(witness: type[nn.Cell]) -> None:
    cell, judge = pair(witness)
    assert [p.name for p in cell.get_parameters()] == [p.name for p in judge.get_parameters()]
    assert [p.name for p in nn.SequentialCell(cell).get_parameters()] == [f"0.{name}" for name in NAMES]
    assert [p.shape for p in cell.get_parameters()] == [p.shape for p in judge.get_parameters()]
    assert all(p.requires_grad for p in cell.get_parameters())


BAD: list[tuple[type[Exception], tuple[object, ...], dict[str, object]]] = [
    (ValueError, (0, OUT, RANK, ALPHA), {}),
    (TypeError, (4.0, OUT, RANK, ALPHA), {}),
    (ValueError, (IN, -1, RANK, ALPHA), {}),
    (ValueError, (IN, OUT, 0, ALPHA), {}),
    (TypeError, (IN, OUT, 4.0, ALPHA), {}),
    (TypeError, (IN, OUT, True, ALPHA), {}),
    (ValueError, (IN, OUT, RANK, 0), {}),
    (TypeError, (IN, OUT, RANK, "6"), {}),
    (ValueError, (IN, OUT, RANK, ALPHA, 1.0), {}),
    (ValueError, (IN, OUT, RANK, ALPHA, -0.1), {}),
    (TypeError, (IN, OUT, RANK, ALPHA, 0), {}),
    (ValueError, (IN, OUT, RANK, ALPHA), {"lora_a_init": "no such initialiser"}),
    (ValueError, (IN, OUT, RANK, ALPHA), {"lora_a_init": Tensor(np.zeros((RANK, IN + 1), np.float32))}),
    (ValueError, (IN, OUT, RANK, ALPHA), {"lora_b_init": Tensor(np.zeros(OUT, np.float32))}),
    (ValueError, (IN, OUT, RANK, ALPHA), {"weight_init": Tensor(np.zeros((IN, OUT), np.float32))}),
    (TypeError, (IN, OUT, RANK, ALPHA), {"param_init_type": ms.int32}),
    (TypeError, (IN, OUT, RANK, ALPHA), {"compute_dtype": ms.float64}),
    (TypeError, (IN, OUT, RANK, ALPHA), {"activation": 3}),
    (TypeError, (IN, OUT, RANK, ALPHA), {"has_bias": 1}),
]


@pytest.mark.parametrize(("error", "arguments", "options"), BAD)
def test_documented_checks(error: type[Exception], arguments: tuple[object, ...], options: dict[str, object]) -> None:
    with pytest.raises(error):
        LoRADense(*arguments, **options)


@pytest.mark.parametrize(("error", "arguments", "options"), BAD)
def test_mindpet_refuses_the_same(
    witness: type[nn.Cell], error: type[Exception], arguments: tuple[object, ...], options: dict[str, object]
) -> None:
    with pytest.raises(error):
        witness(*arguments, **options)


def test_an_input_of_one_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="two axes"):
        LoRADense(IN, OUT, RANK, ALPHA)(tensor(torch.randn(IN)))


def test_first_values_are_those_of_the_user_guide() -> None:
    cell = LoRADense(256, 96, 64, ALPHA, param_init_type=ms.float16)
    a = array(cell.mindpet_delta_lora_a)
    assert cell.mindpet_delta_lora_a.dtype == cell.mindpet_delta_lora_b.dtype == ms.float16
    assert 0.99 / 16 < np.abs(a).max() <= 1 / 16
    assert np.var(a) == pytest.approx(1 / 768, rel=0.05)
    assert not array(cell.mindpet_delta_lora_b).any()
    given = Tensor(np.full((RANK, IN), 0.5, np.float32))
    assert (LoRADense(IN, OUT, RANK, ALPHA, lora_a_init=given).mindpet_delta_lora_a.asnumpy() == 0.5).all()


def test_strategies_reach_the_operators_and_are_checked() -> None:
    cell = LoRADense(IN, OUT, RANK, ALPHA, 0.1, activation="relu")
    cell.shard(
        ((1, 1), (1, 1)), ((1, 1), (1,)), ((1, 1),), ((1, 1), (1, 1)), ((1, 1), (1, 1)), ((1, 1), ()),
        ((1, 1), (1, 1)), ((1, 1),),
    )  # fmt: skip
    assert cell.lora_a_matmul.in_strategy == cell.matmul.in_strategy == ((1, 1), (1, 1))
    assert cell.mul.in_strategy == ((1, 1), ())
    assert cell(tensor(torch.randn(2, IN))).shape == (2, OUT)
    with pytest.raises(TypeError, match="strategy_lora_mul"):
        cell.shard(strategy_lora_mul=[(1, 1)])
    for activation in ("logsoftmax", nn.LogSoftmax()):
        with pytest.raises(ValueError, match="LogSoftmax"):
            LoRADense(IN, OUT, RANK, ALPHA, activation=activation).shard()
    LoRADense(IN, OUT, RANK, ALPHA, activation=ops.ReLU()).shard(strategy_activation=((1, 1),))
    LoRADense(IN, OUT, RANK, ALPHA, activation="logsigmoid").shard(strategy_activation=((1, 1),))


def test_merging_is_there_for_those_who_ask() -> None:
    cell = LoRADense(IN, OUT, RANK, ALPHA, lora_b_init="normal", compute_dtype=ms.float32, merge_weights=True)
    x = tensor(torch.randn(3, IN))
    apart = cell(x).asnumpy()
    cell.set_train(False)
    assert cell.merged
    np.testing.assert_allclose(cell(x).asnumpy(), apart, atol=1e-5)
    plain = LoRADense(IN, OUT, RANK, ALPHA)
    plain.set_train(False)
    assert not plain.merged, "MindPet does not merge"
