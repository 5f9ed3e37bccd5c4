"""Who trains and what is saved: against loralib on equivalent torch networks, and against MindPet's documentation."""

from __future__ import annotations

from pathlib import Path

import loralib
import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore.train import CheckpointConfig, Model

from lorabridge.errors import MappingError, OutputError, UsageError
from lorabridge.layers import Embedding, Linear, LoRADense, MergedLinear
from lorabridge.layers.training import (
    TrainableParamsCheckPoint,
    freeze_delta,
    is_lora,
    lora_state_dict,
    mark_only_lora_as_trainable,
)  # fmt: skip


class TorchNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = loralib.Embedding(7, 6, r=2)
        self.fused = loralib.MergedLinear(6, 12, r=2, enable_lora=[True, False])
        self.norm = torch.nn.LayerNorm(12)
        self.plain = torch.nn.Linear(12, 5)
        self.none = loralib.Linear(5, 5, r=0)
        self.head = loralib.Linear(5, 3, r=2, bias=True)
        self.bare = loralib.Linear(3, 3, r=1, bias=False)


class Net(ms.nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.words = Embedding(7, 6, r=2)
        self.fused = MergedLinear(6, 12, r=2, enable_lora=[True, False])
        self.norm = ms.nn.LayerNorm((12,))
        self.plain = ms.nn.Dense(12, 5)
        self.none = Linear(5, 5, r=0)
        self.head = Linear(5, 3, r=2, bias=True)
        self.bare = Linear(3, 3, r=1, bias=False)


NAMES = {"words.embedding_table": "words.weight", "norm.gamma": "norm.weight", "norm.beta": "norm.bias"}


def torch_names(names: set[str]) -> set[str]:
    return {NAMES.get(name, name) for name in names}


def training(net: ms.nn.Cell) -> set[str]:
    return {parameter.name for parameter in net.trainable_params()}


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_same_parameters_train_as_in_loralib(bias: str) -> None:
    module, net = TorchNet(), Net()
    loralib.mark_only_lora_as_trainable(module, bias=bias)
    mark_only_lora_as_trainable(net, bias=bias)
    assert torch_names(training(net)) == {name for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_the_same_parameters_are_saved_as_in_loralib(bias: str, tmp_path: Path) -> None:
    module, net = TorchNet(), Net()
    wanted = {name: tuple(value.shape) for name, value in loralib.lora_state_dict(module, bias=bias).items()}
    if bias == "lora_only":  # loralib takes the bias of layers with factors here, of all its layers when training
        wanted["none.bias"] = (5,)
    saved = lora_state_dict(net, bias=bias)
    assert {NAMES.get(name, name): tuple(p.shape) for name, p in saved.items()} == wanted
    ms.save_checkpoint(saved, str(tmp_path / "lora.ckpt"))
    again = ms.load_checkpoint(str(tmp_path / "lora.ckpt"))
    assert set(again) == set(saved)
    assert all((again[name].asnumpy() == saved[name].asnumpy()).all() for name in saved)
    assert ms.load_param_into_net(net, again)[1] == []


def test_an_earlier_choice_does_not_matter() -> None:
    net = Net()
    mark_only_lora_as_trainable(net, bias="all")
    for parameter in net.get_parameters():
        parameter.requires_grad = not parameter.requires_grad
    mark_only_lora_as_trainable(net)
    assert training(net) == {name for name in (p.name for p in net.get_parameters()) if "lora_" in name}


def test_a_merged_network_saves_the_same_state() -> None:
    net = Net()
    net.head.lora_B.set_data(ms.ops.ones_like(net.head.lora_B))
    before = {name: p.asnumpy().copy() for name, p in lora_state_dict(net, "all").items()}
    net.set_train(False)
    assert net.head.merged
    after = lora_state_dict(net, "all")
    assert set(after) == set(before)
    assert all((after[name].asnumpy() == value).all() for name, value in before.items())


def test_a_network_without_adapters_and_an_unknown_bias_are_refused() -> None:
    plain = ms.nn.SequentialCell(ms.nn.Dense(2, 2))
    for function in (mark_only_lora_as_trainable, lora_state_dict):
        with pytest.raises(MappingError, match="no LoRA parameters"):
            function(plain)
        with pytest.raises(ValueError, match="none, all, lora_only"):
            function(Net(), bias="some")  # type: ignore[arg-type]
    assert training(plain) == {"0.weight", "0.bias"}


def test_lora_is_a_part_of_a_name_not_any_letters() -> None:
    assert all(map(is_lora, ["lora_A", "p.lora_A", "p.lora_bias", "p.in_proj_lora_B", "p.mindpet_delta_lora_a"]))
    assert not any(map(is_lora, ["flora_norm.weight", "p.explora_tion", "lora.weight", "p.weight"]))


class Delta(ms.nn.Cell):
    """Parameters called as MindPet's algorithms call them."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = LoRADense(4, 4, 2, 2)
        self.down = ms.nn.Dense(4, 2)
        self.norm = ms.nn.LayerNorm((4,))
        for mode in ("adapter", "low_rank_adapter", "prefixtuning", "ptuning2"):
            setattr(self, f"mindpet_delta_{mode}_layer", ms.nn.Dense(4, 4))
        self.mindpet_delta_ptuning2_prefix = ms.Parameter(
            ms.Tensor(np.arange(3)), name="mindpet_delta_ptuning2_prefix", requires_grad=False
        )


LORA = {"dense.mindpet_delta_lora_a", "dense.mindpet_delta_lora_b"}
BIASES = {name for name in training(Delta()) if name.endswith("bias")}


def test_every_mode_trains_its_own_parameters_and_nothing_else() -> None:
    net = Delta()
    for mode in ("adapter", "low_rank_adapter", "prefixtuning", "ptuning2"):
        freeze_delta(net, mode)
        layer = f"mindpet_delta_{mode}_layer"
        assert training(net) == {f"{layer}.weight", f"{layer}.bias"}
    freeze_delta(net, "lora")
    assert training(net) == LORA
    freeze_delta(net, "bitfit")
    assert training(net) == BIASES
    freeze_delta(net, ["lora", "bitfit"])
    assert training(net) == LORA | BIASES


def test_a_mode_in_capitals_means_the_same() -> None:
    net = Delta()
    freeze_delta(net, "LoRA")
    assert training(net) == LORA


def test_lora_layers_with_our_names_train_in_mode_lora() -> None:
    net = Net()
    freeze_delta(net, "lora")
    assert training(net) == set(lora_state_dict(net))


def test_patterns_freeze_and_train_beyond_the_mode() -> None:
    net = Delta()
    freeze_delta(net, "lora", exclude=["down.*", "norm.?eta"])
    assert training(net) == LORA | {"down.weight", "down.bias", "norm.beta"}
    freeze_delta(net, "lora", include=["*lora_b"])
    assert training(net) == {"dense.mindpet_delta_lora_a"}
    freeze_delta(net, "lora", include=["*"], exclude=["*lora_a", "down.bias"])
    assert training(net) == {"dense.mindpet_delta_lora_a"}


def test_names_in_both_lists_stay_as_the_mode_has_them() -> None:
    net = Delta()
    freeze_delta(net, "lora", include=["*lora*", "down.*"], exclude=["*lora*", "down.*"])
    assert training(net) == LORA


def test_what_fits_nothing_is_an_error_and_changes_nothing() -> None:
    net = Delta()
    before = training(net)
    with pytest.raises(MappingError) as error:
        freeze_delta(net, "lora", include=["*qkv*"], exclude=["*key*", "down.*"])
    assert error.value.where == ("include pattern '*qkv*'", "exclude pattern '*key*'")
    with pytest.raises(MappingError, match="mode 'lora'"):
        freeze_delta(ms.nn.SequentialCell(ms.nn.Dense(2, 2)), "lora")
    assert training(net) == before


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [(("other",), ValueError), ((3,), TypeError), (("lora", "*"), TypeError), (("lora", [3]), TypeError),
     (("lora", []), TypeError)],
)  # fmt: skip
def test_arguments_of_another_kind_are_refused(arguments: tuple[object, ...], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        freeze_delta(Delta(), *arguments) if arguments != (3,) else freeze_delta(Delta(), [3])  # type: ignore[arg-type]


class Regression(ms.nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.inner = ms.nn.Dense(3, 4)
        self.outer = Linear(4, 1, r=2, lora_alpha=4)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return self.outer(self.inner(x))


def train(net: ms.nn.Cell, callback: TrainableParamsCheckPoint, epochs: int = 2) -> None:
    rows = [(np.ones(3, np.float32) * k, np.ones(1, np.float32)) for k in range(6)]
    data = ms.dataset.GeneratorDataset(rows, ["x", "y"], shuffle=False).batch(2)
    optimizer = ms.nn.Adam(net.trainable_params(), 0.01)
    model = Model(net, ms.nn.MSELoss(), optimizer)
    model.train(epochs, data, callbacks=[callback], dataset_sink_mode=False)


def test_only_the_adapter_is_saved_and_the_optimizer_apart(tmp_path: Path) -> None:
    net = Regression()
    mark_only_lora_as_trainable(net)
    config = CheckpointConfig(save_checkpoint_steps=3, keep_checkpoint_max=5)
    train(net, TrainableParamsCheckPoint(tmp_path / "made", config=config, optimizer="separate"))
    files = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert files == [f"DELTA_CKP-{epoch}_3{kind}.ckpt" for epoch in (1, 2) for kind in ("", ".optimizer")]
    saved = ms.load_checkpoint(str(tmp_path / "made/DELTA_CKP-2_3.ckpt"))
    assert set(saved) == {"outer.lora_A", "outer.lora_B"}
    assert all((saved[name].asnumpy() == p.asnumpy()).all() for name, p in lora_state_dict(net).items())
    state = set(ms.load_checkpoint(str(tmp_path / "made/DELTA_CKP-2_3.optimizer.ckpt")))
    assert {"moment1.outer.lora_A", "moment2.outer.lora_B", "global_step"} <= state
    assert not state & set(saved)
    assert not any(name.startswith("inner.") for name in state)


def test_the_optimizer_is_left_out_by_default_and_old_files_go(tmp_path: Path) -> None:
    net = Regression()
    mark_only_lora_as_trainable(net, bias="lora_only")
    (tmp_path / "DELTA_CKP-0_1.ckpt").write_bytes(b"of another run")
    config = CheckpointConfig(save_checkpoint_steps=1, keep_checkpoint_max=2)
    train(net, TrainableParamsCheckPoint(tmp_path, config=config))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["DELTA_CKP-0_1.ckpt", "DELTA_CKP-2_2.ckpt", "DELTA_CKP-2_3.ckpt"]
    assert set(ms.load_checkpoint(str(tmp_path / names[2]))) == {"outer.lora_A", "outer.lora_B", "outer.bias"}


def test_the_end_of_training_is_saved_too(tmp_path: Path) -> None:
    net = Regression()
    mark_only_lora_as_trainable(net)
    train(net, TrainableParamsCheckPoint(tmp_path, "mine", CheckpointConfig(save_checkpoint_steps=100)), epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine-1_3.ckpt"]


def test_links_and_options_without_support_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(OutputError, match="symbolic link"):
        TrainableParamsCheckPoint(tmp_path / "link")
    with pytest.raises(UsageError, match="prefix"):
        TrainableParamsCheckPoint(tmp_path, "../x")
    with pytest.raises(UsageError, match="keep_checkpoint_per_n_minutes"):
        TrainableParamsCheckPoint(
            tmp_path, config=CheckpointConfig(keep_checkpoint_max=0, keep_checkpoint_per_n_minutes=3)
        )
    with pytest.raises(UsageError, match="leave out"):
        TrainableParamsCheckPoint(tmp_path, optimizer="with")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["lora", "adapter", "low_rank_adapter", "prefixtuning", "bitfit", "ptuning2"])
@pytest.mark.parametrize(
    "patterns",
    [{}, {"exclude": ["down.*"]}, {"include": ["*weight*", "*lora_a"]},
     {"include": ["*lora*", "down.*"], "exclude": ["*lora*", "down.*", "norm*"]}],
)  # fmt: skip
def test_a_fresh_network_trains_what_mindpet_trains(
    mode: str, patterns: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # MindPet writes its log there
    graph = pytest.importorskip("mindpet.graph")
    ours, theirs = Delta(), Delta()
    freeze_delta(ours, mode, **patterns)
    graph.freeze_delta(theirs, mode, **patterns)
    assert training(ours) == training(theirs)
