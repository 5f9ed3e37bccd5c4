"""MindSpore checkpoints made by hand: each is read right or refused by name, and nothing else ever happens."""

from __future__ import annotations

import pickle
import struct
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore.train.checkpoint_pb2 import Checkpoint

from lorabridge.errors import InputError
from lorabridge.formats import msckpt

FOUR = np.arange(4, dtype=np.float32).tobytes()


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def dims_of(dims: Sequence[int]) -> bytes:
    return b"".join(b"\x08" + varint(dim % 2**64) for dim in dims)


def tensor(dims: Sequence[int] = (4,), kind: str = "Float32", content: bytes = FOUR) -> bytes:
    return dims_of(dims) + field(2, kind.encode()) + field(3, content)


def value(tag: str | bytes, body: bytes) -> bytes:
    return field(1, field(1, tag if isinstance(tag, bytes) else tag.encode()) + field(2, body))


def record(tag: str | bytes = "w", dims: Sequence[int] = (4,), kind: str = "Float32", content: bytes = FOUR) -> bytes:
    return value(tag, tensor(dims, kind, content))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.ckpt"


def opened(path: Path, data: bytes) -> msckpt.CkptSource:
    path.write_bytes(data)
    return msckpt.open_file(path)


def contents(path: Path, data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    source = opened(path, data)
    found = {n: (s.dtype.name, s.shape, source.read(n).tobytes()) for n, s in source.specs.items()}
    source.close()
    return found


W = {"w": ("float32", (4,), FOUR)}
PADDING = field(15, bytes(27))

READ = {
    "plain": (record(), W),
    "two values in one message": (record("a") + record("b"), {"a": W["w"], "b": W["w"]}),
    "packed dims": (value("w", field(1, b"\x02\x02") + tensor(())), {"w": ("float32", (2, 2), FOUR)}),
    "packed and unpacked dims": (value("w", field(1, b"\x02") + tensor((2,))), {"w": ("float32", (2, 2), FOUR)}),
    "dims after the content": (value("w", tensor(()) + dims_of((4,))), W),
    "fields in reverse": (value("w", field(3, FOUR) + field(2, b"Float32") + dims_of((4,))), W),
    "tag after tensor": (field(1, field(2, tensor()) + field(1, b"w")), W),
    "varint longer than needed": (record().replace(b"\x08\x04", b"\x08\x84\x00").replace(b"\x12\x1d", b"\x12\x1e")
                                  .replace(b"\x0a\x22", b"\x0a\x23"), W),
    "unknown fields everywhere": (
        field(2, b"normal") + varint(1000 << 3) + b"\x05"
        + field(1, field(1, b"w") + field(2, PADDING + tensor() + field(9, b"x")) + varint(7 << 3 | 5) + bytes(4))
        + varint(15 << 3 | 1) + bytes(8) + field(1000, b"{}"),
        W,
    ),
    "scalar": (record(dims=(), content=FOUR[4:8]), {"w": ("float32", (), FOUR[4:8])}),
    "legacy scalar with dims [0]": (record(dims=(0,), content=FOUR[4:8]), {"w": ("float32", (), FOUR[4:8])}),
    "empty tensor": (record(dims=(0,), content=b""), {"w": ("float32", (0,), b"")}),
    "empty matrix": (record(dims=(0, 4), content=b""), {"w": ("float32", (0, 4), b"")}),
    "slices": (record(content=FOUR[:8]) + record(content=FOUR[8:]), W),
    "slices ending inside an element": (record(content=FOUR[:10]) + record(content=FOUR[10:]), W),
    "everything and then empty slices": (record() + record(content=b"") + record(content=b""), W),
    "unequal shrinking slices": (record(content=FOUR[:8]) + record(content=FOUR[8:12]) + record(content=FOUR[12:]), W),
    "type as MindNLP 0.4.1 wrote it": (record(kind="mindspore.float32"), W),
    "bfloat16 spelled so": (record(kind="mindspore.bfloat16", dims=(8,)), {"w": ("bfloat16", (8,), FOUR)}),
    "bool spelled so": (record(kind="mindspore.bool_", dims=(1,), content=b"\1"), {"w": ("bool", (1,), b"\1")}),
    "text": (record(dims=(0,), kind="str", content="aé".encode("utf-32-le")),
             {"w": ("text", (2,), "aé".encode("utf-32-le"))}),
    "name with a parameter key": (record("x.__param_key__3") + record("x"),
                                  {"x.__param_key__3": W["w"], "x": W["w"]}),
    "name of 1024 characters": (record("é" * 1024), {"é" * 1024: W["w"]}),
    "random_op as a name": (record("random_op"), {"random_op": W["w"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_what_is_unusual_is_read_right(path: Path, case: str) -> None:
    data, expected = READ[case]
    assert contents(path, data) == expected


@pytest.mark.parametrize("case", READ)
def test_protobuf_reads_the_same(case: str) -> None:
    data, expected = READ[case]
    parsed = Checkpoint()
    parsed.ParseFromString(data)
    assert list(dict.fromkeys(v.tag for v in parsed.value)) == list(expected)
    joined = {tag: b"".join(v.tensor.tensor_content for v in parsed.value if v.tag == tag) for tag in expected}
    assert joined == {tag: content for tag, (_, _, content) in expected.items()}


def test_mindspore_loads_the_same_from_what_it_can_load(path: Path) -> None:
    changed = {"empty tensor", "name with a parameter key"}  # it makes a scalar; it loses one of two
    for case, (data, expected) in READ.items():
        if case in changed or "spelled so" in case or "MindNLP" in case or "text" in case:
            continue
        path.write_bytes(data)
        loaded = ms.load_checkpoint(str(path))
        assert {n: (tuple(p.shape), p.get_bytes()) for n, p in loaded.items()} == {
            n: (shape, content) for n, (_, shape, content) in expected.items()
        }, case


REFUSED = {
    "content too short": (record(content=FOUR[:8]), "needs 16 bytes, the file holds 8"),
    "content much too short": (record(dims=(10**6,), content=FOUR[:8]), "needs 4000000 bytes, the file holds 8"),
    "content too long": (record(dims=(3,)), "needs 12 bytes, the file holds 16"),
    "content cut inside an element": (record(content=FOUR[:-1]), "needs 16 bytes, the file holds 15"),
    "no content where some is due": (record(content=b""), "needs 16 bytes, the file holds 0"),
    "content where none is due": (record(dims=(0, 4)), "needs 0 bytes, the file holds 16"),
    "scalar of 16 bytes": (record(dims=()), "needs 4 bytes, the file holds 16"),
    "legacy scalar of 16 bytes": (record(dims=(0,)), "needs 4 bytes, the file holds 16"),
    "size beyond 64 bits": (record(dims=(2**62, 2**62)), "too large"),
    "size of 2**64 + 16 bytes": (record(dims=(2**31 - 1,) * 5), "too large"),
    "empty but beyond 64 bits": (record(dims=(0, 2**62, 2**62), content=b""), "too large"),
    "size that wraps to the content's": (record(dims=(2**62 + 4,)), "too large"),
    "negative axis": (record(dims=(-4,)), "negative"),
    "two negative axes": (record(dims=(-2, -2)), "negative"),
    "33 axes": (record(dims=(1,) * 33), "axes"),
    "packed 33 axes": (value("w", field(1, b"\1" * 33) + tensor(())), "axes"),
    "packed axis cut off": (value("w", field(1, b"\x84") + tensor(())), "cut off"),
    "unknown type": (record(kind="Float33"), "type Float33 is not known"),
    "type in lower case": (record(kind="float32"), "not known"),
    "no type at all": (value("w", dims_of((4,)) + field(3, FOUR)), "no type"),
    "type of no letters": (record(kind=""), "not known"),
    "no content field": (value("w", dims_of((4,)) + field(2, b"Float32")), "no content"),
    "no tensor": (field(1, field(1, b"w")), "no tensor"),
    "no tag": (field(1, field(2, tensor())), "no tag"),
    "empty record": (field(1, b""), "no tag"),
    "empty tag": (record(""), "tag is empty"),
    "tag not UTF-8": (record(b"\xff\xfe"), "not UTF-8"),
    "tag with a surrogate": (record(b"\xed\xa0\x80"), "not UTF-8"),
    "tag of 1025 characters": (record("n" * 1025), "1025 characters"),
    "tag of a megabyte": (record("n" * 2**20), "1048576 bytes"),
    "two tags": (field(1, field(1, b"a") + field(1, b"w") + field(2, tensor())), "the tag is given twice"),
    "two tensors": (field(1, field(1, b"w") + field(2, tensor()) * 2), "the tensor is given twice"),
    "two types": (value("w", tensor() + field(2, b"Int32")), "the type is given twice"),
    "two contents": (value("w", tensor() + field(3, FOUR)), "the content is given twice"),
    "the same name twice in a row": (record() + record(), "used 2 times"),
    "the same name thrice in a row": (record() * 3, "used 3 times"),
    "an empty tensor twice": (record(dims=(0, 4), content=b"") * 2, "used 2 times"),
    "a text twice": (record(dims=(0,), kind="str", content=bytes(4)) * 2, "used 2 times"),
    "the same name apart": (record() + record("b") + record(), "used twice"),
    "slices apart": (record(content=FOUR[:8]) + record("b") + record(content=FOUR[8:]), "holds 8"),
    "a slice missing": (record(content=FOUR[:4]) + record(content=FOUR[12:]), "a slice is missing"),
    "a slice too many": (record(content=FOUR[:8]) + record(content=FOUR[8:]) * 2, "a slice too many"),
    "the last slice first": (record(content=FOUR[12:]) + record(content=FOUR[:12]), "another order"),
    "an empty slice first": (record(content=b"") + record(), "another order"),
    "slices of other shapes": (record(content=FOUR[:8]) + record(dims=(2, 2), content=FOUR[8:]), "differ"),
    "slices of other types": (record(content=FOUR[:8]) + record(kind="Int32", content=FOUR[8:]), "differ"),
    "text of 5 bytes": (record(dims=(0,), kind="str", content=b"abcde"), "5 bytes"),
    "text of a shape": (record(dims=(4,), kind="str"), "text has shape"),
    "hash table": (field(1, field(1, b"w") + field(3, field(1, tensor()) * 3)), "MapParameter"),
    "random state": (record("random_op", dims=(0,), kind="random_op"), "random state"),
    "dims as text": (value("w", b"\x09" + bytes(8) + tensor()), "wire type 1"),
    "content as a number": (value("w", tensor()[:-18] + b"\x18\x05"), "wire type 0"),
    "tag as a number": (field(1, b"\x08\x05" + field(2, tensor())), "wire type 0"),
    "group": (record() + b"\x63" + b"\x64", "wire type 3"),
    "field 0": (record() + field(0, b"x"), "field number"),
    "field 2**29": (record() + varint(2**29 << 3) + b"\0", "field number"),
    "a number of 11 bytes": (record() + b"\x10" + b"\x80" * 10 + b"\x01", "64 bits"),
    "a number above 64 bits": (record() + b"\x10" + b"\xff" * 9 + b"\x02", "64 bits"),
    "a length of 2**63": (b"\x0a" + varint(2**63) + record()[2:], "more than the"),
    "a tag longer than its record": (field(1, b"\x0a\x7fw" + field(2, tensor())), "more than the"),
    "a content longer than its tensor": (
        value("w", tensor()[:-17] + b"\x12" + FOUR) + bytes(40),
        "more than the field",
    ),
    "bytes after the last record": (record() + b"\0", "field number"),
    "only unknown fields": (field(5, b"abc"), "no parameter record"),
    "checksum beyond 32 bits": (record() + b"crc_num" + b"\1" * 10, "32 bits"),
    "half a trailer": (record() + b"crc_num" + bytes(6), "wire type 3"),
    "two trailers": (record() + b"crc_num" + bytes(10) + b"crc_num" + bytes(10), "wire type 3"),
    "many fields in a record": (field(1, field(1, b"w") + b"\x20\0" * 2000 + field(2, tensor())), "fields"),
    "many fields in a tensor": (value("w", tensor() + b"\x20\0" * 2000), "fields"),
    "many fields in the file": (record() + b"\x20\0" * 2000, "fields"),
}


NAMELESS = {
    "no tag", "empty record", "empty tag", "tag not UTF-8", "tag with a surrogate", "tag of 1025 characters",
    "tag of a megabyte", "two tags", "two tensors", "tag as a number", "group", "field 0", "field 2**29",
    "a number of 11 bytes", "a number above 64 bits", "a length of 2**63", "a tag longer than its record",
    "bytes after the last record", "only unknown fields", "checksum beyond 32 bits", "half a trailer", "two trailers",
    "many fields in a record", "many fields in the file",
}  # fmt: skip
"""What is wrong before, beside or in the name of a tensor."""


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_by_file_and_tensor(path: Path, case: str) -> None:
    data, words = REFUSED[case]
    with pytest.raises(InputError) as error:
        opened(path, data)
    text = str(error.value)
    assert words in text
    assert str(path) in error.value.where[0]
    assert error.value.hint
    assert ("tensor " in error.value.where[0]) == (case not in NAMELESS)


def test_all_wrong_tensors_are_listed_at_once(path: Path) -> None:
    data = b"".join(record(f"t{i}", dims=(5,)) for i in range(12)) + record("fine")
    with pytest.raises(InputError, match="12 tensors") as error:
        opened(path, data)
    assert len(error.value.where) == 12
    assert all(f"tensor t{i}," in place for i, place in enumerate(error.value.where))


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"\x08\x00\x12\x04\x0a\x02ab", "strategy"),
        (pickle.dumps({"w": 1}, protocol=2), "pickle"),
        (pickle.dumps({"w": 1}, protocol=4), "pickle"),
        (struct.pack("<Q", 2) + b"{}", "safetensors"),
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"\0" * 100, "0 is not a field number"),
    ],
    ids=["strategy", "pickle2", "pickle4", "safetensors", "empty", "html", "zeros"],
)
def test_other_files_are_named_for_what_they_are(path: Path, head: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        opened(path, head)


def test_a_zip_is_named(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    with pytest.raises(InputError, match="zip"):
        msckpt.open_file(path)


def test_missing_files_and_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        msckpt.open_file(tmp_path / "none.ckpt")
    with pytest.raises(InputError, match="directory"):
        msckpt.open_file(tmp_path)


def outcome(path: Path, data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Return all tensors, or None where the file is refused; any other exception fails the test."""
    try:
        return contents(path, data)
    except InputError:
        return None


SMALL = (
    record("model.a", (2, 2))
    + record("b", (), "BFloat16", b"\x80\x3f")
    + record("c", (4,), "Float32", FOUR[:8])
    + record("c", (4,), "Float32", FOUR[8:])
    + record("größe", (0, 3), "Int8", b"")
    + record("note", (0,), "str", "hi".encode("utf-32-le"))
)
TRAILER = b"crc_num" + bytes(6) + b"\x12\x34\x56\x78"


@pytest.mark.parametrize("end", [b"", TRAILER], ids=["plain", "crc"])
def test_truncation_is_refused_at_every_byte_but_between_records(path: Path, end: bytes) -> None:
    data = SMALL + end
    whole = outcome(path, data)
    assert whole is not None
    ends, at = [], 0
    while at < len(SMALL):
        at += 2 + SMALL[at + 1]  # every record is shorter than 128 bytes
        ends.append(at)
    inside_c = ends[2]  # here one of the two slices is missing
    for cut in range(len(data)):
        found = outcome(path, data[:cut])
        if cut in ends and cut != inside_c:
            assert found is not None, cut
            assert found.items() <= whole.items()
        else:
            assert found is None, cut


@pytest.mark.parametrize("end", [b"", TRAILER], ids=["plain", "crc"])
def test_no_flipped_bit_does_more_than_refuse(path: Path, end: bytes) -> None:
    data = SMALL + end
    refused = 0
    for at in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[at] ^= 1 << bit
            found = outcome(path, bytes(changed))
            refused += found is None
            for dtype, shape, raw in (found or {}).values():
                assert len(raw) == int(np.prod(shape)) * msckpt.BY_NAME[dtype].itemsize
    assert refused > 4 * len(data)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_mutation_does_more_than_refuse(path: Path, data: st.DataObject) -> None:
    changed = bytearray(SMALL + data.draw(st.sampled_from([b"", TRAILER])))
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(changed)))
        stop = data.draw(st.integers(start, min(len(changed), start + 20)))
        changed[start:stop] = data.draw(st.binary(max_size=20) | st.just(bytes(changed[start:stop]) * 2))
    outcome(path, bytes(changed))


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_refuse(path: Path, data: bytes) -> None:
    outcome(path, data)
    outcome(path, field(1, data))
    outcome(path, value("w", data))


def test_megabytes_of_tiny_fields_are_refused_at_once(path: Path) -> None:
    start = time.process_time()
    for data in (b"\x20\0" * 10**6, field(1, b"\x20\0" * 10**6), value("w", b"\x20\0" * 10**6),
                 value("w", b"\x08\1" * 10**6), value("w", field(1, b"\1" * 10**6)), b"\x0a\0" * 10**6):  # fmt: skip
        assert outcome(path, data) is None
    assert time.process_time() - start < 2


def test_a_declared_terabyte_is_not_allocated(path: Path) -> None:
    with pytest.raises(InputError, match="more than the"):
        opened(path, b"\x0a" + varint(2**40 + 50) + b"\x0a\x01w\x12" + varint(2**40 + 40))
    with pytest.raises(InputError, match="holds 16"):
        opened(path, record(dims=(2**38,)))
