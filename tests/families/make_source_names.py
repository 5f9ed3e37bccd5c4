"""Build small models of torch projects other than transformers and write their parameters' names and shapes.

``python make_source_names.py MAE SWIN CLIP`` writes ``sources/*.json``; the arguments are checkouts of
facebookresearch/mae (efb2a80), microsoft/Swin-Transformer (f82860b) and openai/CLIP (d05afc4). Run with torch, timm
1.0.31 and torchvision. These are the models that MindFormers' own converters read. The tests read what this wrote.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from functools import partial
from pathlib import Path

OUT = Path(__file__).parent / "sources"


def module(path: Path, name: str) -> types.ModuleType:
    """Import one file of a checkout."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    spec.loader.exec_module(made)
    return made


def write(name: str, source: str, model: object, without: tuple[str, ...] = ()) -> None:
    """Write a model's state, buffers included, under the names that torch saves."""
    state = model.state_dict()  # type: ignore[attr-defined]
    parameters = {key: list(value.shape) for key, value in state.items() if key not in without}
    text = json.dumps({"source": source, "parameters": parameters})
    (OUT / f"{name}.json").write_text(text.replace('"parameters"', '\n"parameters"') + "\n")
    print(f"{name}: {len(parameters)} parameters")


def timm(pool: str) -> object:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=2, mlp_ratio=2, num_classes=5,
                             global_pool=pool)  # fmt: skip


def mae(checkout: Path) -> object:
    """Build facebookresearch/mae's model; timm no longer takes qk_scale, which it passes as None."""
    import timm.models.vision_transformer as vision
    import torch

    block = vision.Block

    def without_scale(*args: object, qk_scale: object = None, **kwargs: object) -> object:
        return block(*args, **kwargs)

    vision.Block = without_scale
    for name in ("util", "util.pos_embed"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["util.pos_embed"] = module(checkout / "util/pos_embed.py", "util.pos_embed")
    sys.modules["util.pos_embed"].np.float = float
    made = module(checkout / "models_mae.py", "models_mae").MaskedAutoencoderViT(
        img_size=32, patch_size=8, embed_dim=12, depth=2, num_heads=2, decoder_embed_dim=16, decoder_depth=3,
        decoder_num_heads=2, mlp_ratio=2, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )  # fmt: skip
    vision.Block = block
    return made


def swin(checkout: Path) -> object:
    folder = checkout / "models"
    return module(folder / "swin_transformer.py", "swin_transformer").SwinTransformer(
        img_size=64, patch_size=2, embed_dim=8, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8], window_size=4,
        num_classes=5,
    )  # fmt: skip


def clip(checkout: Path) -> object:
    return module(checkout / "clip/model.py", "clip_model").CLIP(
        embed_dim=10, image_resolution=32, vision_layers=3, vision_width=64, vision_patch_size=8, context_length=7,
        vocab_size=31, transformer_width=16, transformer_heads=2, transformer_layers=2,
    )  # fmt: skip


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:]]
    write("vit_timm.avg", "timm 1.0.31, VisionTransformer(global_pool='avg')", timm("avg"))
    write("vit_timm.token", "timm 1.0.31, VisionTransformer(global_pool='token')", timm("token"))
    write("mae_facebook", "facebookresearch/mae efb2a80, MaskedAutoencoderViT", mae(folders[0]))
    write("swin_microsoft", "microsoft/Swin-Transformer f82860b, SwinTransformer", swin(folders[1]))
    write("clip_openai", "openai/CLIP d05afc4, CLIP", clip(folders[2]))
