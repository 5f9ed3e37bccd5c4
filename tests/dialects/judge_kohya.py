"""Let sd-scripts judge: the names it gives, the files its networks write, and what its merge makes of ours.

    python judge_kohya.py SD_SCRIPTS [files|names|judge]      writes into kohya_files/

SD_SCRIPTS is a checkout of kohya-ss/sd-scripts (judged at 48d368fa, 2026-02, with torch 2.13.0, diffusers 0.32.1,
transformers 4.54.1, accelerate 1.6.0). The networks lie on the meta device in their true sizes; only adapted modules
get weights. ``names.json.gz``: every module that sd-scripts adapts, and its weight's shape. ``*.safetensors``: what
``save_weights`` of networks/lora.py, lora_flux.py, lora_sd3.py, lora_fa.py, dylora.py and oft.py wrote, factors
filled by a seed. ``judged.json``: a digest of what lorabridge makes of each file by way of diffusers, and the
largest difference, relative to the largest element, between the weights after sd-scripts merged that and after it
merged the original.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent / "kohya_files"
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
OPEN_CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
T5 = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
SD3 = {
    "sd3": (24, 192, None, [], "medium"),
    "sd35_medium": (24, 384, "rms", list(range(13)), "3-5-medium"),
    "sd35_large": (38, 192, "rms", [], "3-5-large"),
}


@dataclass(frozen=True)
class Models:
    """The networks of one pipeline, on the meta device."""

    network: torch.nn.Module
    texts: list[torch.nn.Module]

    @property
    def text(self) -> object:
        """What networks/lora.py takes: one text encoder by itself, or a list."""
        return self.texts[0] if len(self.texts) == 1 else self.texts


def models(pipeline: str) -> Models:
    """Build sd-scripts' networks of a pipeline."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    with torch.device("meta"):
        small = CLIPTextModel(CLIPTextConfig(**CLIP_L))
        if pipeline in ("sd15", "sd21"):
            from library import model_util
            from library.original_unet import UNet2DConditionModel

            config = model_util.create_unet_diffusers_config(pipeline == "sd21", pipeline == "sd21")
            text = small if pipeline == "sd15" else CLIPTextModel(CLIPTextConfig(**OPEN_CLIP))
            return Models(UNet2DConditionModel(**config), [text])
        big = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G))
        if pipeline == "sdxl":
            from library.sdxl_original_unet import SdxlUNet2DConditionModel

            return Models(SdxlUNet2DConditionModel(), [small, big])
        t5 = T5EncoderModel(T5Config(**T5))
        if pipeline == "flux":
            from library import flux_models

            return Models(flux_models.Flux(flux_models.configs["dev"].params), [small, t5])
        from library import sd3_models

        depth, edge, norm, double, kind = SD3[pipeline]
        params = sd3_models.SD3Params(2, depth, edge**2, edge, 2048, norm, double, 4096, depth * 64, kind)
        with_head = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_L))
        return Models(sd3_models.create_sd3_mmdit(params), [with_head, big, t5])


def create(pipeline: str, made: Models, rank: int, alpha: float, **options: str) -> torch.nn.Module:
    """Call ``create_network`` of the module that sd-scripts trains the pipeline with."""
    from networks import lora, lora_flux, lora_sd3

    module = {"flux": lora_flux}.get(pipeline, lora_sd3 if pipeline.startswith("sd3") else lora)
    with torch.device("meta"):
        if module is lora:
            return lora.create_network(1.0, rank, alpha, None, made.text, made.network, **options)
        return module.create_network(1.0, rank, alpha, None, made.texts, made.network, train_t5xxl="True", **options)


def loras(network: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the adapted modules of a network of sd-scripts."""
    return [*network.text_encoder_loras, *network.unet_loras]


def name_of(module: torch.nn.Module) -> str:
    """Return what the module is called in the file."""
    return getattr(module, "lora_name", None) or module.oft_name


def names() -> None:
    """Write every module's flattened name and the shape of its weight."""
    found = {}
    for pipeline in ("sd15", "sd21", "sdxl", *SD3, "flux"):
        options = {"flux": {"in_dims": "1,1,1,1,1"}}.get(pipeline, {"emb_dims": "1,1,1,1,1,1"})
        conv = {"conv_dim": "1"} if pipeline in ("sd15", "sd21", "sdxl") else options
        network = create(pipeline, models(pipeline), 1, 1.0, **conv)
        found[pipeline] = {m.lora_name: list(m.org_module.weight.shape) for m in loras(network)}
        print(pipeline, len(found[pipeline]))
    (HERE / "names.json.gz").write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0))


