"""``inspect`` against adapters made by peft and loralib, and on files with something wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from console import Invoke, factors
from safetensors.numpy import load_file, save_file

from lorabridge.actions.inspect import inspect
from lorabridge.actions.inspect_report import InspectReport
from lorabridge.dialects.adapter import Fact, Facts


def facts(**values: object) -> Facts:
    return Facts(tuple(Fact("*", field, value) for field, value in values.items()))  # type: ignore[arg-type]


def test_a_peft_directory(peft_dir: Path) -> None:
    found = inspect(peft_dir)
    assert (found.format, found.contents, found.dialect) == ("safetensors", "adapter", "peft")
    assert found.why
    assert found.config_from == str(peft_dir / "adapter_config.json")
    assert [(m.path, m.kind, m.rank, m.alpha, m.scaling) for m in found.modules] == [
        ("layer.0.query", "linear", 4, 8.0, 2.0),
        ("layer.0.value", "linear", 4, 8.0, 2.0),
    ]
    assert [(p.a.shape, p.b.shape) for m in found.modules for p in m.pairs] == [((4, 8), (6, 4))] * 2
    assert found.dtypes == (("float32", 4, 448),)
    assert found.nbytes == 448
    assert found.problems == ()
    assert found.factors == ()


def test_norms_and_statistics_are_numpy_s(peft_dir: Path) -> None:
    found = inspect(peft_dir, norms=True, module="*.value")
    held = load_file(peft_dir / "adapter_model.safetensors")
    for module in found.modules:
        a, b = (held[f"base_model.model.{module.path}.lora_{x}.weight"].astype(float) for x in "AB")
        assert module.norms is not None
        wanted = [np.linalg.norm(a), np.linalg.norm(b), np.linalg.norm(2.0 * b @ a)]
        assert np.allclose([module.norms.a, module.norms.b, module.norms.delta], wanted, rtol=1e-12)
        assert module.norms.nonfinite == 0
    assert [(row.module, row.factor) for row in found.factors] == [
        ("layer.0.value", "lora_A"),
        ("layer.0.value", "lora_B"),
    ]
    row = found.factors[0]
    assert np.allclose([row.minimum, row.maximum, row.mean, row.std], [f(a) for f in (np.min, np.max, np.mean, np.std)])
    assert row.leading == tuple(tuple(line[:5]) for line in a[:3].tolist())
    assert (row.zeros, row.nonfinite, row.tensor) == (0, 0, "base_model.model.layer.0.value.lora_A.weight")


def test_module_prints_its_factors(peft_dir: Path, invoke: Invoke) -> None:
    result = invoke("inspect", peft_dir, "--module", "layer.0.query")
    held = load_file(peft_dir / "adapter_model.safetensors")["base_model.model.layer.0.query.lora_A.weight"]
    assert "layer.0.query lora_A: [4, 8] float32" in result.out
    assert f"{held[0, 0]: .6e}" in result.out
    assert f"{held[0, 5]: .6e}" not in result.out


@pytest.mark.parametrize("word", ["querry", "layer.0.querz"])
def test_a_misspelt_module_gets_the_nearest_path(word: str, peft_dir: Path, invoke: Invoke) -> None:
    result = invoke("inspect", peft_dir, "--module", word)
    assert result.code == 2
    assert "layer.0.query" in result.err


def test_a_missing_half_is_shown_and_told(peft_dir: Path) -> None:
    path = peft_dir / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.layer.0.value.lora_B.weight"]
    save_file(tensors, path)
    found = inspect(peft_dir, norms=True)
    assert len(found.modules) == 2
    assert [m.features for m in found.modules] == [(), ("no lora_B",)]
    (problem,) = found.problems
    assert any("layer.0.value" in place and "lora_B" in place for place in problem.where)


def test_a_broken_config_does_not_hide_the_tensors(peft_dir: Path) -> None:
    (peft_dir / "adapter_config.json").write_text("{broken")
    found = inspect(peft_dir)
    assert found.problems[0].problem.startswith("config is not valid JSON")
    assert [m.rank for m in found.modules] == [4, 4]
    assert [m.alpha for m in found.modules] == [None, None]


def test_values_that_are_not_finite_are_counted(peft_dir: Path) -> None:
    path = peft_dir / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.layer.0.query.lora_A.weight"][0, :2] = [np.nan, np.inf]
    save_file(tensors, path)
    assert inspect(peft_dir).problems == ()
    found = inspect(peft_dir, norms=True, module="layer.0.query")
    assert found.modules[0].norms is not None
    assert found.modules[0].norms.nonfinite == 2
    assert found.factors[0].nonfinite == 2
    assert np.isfinite(found.factors[0].norm)
    assert [p.where for p in found.problems] == [("layer.0.query: 2 of 56 elements",)]


def test_an_alpha_that_nothing_states_is_a_problem_and_can_be_stated(tmp_path: Path) -> None:
    a, b = factors(np.random.default_rng(1))
    save_file({"layer.0.query.lora_A.weight": a, "layer.0.query.lora_B.weight": b}, tmp_path / "bare.safetensors")
    found = inspect(tmp_path / "bare.safetensors")
    assert found.modules[0].rank == 4
    assert found.modules[0].alpha is None
    assert found.problems
    stated = inspect(tmp_path / "bare.safetensors", facts=facts(alpha=12))
    assert (stated.modules[0].alpha, stated.modules[0].scaling) == (12, 3.0)
    assert stated.problems == ()


def test_a_whole_model_lists_its_tensors(tmp_path: Path, invoke: Invoke) -> None:
    tensors = {"encoder.weight": np.ones((3, 2), np.float16), "encoder.bias": np.ones(3, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = inspect(tmp_path / "model.safetensors")
    assert (found.contents, found.modules, found.problems) == ("model", (), ())
    assert {name: n for name, n, _ in found.dtypes} == {"float16": 1, "float32": 1}
    brief, full = (invoke("inspect", tmp_path / "model.safetensors", *more).out for more in ([], ["--tensors"]))
    assert "encoder.bias" not in brief
    assert "encoder.bias" in full
    assert "[3, 2]" in full


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\x80\x04N."])
def test_what_is_no_checkpoint_is_an_input_error(content: bytes, tmp_path: Path, invoke: Invoke) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    result = invoke("inspect", tmp_path / "x.ckpt")
    assert (result.code, result.out) == (3, "")
    assert "x.ckpt" in result.err


def test_the_json_document_says_what_the_text_says(peft_dir: Path, invoke: Invoke) -> None:
    result = invoke("inspect", peft_dir, "--json", "--norms")
    document = json.loads(result.out)
    assert document["schema"] == "lorabridge/inspect/1"
    assert document["modules"][0]["path"] == "layer.0.query"
    assert document["modules"][0]["pairs"][0]["a"]["shape"] == [4, 8]
    assert document["dtypes"] == [{"dtype": "float32", "tensors": 4, "nbytes": 448}]
    assert document["metadata"] == {"format": "pt"}
    assert result.err == ""


def test_the_notebook_form_holds_no_markup_from_names(hostile_names: Path) -> None:
    html = inspect(hostile_names)._repr_html_()
    assert "<script" not in html
    assert "\x1b" not in html


def test_quiet_prints_no_report(peft_dir: Path, invoke: Invoke) -> None:
    assert invoke("inspect", peft_dir, "-q") == invoke("inspect", peft_dir, "--quiet")
    assert invoke("inspect", peft_dir, "-q").out == ""


def deltas(found: InspectReport) -> dict[str, float | None]:
    return {m.path: m.norms.delta if m.norms else None for m in found.modules}


def test_delta_norms_are_those_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = torch.nn.Linear(6, 10)
            self.emb = torch.nn.Embedding(12, 5)
            self.conv = torch.nn.Conv2d(4, 8, 3)
            self.grouped = torch.nn.Conv2d(4, 8, 3, groups=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.manual_seed(0)
    for names, rslora in ((["lin", "emb", "conv"], False), (["lin", "grouped"], True)):
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, init_lora_weights=False, use_rslora=rslora)
        model = peft.get_peft_model(Net(), config)
        model.save_pretrained(tmp_path / str(rslora))
        layers = {name: getattr(model.base_model.model, name) for name in names}
        wanted = {name: grouped_delta(layer) if name == "grouped" else layer.get_delta_weight("default").norm()
                  for name, layer in layers.items()}  # fmt: skip
        found = inspect(tmp_path / str(rslora), norms=True)
        assert found.problems == ()
        assert deltas(found) == pytest.approx({name: float(norm) for name, norm in wanted.items()}, rel=1e-5)


def grouped_delta(layer: torch.nn.Module) -> torch.Tensor:
    """Norm of a grouped convolution's delta from its response to single ones: peft 0.21 cannot form that delta."""
    ones = torch.eye(36).reshape(36, 4, 3, 3)
    with torch.no_grad():
        return (layer.lora_B["default"](layer.lora_A["default"](ones)) * layer.scaling["default"]).norm()


def test_delta_norms_are_those_of_loralib(tmp_path: Path) -> None:
    loralib = pytest.importorskip("loralib")
    torch.manual_seed(0)
    merged = loralib.MergedLinear(6, 12, r=2, lora_alpha=4, enable_lora=[True, False, True])
    for parameter in merged.parameters():
        torch.nn.init.normal_(parameter)
    torch.save({f"attn.{k}": v for k, v in merged.state_dict().items() if "lora_" in k}, tmp_path / "merged.pt")
    wanted = float((merged.merge_AB() * merged.scaling).norm())
    found = inspect(tmp_path / "merged.pt", norms=True, facts=facts(alpha=4, enable_lora=[True, False, True]))
    assert found.problems == ()
    assert deltas(found) == pytest.approx({"attn": wanted}, rel=1e-5)
