"""Encrypted MindSpore checkpoints: the stream of records in blocks of 64 MiB, each encrypted by itself.

A block is ``u32 magic | [16 bytes GCM tag] | u32 length | u32 16 | 16 bytes iv | u32 n | n bytes of ciphertext``, all
little-endian, where ``length`` counts what follows it. AES-GCM takes the first 12 bytes of the iv as its nonce, AES-CBC
and SM4-CBC take all 16 and pad as PKCS #7 does. Keys are used as they are; nothing else is authenticated.
Source of the format: mindspore 2.10, ``save_checkpoint(enc_key=, enc_mode=)``, read off its files and read by it.

Plaintext is kept in memory only: a reader holds ``KEPT`` blocks, a writer one. What a writer cannot encrypt yet,
because blocks arrive in any order, lies on disk under a random key of its own that is never stored.
"""

from __future__ import annotations

import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import InputError, UsageError
from .keys import Key
from .untrusted import open_regular, pread_into, shown, size_of, stamp_of

if TYPE_CHECKING:
    import io

    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.modes import CBC, GCM
    from typing_extensions import Buffer

    from ..files.fsio import OutFile
    from ..tensors import Bits

Mode = Literal["aes-gcm", "aes-cbc", "sm4-cbc"]
MAGICS: dict[str, int] = {"aes-gcm": 0x7F3A5ED8, "aes-cbc": 0x7F3A5ED9, "sm4-cbc": 0x7F3A5EDA}
_MODES = {magic: mode for mode, magic in MAGICS.items()}
BLOCK = 64 << 20
"""Bytes of plaintext in a block, but the last."""
KEPT = 2
"""Decrypted blocks that a reader keeps."""
_IV, _TAG = 16, 16
_MAX_BLOCKS = 1 << 20
_DAMAGED = "fetch or save the file again: it is damaged or cut off"


@dataclass(frozen=True, slots=True)
class Encryption:
    """How a checkpoint is to be encrypted."""

    mode: Mode
    key: Key

    def check(self) -> None:
        """Raise InputError where the key does not fit the cipher, UsageError without ``cryptography``."""
        _check_key(self.mode, self.key)
        _cryptography()


@dataclass(frozen=True, slots=True)
class _Frame:
    """One block: its plaintext's place in the stream, its ciphertext's place in the file."""

    start: int
    size: int
    offset: int
    length: int
    iv: bytes
    tag: bytes


def mode_of(head: bytes) -> str | None:
    """Return the mode that the first bytes of a file name, or None for a file that is not encrypted."""
    return _MODES.get(int.from_bytes(head[:4], "little")) if len(head) >= 4 else None


def _cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise UsageError(
            "encrypted checkpoints need the package cryptography, which is not installed",
            hint="pip install 'lorabridge[crypto]'",
        ) from None


def _check_key(mode: str, key: Key) -> None:
    if mode == "sm4-cbc" and len(key.secret) != 16:
        raise InputError(
            f"SM4 takes a key of 16 bytes, this one has {len(key.secret)}", where=key.origin, hint="give its own key"
        )


def _cbc(mode: str, key: Key, iv: bytes) -> Cipher[CBC]:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    algorithm = algorithms.SM4 if mode == "sm4-cbc" else algorithms.AES
    return Cipher(algorithm(key.secret), modes.CBC(iv))


def _gcm(key: Key, iv: bytes, tag: bytes | None) -> Cipher[GCM]:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher(algorithms.AES(key.secret), modes.GCM(iv[:12], tag))


