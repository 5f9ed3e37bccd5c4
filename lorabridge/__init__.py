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
    from .actions.combine import CombineOptions as CombineOptions
    from .actions.combine import combine as combine
    from .actions.convert import convert as convert
    from .actions.diff import DiffOptions as DiffOptions
    from .actions.diff import diff as diff
    from .actions.extract import ExtractOptions as ExtractOptions
    from .actions.extract import extract as extract
    from .actions.inspect import inspect as inspect
    from .actions.merge import merge as merge
    from .actions.merge_inputs import MergeOptions as MergeOptions
    from .actions.recover import RecoverOptions as RecoverOptions
    from .actions.recover import recover as recover
    from .actions.resize import resize as resize
    from .actions.switch import switch as switch
    from .actions.unmerge import unmerge as unmerge
    from .actions.verify import verify as verify
    from .actions.verify_inputs import VerifyOptions as VerifyOptions
    from .checkpoint import Checkpoint as Checkpoint
    from .checkpoint import open_checkpoint as open_checkpoint
    from .dialects.adapter import Fact as Fact
    from .dialects.adapter import Facts as Facts
    from .errors import LorabridgeError as LorabridgeError

__version__ = "0.1.0"

_PUBLIC = {
    "Checkpoint": "checkpoint",
    "CombineOptions": "actions.combine",
    "ConvertOptions": "actions.choices",
    "DiffOptions": "actions.diff",
    "ExtractOptions": "actions.extract",
    "Fact": "dialects.adapter",
    "Facts": "dialects.adapter",
    "LorabridgeError": "errors",
    "MergeOptions": "actions.merge_inputs",
    "RecoverOptions": "actions.recover",
    "VerifyOptions": "actions.verify_inputs",
    "combine": "actions.combine",
    "convert": "actions.convert",
    "diff": "actions.diff",
    "extract": "actions.extract",
    "inspect": "actions.inspect",
    "merge": "actions.merge",
    "open_checkpoint": "checkpoint",
    "recover": "actions.recover",
    "resize": "actions.resize",
    "switch": "actions.switch",
    "unmerge": "actions.unmerge",
    "verify": "actions.verify",
}

__all__ = [
    "Checkpoint",
    "CombineOptions",
    "ConvertOptions",
    "DiffOptions",
    "ExtractOptions",
    "Fact",
    "Facts",
    "LorabridgeError",
    "MergeOptions",
    "RecoverOptions",
    "VerifyOptions",
    "combine",
    "convert",
    "diff",
    "extract",
    "inspect",
    "merge",
    "open_checkpoint",
    "recover",
    "resize",
    "switch",
    "unmerge",
    "verify",
]


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
