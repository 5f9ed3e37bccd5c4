"""peft's other tuners: what real peft saved means the same after it became LoRA, and everything else is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lorabridge import ConvertOptions, convert
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.dialects.peft_tuners_config import ADDED, INPUTS, MULTIPLIED, REPLACED, TUNERS
from lorabridge.errors import MappingError

AS_LORA = Fact("*", "as", "lora")


class Net(nn.Module):
    """Layers of several shapes; the convolutions look at the same picture."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(12, 20)
        self.back = nn.Linear(20, 12)
        self.conv = nn.Conv2d(4, 6, 3)
        self.point = nn.Conv2d(4, 6, 1)
        self.line = nn.Conv1d(4, 6, 3)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.back(torch.tanh(self.wide(x))))


LINEAR = ["wide", "back"]
CONVS = ["wide", "conv", "point"]


def scaled(value: torch.Tensor) -> float:
    """Return what an error is measured by: a weight may be small where the products that make it are not."""
    return float(value.abs().max())


def net() -> Net:
    torch.manual_seed(1)
    return Net().eval()


def saved(kind: str, folder: Path, *, edit: Any = None, **fields: Any) -> Path:
    """Let real peft make an adapter, fill it with random numbers, and save it."""
    import peft

    model = peft.get_peft_model(net(), getattr(peft, f"{kind}Config")(**fields))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    if edit is not None:
        edit(model)
    model.save_pretrained(folder)
    save_file(
        {name: value.contiguous() for name, value in net().state_dict().items()}, folder.parent / "base.safetensors"
    )
    return folder


