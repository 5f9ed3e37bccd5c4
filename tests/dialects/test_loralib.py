"""Files really made by loralib 0.1.2, through the hub and back into loralib."""

from __future__ import annotations

import itertools

import loralib as lora
import pytest
import torch
from bare import content, evaluated, facts, written
from torch import nn

from lorabridge.dialects import factors
from lorabridge.dialects.adapter import Adapter
from lorabridge.dialects.loralib import Loralib
from lorabridge.dialects.loralib_ms import LoralibMs
from lorabridge.errors import MappingError

LORALIB, MS = Loralib(), LoralibMs()


class Net(nn.Module):
    """One of every layer that loralib has, and one plain layer."""

    def __init__(self):
        super().__init__()
        self.emb = lora.Embedding(11, 6, r=2, lora_alpha=6)
        self.fc = lora.Linear(6, 8, r=3, lora_alpha=5)
        self.turned = lora.Linear(8, 12, r=2, lora_alpha=16, fan_in_fan_out=True)
        self.qkv = lora.MergedLinear(12, 18, r=2, lora_alpha=7, enable_lora=[True, False, True])
        self.conv = lora.Conv2d(1, 4, 3, r=2, lora_alpha=9)
        self.point = lora.Conv2d(4, 5, 1, r=2, lora_alpha=2)
        self.head = nn.Linear(5, 3)

    def forward(self, ids):
        x = self.qkv(self.turned(self.fc(self.emb(ids))))
        return self.head(self.point(self.conv(x[:, None])).mean(dim=(2, 3)))


FACTS = (
    ("fc", "alpha", 5), ("emb", "alpha", 6), ("turned", "alpha", 16), ("qkv", "alpha", 7), ("conv", "alpha", 9),
    ("point", "alpha", 2), ("emb", "kind", "embedding"), ("qkv", "enable_lora", [True, False, True]),
    ("conv", "kernel_size", 3), ("point", "kernel_size", [1, 1]), ("turned", "kind", "linear"),
)  # fmt: skip


def net(seed=0):
    """Return a network whose adapter does something."""
    torch.manual_seed(seed)
    made = Net()
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return made


IDS = torch.arange(33).view(3, 11) % 11


def layer(make, **kinds):
    """Return a one-layer adapter file and its layer."""
    torch.manual_seed(3)
    made = nn.Sequential(make)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return made


def test_every_layer_goes_through_the_hub_and_comes_back_to_the_same_output():
    made = net()
    file = lora.lora_state_dict(made, bias="all")
    given = content(file, *FACTS)
    assert LORALIB.detect(given)
    adapter = LORALIB.parse(given)
    assert {m.path: m.kind for m in adapter.modules} == {
        "emb": "embedding", "fc": "linear", "turned": "linear", "qkv": "linear", "conv": "conv2d", "point": "conv2d",
    }  # fmt: skip
    assert {m.path: (m.scaling.alpha, m.scaling.rank) for m in adapter.modules} == {
        "emb": (6, 2), "fc": (5, 3), "turned": (16, 2), "qkv": (7, 2), "conv": (9, 2), "point": (2, 2),
    }  # fmt: skip
    tensors, again = written(LORALIB, adapter, file)
    assert {n: t.numpy().tobytes() for n, t in tensors.items()} == {n: t.numpy().tobytes() for n, t in file.items()}

    fresh = net(seed=1)
    fresh.load_state_dict({**net().state_dict(), **{n: torch.zeros_like(t) for n, t in file.items()}})
    _, unexpected = fresh.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert torch.equal(fresh(IDS), made(IDS))
    # the facts that come with the file are enough to read it again, without flags
    known = content(tensors).specs
    repeated = LORALIB.parse(type(given)(known, {"container": "torch"}, None, again.facts, "file"))
    assert repeated.modules == adapter.modules


