"""Keys of encrypted checkpoints: from a file or the environment, never from the command line, never printed.

A key is 16, 24 or 32 bytes, which MindSpore uses as they are (no derivation). A file or variable may also spell them as
``hex:...`` or ``base64:...``; a line break at the end of a file is not part of the key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError
from .untrusted import open_regular, pread_into, shown

VARIABLE = "LORABRIDGE_KEY"
FILE_VARIABLE = "LORABRIDGE_KEY_FILE"
LENGTHS = (16, 24, 32)
_LONGEST = 256


class Key:
    """Hold the bytes of a key and show none of them. ``origin`` says where it came from, for messages."""

    __slots__ = ("origin", "secret")

    def __init__(self, secret: bytes, origin: str) -> None:
        self.secret = secret
        self.origin = origin

    def __repr__(self) -> str:
        return f"Key({len(self.secret)} bytes from {self.origin})"

    def fingerprint(self) -> str:
        """Return a digest that tells keys apart."""
        return hashlib.sha256(b"lorabridge key\0" + self.secret).hexdigest()


# One per process, not per thread or context: shards are opened by worker threads.
_given: list[Key] = []


@contextmanager
def using(key: Key | None) -> Iterator[None]:
    """Let encrypted files be opened with a key for the length of a block; None changes nothing."""
    if key is None:
        yield
        return
    _given.append(key)
    try:
        yield
    finally:
        _given.remove(key)


def current() -> Key | None:
    """Return the key that is in use: that of :func:`using`, else that of the environment, else None."""
    if _given:
        return _given[-1]
    text = os.environ.get(VARIABLE)
    if text:
        return parse(os.fsencode(text), f"the variable {VARIABLE}")
    path = os.environ.get(FILE_VARIABLE)
    return read_key(Path(path)) if path else None


def read_key(path: Path) -> Key:
    """Read a key file. InputError where it is missing, no regular file or holds no key."""
    with open_regular(path) as file:
        data = bytearray(_LONGEST + 1)
        del data[pread_into(file, memoryview(data), 0) :]
    return parse(bytes(data), shown(str(path)))


def parse(data: bytes, origin: str) -> Key:
    """Turn the content of a file or variable into a key; an InputError tells its length and nothing else of it."""
    if len(data) not in LENGTHS and data.endswith(b"\n"):
        data = data[:-2] if data.endswith(b"\r\n") else data[:-1]
    for prefix, decode in ((b"hex:", bytes.fromhex), (b"base64:", _from_base64)):
        if data.startswith(prefix):
            try:
                data = decode(data[len(prefix) :].decode("ascii").strip())
            except ValueError:
                raise InputError(
                    f"the key is not what {prefix.decode()} says", where=origin, hint="check the key's spelling"
                ) from None
            break
    if len(data) not in LENGTHS:
        held = f"{len(data)} bytes" if len(data) <= _LONGEST else f"more than {_LONGEST} bytes"
        raise InputError(
            f"a key has 16, 24 or 32 bytes, this one {held}",
            where=origin,
            hint="give the very bytes that save_checkpoint got as enc_key, or spell them hex:... or base64:...",
        )
    return Key(data, origin)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def needed(what: str, where: str) -> Key:
    """Return the key in use; an InputError says for ``what`` one is needed where there is none."""
    key = current()
    if key is None:
        raise InputError(what, where=where, hint=f"pass --key-file FILE, or set {VARIABLE}")
    return key
