"""Layers for MindSpore: loralib's and MindPet's LoRA, and MindPet's other algorithms, with the names of their files."""

from __future__ import annotations

from .adapters import AdapterDense, AdapterLayer, LowRankAdapterDense, LowRankAdapterLayer
from .conv import Conv1d, Conv2d, Conv3d
from .embedding import Embedding
from .linear import Linear
from .merged import MergedLinear
from .mindpet import LoRADense
from .prefix import PrefixEncoder, PrefixLayer, PromptTuning
from .rdrop import RDropLoss, rdrop_repeat
from .state import merged_parameters

__all__ = [
    "AdapterDense", "AdapterLayer", "Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoRADense",
    "LowRankAdapterDense", "LowRankAdapterLayer", "MergedLinear", "PrefixEncoder", "PrefixLayer", "PromptTuning",
    "RDropLoss", "merged_parameters", "rdrop_repeat",
]  # fmt: skip