@pytest.mark.parametrize("mask", [m for n in (1, 2, 3) for m in itertools.product((True, False), repeat=n) if any(m)])
def test_merged_linear_with_every_mask(mask):
    made = layer(lora.MergedLinear(5, 12, r=2, lora_alpha=3, enable_lora=list(mask)))
    file = lora.lora_state_dict(made)
    adapter = LORALIB.parse(content(file, ("alpha", 3), ("enable_lora", list(mask))))
    (module,) = adapter.modules
    assert module.out == 12
    rows = 12 // len(mask)
    assert [(t.start, t.stop) for t in module.terms] == [(i * rows, (i + 1) * rows) for i, on in enumerate(mask) if on]
    tensors, out = written(LORALIB, adapter, file)
    assert all(torch.equal(tensors[name], file[name]) for name in file)
    if mask != (True,):
        assert out.facts.get("0", "enable_lora") == list(mask)

    grown = factors.grow(module)
    parts = evaluated([("a", grown.terms[0].a), ("b", grown.terms[0].b)], file)
    delta = made[0].merge_AB().detach() * made[0].scaling
    torch.testing.assert_close(parts["b"] @ parts["a"] * grown.scaling.value, delta)


def test_merged_linear_needs_its_mask_only_where_shapes_leave_a_choice():
    full = layer(lora.MergedLinear(5, 12, r=2, enable_lora=[True] * 3))
    file = lora.lora_state_dict(full)
    with pytest.raises(MappingError, match="does not say which") as caught:
        LORALIB.parse(content(file, ("alpha", 1)))
    assert "--enable-lora" in caught.value.hint
    known = LORALIB.parse(content(file, ("alpha", 1), ("out_features", 12)))
    assert len(known.modules[0].terms) == 3
    whole = LORALIB.parse(content(full.state_dict(), ("alpha", 1), ("merged", False)))
    assert len(whole.modules[0].terms) == 3

    one = layer(lora.MergedLinear(5, 12, r=2, enable_lora=[False, True, False]))
    with pytest.raises(MappingError, match="1 of 3 blocks"):
        LORALIB.parse(content(one.state_dict(), ("alpha", 1), ("merged", False)))
    with pytest.raises(MappingError, match="does not fit 1 enabled blocks"):
        LORALIB.parse(content(one.state_dict(), ("alpha", 1), ("merged", False), ("enable_lora", [True, True, False])))


def test_merged_linear_stored_in_out_order_is_recognised():
    made = layer(lora.MergedLinear(5, 12, r=2, enable_lora=[True, False, True], fan_in_fan_out=True))
    state = {name: tensor.contiguous() for name, tensor in made.state_dict().items()}
    given = content(state, ("alpha", 1), ("merged", False), ("enable_lora", [True, False, True]))
    (module,) = LORALIB.parse(given).modules
    assert module.fan_in_fan_out is True
    assert module.out == 12


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_bias_modes(bias):
    made = net()
    file = lora.lora_state_dict(made, bias=bias)
    adapter = LORALIB.parse(content(file, *FACTS))
    assert {e.kind for e in adapter.extras} <= {"bias"}
    names = {e.name for e in adapter.extras}
    expected = {n.replace("conv.conv", "conv").replace("point.conv", "point") for n in file if "lora_" not in n}
    assert names == expected
    if bias == "all":
        assert {"conv.bias", "point.bias", "head.bias"} <= names
    tensors, _ = written(LORALIB, adapter, file)
    assert all(torch.equal(tensors[name], file[name]) for name in file)
    assert set(tensors) == set(file)


@pytest.mark.parametrize("merged", [False, True])
def test_a_whole_state_dict_needs_to_be_told_whether_it_is_merged(merged):
    made = net()
    if merged:
        made.eval()
    state = {name: tensor.contiguous() for name, tensor in made.state_dict().items()}
    with pytest.raises(MappingError, match="does not say whether the adapter is merged") as caught:
        LORALIB.parse(content(state, *FACTS))
    assert "--merged" in caught.value.hint
    given = content(state, *FACTS, ("merged", merged))
    adapter = LORALIB.parse(given)
    assert bool(adapter.warnings) is merged
    assert {e.kind for e in adapter.extras} == {"base"}
    assert {m.path: m.fan_in_fan_out for m in adapter.modules if m.kind == "linear"} == {
        "fc": False, "turned": True, "qkv": False,
    }  # fmt: skip
    tensors, out = written(LORALIB, adapter, state)
    assert out.facts.get("fc", "merged") is merged
    fresh = net(seed=1)
    if merged:
        for module in fresh.modules():
            if isinstance(module, lora.LoRALayer):
                module.merged = True
    fresh.load_state_dict(tensors)
    assert torch.equal(fresh(IDS), made(IDS))


