"""The adapter dialects, in the order in which they are tried.

A caller of :func:`detect` and of ``Dialect.parse`` puts the container's registry name into ``Content.metadata`` under
the key "container": loralib and loralib-ms have the same names and differ only in the framework that wrote the file.
"""

from __future__ import annotations

from dataclasses import replace

from ..errors import UsageError
from .adapter import Content, Dialect
from .adapterhub import AdapterHub
from .bottlenecks import Bottlenecks
from .diffusers import MINDONE, Diffusers
from .gguf import Gguf
from .kohya import Kohya
from .loralib import Loralib
from .loralib_ms import LoralibMs
from .megatron import Megatron
from .mindformers import Mcore, Pynative
from .mindnlp import Mindnlp
from .mindone import GM, LAYERS
from .mindone_peft import MindonePeft
from .mindpet import TK, Mindpet
from .mindpet_adapters import MindpetAdapters
from .mlx import Mlx
from .msbnb import Msbnb
from .originals import BFL, COMFYUI, XLABS_FLUX
from .peft import Peft
from .prompts import MindpetPrompts, PeftPrompts
from .slora import Slora
from .torchtune import Torchtune
from .vllm import Vllm

DIALECTS: tuple[Dialect, ...] = (
    Peft(), Loralib(), LoralibMs(), Mindpet(), TK, Mcore(), Pynative(), Slora(), Mindnlp(), Mindnlp("mindnlp-0.2"),
    Kohya(), COMFYUI, BFL, XLABS_FLUX, Diffusers(), MINDONE, LAYERS, GM, Vllm(), Vllm("vllm-mindspore"), Mlx(), Msbnb(),
    MindonePeft(),
    Torchtune(), Gguf(), AdapterHub(), Megatron(), Bottlenecks(), MindpetAdapters(), PeftPrompts(), MindpetPrompts(),
)  # fmt: skip

PIPELINES = frozenset({"diffusers", "mindone"})
"""Dialects of whole pipelines: names are peft's behind a component, and alpha may go into B or into metadata."""

SURE = PIPELINES | {"mindone-gm", "mindone-peft", "comfy", "bfl", "xlabs"}
"""Dialects that share their factors' last names with others and claim a file by the paths before them."""

CONFIGURED = frozenset({
    "peft", "mindone-peft", "mindnlp", "mindnlp-0.2", "vllm", "vllm-mindspore", "mlx", "torchtune", "adapterhub",
    "adapterhub-bottleneck", "peft-prompt",
})  # fmt: skip
"""Dialects whose files mean nothing without the adapter_config.json that lies beside them in a directory."""

NAMES = {
    "mindnlp": "hf",
    "mindnlp-0.2": "hf",
    "msbnb": "hf",
    "torchtune": "torchtune",
    "gguf": "gguf",
    "megatron": "megatron",
}
"""Whose module names a dialect has, where its framework does not say: transformers', or a project of PyTorch's."""


def naming(dialect: Dialect) -> str:
    """Return whose module names a dialect has: "hf" for transformers', "ms" for a MindSpore project's, or a project."""
    return NAMES.get(dialect.name, "hf" if dialect.framework == "torch" else "ms")


def project_of(family: str) -> str:
    """Return the project to whose names a family's table leads from transformers'; "" where that is MindSpore's."""
    return next((one for one in sorted(set(NAMES.values()) - {"hf"}) if family.endswith(f"_{one}")), "")


def by_name(name: str) -> Dialect:
    """Return a dialect; UsageError for a name that is none."""
    for dialect in DIALECTS:
        if dialect.name == name:
            return dialect
    known = ", ".join(dialect.name for dialect in DIALECTS)
    raise UsageError(f"unknown dialect {name!r}", hint=f"known dialects: {known}")


def detect(content: Content) -> list[tuple[str, str]]:
    """Return (dialect name, what gives it away) for every dialect that claims a file.

    Tensor names outrank the config: an adapter_config.json may travel with, or lie beside, a file of any dialect.
    """
    by_names = _claims(replace(content, config=None))
    return [claim for claim in by_names if claim[0] in SURE] or by_names or _claims(content)


def _claims(content: Content) -> list[tuple[str, str]]:
    found = ((dialect.name, dialect.detect(content)) for dialect in DIALECTS)
    return [(name, why) for name, why in found if why is not None]
