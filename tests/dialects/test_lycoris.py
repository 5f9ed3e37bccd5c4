"""LyCORIS' kinds: files that the real package wrote mean the same as the LoRA that they become."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorabridge import ConvertOptions, convert
from lorabridge.dialects.adapter import Fact, Facts
from lorabridge.errors import LorabridgeError, MappingError

HERE = Path(__file__).parent / "lycoris"
BASE = HERE / "base.safetensors"
EXACT = ["lora", "lora_rs", "lora_tucker", "lora_dora"]
PRODUCTS = ["loha", "loha_tucker", "lokr", "lokr_both", "lokr_tucker", "lokr_whole", "full"]
AS_LORA = (Fact("*", "as", "lora"),)


def options(target: str, *facts: Fact, **more: object) -> ConvertOptions:
    """Name the base whose module names decide."""
    return ConvertOptions(
        target_dialect=target, facts=Facts((Fact("*", "names_of", str(BASE)), *facts)), **more,  # type: ignore[arg-type]
    )  # fmt: skip


def layers(net: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {"fc": net.block.fc, "conv": net.block.conv, "point_wise": net.block.point_wise}


def plain_net() -> torch.nn.Module:
    """Build the network that make_lycoris_files.py adapted."""
    from make_lycoris_files import Net

    net = Net()
    net.load_state_dict(load_file(BASE))
    return net


@pytest.mark.parametrize("name", [*EXACT, *PRODUCTS])
def test_peft_computes_from_the_converted_file_what_lycoris_computed(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    convert(HERE / f"{name}.safetensors", tmp_path / "peft", options("peft", *(AS_LORA if name in PRODUCTS else ())))
    adapted = PeftModel.from_pretrained(plain_net(), tmp_path / "peft").eval()
    probes = load_file(HERE / "probes.safetensors")
    for layer, module in layers(adapted.base_model.model).items():
        with torch.no_grad():
            found = module(probes[f"x.{layer}"])
        torch.testing.assert_close(found, probes[f"{name}.{layer}"], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "conv", "fc", "point_wise"),
    [("lora", 4, 4, 4), ("lora_tucker", 4, 4, 4), ("loha", 16, 16, 16), ("lokr", 32, 16, 8), ("lokr_both", 1, 1, 1),
     ("lokr_whole", 32, 24, 8), ("full", 32, 24, 8)],
)  # fmt: skip
def test_products_become_pairs_of_the_rank_that_they_need(
    name: str, conv: int, fc: int, point_wise: int, tmp_path: Path
) -> None:
    done = convert(HERE / f"{name}.safetensors", tmp_path / "out.safetensors", options("peft", *AS_LORA))
    ranks = {module.path: module.rank for module in done.modules}
    assert ranks == {"block.conv": conv, "block.fc": fc, "block.point_wise": point_wise}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_refused_unless_lora_is_asked_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(MappingError, match=r"is not LoRA; it can be written as LoRA of rank \d+, exactly") as caught:
        convert(HERE / f"{name}.safetensors", tmp_path / "peft", options("peft"))
    assert "--as lora" in caught.value.hint
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("glora", "GLoRA, whose delta depends on the base weight"),
        ("ia3", "IA3, which multiplies the weight"),
        ("oft", "OFT, which rotates the weight"),
        ("lora_dora_per_input", "DoRA's magnitude is one per input"),
    ],
)
def test_what_is_no_product_is_named_and_refused(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(MappingError) as caught:
        convert(HERE / f"{name}.safetensors", tmp_path / "peft", options("peft", *AS_LORA))
    assert said in caught.value.problem
    assert "merge it into the base" in caught.value.hint


def test_a_smaller_rank_is_measured_and_said(tmp_path: Path) -> None:
    done = convert(HERE / "loha.safetensors", tmp_path / "peft", options("peft", *AS_LORA, compress="6"))
    assert {row.after for row in done.compressed} == {6}
    assert all(0 < row.error < 1 for row in done.compressed)


def test_a_kernel_that_is_flattened_needs_the_base(tmp_path: Path) -> None:
    with pytest.raises(LorabridgeError, match="3 of 3 names not found"):
        convert(HERE / "loha.safetensors", tmp_path / "peft", ConvertOptions(target_dialect="peft"))


def test_tensors_of_no_known_kind_are_listed(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(HERE / "lora.safetensors")
    save_file({**tensors, "lycoris_block_fc.lora_new": torch.ones(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(MappingError, match="1 tensor is nothing that sd-scripts or LyCORIS writes") as caught:
        convert(tmp_path / "odd.safetensors", tmp_path / "peft", options("peft"))
    assert caught.value.where[0] == "lycoris_block_fc.lora_new"


def test_a_half_pair_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(HERE / "lora.safetensors")
    del tensors["lycoris_block_conv.lora_down.weight"]
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(MappingError, match="factors are missing"):
        convert(tmp_path / "half.safetensors", tmp_path / "peft", options("peft"))
