"""Broken and malicious torch archives: only InputError escapes, nothing runs, nothing hangs, nothing balloons."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import time
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge.errors import InputError
from lorabridge.formats.torchpickle import Unpickler
from lorabridge.formats.torchvalues import PickleError
from lorabridge.formats.torchzip import open_file

Files = list[tuple[str, bytes]]


def small_file() -> bytes:
    """A file by torch with a plain, a strided and an empty tensor and a value that is none."""
    buffer = io.BytesIO()
    base = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    torch.save({"a": base, "t": base.T, "e": torch.zeros(0), "u": torch.ones(1, dtype=torch.uint16), "n": 1}, buffer)
    return buffer.getvalue()


SMALL = small_file()


def records(data: bytes = SMALL) -> Files:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def pack(files: Files, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files:
            archive.writestr(zipfile.ZipInfo(name), data, compress_type=compression)
    return buffer.getvalue()


def replaced(**changes: bytes) -> bytes:
    """The small file with some records' bytes changed and right checksums."""
    return pack([(name, changes.get(name.partition("/")[2], data)) for name, data in records()])


def with_pickle(data: bytes, *stored: bytes) -> bytes:
    files = [("x/data.pkl", data), ("x/version", b"3\n"), ("x/byteorder", b"little")]
    return pack(files + [(f"x/data/{i}", payload) for i, payload in enumerate(stored)])


def content(data: bytes, path: Path) -> dict[str, bytes]:
    path.write_bytes(data)
    source = open_file(path)
    try:
        return {name: source.read(name).tobytes() for name in source.specs}
    finally:
        source.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.pt"


def refused(data: bytes, path: Path) -> str:
    with pytest.raises(InputError) as caught:
        content(data, path)
    assert str(path) in caught.value.text()
    return caught.value.text()


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return content(SMALL, tmp_path_factory.mktemp("honest") / "x.pt")


def test_the_small_file_itself_is_read(honest: dict[str, bytes]) -> None:
    assert list(honest) == ["a", "t", "e", "u"]
    assert honest["t"] == np.arange(6, dtype=np.float16).reshape(2, 3).T.tobytes()


def test_every_truncation_is_refused(path: Path) -> None:
    for length in range(len(SMALL)):
        refused(SMALL[:length], path)


def test_every_bit_flip_is_refused_or_harmless(path: Path, honest: dict[str, bytes]) -> None:
    directory = SMALL.index(b"PK\x01\x02")
    flips = [(at, 1 << at % 8) for at in range(directory)]
    flips += [(at, 1 << bit) for at in range(directory, len(SMALL)) for bit in range(8)]
    harmless = 0
    for at, bit in flips:
        data = bytearray(SMALL)
        data[at] ^= bit
        try:
            found = content(bytes(data), path)
        except InputError:
            continue
        assert found == honest, f"byte {at}, bit {bit} changes what is read"  # padding, dates, versions
        harmless += 1
    assert harmless < len(flips) / 2


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3))
@settings(deadline=None, max_examples=300)
def test_changed_pickles_with_right_checksums_raise_nothing_else(changes: list[tuple[int, int]]) -> None:
    data = bytearray(dict(records())["archive/data.pkl"])
    for at, value in changes:
        data[at % len(data)] = value
    with suppress(PickleError):
        Unpickler(bytes(data)).load()


@given(st.binary(max_size=60))
@settings(deadline=None, max_examples=300)
def test_random_pickles_raise_nothing_else(data: bytes) -> None:
    with suppress(PickleError):
        Unpickler(b"\x80\x02" + data + b".").load()


def test_changed_pickles_in_archives_raise_only_input_errors(path: Path) -> None:
    pkl = dict(records())["archive/data.pkl"]
    for at in range(len(pkl)):
        data = replaced(**{"data.pkl": pkl[:at] + bytes([pkl[at] ^ 1]) + pkl[at + 1 :]})
        with suppress(InputError):
            content(data, path)


# The zip directory


