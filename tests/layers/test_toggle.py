"""Merging and unmerging: exact, any number of times, and never twice, whatever is saved and loaded when."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import loralib
import mindspore as ms
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judges import array, tensor
from mindspore import nn

from lorabridge import convert
from lorabridge.actions.convert import ConvertOptions
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError
from lorabridge.layers import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoRADense, MergedLinear, merged_parameters

IDS = ms.Tensor(np.array([[0, 3, 5], [1, 1, 7]]))

Make = Callable[[object], nn.Cell]
MAKERS: dict[str, Make] = {
    "linear": lambda dtype: Linear(8, 6, 2, 3, dtype=dtype),
    "fan_in_fan_out": lambda dtype: Linear(8, 6, 2, 3, fan_in_fan_out=True, dtype=dtype),
    "dora": lambda dtype: Linear(8, 6, 2, 3, use_dora=True, dtype=dtype),
    "lora_bias": lambda dtype: Linear(8, 6, 2, 3, lora_bias=True, dtype=dtype),
    "merged": lambda dtype: MergedLinear(8, 6, 2, 3, enable_lora=[True, False, True], dtype=dtype),
    "embedding": lambda dtype: Embedding(9, 6, 2, 3, dtype=dtype),
    "conv1d": lambda dtype: Conv1d(4, 6, 3, 2, 3, dtype=dtype),
    "conv2d": lambda dtype: Conv2d(4, 6, 3, 2, 3, groups=2, dtype=dtype),
    "conv2d peft": lambda dtype: Conv2d(4, 6, 3, 2, 3, conv_form="peft", dtype=dtype),
    "conv3d": lambda dtype: Conv3d(4, 6, 2, 2, 3, dtype=dtype),
    "mindpet": lambda dtype: LoRADense(8, 6, 2, 3, param_init_type=dtype, merge_weights=True),
}
DTYPES = [ms.float32, ms.float16, ms.bfloat16]


def make(kind: str, dtype: object = ms.float32, seed: int = 0) -> nn.Cell:
    """Return a cell of a kind with no factor zero."""
    cell = MAKERS[kind](dtype)
    randomise(cell, seed)
    return cell


def randomise(cell: nn.Cell, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for parameter in cell.get_parameters():
        parameter.set_data(tensor(rng.normal(size=parameter.shape).astype(np.float32), parameter.dtype))


def input_for(cell: nn.Cell, dtype: object = ms.float32) -> ms.Tensor:
    if isinstance(cell, Embedding):
        return IDS
    shape = (2, 4, *(5,) * cell.dims) if hasattr(cell, "dims") else (3, 8)
    return tensor(np.random.default_rng(1).normal(size=shape).astype(np.float32), dtype)


def bits(parameter: ms.Tensor) -> bytes:
    return bytes(parameter.get_bytes())


def state(cell: nn.Cell) -> dict[str, bytes]:
    return {parameter.name: bits(parameter) for parameter in cell.get_parameters()}


class Network(nn.Cell):
    """Two adapted layers under a plain one, and an embedding before them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = Embedding(9, 8, 2, 3)
        self.layers = nn.SequentialCell(Linear(8, 8, 2, 3, use_dora=True), nn.ReLU(), MergedLinear(
            8, 6, 2, 3, enable_lora=[True, False]
        ))  # fmt: skip
        self.head = nn.Dense(6, 4)

    def construct(self, ids: ms.Tensor) -> ms.Tensor:
        return self.head(self.layers(self.words(ids)))


def network(seed: int) -> Network:
    made = Network()
    randomise(made, seed)
    return made


