"""Tell checkpoint files apart by what they hold, whatever they are called."""

from __future__ import annotations

import io
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .untrusted import MAX_HEADER, file_kind, open_regular, pread_into, refused_by_system, shown, size_of

HEAD = 16384


@dataclass(frozen=True, slots=True)
class Kind:
    """Name one kind of file.

    ``format`` is the container's registry name, "sharded" for an index of shards, None for what lorabridge does not
    read. ``title`` is a noun with its article; ``cure`` says what to do with a file that is not read.
    """

    name: str
    title: str
    format: str | None = None
    cure: str = ""


_RESAVE = "load it where it was made and save its state_dict as safetensors or with a current torch.save"
_UNPACK = "unpack it and name the checkpoint inside"
_MERGE = "name the weights files; strategy files describe how they were cut"
_NAME = "name a checkpoint file"

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("safetensors", "a safetensors file", "safetensors"),
        Kind("torch", "a torch zip checkpoint", "torch"),
        Kind("mindspore", "a MindSpore weights checkpoint", "mindspore"),
        Kind("index", "an index of shards", "sharded"),
        Kind("directory", "a directory", None, _NAME),
        Kind(
            "torchscript",
            "a TorchScript archive",
            None,
            "save the module's state_dict as safetensors or with torch.save",
        ),
        Kind("npz", "a numpy .npz archive", "npz"),
        Kind("zip", "a zip archive that is no torch checkpoint", None, _UNPACK),
        Kind("torch-legacy", "a legacy (not zip) torch checkpoint", "torch"),
        Kind("pickle", "a plain pickle", None, _RESAVE),
        Kind("mindspore-strategy", "a MindSpore parallel strategy file", None, _MERGE),
        Kind("mindspore-strategy-json", "a MindSpore parallel strategy file in JSON", None, _MERGE),
        Kind("mindspore-group", "a MindSpore communication group file", None, _MERGE),
        Kind("mindspore-aes-gcm", "a MindSpore checkpoint encrypted with AES-GCM", "mindspore"),
        Kind("mindspore-aes-cbc", "a MindSpore checkpoint encrypted with AES-CBC", "mindspore"),
        Kind("mindspore-sm4-cbc", "a MindSpore checkpoint encrypted with SM4-CBC", "mindspore"),
        Kind("tar", "a tar archive", None, _UNPACK),
        Kind("gzip", "gzip-compressed data", None, _UNPACK),
        Kind("zstd", "zstd-compressed data", None, _UNPACK),
        Kind("xz", "xz-compressed data", None, _UNPACK),
        Kind("bzip2", "bzip2-compressed data", None, _UNPACK),
        Kind("gguf", "a GGUF file", "gguf"),
        Kind("hdf5", "an HDF5 file", None, "convert it to safetensors with Keras or TensorFlow"),
        Kind("npy", "a numpy .npy array", None, "save it with safetensors.numpy.save_file under its tensor name"),
        Kind("json", "a JSON text", None, "name the checkpoint or the directory that holds it, not its config"),
        Kind("html", "an HTML page", None, "download the file again: the server answered with a web page"),
        Kind("lfs-pointer", "a Git LFS pointer, not the file itself", None, "run git lfs pull in its repository"),
        Kind("empty", "an empty file", None, "make or download it again"),
        Kind("fifo", "a named pipe", None, "write it to a regular file first"),
        Kind("socket", "a socket", None, _NAME),
        Kind("device", "a device", None, _NAME),
        Kind("special file", "a special file", None, _NAME),
        Kind("unknown", "data of no known kind", None, "give a safetensors, torch zip or MindSpore .ckpt file"),
    )
}

