"""Let vLLM judge: its PEFTHelper and LoRAModel load what is written for it, with peft's deltas.

    python judge_vllm.py      writes vllm_judged.json

Judged with vllm 0.33.0 (the released wheel's Python sources on the CPU; of its dependencies those that LoRA does not
use are stubbed below, and its compiled kernels are absent), torch 2.13.0, transformers 5.23. The adapters are those of
``llama_cpp_files``, which peft saved (ranks by pattern, an embedding, a head), and variants of their configs. For each:
the largest difference between ``lora_b @ lora_a`` after vLLM's own ``optimize`` and ``scaling * B @ A`` as peft
defines it, relative to the largest element, and a digest of the directory. ``peft``: a directory as peft
writes it, with ranks and alphas by pattern and a trained head. ``refused``: what vLLM says of others.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES: dict[str, tuple[str, str, dict[str, object]]] = {
    "ranks": ("llama", "vllm", {}),
    "rslora": ("llama", "vllm", {"use_rslora": True}),
    "alphas": ("llama", "vllm", {"alpha_pattern": {"q_proj": 5, "up_proj": 24}}),
    "mindspore": ("qwen2", "vllm-mindspore", {"alpha_pattern": {"v_proj": 3}}),
}
REFUSED: dict[str, dict[str, object]] = {
    "dora": {"use_dora": True}, "saved": {"modules_to_save": ["lm_head"]}, "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all"}, "pissa": {"init_lora_weights": "pissa"}, "replicated": {"layer_replication": [[0, 2]]},
}  # fmt: skip


class Absent:
    """Find packages that serve HTTP, sample, or trace, and stand in for them."""

    names = (
        "opentelemetry", "fastapi", "starlette", "xgrammar", "mcp", "mistral_common", "prometheus_client", "uvloop",
        "prometheus_fastapi_instrumentator", "anthropic", "partial_json_parser", "lark", "llguidance", "watchfiles",
        "outlines_core", "model_hosting_container_standards", "lmformatenforcer", "zmq", "cv2", "torchaudio",
        "soundfile", "diskcache",
    )  # fmt: skip

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """Claim the packages."""
        known = name.partition(".")[0] in self.names
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> MagicMock:
        """Return anything."""
        made = MagicMock(name=spec.name)
        made.__spec__, made.__path__, made.__name__ = spec, [], spec.name
        return made

    def exec_module(self, module: object) -> None:
        """Run nothing."""


def source(case: str, folder: Path) -> Path:
    """Return an adapter that peft saved, its config changed as the case says."""
    kind, _, more = CASES[case]
    shutil.copytree(HERE / "llama_cpp_files" / kind / "peft", folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | more), "utf-8")
    return folder


def written(case: str, folder: Path) -> Path:
    """Convert the adapter for the server."""
    from lorabridge import ConvertOptions, convert

    convert(source(case, folder / f"{case}_peft"), folder / case, ConvertOptions(target_dialect=CASES[case][1]))
    return folder / case


def digest(folder: Path) -> str:
    """Return a digest of the tensors and of the fields that vLLM reads."""
    made = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "adapter_model.safetensors").items()):
        made.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + tensor.numpy().tobytes())
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    read = ("r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_rslora", "use_dora", "lora_bias",
            "init_lora_weights", "rank_pattern", "alpha_pattern", "layer_replication")  # fmt: skip
    made.update(json.dumps({name: config.get(name) for name in read}, sort_keys=True).encode())
    return made.hexdigest()


def expected(folder: Path) -> dict[str, torch.Tensor]:
    """Compute every module's delta from a directory of peft as peft defines it."""
    config, tensors = json.loads((folder / "adapter_config.json").read_text("utf-8")), {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        path, _, which = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        tensors.setdefault(path, {})[which[-1]] = tensor.double()
    out = {}
    for path, pair in tensors.items():
        last = path.rpartition(".")[2]
        rank = config["rank_pattern"].get(last, config["r"])
        alpha = config["alpha_pattern"].get(last, config["lora_alpha"])
        assert pair["A"].shape[0] == rank
        out[path] = alpha / (math.sqrt(rank) if config["use_rslora"] else rank) * pair["B"] @ pair["A"]
    return out


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """Let vLLM read the directory as its worker does: the config, its check, the tensors, the scaling."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=None)
    helper.validate_legal(LoRAConfig(max_lora_rank=8, max_loras=1))
    names = {*SEVEN, "embed_tokens", "lm_head"}
    model = LoRAModel.from_local_checkpoint(
        str(folder), names, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    return {path: lora.optimize().lora_b.double() @ lora.lora_a.double() for path, lora in model.loras.items()}


def with_head(folder: Path) -> tuple[Path, torch.Tensor]:
    """Return peft's own directory with patterns and a trained head ``score``, and that head."""
    head = torch.arange(48.0).reshape(3, 16)
    tensors = load_file(source("alphas", folder) / "adapter_model.safetensors")
    save_file({**tensors, "base_model.model.score.weight": head}, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text("utf-8")) | {"modules_to_save": ["score"]}
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return folder, head


def loaded_head(folder: Path) -> torch.Tensor:
    """Let vLLM read the directory; returns the whole module that it found."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_local_dir(str(folder), max_position_embeddings=None)
    model = LoRAModel.from_lora_tensors(1, load_file(folder / "adapter_model.safetensors"), helper, device="cpu")
    return model.modules_to_save["score"].weight


def said(more: dict[str, object], folder: Path) -> str:
    """Return what vLLM says of a config."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.peft_helper import PEFTHelper

    config = json.loads((source("ranks", folder) / "adapter_config.json").read_text("utf-8")) | more
    try:
        PEFTHelper.from_dict(config).validate_legal(LoRAConfig(max_lora_rank=8, max_loras=1))
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    """Judge and write."""
    judged: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            folder = written(case, Path(scratch))
            found, wanted = loaded(folder), expected(Path(scratch) / f"{case}_peft")
            assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
            worst = max(float((found[path] - wanted[path]).abs().max() / wanted[path].abs().max()) for path in wanted)
            judged[case] = {"difference": worst, "modules": len(found), "digest": digest(folder)}
            print(case, judged[case])
        folder, head = with_head(Path(scratch) / "head")
        found, wanted = loaded(folder), expected(Path(scratch) / "alphas_peft")
        worst = max(float((found[path] - wanted[path]).abs().max() / wanted[path].abs().max()) for path in wanted)
        judged["peft"] = {"difference": worst, "head": torch.equal(loaded_head(folder), head)}
        print(judged["peft"])
        judged["refused"] = {name: said(more, Path(scratch) / name) for name, more in REFUSED.items()}
        print(judged["refused"])
    (HERE / "vllm_judged.json").write_text(json.dumps(judged, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    sys.meta_path.insert(0, Absent())  # type: ignore[arg-type]
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()  # the wheel for CUDA does not look for CPUs
    main()