def zip_cases() -> dict[str, tuple[bytes, str]]:
    files = records()
    tensor = next(data for name, data in files if name.endswith("data/0"))
    encrypted = bytearray(pack(files))
    at = encrypted.index(b"PK\x01\x02")
    encrypted[at + 8] |= 1
    bomb = [(name, bytes(10**8) if name.endswith("data/0") else data) for name, data in files]
    plain = pack(files)
    return {
        "deflate bomb": (pack(bomb, zipfile.ZIP_DEFLATED), "compressed"),
        "lzma": (pack(files, zipfile.ZIP_LZMA), "compressed"),
        "encrypted": (bytes(encrypted), "encrypted"),
        "two top folders": (pack([*files, ("other/data/9", b"")]), "outside the folder"),
        "record at the top": (pack([*files, ("archive", b"")]), "outside the folder"),
        "parent in a name": (pack([*files, ("archive/../x", b"")]), "plain relative path"),
        "dot in a name": (pack([*files, ("archive/./x", b"")]), "plain relative path"),
        "absolute name": (pack([*files, ("/archive/x", b"")]), "plain relative path"),
        "empty part": (pack([*files, ("archive//x", b"")]), "plain relative path"),
        "directory": (pack([*files, ("archive/data/", b"")]), "plain relative path"),
        "backslash": (pack([*files, ("archive/a\\b", b"")]), "plain relative path"),
        "same name twice": (pack([*files, ("archive/data/0", tensor)]), "twice"),
        "other case": (pack([*files, ("archive/DATA.PKL", b"")]), "unexpected"),
        "unknown record": (pack([*files, ("archive/extra.py", b"import os")]), "unexpected"),
        "nested storage": (pack([*files, ("archive/data/0/1", b"")]), "unexpected"),
        "torchscript": (pack([*files, ("archive/code/__torch__.py", b"")]), "TorchScript"),
        "no pickle": (pack(files[1:]), "zip archive"),
        "no version": (pack([f for f in files if f[0] != "archive/version"]), "no version"),
        "odd version": (replaced(version=b"11"), "version"),
        "long version": (replaced(version=b"3" * 300), "too long"),
        "odd byte order": (replaced(byteorder=b"middle"), "byte order"),
        "text before": (b"#!/bin/sh\n" + SMALL, "no known kind"),
        "text after": (SMALL + b"<html>", "damaged"),
        "archive after": (SMALL + plain, "directory"),
        "archive before": (plain + SMALL, "zip64 end record"),
        "comment": (SMALL[:-2] + b"\x04\0evil", "does not end"),
        "short storage": (replaced(**{"data/0": tensor[:-1]}), "its storage 12"),
        "long storage": (replaced(**{"data/0": tensor + b"\0"}), "its storage 12"),
        "empty storage": (replaced(**{"data/0": b""}), "its storage 12"),
        "missing storage": (pack([f for f in files if f[0] != "archive/data/0"]), "data/0 is missing"),
        "empty zip": (b"PK\x05\x06" + bytes(18), "zip archive"),
        "empty file": (b"", "an empty file"),
    }


@pytest.mark.parametrize("case", list(zip_cases()))
def test_archives_that_are_not_as_torch_writes_them_are_refused(case: str, path: Path) -> None:
    data, problem = zip_cases()[case]
    start = time.perf_counter()
    assert problem in refused(data, path)
    assert time.perf_counter() - start < 1


def test_an_unreferenced_record_is_listed(path: Path) -> None:
    path.write_bytes(pack([*records(), ("archive/data/9", b"hidden")]))
    assert open_file(path).skipped == (("n", "an integer"), ("data/9", "a record that nothing refers to"))


def central(data: bytes, name: bytes) -> int:
    """Offset of a record's central directory entry."""
    return data.rindex(name) - 46


def patched(data: bytes, at: int, form: str, value: int) -> bytes:
    raw = struct.pack(form, value)
    return data[:at] + raw + data[at + len(raw) :]


@pytest.mark.parametrize("offset", [20, 24])
@pytest.mark.parametrize("value", [0, 11, 13, 10**6, 2**31, 2**32 - 1])
def test_sizes_in_the_directory_must_agree_with_the_file(offset: int, value: int, path: Path) -> None:
    at = central(SMALL, b"archive/data/0")
    refused(patched(SMALL, at + offset, "<I", value), path)
    both = patched(patched(SMALL, at + 20, "<I", value), at + 24, "<I", value)
    refused(both, path)


