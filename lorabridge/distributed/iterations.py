"""MindFormers' iteration directories: ``iteration_<n>/metadata.json`` with the safetensors files of every rank.

Format: mindformers 2.1.0 ("Checkpoint 2.0", checkpoint/metadata.py and sharded_tensor.py). ``state_dict_metadata``
holds each tensor's global shape and into how many pieces each axis is cut (``axis_fragmentations``; optimizer
parallelism is folded in); ``storage_data`` maps ``str((name, (k,)))`` to the files that hold piece k. Despite its name,
the number beside a tensor's name is no element offset: it counts the pieces in row-major order. A directory that holds
iterations says in ``latest_checkpointed_iteration.txt`` which was the last.
"""

from __future__ import annotations

import ast
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import InputError, counted
from ..formats.untrusted import MAX_HEADER, parse_json, read_small, read_word, shown
from .assembled import Arrangement, Assembled, Copy, Files, Placed
from .grid import Box
from .layout import Layout, assemble
from .placing import Broken, Findings, damaged, grouped, settle, unfit_files

METADATA = "metadata.json"
LATEST = "latest_checkpointed_iteration.txt"
_KEYS = ("state_dict_metadata", "storage_data")
_PLAIN = re.compile(r"[^/\\\0]{1,255}")
_HINT = "take a complete iteration directory, with the files of every rank"
MAX_PIECES = 1 << 20
"""Pieces of one tensor."""
_Stored = dict[int, list[tuple[str, int]]]


def iteration_directory(path: Path, step: str | None = None) -> Path | None:
    """Return the iteration directory that ``path`` is, or the one that it names as its latest; None for neither.

    ``step``: the number of another iteration of ``path``.
    """
    if (path / METADATA).is_file():
        return path if _holds_tensors(path / METADATA) else None
    latest = path / LATEST
    if any(path.glob("iter_*")) and not any(path.glob("iteration_*")):
        return None  # Megatron's, which has a file of the same name
    if step is None and latest.is_file():
        step = read_word(latest)
    elif not any(p.name.startswith("iteration_") for p in path.glob("iteration_*")):
        return None
    numbered = {int(p.name.removeprefix("iteration_")): p for p in path.glob("iteration_*") if _is_iteration(p)}
    if step is None or not step.isdigit() or int(step) not in numbered:
        raise InputError(
            f"there is no iteration {shown(step)}" if step else f"{LATEST} is missing",
            where=shown(str(path)),
            hint=f"choose one with --step: {', '.join(map(str, sorted(numbered))) or 'none is there'}",
        )
    return numbered[int(step)]


def _is_iteration(path: Path) -> bool:
    return path.is_dir() and path.name.removeprefix("iteration_").isdigit()


def _holds_tensors(path: Path) -> bool:
    """Tell MindFormers' metadata from other projects' files of that name."""
    root = _read_json(path)
    return isinstance(root, dict) and all(isinstance(root.get(key), dict) for key in _KEYS)


def _read_json(path: Path) -> object:
    data, size = read_small(path, MAX_HEADER)
    if size > MAX_HEADER:
        raise InputError(f"it has {size} bytes, more than {MAX_HEADER}", where=shown(str(path)), hint=_HINT)
    try:
        return parse_json(data)
    except ValueError as error:
        raise InputError(f"the metadata is not JSON: {error}", where=shown(str(path)), hint=_HINT) from None


def open_iteration(path: Path, *, findings: Findings | None = None) -> Assembled:
    """Open an iteration directory as one checkpoint, reading headers only.

    InputError lists every tensor of which a piece is missing, misshapen or described in a way that cannot be.
    """
    root = _read_json(path / METADATA)
    try:
        described, stored = _parts(root)
    except ValueError as error:
        raise InputError(f"the metadata is malformed: {error}", where=shown(str(path / METADATA)), hint=_HINT) from None
    names = sorted({file for pieces in stored.values() for held in pieces.values() for file, _ in held})
    absent = unfit_files(path, names)
    if absent:
        where = [f"{shown(str(path / name))}: {why}" for name, why in absent.items()]
        said = f"{counted(len(absent), 'file')} of the iteration cannot be read"
        settle(InputError(said, where=where, hint=_HINT), findings)
    there = {name: path / name for name in names if name not in absent}
    pieces = Files(path, "safetensors", there, damaged=damaged(findings))
    try:
        placed, problems = {}, []
        for name, about in described.items():
            try:
                placed[name] = _place(name, about, stored.get(name, {}), pieces)
            except ValueError as error:
                problems.append(f"{shown(name)}: {error}")
                if findings is not None:
                    findings.broken[name] = _broken(name, about, stored.get(name, {}), pieces, str(error))
        listed = {f"{file}/{name}" for name, held in stored.items() for files in held.values() for file, _ in files}
        problems += [f"{shown(piece)}: not in the metadata" for piece in pieces.specs if piece not in listed]
        if problems:
            settle(InputError("the metadata and the files disagree", where=problems, hint=_HINT), findings)
        ranks = 1 + max((copy.rank for p in placed.values() for held in p.slices.values() for copy in held), default=0)
        stated = next(iter(pieces.stated.values()), {})
        return Assembled(path, pieces, Arrangement("mindformers iteration", ranks, placed, metadata=stated))
    except BaseException:
        pieces.close()
        raise


