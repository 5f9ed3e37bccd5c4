"""Broken and malicious safetensors files: every one is refused with an InputError that names the file."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorabridge.errors import InputError
from lorabridge.formats.safetensors import open_file


def encode(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


SMALL = encode(
    {
        "__metadata__": {"format": "pt"},
        "a": entry(0, 8, [2], "F32"),
        "b": entry(8, 8, [0, 3], "F16"),
        "c": entry(8, 9, []),
    },
    b"123456789",
)


def content(path: Path) -> object:
    """Read a file the way a conversion does: headers, then every tensor."""
    source = open_file(path)
    try:
        return {
            name: (spec.dtype.safetensors, spec.shape, source.read(name).tobytes())
            for name, spec in source.specs.items()
        }
    finally:
        source.close()


def judge(data: bytes) -> object:
    """Read the same bytes with the safetensors library."""
    return {
        name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in safetensors.deserialize(data)
    }


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for length in range(len(SMALL)):
        (tmp_path / "w").write_bytes(SMALL[:length])
        with pytest.raises(InputError) as caught:
            open_file(tmp_path / "w")
        assert str(tmp_path / "w") in caught.value.where[0]
        assert caught.value.hint


def test_every_appended_byte_is_refused(tmp_path: Path) -> None:
    for tail in (b"\0", b" ", b"PK\5\6" + bytes(18), b"<html></html>"):
        (tmp_path / "w").write_bytes(SMALL + tail)
        with pytest.raises(InputError, match="take 9 bytes"):
            open_file(tmp_path / "w")


def test_every_flipped_bit_of_the_header_is_refused_or_means_what_the_library_says(tmp_path: Path) -> None:
    header = 8 + int.from_bytes(SMALL[:8], "little")
    original = judge(SMALL)
    refused = 0
    for position in range(header * 8):
        data = bytearray(SMALL)
        data[position // 8] ^= 1 << position % 8
        (tmp_path / "w").write_bytes(data)
        try:
            found = content(tmp_path / "w")
        except InputError:
            refused += 1
            continue
        assert found == judge(bytes(data))
        assert found != original or b"__metadata__" in data
    assert refused > header * 8 * 0.8


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(7),
        bytes(8),
        (7).to_bytes(8, "little") + b"{",
        (100_000_001).to_bytes(8, "little") + b"{}",
        (2**63).to_bytes(8, "little") + b"{}",
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        encode(b"[]"),
        encode(b"null"),
        encode(b" {}"),
        encode(b"\xef\xbb\xbf{}"),
        encode(b"{"),
        encode(b"{}x"),
        encode(b"{}\0\0"),
        encode(b'{"\xff":1}'),
        encode(b"[" * 200_000),
        encode(b'{"a":' * 200_000),
        encode(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ],
)
def test_a_header_that_is_none_is_refused_at_once(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(data)
    start = time.process_time()
    with pytest.raises(InputError):
        open_file(tmp_path / "w")
    assert time.process_time() - start < 0.5


ENTRIES = {
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "an overlap"),
    "same bytes": ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "an overlap"),
    "hole": ({"a": entry(0, 2), "b": entry(3, 4)}, 4, "a hole"),
    "hole at the start": ({"a": entry(1, 2)}, 2, "a hole"),
    "missing bytes": ({"a": entry(0, 4)}, 3, "take 4 bytes, 3 follow"),
    "more bytes": ({"a": entry(0, 4)}, 5, "take 4 bytes, 5 follow"),
    "no tensors, but bytes": ({}, 1, "take 0 bytes, 1 follow"),
    "reversed": ({"a": entry(4, 0, [4])}, 4, "ascending"),
    "negative": ({"a": entry(-4, 0, [4])}, 4, "ascending"),
    "fraction": ({"a": {**entry(0, 4), "data_offsets": [0, 4.0]}}, 4, "ascending"),
    "boolean": ({"a": {**entry(0, 1, []), "data_offsets": [False, True]}}, 1, "ascending"),
    "three offsets": ({"a": {**entry(0, 4), "data_offsets": [0, 2, 4]}}, 4, "ascending"),
    "huge offset": ({"a": entry(0, 2**64, [4])}, 4, "ascending"),
    "short dims": ({"a": entry(0, 4, [3])}, 4, "does not fill"),
    "long dims": ({"a": entry(0, 4, [4000])}, 4, "does not fill"),
    "width": ({"a": entry(0, 4, [4], "F32")}, 4, "does not fill"),
    "overflow to zero": ({"a": entry(0, 0, [2**32, 2**32])}, 0, "larger than any file"),
    "overflow to four": ({"a": entry(0, 4, [2**62, 4, 1])}, 4, "larger than any file"),
    "zero times huge": ({"a": entry(0, 0, [0, 2**62, 4])}, 0, "larger than any file"),
    "negative dims": ({"a": entry(0, 4, [-2, -2])}, 4, "no list of sizes"),
    "text dims": ({"a": {**entry(0, 4), "shape": "4"}}, 4, "no list of sizes"),
    "true dims": ({"a": {**entry(0, 1), "shape": [True]}}, 1, "no list of sizes"),
    "rank": ({"a": entry(0, 1, [1] * 33)}, 1, "33 axes"),
    "half a byte": ({"a": entry(0, 2, [3], "F4")}, 2, "inside a byte"),
    "unknown type": ({"a": entry(0, 4, [4], "Q8")}, 4, "Q8 is unknown"),
    "type is a list": ({"a": {**entry(0, 4), "dtype": ["U8"]}}, 4, "is unknown"),
    "extra field": ({"a": {**entry(0, 4), "strides": [1]}}, 4, "does not consist"),
    "missing field": ({"a": {"dtype": "U8", "shape": [4]}}, 4, "does not consist"),
    "entry is a list": ({"a": [0, 4]}, 4, "does not consist"),
    "empty name": ({"": entry(0, 4)}, 4, "name is empty"),
    "long name": ({"n" * 4097: entry(0, 4)}, 4, "4097 bytes"),
    "surrogate name": ({"\ud800": entry(0, 4)}, 4, "lone surrogate"),
    "metadata number": ({"__metadata__": {"a": 1}}, 0, "strings to strings"),
    "metadata nested": ({"__metadata__": {"a": {}}}, 0, "strings to strings"),
    "metadata surrogate": ({"__metadata__": {"a": "\udfff"}}, 0, "lone surrogate"),
    "metadata size": ({"__metadata__": {"a": "x" * (16 * 2**20)}}, 0, "are allowed"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_a_lying_entry_is_refused(case: str, tmp_path: Path) -> None:
    header, size, problem = ENTRIES[case]
    (tmp_path / "w").write_bytes(encode(header, bytes(size)))
    with pytest.raises(InputError, match=problem) as caught:
        open_file(tmp_path / "w")
    assert str(tmp_path / "w") in caught.value.where[0]


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\\u0061":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
        b'{"__metadata__":{"k":"1","k":"2"},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"__metadata__":{},"__metadata__":{},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,-Infinity]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1e0]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,' + b"1" * 5000 + b"]}}",
    ],
)
def test_json_that_readers_disagree_about_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(encode(text, b"x"))
    with pytest.raises(InputError):
        open_file(tmp_path / "w")


def test_every_lying_entry_is_listed(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(encode({f"t{i}": entry(i, i + 1, [2]) for i in range(40)}, bytes(40)))
    with pytest.raises(InputError) as caught:
        open_file(tmp_path / "w")
    assert len(caught.value.where) == 40
    assert "30 more" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["\x1b[2J\x1b[31m", "\u202eevil", "a\nhint: all is well", "\0", "\u2028", "x" * 4096, " "]
)
def test_names_that_steer_a_terminal_are_escaped_in_messages_and_exact_in_specs(name: str, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(encode({name: entry(0, 1, [2])}, b"x"))
    with pytest.raises(InputError) as caught:
        open_file(tmp_path / "bad")
    (place,) = caught.value.where
    assert place.isprintable()
    assert len(place) < 600
    (tmp_path / "good").write_bytes(encode({name: entry(0, 1, [1])}, b"x"))
    assert list(open_file(tmp_path / "good").specs) == [name]


def test_a_file_that_shrinks_after_opening_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_bytes(SMALL)
    source = open_file(path)
    with open(path, "r+b") as file:
        file.truncate(len(SMALL) - 4)
    with pytest.raises(InputError, match="ended early"):
        source.read("a")


def test_a_header_of_more_tensors_than_allowed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorabridge.formats.untrusted.MAX_TENSORS", 50)
    (tmp_path / "w").write_bytes(encode({f"t{i}": entry(i, i + 1) for i in range(60)}, bytes(60)))
    with pytest.raises(InputError, match="more than 50"):
        open_file(tmp_path / "w")


NUMBERS = st.integers(0, 9) | st.sampled_from([-1, 2**31, 2**32, 2**62, 2**63, 2**64, 1.0, True, None, "1"])
LIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "F4", "BOOL", "F6_E2M3", "C64", "u8", ""]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=1, max_size=3),
    }
)
TRUTHS = st.integers(0, 4).map(lambda length: entry(0, length))


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "", "__metadata__"]), LIES | TRUTHS, max_size=3),
    size=st.integers(0, 9),
)
def test_nothing_is_accepted_that_the_library_reads_differently(header: object, size: int, tmp_path: Path) -> None:
    data = encode(header, bytes(range(size)))
    (tmp_path / "w").write_bytes(data)
    try:
        found = content(tmp_path / "w")
    except InputError:
        return
    assert found == judge(data)


@pytest.mark.slow
def test_a_header_of_a_million_tensors_stays_within_bounds(tmp_path: Path) -> None:
    header = ",".join(f'"t{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(1_100_000))
    (tmp_path / "w").write_bytes(encode(b"{" + header.encode() + b"}"))
    del header
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    source = open_file(tmp_path / "w")
    assert time.process_time() - start < 30
    assert len(source.specs) == 1_100_000
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 1500
