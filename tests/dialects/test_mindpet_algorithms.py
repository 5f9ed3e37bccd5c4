"""MindPet's algorithms beside LoRA as files: AdapterHub's bottlenecks and peft's prompts, both ways and by effect."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabridge import layers
from lorabridge.actions.choices import ConvertOptions
from lorabridge.actions.convert import convert
from lorabridge.actions.inspect import inspect
from lorabridge.actions.merge import merge
from lorabridge.commands._values import facts
from lorabridge.errors import LorabridgeError, MappingError

ms = pytest.importorskip("mindspore")
HUB = Path(__file__).parent / "adapterhub_bottlenecks"
PHM = ("W_left", "W_right", "b", "phm_rule")
NAMES = {"houlsby": "gelu", "scaled": "silu", "compacter": "relu", "gpt2": "relu"}
ADAPTER = "mindpet_delta_adapter.mindpet_delta_adapter_block.mindpet_delta_adapter"


def told(**given: str) -> ConvertOptions:
    """Return options that state facts."""
    return ConvertOptions(facts=facts([(name, [text]) for name, text in given.items()]))


def without_manifest(path: Path) -> Path:
    """Forget where a file came from."""
    beside = path / "lorabridge.json" if path.is_dir() else path.with_name(path.name + ".lorabridge.json")
    found = [p for p in (beside, path.with_suffix(".lorabridge.json")) if p.is_file()]
    assert found, sorted(path.parent.iterdir())
    for one in found:
        one.unlink()
    return path


def wanted(name: str) -> dict[str, np.ndarray]:
    """Return what AdapterHub's adapters made of the same hidden states, by the layer that they follow."""
    hosts = {"attention_adapters": "attn.c_proj", "output_adapters": "mlp.c_proj"}
    with np.load(HUB / "outputs.npz") as held:
        found = {key.removeprefix(f"{name}/"): held[key] for key in held.files if key.startswith(f"{name}/")}
    found.pop("last_hidden_state")
    return {
        f"{head}.{hosts[last]}" if last in hosts else f"{place}.dense": value
        for place, value in found.items() for head, _, last in [place.rpartition(".")]
    }  # fmt: skip


@pytest.mark.parametrize(("name", "activation"), NAMES.items())
def test_mindpets_cells_compute_what_adapterhubs_did(tmp_path: Path, name: str, activation: str) -> None:
    target = tmp_path / "out.ckpt"
    report = convert(HUB / name, target)
    assert any(f"non_linearity={activation!r}" in note for note in report.notes)
    loaded = ms.load_checkpoint(str(target))
    hidden = ms.Tensor(np.linspace(-3, 3, 24, dtype=np.float32).reshape(3, 8))
    for path, expected in wanted(name).items():
        if name == "compacter":
            cell = layers.LowRankAdapterLayer(8, 2, 2, non_linearity=activation, compute_dtype=ms.float32)
            stem = f"{path}.mindpet_delta_low_rank_adapter."
        else:
            inner = 2 if name == "gpt2" else 4
            cell = layers.AdapterLayer(8, inner, non_linearity=activation, compute_dtype=ms.float32)
            stem = f"{path}.mindpet_delta_adapter."
        mine = {key.removeprefix(stem): value for key, value in loaded.items() if key.startswith(stem)}
        assert len(mine) == len(list(cell.get_parameters()))
        missing, extra = ms.load_param_into_net(cell, mine, strict_load=True)
        assert not missing
        assert not extra
        np.testing.assert_allclose(cell(hidden).asnumpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["houlsby", "gpt2"])
def test_adapterhubs_files_come_back_without_a_manifest(tmp_path: Path, name: str) -> None:
    convert(HUB / name, tmp_path / "out.ckpt")
    convert(without_manifest(tmp_path / "out.ckpt"), tmp_path / "back", told(non_linearity=NAMES[name]))
    before, after = (torch.load(p / "pytorch_adapter.bin") for p in (HUB / name, tmp_path / "back"))
    assert set(after) == {key.replace(f".{name}.", ".adapter.") for key in before}
    assert all(torch.equal(after[key.replace(f".{name}.", ".adapter.")], value) for key, value in before.items())
    first, second = (json.loads((p / "adapter_config.json").read_text()) for p in (HUB / name, tmp_path / "back"))
    assert second["config"] == first["config"]
    assert (second["hidden_size"], second["name"]) == (8, "adapter")