def blocks(total: int, **chosen: int) -> str:
    """Return sd-scripts' list of a number per block: 0 but for ``b3=2``."""
    return ",".join(str(chosen.get(f"b{number}", 0)) for number in range(total))


FILES: dict[str, tuple[str, int, float, str, dict[str, str]]] = {
    "sd15": ("sd15", 2, 1.0, "_11_(mlp|self_attn_q)|down.*(to_q|to_out_0|proj_in|conv1)|mid_.*(proj_out|conv2)", {
        "block_dims": blocks(25, b4=2, b12=1), "block_alphas": blocks(25, b4=3, b12=1),
        "conv_block_dims": blocks(25, b4=1), "conv_block_alphas": blocks(25, b4=0),
    }),
    "sdxl": ("sdxl", 1, 0.5, "_10_self_attn_out|blocks_(3|9)_(attn2_to_k|ff_net)|proj_in", {
        "block_dims": blocks(23, b8=2), "block_alphas": blocks(23, b8=1),
    }),
    "sd3": ("sd3", 1, 2.0, "_0_self_attn_(q|k)_proj|block_0_layer_0_SelfAttention_q|joint", {
        "train_block_indices": "1", "split_qkv": "True", "context_mlp_dim": "0", "context_mod_dim": "0",
        "x_mod_dim": "0", "x_mlp_dim": "0"}),
    "flux": ("flux", 1, 1.0, "te1_.*_0_mlp_fc1|te3_.*block_2_.*(wi_0|SelfAttention_o)|double", {
        "train_double_block_indices": "1", "train_single_block_indices": "none", "txt_attn_dim": "0",
        "img_mlp_dim": "0", "txt_mlp_dim": "0", "img_mod_dim": "0", "txt_mod_dim": "0"}),
    "flux_split": ("flux", 1, 2.0, "linear1", {
        "train_double_block_indices": "none", "train_single_block_indices": "37", "split_qkv": "True",
        "single_mod_dim": "0"}),
}  # fmt: skip
TINY = "mid_block_(attentions_0_.*(to_q|ff_net_2|proj_in)|resnets_0_conv1)"


def filled(network: torch.nn.Module, kept: str, dtype: torch.dtype, file: Path, metadata: dict[str, str]) -> None:
    """Give the factors values, keep the modules that ``kept`` matches, and let the network save."""
    network.text_encoder_loras = [m for m in network.text_encoder_loras if re.search(kept, name_of(m))]
    network.unet_loras = [m for m in network.unet_loras if re.search(kept, name_of(m))]
    for module in loras(network):
        module.apply_to()
        if hasattr(module, "org_module"):
            del module.org_module
        network.add_module(name_of(module), module)
    network.to_empty(device="cpu")
    g = torch.Generator().manual_seed(len(list(network.parameters())))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) / 8)
        for module in loras(network):
            dim = getattr(module, "lora_dim", 1)
            module.alpha.copy_(torch.tensor(float(getattr(module, "scale", 1.0) * dim)))
    network.save_weights(str(file), dtype, metadata)
    print(file.name, file.stat().st_size, len(loras(network)))


def files() -> None:
    """Write the fixtures."""
    for name, (pipeline, rank, alpha, kept, options) in FILES.items():
        made = models(pipeline)
        network = create(pipeline, made, rank, alpha, **options)
        metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
        filled(network, kept, torch.float16, HERE / f"{name}.safetensors", metadata)
    tiny_others()


