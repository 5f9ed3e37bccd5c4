"""MindPet's algorithms beside LoRA: the same forward from the same weights as MindPet's own cells and as torch's."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import torch
from judges import array, tensor
from mindpet_witness import mindpet
from mindspore import Tensor, nn

from lorabridge import layers
from lorabridge.layers.training import freeze_delta

IN, OUT, INNER = 12, 8, 5
DENSE = {"adapter": layers.AdapterDense, "low_rank_adapter": layers.LowRankAdapterDense}
SIZES = {"adapter": {"bottleneck_size": INNER}, "low_rank_adapter": {"reduction_factor": 2, "low_rank_size": 2}}


def same_weights(ours: nn.Cell, theirs: nn.Cell) -> None:
    """Give both cells the same normal values, by the names that both have."""
    mine = {p.name: p for p in ours.get_parameters()}
    other = {p.name: p for p in theirs.get_parameters()}
    assert list(mine) == list(other)
    assert [(p.shape, p.dtype) for p in mine.values()] == [(p.shape, p.dtype) for p in other.values()]
    generator = np.random.default_rng(3)
    for name, parameter in mine.items():
        if parameter.dtype in (ms.float32, ms.float16):
            parameter.set_data(Tensor(generator.normal(size=parameter.shape) * 0.4).astype(parameter.dtype))
            other[name].set_data(Tensor(parameter.asnumpy()))


def assert_alike(ours: Tensor, theirs: Tensor) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert ours.asnumpy().tobytes() == theirs.asnumpy().tobytes()


@pytest.mark.parametrize("algorithm", list(DENSE))
@pytest.mark.parametrize("compute", [ms.float16, ms.float32], ids=str)
def test_adapted_dense_layers_compute_what_mindpets_do(
    monkeypatch: pytest.MonkeyPatch, algorithm: str, compute: object, mode: str
) -> None:
    witness = getattr(mindpet(monkeypatch, algorithm), DENSE[algorithm].__name__)
    options = {"activation": "relu", "compute_dtype": compute, **SIZES[algorithm]}
    ours, theirs = DENSE[algorithm](IN, OUT, **options), witness(IN, OUT, **options)
    same_weights(ours, theirs)
    for kind in (ms.float32, ms.float16):
        x = Tensor(np.random.default_rng(0).normal(size=(2, 3, IN))).astype(kind)
        assert_alike(ours(x), theirs(x))


@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh", "silu", "leakyrelu", "sigmoid", "fast_gelu"])
@pytest.mark.parametrize("algorithm", list(DENSE))
def test_adapter_layers_compute_what_mindpets_do(
    monkeypatch: pytest.MonkeyPatch, algorithm: str, activation: str
) -> None:
    name = DENSE[algorithm].__name__.replace("Dense", "Layer")
    witness = getattr(mindpet(monkeypatch, algorithm), name)
    ours, theirs = (
        make(OUT, non_linearity=activation, **SIZES[algorithm]) for make in (getattr(layers, name), witness)
    )
    same_weights(ours, theirs)
    x = tensor(torch.randn(4, OUT))
    assert_alike(ours(x), theirs(x))


def test_an_adapter_computes_what_houlsbys_formula_says() -> None:
    cell = layers.AdapterDense(IN, OUT, has_bias=False, bottleneck_size=INNER, compute_dtype=ms.float32)
    for parameter in cell.get_parameters():
        parameter.set_data(Tensor(np.random.default_rng(1).normal(size=parameter.shape).astype(np.float32)))
    weights = {p.name: torch.from_numpy(p.asnumpy()).double() for p in cell.get_parameters()}
    below = "mindpet_delta_adapter.mindpet_delta_adapter_block.mindpet_delta_adapter"
    x = torch.randn(3, IN, dtype=torch.float64)
    hidden = x @ weights["weight"].T
    inner = hidden @ weights[f"{below}_down_sampler.weight"].T + weights[f"{below}_down_sampler.bias"]
    inner = torch.nn.functional.gelu(inner, approximate="tanh")
    wanted = hidden + inner @ weights[f"{below}_up_sampler.weight"].T + weights[f"{below}_up_sampler.bias"]
    np.testing.assert_allclose(array(cell(tensor(x))), wanted.numpy(), rtol=1e-4, atol=1e-4)


def test_gradients_reach_every_parameter_of_an_adapter() -> None:
    cell = nn.SequentialCell(layers.LowRankAdapterDense(IN, OUT, reduction_factor=2, compute_dtype=ms.float32))
    freeze_delta(cell, "low-rank adapter")
    names = [p.name for p in cell.trainable_params()]
    assert len(names) == 6
    gradient = ms.value_and_grad(lambda x: cell(x).sum(), None, cell.trainable_params())
    _, found = gradient(tensor(torch.randn(3, IN)))
    assert all(np.abs(g.asnumpy()).max() > 0 for g in found)


def test_a_prefix_layer_computes_mindpets_matrices_and_prepends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    witness = mindpet(monkeypatch, "prefix_layer").PrefixLayer
    options = {"prefix_token_num": 6, "batch_size": 2, "num_heads": 2, "hidden_dim": 8, "embed_dim": 5, "mid_dim": 7}
    ours, theirs = layers.PrefixLayer(**options), witness(**options, dropout_rate=0.0)
    same_weights(ours, theirs)
    theirs._PrefixLayer__allocate_parameter()  # MindPet computes them when the layer is made, and never again
    ours.set_train(False)
    key, value = ours.matrices()
    assert_alike(key, theirs.past_key_reparam)
    assert_alike(value, theirs.past_value_reparam)
    assert key.asnumpy().tobytes() == value.asnumpy().tobytes(), "MindPet's value is its key"
    x = torch.randn(2, 4, 8)
    flat = ours(tensor(x.reshape(8, 8)), tensor(x.reshape(8, 8)))[0].asnumpy().reshape(2, 7, 8)
    np.testing.assert_array_equal(flat[:, 3:], x.numpy())
    np.testing.assert_array_equal(flat[:, :3], key.asnumpy().reshape(2, 3, 8))
    heads = ours(*(tensor(x.reshape(2, 4, 2, 4).transpose(1, 2)),) * 2)[0].asnumpy()
    np.testing.assert_array_equal(heads.transpose(0, 2, 1, 3).reshape(2, 7, 8), flat)
    np.testing.assert_array_equal(ours(tensor(x), tensor(x))[1].asnumpy(), flat)
    mask = ours.extend_mask(Tensor(np.zeros((2, 1, 4, 4), np.float32)))
    assert mask.shape == (2, 1, 4, 7)
    assert mask.asnumpy()[..., :3].all()
    assert not mask.asnumpy()[..., 3:].any()


def test_a_prefix_layer_trains_and_may_have_a_value_of_its_own(mode: str) -> None:
    cell = layers.PrefixLayer(4, 1, 2, 8, 5, 7, 0.0, separate_value=True)
    freeze_delta(cell, "prefix")
    x = tensor(torch.randn(1, 3, 8))
    key, value = cell(x, x)
    assert not np.array_equal(key.asnumpy()[:, :4], value.asnumpy()[:, :4])

    def loss(y: Tensor) -> Tensor:
        return cell(y, y)[1].sum()

    gradient = ms.value_and_grad(loss, None, cell.trainable_params())
    _, found = gradient(x)
    assert len(found) == 5
    assert all(np.abs(g.asnumpy()).max() > 0 for g in found)


@pytest.mark.parametrize("projection", [False, True])
def test_a_prefix_encoder_computes_what_mindpets_does(
    monkeypatch: pytest.MonkeyPatch, projection: bool, mode: str
) -> None:
    witness = mindpet(monkeypatch, "ptuning2").PrefixEncoder
    sizes = (3, 2, 2, 4, projection, 6, 0.0)
    ours, theirs = layers.PrefixEncoder(*sizes), witness(*sizes)
    same_weights(ours, theirs)
    found, wanted = ours(2, ms.float32), theirs(2, ms.float32)
    assert len(found) == len(wanted) == 2
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape == (2, 2, 2, 3, 4)
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), rtol=1e-6, atol=1e-6)
        if not projection:
            assert_alike(one, other)
    folded = ours.folded()
    assert {p.name for p in folded.get_parameters()} <= {p.name for p in ours.get_parameters()}
    for one, other in zip(folded(2, ms.float32), found, strict=True):
        np.testing.assert_allclose(one.asnumpy(), other.asnumpy(), rtol=1e-6, atol=1e-6)


def test_a_prefix_encoder_lays_keys_and_values_as_peft_does() -> None:
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=8, num_attention_heads=2, num_layers=2,
        num_transformer_submodules=1, encoder_hidden_size=8,
    )  # fmt: skip
    encoder = peft.PrefixEncoder(config)
    ours = layers.PrefixEncoder(3, 2, 2, 4, False, 0, 0.0)
    ours.mindpet_delta_ptuning2_embedding.embedding_table.set_data(tensor(encoder.embedding.weight))
    # PeftModel.get_prompt of peft 0.21.2, for one submodule
    rows = encoder(torch.arange(3)[None].expand(5, -1)).view(5, 3, 4, 2, 4).permute(2, 0, 3, 1, 4).split(2)
    for one, other in zip(ours(5, ms.float32), rows, strict=True):
        np.testing.assert_array_equal(one.asnumpy(), other.detach().numpy())


def test_prompts_are_looked_up_and_prepended_as_peft_does(mode: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, token_dim=8, num_transformer_submodules=2
    )
    judge = peft.PromptEmbedding(config, torch.nn.Embedding(10, 8))
    cell = layers.PromptTuning(3, 8, 2)
    assert [p.name for p in cell.get_parameters()] == ["mindpet_delta_prompttuning_embedding.embedding_table"]
    cell.get_parameters().__next__().set_data(tensor(judge.embedding.weight))
    ids = torch.arange(6)[None].expand(2, -1)
    found = cell(Tensor(ids.numpy().astype(np.int32)))
    assert found.shape == (2, 6, 8)
    np.testing.assert_array_equal(found.asnumpy(), judge(ids).detach().numpy())
    x = torch.randn(2, 5, 8)
    joined = torch.cat((judge(ids)[:, :3], x), 1)[:, :5]
    np.testing.assert_array_equal(cell.prepend(tensor(x)).asnumpy(), joined.detach().numpy())


def test_the_loss_of_r_drop_is_mindpets_and_torchs(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    witness = mindpet(monkeypatch, "r_drop")
    logits, labels = torch.randn(6, 5), torch.tensor([0, 0, 3, 3, 4, 4])
    given = tensor(logits), Tensor(labels.numpy().astype(np.int32))
    found = layers.RDropLoss()(*given, 6)
    np.testing.assert_allclose(found.asnumpy(), witness.RDropLoss()(*given, 6).asnumpy(), rtol=1e-6)
    p, q = logits[0::2].log_softmax(-1), logits[1::2].log_softmax(-1)
    apart = torch.nn.functional.kl_div(p, q.exp(), reduction="sum") + torch.nn.functional.kl_div(
        q, p.exp(), reduction="sum"
    )
    wanted = torch.nn.functional.cross_entropy(logits, labels) + 6 / 4 * apart
    np.testing.assert_allclose(found.asnumpy(), wanted.numpy(), rtol=1e-5)
    soft = torch.rand(6, 5).softmax(-1)
    wanted = torch.nn.functional.cross_entropy(logits, soft) + apart
    np.testing.assert_allclose(layers.RDropLoss()(given[0], tensor(soft)).asnumpy(), wanted.numpy(), rtol=1e-5)


def test_rdrop_repeat_lays_the_two_passes_of_an_input_beside_each_other(mode: str) -> None:
    given = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32), np.array([1, 2, 3], np.int32)
    for found, x in zip(layers.rdrop_repeat(*map(Tensor, given)), given, strict=True):
        assert found.asnumpy().dtype == x.dtype
        np.testing.assert_array_equal(found.asnumpy(), x.repeat(2, axis=0))  # as MindPet's asks MindSpore for it


@pytest.mark.parametrize("alpha", ["4", None, (4,)])
def test_r_drop_refuses_an_alpha_that_is_no_number(alpha: object) -> None:
    with pytest.raises(TypeError, match="alpha"):
        layers.RDropLoss()(tensor(torch.randn(2, 3)), Tensor(np.array([0, 0], np.int32)), alpha)


BAD: list[tuple[type[Exception], str, tuple[object, ...], dict[str, object]]] = [
    (TypeError, "AdapterDense", (4.0, 8), {}),
    (ValueError, "AdapterDense", (0, 8), {}),
    (ValueError, "AdapterDense", (4, 8), {"bottleneck_size": 0}),
    (TypeError, "AdapterDense", (4, 8), {"bottleneck_size": 2.0}),
    (TypeError, "AdapterDense", (4, 8), {"has_bias": 1}),
    (TypeError, "AdapterDense", (4, 8), {"activation": 3}),
    (KeyError, "AdapterDense", (4, 8), {"activation": "no such"}),
    (TypeError, "AdapterDense", (4, 8), {"non_linearity": nn.ReLU()}),
    (ValueError, "AdapterDense", (4, 8), {"non_linearity": "no such"}),
    (TypeError, "AdapterDense", (4, 8), {"param_init_type": ms.int32}),
    (TypeError, "AdapterDense", (4, 8), {"compute_dtype": "float16"}),
    (ValueError, "AdapterDense", (4, 8), {"weight_init": Tensor(np.zeros((4, 8), np.float32))}),
    (ValueError, "AdapterDense", (4, 8), {"weight_init": "no such"}),
    (ValueError, "AdapterLayer", (-1,), {}),
    (TypeError, "AdapterLayer", ("8",), {}),
    (ValueError, "LowRankAdapterLayer", (8, 9), {}),
    (ValueError, "LowRankAdapterLayer", (8, 0), {}),
    (TypeError, "LowRankAdapterLayer", (8, 2.0), {}),
    (ValueError, "LowRankAdapterLayer", (8, 2, 0), {}),
    (TypeError, "LowRankAdapterLayer", (8, 2, 1, 0.5), {}),
    (ValueError, "LowRankAdapterLayer", (8, 2, 1, "no such"), {}),
    (ValueError, "LowRankAdapterDense", (4, 8), {"reduction_factor": 9}),
    (TypeError, "LowRankAdapterDense", (4, 8), {"low_rank_w_init": Tensor(np.zeros((8, 1), np.float32))}),
    (ValueError, "PrefixLayer", (5, 2, 2, 8, 4), {}),
    (ValueError, "PrefixLayer", (4, 2, 2, 8, 4), {"dropout_rate": 1.0}),
    (TypeError, "PrefixLayer", (4, 2, 2.0, 8, 4), {}),
    (ValueError, "PrefixLayer", (4, 0, 2, 8, 4), {}),
    (ValueError, "PrefixEncoder", (0, 2, 2, 4, False, 6, 0.1), {}),
    (TypeError, "PrefixEncoder", (3, 2, 2, 4.0, False, 6, 0.1), {}),
    (ValueError, "PrefixEncoder", (3, 2, 2, 4, True, 0, 0.1), {}),
    (ValueError, "PrefixEncoder", (3, 2, 2, 4, False, 6, 1.0), {}),
    (TypeError, "PromptTuning", ("3", 8), {}),
    (ValueError, "PromptTuning", (3, -8), {}),
    (TypeError, "PromptTuning", (3, 8, 1.5), {}),
]


@pytest.mark.parametrize(("error", "name", "arguments", "options"), BAD)
def test_documented_checks(
    error: type[Exception], name: str, arguments: tuple[object, ...], options: dict[str, object]
) -> None:
    with pytest.raises(error):
        getattr(layers, name)(*arguments, **options)


def test_strategies_reach_the_operators() -> None:
    cell = layers.AdapterDense(IN, OUT, activation="relu", bottleneck_size=INNER, non_linearity="relu")
    rows = ((1, 1), (1, 1))
    cell.shard(rows, ((1, 1), (1,)), ((1, 1),), rows, ((1, 1), (1,)), ((1, 1),), rows, ((1, 1), (1,)), rows)
    block = list(cell.mindpet_delta_adapter.mindpet_delta_adapter_block)
    assert cell.matmul.in_strategy == block[0].matmul.in_strategy == block[2].matmul.in_strategy == rows
    low = layers.LowRankAdapterDense(IN, OUT)
    low.shard(strategy_matmul_down_sampler_weight=rows, strategy_residual_add=rows)
    assert low.mindpet_delta_low_rank_adapter.residual_add.in_strategy == rows
    with pytest.raises(TypeError, match="strategy_residual_add"):
        low.shard(strategy_residual_add=[rows])
    for made in (
        layers.AdapterLayer(OUT, non_linearity="logsoftmax"),
        layers.LowRankAdapterLayer(OUT, 1, non_linearity="logsoftmax"),
    ):
        with pytest.raises(ValueError, match="LogSoftmax"):
            made.shard()


class Network(nn.Cell):
    """A cell of every algorithm."""

    def __init__(self) -> None:
        super().__init__()
        self.lora = layers.LoRADense(IN, OUT, 2, 4)
        self.dense = layers.AdapterDense(OUT, OUT, bottleneck_size=2)
        self.low = layers.LowRankAdapterDense(OUT, OUT, reduction_factor=2)
        self.prefix = layers.PrefixLayer(4, 2, 2, 8, 4, 3)
        self.encoder = layers.PrefixEncoder(3, 1, 2, 4, True, 6, 0.0)
        self.prompt = layers.PromptTuning(3, OUT)


@pytest.mark.parametrize(
    ("mode", "count"),
    [("lora", 2), ("prefix", 5), ("prefixtuning", 5), ("adapter", 4), ("low_rank_adapter", 6), ("Low-Rank Adapter", 6),
     ("ptuning2", 5), ("prompt", 1), ("prompt_tuning", 1), ("bitfit", 3 + 2 + 2 + 2 + 2)],
)  # fmt: skip
def test_freeze_delta_trains_what_an_algorithm_added(mode: str, count: int) -> None:
    network = Network()
    freeze_delta(network, mode)
    names = [p.name for p in network.trainable_params()]
    assert len(names) == count, names
    freeze_delta(network, [mode, "bitfit"])
    assert {p.name for p in network.trainable_params()} >= set(names)