def _parts(root: object) -> tuple[Mapping[str, Mapping[str, object]], Mapping[str, _Stored]]:
    """Check the metadata's types; returns what describes each tensor, and (file, rank) per piece of each."""
    described, storage = (root.get(key) for key in _KEYS) if isinstance(root, dict) else (None, None)
    if not isinstance(described, dict) or not isinstance(storage, dict):
        raise ValueError(f"it has no objects {' and '.join(_KEYS)}")
    if not all(isinstance(about, dict) for about in described.values()):
        raise ValueError("a tensor's description is no object")
    stored: dict[str, _Stored] = {}
    for key, held in storage.items():
        name, index = _key(key)
        rows = held if isinstance(held, list) else []
        files = [(row.get("file_name"), row.get("storage_rank", 0)) for row in rows if isinstance(row, dict)]
        good = [(f, r) for f, r in files if isinstance(f, str) and type(r) is int and r >= 0 and _PLAIN.fullmatch(f)]
        if not good or len(good) < len(rows) or any(f in (".", "..") for f, _ in good):
            raise ValueError(f"{shown(key)} names no plain file beside it")
        if name not in described:
            raise ValueError(f"{shown(key)} is a piece of a tensor that is not described")
        stored.setdefault(name, {}).setdefault(index, []).extend(good)
    return described, stored


def _key(text: str) -> tuple[str, int]:
    """Read ``str((name, (k,)))``."""
    try:
        value = ast.literal_eval(text) if len(text) < 8192 else None
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    match value:
        case (str() as name, (int() as index,)) if index >= 0:
            return name, index
    raise ValueError(f"{shown(text)} is no (name, (number,))")


def _place(name: str, about: Mapping[str, object], stored: _Stored, pieces: Files) -> Placed:
    shape, fractions = _sizes(about.get("global_shape")), _sizes(about.get("axis_fragmentations"))
    fractions = fractions or (1,) * len(shape)
    if len(shape) != len(fractions) or any(n < 1 or size % n for size, n in zip(shape, fractions, strict=True)):
        raise ValueError(f"shape {list(shape)} does not divide into {list(fractions)} pieces")
    _count(fractions)
    local = tuple(size // n for size, n in zip(shape, fractions, strict=True))
    slices: dict[tuple[int, ...], tuple[Copy, ...]] = {}
    for number, index in enumerate(itertools.product(*map(range, fractions))):
        held = stored.get(number, [])
        missing = [file for file, _ in held if name not in pieces.held.get(file, {})]
        if not held or missing:
            raise ValueError(f"piece {number} is in no file" if not held else f"not in {shown(missing[0])}")
        for file, _ in held:
            if pieces.held[file][name].shape != local:
                raise ValueError(f"{shown(file)} holds shape {pieces.held[file][name].shape} where {local} is needed")
        slices[index] = tuple(Copy(rank, f"{file}/{name}") for file, rank in held)
    beyond = sorted(number for number in stored if number >= len(slices))
    if beyond:
        raise ValueError(f"piece {beyond[0]} of {len(slices)}")
    reads = {index: pieces.piece(copies[0].piece.removesuffix(f"/{name}"), name) for index, copies in slices.items()}
    if len({expr.dtype for expr in reads.values()}) > 1:
        raise ValueError("its pieces have different element types")
    boxes = {index: _box(index, local) for index in slices}
    return Placed(name, assemble(reads, fractions), slices, _layout(about.get("layout"), shape), boxes=boxes)


def _box(index: Sequence[int], local: Sequence[int]) -> Box:
    return tuple(i * n for i, n in zip(index, local, strict=True)), tuple(local)


def _broken(name: str, about: Mapping[str, object], stored: _Stored, pieces: Files, problem: str) -> Broken:
    """Describe a tensor of which pieces are missing or odd."""
    held: list[tuple[Box, Copy]] = []
    missing: dict[Box, tuple[int, ...]] = {}
    try:
        shape, fractions = _sizes(about.get("global_shape")), _sizes(about.get("axis_fragmentations"))
        _count(fractions)
        local = tuple(size // n for size, n in zip(shape, fractions, strict=True))
    except (ValueError, ZeroDivisionError):
        return Broken(name, None, None, {}, problem)
    for number, index in enumerate(itertools.product(*map(range, fractions))):
        box = _box(index, local)
        there = [(file, rank) for file, rank in stored.get(number, []) if name in pieces.held.get(file, {})]
        held += [(box, Copy(rank, f"{file}/{name}")) for file, rank in there]
        if not there:
            missing[box] = tuple(rank for _, rank in stored.get(number, []))
    dtype = pieces.specs[held[0][1].piece].dtype if held else None
    return Broken(name, dtype, shape, grouped(held), problem, missing)


def _count(fractions: Sequence[int]) -> None:
    """Refuse more pieces than checkpoints have."""
    if math.prod(fractions) > MAX_PIECES:
        raise ValueError(f"it is said to be cut into {math.prod(fractions)} pieces")


def _sizes(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 32 or any(type(n) is not int or n < 0 for n in value):
        raise ValueError("a shape is no list of sizes")
    return tuple(value)


def _layout(value: object, shape: Sequence[int]) -> Layout | None:
    """Read the device layout, which is for show: the pieces' indices alone decide."""
    match value:
        case {"device_matrix": list() as grid, "tensor_map": list() as axes} if len(axes) == len(shape):
            lists = [axis if isinstance(axis, list) else [axis] for axis in axes]
            if all(type(n) is int for n in itertools.chain(grid, *lists)):
                cuts = tuple(tuple(len(grid) - 1 - n for n in held if n != -1) for held in lists)
                found = Layout(tuple(grid), cuts, 0, tuple(shape))
                return None if found.problem() else found
    return None
