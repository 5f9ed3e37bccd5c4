"""Which parameters train, and saving only those: the utilities of loralib 0.1.2 and MindPet 1.0.4 for any cell."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from ..errors import MappingError
from .binding import FLOATS, Cell, Parameter
from .saving import TrainableParamsCheckPoint
from .state import Merging

__all__ = ["TrainableParamsCheckPoint", "freeze_delta", "is_lora", "lora_state_dict", "mark_only_lora_as_trainable"]

Bias = Literal["none", "all", "lora_only"]

BIASES = ("none", "all", "lora_only")
MODES = ("lora", "prefixtuning", "adapter", "low_rank_adapter", "bitfit", "ptuning2", "prompttuning")
SPELLINGS = {"prefix": "prefixtuning", "prompt": "prompttuning", "prompt_tuning": "prompttuning"}
"""What MindPet's guide calls modes that its code calls otherwise."""
_LORA = re.compile(r"(^|[._])lora_")


def is_lora(name: str) -> bool:
    """Say whether a parameter belongs to a LoRA adapter: one part of its name begins with ``lora_`` or has ``_lora_``.

    True for ``P.lora_A``, ``P.lora_bias``, ``P.in_proj_lora_A``, ``P.mindpet_delta_lora_a``. loralib takes ``lora_``
    anywhere, so that a layer called ``flora_norm`` would train.
    """
    return _LORA.search(name) is not None


def mark_only_lora_as_trainable(net: Cell, bias: Bias = "none") -> None:
    """Freeze everything but the adapters: loralib 0.1.2's function of this name.

    ``bias``: "none"; "all" biases train as well, those of norms (``beta``) included, as torch's names include them;
    "lora_only" those of the LoRA layers, r = 0 included (loralib trains their biases and does not save them). Unlike
    loralib it also unfreezes what must train, so that what an earlier call left does not matter. Raises ValueError for
    another ``bias``, MappingError for a network without adapters.
    """
    chosen = _adapter(net, bias)
    for parameter in _parameters(net).values():
        parameter.requires_grad = parameter.name in chosen


def lora_state_dict(net: Cell, bias: Bias = "none") -> dict[str, Parameter]:
    """Return the adapter's parameters by name: loralib 0.1.2's function of this name.

    ``mindspore.save_checkpoint`` takes the result. ``bias`` and errors as in :func:`mark_only_lora_as_trainable`. The
    parameters are the network's own, not copies; merged layers give their original biases and factors.
    """
    chosen = _adapter(net, bias)
    return {name: parameter for name, parameter in _parameters(net).items() if name in chosen}


def freeze_delta(
    net: Cell, mode: str | Sequence[str], include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> None:
    """Freeze everything but the parameters of fine-tuning algorithms: MindPet 1.0.4's function of this name.

    ``mode``: lora, prefixtuning (or prefix), adapter, low_rank_adapter, bitfit, ptuning2 or prompttuning (or prompt),
    in any case; several together add up.
    ``include``: patterns (``*`` any text, ``?``, ``[...]``) of parameter names to freeze beyond that; ``exclude``: of
    names to train. A name that fits both lists stays as the mode has it, as MindPet documents. Parameters of integers
    never train.

    Where MindPet differs: it freezes everything for a mode in capitals, leaves what was frozen before frozen,
    compares patterns with attribute paths instead of names, and freezes everything without a word when nothing fits.
    Raises TypeError and ValueError for arguments of another kind, MappingError for a mode or pattern that fits nothing.
    """
    modes = [mode] if isinstance(mode, str) else list(mode)
    names = _parameters(net)
    chosen: set[str] = set()
    unfit = []
    for given in modes:
        found = _of_mode(given, names)
        if not found:
            unfit.append(f"mode {given!r}")
        chosen |= found
    frozen, trained = (_matching(label, patterns, names, unfit) for label, patterns in
                       (("include", include), ("exclude", exclude)))  # fmt: skip
    if unfit:
        raise MappingError(
            "no parameter fits",
            where=unfit,
            hint=f"the network's parameters are called {', '.join(list(names)[:3])} ...",
        )
    chosen = (chosen | (trained - frozen)) - (frozen - trained)
    for name, parameter in names.items():
        parameter.requires_grad = name in chosen and parameter.dtype in FLOATS


def _of_mode(mode: object, names: dict[str, Parameter]) -> set[str]:
    if not isinstance(mode, str):
        raise TypeError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    kind = mode.lower().replace("-", "_").replace(" ", "_")
    kind = SPELLINGS.get(kind, kind)
    if kind not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    if kind == "lora":
        return {name for name in names if is_lora(name)}
    if kind == "bitfit":
        return {name for name in names if name.endswith("bias")}
    return {name for name in names if f"mindpet_delta_{kind}" in name}


def _matching(
    label: str, patterns: Sequence[str] | None, names: dict[str, Parameter], unfit: list[str]
) -> set[str]:  # fmt: skip
    if patterns is None:
        return set()
    if isinstance(patterns, str) or not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{label} must be a list of patterns that is not empty, not {patterns!r}")
    found: set[str] = set()
    for pattern in patterns:
        fit = {name for name in names if fnmatchcase(name, pattern)}
        if not fit:
            unfit.append(f"{label} pattern {pattern!r}")
        found |= fit
    return found


def _parameters(net: Cell) -> dict[str, Parameter]:
    """Return the parameters by the names that a checkpoint gives them, shared ones once."""
    return {parameter.name: parameter for _, parameter in net.parameters_and_names()}


def _adapter(net: Cell, bias: Bias) -> set[str]:
    if bias not in BIASES:
        raise ValueError(f"bias must be one of {', '.join(BIASES)}, not {bias!r}")
    chosen = {name for name in _parameters(net) if is_lora(name)}
    if not chosen:
        raise MappingError(
            "the network has no LoRA parameters", where=type(net).__name__, hint="add them with replace_layers"
        )
    if bias == "all":
        chosen |= set(_biases(net))
    if bias == "lora_only":
        chosen |= {cell._params["bias"].name for cell in _adapted(net) if cell._params.get("bias") is not None}
    return chosen


def _biases(net: Cell) -> Iterator[str]:
    for _, cell in net.cells_and_names():
        for attribute, parameter in cell._params.items():
            if parameter is not None and (
                "bias" in parameter.name or (attribute == "beta" and "gamma" in cell._params)
            ):
                yield parameter.name


def _adapted(net: Cell) -> Iterator[Cell]:
    for _, cell in net.cells_and_names():
        if isinstance(cell, Merging) or any(is_lora(attribute) for attribute in cell._params):
            yield cell
