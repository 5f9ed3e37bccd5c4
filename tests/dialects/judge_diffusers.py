"""Let diffusers judge: it loads what lorabridge wrote, and what was converted computes what the original computed.

    python judge_diffusers.py        needs diffusers 0.42.1 beside torch and peft; writes diffusers_judged.json

``names``: every flattened module of Stable Diffusion 1.5 (diffusers' naming) and XL (the original one) and what
diffusers' own converters make of it. ``fused``: where diffusers puts the rows of every module of Flux. ``forward``:
the largest difference between the outputs of a tiny U-Net with a file loaded by diffusers and the same U-Net with the
delta of sd-scripts' formula added to its weights, and a digest of the file, so that tests can tell whether lorabridge
still writes what was judged. diffusers' importer of sd- scripts' files gives some modules the alpha of others where
alphas or ranks differ ("original" is the file that was converted); with one rank and alpha it agrees.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
FOLDER = HERE / "diffusers"
TINY = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": [16, 32],
    "norm_num_groups": 4, "cross_attention_dim": 12, "attention_head_dim": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
SDXL = {
    "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10], "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
           "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")  # fmt: skip


def tiny() -> torch.nn.Module:
    """Build the U-Net of the judged files; the same weights in every run."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY).eval()


def output(unet: torch.nn.Module) -> torch.Tensor:
    """Run it on a fixed input."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return unet(torch.randn(1, 4, 8, 8, generator=g), 3, torch.randn(1, 5, 12, generator=g)).sample


def adapted(unet: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the modules that the files adapt."""
    return {n: m for n, m in unet.named_modules() if n.endswith(ADAPTED) and hasattr(m, "weight")}


def kohya_file(unet: torch.nn.Module, dtype: torch.dtype, *, mixed: bool) -> dict[str, torch.Tensor]:
    """Make an adapter as sd-scripts saves one; ``mixed``: ranks and alphas differ, and some alphas are missing."""
    g = torch.Generator().manual_seed(2)
    out = {}
    for number, (name, module) in enumerate(adapted(unet).items()):
        rank = (4, 2, 3)[number % 3] if mixed else 4
        flat = "lora_unet_" + name.replace(".", "_")
        shape = module.weight.shape
        out[f"{flat}.lora_down.weight"] = (torch.randn(rank, *shape[1:], generator=g) / 4).to(dtype)
        out[f"{flat}.lora_up.weight"] = (torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=g) / 4).to(
            dtype
        )
        if number % 5 or not mixed:
            out[f"{flat}.alpha"] = torch.tensor((1.0, 2.0, 3.0)[number % 3] if mixed else 2.0).to(dtype)
    return out


