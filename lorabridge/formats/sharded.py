"""Read sharded sets over any container: an index file that maps tensor names to files beside it.

Formats: Hugging Face's ``*.index.json`` (transformers 5, modeling_utils.save_pretrained), the same layout beside
``.ckpt`` shards, and MindSpore's ``param_name_map.json`` (mindspore 2.10, parallel/transform_safetensors.py).
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, cast

from ..errors import InputError
from ..tensors import Extent, Source, TensorSpec
from . import FORMATS, container
from .sniff import identify
from .untrusted import MAX_HEADER, MAX_TENSORS, parse_json, read_small, refused_by_system, shown

if TYPE_CHECKING:
    from ..tensors import Bits

MAX_OPEN = 64
"""Shards that are held open at a time."""

_BLOB = re.compile(r"(?:\.\./){2,}blobs/[0-9a-f]{40}(?:[0-9a-f]{24})?")
_RESERVED = re.compile(r"(?i)(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?")
_INDEX_HINT = "make or download the whole set again"


class ShardedSource:
    """Read a set of shards as one checkpoint; ``format`` is the shards' container, ``path`` the index.

    ``specs`` goes shard by shard. ``metadata`` joins the shards' own; a key on which they differ is kept once per
    shard as ``<file>/<key>``.
    """

    def __init__(self, path: Path, format: str, shards: Shards, homes: Mapping[str, str]) -> None:
        self.path = path
        self.format = format
        self._shards = shards
        self._homes = homes
        self.specs: Mapping[str, TensorSpec] = {
            name: spec for specs in shards.specs.values() for name, spec in specs.items()
        }
        self.metadata: Mapping[str, str] = _joined(shards.metadata)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Bits:
        """Return a tensor's bits, or those of rows [start, stop); see :class:`lorabridge.tensors.Source`."""
        with self._shards.use(self._homes[name]) as shard:
            return shard.read(name, rows)

    def extents(self, name: str) -> tuple[Extent, ...]:
        """Return the byte ranges of the tensor inside its shard."""
        with self._shards.use(self._homes[name]) as shard:
            return shard.extents(name)

    def close(self) -> None:
        """Close every shard."""
        self._shards.close()


class Shards:
    """Files that are opened when they are needed: at most ``most`` idle ones stay open, the latest used."""

    def __init__(
        self, open_file: Callable[[Path], Source], paths: Mapping[str, Path], *, most: int = MAX_OPEN
    ) -> None:  # fmt: skip
        self._most = most
        self._open_file = open_file
        self._paths = paths
        self._open: OrderedDict[str, tuple[Source, list[int]]] = OrderedDict()  # value: source, [users]
        self._lock = threading.Lock()
        self.specs: dict[str, Mapping[str, TensorSpec]] = {}
        self.metadata: dict[str, Mapping[str, str]] = {}

    @contextmanager
    def use(self, name: str) -> Iterator[Source]:
        """Lend an open shard; it stays open for as long as it is lent."""
        with self._lock:
            if name not in self._open:
                self._open[name] = (self._opened(name), [0])
            source, users = self._open[name]
            self._open.move_to_end(name)
            users[0] += 1
            self._trim()
        try:
            yield source
        finally:
            with self._lock:
                users[0] -= 1

    def _opened(self, name: str) -> Source:
        source = self._open_file(self._paths[name])
        if self.specs.setdefault(name, source.specs) != source.specs:
            source.close()
            where = shown(str(self._paths[name]))
            raise InputError("the shard changed while it was being read", where=where, hint="leave the input alone")
        self.metadata.setdefault(name, source.metadata)
        return source

    def _trim(self) -> None:
        if len(self._open) <= self._most:
            return
        for name in [name for name, (_, users) in self._open.items() if not users[0]]:
            if len(self._open) <= self._most:
                break
            self._open.pop(name)[0].close()

    def close(self) -> None:
        """Close every shard."""
        with self._lock:
            while self._open:
                self._open.popitem()[1][0].close()


def read_index(path: Path) -> dict[str, str]:
    """Return an index's weight map, tensor name to file name, every file name checked to be a plain one.

    Raises InputError listing each value that is no plain file name under POSIX and Windows rules.
    """
    data, size = read_small(path, MAX_HEADER)
    if size > MAX_HEADER:
        raise _bad(path, f"it has {size} bytes, more than the {MAX_HEADER} that are allowed")
    try:
        index = parse_json(data)
    except ValueError as error:
        raise _bad(path, str(error)) from None
    weights = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weights, dict) or not weights:
        raise _bad(path, "it has no weight_map with tensor names and files")
    if len(weights) > MAX_TENSORS:
        raise _bad(path, f"it lists {len(weights)} tensors, more than the {MAX_TENSORS} that are allowed")
    issues = [
        f"{shown(str(path))}: {shown(name)}: {shown(value) if isinstance(value, str) else 'a value'} {problem}"
        for name, value in weights.items()
        if (problem := _file_name_problem(value))
    ]
    if issues:
        raise InputError("the index names files that are not plain names beside it", where=issues, hint=_INDEX_HINT)
    return weights


