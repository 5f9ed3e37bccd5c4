"""Let MindOne judge: it loads what lorabridge wrote, and its layers hold the deltas that sd-scripts' formula gives.

    python judge_mindone.py        needs mindone 0.5.0 on MindSpore 2.10 (CPU); writes mindone_judged.json

``layers``: for every written file how many layers of a tiny U-Net of MindOne's got factors, the largest difference of
``scaling * B @ A`` from sd-scripts' delta relative to the largest element, and the file's digest, so that tests can
tell whether lorabridge still writes what was judged. ``models_lora``: the same for the cell of
``mindone.models.lora``, whose output is compared. Networks are not run: MindSpore's CPU lacks kernels of theirs.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
from judge_diffusers import FOLDER, TINY, digest, written
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
FLAT = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"


def deltas(file: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return sd-scripts' delta of every module, as a matrix."""
    out = {}
    for name in {key.partition(".")[0] for key in file}:
        down, up = (file[f"{name}.lora_{x}.weight"].astype("f8") for x in ("down", "up"))
        scale = float(file[f"{name}.alpha"]) / down.shape[0] if f"{name}.alpha" in file else 1.0
        out[name] = scale * up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)
    return out


def loaded(path: Path) -> dict[str, np.ndarray]:
    """Load a file into MindOne's U-Net as a pipeline does; return what its LoRA layers add, by flattened name."""
    from mindone.diffusers import UNet2DConditionModel
    from mindone.diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin as Mixin
    from mindone.peft.tuners.lora import LoraLayer

    unet = UNet2DConditionModel(**TINY)
    options = {"weight_name": path.name, "return_lora_metadata": True}
    if path.suffix == ".ckpt":
        options["use_safetensors"] = False
    state, alphas, metadata = Mixin.lora_state_dict(str(path.parent), **options)
    Mixin.load_lora_into_unet(state, network_alphas=alphas, unet=unet, metadata=metadata)
    out = {}
    for name, cell in unet.cells_and_names():
        if isinstance(cell, LoraLayer):
            ((adapter, scaling),) = cell.scaling.items()
            a, b = (x[adapter].weight.asnumpy().astype("f8") for x in (cell.lora_A, cell.lora_B))
            made = scaling * b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)
            out["lora_unet_" + name.replace(".", "_")] = made
    return out


def dense() -> dict[str, object]:
    """Load a converted file into MindOne's LoRADenseLayer and compare what the two matrices compute."""
    import mindspore
    from mindone.models.lora import LoRADenseLayer

    from lorabridge import ConvertOptions, convert

    rng = np.random.default_rng(0)
    file = {
        f"{FLAT}.lora_down.weight": rng.standard_normal((4, 2048)).astype("f4") / 8,
        f"{FLAT}.lora_up.weight": rng.standard_normal((640, 4)).astype("f4") / 8,
        f"{FLAT}.alpha": np.array(2.0, "f4"),
    }
    with tempfile.TemporaryDirectory() as folder:
        save_file(file, Path(folder) / "in.safetensors")
        options = ConvertOptions(target_dialect="mindone-lora", family="sdxl")
        convert(Path(folder) / "in.safetensors", Path(folder) / "o.ckpt", options)
        given = mindspore.load_checkpoint(str(Path(folder) / "o.ckpt"))
    layer = LoRADenseLayer(2048, 640, has_bias=False, rank=4, scale=0.5)
    own = {f"{name.split('.to_k.')[1]}": value for name, value in given.items()}
    _, unused = mindspore.load_param_into_net(layer, own)
    x = rng.standard_normal((3, 2048)).astype("f4")
    before = layer.linear(mindspore.Tensor(x)).asnumpy()
    found = layer(mindspore.Tensor(x)).asnumpy() - before
    wanted = x @ deltas(file)[FLAT].T
    return {"unused": list(unused), "difference": float(np.abs(found - wanted).max() / np.abs(wanted).max())}


def main() -> None:
    """Write the verdicts."""
    import mindone
    import mindspore

    from lorabridge import ConvertOptions, convert
    from lorabridge.dialects.adapter import Fact, Facts

    layers: dict[str, dict[str, object]] = {}
    for source in ("mixed_float16", "uniform_float16"):
        file = FOLDER / f"kohya_{source}.safetensors"
        wanted = deltas(load_file(file))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            cases = {case: path for case, path in written(file, folder).items() if case != "kohya"}
            named = Facts((Fact("*", "names_of", str(folder / "base.safetensors")),))
            cases["ckpt"] = folder / "ckpt" / "pytorch_lora_weights.ckpt"
            cases["ckpt"].parent.mkdir()
            convert(file, cases["ckpt"], ConvertOptions(target_dialect="mindone", facts=named))
            for case, path in cases.items():
                found = loaded(path)
                assert set(found) == set(wanted), case
                worst = max(float(np.abs(found[n] - d).max() / np.abs(d).max()) for n, d in wanted.items())
                made = hashlib.sha256(path.read_bytes()).hexdigest() if case == "ckpt" else digest(path)
                layers[f"{source} {case}"] = {"layers": len(found), "difference": worst, "digest": made}
    versions = {"mindone": mindone.__version__, "mindspore": mindspore.__version__}
    verdict = {"versions": versions, "layers": layers, "models_lora": dense()}
    (HERE / "mindone_judged.json").write_text(json.dumps(verdict, indent=1) + "\n")
    print(json.dumps(verdict, indent=1))


if __name__ == "__main__":
    main()