@pytest.mark.parametrize("name", list(NAMES))
def test_the_way_back_is_exact(tmp_path: Path, name: str) -> None:
    convert(HUB / name, tmp_path / "out.ckpt")
    convert(tmp_path / "out.ckpt", tmp_path / "back")
    before, after = (torch.load(p / "pytorch_adapter.bin") for p in (HUB / name, tmp_path / "back"))
    assert {k: v.numpy().tobytes() for k, v in after.items()} == {k: v.numpy().tobytes() for k, v in before.items()}


def test_a_compacter_of_one_number_comes_back_as_one_with_the_rule_one(tmp_path: Path) -> None:
    convert(HUB / "compacter", tmp_path / "out.ckpt")
    convert(without_manifest(tmp_path / "out.ckpt"), tmp_path / "back", told(non_linearity="relu"))
    before, after = (torch.load(p / "pytorch_adapter.bin") for p in (HUB / "compacter", tmp_path / "back"))
    place = "encoder.layer.1.output.adapters"
    for side in ("down.0", "up"):
        old = {name: before[f"{place}.compacter.adapter_{side}.{name}"] for name in PHM}
        new = {name: after[f"{place}.adapter.adapter_{side}.{name}"] for name in PHM}
        assert new["phm_rule"].item() == 1
        h = [torch.kron(f["phm_rule"][0], f["W_left"][0] @ f["W_right"][0]) for f in (old, new)]
        torch.testing.assert_close(*h)
        assert torch.equal(old["b"], new["b"])


def test_a_family_table_names_the_layers_that_adapters_follow(tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(HUB / "houlsby", source)
    options = ConvertOptions(family="bert")
    convert(source, tmp_path / "ms.ckpt", options)
    names = list(ms.load_checkpoint(str(tmp_path / "ms.ckpt")))
    assert f"bert.bert_encoder.encoder.blocks.0.attention.projection.{ADAPTER}_down_sampler.weight" in names
    assert f"bert.bert_encoder.encoder.blocks.1.output.projection.{ADAPTER}_up_sampler.bias" in names
    told_all = ConvertOptions(family="bert", facts=facts([("non_linearity", ["gelu"])]))
    convert(without_manifest(tmp_path / "ms.ckpt"), tmp_path / "back", told_all)
    before, after = (torch.load(p / "pytorch_adapter.bin") for p in (source, tmp_path / "back"))
    pairs = {key.replace(".houlsby.", ".adapter."): value for key, value in before.items()}
    assert set(after) == set(pairs) or set(after) == {f"bert.{key}" for key in pairs}
    assert all(torch.equal(value, pairs[key.removeprefix("bert.")]) for key, value in after.items())


@pytest.mark.parametrize(
    ("name", "said"),
    [("pfeiffer", "after the block's norm"), ("compacter_default", "which save_adapter leaves out of the file")],
)
def test_forms_that_mindpet_does_not_compute_are_refused(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(MappingError) as caught:
        convert(HUB / name, tmp_path / "out.ckpt")
    assert said in str(caught.value)
    assert not (tmp_path / "out.ckpt").exists()


EVERY = json.loads((Path(__file__).parent / "adapterhub_every.json").read_text("utf-8"))
CONVERTS = {"houlsby", "double_seq_bn", "lora"}


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"adapters"}))
def test_every_named_method_of_adapterhub_converts_or_has_a_cure(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    tensors = {key: torch.zeros(shape) for key, shape in EVERY[name]["tensors"].items()}
    torch.save(tensors, tmp_path / "in" / "pytorch_adapter.bin")
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(EVERY[name]["config"]))
    if name in CONVERTS:
        assert convert(tmp_path / "in", tmp_path / "out.ckpt").tensors_read == len(tensors)
        return
    with pytest.raises(MappingError) as caught:
        convert(tmp_path / "in", tmp_path / "out.ckpt")
    cures = ("train", "merge it in adapters", "it stays in AdapterHub", "choose one with --from")
    assert any(cure in caught.value.hint for cure in cures)


