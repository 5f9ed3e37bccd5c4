"""replace_layers: on the reference networks against peft, on plain cells, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
from mindspore import nn
from tiny_models import CASES, config_of, converted, inputs, loaded, ms_output, real, torch_output

from lorabridge.actions.convert import ConvertOptions, convert
from lorabridge.errors import MappingError, UsageError
from lorabridge.layers import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoRADense, MergedLinear
from lorabridge.layers.replace import replace_layers
from lorabridge.layers.training import lora_state_dict, mark_only_lora_as_trainable

CLOSE = 5e-5
R, ALPHA = 3, 5
PEFT = {
    "gpt2": (["c_attn", "attn.c_proj", "c_fc"], ["dense1", "dense2", "dense3", "attention.projection", "mapping"]),
    "bert-tokens": (["query", "value", "output.dense"], ["dense1", "dense3", "projection"]),
    "llama": (["q_proj", "v_proj", "down_proj", "embed_tokens"], ["wq", "wv", "w2", "tok_embeddings"]),
    "qwen2": (["k_proj", "up_proj", "lm_head"], ["wk", "w3", "lm_head"]),
    "qwen2-tied": (["q_proj", "embed_tokens"], ["wq", "tok_embeddings"]),  # the head keeps the base table, as in peft
}  # fmt: skip


def adapt(name: str, folder: Path, **options: object) -> torch.nn.Module:
    """Save the base, converted, and a random peft adapter, converted; return the peft model."""
    base = real(CASES[name])
    converted(CASES[name], base, folder)
    rewritten = {"gpt2": {"fan_in_fan_out": True}}.get(name, {})
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=PEFT[name][0], **rewritten, **options)
    model = peft.get_peft_model(base, config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter += torch.randn_like(parameter) * 0.2
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return model


def adapter(folder: Path, name: str, dialect: str) -> dict[str, ms.Parameter]:
    target = folder / f"{dialect}.ckpt"
    options = ConvertOptions(
        family=CASES[name].family, layout=CASES[name].layout, config=folder / "hf/config.json", target_dialect=dialect
    )
    convert(folder / "adapter", target, options)
    return dict(ms.load_checkpoint(str(target)))


def join(network: nn.Cell, base: Path, factors: dict[str, ms.Parameter]) -> None:
    """Load base and adapter together; nothing may be left over on either side."""
    state = {**ms.load_checkpoint(str(base)), **factors}
    assert ms.load_param_into_net(network, state, strict_load=True) == ([], [])


@pytest.mark.parametrize("name", PEFT)
def test_base_and_adapter_load_whole_and_compute_what_peft_computes(name: str, tmp_path: Path) -> None:
    model = adapt(name, tmp_path)
    network = loaded(config_of(tmp_path / "hf"), tmp_path / "base.ckpt")
    ids, mask = inputs()
    kept = mask.astype(bool)
    plain = ms_output(network, ids, mask)
    done = replace_layers(network, PEFT[name][1], r=R, lora_alpha=ALPHA)
    factors = adapter(tmp_path, name, "loralib-ms")
    assert {p for item in done for p in item.parameters} == set(factors)
    assert set(lora_state_dict(network)) == set(factors)
    assert not any(parameter.name in factors for parameter in network.untrainable_params())
    join(network, tmp_path / "base.ckpt", factors)
    want = torch_output(model, ids, mask)
    got = ms_output(network, ids, mask)
    assert np.abs(got - want)[kept].max() < CLOSE
    assert np.abs(plain - want)[kept].max() > 1e-2


def test_rslora_and_dora_compute_what_peft_computes(tmp_path: Path) -> None:
    name = "llama"
    PEFT_TARGETS = (["q_proj", "v_proj", "down_proj"], ["wq", "wv", "w2"])
    base = real(CASES[name])
    converted(CASES[name], base, tmp_path)
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=PEFT_TARGETS[0], use_rslora=True, use_dora=True)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter += torch.randn_like(parameter) * 0.1
    model.save_pretrained(tmp_path / "adapter")
    network = loaded(config_of(tmp_path / "hf"), tmp_path / "base.ckpt")
    ids, mask = inputs()
    plain = ms_output(network, ids, mask)
    replace_layers(network, PEFT_TARGETS[1], r=R, lora_alpha=ALPHA, use_rslora=True, use_dora=True)
    assert np.abs(ms_output(network, ids, mask) - plain).max() < CLOSE  # magnitudes start from the loaded base
    join(network, tmp_path / "base.ckpt", adapter(tmp_path, name, "loralib-ms"))
    assert np.abs(ms_output(network, ids, mask) - torch_output(model, ids, mask))[mask.astype(bool)].max() < CLOSE


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_mindpet_layers_compute_what_peft_computes(name: str, tmp_path: Path) -> None:
    model = adapt(name, tmp_path)
    network = loaded(config_of(tmp_path / "hf"), tmp_path / "base.ckpt")
    done = replace_layers(network, PEFT[name][1], r=R, lora_alpha=ALPHA, dialect="mindpet")
    factors = adapter(tmp_path, name, "mindpet")
    assert {p for item in done for p in item.parameters} == set(factors)
    assert all(isinstance(item.new, LoRADense) for item in done)
    join(network, tmp_path / "base.ckpt", factors)
    ids, mask = inputs()
    want, got = torch_output(model, ids, mask), ms_output(network, ids, mask)
    assert np.abs(got - want)[mask.astype(bool)].max() < CLOSE
    for item in done:
        item.new.merge()
    assert np.abs(ms_output(network, ids, mask) - want)[mask.astype(bool)].max() < CLOSE


@pytest.mark.parametrize(
    ("name", "first", "second", "kind"), [("gpt2", "dense1", "dense2", "lora_B"), ("llama", "wq", "wv", "lora_A")]
)
def test_an_adapter_on_the_wrong_layer_is_seen_in_the_logits(
    name: str, first: str, second: str, kind: str, tmp_path: Path
) -> None:
    model = adapt(name, tmp_path)
    network = loaded(config_of(tmp_path / "hf"), tmp_path / "base.ckpt")
    replace_layers(network, PEFT[name][1], r=R, lora_alpha=ALPHA)
    factors = adapter(tmp_path, name, "loralib-ms")
    exchanged = {}
    for key, value in factors.items():
        other = key.replace(first, second) if first in key else key.replace(second, first)
        key = other if key.endswith(kind) else key
        exchanged[key] = ms.Parameter(value, name=key)
    join(network, tmp_path / "base.ckpt", exchanged)
    ids, mask = inputs()
    assert np.abs(ms_output(network, ids, mask) - torch_output(model, ids, mask))[mask.astype(bool)].max() > 1e-2


class Plain(nn.Cell):
    """One of each cell that can be adapted, under every kind of parent."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 8)
        self.rows = nn.SequentialCell(nn.Dense(8, 8, activation="relu"), nn.Dense(8, 8, has_bias=False))
        self.listed = nn.CellList([nn.Dense(8, 8), nn.Dense(8, 12)])
        self.named = nn.CellDict({"one": nn.Dense(12, 12)})
        self.minted = ms.mint.nn.Linear(12, 12)
        self.line = nn.Conv1d(4, 6, 3, pad_mode="pad", padding=2, has_bias=True, stride=2)
        self.plane = nn.Conv2d(4, 6, 3, pad_mode="same", dilation=2, group=2)
        self.space = nn.Conv3d(4, 6, 3, pad_mode="valid", has_bias=True)

    def construct(self, ids: ms.Tensor, x: ms.Tensor) -> tuple[ms.Tensor, ...]:
        y = self.rows(self.words(ids))
        for cell in self.listed:
            y = cell(y)
        y = self.minted(self.named["one"](y))
        flat = x.reshape((x.shape[0], x.shape[1], -1))
        return y, self.line(flat), self.plane(x), self.space(ms.ops.stack([x] * 5, 2))