def test_trained_parameters_beside_an_adapter_are_modules_to_save():
    made = net()
    file = {**lora.lora_state_dict(made), "head.weight": made.head.weight, "head.bias": made.head.bias}
    kinds = {e.name: e.kind for e in LORALIB.parse(content(file, *FACTS)).extras}
    assert kinds == {"head.weight": "modules_to_save", "head.bias": "bias"}


def test_what_a_file_does_not_say_is_asked_for_at_once():
    file = lora.lora_state_dict(net())
    with pytest.raises(MappingError) as caught:
        LORALIB.parse(content(file))
    text = str(caught.value)
    for told in ("alpha is not stored", "does not say which", "--alpha", "--enable-lora", "--kind"):
        assert told in text


def test_an_embedding_is_told_from_linear_by_its_weight_or_by_a_flag():
    made = layer(lora.Embedding(11, 6, r=2, lora_alpha=2))
    with pytest.raises(MappingError, match="embedding or linear") as caught:
        LORALIB.parse(content(made.state_dict(), ("alpha", 2), ("merged", False)))
    assert "--kind" in caught.value.hint
    given = content(made.state_dict(), ("alpha", 2), ("merged", False), ("kind", "embedding"))
    (module,) = LORALIB.parse(given).modules
    assert (module.kind, module.out) == ("embedding", 6)
    turned = content(made.state_dict(), ("alpha", 2), ("merged", False), ("fan_in_fan_out", True))
    assert LORALIB.parse(turned).modules[0].kind == "linear"


def test_a_convolution_takes_its_kernel_from_the_weight_or_a_flag():
    made = layer(lora.Conv2d(2, 4, 3, r=2, lora_alpha=3))
    (module,) = LORALIB.parse(content(made.state_dict(), ("alpha", 3), ("merged", False))).modules
    assert (module.kind, module.kernel_size, module.scaling.rank, module.out) == ("conv2d", (3, 3), 2, 4)
    assert {e.name for e in LORALIB.parse(content(made.state_dict(), ("alpha", 3), ("merged", False))).extras} == {
        "0.weight", "0.bias",
    }  # fmt: skip
    file = lora.lora_state_dict(made, bias="all")
    with pytest.raises(MappingError, match="kernel size is not stored"):
        LORALIB.parse(content(file, ("alpha", 3)))
    assert LORALIB.parse(content(file, ("alpha", 3), ("kernel_size", 3))).modules[0].kernel_size == (3, 3)
    with pytest.raises(MappingError, match="do not fit together"):
        LORALIB.parse(content(file, ("alpha", 3), ("kernel_size", 4)))
    point = lora.lora_state_dict(layer(lora.Conv1d(2, 4, 1, r=2)))
    with pytest.raises(MappingError, match="kernel 1 fits"):
        LORALIB.parse(content(point, ("alpha", 3), ("kernel_size", 1)))
    assert (
        LORALIB.parse(content(point, ("alpha", 3), ("kernel_size", 1), ("kind", "conv1d"))).modules[0].kind == "conv1d"
    )


def test_grouped_convolution_counts_channels_per_group():
    made = layer(lora.Conv2d(4, 6, 2, r=2, groups=2))
    (module,) = LORALIB.parse(content(made.state_dict(), ("alpha", 3), ("merged", False))).modules
    assert (module.groups, module.out) == (2, 6)
    flagged = content(lora.lora_state_dict(made), ("alpha", 3), ("kernel_size", 2), ("groups", 2))
    assert LORALIB.parse(flagged).modules == (module,)