def changed(tmp_path: Path, name: str, **fields: object) -> Path:
    """Return one of AdapterHub's directories with other fields in its config."""
    made = tmp_path / "changed"
    shutil.copytree(HUB / name, made)
    config = json.loads((made / "adapter_config.json").read_text())
    config["config"].update(fields)
    (made / "adapter_config.json").write_text(json.dumps(config))
    return made


@pytest.mark.parametrize(
    ("field", "value"),
    [("is_parallel", True), ("ln_before", True), ("ln_after", True), ("use_gating", True), ("scaling", "learned"),
     ("residual_before_ln", False), ("inv_adapter", "nice"), ("cross_adapter", True)],
)  # fmt: skip
def test_every_field_that_changes_the_function_is_refused(tmp_path: Path, field: str, value: object) -> None:
    with pytest.raises(MappingError) as caught:
        convert(changed(tmp_path, "houlsby", **{field: value}), tmp_path / "out.ckpt")
    assert field in str(caught.value) or "scaling" in str(caught.value)


def test_the_exact_gelu_has_to_be_given_up_knowingly(tmp_path: Path) -> None:
    source = changed(tmp_path, "houlsby", non_linearity="gelu")
    with pytest.raises(MappingError) as caught:
        convert(source, tmp_path / "out.ckpt")
    assert "--non-linearity gelu" in str(caught.value.hint)
    report = convert(source, tmp_path / "out.ckpt", told(non_linearity="gelu"))
    assert any("the source computes gelu" in note for note in report.notes)
    x = torch.linspace(-6, 6, 100001, dtype=torch.float64)
    apart = torch.nn.functional.gelu(x) - torch.nn.functional.gelu(x, approximate="tanh")
    assert apart.abs().max() < 5e-4


def adapter_file(tmp_path: Path, **cells: object) -> Path:
    """Save the parameters that MindPet's cells added, and what else a cell has that is named so."""
    rows = [
        {"name": f"{path}.{p.name}", "data": p}
        for path, cell in cells.items() for p in cell.get_parameters() if "mindpet" in p.name
    ]  # fmt: skip
    ms.save_checkpoint(rows, str(tmp_path / "mine.ckpt"))
    return tmp_path / "mine.ckpt"


def test_an_activation_is_asked_for_and_must_be_known(tmp_path: Path) -> None:
    source = adapter_file(tmp_path, **{"encoder.layer.0.output.dense": layers.AdapterDense(8, 8, bottleneck_size=3)})
    with pytest.raises(MappingError, match="which activation"):
        convert(source, tmp_path / "back")
    with pytest.raises(MappingError, match="leakyrelu"):
        convert(source, tmp_path / "back", told(non_linearity="leakyrelu"))
    convert(source, tmp_path / "back", told(non_linearity="fast_gelu"))
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())["config"]
    assert (config["non_linearity"], config["mh_adapter"], config["output_adapter"]) == ("quick_gelu", False, True)
    assert int(8 // config["reduction_factor"]) == 3


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"encoder.layer.0.output.dense": 2, "encoder.layer.1.output.dense": 4}, "different bottleneck sizes"),
        ({"encoder.layer.0.output.dense": 2, "encoder.layer.0.attention.output.dense": 2,
          "encoder.layer.1.output.dense": 2}, "layer 1"),
        ({"encoder.layer.0.intermediate.dense": 2}, "no adapter behind this layer"),
    ],
)  # fmt: skip
def test_what_one_config_of_adapterhub_cannot_say_is_refused(tmp_path: Path, cells: dict[str, int], said: str) -> None:
    made = {path: layers.AdapterDense(8, 8, bottleneck_size=inner) for path, inner in cells.items()}
    with pytest.raises(MappingError) as caught:
        convert(adapter_file(tmp_path, **made), tmp_path / "back", told(non_linearity="relu"))
    assert said in str(caught.value)