@pytest.mark.parametrize("value", [1, 64, 10**6, 2**31, 2**32 - 1])
def test_offsets_in_the_directory_must_point_at_their_local_headers(value: int, path: Path) -> None:
    refused(patched(SMALL, central(SMALL, b"archive/data/0") + 42, "<I", value), path)


def test_two_entries_over_the_same_bytes_are_refused(path: Path) -> None:
    one, other = central(SMALL, b"archive/data/0"), central(SMALL, b"archive/data/2")
    (header,) = struct.unpack_from("<I", SMALL, one + 42)
    refused(patched(SMALL, other + 42, "<I", header), path)


def test_a_local_header_inside_another_records_data_is_refused(path: Path) -> None:
    inner = struct.pack("<IHHHHHIIIHH", 0x04034B50, 0, 0, 0, 0, 0, zlib.crc32(b"in"), 2, 2, 14, 0) + b"archive/data/1in"
    files = [(name, inner if name.endswith("data/0") else data) for name, data in records()]
    data = pack(files)
    at = central(data, b"archive/data/1")
    for offset, value in ((16, zlib.crc32(b"in")), (20, 2), (24, 2), (42, data.index(inner))):
        data = patched(data, at + offset, "<I", value)
    assert "overlaps" in refused(data, path)


def test_descriptors_must_agree_with_the_directory(path: Path) -> None:
    at = SMALL.index(b"PK\x07\x08")
    for offset in (0, 4, 8, 12):
        refused(patched(SMALL, at + offset, "<I", 7), path)


@pytest.mark.parametrize(
    "field", [(4, "<Q", 45), (16, "<I", 1), (24, "<Q", 1), (32, "<Q", 2**40), (40, "<Q", 1), (48, "<Q", 2**63)]
)
def test_zip64_end_records_that_lie_are_refused(field: tuple[int, str, int], path: Path) -> None:
    at = SMALL.rindex(b"PK\x06\x06")
    refused(patched(SMALL, at + field[0], field[1], field[2]), path)


def test_zip64_end_records_elsewhere_are_refused(path: Path) -> None:
    at = SMALL.rindex(b"PK\x06\x07")
    for value in (0, 2**63, len(SMALL) - 97):
        refused(patched(SMALL, at + 8, "<Q", value), path)


@pytest.mark.parametrize(("sizes", "extra"), [
    ((2**32 - 1, 2**32 - 1), struct.pack("<HHQQ", 1, 16, 2**63, 2**63)),
    ((2**32 - 1, 2**32 - 1), struct.pack("<HHQQ", 1, 16, 12, 2**40)),
    ((2**32 - 1, 2**32 - 1), struct.pack("<HHQ", 1, 8, 12)),
    ((2**32 - 1, 2**32 - 1), b""),
    ((12, 12), struct.pack("<HHQQ", 1, 16, 12, 12)),
    ((12, 12), struct.pack("<HHQ", 1, 99, 12)),
    ((12, 12), b"\1"),
])  # fmt: skip
def test_zip64_fields_that_lie_are_refused(sizes: tuple[int, int], extra: bytes, path: Path) -> None:
    at = central(SMALL, b"archive/data/0")
    entry = patched(
        patched(patched(SMALL, at + 20, "<I", sizes[0]), at + 24, "<I", sizes[1]), at + 30, "<H", len(extra)
    )
    data = entry[: at + 60] + extra + entry[at + 60 :]
    end = data.rindex(b"PK\x06\x06")
    length = struct.unpack_from("<Q", data, end + 40)[0] + len(extra)
    data = patched(patched(data, end + 40, "<Q", length), data.rindex(b"PK\x06\x07") + 8, "<Q", end)
    refused(patched(data, len(data) - 10, "<I", length), path)


# Views