def merged(unet: torch.nn.Module, file: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Add sd-scripts' deltas to the weights (networks/lora.py, LoRAInfModule.merge_to)."""
    for name, module in adapted(unet).items():
        flat = "lora_unet_" + name.replace(".", "_")
        down, up = file[f"{flat}.lora_down.weight"].float(), file[f"{flat}.lora_up.weight"].float()
        scale = float(file[f"{flat}.alpha"]) / down.shape[0] if f"{flat}.alpha" in file else 1.0
        if down.dim() == 2:
            delta = up @ down
        else:
            delta = torch.nn.functional.conv2d(down.permute(1, 0, 2, 3), up).permute(1, 0, 2, 3)
        with torch.no_grad():
            module.weight += delta * scale
    return unet


def loaded(file: Path) -> torch.nn.Module:
    """Load a file as a pipeline does: its state dict, alphas and metadata, then the U-Net's part of it."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin as Mixin

    unet = tiny()
    state, alphas, metadata = Mixin.lora_state_dict(str(file.parent), weight_name=file.name, return_lora_metadata=True)
    Mixin.load_lora_into_unet(state, network_alphas=alphas, unet=unet, metadata=metadata)
    return unet


def names() -> dict[str, dict[str, str]]:
    """Return what diffusers' converters make of every flattened module name."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import lora_conversion_utils as theirs
    from diffusers.utils.state_dict_utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    from lorabridge.families import tables

    found: dict[str, dict[str, str]] = {}
    for family, side in (("sd15", "hf"), ("sdxl", "ms")):
        table = tables.load_family(family)
        known = tables.names(table, {}, side, layout={})
        paths = [n.removesuffix(".weight") for n, shape in known.items() if n.endswith(".weight") and len(shape) > 1]
        bare = [p.removeprefix("unet.").removeprefix("model.diffusion_model.") for p in paths]
        text = [
            f"text_model.encoder.layers.{i}.{m}"
            for i in (0, 11)
            for m in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc2")
        ]
        flats = ["lora_unet_" + path.replace(".", "_") for path in bare]
        prefixes = ("lora_te_",) if family == "sd15" else ("lora_te1_", "lora_te2_")
        flats += [prefix + path.replace(".", "_") for prefix in prefixes for path in text]
        state = {}
        for number, flat in enumerate(flats):
            state[f"{flat}.lora_down.weight"] = torch.full((1, 1), float(number))
            state[f"{flat}.lora_up.weight"] = torch.full((1, 1), float(number))
        if side == "ms":
            with torch.device("meta"):
                config = UNet2DConditionModel(**SDXL).config
            state = theirs._maybe_map_sgm_blocks_to_diffusers(state, config)
        converted, _ = theirs._convert_non_diffusers_lora_to_diffusers(state)
        parts = [{n: t for n, t in converted.items() if n.startswith("unet.") is unet} for unet in (True, False)]
        converted = convert_unet_state_dict_to_peft(parts[0]) | convert_state_dict_to_peft(parts[1])
        pairs = {}
        for name, value in converted.items():
            for end in (".lora_A.weight", ".lora_linear_layer.down.weight"):
                if name.endswith(end):
                    pairs[flats[int(value)]] = name.removesuffix(end)
        assert len(pairs) == len(flats), (family, len(pairs), len(flats))
        found[family] = pairs
    return found


def fused() -> dict[str, list[tuple[str, int, int]]]:
    """Return where diffusers puts the rows of every module of Flux: flattened name to (path, first row, last + 1)."""
    from diffusers.loaders import lora_conversion_utils as theirs

    from lorabridge.families import tables

    known = tables.names(tables.load_family("flux"), {}, "ms", layout={"ms_prefix": ""})
    shapes = {n.removesuffix(".weight"): s for n, s in known.items() if n.endswith(".weight") and "blocks" in n}
    state, flats = {}, []
    for path, shape in shapes.items():
        flat = "lora_unet_" + path.replace(".", "_")
        rows = torch.arange(shape[0], dtype=torch.float64) + len(flats) * 2**20 + 1
        state |= {f"{flat}.lora_down.weight": torch.ones(1, 1), f"{flat}.lora_up.weight": rows.reshape(-1, 1)}
        flats.append(flat)
    found: dict[str, list[tuple[str, int, int]]] = {flat: [] for flat in flats}
    for name, tensor in theirs._convert_kohya_flux_lora_to_diffusers(state).items():
        if name.endswith(".lora_B.weight"):
            first, last = int(tensor[0, 0]) - 1, int(tensor[-1, 0])
            found[flats[first // 2**20]].append((name.removesuffix(".lora_B.weight"), first % 2**20, last % 2**20))
    return {flat: sorted(rows, key=lambda row: row[1]) for flat, rows in found.items()}


def part_of_xl() -> dict[str, torch.Tensor]:
    """Make four modules of an SDXL adapter as sd-scripts saves it, for the transcripts of docs/diffusion.md."""
    g = torch.Generator().manual_seed(3)
    out = {}
    for name, shape, rank, alpha in (
        ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", (640, 2048), 2, 1.0),
        ("lora_unet_middle_block_1_proj_in", (1280, 1280), 2, 1.0),
        ("lora_te1_text_model_encoder_layers_11_mlp_fc1", (3072, 768), 2, 1.0),
        ("lora_te2_text_model_encoder_layers_31_self_attn_q_proj", (1280, 1280), 3, 1.0),
    ):
        out[f"{name}.lora_down.weight"] = (torch.randn(rank, shape[1], generator=g) / 8).half()
        out[f"{name}.lora_up.weight"] = (torch.randn(shape[0], rank, generator=g) / 8).half()
        out[f"{name}.alpha"] = torch.tensor(alpha).half()
    return out


def main() -> None:
    """Write the judged files' inputs and the verdicts."""
    import diffusers
    import peft
    import transformers

    FOLDER.mkdir(exist_ok=True)
    save_file(part_of_xl(), FOLDER / "sdxl.safetensors", {"ss_network_module": "networks.lora", "ss_network_dim": "2"})
    base = {n: list(t.shape) for n, t in tiny().state_dict().items()}
    (FOLDER / "tiny_names.json").write_text(json.dumps(base, indent=0) + "\n")
    verdict: dict[str, object] = {
        "versions": {m.__name__: m.__version__ for m in (diffusers, peft, torch, transformers)}
    }
    forward: dict[str, dict[str, object]] = {}
    for dtype, mixed in ((torch.float16, True), (torch.float16, False)):
        label = f"{'mixed' if mixed else 'uniform'}_{str(dtype).removeprefix('torch.')}"
        source = FOLDER / f"kohya_{label}.safetensors"
        save_file(kohya_file(tiny(), dtype, mixed=mixed), source, {"ss_network_module": "networks.lora"})
        wanted = output(merged(tiny(), load_file(source)))
        change = float((wanted - output(tiny())).abs().max())
        with tempfile.TemporaryDirectory() as folder:
            cases = {"original": source, **written(source, Path(folder))}
            for case, path in cases.items():
                found = output(loaded(path))
                forward[f"{label} {case}"] = {
                    "difference": float((found - wanted).abs().max()), "change": change, "digest": digest(path),
                }  # fmt: skip
    verdict |= {"forward": forward, "names": names(), "fused": fused()}
    (HERE / "diffusers_judged.json").write_text(json.dumps(verdict, indent=0) + "\n")
    print(json.dumps({k: v for k, v in verdict.items() if k not in ("names", "fused")}, indent=1))


def digest(path: Path) -> str:
    """Return a digest of a file's tensors and of the metadata that diffusers reads."""
    from safetensors import safe_open

    made = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    metadata = safe_open(path, "pt").metadata() or {}
    made.update(metadata.get("lora_adapter_metadata", "").encode())
    return made.hexdigest()


def written(source: Path, folder: Path) -> dict[str, Path]:
    """Convert the kohya file into everything that diffusers reads; the names come from a base of zeros."""
    from lorabridge import ConvertOptions, convert
    from lorabridge.dialects.adapter import Fact, Facts

    base = folder / "base.safetensors"
    shapes = json.loads((FOLDER / "tiny_names.json").read_text())
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, base)
    named = Fact("*", "names_of", str(base))
    out = {}
    for case, dialect, facts in (
        ("config", "diffusers", (Fact("*", "alpha_in", "config"),)),
        ("weights", "diffusers", (Fact("*", "alpha_in", "weights"),)),
        ("mindone", "mindone", ()),
    ):
        path = folder / case / "pytorch_lora_weights.safetensors"
        convert(source, path.parent, ConvertOptions(target_dialect=dialect, facts=Facts((named, *facts))))
        out[case] = path
    (folder / "config" / "lorabridge.json").unlink()  # so that the way back is read, not restored
    path = folder / "kohya.safetensors"
    convert(folder / "config", path, ConvertOptions(target_dialect="kohya"))
    out["kohya"] = path
    return out


if __name__ == "__main__":
    main()