def peft_file(tmp_path: Path, kind: str) -> tuple[Path, torch.nn.Module]:
    """Save a prompt method of the real peft around a small GPT-2."""
    peft = pytest.importorskip("peft")
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    base = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=16))
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    config = {
        "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(**options),
        "PROJECTED": lambda: peft.PrefixTuningConfig(**options, prefix_projection=True, encoder_hidden_size=6),
        "PROMPT_TUNING": lambda: peft.PromptTuningConfig(**options),
        "P_TUNING": lambda: peft.PromptEncoderConfig(**options, encoder_hidden_size=6),
    }[kind]()
    model = peft.get_peft_model(base, config)
    model.save_pretrained(str(tmp_path / "peft"))
    return tmp_path / "peft", model.eval()


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROJECTED"])
def test_a_prefix_encoder_gives_the_keys_and_values_that_peft_gave(tmp_path: Path, kind: str) -> None:
    source, model = peft_file(tmp_path, kind)
    report = convert(source, tmp_path / "out.ckpt")
    build = "PrefixEncoder(pre_seq_len=3, num_layers=2, num_heads=2, kv_channels=4, prefix_projection=False)"
    assert any(build in note for note in report.notes)
    cell = layers.PrefixEncoder(3, 2, 2, 4, False, 0, 0.0)
    network = ms.nn.SequentialCell()
    network.prefix_encoder = cell
    loaded = ms.load_checkpoint(str(tmp_path / "out.ckpt"))
    missing, extra = ms.load_param_into_net(network, loaded)
    assert missing == ["prefix_encoder.mindpet_delta_ptuning2_prefix"], "the numbers 0 ... n-1, which the cell has"
    assert not extra
    prompt = model.get_prompt(batch_size=2)
    pairs = [(prompt.layers[i].keys, prompt.layers[i].values) for i in range(2)]
    for ours, (key, value) in zip(cell(2, ms.float32), pairs, strict=True):
        np.testing.assert_allclose(ours[0].asnumpy(), key.detach().numpy(), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(ours[1].asnumpy(), value.detach().numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
def test_prompts_go_to_a_named_cell_and_hold_what_peft_prepends(tmp_path: Path, kind: str) -> None:
    source, model = peft_file(tmp_path, kind)
    with pytest.raises(MappingError, match="PromptTuning"):
        convert(source, tmp_path / "out.ckpt")
    convert(source, tmp_path / "out.ckpt", told(cell="prompt_tuning"))
    name = "prompt_tuning.mindpet_delta_prompttuning_embedding.embedding_table"
    loaded = ms.load_checkpoint(str(tmp_path / "out.ckpt"))
    assert list(loaded) == [name]
    cell = layers.PromptTuning(3, 8)
    ms.load_param_into_net(cell, {name.removeprefix("prompt_tuning."): loaded[name]}, strict_load=True)
    found = cell(ms.Tensor(np.arange(3, dtype=np.int32)[None]))
    np.testing.assert_allclose(found.asnumpy(), model.get_prompt(batch_size=1).detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING"])
def test_peft_loads_what_comes_back_from_mindspore_with_the_same_logits(tmp_path: Path, kind: str) -> None:
    peft = pytest.importorskip("peft")
    source, model = peft_file(tmp_path, kind)
    convert(source, tmp_path / "out.ckpt", told(cell="p"))
    config = source / "adapter_config.json"
    back = tmp_path / "back"
    convert(without_manifest(tmp_path / "out.ckpt"), back, ConvertOptions(config=config))
    before, after = (load_file(p / "adapter_model.safetensors") for p in (source, back))
    assert torch.equal(before["prompt_embeddings"], after["prompt_embeddings"])
    ids = torch.arange(5)[None]
    logits = model(input_ids=ids).logits
    again = peft.PeftModel.from_pretrained(model.get_base_model(), str(back)).eval()
    assert torch.equal(again(input_ids=ids).logits, logits)


def test_without_a_config_peft_takes_the_sizes_from_the_model(tmp_path: Path) -> None:
    rows = layers.PrefixEncoder(3, 2, 2, 4, False, 0, 0.0)
    ms.save_checkpoint(rows, str(tmp_path / "mine.ckpt"))
    report = convert(tmp_path / "mine.ckpt", tmp_path / "back")
    assert any("task_type" in note for note in report.notes)
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PREFIX_TUNING", 3)
    assert "num_layers" not in config


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_a_projected_prefix_becomes_what_its_cell_computes(tmp_path: Path, dtype: ms.Type) -> None:
    cell = layers.PrefixEncoder(3, 2, 2, 4, True, 5, 0.0)
    cell.mindpet_delta_ptuning2_trans.to_float(ms.float32)
    for parameter in cell.trainable_params():
        parameter.set_data(ms.Tensor(parameter.asnumpy(), dtype))
    ms.save_checkpoint(cell, str(tmp_path / "projected.ckpt"))
    report = convert(tmp_path / "projected.ckpt", tmp_path / "back")
    assert any("from which the projection cannot return" in warning for warning in report.warnings)
    rows = load_file(tmp_path / "back" / "adapter_model.safetensors")["prompt_embeddings"].float().numpy()
    parts = {p.name: p.asnumpy().astype(np.float64) for p in cell.get_parameters()}
    table, w0, b0, w2, b2 = (
        parts[f"mindpet_delta_ptuning2_{name}"]
        for name in ("embedding.embedding_table", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias")
    )
    exact = np.tanh(table @ w0.T + b0) @ w2.T + b2
    step = 2.0**-24 if dtype == ms.float32 else 2.0**-11
    assert (np.abs(rows - exact) <= step * np.abs(exact) * 1.0001 + 1e-8).all(), "rounded once"
    if dtype == ms.float32:
        np.testing.assert_allclose(cell.rows().asnumpy(), rows, rtol=1e-5, atol=1e-6)


def test_a_projected_prefix_computes_in_peft_what_it_did_in_mindspore(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    source, model = peft_file(tmp_path, "PREFIX_TUNING")
    cell = layers.PrefixEncoder(3, 2, 2, 4, True, 5, 0.0)
    ms.save_checkpoint(cell, str(tmp_path / "projected.ckpt"))
    convert(tmp_path / "projected.ckpt", tmp_path / "back", ConvertOptions(config=source / "adapter_config.json"))
    again = peft.PeftModel.from_pretrained(model.get_base_model(), str(tmp_path / "back")).eval()
    prompt = again.get_prompt(batch_size=2)
    for number, ours in enumerate(cell(2, ms.float32)):
        for mine, theirs in zip(ours, (prompt.layers[number].keys, prompt.layers[number].values), strict=True):
            np.testing.assert_allclose(mine.asnumpy(), theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("separate", [False, True])
def test_prefix_layers_become_one_prefix_of_peft(tmp_path: Path, separate: bool) -> None:
    cells = ms.nn.CellList([layers.PrefixLayer(3, 1, 2, 8, 5, separate_value=separate) for _ in range(2)])
    ms.save_checkpoint(cells, str(tmp_path / "layers.ckpt"))
    with pytest.raises(MappingError, match="does not say how many layers"):
        convert(tmp_path / "layers.ckpt", tmp_path / "back")
    source, _ = peft_file(tmp_path, "PREFIX_TUNING")
    config = source / "adapter_config.json"
    convert(tmp_path / "layers.ckpt", tmp_path / "back", ConvertOptions(config=config))
    rows = load_file(tmp_path / "back" / "adapter_model.safetensors")["prompt_embeddings"].numpy().reshape(3, 2, 2, 8)
    for number, cell in enumerate(cells):
        cell.set_train(False)
        for part, ours in enumerate(cell.matrices()):
            np.testing.assert_allclose(rows[:, number, part], ours.asnumpy(), rtol=1e-5, atol=1e-6)
    config.write_text(config.read_text().replace('"num_virtual_tokens": 3', '"num_virtual_tokens": 1'))
    with pytest.raises(MappingError, match="not of the config's sizes"):
        convert(tmp_path / "layers.ckpt", tmp_path / "again", ConvertOptions(config=config))


def test_projections_without_all_their_parts_are_refused(tmp_path: Path) -> None:
    whole = layers.PrefixEncoder(3, 2, 2, 4, True, 5, 0.0).parameters_dict()
    for left, said in (("trans.2.bias", "is missing"), ("embedding.embedding_table", "without the rows")):
        rest = [{"name": n, "data": p} for n, p in whole.items() if not n.endswith(left)]
        ms.save_checkpoint(rest, str(tmp_path / "part.ckpt"))
        with pytest.raises(MappingError, match=said):
            convert(tmp_path / "part.ckpt", tmp_path / "back", ConvertOptions(source_dialect="mindpet-prompt"))


def test_inspect_shows_what_it_is_and_merge_says_why_not(tmp_path: Path) -> None:
    found = inspect(HUB / "houlsby")
    assert (found.contents, found.dialect) == ("adapter", "adapterhub-bottleneck")
    assert len(found.extras) == 16
    assert {row.kind for row in found.extras} == {"delta"}
    assert not found.problems
    base = {f"encoder.layer.{i}.output.dense.weight": torch.zeros(8, 12) for i in range(2)}
    save_file(base, tmp_path / "base.safetensors")
    with pytest.raises(MappingError, match="cannot be merged into weights: a bottleneck adapter computes a function"):
        merge(tmp_path / "base.safetensors", [HUB / "houlsby"], tmp_path / "merged.safetensors")
    with pytest.raises(LorabridgeError, match="cannot become a file of loralib"):
        convert(HUB / "houlsby", tmp_path / "x.pt", ConvertOptions(target_dialect="loralib"))


def test_other_algorithms_and_heads_in_one_file_are_named(tmp_path: Path) -> None:
    low, dense = layers.LowRankAdapterDense(8, 8, reduction_factor=2), layers.LoRADense(8, 8, 2, 4)
    with pytest.raises(LorabridgeError):
        convert(adapter_file(tmp_path, low=low, lora=dense), tmp_path / "x")
    rows = [{"name": f"h.0.mlp.c_proj.{p.name}", "data": p} for p in low.get_parameters() if "mindpet" in p.name]
    rows.append({"name": "head.weight", "data": low.weight})
    ms.save_checkpoint(rows, str(tmp_path / "mine.ckpt"))
    with pytest.raises(MappingError) as caught:
        convert(tmp_path / "mine.ckpt", tmp_path / "x", told(non_linearity="relu"))
    assert "head.weight" in str(caught.value)
    convert(tmp_path / "mine.ckpt", tmp_path / "x",
            ConvertOptions(exclude=("head.*",), facts=facts([("non_linearity", ["relu"])])))  # fmt: skip
    assert len(torch.load(tmp_path / "x" / "pytorch_adapter.bin")) == 8


def test_biases_alone_go_through_a_family_table(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    base = BertModel(BertConfig(**sizes, vocab_size=20, max_position_embeddings=8))
    biases = {name: torch.randn_like(p) for name, p in base.named_parameters() if name.endswith("bias")}
    save_file(biases, tmp_path / "bitfit.safetensors")
    convert(tmp_path / "bitfit.safetensors", tmp_path / "ms.ckpt", ConvertOptions(family="bert"))
    loaded = ms.load_checkpoint(str(tmp_path / "ms.ckpt"))
    assert len(loaded) == len(biases)
    assert all(name.rpartition(".")[2] in ("bias", "beta") for name in loaded)
    options = ConvertOptions(family="bert")
    convert(without_manifest(tmp_path / "ms.ckpt"), tmp_path / "back.safetensors", options)
    again = load_file(tmp_path / "back.safetensors")
    plain = {name.removeprefix("bert."): value for name, value in again.items()}
    assert set(plain) == set(biases)
    assert all(torch.equal(plain[name], value) for name, value in biases.items())
