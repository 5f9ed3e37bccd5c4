"""MindFormers' own files to peft and back, what is written for MindFormers as MindFormers itself judged it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import judge_mindformers as judged
import numpy as np
import pytest
import safetensors.numpy
from peft import PeftConfig

from lorabridge import ConvertOptions, convert
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import InputError, MappingError, UsageError

FILES = Path(__file__).parents[1] / "dialects" / "mindformers_files"
CONFIG = {"model_type": "llama", **judged.SIZES, "rms_norm_eps": 1e-6}
QWEN3 = {"model_type": "qwen3", **judged.QWEN3, "rms_norm_eps": 1e-6}
TO_PEFT = [
    # file, family, layout, (adapted cell of MindFormers, module of transformers)
    ("llama/adapter.ckpt", "llama", {"qkv_concat": "off"}, ("attention.wq", "self_attn.q_proj")),
    ("llama_concat/adapter.ckpt", "llama", {"qkv_concat": "grouped"}, ("attention.wo", "self_attn.o_proj")),
    ("llama_concat/adapter.ckpt", "llama", {"qkv_concat": "contiguous"}, ("attention.wo", "self_attn.o_proj")),
    ("qwen3/adapter.ckpt", "qwen3_mcore", {"qkv": "grouped", "fc1": "interleaved"},
     ("self_attention.linear_proj", "self_attn.o_proj")),
    ("qwen3/adapter.safetensors", "qwen3_mcore", {"qkv": "contiguous", "fc1": "contiguous"},
     ("self_attention.linear_proj", "self_attn.o_proj")),
    ("qwen3_pynative", "qwen3_mcore", {"qkv": "grouped", "fc1": "interleaved"}, None),
]  # fmt: skip


def folder_with(tmp_path: Path, config: dict[str, object]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path / "config.json"


def same_bits(one: Path, two: Path) -> bool:
    return one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(("file", "family", "layout", "pair"), TO_PEFT)
def test_what_mindformers_wrote_goes_to_peft_and_back_bit_for_bit(tmp_path, file, family, layout, pair) -> None:
    config = folder_with(tmp_path, QWEN3 if family == "qwen3_mcore" else CONFIG)
    given = shutil.copytree(FILES / file, tmp_path / "in") if (FILES / file).is_dir() else FILES / file
    there = ConvertOptions(target_dialect="peft", family=family, layout=layout, config=config)
    if given.is_dir():
        (given / "iteration_00000007" / "config.json").write_text(config.read_text())
    convert(given, tmp_path / "peft", there)
    loaded = PeftConfig.from_pretrained(str(tmp_path / "peft"))
    assert (loaded.r, loaded.lora_alpha, loaded.lora_dropout) == (4, 8, 0.05 if given.is_dir() else 0.01)
    assert all(name.endswith("_proj") for name in loaded.target_modules)
    suffix = ".safetensors" if given.is_dir() else given.suffix
    convert(tmp_path / "peft", tmp_path / f"back{suffix}")
    if not given.is_dir():
        assert same_bits(tmp_path / f"back{suffix}", given)
        return
    (weights,) = (given / "iteration_00000007").glob("*-model-*")
    theirs, ours = (safetensors.numpy.load_file(path) for path in (weights, tmp_path / "back.safetensors"))
    assert {n: v.tobytes() for n, v in ours.items()} == {n: v.tobytes() for n, v in theirs.items()}


def test_factors_reach_peft_with_the_values_that_mindformers_trained(tmp_path: Path, mindspore) -> None:
    options = ConvertOptions(target_dialect="peft", family="llama", config=folder_with(tmp_path, CONFIG))
    convert(FILES / "llama" / "adapter.ckpt", tmp_path / "peft", options)
    theirs = mindspore.load_checkpoint(str(FILES / "llama" / "adapter.ckpt"))
    ours = safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(ours) == 12
    for layer in range(2):
        for cell, module in (("attention.wv", "self_attn.v_proj"), ("feed_forward.w2", "mlp.down_proj")):
            for letter in "ab":
                name = f"base_model.model.model.layers.{layer}.{module}.lora_{letter.upper()}.weight"
                wanted = theirs[f"model.layers.{layer}.{cell}.mindpet_delta_lora_{letter}"].asnumpy()
                np.testing.assert_array_equal(ours[name], wanted)


def test_a_fused_module_shares_its_factors_among_its_parts(tmp_path: Path, mindspore) -> None:
    layout = {"qkv_concat": "grouped"}
    options = ConvertOptions(target_dialect="peft", family="llama", layout=layout, config=folder_with(tmp_path, CONFIG))
    convert(FILES / "llama_concat" / "adapter.ckpt", tmp_path / "peft", options)
    theirs = mindspore.load_checkpoint(str(FILES / "llama_concat" / "adapter.ckpt"))
    ours = safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    at = "model.layers.1.attention.w_qkv.mindpet_delta_lora_"
    delta = theirs[f"{at}b"].asnumpy() @ theirs[f"{at}a"].asnumpy()
    grouped = delta.reshape(2, 32, 32)  # two key/value heads, each with two query heads, a key and a value of 8 rows
    for name, rows in (("q", grouped[:, :16]), ("k", grouped[:, 16:24]), ("v", grouped[:, 24:])):
        stem = f"base_model.model.model.layers.1.self_attn.{name}_proj.lora_"
        made = ours[f"{stem}B.weight"] @ ours[f"{stem}A.weight"]
        np.testing.assert_allclose(made, rows.reshape(-1, 32), atol=1e-6)


@pytest.mark.parametrize("name", judged.CASES)
def test_what_is_written_is_what_mindformers_judged(tmp_path: Path, name: str) -> None:
    """``judge_mindformers.py`` let MindFormers load these files, select their cells and compute with them."""
    record = json.loads(judged.RECORD.read_text())[name]
    assert judged.convert_case(name, tmp_path) == record["digests"]
    if name == "llama-slora":
        assert (record["rank"], record["alpha"]) == (4, 8)
        assert set(record["cells"]) - set(record["selected"]) == {"model.tok_embeddings"}  # selected by another rule
        return
    written = [n for n in _names(tmp_path / "written") if n.endswith(("lora_a", "lora_A.weight"))]
    assert record["adapted"] == sorted(written)
    assert record.get("difference", 0.0) < 1e-5
    assert ("difference" in record) == (name != "llama-contiguous")


def _names(folder: Path) -> list[str]:
    from lorabridge import open_checkpoint

    with open_checkpoint(folder) as checkpoint:
        return list(checkpoint)


@pytest.mark.parametrize("name", [name for name in judged.CASES if name != "llama-slora"])
def test_what_is_written_comes_back_bit_for_bit(tmp_path: Path, name: str) -> None:
    judged.convert_case(name, tmp_path)
    convert(tmp_path / "written", tmp_path / "back")
    assert same_bits(
        tmp_path / "back" / "adapter_model.safetensors", tmp_path / "adapter" / "adapter_model.safetensors"
    )


@pytest.mark.parametrize("name", judged.CASES)
def test_without_the_manifest_rank_and_alpha_come_from_the_files_of_mindformers(tmp_path: Path, name: str) -> None:
    """Its own configs are enough; fused factors come back with the rank that they grew to, and the same deltas."""
    judged.convert_case(name, tmp_path)
    _, adapted, dialect, family, layout = judged.CASES[name]
    (tmp_path / "written" / "lorabridge.json").unlink()
    options = ConvertOptions(family=family, layout=layout, config=tmp_path / "base" / "config.json")
    report = convert(tmp_path / "written", tmp_path / "back", options)
    assert report.source_dialect == dialect
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.05
    made = safetensors.numpy.load_file(tmp_path / "back" / "adapter_model.safetensors")
    _, factors = judged.tensors(judged.CASES[name][0], adapted)
    checked = 0
    for key, a in factors.items():
        if key.endswith(("lora_A.weight", "lora_embedding_A")):
            other = key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
            scaling = config["lora_alpha"] / made[key].shape[0]
            np.testing.assert_allclose(scaling * made[other] @ made[key], 2 * factors[other] @ a, atol=1e-5)
            checked += 1
    assert checked == len(adapted) * 2 - ("lm_head" in adapted) - ("embed_tokens" in adapted)
    assert len(made) >= len(factors)


def test_a_training_checkpoint_gives_the_adapter_or_both(tmp_path: Path) -> None:
    given = FILES / "llama" / "llama_rank_0-1_3.ckpt"
    config = folder_with(tmp_path, CONFIG)
    whole = convert(
        given, tmp_path / "whole.pt", ConvertOptions(target_dialect="loralib", family="llama", config=config)
    )
    left = dict(whole.left_out)
    assert left["adam_m.model.layers.0.attention.wq.mindpet_delta_lora_a"].startswith("optimizer state of")
    assert {"global_step", "loss_scale", "epoch_num", "step_num"} <= set(left)
    assert all(name.startswith(("adam_m.", "adam_v.")) or "." not in name for name in left)
    only = convert(
        given,
        tmp_path / "only",
        ConvertOptions(family="llama", config=config, adapter_only=True, target_dialect="peft"),
    )
    assert (whole.tensors - only.tensors, only.tensors) == (21, 12)
    again = safetensors.numpy.load_file(tmp_path / "only" / "adapter_model.safetensors")
    assert len(again) == 12


def test_a_run_on_one_device_is_an_input(tmp_path: Path) -> None:
    """The directory of iterations, one of them, or its file: the config is found beside or above."""
    for place in ("", "iteration_00000007"):
        report = convert(
            FILES / "qwen3_pynative" / place, tmp_path / f"out{len(place)}", ConvertOptions(target_dialect="peft")
        )
        assert {(m.rank, m.alpha) for m in report.modules} == {(4, 8)}
        assert "run-opt-0000000-0000001.safetensors" in report.not_carried
    (file,) = (FILES / "qwen3_pynative" / "iteration_00000007").glob("*-model-*")
    convert(file, tmp_path / "out.pt", ConvertOptions(target_dialect="loralib"))


def test_a_run_of_several_devices_without_metadata_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(FILES / "qwen3_pynative" / "iteration_00000007", tmp_path / "iteration_00000007")
    (file,) = folder.glob("*-model-*")
    file.rename(folder / "run-model-0000000-0000002.safetensors")
    with pytest.raises(InputError, match=r"metadata\.json is missing"):
        convert(folder, tmp_path / "out", ConvertOptions(target_dialect="peft"))


def test_a_second_head_of_several_tokens_is_left_out_by_name(tmp_path: Path) -> None:
    given = FILES / "deepseek_v3" / "whole.ckpt"
    options = ConvertOptions(target_dialect="peft", adapter_only=True, exclude=("mtp.*",))
    report = convert(given, tmp_path / "out", options)
    assert {m.path for m in report.modules} >= {"output_layer", "decoder.layers.1.mlp.shared_experts.linear_fc2"}
    assert "mtp.output_layer.lora_A.weight" in report.unselected


def served(tmp_path: Path) -> Path:
    judged.convert_case("llama-slora", tmp_path)
    folder = tmp_path / "written"
    (folder / "lorabridge.json").unlink()
    return folder


def test_a_folder_of_one_served_adapter_is_read_and_several_are_told_apart(tmp_path: Path) -> None:
    folder = served(tmp_path)
    index = json.loads((folder / "lora_adapter.json").read_text())
    assert index == {"written": str(folder)}
    serving = tmp_path / "serving"
    shutil.move(folder, serving / "poems")
    (serving / "poems" / "lora_adapter.json").unlink()
    (serving / "lora_adapter.json").write_text(json.dumps({"poems": "/elsewhere/poems"}))
    options = ConvertOptions(target_dialect="peft", family="llama", config=folder_with(tmp_path, CONFIG))
    report = convert(serving, tmp_path / "peft", options)
    assert (report.source_dialect, len(report.modules)) == ("slora", 16)
    (serving / "lora_adapter.json").write_text(json.dumps({"poems": "poems", "letters": "letters"}))
    with pytest.raises(UsageError, match="serves several adapters") as caught:
        convert(serving, tmp_path / "second", options)
    assert any("letters" in place for place in caught.value.where)
    (serving / "lora_adapter.json").write_text(json.dumps({"letters": "/nowhere/letters"}))
    with pytest.raises(InputError, match="is not there"):
        convert(serving, tmp_path / "third", options)


def test_the_config_beside_must_belong_to_the_file(tmp_path: Path) -> None:
    shutil.copy(FILES / "llama" / "adapter.ckpt", tmp_path / "out.ckpt")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(MappingError, match="does not belong to this file"):
        convert(tmp_path / "out.ckpt", tmp_path / "peft", ConvertOptions(target_dialect="peft"))
    stated = ConvertOptions(target_dialect="peft", facts=Facts((Fact("*", "alpha", 8),)))
    report = convert(tmp_path / "out.ckpt", tmp_path / "peft", stated)
    assert {m.alpha for m in report.modules} == {8}
    assert any("left aside" in warning for warning in report.warnings)


def test_tk_names_go_to_peft_and_back(tmp_path: Path, mindspore) -> None:
    """MindFormers up to 0.6 cannot be run any more: the names are those of its source."""
    values = mindspore.load_checkpoint(str(FILES / "llama" / "adapter.ckpt"))
    old = [{"name": name.replace("mindpet_", "tk_"), "data": value} for name, value in values.items()]
    mindspore.save_checkpoint(old, str(tmp_path / "old.ckpt"))
    stated = Facts((Fact("*", "alpha", 16),))
    report = convert(tmp_path / "old.ckpt", tmp_path / "peft", ConvertOptions(target_dialect="peft", facts=stated))
    assert report.source_dialect == "tk"
    convert(tmp_path / "peft", tmp_path / "again.ckpt")
    assert same_bits(tmp_path / "again.ckpt", tmp_path / "old.ckpt")
    (tmp_path / "peft" / "lorabridge.json").unlink()
    convert(tmp_path / "peft", tmp_path / "made.ckpt", ConvertOptions(target_dialect="tk"))
    made = mindspore.load_checkpoint(str(tmp_path / "made.ckpt"))
    assert set(made) == {row["name"] for row in old}


EXPERTS = """
schema = 1
family = "toy_moe"
match = { model_type = ["toy_moe"] }
[sizes]
hidden = "hidden_size"
inner = "moe_intermediate_size"
layers = "num_hidden_layers"
experts = "num_experts"
[holes]
i = "layers"
e = "experts"
[[stack]]
ms = "decoder.layers.{i}.mlp.experts.{n:weight1|weight2}"
item = "decoder.layers.{i}.mlp.experts.{n:weight1|weight2}.{e}.weight"
[[linear]]
hf = { gate = "layers.{i}.mlp.experts.{e}.gate_proj", up = "layers.{i}.mlp.experts.{e}.up_proj" }
ms = { gate_up = "decoder.layers.{i}.mlp.experts.weight1.{e}" }
out = { gate = "inner", up = "inner" }
in = "hidden"
ms_order = "in out"
[[linear]]
hf = "layers.{i}.mlp.experts.{e}.down_proj"
ms = "decoder.layers.{i}.mlp.experts.weight2.{e}"
out = "hidden"
in = "inner"
ms_order = "in out"
"""


def test_experts_go_from_peft_into_stacks_and_back(tmp_path: Path) -> None:
    """weight1 gets A of gate and up one after another, B in blocks; weight2 the factors of down."""
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "toy_moe.toml").write_text(_two_stacks(EXPERTS))
    sizes = {
        "model_type": "toy_moe",
        "hidden_size": 6,
        "moe_intermediate_size": 5,
        "num_hidden_layers": 1,
        "num_experts": 3,
    }
    config = folder_with(tmp_path, sizes)
    random = np.random.default_rng(1)
    shapes = {"gate_proj": (5, 6), "up_proj": (5, 6), "down_proj": (6, 5)}
    factors = {}
    for e in range(3):
        for name, (out, into) in shapes.items():
            stem = f"base_model.model.layers.0.mlp.experts.{e}.{name}.lora_"
            factors[f"{stem}A.weight"] = random.standard_normal((2, into)).astype(np.float32)
            factors[f"{stem}B.weight"] = random.standard_normal((out, 2)).astype(np.float32)
    (tmp_path / "peft").mkdir()
    safetensors.numpy.save_file(factors, tmp_path / "peft" / "adapter_model.safetensors", {"format": "pt"})
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(shapes)}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(about))
    options = ConvertOptions(target_dialect="pynative", family="toy_moe", config=config, mappings=tmp_path / "tables")
    convert(tmp_path / "peft", tmp_path / "there", options)
    made = safetensors.numpy.load_file(tmp_path / "there" / "adapter_model.safetensors")
    at = "decoder.layers.0.mlp.experts."
    assert {n.removeprefix(at): v.shape for n, v in made.items()} == {
        "weight1_lora_a": (3, 6, 4), "weight1_lora_b": (3, 4, 10),
        "weight2_lora_a": (3, 5, 4), "weight2_lora_b": (3, 4, 6),
    }  # fmt: skip
    for e in range(3):
        stem = f"base_model.model.layers.0.mlp.experts.{e}."
        delta = {n: factors[f"{stem}{n}.lora_B.weight"] @ factors[f"{stem}{n}.lora_A.weight"] * 2 for n in shapes}
        wanted = {"weight1": np.concatenate([delta["gate_proj"], delta["up_proj"]]).T, "weight2": delta["down_proj"].T}
        told = json.loads((tmp_path / "there" / "mindformers_adapter_config.json").read_text())["lora_config"]
        scaling = told["lora_alpha"] / told["lora_rank"]
        for name, value in wanted.items():
            product = made[f"{at}{name}_lora_a"][e] @ made[f"{at}{name}_lora_b"][e]
            np.testing.assert_allclose(scaling * product, value, rtol=1e-5, atol=1e-6)
    convert(tmp_path / "there", tmp_path / "back", ConvertOptions(mappings=tmp_path / "tables"))
    again = safetensors.numpy.load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert {n: v.tobytes() for n, v in again.items()} == {n: v.tobytes() for n, v in factors.items()}


def _two_stacks(text: str) -> str:
    """Spell the two stacks one by one."""
    head, _, rest = text.partition("[[stack]]")
    body, _, tail = rest.partition("[[linear]]")
    stacks = "".join("[[stack]]" + body.replace("{n:weight1|weight2}", name) for name in ("weight1", "weight2"))
    return head + stacks + "[[linear]]" + tail
