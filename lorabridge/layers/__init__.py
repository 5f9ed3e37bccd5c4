"""LoRA layers for MindSpore: loralib's and MindPet's, with the names of the loralib-ms and mindpet dialects."""

from __future__ import annotations

from .conv import Conv1d, Conv2d, Conv3d
from .embedding import Embedding
from .linear import Linear
from .merged import MergedLinear
from .mindpet import LoRADense
from .state import merged_parameters

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoRADense", "MergedLinear", "merged_parameters"]
