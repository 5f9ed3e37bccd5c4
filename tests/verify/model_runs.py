"""Running depth model on small models, and checkpoints with faults in them."""

from __future__ import annotations

from pathlib import Path

import mindspore
from small import SMALL, converted, save

from lorabridge.actions.verify import verify
from lorabridge.actions.verify_inputs import VerifyOptions
from lorabridge.actions.verify_report import DepthResult, VerifyReport
from lorabridge.dialects.adapter import Fact, Facts


def saved(name: str, work: Path) -> Path:
    """Return a folder with ``base``, ``adapter`` and ``out.ckpt`` of a small model, made once."""
    folder = work / name
    if not folder.exists():
        folder.mkdir()
        save(SMALL[name], folder)
        converted(SMALL[name], folder)
    return folder


def depth(report: VerifyReport) -> DepthResult:
    found = report.depth("model")
    assert found is not None
    return found


def run(source: Path, target: Path, base: Path | None = None, **more: object) -> VerifyReport:
    options = VerifyOptions(base=base, depths=("model",), **more)  # type: ignore[arg-type]
    return verify(source, target, options)


def rewritten(checkpoint: Path, target: Path, names: dict[str, str] | None = None, drop: str = "?") -> Path:
    """Write a .ckpt again with other names, or without those that begin with ``drop``; its sidecar goes along."""
    names = names or {}
    state = mindspore.load_checkpoint(str(checkpoint))
    kept = [{"name": swapped(name, names), "data": value} for name, value in state.items() if not name.startswith(drop)]
    mindspore.save_checkpoint(kept, str(target))
    return target


def swapped(name: str, names: dict[str, str]) -> str:
    for one, other in [*names.items(), *((other, one) for one, other in names.items())]:
        if one in name:
            return name.replace(one, other)
    return name


def said(**facts: object) -> Facts:
    return Facts(tuple(Fact("*", key, value) for key, value in facts.items()))  # type: ignore[arg-type]
