"""The residue of a merge and its file: any bits come back, in few bytes, and only from the file that was written."""

from __future__ import annotations

import json
import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lorabridge.arithmetic import deltas
from lorabridge.arithmetic.entropy import MalformedError, entropy_bits
from lorabridge.arithmetic.floats import encode, rounded, values
from lorabridge.arithmetic.residue import extract, inverse, ordinals, pack, restore, unordinals
from lorabridge.dtypes import BY_NAME, DType
from lorabridge.errors import DifferentError, InputError, OutputError
from lorabridge.merging import undo as undo_module
from lorabridge.merging.undo import MAGIC, Checksum, Recorder, UndoFile, block_rows

TYPES = [BY_NAME[name] for name in ("bfloat16", "float16", "float32", "float64")]
by_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


def bits_of(numbers: np.ndarray, dtype: DType) -> np.ndarray:
    return encode(rounded(numbers, dtype), dtype)


def merged_bits(base: np.ndarray, delta: np.ndarray, dtype: DType) -> np.ndarray:
    with np.errstate(all="ignore"):
        return bits_of(values(base, dtype) + delta, dtype)


def usual(rows: int, columns: int, dtype: DType, *, strength: float = 1e-3) -> tuple[np.ndarray, deltas.Delta]:
    """Return a base of the usual size of numbers and an adapter of rank 16 whose delta is 1/20 of them."""
    rng = np.random.default_rng(rows)
    base = bits_of(rng.standard_normal((rows, columns)) * 0.02, dtype)
    a, b = rng.standard_normal((16, columns)), rng.standard_normal((rows, 16)) / 4
    return base, deltas.prepare([deltas.Factors(b * strength, a)], rows)


def there_and_back(base: np.ndarray, merged: np.ndarray, delta: np.ndarray | None, dtype: DType) -> np.ndarray:
    block = pack([extract(base, merged, delta, dtype)])
    return restore(block, merged, None if delta is None else lambda start, stop: delta[start:stop], dtype)


@by_type
def test_ordinals_keep_the_order_of_numbers_and_are_one_to_one(dtype: DType) -> None:
    numbers = np.array([-np.inf, -3.5, -1.0, -0.0, 0.0, 2.0**-14, 1.0, 3.5, np.inf])
    keys = ordinals(encode(numbers, dtype))
    assert (keys[1:] > keys[:-1]).all()
    every = np.arange(1 << 16, dtype=np.uint64).astype(dtype.carrier())
    if dtype.bits > 16:
        every = every * every.dtype.type(0x9E3779B97F4A7C15 & ((1 << dtype.bits) - 1))
    assert np.array_equal(unordinals(ordinals(every)), every)


@by_type
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_bits_come_back_from_any_merged_bits_and_any_delta(dtype: DType, data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(0, 7), st.integers(1, 9)))
    base, merged = (data.draw(hnp.arrays(dtype.carrier(), shape)) for _ in range(2))
    delta = data.draw(st.none() | hnp.arrays(np.float64, shape))
    if base.size:
        assert np.array_equal(there_and_back(base, merged, delta, dtype), base)


@by_type
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e6], ids=str)
def test_adversarial_values_come_back(dtype: DType, size: float) -> None:
    rng = np.random.default_rng(5)
    least = 1 if dtype.bits > 16 else 0
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 2.0, 0.5, 65504.0, 2.0**-14, 2.0**-24])
    base = encode(special, dtype)[rng.integers(0, special.size, (64, 96))]
    base[::7] = rng.integers(0, 1 << min(dtype.bits, 63), base[::7].shape, dtype=np.uint64).astype(base.dtype)
    base[::5] &= base.dtype.type(0x7F >> least)  # subnormals
    delta = rng.standard_normal(base.shape) * size
    delta[:, ::3] = 0.0
    delta[:, 1::9] = -0.0
    merged = merged_bits(base, delta, dtype)
    assert np.array_equal(there_and_back(base, merged, delta, dtype), base)
    assert np.array_equal(there_and_back(base, merged, None, dtype), base)


@by_type
def test_the_sign_of_a_zero_delta_does_not_matter(dtype: DType) -> None:
    merged = encode(np.array([[0.0, -0.0, 1.0, -1.0]]), dtype)
    zero = np.zeros(merged.shape)
    assert np.array_equal(inverse(merged, zero, dtype)[0], merged)
    assert np.array_equal(inverse(merged, -zero, dtype)[0], merged)