def merged(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights that real peft computes from a directory."""
    import peft

    model = peft.PeftModel.from_pretrained(net(), folder).merge_and_unload()
    return dict(model.state_dict())


def same(before: Path, after: Path) -> None:
    expected, found, base = merged(before), merged(after), net().state_dict()
    assert expected.keys() == found.keys()
    assert any(not torch.equal(expected[name], base[name]) for name in base)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=2e-6 * scaled(value))


def options(*facts: Fact, **more: Any) -> ConvertOptions:
    return ConvertOptions(target_dialect="peft", facts=Facts((AS_LORA, *facts)), **more)


def base(folder: Path) -> Fact:
    return Fact("*", "names_of", str(folder.parent / "base.safetensors"))


ADA = {"init_r": 6, "total_step": 10}
FULL = {"use_effective_conv2d": True}
HEAD = {"modules_to_save": ["head"]}
CASES: dict[str, tuple[str, dict[str, Any], bool]] = {
    "adalora": ("AdaLora", {"target_modules": LINEAR, **ADA, "lora_alpha": 5}, False),
    "adalora without alpha": ("AdaLora", {"target_modules": LINEAR, **ADA, "lora_alpha": 0}, False),
    "adalora conv": ("AdaLora", {"target_modules": ["wide", "conv"], **ADA}, True),
    "adalora head": ("AdaLora", {"target_modules": ["wide"], **ADA, **HEAD, "bias": "lora_only"}, False),
    "vera one": ("Vera", {"target_modules": ["wide"], "r": 8, "bias": "vera_only"}, False),
    "vera two": ("Vera", {"target_modules": LINEAR, "r": 8}, True),
    "loha": ("LoHa", {"target_modules": LINEAR, "r": 3, "alpha": 7, "alpha_pattern": {"back": 2}}, False),
    "loha patterns": ("LoHa", {"target_modules": LINEAR, "r": 3, "rank_pattern": {"back": 2}, **HEAD}, False),
    "loha conv flattened": ("LoHa", {"target_modules": CONVS, "r": 3}, True),
    "loha conv cores": ("LoHa", {"target_modules": [*CONVS, "line"], "r": 3, **FULL}, True),
    "lokr": ("LoKr", {"target_modules": LINEAR, "r": 2, "alpha": 3}, False),
    "lokr whole": ("LoKr", {"target_modules": LINEAR, "r": 16, "alpha": 3}, False),
    "lokr both": ("LoKr", {"target_modules": LINEAR, "r": 1, "decompose_both": True, "decompose_factor": 4}, False),
    "lokr conv": ("LoKr", {"target_modules": CONVS, "r": 1}, True),
    "lokr conv whole": ("LoKr", {"target_modules": CONVS, "r": 8}, True),
    "lokr conv cores": ("LoKr", {"target_modules": CONVS, "r": 1, **FULL}, True),
    "miss": ("Miss", {"target_modules": LINEAR, "r": 5, "bias": "all"}, True),
    "miss mini": ("Miss", {"target_modules": LINEAR, "r": 4, "init_weights": "mini", "mini_r": 4}, True),
    "vblora": ("VBLoRA", {"target_modules": LINEAR, "r": 3, "num_vectors": 8, "vector_length": 4, "topk": 3}, False),
    "delora": ("Delora", {"target_modules": LINEAR, "r": 4, "rank_pattern": {"back": 2}, **HEAD}, False),
    "pvera": ("Pvera", {"target_modules": LINEAR, "r": 4}, True),
    "gralora": ("Gralora", {"target_modules": LINEAR, "r": 4, "gralora_k": 2, "alpha": 3}, False),
    "gralora hybrid": ("Gralora", {"target_modules": LINEAR, "r": 4, "gralora_k": 2, "hybrid_r": 3}, False),
    "randlora": ("RandLora", {"target_modules": LINEAR, "r": 5, "randlora_alpha": 7}, True),
    "c3a": ("C3A", {"target_modules": LINEAR, "block_size": 2, "block_size_pattern": {"back": 4}}, False),
    "shira": ("Shira", {"target_modules": LINEAR, "r": 2}, True),
    "fourierft": ("FourierFT", {"target_modules": LINEAR, "n_frequency": 30, "scaling": 9.0}, True),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_peft_computes_the_same_weights_from_the_lora(name: str, tmp_path: Path) -> None:
    kind, fields, with_base = CASES[name]
    folder = saved(kind, tmp_path / "before", **fields)
    done = convert(folder, tmp_path / "after", options(*([base(folder)] if with_base else [])))
    same(folder, tmp_path / "after")
    assert done.modules


def pruned(model: Any) -> None:
    """Do what AdaLoRA's last step does: keep three singular values of one layer, none of the other."""
    names = {"wide": [True, False, True, False, True, False], "back": [False] * 6}
    model.peft_config["default"].rank_pattern = {f"{n}.lora_E.default": mask for n, mask in names.items()}


def test_adalora_pruned_ranks_keep_the_scaling_of_the_first(tmp_path: Path) -> None:
    folder = saved("AdaLora", tmp_path / "before", edit=pruned, target_modules=LINEAR, init_r=6, total_step=10)
    done = convert(folder, tmp_path / "after", options())
    assert {module.path: module.rank for module in done.modules} == {"wide": 3}
    config = json.loads((tmp_path / "after" / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (3, ["wide"])
    assert config["lora_alpha"] / config["r"] == pytest.approx(8 / (6 + 1e-5), rel=1e-15)
    same(folder, tmp_path / "after")
    assert torch.equal(merged(tmp_path / "after")["back.weight"], net().state_dict()["back.weight"])


@pytest.mark.parametrize("name", ["adalora", "vera one", "loha", "lokr"])
def test_another_tuner_is_refused_unless_lora_is_asked_for(name: str, tmp_path: Path) -> None:
    kind, fields, _ = CASES[name]
    folder = saved(kind, tmp_path / "before", **fields)
    with pytest.raises(MappingError, match=r"is not LoRA; it can be written as LoRA of rank \d+") as caught:
        convert(folder, tmp_path / "after", ConvertOptions(target_dialect="peft"))
    assert "--as lora" in caught.value.hint
    assert ("--compress" in caught.value.hint) == (kind in ("LoHa", "LoKr"))
    assert not (tmp_path / "after").exists()


def test_products_are_compressed_with_the_error_said(tmp_path: Path) -> None:
    kind, fields, _ = CASES["loha"]
    done = convert(saved(kind, tmp_path / "before", **fields), tmp_path / "after", options(compress="4"))
    assert {row.after for row in done.compressed} == {4}
    assert all(0 < row.error < 1 for row in done.compressed)


def test_mindspore_gets_the_factors(tmp_path: Path) -> None:
    """The delta of the .ckpt, with the alpha of its manifest, is the tuner's own."""
    import mindspore

    folder = saved("AdaLora", tmp_path / "before", target_modules=["wide"], init_r=6, total_step=10)
    facts = Facts((AS_LORA,))
    done = convert(folder, tmp_path / "out.ckpt", ConvertOptions(target_dialect="loralib-ms", facts=facts))
    found = mindspore.load_checkpoint(str(tmp_path / "out.ckpt"))
    a, b = (next(v.asnumpy() for k, v in found.items() if k.endswith(f"lora_{side}")) for side in "AB")
    delta = torch.from_numpy(b @ a) * done.modules[0].scaling
    expected = merged(folder)["wide.weight"] - net().state_dict()["wide.weight"]
    torch.testing.assert_close(delta, expected, rtol=1e-5, atol=2e-6)


def test_vera_without_its_projections_cannot_be_read(tmp_path: Path) -> None:
    folder = saved("Vera", tmp_path / "before", target_modules=LINEAR, r=8, save_projection=False)
    with pytest.raises(MappingError, match="random projections are not in the file") as caught:
        convert(folder, tmp_path / "after", options(base(folder)))
    assert "peft.save_as_lora(path, model, rank=8)" in caught.value.hint


def test_the_cure_for_missing_projections_works(tmp_path: Path) -> None:
    import peft

    folder = saved("Vera", tmp_path / "before", target_modules=LINEAR, r=8, save_projection=False)
    peft.save_as_lora(tmp_path / "lora", peft.PeftModel.from_pretrained(net(), folder), rank=8)
    convert(tmp_path / "lora", tmp_path / "after", ConvertOptions(target_dialect="peft"))
    expected, found = merged(folder), merged(tmp_path / "after")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * scaled(value))


def test_vera_of_several_modules_needs_the_base(tmp_path: Path) -> None:
    folder = saved("Vera", tmp_path / "before", target_modules=LINEAR, r=8)
    with pytest.raises(MappingError, match="how many inputs the module has is not in the file") as caught:
        convert(folder, tmp_path / "after", options())
    assert "--names-of" in caught.value.hint


def test_a_kernel_may_be_stated_instead_of_the_base(tmp_path: Path) -> None:
    folder = saved("LoHa", tmp_path / "before", target_modules=["wide", "conv", "line"], r=3, use_effective_conv2d=True)
    with pytest.raises(MappingError, match=r"the kernel is 3 in a conv1d or \[3, 1\] in a conv2d"):
        convert(folder, tmp_path / "after", options())
    convert(folder, tmp_path / "after", options(Fact("line", "kernel_size", [3])))
    same(folder, tmp_path / "after")


def test_a_kernel_that_is_none_of_the_factors_is_refused(tmp_path: Path) -> None:
    folder = saved("LoHa", tmp_path / "before", target_modules=["conv"], r=3, use_effective_conv2d=True)
    with pytest.raises(MappingError, match="shapes do not fit"):
        convert(folder, tmp_path / "after", options(Fact("conv", "kernel_size", [5, 5])))


def test_a_base_of_other_shapes_is_refused(tmp_path: Path) -> None:
    folder = saved("LoHa", tmp_path / "before", target_modules=["wide"], r=3)
    save_file({"wide.weight": torch.ones(20, 13)}, tmp_path / "base.safetensors")
    with pytest.raises(MappingError, match="shapes do not fit") as caught:
        convert(folder, tmp_path / "after", options(base(folder)))
    assert caught.value.where[0] == "wide: the delta is [20, 12], the base's weight [20, 13]"


@pytest.mark.parametrize("kind", ["AdaLora", "LoHa"])
def test_shards_without_elements_are_refused(kind: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = ADA if kind == "AdaLora" else {"r": 3}
    folder = saved(kind, tmp_path / "before", target_modules=["wide"], **fields)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: torch.empty(0) for name in tensors}, folder / "adapter_model.safetensors")
    with pytest.raises(MappingError, match="tensors have no elements, as DeepSpeed ZeRO-3"):
        convert(folder, tmp_path / "after", options())


TURNED = {
    "Vera": {"r": 8}, "FourierFT": {"n_frequency": 30}, "RandLora": {"r": 5}, "Gralora": {"r": 4, "gralora_k": 2},
    "VBLoRA": {"r": 2, "num_vectors": 8, "vector_length": 4}, "Pvera": {"r": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", TURNED)
def test_a_transposed_layer_keeps_its_delta(kind: str, tmp_path: Path) -> None:
    """GPT-2's Conv1D stores ``[in, out]``; peft sets fan_in_fan_out for it."""
    import peft
    from transformers.pytorch_utils import Conv1D

    def gpt() -> nn.Module:
        torch.manual_seed(3)
        made = nn.Sequential(Conv1D(20, 12), Conv1D(12, 20))  # type: ignore[no-untyped-call]
        for layer in made:
            nn.init.normal_(layer.weight)
        return made

    config = getattr(peft, f"{kind}Config")(target_modules=["0", "1"], fan_in_fan_out=True, **TURNED[kind])
    model = peft.get_peft_model(gpt(), config)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    model.save_pretrained(tmp_path / "before")
    save_file(dict(gpt().state_dict()), tmp_path / "base.safetensors")
    convert(tmp_path / "before", tmp_path / "after", options(base(tmp_path / "before")))
    expected, found = (
        peft.PeftModel.from_pretrained(gpt(), tmp_path / side).merge_and_unload().state_dict()
        for side in ("before", "after")
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=2e-6 * scaled(value))


@pytest.mark.parametrize(
    "name", ["adalora", "vera two", "loha conv flattened", "lokr conv", "miss", "gralora", "fourierft"]
)
def test_merging_is_what_peft_merges(name: str, tmp_path: Path) -> None:
    from lorabridge import MergeOptions, merge

    kind, fields, with_base = CASES[name]
    folder = saved(kind, tmp_path / "before", **fields)
    facts = Facts((AS_LORA, *([base(folder)] if with_base else [])))
    merge(tmp_path / "base.safetensors", [folder], tmp_path / "out.safetensors", MergeOptions(facts=facts))
    found = load_file(tmp_path / "out.safetensors")
    for key, value in merged(folder).items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=2e-6 * scaled(value))


def test_a_whole_conv1d_of_lokr_is_refused(tmp_path: Path) -> None:
    folder = saved("LoKr", tmp_path / "before", target_modules=["line"], r=8)
    with pytest.raises(MappingError, match="does not compute a Kronecker product"):
        convert(folder, tmp_path / "after", options(base(folder)))


def changed(folder: Path, **fields: Any) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("loha", {"r": 5}, "the factors have rank 3, adapter_config.json says 5"),
        ("adalora", {"init_r": 5}, "rank 6 is not what init_r"),
        ("loha", {"alpha": "x"}, "alpha is not a number"),
        ("lokr", {"new_option": True}, "1 field that LoKr of peft 0.21.2 has not"),
        ("loha", {"peft_type": "LOKR"}, "the file has no tensors of LoKr"),
    ],
)
def test_configs_that_contradict_the_file_are_refused(
    name: str, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    kind, own, _ = CASES[name]
    folder = changed(saved(kind, tmp_path / "before", **own), **fields)
    with pytest.raises(MappingError, match=said):
        convert(folder, tmp_path / "after", options())


def test_missing_and_strange_tensors_are_named(tmp_path: Path) -> None:
    kind, own, _ = CASES["loha"]
    folder = saved(kind, tmp_path / "before", **own)
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors["base_model.model.wide.hada_w2_b"]
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(MappingError, match="tensors are missing") as caught:
        convert(folder, tmp_path / "after", options())
    assert caught.value.where[0] == "wide.hada_w2_b"
    tensors = {n: v for n, v in tensors.items() if ".wide." not in n}
    save_file({**tensors, "base_model.model.back.hada_new": torch.ones(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(MappingError, match="does not fit together") as caught:
        convert(folder, tmp_path / "after", options())
    assert any("hada_new" in where for where in caught.value.where)


KNOWN = {**MULTIPLIED, **ADDED, **REPLACED, **INPUTS}


def every_type() -> list[str]:
    from peft import PeftType

    return sorted(kind.value for kind in PeftType)


@pytest.mark.parametrize("kind", every_type())
def test_every_type_of_peft_is_read_or_named_with_its_cure(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "before"
    folder.mkdir()
    save_file({"base_model.model.wide.x": torch.ones(2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(MappingError) as caught:
        convert(folder, tmp_path / "after", ConvertOptions(target_dialect="loralib-ms", facts=Facts((AS_LORA,))))
    told = f"{caught.value.problem} {caught.value.hint}"
    if kind in TUNERS:
        assert "has no tensors of" in told or "things about the adapter" in told
    elif kind == "LORA":
        assert "peft_type" not in told
    else:
        assert KNOWN.get(kind, "prompt method") in told
        assert any(cure in told for cure in ("merge_and_unload", "it stays in peft", "--from peft-prompt"))


def converts(kind: str) -> bool:
    """Say whether a layer class of a method of peft, or one that it inherits from, supports the conversion to LoRA."""
    import importlib
    import inspect

    module = importlib.import_module(f"peft.tuners.{kind.lower()}.layer")
    own = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    said = [inspect.getsource(c.supports_lora_conversion) for c in own if hasattr(c, "supports_lora_conversion")]
    return any("return True" in text or "return not isinstance" in text for text in said)


def test_what_peft_itself_turns_into_lora_is_pointed_to_it() -> None:
    gone = {"BONE", "TRAINABLE_TOKENS"}  # no method any more; rows of an embedding
    for kind in sorted({*MULTIPLIED, *ADDED, *REPLACED} - gone):
        assert converts(kind) == (kind in ADDED), kind


@pytest.mark.parametrize(
    ("kind", "said", "cure"),
    [
        ("IA3", "IA3 multiplies activations", "merge_and_unload"),
        ("WAVEFT", "WaveFT adds a matrix", "peft.convert_to_lora"),
        ("LN_TUNING", "the norms' own weights", "merge_and_unload"),
        ("POLY", "mixes several LoRAs by the task", "it stays in peft"),
        ("PREFIX_TUNING", "prompt method", "--from peft-prompt"),
        ("NEWEST", "'NEWEST', not LORA", "peft.convert_to_lora"),
    ],
)
def test_other_methods_are_named_with_what_to_do(kind: str, said: str, cure: str, tmp_path: Path) -> None:
    folder = tmp_path / "before"
    folder.mkdir()
    save_file({"base_model.model.wide.x": torch.ones(2)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(MappingError) as caught:
        convert(folder, tmp_path / "after", options())
    assert said in caught.value.problem
    assert cure in caught.value.hint


def test_additive_tuners_ask_for_the_base_s_shapes_and_refuse_what_multiplies(tmp_path: Path) -> None:
    folder = saved("Miss", tmp_path / "before", target_modules=LINEAR, r=5)
    with pytest.raises(MappingError, match="shape of the module's weight") as caught:
        convert(folder, tmp_path / "after", options())
    assert "--names-of" in caught.value.hint
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_weights": "bat"}))
    with pytest.raises(MappingError, match="multiplies the base weight"):
        convert(folder, tmp_path / "after", options(base(folder)))
    bare = saved("RandLora", tmp_path / "bare" / "before", target_modules=LINEAR, r=5, save_projection=False)
    with pytest.raises(MappingError, match="save_projection was false"):
        convert(bare, tmp_path / "after", options(base(bare)))


def test_dense_deltas_are_compressed_with_the_error_said(tmp_path: Path) -> None:
    folder = saved("C3A", tmp_path / "before", target_modules=["wide"], block_size=2)
    done = convert(folder, tmp_path / "after", options(compress="4"))
    assert [module.rank for module in done.modules] == [4]
    assert all(0 < row.error < 1 for row in done.compressed)


@pytest.mark.parametrize(("count", "size", "seed"), [(12, 12, 777), (30, 240, 777), (100, 70000, 5), (3, 5, 0)])
def test_places_are_those_that_torch_draws(count: int, size: int, seed: int) -> None:
    from lorabridge.arithmetic import tuned

    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]
    assert tuned.places(count, size, seed) == drawn.tolist()


@pytest.mark.parametrize("shape", [(2, 1, 2, 1, 1), (2, 2, 2, 2)])
@pytest.mark.parametrize("kind", sorted(TUNERS))
def test_tensors_of_odd_shapes_are_refused_by_name(kind: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    from lorabridge.dialects.peft_tuners import SHARED, TENSORS

    folder = tmp_path / "before"
    folder.mkdir()
    tensors = {f"base_model.model.wide.{name}": torch.ones(shape) for name in TENSORS[kind]}
    tensors |= {f"base_model.{name}": torch.ones(shape) for name in SHARED.get(kind, ())}
    save_file(tensors, folder / "adapter_model.safetensors")
    save_file(dict(net().state_dict()), tmp_path / "base.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(MappingError):
        convert(folder, tmp_path / "after", options(base(folder)))
