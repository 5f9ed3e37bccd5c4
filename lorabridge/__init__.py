"""Carry LoRA adapters and checkpoints between PyTorch and MindSpore: exactly, fast, and with proof.

    import lorabridge
    report = lorabridge.convert("adapter/", "out.ckpt", options=lorabridge.ConvertOptions(family="bert"))
    with lorabridge.open_checkpoint("out.ckpt") as checkpoint:
        print(checkpoint.specs)

The names are imported when first used; ``import lorabridge`` itself loads nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .actions.choices import ConvertOptions as ConvertOptions
    from .actions.convert import convert as convert
    from .actions.inspect import inspect as inspect
    from .checkpoint import Checkpoint as Checkpoint
    from .checkpoint import open_checkpoint as open_checkpoint
    from .errors import LorabridgeError as LorabridgeError

__version__ = "0.1.0"

_PUBLIC = {
    "Checkpoint": "checkpoint",
    "ConvertOptions": "actions.choices",
    "LorabridgeError": "errors",
    "convert": "actions.convert",
    "inspect": "actions.inspect",
    "open_checkpoint": "checkpoint",
}

__all__ = ["Checkpoint", "ConvertOptions", "LorabridgeError", "convert", "inspect", "open_checkpoint"]


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