TARGETS = ["words", "rows.0", "rows.1", "listed.0", "listed.1", "named.one", "minted", "line", "plane", "space"]


def arguments() -> tuple[ms.Tensor, ms.Tensor]:
    rng = np.random.default_rng(2)
    return ms.Tensor(rng.integers(0, 9, (2, 5)), ms.int32), ms.Tensor(rng.normal(size=(2, 4, 7, 6)).astype(np.float32))


def outputs(net: nn.Cell) -> list[np.ndarray]:
    return [out.asnumpy() for out in net(*arguments())]


def test_plain_cells_keep_their_parameters_names_and_outputs() -> None:
    net = Plain()
    before = {parameter.name: parameter for parameter in net.get_parameters()}
    want = outputs(net)
    done = replace_layers(net, TARGETS, r=2, lora_alpha=3)
    assert [item.path for item in done] == TARGETS
    after = {parameter.name: parameter for parameter in net.get_parameters()}
    assert all(after[name] is parameter for name, parameter in before.items())
    assert set(after) - set(before) == {f"{path}.lora_{kind}" for path in TARGETS for kind in "AB"}
    cells = dict(net.cells_and_names())
    assert all(cells[item.path] is item.new for item in done)
    kinds = [Embedding, *[Linear] * 6, Conv1d, Conv2d, Conv3d]
    assert all(isinstance(item.new, kind) for item, kind in zip(done, kinds, strict=True))
    for got, wanted in zip(outputs(net), want, strict=True):
        assert np.abs(got - wanted).max() < 1e-5
    mark_only_lora_as_trainable(net)
    assert {p.name for p in net.trainable_params()} == set(after) - set(before)