@pytest.mark.parametrize("kind", MAKERS)
@settings(deadline=None, max_examples=5)
@given(modes=st.lists(st.booleans(), max_size=20), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_any_number_of_turns_gives_the_same_bits(kind: str, modes: list[bool], dtype: object, seed: int) -> None:
    cell = make(kind, dtype, seed)
    before, first = state(cell), None
    for train in [*modes, False, True, False]:
        cell.set_train(train)
        assert cell.merged is not train
        assert state(cell) == before
        if cell.merged:
            now = bits(getattr(cell, cell.adapted))
            first = first or now
            assert now == first != bits(cell.base)
    cell.set_train(True)
    assert getattr(cell, cell.adapted) is cell.base
    assert state(cell) == before


def test_loralibs_own_turns_lose_bits() -> None:
    """The reason why the weight is swapped instead of subtracted from."""
    judge = loralib.Linear(64, 64, 8, lora_alpha=16).half()
    torch.nn.init.normal_(judge.lora_B)
    before = judge.weight.detach().clone()
    for _ in range(5):
        judge.eval()
        judge.train()
    assert (judge.weight != before).float().mean() > 0.1


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_merged_weight_is_rounded_once(kind: str, dtype: object) -> None:
    cell = make(kind, dtype)
    exact = array(cell.base) + array(cell.delta())
    if "lora_magnitude_vector" in cell._params:
        norm = np.sqrt((exact**2).sum(axis=1, keepdims=True))
        exact *= array(cell.lora_magnitude_vector).reshape(-1, 1) / norm
    wanted = tensor(exact.astype(np.float32), cell.base.dtype)
    cell.set_train(False)
    off = np.abs(array(cell.weight if cell.adapted == "weight" else cell.embedding_table) - array(wanted))
    if dtype == ms.float32 or cell.base.dtype == ms.float32:
        assert off.max() <= 2**-20 * np.abs(array(wanted)).max()
    else:
        assert (off > 0).mean() < 0.01, "rounded more than once"


@pytest.mark.parametrize("kind", MAKERS)
def test_a_state_saved_while_merged_is_the_state_saved_while_unmerged(kind: str, tmp_path: Path) -> None:
    cell = make(kind)
    paths = {train: tmp_path / f"{train}.ckpt" for train in (True, False)}
    for train, path in paths.items():
        cell.set_train(train)
        ms.save_checkpoint(cell, str(path))
    assert paths[True].read_bytes() == paths[False].read_bytes()


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("saved_merged", [False, True])
@pytest.mark.parametrize("loaded_merged", [False, True])
def test_nothing_is_merged_twice_through_a_file(
    kind: str, saved_merged: bool, loaded_merged: bool, tmp_path: Path
) -> None:
    cell, fresh = make(kind), make(kind, seed=5)
    x = input_for(cell)
    wanted = {}
    for train in (True, False):
        cell.set_train(train)
        wanted[train] = bits(cell(x))
    cell.set_train(not saved_merged)
    path = str(tmp_path / "cell.ckpt")
    ms.save_checkpoint(cell, path)
    fresh.set_train(not loaded_merged)
    assert ms.load_param_into_net(fresh, ms.load_checkpoint(path)) == ([], [])
    assert fresh.merged is loaded_merged
    assert bits(fresh(x)) == wanted[not loaded_merged]
    for train in (False, True, False):
        fresh.set_train(train)
        assert bits(fresh(x)) == wanted[train]
    assert state(fresh) == state(cell)


def test_load_state_dict_reaches_a_merged_network() -> None:
    source, target = network(1), network(2)
    if not hasattr(target, "load_state_dict"):
        pytest.skip("this MindSpore has no load_state_dict")
    source.set_train(False)
    target.set_train(False)
    target.load_state_dict(source.state_dict())
    assert bits(target(IDS)) == bits(source(IDS))


def test_a_network_around_the_layers_turns_them(mode: str) -> None:
    made = network(3)
    layers = [made.words, made.layers[0], made.layers[2]]
    made.set_train(True)
    apart = array(made(IDS))
    for _ in range(2):
        made.set_train(False)
        assert all(layer.merged for layer in layers)
        np.testing.assert_allclose(array(made(IDS)), apart, atol=1e-4)
        made.set_train(True)
        assert not any(layer.merged for layer in layers)
        assert (array(made(IDS)) == apart).all()


def test_a_compiled_graph_follows_new_values(mode: str) -> None:
    made, other = network(3), network(4)
    for train in (True, False):
        made.set_train(train)
        made(IDS)
    other.set_train(False)
    values = {parameter.name: parameter for parameter in other.get_parameters()}
    assert ms.load_param_into_net(made, values) == ([], [])
    np.testing.assert_allclose(array(made(IDS)), array(other(IDS)), atol=1e-5)
    made.set_train(True)
    np.testing.assert_allclose(array(made(IDS)), array(other(IDS)), atol=1e-4)


def test_a_compiled_graph_stays_right_when_one_layer_turns_by_itself(mode: str) -> None:
    made = network(3)
    made.set_train(False)
    wanted = array(made(IDS))
    made.layers[0].set_train(True)
    np.testing.assert_allclose(array(made(IDS)), wanted, atol=1e-4)
    made.layers[0].set_train(False)
    np.testing.assert_allclose(array(made(IDS)), wanted, atol=1e-4)


def test_training_between_two_merges_counts(mode: str) -> None:
    made = network(3)
    made.set_train(False)
    before = array(made(IDS))
    made.set_train(True)
    weights = ms.ParameterTuple([p for p in made.get_parameters() if "lora_" in p.name])
    optimizer = nn.SGD(weights, learning_rate=0.05)

    def loss(ids: ms.Tensor) -> ms.Tensor:
        return made(ids).sum()

    gradients = ms.grad(loss, None, weights)
    optimizer(gradients(IDS))
    apart = array(made(IDS))
    made.set_train(False)
    assert np.abs(array(made(IDS)) - before).max() > 1e-3
    np.testing.assert_allclose(array(made(IDS)), apart, atol=1e-4)


def test_optimizers_and_files_never_see_the_merged_weight() -> None:
    made = network(3)
    names = [parameter.name for parameter in made.get_parameters()]
    made.set_train(False)
    assert [parameter.name for parameter in made.get_parameters()] == names
    assert list(made.parameters_dict()) == names
    assert made.layers[0].weight.name.startswith("layers.0.weight_merged")
    with pytest.raises(RuntimeError, match="cannot be set"):
        made.layers[0].weight.set_data(made.layers[0].base)


def test_two_cells_that_share_a_base_are_both_merged_again() -> None:
    first, second = make("linear", seed=1), make("linear", seed=2)
    second.weight = first.weight
    x = input_for(first)
    for cell in (first, second):
        cell.set_train(False)
    first.base.set_data(first.base * 2)
    merged = [array(cell(x)) for cell in (first, second)]
    first.set_train(True)
    first.base.set_data(first.base * 1)
    second.set_train(True)
    for cell, wanted in zip((first, second), merged, strict=True):
        np.testing.assert_allclose(array(cell(x)), wanted, atol=1e-4)
    assert "set_data" not in first.base.__dict__


@pytest.mark.parametrize("merged", [True, False])
def test_a_deep_copy_lives_its_own_life(merged: bool) -> None:
    cell = make("linear")
    cell.set_train(False)
    cell.set_train(not merged)
    twin = copy.deepcopy(cell)
    x = input_for(cell)
    before = bits(cell(x))
    assert twin.merged is merged
    assert bits(twin(x)) == before
    twin.base.set_data(twin.base * 3)
    assert bits(twin(x)) != before
    assert bits(cell(x)) == before
    merged_names = {one.__dict__["_merged_parameter"].name for one in (cell, twin) if one.merged}
    assert len(merged_names) == 2 * merged
    twin.set_train(True)
    cell.set_train(True)
    assert bits(twin.base) != bits(cell.base)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind != "embedding"])
