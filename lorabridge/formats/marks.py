"""Marks in containers that have no place for metadata: JSON where the frameworks' own loaders do not look.

``torch.load`` (2.13) opens the records of an archive that its pickle names and passes over others; protobuf skips
fields whose numbers it does not know, and so does ``mindspore.load_checkpoint`` (2.10).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ..errors import InputError
from ..tensors import MARK, marks
from .untrusted import MAX_METADATA, parse_json

RECORD = "lorabridge.json"
"""Name of the record in a torch archive, below its top folder."""


def encode(metadata: Mapping[str, str]) -> bytes:
    """Return the marks among a container's metadata as JSON; nothing where there are none."""
    kept = marks(metadata)
    return json.dumps(kept, sort_keys=True).encode() if kept else b""


def decode(raw: bytes, *, where: str) -> dict[str, str]:
    """Read marks; an InputError for anything but an object of texts under keys that lorabridge writes."""
    try:
        found = parse_json(raw) if len(raw) <= MAX_METADATA else None
    except ValueError as error:
        raise InputError(f"the marks of lorabridge are malformed: {error}", where=where) from None
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and key.startswith(MARK) and isinstance(text, str) for key, text in found.items()
    ):
        raise InputError("the marks of lorabridge are malformed", where=where, hint="write the file again")
    return found
