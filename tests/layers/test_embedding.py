from __future__ import annotations

import loralib
import mindspore as ms
import numpy as np
import pytest
import torch
from judges import TORCH, array, assert_within, give, randomise, tensor
from peft import LoraConfig, get_peft_model
from steps import descend_mindspore, descend_torch

from lorabridge.layers import Embedding

NUM, DIM, RANK, ALPHA = 17, 10, 3, 6
TERMS = RANK + 8


def values_of(judge: loralib.Embedding) -> dict[str, torch.Tensor]:
    return {"embedding_table": judge.weight, "lora_A": judge.lora_A, "lora_B": judge.lora_B}


def mass_of(values: dict[str, torch.Tensor], ids: torch.Tensor, scaling: float) -> np.ndarray:
    p = {name: np.abs(array(value)) for name, value in values.items()}
    return (p["embedding_table"] + scaling * (p["lora_B"] @ p["lora_A"]).T)[ids.numpy()]


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 4, -1])
@pytest.mark.parametrize("index", [ms.int32, ms.int64], ids=str)
def test_forward_is_loralibs(dtype: object, padding_idx: int | None, index: object, mode: str) -> None:
    judge = loralib.Embedding(NUM, DIM, RANK, lora_alpha=ALPHA, padding_idx=padding_idx).to(TORCH[dtype])
    randomise(judge.lora_A, judge.lora_B)
    cell = Embedding(NUM, DIM, RANK, ALPHA, padding_idx=padding_idx, dtype=dtype)
    give(cell, values_of(judge))
    ids = torch.randint(0, NUM, (3, 7))
    ids[0, :2] = torch.tensor([4, NUM - 1])
    mass = mass_of(values_of(judge), ids, judge.scaling)
    given = ms.Tensor(ids.numpy()).astype(index)
    assert_within(cell(given), judge(ids), mass, TERMS, dtype)
    judge.eval()
    cell.set_train(False)
    assert cell.merged
    assert_within(cell(given), judge(ids), mass, TERMS, dtype)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("merged", [False, True])
def test_forward_is_pefts(options: dict[str, bool], merged: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(NUM, DIM))
    judge = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"], **options)).eval()
    layer = judge.base_model.model[0]
    values = {
        "embedding_table": layer.base_layer.weight,
        "lora_A": layer.lora_embedding_A["default"],
        "lora_B": layer.lora_embedding_B["default"],
    }
    randomise(values["lora_A"], values["lora_B"])
    ratio = 1.0
    scaling = layer.scaling["default"]
    if "use_dora" in options:
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.data *= torch.linspace(0.5, 2, DIM)
        values["lora_magnitude_vector"] = magnitude
        p = {name: array(value) for name, value in values.items()}
        ratio = p["lora_magnitude_vector"] / np.linalg.norm(
            p["embedding_table"] + scaling * (p["lora_B"] @ p["lora_A"]).T, axis=0
        )
    cell = Embedding(NUM, DIM, RANK, ALPHA, **options)
    give(cell, values)
    cell.set_train(not merged)
    ids = torch.randint(0, NUM, (3, 7))
    mass = mass_of({k: v for k, v in values.items() if "magnitude" not in k}, ids, scaling) * ratio
    assert_within(cell(ms.Tensor(ids.numpy())), judge(ids), mass, 2 * TERMS + NUM, ms.float32)


@pytest.mark.parametrize("padding_idx", [None, 4])
def test_training_moves_the_factors_as_loralib_does(padding_idx: int | None) -> None:
    judge = loralib.Embedding(NUM, DIM, RANK, lora_alpha=ALPHA, padding_idx=padding_idx)
    cell = Embedding(NUM, DIM, RANK, ALPHA, padding_idx=padding_idx)
    give(cell, values_of(judge))
    ids = torch.arange(30) % NUM
    target = torch.randn(30, DIM)
    cell.set_train(True)
    descend_torch(judge, ids, target, 6, 0.5)
    descend_mindspore(cell, ids, target, 6, 0.5)
    for name in ("lora_A", "lora_B"):
        moved = array(getattr(judge, name))
        np.testing.assert_allclose(array(getattr(cell, name)), moved, atol=3e-6 * np.abs(moved).max(), rtol=0)
    trained = np.abs(array(cell.lora_A)).max(axis=0) > 0
    assert trained.sum() == NUM - (padding_idx is not None)


def test_first_values_are_the_other_way_round_as_in_loralib() -> None:
    cell, judge = Embedding(300, 128, 64, padding_idx=5), loralib.Embedding(300, 128, 64, padding_idx=5)
    assert not array(cell.lora_A).any()
    for ours, theirs in ((cell.lora_B, judge.lora_B), (cell.embedding_table, judge.weight)):
        a, b = array(ours), array(theirs)
        assert abs(a.mean()) < 4 / np.sqrt(a.size)
        assert a.std() == pytest.approx(1, rel=0.05)
        assert a.std() == pytest.approx(b.std(), rel=0.05)
        assert abs((a**4).mean() - 3) < 0.3, "not normal"
    assert not array(cell.embedding_table)[5].any()
    assert [parameter.name for parameter in cell.trainable_params()] == ["lora_A", "lora_B"]
    assert [parameter.name for parameter in Embedding(4, 4).trainable_params()] == ["embedding_table"]


def test_bfloat16_is_stored_and_computed_in_float32_with_one_rounding() -> None:
    cell = Embedding(NUM, DIM, RANK, ALPHA, dtype=ms.bfloat16, padding_idx=2)
    cell.lora_A.set_data(tensor(torch.randn(RANK, NUM), ms.bfloat16))
    wide = Embedding(NUM, DIM, RANK, ALPHA, padding_idx=2)
    give(wide, {name: torch.tensor(array(value)) for name, value in cell._params.items()})
    ids = ms.Tensor(np.arange(NUM))
    assert cell(ids).dtype == ms.bfloat16
    assert (array(cell(ids)) == array(wide(ids).astype(ms.bfloat16))).all()


def test_a_padding_row_outside_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="padding_idx"):
        Embedding(NUM, DIM, padding_idx=NUM)
