"""Repository layouts: which files make up one input, and where one output goes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .. import distributed, formats, manifest
from ..dialects.adapter import Content, Facts, Json
from ..dialects.mindformers_config import pet_section
from ..distributed.assembled import Assembled
from ..errors import InputError, UsageError
from ..files import placeholders
from ..files.placeholders import input_path, is_marker, output_path
from ..formats.untrusted import read_small
from ..tensors import Source
from . import pet_configs, read_facts, single_device

ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"
ADAPTER_STEM = "adapter_model"
STEMS = {
    "diffusers": "pytorch_lora_weights", "mindone": "pytorch_lora_weights", "mlx": "adapters",
    "adapterhub": "pytorch_adapter", "adapterhub-bottleneck": "pytorch_adapter",
}  # fmt: skip
"""Dialects whose loaders look for another file in a directory."""
CONTAINERS = {
    "torchtune": (".pt", "torch"), "gguf": (".gguf", "gguf"), "adapterhub": (".bin", "torch"),
    "adapterhub-bottleneck": (".bin", "torch"),
}  # fmt: skip
"""Dialects whose loaders look for another container in a directory."""
MAX_CONFIG_BYTES = 16 << 20
SAFETENSORS_DIALECTS = ("pynative", "mindone", "mindone-peft")
"""MindSpore dialects whose loader looks for safetensors in a directory."""
Framework = Literal["torch", "mindspore"]


@dataclass(frozen=True, slots=True)
class Input:
    """One checkpoint with what lies beside it.

    ``adapter_config`` and ``model_config`` are JSON objects read as data; ``config_from`` names the file or manifest
    the adapter config came from; ``stated``: facts from a sidecar written by hand; ``companions``: files of the
    directory that a conversion does not carry.
    """

    path: Path
    source: Source
    adapter_config: Json | None
    model_config: Json | None
    config_from: str
    manifest: manifest.Manifest | None
    stated: Facts
    companions: tuple[Path, ...]

    def content(self, facts: Facts | None = None) -> Content:
        """Return what dialects read: the container's name among the metadata, and what is read beside the headers."""
        metadata = {k: v for k, v in self.source.metadata.items() if k != manifest.METADATA_KEY}
        metadata["container"] = self.source.format
        known = read_facts.completed(facts or Facts(), self.source)
        return Content(self.source.specs, metadata, self.adapter_config, known, str(self.path))


def open_input(
    path: Path, *, config: Path | None = None, strategies: Sequence[Path] = (), step: str | None = None
) -> Input:
    """Open a file or a directory; headers, configs and the manifest only.

    ``config`` names an adapter_config.json, MindFormers' yaml or JSON, or a model's config.json, told apart by their
    fields, and outranks what is found. Without it they come from the directory or from beside the file, else from the
    manifest; a lone file's manifest outranks what merely lies beside it. ``strategies`` and ``step`` are about
    directories that several ranks wrote, which are read as one checkpoint (see ``lorabridge.distributed``).
    Raises InputError for anything malformed, with the file.
    """
    if "\0" in str(path):
        raise InputError("a path cannot hold a zero byte", where=repr(str(path)), hint="check the path")
    path = input_path(path)
    source = _open_weights(path, strategies, step)
    try:
        found, stated = manifest.find(path, source.metadata)
        folder = path if path.is_dir() else path.parent
        kept = found if found is not None and found.describes(source.specs) else None
        adapter_config, config_from, model_config = None, "", None
        if kept is None or path.is_dir():
            adapter_config, config_from = _described(path, source)
            model_config, _ = _beside(folder / MODEL_CONFIG)
        if kept is not None and adapter_config is None:
            adapter_config, config_from = kept.target.config, "the manifest"
        if kept is not None and model_config is None:
            model_config = kept.model_config
        if config is not None:
            given = _read_config(config)
            if "peft_type" in given or pet_section(given) is not None:
                adapter_config, config_from = given, str(config)
            else:
                model_config = given
        known = {*pet_configs.NAMES, pet_configs.SERVED, MODEL_CONFIG, "lorabridge.json", *_own_files(source)}
        known.add(Path(config_from).name)
        beside = sorted(_home(source).iterdir()) if path.is_dir() else []
        extra = tuple(p for p in beside if p.name not in known and not is_marker(p))
        return Input(path, source, adapter_config, model_config, config_from, found, stated, extra)
    except BaseException:
        source.close()
        raise


def _open_weights(path: Path, strategies: Sequence[Path], step: str | None) -> Source:
    alone = single_device.model_file(path, step)
    if alone is not None:
        return formats.open_source(alone)
    assembled = distributed.open_distributed(path, strategies=strategies, step=step)
    if assembled is not None:
        return assembled
    if strategies or step is not None:
        raise UsageError(
            "a strategy or a step is given for what is no distributed checkpoint", where=str(path),
            hint="name the directory that holds rank_0, rank_1 ..., or leave --strategy and --step out",
        )  # fmt: skip
    return formats.open_source(weights_path(path))


