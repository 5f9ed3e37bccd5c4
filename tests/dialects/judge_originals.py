"""Let diffusers judge files in the original code's names: what it makes of them, and of what lorabridge writes.

    python judge_originals.py        needs diffusers 0.42.1 beside torch and peft; writes originals_judged.json

``read``: for every file of ``originals_cases`` a digest of each module's delta, as diffusers' pipeline converts it.
``written``: for files that lorabridge wrote from the same modules in diffusers' names, those that diffusers then reads
with another delta; how many modules of the real network took factors; and a digest of the file, so that tests can tell
whether it is still written. Of a control LoRA, diffusers exchanges the halves of the last modulation's A as well as
those of B, so that it misreads this module wherever they differ.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import originals_cases as made
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
TARGETS = {
    "comfy_flux": "comfy", "xlabs": "xlabs", "bfl": "bfl", "comfy_wan": "comfy", "comfy_wan_alpha": "comfy",
    "musubi_wan": "kohya", "comfy_hunyuan": "comfy",
}  # fmt: skip
ONLY = {"Flux": "flux", "HunyuanVideo": "hunyuan_video", "Wan": "wan"}


def converted(pipeline: str, path: Path) -> made.Tensors:
    """Return what a pipeline of diffusers makes of a file."""
    import diffusers

    found = getattr(diffusers.loaders, f"{pipeline}LoraLoaderMixin").lora_state_dict(
        str(path.parent), weight_name=path.name, local_files_only=True
    )
    return found[0] if isinstance(found, tuple) else found


def file_digest(path: Path) -> str:
    """Return a digest of names and values."""
    whole = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.numpy().tobytes())
    return whole.hexdigest()[:16]


def write(source: Path, target: Path, pipeline: str, dialect: str) -> None:
    """Let lorabridge carry a file to diffusers' names, forget where they came from, and write a dialect from there."""
    from lorabridge import ConvertOptions, convert
    from lorabridge.dialects.adapter import Fact, Facts

    plain = target.with_name("diffusers.safetensors")
    facts = Facts((Fact("*", "alpha_in", "weights"),))
    convert(source, plain, ConvertOptions(target_dialect="diffusers", facts=facts, overwrite=True))
    save_file(load_file(plain), plain)
    facts = Facts((Fact("*", "names_of", ONLY[pipeline]),))
    convert(plain, target, ConvertOptions(target_dialect=dialect, facts=facts))


def network(pipeline: str) -> torch.nn.Module:
    """Build the smallest network that has the modules."""
    import diffusers

    kind, config = {
        "Flux": ("FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}),
        "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {"num_layers": 1, "num_single_layers": 1}),
        "Wan": ("WanTransformer3DModel", made.WAN_TINY),
    }[pipeline]
    with torch.device("meta"):
        built = getattr(diffusers, kind)(**config)
    return built.to_empty(device="cpu").to(torch.bfloat16)


def loaded(pipeline: str, state: made.Tensors) -> int:
    """Let diffusers load a converted file into the network; return how many modules have factors."""
    model = network(pipeline)
    kept = {name: t for name, t in state.items() if "norm_" not in name}
    model.load_lora_adapter({name: tensor.contiguous() for name, tensor in kept.items()}, prefix="transformer")
    factors = {name for name, _ in model.named_parameters() if ".lora_A." in name}
    assert len(factors) == sum(name.endswith("lora_A.weight") for name in kept), "some factors found no module"
    return len(factors)


def main() -> None:
    """Write the file."""
    import diffusers

    out: dict[str, object] = {"diffusers": diffusers.__version__, "read": {}, "written": {}}
    with tempfile.TemporaryDirectory() as temporary:
        for name, (pipeline, tensors) in made.cases().items():
            path = Path(temporary) / f"{name}.safetensors"
            save_file({key: value.contiguous() for key, value in tensors.items()}, path)
            theirs = converted(pipeline, path)
            out["read"][name] = made.digests(theirs)  # type: ignore[index]
            back = Path(temporary) / f"{name}_back.safetensors"
            write(path, back, pipeline, TARGETS[name])
            again = converted(pipeline, back)
            before, after = made.every_digest(theirs), made.every_digest(again)
            other = sorted(key for key in before | after if before.get(key) != after.get(key))
            row = {"file": file_digest(back), "other": other}
            if name != "bfl":  # its modules are those of all 57 blocks
                row["modules"] = loaded(pipeline, again)
            out["written"][name] = row  # type: ignore[index]
            print(name, row)
    (HERE / "originals_judged.json").write_text(json.dumps(out, indent=1, sort_keys=True) + "\n", "utf-8")


if __name__ == "__main__":
    main()
