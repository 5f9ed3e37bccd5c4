"""Sharded safetensors of PyTorch's distributed checkpoints: ``shard-<s>-model-<i>-of-<n>.safetensors``.

Format: torch 2.13, torch/distributed/checkpoint/hf_storage.py (``HuggingFaceStorageWriter(save_distributed=True)``).
Every rank writes files of its own, in which a tensor has its own name and the shape of the rank's part; the metadata
``DCP_SHARDING_INFO`` says at which element of the whole the part begins. Nothing says the whole's shape or the number
of files: it is as far as the parts reach, as torch's own reader takes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import InputError
from ..formats.untrusted import parse_json, shown
from .assembled import Arrangement, Assembled, Copy, Files, Placed
from .placing import Broken, Findings, Held, damaged, grouped, place_boxes, settle

INFO = "DCP_SHARDING_INFO"
_FILE = re.compile(r"shard-(\d{1,7})-model-(\d{1,7})-of-(\d{1,7})\.safetensors")
_HINT = "take the whole directory that HuggingFaceStorageWriter wrote, with the files of every rank"


def sharded_files(path: Path) -> dict[int, list[Path]]:
    """Return the files of every rank's shard, by the shard's number; none where the directory holds no such files."""
    found: dict[int, list[Path]] = {}
    for file in sorted(path.glob("shard-*.safetensors")):
        if match := _FILE.fullmatch(file.name):
            found.setdefault(int(match[1]), []).append(file)
    return found


def open_sharded(path: Path, *, findings: Findings | None = None) -> Assembled:
    """Open a directory of sharded safetensors as one checkpoint, reading headers only.

    InputError lists the tensors whose parts lap over or leave something out, and files that are missing or do not say
    where their parts belong.
    """
    files = sharded_files(path)
    named = {file.name: file for held in files.values() for file in held}
    pieces = Files(path, "safetensors", named, damaged=damaged(findings))
    try:
        problems = _absent(files)
        files = {number: [file for file in held if file.name in pieces.held] for number, held in files.items()}
        held = _parts(files, pieces, problems)
        placed: dict[str, Placed] = {}
        for name, boxes in held.items():
            shape = tuple(max(o[a] + n[a] for (o, n), _ in boxes) for a in range(len(boxes[0][0][0])))
            try:
                placed[name] = place_boxes(name, shape, boxes, pieces)
            except (ValueError, IndexError) as error:
                problems.append(f"{shown(name)}: {error}")
                if findings is not None:
                    dtype = pieces.specs[boxes[0][1].piece].dtype
                    findings.broken[name] = Broken(name, dtype, shape, grouped(boxes), str(error))
        if problems:
            settle(InputError("the shards do not make up the tensors", where=problems, hint=_HINT), findings)
        notes = (f"the files do not say how many ranks there were; {len(files)} are there",)
        return Assembled(path, pieces, Arrangement("torch DCP, safetensors", max(files), placed, notes))
    except BaseException:
        pieces.close()
        raise


def _absent(files: Mapping[int, list[Path]]) -> list[str]:
    """Say which numbered files of a shard are missing."""
    problems = []
    for held in files.values():
        matches = [match for file in held if (match := _FILE.fullmatch(file.name))]
        counts = {int(match[3]) for match in matches}
        if len(counts) > 1 or len(matches) != max(counts):
            problems.append(f"{shown(held[0].name)}: {len(matches)} of {max(counts)} files of its rank are there")
    return problems


def _parts(files: Mapping[int, list[Path]], pieces: Files, problems: list[str]) -> dict[str, list[Held]]:
    found: dict[str, list[Held]] = {}
    for rank, file in ((number - 1, file.name) for number, held in files.items() for file in held):
        try:
            info = parse_json(pieces.stated[file].get(INFO, "{}").encode())
        except ValueError as error:
            problems.append(f"{shown(file)}: {INFO} is not JSON: {error}")
            continue
        for name, spec in pieces.held[file].items():
            about = info.get(name) if isinstance(info, dict) else None
            offset = about.get("saved_offsets") if isinstance(about, dict) else None
            axes = len(spec.shape)
            if (
                not isinstance(offset, list)
                or len(offset) != axes
                or not all(type(n) is int and n >= 0 for n in offset)
            ):
                problems.append(f"{shown(file)}: {INFO} does not say where {shown(name)} begins")
                continue
            known = found.setdefault(name, [])
            if known and len(known[0][0][0]) != axes:
                problems.append(f"{shown(name)}: parts have {len(known[0][0][0])} and {axes} axes")
                continue
            known.append(((tuple(offset), spec.shape), Copy(rank, f"{file}/{name}")))
    return found
