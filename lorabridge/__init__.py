"""Carry LoRA adapters and checkpoints between PyTorch and MindSpore: exactly, fast, and with proof."""

from __future__ import annotations

__version__ = "0.1.0"
