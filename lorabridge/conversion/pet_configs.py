"""Where an adapter's rank and alpha stand beside its tensors: peft's config, MindFormers' files, S-LoRA's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..dialects.mindformers_config import pet_section
from ..errors import InputError, UsageError, first_line
from ..formats.untrusted import read_small, shown

if TYPE_CHECKING:
    from ..dialects.adapter import Json, Value

NAMES = ("mindformers_adapter_config.json", "adapter_config.json")
YAML = (".yaml", ".yml")
SERVED = "lora_adapter.json"
MAX_BYTES = 1 << 20
_DEEPEST = 20


def beside(folders: Sequence[Path]) -> Path | None:
    """Return the JSON file that describes an adapter, from the first of these folders that has one."""
    for folder in folders:
        found = next((folder / name for name in NAMES if (folder / name).is_file()), None)
        if found is not None:
            return found
    return None


def yaml_beside(folder: Path) -> Path | None:
    """Return the one yaml of a directory that has a ``pet_config`` or ``lora_config``; UsageError where several do."""
    texts = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in YAML and path.is_file()]
    found = [path for path in texts if _mentions(path)]
    if len(found) > 1:
        raise UsageError(
            "several yaml files describe an adapter",
            where=[shown(str(p)) for p in found],
            hint="name one with --config",
        )
    return found[0] if found else None


def _mentions(path: Path) -> bool:
    text = read_small(path, MAX_BYTES)[0].decode("utf-8", errors="replace")
    return any(line.lstrip().startswith(("pet_config:", "lora_config:")) for line in text.splitlines())


def read_yaml(path: Path) -> Json:
    """Read the section of a run's yaml that describes an adapter, as data.

    Returns ``{"pet_config": {...}}`` or ``{"lora_config": {...}}``. InputError where the yaml has neither, cannot be
    read, or PyYAML is missing.
    """
    try:
        import yaml
    except ImportError as error:
        raise InputError(
            "reading yaml needs PyYAML",
            where=shown(str(path)),
            hint="pip install 'lorabridge[yaml]', or give rank and alpha with --rank and --alpha",
        ) from error
    data, size = read_small(path, MAX_BYTES)
    try:
        if size > MAX_BYTES:
            raise ValueError(f"over {MAX_BYTES >> 20} MiB")
        raw = yaml.safe_load(data.decode("utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        told = first_line(error) or type(error).__name__
        raise InputError(f"config is not valid yaml: {told}", where=shown(str(path)), hint="repair the file") from error
    section = pet_section(raw) if isinstance(raw, Mapping) else None
    if section is None:
        raise InputError(
            "the yaml describes no adapter",
            where=shown(str(path)),
            hint="it has neither model.model_config.pet_config nor lora_config; name the run's own yaml",
        )
    return {key: _plain(value, path) for key, value in section.items()}


def _plain(value: object, path: Path, depth: int = 0) -> Value:
    """Keep what JSON can hold, since the manifest repeats it."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if depth > _DEEPEST:
        raise InputError("the yaml is nested too deeply", where=shown(str(path)), hint="repair the file")
    if isinstance(value, list):
        return [_plain(item, path, depth + 1) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item, path, depth + 1) for key, item in value.items()}
    return str(value)


def served_adapter(folder: Path, index: Json) -> Path:
    """Return the directory of the one adapter that S-LoRA's ``lora_adapter.json`` lists.

    Its paths are those of the machine that served; a directory of the same name inside ``folder`` stands for one that
    is not there. UsageError listing the choices where there are several, InputError where there is none.
    """
    places = {name: _placed(folder, place) for name, place in index.items() if isinstance(place, str)}
    where = [f"{shown(name)}: {shown(str(place))}" for name, place in places.items()]
    if len(places) > 1:
        raise UsageError("the folder serves several adapters", where=where, hint="name the directory of one of them")
    if not places:
        raise InputError(f"{SERVED} lists no adapter", where=shown(str(folder)), hint="name the adapter's directory")
    (place,) = places.values()
    if not place.is_dir():
        raise InputError(f"the directory that {SERVED} names is not there", where=where, hint="name it yourself")
    return place


def _placed(folder: Path, text: str) -> Path:
    if "\0" in text:
        raise InputError(f"{SERVED} names a path with a zero byte", where=shown(str(folder)), hint="repair the file")
    place = Path(text)
    inside = folder / place.name
    return inside if not place.is_dir() and inside.is_dir() else place