def view(
    offset: object = 0, shape: object = (2,), stride: object = (1,), numel: int = 4, dtype: str = "FloatStorage"
) -> bytes:
    """A pickle of {"w": tensor} over a storage of ``numel`` elements."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):  # type: ignore[name-defined,misc]
        def persistent_id(self, value: object) -> object:
            return ("storage", getattr(torch, dtype), "0", "cpu", numel) if isinstance(value, Storage) else None

    class Rebuild:
        def __reduce__(self) -> tuple[object, ...]:
            arguments = (Storage(), offset, shape, stride, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"w": Rebuild()})
    return buffer.getvalue()


@pytest.mark.parametrize(("arguments", "problem"), [
    ({"offset": 3}, "reaches byte 20 of a storage of 16"),
    ({"offset": 2**62}, "reaches byte"),
    ({"offset": -1}, "cannot be"),
    ({"offset": True}, "cannot be"),
    ({"offset": 2**80}, "cannot be"),
    ({"offset": 1.0}, "cannot be"),
    ({"offset": "0"}, "cannot be"),
    ({"shape": (5,)}, "reaches byte 20"),
    ({"shape": (-1,)}, "cannot be"),
    ({"shape": (2**62,), "stride": (0,)}, "too large"),
    ({"shape": (2**30,), "stride": (0,)}, "unfolds"),
    ({"shape": (2**40, 2**40), "stride": (0, 0)}, "too large"),
    ({"shape": (0, 2**62, 2**62), "stride": (1, 1, 1)}, "too large"),
    ({"shape": [2]}, "cannot be"),
    ({"shape": 2}, "cannot be"),
    ({"shape": (None,)}, "cannot be"),
    ({"stride": (-1,)}, "cannot be"),
    ({"stride": (4,)}, "reaches byte"),
    ({"stride": (2**62,)}, "reaches byte"),
    ({"stride": ()}, "1 dimensions with 0 strides"),
    ({"shape": (1,) * 33, "stride": (1,) * 33}, "33 axes"),
    ({"numel": 5}, "its storage 20"),
    ({"numel": 2**61}, "its storage"),
    ({"numel": -4}, "does not describe a storage"),
    ({"dtype": "DoubleStorage"}, "its storage 32"),
    ({"dtype": "QInt8Storage"}, "the element type qint8"),
])  # fmt: skip
def test_tensors_outside_their_storage_are_refused(arguments: dict[str, object], problem: str, path: Path) -> None:
    assert content(with_pickle(view(), bytes(16)), path) == {"w": bytes(8)}
    assert problem in refused(with_pickle(view(**arguments), bytes(16)), path)  # type: ignore[arg-type]


def test_one_storage_described_in_two_ways_is_refused(path: Path) -> None:
    for other in (view(dtype="IntStorage"), view(numel=3)):
        both = view()[:-1] + text("v") + other[2:-1] + b"s."  # {"w": tensor, "v": {"w": tensor}}
        assert "described in two ways" in refused(with_pickle(both, bytes(16)), path)


def test_keys_that_occur_twice_are_refused(path: Path) -> None:
    pkl = view()
    twice = pkl[:-2] + b"s" + pkl[pkl.index(b"X\1\0\0\0w") : -2] + b"s."
    assert "w occurs twice" in refused(with_pickle(twice, bytes(16)), path)
    nested = b"\x80\x02}X\1\0\0\0m" + pkl[2:-1] + b"sX\1\0\0\0m" + pkl[2:-1] + b"s."
    assert "twice" in refused(with_pickle(nested, bytes(16)), path)


# Pickles that want to run


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.parts = function, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.parts


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(module: str, name: str, *arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def stack_call(module: str, name: str, *arguments: bytes) -> bytes:
    return text(module) + text(name) + b"\x93(" + b"".join(arguments) + b"tR"


V2 = "torch._utils", "_rebuild_tensor_v2"


def payloads(canary: str) -> dict[str, bytes]:
    """Pickled values that would create the canary if anything in them ran."""
    shell = text(f"touch {canary}")
    python = text(f"open({canary!r}, 'w')")
    return {
        "os.system": call("os", "system", shell),
        "posix.system": call("posix", "system", shell),
        "nt.system": call("nt", "system", shell),
        "subprocess": call("subprocess", "check_call", shell, b"\x88"),
        "eval": call("builtins", "eval", python),
        "exec": call("builtins", "exec", python),
        "python 2 eval": call("__builtin__", "eval", python),
        "open": call("builtins", "open", text(canary), text("w")),
        "io.open": call("_io", "open", text(canary), text("w")),
        "getattr": call("builtins", "getattr", call("builtins", "__import__", text("os")), text("system")),
        "import": call("builtins", "__import__", text("os")),
        "dotted name": stack_call("builtins", "str.__class__.__subclasses__"),
        "dotted allowed name": stack_call("collections", "OrderedDict.__init__.__globals__"),
        "dotted module": stack_call("torch", "serialization.os.system", shell),
        "stack global": stack_call("os", "system", shell),
        "stack global, no strings": b"K\1K\2\x93)R",
        "torch.load": call("torch", "load", text(canary)),
        "torch.serialization.load": call("torch.serialization", "load", text(canary)),
        "torch.hub": call("torch.hub", "load", text("evil/repo"), text("model")),
        "torch.hub.load_state_dict_from_url": call("torch.hub", "load_state_dict_from_url", text("http://127.0.0.1:9")),
        "torch._inductor": call("torch._inductor.codecache", "_reload_python_module", text("m"), text(canary)),
        "torch.utils.collect_env": call("torch.utils.collect_env", "run", shell),
        "torch.fx": call("torch.fx.graph_module", "_forward_from_src", python, b"}"),
        "numpy": call("numpy.testing._private.utils", "runstring", python, b"}"),
        "runpy": call("runpy", "_run_code", python, b"}"),
        "pickle.loads": call("pickle", "loads", b"C\x01."),
        "marshal": call("types", "FunctionType"),
        "operator": call("operator", "attrgetter", text("system")),
        "functools": call("functools", "partial", b"cos\nsystem\n", shell),
        "ctypes": call("ctypes", "CDLL", text("libc.so.6")),
        "webbrowser": call("webbrowser", "open", text("http://127.0.0.1:9")),
        "nested in a call": call(*V2, call("os", "system", shell)),
        "nested in a key": b"}" + call("os", "system", shell) + b"K\1s",
        "nested in a state": b"ccollections\nOrderedDict\n)R}X\1\0\0\0a" + call("os", "system", shell) + b"sb",
        "as a storage type": text("storage") + b"cos\nsystem\n" + text("0") + text("cpu") + b"K\1tQ",
        "as a dtype": call("torch._utils", "_rebuild_tensor_v3", b"NK\0)))\x89NcOs\nsystem\n"),
        "as a subclass": call("torch._tensor", "_rebuild_from_type_v2", b"cos\nsystem\ncos\nsystem\n", shell, b"}"),
        "as a factory": call("collections", "defaultdict", b"cos\nsystem\n"),
        "instance opcode": b"(" + shell + b"ios\nsystem\n",
        "object opcode": b"(cos\nsystem\n" + shell + b"o",
        "new object": b"cos\nsystem\n" + shell + b"\x85\x81",
        "new object with keywords": b"cos\nsystem\n)}\x92",
        "extension": b"\x82\x01)R",
        "text persistent id": b"Pstorage\n",
        "next buffer": b"\x97",
        "numpy array of objects": call("numpy", "load", text(canary)),
        "dataclass": call("dataclasses", "make_dataclass", text("x"), b"]"),
        "yaml": call("yaml", "unsafe_load", python),
        "device through numpy": call("torch._utils", "_import_dotted_name", text("os.system")),
    }


@pytest.mark.parametrize("case", list(payloads("")))
@pytest.mark.parametrize("place", ["alone", "as a value", "beside a tensor", "in a skipped entry"])
def test_pickles_that_would_run_code_are_refused(case: str, place: str, path: Path) -> None:
    canary = path.with_name("canary")
    evil = payloads(str(canary))[case]
    tensor = view()[2:-2]  # leaves the dict and its key and value on the stack
    data = {
        "alone": b"\x80\x02" + evil + b".",
        "as a value": b"\x80\x02}" + text("w") + evil + b"s.",
        "beside a tensor": b"\x80\x02" + tensor + b"s" + text("x") + evil + b"s.",
        "in a skipped entry": b"\x80\x02}" + text("m") + tensor + b"ss" + text("x") + b"](" + evil + b"es.",
    }[place]
    refused(with_pickle(data, bytes(16)), path)
    assert not canary.exists()


ODD: list[bytes] = [
    b")",
    b"(tN",
    b"N\x85",
    b"(K\1K\2K\3K\4K\5K\6t",
    b"}\x85",
    b"]\x85",
    b"(NNNNNNt",
    b"N",
    b"K\1",
    b"]",
]
CALLED = [
    *V2, "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter", "torch.nn.parameter Parameter",
    "torch._utils _rebuild_parameter_with_state", "torch._tensor _rebuild_from_type_v2", "torch Size", "torch Tensor",
    "torch FloatStorage", "torch.storage UntypedStorage", "torch float32", "builtins int", "torch per_tensor_affine",
]  # fmt: skip


@pytest.mark.parametrize("function", [name.split() for name in CALLED if " " in name] + [list(V2)])
@pytest.mark.parametrize("opcode", [b"R", b"\x81"])
def test_allowed_names_with_odd_arguments_are_refused(function: list[str], opcode: bytes, path: Path) -> None:
    for arguments in ODD:
        name = "c{}\n{}\n".format(*function).encode()
        refused(with_pickle(b"\x80\x02}" + text("w") + name + arguments + opcode + b"s."), path)


@pytest.mark.parametrize(
    "target", [b"N", b"K\1", b"]", b")", text("x"), b"ctorch\nFloatStorage\n", view()[5:-2].rpartition(b"w")[2][2:]]
)
@pytest.mark.parametrize("opcode", [b"}b", b"]b", b"K\1a", b"K\1K\2s", b"(K\1K\2u", b"(K\1\x90"])
def test_only_containers_are_filled_and_only_mappings_have_a_state(target: bytes, opcode: bytes, path: Path) -> None:
    if (target, opcode) == (b"]", b"K\1a"):
        return
    refused(with_pickle(b"\x80\x02}" + text("w") + target + opcode + b"s.", bytes(16)), path)


def test_calls_of_inert_names_only_leave_their_name(path: Path) -> None:
    items = call("pathlib", "PosixPath", text("/etc"), text("passwd")) + call("argparse", "Namespace") + b"}b"
    pkl = view()[:-1] + text("x") + b"](" + items + b"es."
    path.write_bytes(with_pickle(pkl, bytes(16)))
    assert open_file(path).skipped == (("x", "a list of 2 values"),)


def test_real_training_arguments_are_refused_by_name(path: Path) -> None:
    torch.save({"w": torch.ones(1), "args": Call(os.getcwd)}, path)
    with pytest.raises(InputError, match=r"posix\.getcwd"):
        open_file(path)


# Pickles that want to exhaust


def doubling(levels: int) -> bytes:
    """A list that unfolds to 2 ** levels elements."""
    data = b"]q\0"
    for level in range(levels):
        data += b"](" + b"h" + bytes([level]) + b"h" + bytes([level]) + b"eq" + bytes([level + 1])
    return data


def exhausting() -> dict[str, Callable[[], bytes]]:
    million, deep = 10**6, 500_000
    return {
        "memo index": lambda: b"Nr\0\0\0\x40",
        "memo index, largest": lambda: b"Nr\xff\xff\xff\xff",
        "memo get": lambda: b"j\xff\xff\xff\x7f",
        "marks": lambda: b"(" * million,
        "marks closed": lambda: b"(" * million + b"t" * million,
        "nested tuples": lambda: b")" + b"\x85" * deep,
        "nested tuples as a key": lambda: b"})" + b"\x85" * deep + b"Ns",
        "nested lists": lambda: b"]" * deep + b"a" * (deep - 1),
        "nested dicts": lambda: b"}" + b"K\1}" * 200_000 + b"s" * 200_000,
        "nested ordered dicts": lambda: b"ccollections\nOrderedDict\nq\0)R" + b"K\1h\0)R" * 150_000 + b"s" * 150_000,
        "doubling lists": lambda: doubling(200),
        "doubling tuples": lambda: b")" + b"2\x86" * 100,
        "doubling tuples by memo": lambda: b")" + b"".join(b"q\0h\0h\0\x87" for _ in range(300)),
        "a list in itself": lambda: b"]q\0h\0a",
        "a dict in itself": lambda: b"}q\0K\1h\0s",
        "long integer": lambda: b"\x8b\xff\xff\xff\x7f",
        "negative length": lambda: b"\x8b\xff\xff\xff\xff",
        "large integer": lambda: b"\x8b" + struct.pack("<I", million) + b"\1" * million,
        "text integer": lambda: b"L" + b"9" * million + b"L\n",
        "long string": lambda: b"X\xff\xff\xff\xff",
        "longest string": lambda: b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff",
        "long bytes": lambda: b"\x8e\0\0\0\0\0\0\0\x10",
        "byte array": lambda: b"\x96\0\0\0\0\0\0\0\x10",
        "long frame": lambda: b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
        "long name": lambda: b"c" + b"a" * million,
        "a million names": lambda: b"ctorch\nSize\n" * 100_000,
        "a million sets": lambda: b"\x8f" * million,
        "a million puts": lambda: b"N" + b"\x94" * million,
        "large shape": lambda: b"ctorch\nSize\n(" + b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f" * 100_000 + b"t\x85R",
        "one large shape often": lambda: b"(" + b"K\1" * 30_000 + b"tq\0ctorch\nSize\nq\1" + b"h\1h\0\x85R" * 30_000,
        "one table often": lambda: (
            b"}q\0(" + b"NN" * 30_000 + b"u}(" + b"".join(text(str(i)) + b"h\0" for i in range(30_000)) + b"u"
        ),
        "one long key often": lambda: text("k" * million) + b"q\0}(" + b"h\0N" * 30_000 + b"u",
        "many dimensions": lambda: view(shape=(1,) * 100_000, stride=(1,) * 100_000)[2:-1],
    }


@pytest.mark.parametrize("case", list(exhausting()))
def test_pickles_cannot_exhaust_time_or_memory(case: str, path: Path) -> None:
    data = with_pickle(b"\x80\x02" + exhausting()[case]() + b".", bytes(16))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    refused(data, path)
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


def test_a_list_in_itself_beside_tensors_is_listed(path: Path) -> None:
    pkl = view()[:-1] + text("x") + b"]q\x63h\x63as."
    path.write_bytes(with_pickle(pkl, bytes(16)))
    assert open_file(path).skipped == (("x", "a list of 1 values"),)


def test_a_pickle_beyond_the_limit_is_refused_before_it_is_read(path: Path) -> None:
    data = with_pickle(b"\x80\x02}.", b"")
    with path.open("wb") as file:
        file.write(data)
    from lorabridge.formats import storedzip

    sizes = [("data.pkl", 65 * 2**20), ("version", 2)]
    placed, start, total = storedzip.place("x", sizes)
    with path.open("wb") as file:
        file.truncate(total)
        for record in placed:
            file.seek(record.header)
            file.write(storedzip.local_header(record.name, record.header, record.size))
            file.seek(record.offset + record.size)
            file.write(storedzip.descriptor(record))
        file.seek(placed[1].offset)
        file.write(b"3\n")
        file.seek(start)
        file.write(storedzip.directory(placed, start))
    with pytest.raises(InputError, match=r"data\.pkl has 68157440 bytes"):
        open_file(path)


def test_stacked_pickles_and_trailing_bytes_are_refused(path: Path) -> None:
    for extra in (b"\0", view(), b"."):
        assert "leaves something over" in refused(with_pickle(view() + extra, bytes(16)), path)
    assert "leaves something over" in refused(with_pickle(b"\x80\x02N" + view()[2:], bytes(16)), path)


def test_special_files_are_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.pt")
    for name in (tmp_path / "fifo.pt", tmp_path, Path("/dev/zero"), tmp_path / "missing.pt"):
        with pytest.raises(InputError):
            open_file(name)