def tiny_others() -> None:
    """Write the files of DyLoRA, LoRA-FA and OFT for a small U-Net of the same classes, and the U-Net's names."""
    from library import original_unet
    from networks import dylora, lora_fa, oft

    original_unet.BLOCK_OUT_CHANNELS = (32, 32, 32, 32)
    original_unet.TIMESTEP_INPUT_DIM, original_unet.TIME_EMBED_DIM = 32, 32
    with torch.device("meta"):
        unet = original_unet.UNet2DConditionModel(64, 8, 16, False)
    for name, module, options in (("dylora", dylora, {"unit": "1"}), ("lora_fa", lora_fa, {}), ("oft", oft, {})):
        with torch.device("meta"):
            network = module.create_network(1.0, 2, 0.5 if name != "oft" else 1e-3, None, [], unet, **options)
        network.text_encoder_loras = []
        network.unet_loras = network.unet_ofts if name == "oft" else network.unet_loras
        filled(network, TINY, torch.float16, HERE / f"{name}.safetensors", {})
    weights = {n: torch.zeros(p.shape, dtype=torch.float16) for n, p in unet.named_parameters() if p.dim() > 1}
    found = {n: w for n, w in weights.items() if re.search(TINY, n.replace(".", "_"))}
    save_file(found, HERE / "tiny_unet.safetensors")


def merged(pipeline: str, file: Path) -> dict[str, torch.Tensor]:
    """Let sd-scripts build its network from a file and merge it into weights of zeros: the deltas by module."""
    from networks import lora, lora_flux, lora_sd3

    made = models(pipeline)
    module = {"flux": lora_flux}.get(pipeline, lora_sd3 if pipeline.startswith("sd3") else lora)
    state = load_file(file)
    texts = made.text if module is lora else made.texts
    network, _ = module.create_network_from_weights(1.0, None, None, texts, made.network, state, for_inference=True)
    for adapted in loras(network):
        adapted.org_module.weight = torch.nn.Parameter(torch.zeros(adapted.org_module.weight.shape))
        adapted.org_module.bias = None
    network.merge_to(made.text if module is lora else made.texts, made.network, state, torch.float32, "cpu")
    found = {adapted.lora_name: adapted.org_module.weight.detach() for adapted in loras(network)}
    assert {name.partition(".")[0] for name in state} == set(found), "a module was not found"
    return found


def written(name: str, folder: Path) -> Path:
    """Convert a fixture to diffusers' names and, without its manifest, back to sd-scripts'."""
    from lorabridge import ConvertOptions, convert
    from lorabridge.dialects.adapter import Fact, Facts

    named = Fact("*", "names_of", FILES[name][0])
    facts = Facts((Fact("*", "alpha_in", "config"), named))
    convert(HERE / f"{name}.safetensors", folder / name, ConvertOptions(target_dialect="diffusers", facts=facts))
    (folder / name / "lorabridge.json").unlink()
    out = folder / f"{name}.safetensors"
    convert(folder / name, out, ConvertOptions(target_dialect="kohya", facts=Facts((named,))))
    return out


def digest(file: Path) -> str:
    """Return a digest of a file's tensors."""
    made = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        made.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return made.hexdigest()


def judge() -> None:
    """Compare what sd-scripts merges from our files and from its own."""
    import tempfile

    judged = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (pipeline, *_) in FILES.items():
            ours = written(name, Path(folder))
            theirs, found = merged(pipeline, HERE / f"{name}.safetensors"), merged(pipeline, ours)
            assert theirs.keys() == found.keys(), theirs.keys() ^ found.keys()
            worst = max(float((found[n] - theirs[n]).abs().max() / theirs[n].abs().max()) for n in theirs)
            judged[name] = {"digest": digest(ours), "modules": len(theirs), "difference": worst}
            print(name, judged[name])
    (HERE / "judged.json").write_text(json.dumps(judged, indent=1) + "\n", "utf-8")


def without_images() -> None:
    """Stand in for torchvision, which sd-scripts imports for images only."""
    import types

    import diffusers  # noqa: F401  (looks for torchvision itself, once; so does transformers)
    from transformers import CLIPTextModel, T5EncoderModel  # noqa: F401

    vision = types.ModuleType("torchvision")
    vision.transforms = types.ModuleType("torchvision.transforms")  # type: ignore[attr-defined]
    vision.transforms.Compose = vision.transforms.ToTensor = vision.transforms.Normalize = lambda *_: None
    sys.modules |= {"torchvision": vision, "torchvision.transforms": vision.transforms}


if __name__ == "__main__":
    without_images()
    sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/networks"]
    steps = {"names": names, "files": files, "judge": judge}
    HERE.mkdir(exist_ok=True)
    for step in sys.argv[2:] or steps:
        steps[step]()
