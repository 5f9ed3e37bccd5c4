"""PyTorch and MindSpore with their LoRA libraries: imported when needed, and made to compute as their bounds assume.

What is known of both in one process (MindSpore 2.10, torch 2.13): either may come first, thread pools do not
get into each other's way, results agree. MindSpore's wheels are built against numpy 1 and accept numpy 2; then the
first operator that takes a tuple fails once, and bfloat16 arrays never leave or enter a tensor. The one failure is
spent here, and callers widen bfloat16 before they hand it over.
"""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

from .errors import UsageError

INSTALL = {
    "torch": "lorabridge[torch]", "mindspore": "lorabridge[mindspore]", "peft": "lorabridge[verify]",
    "loralib": "lorabridge[verify]", "transformers": "lorabridge[verify]",
}  # fmt: skip
"""What to install for each library."""


def missing(*names: str) -> tuple[str, ...]:
    """Return those of the named libraries that are not installed, without importing any."""
    return tuple(name for name in names if not _installed(name))


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def refusal(*names: str) -> str:
    """Say which of the named libraries are not installed and how to install them; empty where all are."""
    gone = missing(*names)
    extras = dict.fromkeys(INSTALL[name] for name in gone)
    return f"{' and '.join(gone)} not installed; pip install {' '.join(map(repr, extras))}" if gone else ""


@functools.cache
def load(name: str) -> ModuleType:
    """Import a library and prepare it; UsageError where it is missing or cannot be imported."""
    why = refusal(name)
    if why:
        raise UsageError(f"{name} is needed", where=why)
    if name == "mindspore":
        os.environ.setdefault("GLOG_v", "3")  # errors only: its warnings are about things done here on purpose
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
    except Exception as error:
        raise UsageError(
            f"{name} is installed and cannot be imported",
            where=f"{type(error).__name__}: {error}"[:500],
            hint="`lorabridge env` lists versions that do not work together",
        ) from error
    if name == "mindspore":
        _spend_first_failure(module)
    return module


def _spend_first_failure(mindspore: ModuleType) -> None:
    """Run one operator for nothing: under numpy 2 the first that takes a tuple raises SystemError, the next work."""
    import numpy as np

    try:
        mindspore.Tensor(np.zeros((2, 3), np.float32)).T.asnumpy()
    except SystemError:
        mindspore.Tensor(np.zeros((2, 3), np.float32)).T.asnumpy()


@contextmanager
def prompt_collection() -> Iterator[Callable[[], object]]:
    """Yield a function that frees the models and parameters that are done with, and costs next to nothing.

    peft's models and MindSpore's parameters are reference cycles, which keep their weights until a garbage collection.
    What the loaded libraries consist of is set aside meanwhile, so that a collection does not go through it.
    """
    gc.collect()
    gc.freeze()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()


@contextmanager
def exact_arithmetic(*names: str) -> Iterator[None]:
    """Make the named frameworks compute float32 as float32 on the CPU, without gradients, and restore them after.

    torch: highest matmul precision (no TF32, no bfloat16 passes). MindSpore: PyNative mode on the CPU, so that no graph
    is compiled and no fused operator of a device takes part.
    """
    restore: list[Callable[[], object]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "torch" in names:
            torch = load("torch")
            before = torch.get_float32_matmul_precision(), torch.is_grad_enabled()
            torch.set_float32_matmul_precision("highest")
            torch.set_grad_enabled(False)
            restore += [
                lambda: torch.set_float32_matmul_precision(before[0]),
                lambda: torch.set_grad_enabled(before[1]),
            ]
        if "mindspore" in names:
            mindspore = load("mindspore")
            mode = mindspore.get_context("mode")
            mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
            if mindspore.get_context("device_target") != "CPU":
                mindspore.set_context(device_target="CPU")
            restore.append(lambda: mindspore.set_context(mode=mode))
        try:
            yield
        finally:
            for undo in restore:
                undo()