def test_mixed_precision_computes_in_the_inputs_type(kind: str) -> None:
    cell = make(kind)
    x = input_for(cell)
    for train in (True, False):
        cell.set_train(train)
        wanted = array(cell(x))
        half = cell(x.astype(ms.float16))
        assert half.dtype == ms.float16
        np.testing.assert_allclose(array(half), wanted, atol=0.02 * np.abs(wanted).max())


def test_to_float_works_in_both_modes(mode: str) -> None:
    made = network(3)
    wanted = array(made(IDS))
    half = network(3)
    half.to_float(ms.float16)
    for train in (True, False):
        half.set_train(train)
        np.testing.assert_allclose(array(half(IDS)), wanted, atol=0.02 * np.abs(wanted).max())


def test_without_merge_weights_nothing_turns() -> None:
    cell = Linear(8, 6, 2, 3, merge_weights=False)
    cell.set_train(False)
    assert not cell.merged


def test_merged_parameters_are_the_plain_networks(tmp_path: Path) -> None:
    class Plain(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 8)
            self.layers = nn.SequentialCell(nn.Dense(8, 8), nn.ReLU(), nn.Dense(8, 6))
            self.head = nn.Dense(6, 4)

        def construct(self, ids: ms.Tensor) -> ms.Tensor:
            return self.head(self.layers(self.words(ids)))

    made = network(3)
    before = state(made)
    path = str(tmp_path / "plain.ckpt")
    ms.save_checkpoint(merged_parameters(made), path)
    assert state(made) == before
    plain = Plain()
    assert ms.load_param_into_net(plain, ms.load_checkpoint(path)) == ([], [])
    made.set_train(False)
    np.testing.assert_allclose(array(plain(IDS)), array(made(IDS)), atol=1e-5)


