"""Checkpoint containers: how named tensors lie in files. One module per container, loaded when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

from ..errors import InputError, UsageError
from .sniff import Kind, identify, refusal
from .untrusted import refused_by_system, shown

if TYPE_CHECKING:
    from ..files.fsio import OutFile
    from ..tensors import Sink, Source
    from .encrypted import Encryption

__all__ = ["FORMATS", "Container", "Kind", "container", "format_for", "identify", "make_sink", "open_source"]

Flavour = Literal["hf", "ms"]

# Registry name -> (module, suffixes): suffixes stand here too, so that choosing one imports nothing.
FORMATS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "safetensors": ("safetensors", (".safetensors",)),
    "torch": ("torchzip", (".bin", ".pt", ".pth")),
    "mindspore": ("msckpt", (".ckpt",)),
    "npz": ("npz", (".npz",)),
    "gguf": ("gguf", (".gguf",)),
}

WHOLE = ("npz", "gguf")
"""Containers whose readers elsewhere know no index of shards."""

# What the trainers of transformers and accelerate leave beside a checkpoint; never the checkpoint itself.
_TRAINER_FILES = ("training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state")


class Container(Protocol):
    """What a container's module offers."""

    NAME: str
    SUFFIXES: tuple[str, ...]

    def open_file(self, path: Path) -> Source:
        """Open one file, reading its header only."""
        ...

    def make_sink(self, create: Callable[[str], OutFile], filename: str, **options: object) -> Sink:
        """Return a sink that writes one file."""
        ...


def container(name: str) -> Container:
    """Import the module of a container. KeyError for a name that is not in ``FORMATS``."""
    return cast(Container, import_module(f".{FORMATS[name][0]}", __package__))


def format_for(path: Path) -> str:
    """Return the container that a target's suffix asks for; UsageError lists the suffixes."""
    suffix = Path(path).suffix.lower()
    for name, (_, suffixes) in FORMATS.items():
        if suffix in suffixes:
            return name
    known = ", ".join(suffix for _, suffixes in FORMATS.values() for suffix in suffixes)
    raise UsageError(
        "the target's suffix names no container",
        where=shown(str(path)),
        hint=f"end it in one of {known}, or in a slash for a directory",
    )


def open_source(path: Path) -> Source:
    """Open a checkpoint by its content: one file, an index of shards, or a directory that holds exactly one of them.

    Reads headers only. Raises InputError naming the real kind of what is no checkpoint and what is wrong with one,
    UsageError listing the choices where a directory holds several.
    """
    path = Path(path)
    kind = identify(path)
    if kind.name == "directory":
        path = _only_checkpoint(path)
        kind = identify(path)
    if kind.format == "sharded" or (kind.name == "json" and _named_index(path)):
        from .sharded import open_index

        return open_index(path)
    if kind.format is None:
        raise refusal(path, kind)
    return container(kind.format).open_file(path)


def make_sink(
    format: str,
    create: Callable[[str], OutFile],
    filename: str,
    *,
    max_shard_size: int | None = None,
    flavour: Flavour = "hf",
    crc: bool = False,
    encryption: Encryption | None = None,
) -> Sink:
    """Return a sink for a container.

    ``max_shard_size``: bytes of tensors per file; above it shards and ``<filename>.index.json`` are written.
    ``flavour``: whose safetensors, Hugging Face's or MindSpore's. ``crc``: append MindSpore's checksum to a ``.ckpt``.
    ``encryption``: encrypt a ``.ckpt``. UsageError for options that the container does not have.
    ``shardsink.main_file`` names the file that stands for the whole.
    """
    if crc and format != "mindspore":
        raise UsageError(f"{format} files have no checksum trailer", where=shown(filename), hint="drop --crc")
    if encryption is not None and format != "mindspore":
        raise UsageError(
            f"{format} files cannot be encrypted", where=shown(filename), hint="drop --encrypt, or write a .ckpt"
        )
    known: dict[str, dict[str, object]] = {
        "safetensors": {"flavour": flavour},
        "mindspore": {"crc": crc, "encryption": encryption},
    }
    if max_shard_size is not None and format in WHOLE:
        raise UsageError(
            f"{format} files are not split into shards", where=shown(filename), hint="drop --max-shard-size"
        )
    options = known.get(format, {})
    if max_shard_size is None:
        return container(format).make_sink(create, filename, **options)
    from .shardsink import ShardedSink

    return ShardedSink(container(format), create, filename, max_shard_size=max_shard_size, options=options)


def _named_index(path: Path) -> bool:
    return path.name.endswith(".index.json") or path.name == "param_name_map.json"


def _only_checkpoint(directory: Path) -> Path:
    """Return the one checkpoint or index of a directory; an index stands for the shards beside it."""
    try:
        files = sorted(p for p in directory.iterdir() if not p.name.startswith(".") and p.is_file())
    except OSError as error:
        raise refused_by_system(error, directory) from error
    suffixes = {suffix for _, known in FORMATS.values() for suffix in known}
    choices = [p for p in files if _named_index(p)]
    shards = _listed(choices)
    for file in files:
        wanted = file.suffix.lower() in suffixes and not file.name.startswith(_TRAINER_FILES)
        if wanted and file.name not in shards and identify(file).format is not None:
            choices.append(file)
    if any(choice.suffix != ".npz" for choice in choices):  # arrays of another kind often lie beside a checkpoint
        choices = [choice for choice in choices if choice.suffix != ".npz"]
    if not choices:
        hint = "name the checkpoint file itself; in a directory only " + ", ".join(sorted(suffixes)) + " are looked at"
        raise InputError("the directory holds no checkpoint", where=shown(str(directory)), hint=hint)
    if len(choices) > 1:
        where = [shown(str(choice)) for choice in choices]
        raise UsageError("the directory holds several checkpoints", where=where, hint="name one of these files")
    return choices[0]


def _listed(indexes: list[Path]) -> set[str]:
    """Return the file names that indexes stand for; a broken index is reported when it is opened."""
    from .sharded import read_index

    names: set[str] = set()
    for index in indexes:
        try:
            names |= set(read_index(index).values())
        except InputError:
            if len(indexes) == 1:
                raise
    return names