class DecryptedFile:
    """See the plaintext of an encrypted file as if it were the file; every method may be called from any thread.

    ``size``: bytes of plaintext. Opening walks the blocks' headers and tries the key on the first block. Raises
    InputError for a wrong key and for whatever is no row of complete blocks, UsageError without ``cryptography``.
    """

    def __init__(self, path: Path, key: Key) -> None:
        _cryptography()
        self.path = path
        self._key = key
        self._file = open_regular(path)
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._lock = threading.Lock()
        try:
            self.mode, frames = _frames(self._file, path)
            _check_key(self.mode, key)
            self._frames = self._sized(frames)
            self._block(0)
        except BaseException:
            self._file.close()
            raise
        self.size = self._frames[-1].start + self._frames[-1].size

    def _sized(self, frames: Sequence[_Frame]) -> tuple[_Frame, ...]:
        """Fill in where each block's plaintext lies; padding is known from the last 16 bytes of a block."""
        found, start = [], 0
        for number, frame in enumerate(frames):
            size = frame.length
            if self.mode != "aes-gcm":
                size -= self._padding(frame, first=number == 0)
            found.append(_Frame(start, size, frame.offset, frame.length, frame.iv, frame.tag))
            start += size
        return tuple(found)

    def _padding(self, frame: _Frame, *, first: bool) -> int:
        tail = _exactly(self._file, self.path, frame.offset + frame.length - 16, 16)
        before = frame.iv
        if frame.length >= 32:
            before = _exactly(self._file, self.path, frame.offset + frame.length - 32, 16)
        last = _cbc(self.mode, self._key, before).decryptor().update(tail)
        count = last[-1]
        if not 1 <= count <= 16 or last[-count:] != bytes([count]) * count:
            raise self.misfit(first=first)
        return count

    def misfit(self, *, first: bool) -> InputError:
        """Return the error for a block that the key does not decrypt."""
        problem = "the key does not decrypt the file" if first else "a block of the file is damaged"
        hint = "give the key it was saved with (--key-file, LORABRIDGE_KEY); or the file is damaged"
        where = f"{shown(str(self.path))} ({self.mode.upper()}), key from {self._key.origin}"
        return InputError(problem, where=where, hint=hint if first else _DAMAGED)

    def _block(self, number: int) -> bytes:
        """Return a block's plaintext, authenticated where the mode does that; the lock is held."""
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        from cryptography.exceptions import InvalidTag

        frame = self._frames[number]
        while len(self._kept) >= KEPT:
            self._kept.popitem(last=False)
        data = _exactly(self._file, self.path, frame.offset, frame.length)
        try:
            if self.mode == "aes-gcm":
                opened = _gcm(self._key, frame.iv, frame.tag).decryptor()
                plain = opened.update(data) + opened.finalize()
            else:
                plain = _cbc(self.mode, self._key, frame.iv).decryptor().update(data)
        except InvalidTag:
            raise self.misfit(first=number == 0) from None
        plain = plain[: frame.size]
        self._kept[number] = plain
        return plain

    def read(self, offset: int, length: int) -> bytes:
        """Return these bytes of plaintext; fewer at the end."""
        buffer = bytearray(max(0, min(length, self.size - offset)))
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill a byte buffer from an offset of the plaintext and return how many bytes were there."""
        done = 0
        low = self._find(offset)
        for number in range(low, len(self._frames)):
            frame = self._frames[number]
            skip = offset + done - frame.start
            take = min(frame.size - skip, len(view) - done)
            if take > 0:
                with self._lock:
                    plain = self._block(number)
                view[done : done + take] = memoryview(plain)[skip : skip + take]
                done += take
            if done == len(view):
                break
        return done

    def _find(self, offset: int) -> int:
        import bisect

        return max(0, bisect.bisect_right(self._frames, offset, key=lambda frame: frame.start) - 1)

    def stamp(self) -> tuple[int, int | str]:
        """Return what changes when the file does: its size and time."""
        return stamp_of(self._file)

    def close(self) -> None:
        """Forget the plaintext and close the file."""
        self._kept.clear()
        self._file.close()


def _exactly(file: io.FileIO, path: Path, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    if pread_into(file, memoryview(buffer), offset) < length:
        raise InputError("the file ends early", where=f"{shown(str(path))}, byte {offset}", hint=_DAMAGED)
    return bytes(buffer)


def _frames(file: io.FileIO, path: Path) -> tuple[str, list[_Frame]]:
    """Walk over the blocks' headers; the plaintext's places are not known yet."""
    size = size_of(file)
    frames: list[_Frame] = []
    mode, at = "", 0
    while at < size:
        found = mode_of(_exactly(file, path, at, 4))
        if found is None or (mode and found != mode) or len(frames) >= _MAX_BLOCKS:
            raise _bad(path, at, "there is no encrypted block")
        mode = found
        tag = _exactly(file, path, at + 4, _TAG) if mode == "aes-gcm" else b""
        start = at + 4 + len(tag)
        length, ivs = struct.unpack("<II", _exactly(file, path, start, 8))
        iv = _exactly(file, path, start + 8, _IV)
        (held,) = struct.unpack("<I", _exactly(file, path, start + 24, 4))
        if ivs != _IV or length != held + 24 or not 0 < held <= BLOCK + 16 or (mode != "aes-gcm" and held % 16):
            raise _bad(path, at, "an encrypted block's lengths contradict each other")
        at = start + 28 + held
        if at > size:
            raise _bad(path, size, "the file ends early")
        frames.append(_Frame(0, 0, start + 28, held, iv, tag))
    if not frames:
        raise _bad(path, 0, "there is no encrypted block")
    return mode, frames


def _bad(path: Path, offset: int, problem: str) -> InputError:
    return InputError(problem, where=f"{shown(str(path))}, byte {offset}", hint=_DAMAGED)


class SealedFile:
    """Take a plaintext as an ``OutFile`` does, in any order, and leave it encrypted in one on ``close``."""

    def __init__(self, out: OutFile, encryption: Encryption) -> None:
        self.path = out.path
        self._out = out
        self._encryption = encryption
        self._size = 0
        self._lock = threading.Lock()
        self._own = os.urandom(32)

    def allocate(self, size: int) -> None:
        """Reserve room for ``size`` bytes of plaintext."""
        self._size = size
        self._out.allocate(sum(self._lengths(number) for number in range(self._count())))

    def _count(self) -> int:
        return -(-self._size // BLOCK)

    def _plain(self, number: int) -> int:
        return min(BLOCK, self._size - number * BLOCK)

    def _overhead(self) -> int:
        return 32 + (_TAG if self._encryption.mode == "aes-gcm" else 0)

    def _lengths(self, number: int) -> int:
        plain = self._plain(number)
        return self._overhead() + (plain if self._encryption.mode == "aes-gcm" else plain // 16 * 16 + 16)

    def _masked(self, offset: int, data: bytes | memoryview) -> bytes:
        """Encrypt, or decrypt, bytes at an offset under the writer's own key (AES-256-CTR)."""
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        counter = (offset // 16).to_bytes(16, "big")
        stream = Cipher(algorithms.AES(self._own), modes.CTR(counter)).encryptor()
        stream.update(bytes(offset % 16))
        return stream.update(data)

    def write(self, offset: int, data: Buffer | Bits) -> None:
        """Write plaintext at an offset."""
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        self._grow(offset + len(view))
        for start in range(0, len(view), 8 << 20):
            part = view[start : start + (8 << 20)]
            self._out.write(offset + start, self._masked(offset + start, part))

    def _grow(self, end: int) -> None:
        with self._lock:
            self._size = max(self._size, end)

    def copy(self, offset: int, source: Path, start: int, length: int) -> None:
        """Write bytes [start, start + length) of another file at an offset; an InputError when it is shorter."""
        with open_regular(source) as file:
            for done in range(0, length, 8 << 20):
                part = _exactly(file, source, start + done, min(8 << 20, length - done))
                self.write(offset + done, part)

    def read(self, offset: int, length: int) -> bytes:
        """Read plaintext back; fewer bytes at the end."""
        return self._masked(offset, self._out.read(offset, max(0, min(length, self._size - offset))))

    def close(self) -> None:
        """Encrypt every block, the last first, since each one moves towards the end of the file; then close it."""
        if self._out.closed:
            return
        ends = [0]
        for number in range(self._count()):
            ends.append(ends[-1] + self._lengths(number))
        for number in reversed(range(self._count())):
            self._out.write(ends[number], self._sealed(self.read(number * BLOCK, self._plain(number))))
        self._out.close()

    @property
    def closed(self) -> bool:
        """Whether the file is no longer open for writing."""
        return self._out.closed

    def discard(self) -> None:
        """Close without finishing: the file will not be published."""
        self._out.discard()

    def _sealed(self, plain: bytes) -> bytes:
        mode, key, iv, tag = self._encryption.mode, self._encryption.key, os.urandom(_IV), b""
        if mode == "aes-gcm":
            sealer = _gcm(key, iv, None).encryptor()
            data = sealer.update(plain) + sealer.finalize()
            tag = sealer.tag
        else:
            count = 16 - len(plain) % 16
            data = _cbc(mode, key, iv).encryptor().update(plain + bytes([count]) * count)
        head = struct.pack("<I", MAGICS[mode]) + tag + struct.pack("<II", 24 + len(data), _IV) + iv
        return head + struct.pack("<I", len(data)) + data


def sealing(create: Callable[[str], OutFile], encryption: Encryption) -> Callable[[str], SealedFile]:
    """Return a ``create`` whose files are encrypted."""
    encryption.check()
    return lambda name: SealedFile(create(name), encryption)
