"""The files that make a model directory whole, beside its weights: an allow-list, none of them executable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..conversion.repository import Input
from ..formats.untrusted import read_small

CARRIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "chat_template.json", "chat_template.jinja", "preprocessor_config.json", "processor_config.json", "LICENSE",
    "LICENSE.txt", "NOTICE",
)  # fmt: skip
"""Names of transformers' configuration and tokenizer files; they are data and are copied as they are."""
LARGEST = 256 << 20


def carried_files(base: Input, adapters: Sequence[Path], directory: bool) -> tuple[Mapping[Path, bytes], list[Path]]:
    """Return the base's files that belong to the merged model, with their bytes, and those that stay behind.

    What the base lacks is taken from the adapters: trainers often save the tokenizer beside the adapter.
    """
    beside = [path for path in base.companions if path.is_file()]
    if not directory:
        return {}, beside
    found = {path.name: (path, data) for path in beside if path.name in CARRIED and (data := _bytes(path)) is not None}
    stay = [path for path in beside if path.name not in found]
    for folder in adapters:
        for name in CARRIED if folder.is_dir() else ():
            path = folder / name
            if name not in found and path.is_file() and (data := _bytes(path)) is not None:
                found[name] = path, data
    return dict(found.values()), stay


def _bytes(path: Path) -> bytes | None:
    data, size = read_small(path, LARGEST)
    return data if size <= LARGEST else None