def test_merged_parameters_fold_the_bias_on_b() -> None:
    cell = make("lora_bias")
    plain = nn.Dense(8, 6)
    assert ms.load_param_into_net(plain, merged_parameters(cell)) == ([], [])
    x = input_for(cell)
    np.testing.assert_allclose(array(plain(x)), array(cell(x)), atol=1e-4)


def test_what_no_single_weight_holds_is_refused_by_name() -> None:
    class Odd(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = Conv2d(4, 4, 3, 2, groups=2, conv_form="peft")
            self.unbiased = Linear(4, 4, 2, bias=False, lora_bias=True)
            self.words = Embedding(9, 4, 2)
            self.head = Linear(4, 9, 0)
            self.head.weight = self.words.embedding_table

    with pytest.raises(MappingError) as caught:
        merged_parameters(Odd())
    places = "\n".join(caught.value.where)
    assert "grouped: peft's factors" in places
    assert "unbiased: lora_bias needs a bias" in places
    assert "words: words.embedding_table is shared" in places
    assert "head" not in places


class Loralibs(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = loralib.Linear(8, 6, 4, lora_alpha=8)
        self.qkv = loralib.MergedLinear(8, 12, 2, lora_alpha=8, enable_lora=[True, False, True])
        self.conv = loralib.Conv2d(4, 6, 3, r=2, lora_alpha=8)


class Ours(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.fc = Linear(8, 6, 4, 8)
        self.qkv = MergedLinear(8, 12, 2, 8, enable_lora=[True, False, True])
        self.conv = Conv2d(4, 6, 3, 2, 8)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "adapter"])
def test_a_converted_checkpoint_loads_with_nothing_left_over(whole: bool, tmp_path: Path) -> None:
    judge, cell = Loralibs(), Ours()
    for name, parameter in judge.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    saved = judge.state_dict() if whole else loralib.lora_state_dict(judge)
    torch.save(saved, tmp_path / "loralib.pt")
    facts = [Fact("*", "alpha", 8), Fact("qkv", "enable_lora", [True, False, True]), Fact("*", "merged", False)]
    facts += [Fact("conv", "kernel_size", [3, 3]), Fact("conv", "kind", "conv2d")]
    options = ConvertOptions(facts=Facts(tuple(facts)), family="identity", target_dialect="loralib-ms")
    convert(tmp_path / "loralib.pt", tmp_path / "ours.ckpt", options)
    missing, unused = ms.load_param_into_net(cell, ms.load_checkpoint(str(tmp_path / "ours.ckpt")))
    assert unused == []
    assert missing == ([] if whole else [name for name in cell.parameters_dict() if "lora_" not in name])
    if whole:
        x = torch.randn(3, 8)
        for name in ("fc", "qkv"):
            found = array(getattr(cell, name)(tensor(x)))
            np.testing.assert_allclose(found, array(getattr(judge, name)(x)), atol=1e-4)
        image = torch.randn(2, 4, 5, 5)
        np.testing.assert_allclose(array(cell.conv(tensor(image))), array(judge.conv(image)), atol=1e-4)