@by_type
def test_blocks_do_not_depend_on_how_rows_were_handed_in(dtype: DType) -> None:
    base, delta = usual(96, 64, dtype)
    added = delta.rows(0, 96)
    merged = merged_bits(base, added, dtype)
    whole = pack([extract(base, merged, added, dtype)])
    cuts = [0, 1, 17, 18, 60, 96]
    parts = [extract(base[i:j], merged[i:j], added[i:j], dtype) for i, j in pairwise(cuts)]
    assert pack(parts) == whole


@by_type
@pytest.mark.parametrize("strength", [1e-3])
def test_a_real_sized_matrix_is_kept_in_less_than_its_residues_entropy(dtype: DType, strength: float) -> None:
    base, delta = usual(2048, 2048, dtype, strength=strength)
    size, steps = 0, []
    for start in range(0, 2048, 512):
        rows = slice(start, start + 512)
        added = delta.rows(start, start + 512)
        merged = merged_bits(base[rows], added, dtype)
        block = pack([extract(base[rows], merged, added, dtype)])
        near = inverse(merged, added, dtype)[0]
        steps.append(ordinals(base[rows]) - ordinals(near))
        size += len(block)
    entropy = entropy_bits(np.concatenate(steps)) / 8
    assert size <= 1.3 * entropy
    assert size <= 0.95 * entropy, "contexts save more than they cost"
    assert size <= 0.02 * base.nbytes


def test_pruned_weights_cost_little() -> None:
    dtype = BY_NAME["bfloat16"]
    base, delta = usual(512, 1024, dtype)
    base[np.random.default_rng(0).random(base.shape) < 0.5] = 0
    added = delta.rows(0, 512)
    block = pack([extract(base, merged_bits(base, added, dtype), added, dtype)])
    assert len(block) < 0.03 * base.nbytes


def test_an_unchanged_tensor_costs_nothing() -> None:
    base, _ = usual(512, 1024, TYPES[0])
    assert len(pack([extract(base, base, None, TYPES[0])])) < 50