def test_every_new_layer_has_an_effect_and_merging_keeps_it() -> None:
    net = Plain()
    want = outputs(net)
    for item in replace_layers(net, TARGETS, r=2, lora_alpha=3, merge_weights=True):
        alone = [p for p in item.new.get_parameters() if "lora_" in p.name]
        kept = [p.asnumpy().copy() for p in alone]
        for parameter in alone:
            parameter.set_data(ms.ops.ones_like(parameter) * 0.3)
        got = outputs(net)
        assert max(np.abs(a - b).max() for a, b in zip(got, want, strict=True)) > 1e-3, item.path
        net.set_train(False)
        assert item.new.merged
        assert max(np.abs(a - b).max() for a, b in zip(outputs(net), got, strict=True)) < 1e-4, item.path
        net.set_train(True)
        for parameter, value in zip(alone, kept, strict=True):
            parameter.set_data(ms.Tensor(value))


def test_a_compiled_network_sees_its_new_layers() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    net = nn.SequentialCell(nn.Dense(3, 4, activation="tanh"), nn.Dense(4, 2))
    x = ms.Tensor(np.ones((2, 3), np.float32))
    want = net(x).asnumpy()
    (item,) = replace_layers(net, ["0"], r=2, lora_alpha=3)
    assert np.abs(net(x).asnumpy() - want).max() < 1e-6
    item.new.lora_B.set_data(ms.ops.ones_like(item.new.lora_B))
    assert np.abs(net(x).asnumpy() - want).max() > 1e-4


def test_names_globs_regular_expressions_and_exclusions() -> None:
    def paths(targets: str | list[str], **more: object) -> list[str]:
        return [item.path for item in replace_layers(Plain(), targets, r=1, lora_alpha=1, **more)]

    assert paths(["0"]) == ["rows.0", "listed.0"]
    assert paths(["listed.0", "minted"]) == ["listed.0", "minted"]
    assert paths(["*.[01]"], exclude=["listed.1"]) == ["rows.0", "rows.1", "listed.0"]
    assert paths(r"(rows|listed)\.\d") == ["rows.0", "rows.1", "listed.0", "listed.1"]
    assert paths("listed.*", exclude=r".*\.0") == ["listed.1"]


