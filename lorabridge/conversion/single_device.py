"""MindFormers' checkpoint of a run on one device: an iteration directory that has no metadata.json.

Layout of mindformers 2.1.0 (checkpoint/checkpoint.py, checkpoint/utils.py): ``latest_checkpointed_iteration.txt``
beside ``iteration_<8 digits>/[prefix-]model-0000000-0000001.safetensors``, the optimizer's ``[prefix-]opt-...`` and
common.json. Several devices write a metadata.json, which ``lorabridge.distributed`` reads.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..distributed.iterations import METADATA, iteration_directory
from ..errors import InputError
from ..formats.untrusted import shown

_MODEL = re.compile(r"(?:.+-)?model-(\d{7})-(\d{7})\.safetensors")


def model_file(path: Path, step: str | None = None) -> Path | None:
    """Return the weights of a run on one device, from its iteration directory or the directory of its iterations.

    None for anything else. ``step``: the number of another iteration than the latest. InputError where several devices
    wrote and the metadata that puts their pieces together is missing.
    """
    if not path.is_dir():
        return None
    folder = iteration_directory(path, step) or path
    if (folder / METADATA).is_file():
        return None
    found = {p: match for p in sorted(folder.glob("*.safetensors")) if (match := _MODEL.fullmatch(p.name))}
    if not found:
        return None
    if len(found) > 1 or any(int(match[2]) > 1 for match in found.values()):
        raise InputError(
            "several devices wrote this iteration, and its metadata.json is missing",
            where=shown(str(folder)),
            hint="take the whole iteration directory",
        )
    return next(iter(found))
