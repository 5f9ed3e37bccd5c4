"""DeepSpeed's universal checkpoints: a directory per parameter, ``zero/<name>/fp32.pt``, which ds_to_universal writes.

Format: deepspeed 0.19.8 (checkpoint/ds_to_universal.py). Each file is a ``torch.save`` of ``{"param": tensor, ...}``
with the whole parameter, frozen ones included; ``exp_avg.pt``, ``exp_avg_sq.pt`` and ``step.pt`` beside it are the
optimizer's. Buffers are in the model states only.
"""

from __future__ import annotations

from pathlib import Path

from ..axes import read
from ..errors import InputError
from ..formats.torchvalues import Tensor, kind
from ..formats.torchzip import TorchSource, open_tree
from ..formats.untrusted import read_word, shown
from .assembled import Arrangement, Assembled, Copy, Files, Placed
from .partitions import OBJECTS, fields

_FOLDER, _FILE = "zero", "fp32.pt"
_HINT = "take the whole directory that ds_to_universal wrote"


def universal_directory(path: Path, step: str | None = None) -> Path | None:
    """Return the universal checkpoint that ``path`` is, or that ``latest_universal`` (or ``step``) names in it."""
    if _is_universal(path):
        return path
    latest = path / "latest_universal"
    tag = step or (read_word(latest) if latest.is_file() else "")
    inside = path / tag
    return inside if tag and "/" not in tag and tag not in (".", "..") and _is_universal(inside) else None


def _is_universal(path: Path) -> bool:
    return any((path / _FOLDER).glob(f"*/{_FILE}"))


def open_universal(path: Path) -> Assembled:
    """Open a universal checkpoint as one, reading the archives' pickles only.

    The fp32 parameters under the module's names. InputError for a file that holds no parameter.
    """
    files = {file.parent.name: file for file in sorted((path / _FOLDER).glob(f"*/{_FILE}"))}
    pieces = Files(path, "torch", files, _open)
    try:
        placed = {
            name: Placed(name, read(pieces.specs[f"{name}/param"]), {(0,): (Copy(0, f"{name}/param"),)})
            for name in files
        }
        left = (("optimizer and model states", "training state and buffers"),)
        return Assembled(path, pieces, Arrangement("deepspeed universal", 1, placed, skipped=left))
    except BaseException:
        pieces.close()
        raise


def _open(path: Path) -> TorchSource:
    tree = open_tree(path, objects=OBJECTS)
    value = fields(tree.root).get("param")
    if not isinstance(value, Tensor):
        tree.archive.file.close()
        raise InputError(f"{kind(value)} stands where a parameter is expected", where=shown(str(path)), hint=_HINT)
    return tree.source({"param": value})
