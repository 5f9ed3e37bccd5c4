"""msbnb's factors: loralib's names, turned around; nothing but the user can tell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lorabridge import ConvertOptions, convert, open_checkpoint
from lorabridge.dialects import by_name, detect
from lorabridge.dialects.adapter import Content, Fact, Facts
from lorabridge.dtypes import BY_NAME
from lorabridge.errors import MappingError
from lorabridge.tensors import TensorSpec

ALPHA = Facts((Fact("*", "alpha", 6),))


def layer(x: np.ndarray, a: np.ndarray, b: np.ndarray, scaling: float) -> np.ndarray:
    """What msbnb's LoRALinear adds: ``x @ lora_A @ lora_B * scaling``."""
    return x @ a @ b * scaling


def tensors(sizes: tuple[int, int] = (12, 8)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    return {
        "layers.0.q.lora_A": rng.standard_normal((sizes[0], 2)).astype(np.float32),
        "layers.0.q.lora_B": rng.standard_normal((2, sizes[1])).astype(np.float32),
    }


@pytest.mark.parametrize("sizes", [(12, 8), (8, 8)])
def test_to_peft_with_the_same_effect_and_back(tmp_path: Path, sizes: tuple[int, int]) -> None:
    data = tensors(sizes)
    save_file(data, tmp_path / "a.safetensors", {"format": "ms"})
    options = ConvertOptions(source_dialect="msbnb", target_dialect="peft", facts=ALPHA)
    convert(tmp_path / "a.safetensors", tmp_path / "out", options)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    a, b = (found[f"base_model.model.layers.0.q.lora_{x}.weight"] for x in "AB")
    x = np.random.default_rng(1).standard_normal((5, sizes[0])).astype(np.float32)
    expected = layer(x, data["layers.0.q.lora_A"], data["layers.0.q.lora_B"], 3.0)
    theirs = torch.nn.functional.linear(torch.nn.functional.linear(torch.from_numpy(x), torch.from_numpy(a)),
                                        torch.from_numpy(b)) * 3.0  # fmt: skip
    assert np.allclose(theirs.numpy(), expected, atol=1e-6)
    (tmp_path / "out" / "lorabridge.json").unlink()
    convert(tmp_path / "out", tmp_path / "again.ckpt", ConvertOptions(target_dialect="msbnb"))
    with open_checkpoint(tmp_path / "again.ckpt") as checkpoint:
        again = {n.replace(".q.lora.", ".q."): checkpoint[n].tobytes() for n in checkpoint}
        assert again == {n: v.tobytes() for n, v in data.items()}


def test_factors_that_fit_only_when_turned_around_are_not_read_straight(tmp_path: Path) -> None:
    """As loralib's, square factors would be a module of rank 8 from 2 to 2 features."""
    save_file(tensors((8, 8)), tmp_path / "a.safetensors", {"format": "ms"})
    with pytest.raises(MappingError, match="several dialects") as error:
        convert(tmp_path / "a.safetensors", tmp_path / "out", ConvertOptions(target_dialect="peft", facts=ALPHA))
    assert any(place.startswith("msbnb") for place in error.value.where)
    assert "--from" in error.value.hint


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.sampled_from(["torch", "mindspore"]))
def test_loralibs_own_files_are_never_offered_as_msbnbs(rank: int, inner: int, out: int, container: str) -> None:
    if rank > min(inner, out):
        return
    specs = {
        "a.lora_A": TensorSpec("a.lora_A", BY_NAME["float32"], (rank, inner)),
        "a.lora_B": TensorSpec("a.lora_B", BY_NAME["float32"], (out, rank)),
    }
    names = [name for name, _ in detect(Content(specs, {"container": container}))]
    assert names == ["loralib-ms" if container == "mindspore" else "loralib"]


def test_what_it_cannot_be_is_refused(tmp_path: Path) -> None:
    dialect = by_name("msbnb")
    f32 = BY_NAME["float32"]

    def content(shapes: dict[str, tuple[int, ...]], facts: Facts = ALPHA) -> Content:
        return Content(
            {n: TensorSpec(n, f32, s) for n, s in shapes.items()}, {"container": "mindspore"}, None, facts, "f"
        )

    with pytest.raises(MappingError, match="alpha is not stored"):
        dialect.parse(content({"a.lora_A": (4, 2), "a.lora_B": (2, 4)}, Facts()))
    with pytest.raises(MappingError, match="shapes are not"):
        dialect.parse(content({"a.lora_A": (2, 4), "a.lora_B": (3, 2)}))
    with pytest.raises(MappingError, match="factor A is missing"):
        dialect.parse(content({"a.lora_B": (2, 4)}))
    with pytest.raises(MappingError, match="no lora_A"):
        dialect.parse(content({"a.weight": (2, 4)}))
    adapter = by_name("msbnb").parse(content({"wte.lora_A": (40, 2), "wte.lora_B": (2, 4)}))
    with pytest.raises(MappingError, match="linear layers only"):
        dialect.write(adapter, Facts())