def test_what_fits_nothing_is_listed_and_nothing_is_changed() -> None:
    net = Plain()
    with pytest.raises(MappingError) as error:
        replace_layers(net, ["minted", "mint", "*.q_proj"], r=1, lora_alpha=1)
    assert error.value.where == ("target 'mint'", "target '*.q_proj'")
    assert "minted" in error.value.hint
    with pytest.raises(MappingError, match="exclude 'line'"):
        replace_layers(net, ["minted"], exclude=["line"], r=1, lora_alpha=1)
    with pytest.raises(MappingError, match="target 'rows'"):
        replace_layers(net, "rows", r=1, lora_alpha=1)
    with pytest.raises(UsageError, match="regular expression"):
        replace_layers(net, "(", r=1, lora_alpha=1)
    with pytest.raises(UsageError, match="targets is empty"):
        replace_layers(net, [], r=1, lora_alpha=1)
    assert not any("lora_" in parameter.name for parameter in net.get_parameters())


class Odd(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Dense(4, 4)
        self.norm = nn.LayerNorm((4,))
        self.strided = nn.Conv2d(4, 4, 3, stride=2, pad_mode="same")
        self.uneven = nn.Conv2d(4, 4, 3, pad_mode="pad", padding=(0, 1, 0, 1))
        self.child = type("Child", (nn.Dense,), {})(4, 4)
        self.first = self.second = nn.Dense(4, 4)


def test_cells_that_cannot_be_adapted_are_all_listed_and_nothing_is_changed() -> None:
    net = Odd()
    with pytest.raises(MappingError) as error:
        replace_layers(net, ["good", "norm", "strided", "uneven", "child", "first"], r=2, lora_alpha=1)
    said = [place.split(":")[0] for place in error.value.where]
    assert said == ["norm", "strided", "uneven", "child", "first"]
    assert type(net.good) is nn.Dense
    replace_layers(net, ["good"], r=2, lora_alpha=1)
    with pytest.raises(MappingError, match="has an adapter already"):
        replace_layers(net, ["good"], r=2, lora_alpha=1)
    with pytest.raises(MappingError, match="mindpet"):
        replace_layers(Plain(), ["words"], r=2, lora_alpha=1, dialect="mindpet")
    with pytest.raises(MappingError, match="use_dora"):
        replace_layers(Plain(), ["minted"], r=2, lora_alpha=1, dialect="mindpet", use_dora=True)
    with pytest.raises(ValueError, match="r must be"):
        replace_layers(Plain(), ["minted"], r=0, lora_alpha=1)


class Shared(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.head = nn.Dense(4, 5, has_bias=False)
        self.head.weight = self.words.embedding_table


def test_a_shared_parameter_stays_shared_and_each_cell_has_its_own_factors() -> None:
    net = Shared()
    replace_layers(net, ["words", "head"], r=2, lora_alpha=1)
    assert net.head.base is net.words.base
    names = [parameter.name for parameter in net.get_parameters()]
    assert sorted(names) == sorted(
        ["words.embedding_table", *(f"{p}.lora_{k}" for p in ("words", "head") for k in "AB")]
    )


def test_names_below_a_wrapper_stay_those_of_the_network() -> None:
    net = nn.SequentialCell(nn.Dense(3, 3), nn.Dense(3, 2))
    wrapper = nn.WithLossCell(net, nn.MSELoss())
    (item,) = replace_layers(wrapper, ["0"], r=2, lora_alpha=1)
    assert item.parameters == ("0.lora_A", "0.lora_B")
    assert net[0] is item.new


def test_blocks_of_a_fused_layer_can_be_adapted_alone() -> None:
    net = nn.SequentialCell(nn.Dense(4, 12))
    (item,) = replace_layers(net, ["0"], r=2, lora_alpha=1, enable_lora=[True, False, True])
    assert isinstance(item.new, MergedLinear)
    assert item.new.lora_A.shape == (4, 4)


def test_float16_networks_get_float16_factors() -> None:
    net = nn.SequentialCell(nn.Dense(4, 4, dtype=ms.float16))
    for dialect in ("loralib-ms", "mindpet"):
        net = nn.SequentialCell(nn.Dense(4, 4, dtype=ms.float16))
        replace_layers(net, ["0"], r=2, lora_alpha=1, dialect=dialect)
        assert {parameter.dtype for parameter in net.get_parameters()} == {ms.float16}
        assert net(ms.Tensor(np.ones((2, 4)), ms.float16)).dtype == ms.float16