def weights_path(path: Path) -> Path:
    """Return the file that holds an input's tensors: the adapter's weights inside a peft directory, else ``path``."""
    if not path.is_dir():
        return path
    if (path / pet_configs.SERVED).is_file() and not (path / ADAPTER_CONFIG).is_file():
        path = pet_configs.served_adapter(path, read_json(path / pet_configs.SERVED))
    stems = (ADAPTER_STEM, "adapter", *dict.fromkeys(STEMS.values()))
    held = [p for stem in stems for p in sorted(path.glob(f"{stem}.*")) if p.is_file() and p.suffix != ".json"]
    if len(held) > 1:
        raise InputError(
            "the directory holds several adapter files", where=[str(p) for p in held], hint="name the file you mean"
        )
    return held[0] if held else path


def _home(source: Source) -> Path:
    return source.path if source.path.is_dir() else source.path.parent


def _own_files(source: Source) -> set[str]:
    """Return the names in the source's directory that its tensors lie under."""
    home = _home(source)
    inside = [path.relative_to(home).parts[0] for path in files_of(source) if path.is_relative_to(home)]
    return {source.path.name, *inside}


def files_of(source: Source) -> set[Path]:
    """Return the files that hold a source's tensors."""
    if isinstance(source, Assembled):
        return set(source.pieces.files)
    return {extent.path for name in source.specs for extent in source.extents(name)}


def run_identity(said: Iterable[str], files: Iterable[Path]) -> str:
    """Return a digest of what decides a run's output: ``said``, and which ``files`` there are now.

    A killed run is taken up again where it is the same.
    """
    digest = hashlib.sha256()
    for text in said:
        digest.update(f"{text}\n".encode())
    for path in sorted(set(files)):
        digest.update(f"{_told(path)}\n".encode())
    return digest.hexdigest()


def _told(path: Path) -> str:
    remote = placeholders.found(path)
    if remote is not None:
        return f"{remote.url} {remote.size} {remote.version}"
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def _described(path: Path, source: Source) -> tuple[Json | None, str]:
    """Return the config that describes an adapter, from its directory or from beside the file."""
    home = _home(source)
    folders = dict.fromkeys((path, home) if path.is_dir() else (path.parent,))
    found = pet_configs.beside(list(folders)) or (pet_configs.yaml_beside(home) if path.is_dir() else None)
    return (_read_config(found), str(found)) if found is not None else (None, "")


def _read_config(path: Path) -> Json:
    return pet_configs.read_yaml(path) if path.suffix.lower() in pet_configs.YAML else read_json(path)


def _beside(path: Path) -> tuple[Json | None, str]:
    return (read_json(path), str(path)) if path.is_file() else (None, "")


def read_json(path: Path) -> Json:
    """Read a JSON object as data; duplicate keys, NaN and anything but an object are refused."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a key stands twice")
        return out

    def constant(text: str) -> object:
        raise ValueError(f"{text} is not JSON")

    data, size = read_small(path, MAX_CONFIG_BYTES)
    try:
        if size > MAX_CONFIG_BYTES:
            raise ValueError(f"over {MAX_CONFIG_BYTES >> 20} MiB")
        raw = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"config is not valid JSON: {error}", where=str(path), hint="repair the file") from error
    if not isinstance(raw, Mapping):
        raise InputError("config is not a JSON object", where=str(path), hint="give the config file itself")
    return raw


@dataclass(frozen=True, slots=True)
class Output:
    """Where a conversion writes: one container file, in a directory of its own or as it stands."""

    target: Path
    directory: bool
    file: str
    format: str


def plan_output(target: Path | str, *, framework: Framework, adapter: bool, dialect: str = "") -> Output:
    """Decide container and file name from the target's path.

    A path with a container's suffix is a file; one without a suffix, an existing directory or a path that ends in a
    slash is a directory, which gets safetensors for PyTorch and .ckpt for MindSpore, or what the dialect's loader
    looks for there. Raises UsageError for an unknown suffix.
    """
    target = output_path(target)
    path = Path(target)
    text = str(target)
    if "\0" in text:
        raise UsageError("a path cannot hold a zero byte", where=repr(text), hint="choose another name")
    if _is_directory(target):
        stem = STEMS.get(dialect, ADAPTER_STEM) if adapter else "model"
        safe = framework == "torch" or dialect in SAFETENSORS_DIALECTS
        suffix, format_name = (".safetensors", "safetensors") if safe else (".ckpt", "mindspore")
        suffix, format_name = CONTAINERS.get(dialect, (suffix, format_name)) if adapter else (suffix, format_name)
        return Output(path, True, stem + suffix, format_name)
    return Output(path, False, path.name, formats.format_for(path))


def _is_directory(target: Path | str) -> bool:
    path = Path(target)
    return path.is_dir() or str(target).endswith("/") or not path.suffix


def framework_of(target: Path | str) -> Framework | None:
    """Return the framework that a target's suffix decides; None for a directory and where both use the container."""
    if _is_directory(target):
        return None
    name = formats.format_for(Path(target))
    known: dict[str, Framework] = {"torch": "torch", "mindspore": "mindspore"}
    return known.get(name)