def _file_name_problem(value: object) -> str:
    """Say why an index value is no plain file name, "" when it is one."""
    if not isinstance(value, str):
        return "that is no string"
    if not value.isprintable():
        return "holds control characters"
    plain = "/" not in value and PureWindowsPath(value).name == value and value not in ("", ".", "..")
    if not plain or any(char in value for char in '\\:*?"<>|') or len(value.encode()) > 255:
        return "is no plain file name"
    if value[-1] in ". " or value[0] == " " or _RESERVED.fullmatch(value):
        return "is no plain file name on Windows"
    return ""


def open_index(path: Path) -> ShardedSource:
    """Open the set of shards that an index lists, reading headers only.

    Every shard is a regular file beside the index, of one container by content; index and headers agree on every
    name both ways. Raises InputError listing what is missing, unexpected, repeated or elsewhere.
    """
    path = Path(path)
    homes = read_index(path)
    names = sorted(set(homes.values()), key=lambda name: (len(name), name))
    paths = _shard_paths(path, names)
    format = _common_format(path, paths)
    shards = Shards(container(format).open_file, paths)
    try:
        issues: list[str] = []
        for name in names:
            with shards.use(name) as shard:
                issues += _strays(path.parent / name, name, shard.specs, homes)
        for tensor, name in homes.items():
            if tensor not in shards.specs[name]:
                issues.append(f"{shown(str(path.parent / name))}: {shown(tensor)}: missing, the index places it here")
        if issues:
            raise InputError("the index and its shards disagree", where=issues, hint=_INDEX_HINT)
        return ShardedSource(path, format, shards, homes)
    except BaseException:
        shards.close()
        raise


def _strays(path: Path, name: str, specs: Mapping[str, TensorSpec], homes: Mapping[str, str]) -> list[str]:
    """List the tensors of a shard that the index does not place there; a repeated one is placed elsewhere."""
    where = shown(str(path))
    return [
        f"{where}: {shown(tensor)}: the index places it in {shown(homes[tensor])}"
        if tensor in homes
        else f"{where}: {shown(tensor)}: not in the index"
        for tensor in specs
        if homes.get(tensor) != name
    ]


def _shard_paths(index: Path, names: Sequence[str]) -> dict[str, Path]:
    """Find every shard beside the index; one InputError lists the missing and the unsafe ones."""
    issues: list[str] = []
    for name in names:
        problem = placement_problem(index.parent, name)
        if problem:
            issues.append(f"{shown(str(index.parent / name))}: {problem}")
    if issues:
        hint = "put every shard beside the index as a regular file"
        raise InputError("shards of the index are missing or unsafe", where=issues, hint=hint)
    return {name: index.parent / name for name in names}


def placement_problem(directory: Path, name: str) -> str:
    """Say why a file may not serve as a shard: missing, not regular, or a link that leaves the directory."""
    path = directory / name
    try:
        if stat.S_ISLNK(os.lstat(path).st_mode):
            real = Path(os.path.realpath(path))
            inside = real.parent == Path(os.path.realpath(directory))
            if not inside and not _in_hub_cache(directory, os.readlink(path), real):
                return "a symbolic link that leaves the directory"
        if not stat.S_ISREG(os.stat(path).st_mode):
            return "no regular file"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a symbolic link in a loop"
        raise refused_by_system(error, path) from error
    return ""


def _in_hub_cache(directory: Path, link: str, real: Path) -> bool:
    """Recognise huggingface_hub's cache: ``snapshots/<revision>/.../file -> ../../blobs/<hash>``."""
    if not _BLOB.fullmatch(link):
        return False
    home = Path(os.path.realpath(directory))
    steps = link.count("../")
    repo = home.parents[steps - 1] if steps <= len(home.parents) else home
    return home.relative_to(repo).parts[0] == "snapshots" and real == repo / "blobs" / link.rsplit("/", 1)[1]


def _common_format(index: Path, paths: Mapping[str, Path]) -> str:
    """Return the one container of all shards, which must be what the index's name announces."""
    suffix = "" if index.name == "param_name_map.json" else Path(index.name.removesuffix(".index.json")).suffix
    announced = {known: name for name, (_, suffixes) in FORMATS.items() for known in suffixes}.get(suffix.lower())
    expected = "safetensors" if index.name == "param_name_map.json" else announced
    for path in paths.values():
        kind = identify(path)
        if kind.format is None or kind.format not in FORMATS or (expected and kind.format != expected):
            problem = f"the index needs {expected or 'checkpoint'} shards, this is {kind.title}"
            raise InputError(problem, where=shown(str(path)), hint=kind.cure or _INDEX_HINT)
        expected = kind.format
    return cast(str, expected)


def _joined(parts: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Join metadata: a key once where its values agree, else once per shard under the shard's name."""
    values: dict[str, set[str]] = {}
    for pairs in parts.values():
        for key, value in pairs.items():
            values.setdefault(key, set()).add(value)
    joined: dict[str, str] = {}
    for name, pairs in parts.items():
        for key, value in pairs.items():
            joined[key if len(values[key]) == 1 else f"{name}/{key}"] = value
    return joined


def _bad(path: Path, problem: str) -> InputError:
    return InputError("the index of shards is malformed", where=f"{shown(str(path))}: {problem}", hint=_INDEX_HINT)
