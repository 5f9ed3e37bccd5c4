"""A command that has the base at hand takes from it what an adapter's file leaves unsaid: modules, and their shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorabridge import ConvertOptions, MergeOptions, convert, merge
from lorabridge.actions.recover import recover
from lorabridge.actions.verify import verify
from lorabridge.actions.verify_inputs import VerifyOptions
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import MappingError

AS_LORA = Facts((Fact("*", "as", "lora"),))
SHAPES = {"first": (20, 12), "blocks.0.back": (12, 20), "blocks.1.square_layer": (12, 12)}


class Net(torch.nn.Module):
    """Three layers, one of them square, under names with dots and underscores."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = torch.nn.Linear(12, 20)
        self.blocks = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
        self.blocks[0].back = torch.nn.Linear(20, 12)
        self.blocks[1].square_layer = torch.nn.Linear(12, 12)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def stored(path: Path, prefix: str = "") -> Path:
    """Write the network by itself."""
    save_file({prefix + name: value for name, value in Net().state_dict().items()}, path)
    return path


def tuned(kind: str, folder: Path, **fields: object) -> tuple[Path, dict[str, torch.Tensor]]:
    """Let real peft make and merge an adapter; returns its directory, and the merged weights."""
    import peft

    config = getattr(peft, f"{kind}Config")(target_modules=[path.rpartition(".")[2] for path in SHAPES], **fields)
    model = peft.get_peft_model(Net(), config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return folder, peft.PeftModel.from_pretrained(Net(), folder).merge_and_unload().state_dict()


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("Miss", {"r": 5}), ("Pvera", {"r": 4}), ("RandLora", {"r": 5}), ("Shira", {"r": 2}),
     ("FourierFT", {"n_frequency": 30, "scaling": 9.0})],
)  # fmt: skip
def test_a_tuner_that_needs_shapes_merges_as_peft_merges_it(
    kind: str, fields: dict[str, object], tmp_path: Path
) -> None:
    base, out = stored(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    folder, expected = tuned(kind, tmp_path / "adapter", **fields)
    merge(base, folder, out, MergeOptions(facts=AS_LORA))
    found = load_file(out)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=2e-6 * float(value.abs().max()))
    proved = verify(folder, out, VerifyOptions(base=base, facts=AS_LORA, depths=("tensors",)))
    assert (proved.exit_code, proved.relation) == (0, "merge")
    row = recover(base, out, folder)
    assert row.fits
    assert [one.times for one in row.modules] == [1, 1, 1]


def test_the_base_may_have_a_head_above_the_names_of_the_adapter(tmp_path: Path) -> None:
    base = stored(tmp_path / "base.safetensors", "transformer.")
    folder, expected = tuned("Miss", tmp_path / "adapter", r=5)
    merge(base, folder, tmp_path / "out.safetensors", MergeOptions(facts=AS_LORA))
    found = load_file(tmp_path / "out.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[f"transformer.{name}"], value, rtol=1e-6, atol=1e-5)


@pytest.fixture
def flattened(tmp_path: Path) -> Path:
    """Factors under LyCORIS' names, with no manifest."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for path, (out, columns) in SHAPES.items():
        name = "lycoris_" + path.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "flat.safetensors")
    return tmp_path / "flat.safetensors"


def test_flattened_names_are_looked_up_in_the_base(flattened: Path, tmp_path: Path) -> None:
    base, out = stored(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    merge(base, flattened, out)
    before, after, file = load_file(base), load_file(out), load_file(flattened)
    for path in SHAPES:
        name = "lycoris_" + path.replace(".", "_")
        delta = 0.5 * file[f"{name}.lora_up.weight"].double() @ file[f"{name}.lora_down.weight"].double()
        wanted = (before[f"{path}.weight"].double() + delta).float()
        torch.testing.assert_close(after[f"{path}.weight"], wanted, rtol=0, atol=1e-6)
    assert verify(flattened, out, VerifyOptions(base=base, depths=("tensors",))).exit_code == 0
    assert recover(base, out, flattened).fits


def test_a_name_that_the_base_lacks_is_listed_with_the_nearest(flattened: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.safetensors"
    save_file({n.replace("back", "pack"): v for n, v in Net().state_dict().items()}, base)
    with pytest.raises(MappingError, match="1 of 3 names not found among the modules of the base model") as caught:
        merge(base, flattened, tmp_path / "out.safetensors")
    assert "lycoris_blocks_0_back (nearest: lycoris_blocks_0_pack)" in caught.value.where
    assert not (tmp_path / "out.safetensors").exists()


def test_a_name_that_two_modules_of_the_base_have_is_never_guessed(tmp_path: Path) -> None:
    save_file({"a.b_c.weight": torch.ones(4, 4), "a_b.c.weight": torch.ones(4, 4)}, tmp_path / "base.safetensors")
    name = "lora_unet_a_b_c"
    save_file(
        {f"{name}.lora_down.weight": torch.ones(2, 4), f"{name}.lora_up.weight": torch.ones(4, 2)},
        tmp_path / "flat.safetensors",
    )
    with pytest.raises(MappingError, match="can stand for several modules of the base model") as caught:
        merge(tmp_path / "base.safetensors", tmp_path / "flat.safetensors", tmp_path / "out.safetensors")
    assert f"{name}: a.b_c or a_b.c" in caught.value.where


def test_a_model_that_is_named_outranks_the_base(flattened: Path, tmp_path: Path) -> None:
    base, other = stored(tmp_path / "base.safetensors"), tmp_path / "other.safetensors"
    save_file({"first.weight": torch.ones(20, 12)}, other)
    facts = Facts((Fact("*", "names_of", str(other)),))
    with pytest.raises(MappingError, match="2 of 3 names not found") as caught:
        merge(base, flattened, tmp_path / "out.safetensors", MergeOptions(facts=facts))
    assert f"in {other}" in caught.value.where


def test_what_a_manifest_says_outranks_the_base(tmp_path: Path) -> None:
    base, out = stored(tmp_path / "base.safetensors"), tmp_path / "kohya.safetensors"
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {}
    for path, (rows, columns) in SHAPES.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(4, columns)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(rows, 4)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA"}))
    convert(folder, out, ConvertOptions(target_dialect="kohya"))
    merge(base, out, tmp_path / "a.safetensors")
    merge(base, folder, tmp_path / "b.safetensors")
    one, two = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(one[name], value) for name, value in two.items())