def test_detection_goes_by_container():
    file = lora.lora_state_dict(net())
    for made, torch_side in (
        (content(file), True), (content(file, container="safetensors", format="pt"), True),
        (content(file, container="safetensors", format="ms"), False), (content(file, container="mindspore"), False),
    ):  # fmt: skip
        assert (LORALIB.detect(made) is not None) is torch_side
        assert (MS.detect(made) is not None) is not torch_side
    ada = {"m.lora_A": torch.zeros(2, 3), "m.lora_B": torch.zeros(3, 2), "m.lora_E": torch.zeros(2, 1)}
    assert LORALIB.detect(content(ada)) is None
    assert LORALIB.detect(content({"m.lora_A.weight": torch.zeros(2, 3)})) is None


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"m.lora_A": (2, 3)}, "lora_B is missing"),
        ({"m.lora_B": (2, 3)}, "lora_A is missing"),
        ({"m.lora_A": (0,), "m.lora_B": (0,)}, "empty or not matrices"),
        ({"m.lora_A": (3, 5), "m.lora_B": (4, 2)}, "do not fit together"),
        ({"m.lora_A": (2, 5), "m.lora_B": (4, 2), "m.weight": (4, 6)}, "do not fit together"),
        ({"m.weight": (2, 3)}, "holds no lora_A"),
    ],
)
def test_misshapen_files_are_refused(tensors, problem):
    file = {name: torch.zeros(shape) for name, shape in tensors.items()}
    with pytest.raises(MappingError) as caught:
        LORALIB.parse(content(file, ("alpha", 1), ("merged", False)))
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (("rank", 3), "rank is stated as 3"), (("alpha", "x"), "alpha must be a number"),
        (("kind", "rnn"), "unknown kind"),
        (("enable_lora", [1]), "not a list of yes and no"), (("rank", 0), "positive integer"),
        (("fan_in_fan_out", "maybe"), "yes or no"), (("alpha", float("nan")), "alpha must be a number"),
    ],
)  # fmt: skip
def test_wrong_statements_are_refused(row, problem):
    file = {"m.lora_A": torch.zeros(2, 5), "m.lora_B": torch.zeros(4, 2)}
    with pytest.raises(MappingError) as caught:
        LORALIB.parse(content(file, row, ("alpha", 1)))
    assert problem in str(caught.value)


def test_wrapper_prefixes_are_taken_off_once_for_the_whole_file():
    file = {f"module.{n}": t for n, t in lora.lora_state_dict(net()).items()}
    adapter = LORALIB.parse(content(file, *FACTS))
    assert {m.path for m in adapter.modules} == {"emb", "fc", "turned", "qkv", "conv", "point"}
    assert "module." in adapter.warnings[0]


def test_a_root_layer_has_no_path():
    made = lora.Linear(3, 4, r=2, lora_alpha=2)
    file = lora.lora_state_dict(made, bias="lora_only")
    adapter = LORALIB.parse(content(file, ("alpha", 2)))
    assert adapter.modules[0].path == ""
    tensors, _ = written(LORALIB, adapter, file)
    assert set(tensors) == {"lora_A", "lora_B", "bias"}


def test_what_loralib_cannot_say_is_refused_with_every_place():
    from dataclasses import replace

    (module,) = LORALIB.parse(
        content({"m.lora_A": torch.zeros(2, 5), "m.lora_B": torch.zeros(4, 2)}, ("alpha", 1))
    ).modules
    term = module.terms[0].b
    odd = [
        replace(module, path="dora", magnitude=term), replace(module, path="bias", lora_bias=term),
        replace(module, path="mha", weight="in_proj_weight"),
    ]  # fmt: skip
    with pytest.raises(MappingError) as caught:
        LORALIB.write(Adapter(tuple(odd)), facts())
    assert {"dora", "bias", "mha"} <= {place.partition(":")[0] for place in caught.value.where}
    assert "merge" in caught.value.hint


def test_rank_stabilised_scaling_is_spelled_as_plain_alpha_or_refused():
    from dataclasses import replace

    from lorabridge.dialects.adapter import Scaling

    file = {"m.lora_A": torch.zeros(4, 5), "m.lora_B": torch.zeros(4, 4)}
    adapter = LORALIB.parse(content(file, ("alpha", 8), ("use_rslora", True)))
    assert adapter.modules[0].scaling.value == 4.0
    made = LORALIB.write(adapter, facts())
    assert made.facts.get("m", "alpha") == 16
    assert made.facts.get("m", "use_rslora") is None
    for alpha in range(1, 200):  # most values are exact, a few are not: those are refused
        scaling = Scaling(float(alpha), 3, True)
        module = replace(adapter.modules[0], scaling=scaling)
        plain = factors.exact_alpha(scaling.value, 3)
        if plain is None:
            with pytest.raises(MappingError, match="no exact alpha"):
                factors.plain_scaling(module)
        else:
            assert factors.plain_scaling(module).value == scaling.value
