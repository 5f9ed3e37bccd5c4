"""What sd-scripts' ``split_qkv`` saves is recognised by its header, its alphas and its zeros, and only then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorabridge import ConvertOptions, convert
from lorabridge.actions.inspect import inspect
from lorabridge.dialects.adapter import Fact, Facts

FILES = Path(__file__).parent / "kohya_files"
SAID = "split_qkv"


def warned(path: Path, tmp_path: Path, pipeline: str) -> list[str]:
    facts = Facts((Fact("*", "names_of", pipeline),))
    options = ConvertOptions(target_dialect="diffusers", facts=facts, overwrite=True)
    return [text for text in convert(path, tmp_path / "out", options).warnings if SAID in text]


@pytest.mark.parametrize(
    ("name", "pipeline", "parts"), [("flux_split", "flux", 4), ("sd3", "sd3", 3), ("flux", "flux", 0)]
)
def test_files_of_sd_scripts_are_told_apart(name: str, pipeline: str, parts: int, tmp_path: Path) -> None:
    found = warned(FILES / f"{name}.safetensors", tmp_path, pipeline)
    assert len(found) == bool(parts)
    assert all(f"apply 1/{parts} of what was trained" in text for text in found)


def test_inspect_says_it_too() -> None:
    assert any(SAID in text for text in inspect(FILES / "flux_split.safetensors").warnings)


def changed(tmp_path: Path, *, metadata: bool = True, **more: float) -> Path:
    """Write the file otherwise: without metadata, with another alpha, with a value outside of the blocks."""
    original = FILES / "flux_split.safetensors"
    tensors = load_file(original)
    with safe_open(original, "pt") as file:
        said = file.metadata()
    module = "lora_unet_single_blocks_37_linear1"
    if "alpha" in more:
        tensors[f"{module}.alpha"] = torch.tensor(more["alpha"])
    if "outside" in more:
        tensors[f"{module}.lora_up.weight"][0, -1] = more["outside"]
    if "other" in more:
        for tensor, value in (("alpha", torch.tensor(more["other"])), ("lora_down.weight", torch.ones(1, 15360)),
                              ("lora_up.weight", torch.ones(3072, 1))):  # fmt: skip
            tensors[f"lora_unet_single_blocks_37_linear2.{tensor}"] = value
    save_file(tensors, tmp_path / "changed.safetensors", said if metadata else None)
    return tmp_path / "changed.safetensors"


@pytest.mark.parametrize("more", [{"alpha": 8.0}, {"outside": 0.5}, {"metadata": False}])
def test_nothing_is_said_where_it_is_not_certain(more: dict[str, float], tmp_path: Path) -> None:
    assert not warned(changed(tmp_path, **more), tmp_path, "flux")  # type: ignore[arg-type]


@pytest.mark.parametrize(("alpha", "certain"), [(2.0, True), (8.0, False)])
def test_without_metadata_other_layers_tell(alpha: float, certain: bool, tmp_path: Path) -> None:
    path = changed(tmp_path, metadata=False, other=alpha)
    assert bool(warned(path, tmp_path, "flux")) == certain


def test_what_is_written_here_has_its_own_alpha_and_is_none(tmp_path: Path) -> None:
    facts = Facts((Fact("*", "names_of", "flux"),))
    convert(FILES / "flux.safetensors", tmp_path / "d", ConvertOptions(target_dialect="diffusers", facts=facts))
    (tmp_path / "d" / "lorabridge.json").unlink()
    convert(tmp_path / "d", tmp_path / "k.safetensors", ConvertOptions(target_dialect="kohya", facts=facts))
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(tmp_path / "k.safetensors"), bare)
    assert not warned(bare, tmp_path, "flux")