# Magic bytes at offset 0. MindSpore's are the little-endian u32 before each encrypted block (mindspore 2.10).
_MAGICS: tuple[tuple[bytes, str], ...] = (
    (b"\xd8\x5e\x3a\x7f", "mindspore-aes-gcm"),
    (b"\xd9\x5e\x3a\x7f", "mindspore-aes-cbc"),
    (b"\xda\x5e\x3a\x7f", "mindspore-sm4-cbc"),
    (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e", "torch-legacy"),
    (b"GGUF", "gguf"),
    (b"\x89HDF\r\n\x1a\n", "hdf5"),
    (b"\x93NUMPY", "npy"),
    (b"\x1f\x8b\x08", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"BZh", "bzip2"),
    (b"version https://git-lfs.github.com/spec/", "lfs-pointer"),
)

# Protocols 1 to 5, and a dict or list in protocol 0 or 1 (Python's pickletools).
_PICKLES = (b"\x80\x01", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"(dp", b"(lp", b"}q", b"]q")


def identify(path: Path) -> Kind:
    """Return what a path holds, from its content and never from its name; pipes and devices are not opened.

    Raises InputError when nothing is there, StorageError when the system refuses.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise refused_by_system(error, path) from error
    except ValueError as error:
        raise InputError("the path holds a NUL character", where=shown(str(path)), hint="check the path") from error
    if not stat.S_ISREG(mode):
        return KINDS[file_kind(mode)]
    with open_regular(path) as file:
        size = size_of(file)
        head = _read(file, 0, min(size, HEAD))
        return KINDS[_content(head) if not head.startswith(b"PK") else _zip(file, head, size)]


def refusal(path: Path, kind: Kind) -> InputError:
    """Return the error for a file of a kind that is not read here: its real kind, its path, the cure."""
    return InputError(f"a checkpoint is needed, this is {kind.title}", where=shown(str(path)), hint=kind.cure or _NAME)


def _read(file: io.FileIO, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    return bytes(buffer[: pread_into(file, memoryview(buffer), offset)])


def _content(head: bytes) -> str:
    """Name the kind of a file that is no zip, from its first bytes."""
    if not head:
        return "empty"
    for magic, name in _MAGICS:
        if head.startswith(magic):
            return name
    if _is_safetensors(head):
        return "safetensors"
    if head.startswith(_PICKLES):
        return "pickle"
    if head[257:262] == b"ustar":
        return "tar"
    return _mindspore(head) or _text(head) or "unknown"


def _is_safetensors(head: bytes) -> bool:
    """Recognise a header length and the brace after it; a length beyond the limit counts before JSON alone."""
    if len(head) < 9 or head[8:9] != b"{":
        return False
    return int.from_bytes(head[:8], "little") <= MAX_HEADER or head[8:10] in (b'{"', b"{}")


def _text(head: bytes) -> str | None:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] in (b"{", b"["):
        if b'"parallel_layout_item"' in text or b'"parallel_strategy_item"' in text:
            return "mindspore-strategy-json"
        return "index" if b'"weight_map"' in text else "json"
    start = text[:64].lower()
    return "html" if start.startswith((b"<!doctype html", b"<html")) else None


def _varint(data: bytes, at: int) -> tuple[int, int] | None:
    """Decode a protobuf varint; return its value and the offset after it, or None where the bytes end."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            return None
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    return None


def _mindspore(head: bytes) -> str | None:
    """Tell MindSpore's protobuf files apart by their first fields.

    Weights (checkpoint.proto): ``0a len`` value { ``0a len`` tag, ``12 len`` tensor { ``08 dim``*, ``12 len`` type ...
    Groups have the same shape with rank numbers only; strategies (node_strategy.proto) start with a varint field.
    """
    if head[0] == 0x08:
        stage = _varint(head, 1)
        if stage is None:
            return None
        item = _varint(head, stage[1] + 1)
        alone = stage[1] == len(head)
        nested = head[stage[1] : stage[1] + 1] in (b"\x12", b"\x1a") and item and head[item[1] : item[1] + 1] == b"\x0a"
        return "mindspore-strategy" if alone or nested else None
    if head[0] != 0x0A:
        return None
    value = _varint(head, 1)
    if value is None:
        return None
    inner, at = head[value[1] : value[1] + 1], value[1]
    if inner in (b"\x12", b"\x1a"):
        return "mindspore"
    tag = _varint(head, at + 1) if inner == b"\x0a" else None
    if tag is None or tag[1] - at + tag[0] + 2 > value[0]:
        return None
    return _mindspore_tensor(head, tag[0] + tag[1])


def _mindspore_tensor(head: bytes, at: int) -> str | None:
    """Decide between weights and groups from the field after the first tag; beyond the head it counts as weights."""
    field = head[at : at + 1]
    if field not in (b"", b"\x12", b"\x1a"):
        return None
    length = _varint(head, at + 1)
    if field != b"\x12" or length is None:
        return "mindspore"
    at, end = length[1], length[1] + length[0]
    while at < end and head[at : at + 1] == b"\x08":
        dim = _varint(head, at + 1)
        if dim is None:
            return "mindspore"
        at = dim[1]
    return "mindspore-group" if at >= end else "mindspore"


def _zip(file: io.FileIO, head: bytes, size: int) -> str:
    """Tell torch checkpoints from TorchScript, npz and other archives by the names in the central directory."""
    if head[:4] not in (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08"):
        return _content(head)
    names = _directory_names(file, size)
    if not names and head[:4] == b"PK\x03\x04" and len(head) >= 30:  # truncated: the first record has to do
        names = [head[30 : 30 + int.from_bytes(head[26:28], "little")]]
        if b".data/" in names[0] or b".format_version" in names[0]:
            return "torch"
    parts = [name.split(b"/", 1)[-1] for name in names]
    if b"data.pkl" in parts:
        script = any(part == b"constants.pkl" or part.startswith(b"code/") for part in parts)
        return "torchscript" if script else "torch"
    return "npz" if any(name.endswith(b".npy") for name in names) else "zip"


def _directory_names(file: io.FileIO, size: int) -> list[bytes]:
    """List the names in a zip's central directory, [] where there is none (APPNOTE 4.3.12, 4.3.14, 4.3.16)."""
    start = max(0, size - 65557)
    tail = _read(file, start, size - start)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) < end + 22:
        return []
    length, offset = struct.unpack_from("<II", tail, end + 12)
    record = tail.rfind(b"PK\x06\x06", 0, end)
    if 0xFFFFFFFF in (length, offset) and 0 <= record <= len(tail) - 56:
        length, offset = struct.unpack_from("<QQ", tail, record + 40)
    if length > MAX_HEADER or offset > size:
        return []
    directory = _read(file, offset, min(length, size - offset))
    names, at = [], 0
    while directory[at : at + 4] == b"PK\x01\x02" and at + 46 <= len(directory):
        name, extra, comment = struct.unpack_from("<HHH", directory, at + 28)
        names.append(directory[at + 46 : at + 46 + name])
        at += 46 + name + extra + comment
    return names