def test_other_merged_bits_are_noticed_or_give_other_bits() -> None:
    dtype = TYPES[0]
    base, delta = usual(64, 128, dtype)
    added = delta.rows(0, 64)
    merged = merged_bits(base, added, dtype)
    block = pack([extract(base, merged, added, dtype)])
    with pytest.raises(MalformedError):
        restore(block, merged, lambda start, stop: 1.5 * added[start:stop], dtype)
    with pytest.raises(MalformedError):
        restore(b"", merged, lambda start, stop: added[start:stop], dtype)
    with pytest.raises(MalformedError):
        restore(struct.pack("<I", 1 << 31) + block[4:], merged, lambda start, stop: added[start:stop], dtype)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut tensors into blocks of 26 rows."""
    monkeypatch.setattr(undo_module, "BLOCK", 26 * 900 * 2)


def recorded(path: Path, order: str = "forward") -> tuple[np.ndarray, np.ndarray, deltas.Delta]:
    """Write an undo file of one delta tensor of several blocks, one replaced tensor and one raw one."""
    dtype = TYPES[0]
    base, delta = usual(70, 900, dtype)
    added = delta.rows(0, 70)
    merged = merged_bits(base, added, dtype)
    recorder = Recorder(path)
    recorder.expect("w", dtype, base.shape, "delta", delta="d1")
    recorder.expect("head", dtype, (70, 30, 30), "near")
    recorder.expect("other", dtype, base.shape, "raw")
    starts = list(range(0, 70, 11))
    if order == "backward":
        starts.reverse()
    for start in starts:
        rows = slice(start, start + 11)
        recorder.take("w", start, base[rows], merged[rows], added[rows])
    recorder.take("head", 0, base, merged, None)
    step = block_rows(base.shape, dtype)
    for start in range(0, 70, step):
        recorder.keep("other", start, base[start : start + step])
    recorder.write({"adapter": "x"}, overwrite=True)
    recorder.close()
    return base, merged, delta


@pytest.mark.usefixtures("small_blocks")
def test_a_file_gives_every_tensor_back_and_checks_it(tmp_path: Path) -> None:
    base, merged, delta = recorded(tmp_path / "u")
    undo = UndoFile(tmp_path / "u")
    assert undo.facts["adapter"] == "x"
    assert undo.tensors["w"].delta == "d1"
    assert {name: len(kept.sizes) for name, kept in undo.tensors.items()} == {"w": 3, "head": 3, "other": 3}
    for name, kept in undo.tensors.items():
        seen = Checksum()
        for number, (start, stop) in reversed(list(enumerate(kept.spans()))):
            part = None if kept.mode == "raw" else merged[start:stop]
            back = undo.restore(name, number, part, lambda i, j, at=start: delta.rows(at + i, at + j))
            assert np.array_equal(back, base[start:stop])
            seen.add(number, back, part)
        seen.check(kept, "u")


@pytest.mark.usefixtures("small_blocks")
def test_the_file_does_not_depend_on_the_order_of_rows(tmp_path: Path) -> None:
    recorded(tmp_path / "a")
    recorded(tmp_path / "b", "backward")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.usefixtures("small_blocks")
def test_digests_tell_a_changed_base_from_a_changed_merged_tensor(tmp_path: Path) -> None:
    base, merged, _ = recorded(tmp_path / "u")
    kept = UndoFile(tmp_path / "u").tensors["w"]
    for which, match in (("base", "restored tensor is not"), ("merged", "merged tensor is not")):
        seen = Checksum()
        for number, (start, stop) in enumerate(kept.spans()):
            parts = {"base": base[start:stop].copy(), "merged": merged[start:stop].copy()}
            parts[which][0, 0] ^= 1
            seen.add(number, parts["base"], parts["merged"])
        with pytest.raises(DifferentError, match=match):
            seen.check(kept, "u")


def test_rows_that_were_not_noted_are_a_defect(tmp_path: Path) -> None:
    base, _ = usual(8, 8, TYPES[0])
    recorder = Recorder(tmp_path / "u")
    recorder.expect("w", TYPES[0], (9, 8), "near")
    recorder.take("w", 0, base, base, None)
    with pytest.raises(ValueError, match="rows of w"):
        recorder.write({}, overwrite=False)
    recorder.close()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_not_replaced_unasked(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "u")
    recorder.write({}, overwrite=False)
    with pytest.raises(OutputError):
        recorder.write({}, overwrite=False)
    recorder.write({}, overwrite=True)
    recorder.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("undo") / "u"
    base, delta = usual(40, 64, TYPES[0])
    recorder = Recorder(path)
    added = delta.rows(0, 40)
    recorder.expect("w", TYPES[0], base.shape, "delta", delta="d")
    recorder.take("w", 0, base, merged_bits(base, added, TYPES[0]), added)
    recorder.write({}, overwrite=False)
    recorder.close()
    return path.read_bytes()


def test_truncated_files_are_refused(file: bytes, tmp_path: Path) -> None:
    for size in range(0, len(file), 13):
        (tmp_path / "u").write_bytes(file[:size])
        with pytest.raises(InputError):
            UndoFile(tmp_path / "u")
    (tmp_path / "u").write_bytes(file + b"\0")
    with pytest.raises(InputError):
        UndoFile(tmp_path / "u")


def test_files_with_a_flipped_bit_are_refused(file: bytes, tmp_path: Path) -> None:
    for at in range(0, len(file), 5):
        broken = bytearray(file)
        broken[at] ^= 1 << (at % 8)
        (tmp_path / "u").write_bytes(broken)
        with pytest.raises(InputError):
            UndoFile(tmp_path / "u")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": 1}, {"rows": -1}, {"rows": True}, {"shape": [40, -64]}, {"shape": [1 << 50, 1]}, {"shape": "x"},
        {"sizes": []}, {"sizes": [1 << 40]}, {"sizes": [1.5]}, {"mode": "magic"}, {"dtype": "float1"}, {"name": None},
    ],
    ids=str,
)  # fmt: skip
def test_headers_that_lie_are_refused_though_their_checksum_fits(
    file: bytes, tmp_path: Path, change: dict[str, object]
) -> None:
    import hashlib

    start = len(MAGIC) + 8
    (length,) = struct.unpack("<Q", file[len(MAGIC) : start])
    header = json.loads(file[start : start + length])
    for key, value in change.items():
        if value is None:
            del header["tensors"][0][key]
        else:
            header["tensors"][0][key] = value
    text = json.dumps(header).encode()
    made = MAGIC + struct.pack("<Q", len(text)) + text + file[start + length : -32]
    (tmp_path / "u").write_bytes(made + hashlib.sha256(made).digest())
    with pytest.raises(InputError):
        UndoFile(tmp_path / "u")


def test_directories_pipes_and_missing_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", Path("/dev/null")):
        with pytest.raises(InputError):
            UndoFile(path)
