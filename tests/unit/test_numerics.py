"""The arithmetic kernels against exact rational arithmetic and against torch, numpy and ml_dtypes as judges."""

from __future__ import annotations

import math
import threading
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge import axes, inversion
from lorabridge.arithmetic import floats, numerics
from lorabridge.dtypes import BY_NAME, DTYPES
from lorabridge.errors import InputError, MappingError
from lorabridge.tensors import TensorSpec

FLOATS = ("float16", "bfloat16", "float32", "float64")
SMALL = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
modest = settings(deadline=None, max_examples=80)


def bits_of(values, dtype):
    return np.asarray(values, floats.arithmetic(BY_NAME[dtype])).view(BY_NAME[dtype].carrier())


def every(dtype):
    """All codes of a type of at most two bytes."""
    d = BY_NAME[dtype]
    return np.arange(1 << d.bits, dtype=np.uint32).astype(d.carrier())


def words(dtype, size=12):
    return st.lists(st.integers(0, (1 << BY_NAME[dtype].bits) - 1), min_size=1, max_size=size).map(
        lambda codes: np.array(codes, dtype=BY_NAME[dtype].carrier())
    )


def nearest(x: Fraction, dtype: str) -> Fraction | None:
    """Round an exact number to nearest even by the definition; None beyond the range."""
    if x == 0:
        return Fraction(0)
    layout = floats.LAYOUTS[dtype]
    exponent = 0
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    place = Fraction(2) ** (max(exponent, layout.least) - layout.mantissa)
    near = round(x / place) * place  # Fraction rounds half to even
    return None if abs(near) > Fraction(layout.largest) else near


def run(kernel_expr, sources, output="out", notes=None, residues=None):
    notes = numerics.Notes() if notes is None else notes
    return axes.evaluate(kernel_expr, sources.__getitem__, numerics.kernels(output, notes, residues or {}))


def spec(name, bits, dtype):
    return TensorSpec(name, BY_NAME[dtype], bits.shape)


@pytest.mark.parametrize("target", [*FLOATS[:3], *SMALL])
@given(x=st.floats(allow_nan=False, allow_infinity=False) | st.floats(-500, 500) | st.floats(-1e-6, 1e-6))
@modest
def test_float64_is_rounded_once_to_every_type(target, x):
    expected = nearest(Fraction(x), target)
    bits = bits_of([x], "float64")
    if expected is None:
        with pytest.raises(MappingError, match="not fit"):
            numerics.cast(bits, BY_NAME["float64"], BY_NAME[target])
        return
    made, note = numerics.cast(bits, BY_NAME["float64"], BY_NAME[target])
    assert Fraction(float(numerics.values(made, BY_NAME[target])[0])) == expected
    assert note.inexact == (expected != Fraction(x))


@pytest.mark.parametrize("target", [*FLOATS[:2], *SMALL])
@given(bits=words("float32"))
@modest
def test_float32_is_rounded_once_to_every_type(target, bits):
    exact = numerics.values(bits, BY_NAME["float32"])
    finite = [Fraction(float(x)) if math.isfinite(x) else None for x in exact]
    expected = [None if x is None else nearest(x, target) for x in finite]
    made, note = numerics.cast(bits, BY_NAME["float32"], BY_NAME[target], on_overflow="inf")
    for x, y, found in zip(exact, expected, numerics.values(made, BY_NAME[target]), strict=True):
        if math.isnan(x):
            assert math.isnan(found)
        elif y is None:
            assert abs(found) == math.inf or math.isnan(found)
        else:
            assert Fraction(float(found)) == y
    assert note.elements == bits.size
    if not np.isinf(exact).any():
        assert note.overflowed == sum(y is None and x is not None for x, y in zip(finite, expected, strict=True))


def test_double_rounding_case_that_libraries_get_wrong():
    x = 1.0 + 2.0**-8 + 2.0**-40  # just above a bfloat16 tie; float32 first makes it a tie, which falls to even
    made, _ = numerics.cast(bits_of([x], "float64"), BY_NAME["float64"], BY_NAME["bfloat16"])
    assert numerics.values(made, BY_NAME["bfloat16"])[0] == 1.0 + 2.0**-7
    assert float(np.float32(x).astype(ml_dtypes.bfloat16)) == 1.0


@pytest.mark.parametrize("target", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_casts_of_float32_agree_with_torch(target):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(7)
    x = np.concatenate([rng.standard_normal(20000), rng.standard_normal(20000) * 1e-3, [0.0, -0.0, 1e-30]])
    x = x.astype(np.float32)
    made, _ = numerics.cast(bits_of(x, "float32"), BY_NAME["float32"], BY_NAME[target])
    judge = torch.from_numpy(x).to(getattr(torch, target)).view(torch.uint8 if "8_" in target else torch.int16)
    assert made.tobytes() == judge.numpy().tobytes()


@pytest.mark.parametrize("source", ["float16", "bfloat16", *SMALL])
@pytest.mark.parametrize("wide", ["float32", "float64"])
def test_widening_every_code_and_narrowing_again_is_the_identity(source, wide):
    codes = every(source)
    there, note = numerics.cast(codes, BY_NAME[source], BY_NAME[wide])
    back, _ = numerics.cast(there, BY_NAME[wide], BY_NAME[source])
    assert back.tobytes() == codes.tobytes()
    assert note.inexact == 0
    reference = codes.view(floats.arithmetic(BY_NAME[source])).astype(np.float64)
    np.testing.assert_array_equal(numerics.values(there, BY_NAME[wide]), reference)


@given(bits=words("float32"))
@modest
def test_nan_payloads_and_signs_survive_float32_to_float64_and_back(bits):
    there, _ = numerics.cast(bits, BY_NAME["float32"], BY_NAME["float64"])
    back, _ = numerics.cast(there, BY_NAME["float64"], BY_NAME["float32"])
    assert back.tobytes() == bits.tobytes()


@pytest.mark.parametrize("target", ["float16", "bfloat16", *SMALL])
def test_nan_stays_nan_and_zero_keeps_its_sign(target):
    bits = np.array([0x7F800001, 0xFFC12345, 0x80000000], "<u4")
    made, _ = numerics.cast(bits, BY_NAME["float32"], BY_NAME[target])
    found = numerics.values(made, BY_NAME[target])
    assert np.isnan(found[:2]).all()
    assert found[2] == 0.0
    assert math.copysign(1, found[2]) == (1 if target.endswith("fnuz") else -1)


@pytest.mark.parametrize(
    ("target", "policy", "expected"),
    [
        ("float16", "saturate", 65504.0), ("float16", "inf", math.inf), ("bfloat16", "inf", math.inf),
        ("float8_e4m3fn", "saturate", 448.0), ("float8_e4m3fn", "inf", math.nan), ("float8_e5m2", "inf", math.inf),
        ("float8_e4m3fnuz", "saturate", 240.0), ("float8_e5m2fnuz", "inf", math.nan),
    ],
)  # fmt: skip
def test_overflow_policies(target, policy, expected):
    bits = bits_of([3.0e38 * 10, 1.0, -3.0e38 * 10], "float64")
    made, note = numerics.cast(bits, BY_NAME["float64"], BY_NAME[target], on_overflow=policy)
    found = numerics.values(made, BY_NAME[target])
    np.testing.assert_array_equal(found, [expected, 1.0, -expected])
    assert note.overflowed == 2


def test_overflow_error_counts_and_names_the_largest():
    bits = bits_of([70000.0, -8e4, 65519.0, math.inf], "float32")
    with pytest.raises(MappingError) as caught:
        numerics.cast(bits, BY_NAME["float32"], BY_NAME["float16"], where="h.0.lora_B")
    assert caught.value.problem.startswith("2 values do not fit float16")
    assert caught.value.where == ("h.0.lora_B: largest -80000",)
    assert "--on-overflow" in caught.value.hint


def test_infinity_needs_a_policy_only_where_the_type_has_none():
    bits = bits_of([math.inf, -math.inf], "float32")
    made, _ = numerics.cast(bits, BY_NAME["float32"], BY_NAME["bfloat16"])
    np.testing.assert_array_equal(numerics.values(made, BY_NAME["bfloat16"]), [math.inf, -math.inf])
    with pytest.raises(MappingError, match="2 values do not fit float8_e4m3fn"):
        numerics.cast(bits, BY_NAME["float32"], BY_NAME["float8_e4m3fn"])


def test_integers_are_converted_only_when_each_survives():
    small = np.array([0, 1, 255], np.uint8)
    made, _ = numerics.cast(small, BY_NAME["uint8"], BY_NAME["float16"])
    np.testing.assert_array_equal(numerics.values(made, BY_NAME["float16"]), small)
    big = np.array([2**53 + 1, 3], np.int64).view("<u8")
    with pytest.raises(MappingError, match="1 int64 values are not float64 values"):
        numerics.cast(big, BY_NAME["int64"], BY_NAME["float64"], where="ids")
    negative = np.array([-1], np.int8).view("u1")
    with pytest.raises(MappingError, match="1 int8 values are not uint64"):
        numerics.cast(negative, BY_NAME["int8"], BY_NAME["uint64"])
    with pytest.raises(MappingError, match="is not converted"):
        numerics.cast(bits_of([1.0], "float32"), BY_NAME["float32"], BY_NAME["int32"])
    flags, _ = numerics.cast(np.array([0, 1], "u1"), BY_NAME["bool"], BY_NAME["bfloat16"])
    assert flags.tolist() == [0, 0x3F80]


def test_every_pair_of_types_is_converted_or_refused_by_name():
    for source in DTYPES:
        for target in DTYPES:
            if source.bits % 8 or target.bits % 8 or source.kind in ("opaque", "text"):
                continue
            bits = np.zeros(3, source.carrier())
            try:
                made, _ = numerics.cast(bits, source, target)
            except MappingError:
                continue
            assert made.dtype == target.carrier()
            assert made.shape == (3,)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
@given(data=st.data(), factor=st.floats(1e-4, 1e4) | st.floats(-3, -1e-3) | st.sampled_from([0.5, 3.0, 1 / 3, 2 / 3]))
@settings(deadline=None, max_examples=25)
def test_scaling_is_one_rounding_of_the_exact_product_and_comes_back_bit_for_bit(dtype, target, data, factor):
    bits = data.draw(words(dtype))
    given_values = numerics.values(bits, BY_NAME[dtype])
    expr = axes.scale(axes.read(spec("w", bits, dtype)), factor, BY_NAME[target])
    notes = numerics.Notes()
    try:
        made = run(expr, {"w": bits}, "out", notes)
    except MappingError:
        assert any(nearest(Fraction(x) * Fraction(factor), target) is None for x in given_values if math.isfinite(x))
        return
    if isinstance(expr, axes.Compute) and expr.kernel == "scale":
        found = numerics.values(made, BY_NAME[target])
        for x, y in zip(given_values, found, strict=True):
            if math.isfinite(x):
                assert Fraction(float(y)) == nearest(Fraction(float(x)) * Fraction(factor), target)
            else:
                assert (math.isnan(x) and math.isnan(y)) or y == x * factor
    back = inversion.invert({"out": expr})
    if "w" in back.lost:  # factor 1 into a narrower type is a cast, which keeps no residue
        assert factor == 1.0
        return
    again = run(back.exprs["w"], {"out": made}, "w", residues=notes.residues)
    assert again.tobytes() == bits.tobytes()


def test_power_of_two_needs_no_residue_and_others_note_their_rounding():
    bits = bits_of(np.linspace(-3, 3, 97), "bfloat16")
    source = axes.read(spec("w", bits, "bfloat16"))
    notes = numerics.Notes()
    run(axes.scale(source, 0.25, BY_NAME["bfloat16"]), {"w": bits}, "exact", notes)
    run(axes.scale(source, 1 / 3, BY_NAME["float32"]), {"w": bits}, "rounded", notes)
    assert notes.residues == {}  # float32 has bits to spare for a bfloat16
    assert notes.rounding["exact"] == numerics.Rounding(0, 97, 0.0)
    assert 0 < notes.rounding["rounded"].inexact <= 97
    assert 0 < notes.rounding["rounded"].max_relative_error <= 2.0**-24


def test_a_residue_never_applies_to_bits_that_changed():
    bits = bits_of(np.linspace(-3, 3, 97), "float32")
    expr = axes.scale(axes.read(spec("w", bits, "float32")), 0.7, BY_NAME["float32"])
    notes = numerics.Notes()
    made = run(expr, {"w": bits}, "out", notes).copy()
    assert set(notes.residues) == {"out"}
    back = inversion.invert({"out": expr}).exprs["w"]
    made[0] ^= 1
    changed = run(back, {"out": made}, "w", residues=notes.residues)
    naive = numerics.unscaled(made, BY_NAME["float32"], 0.7, BY_NAME["float32"])
    assert changed.tobytes() == naive.tobytes()


def test_two_scaled_blocks_of_one_output_keep_their_own_residues():
    one, two = (bits_of(np.linspace(a, a + 1, 40), "float32") for a in (1.0, 5.0))
    sources = {"one": one, "two": two}
    parts = [axes.scale(axes.read(spec(n, b, "float32")), 0.3, BY_NAME["float32"]) for n, b in sources.items()]
    expr = axes.join(parts, 0)
    notes = numerics.Notes()
    made = run(expr, sources, "fused", notes)
    back = inversion.invert({"fused": expr}).exprs
    for name, bits in sources.items():
        assert run(back[name], {"fused": made}, name, residues=notes.residues).tobytes() == bits.tobytes()


def test_blocks_that_become_equal_are_refused():
    notes = numerics.Notes()
    notes.keep("out", b"d" * 16, b"one")
    notes.keep("out", b"d" * 16, b"one")
    with pytest.raises(MappingError, match="become equal"):
        notes.keep("out", b"d" * 16, b"")


@pytest.mark.parametrize("damage", ["cut", "junk", "length", "long"])
def test_damaged_residues_are_refused(damage):
    bits = bits_of(np.linspace(-3, 3, 97), "float32")
    expr = axes.scale(axes.read(spec("w", bits, "float32")), 0.7, BY_NAME["float32"])
    notes = numerics.Notes()
    made = run(expr, {"w": bits}, "out", notes)
    raw = notes.residues["out"]
    import zlib

    long = zlib.compress(bytes(5000))
    bad = {
        "cut": raw[:-3], "junk": raw[:24] + bytes(len(raw) - 24), "length": raw[:16] + b"\xff" * 8 + raw[24:],
        "long": raw[:16] + len(long).to_bytes(8, "little") + long,
    }[damage]  # fmt: skip
    with pytest.raises(InputError, match="residue"):
        run(inversion.invert({"out": expr}).exprs["w"], {"out": made}, "w", residues={"out": bad})


def test_notes_take_threads_and_forget_their_order():
    notes = numerics.Notes()
    work = [
        threading.Thread(target=lambda i=i: notes.add(f"t{i % 3}", numerics.Rounding(1, 2, i / 100))) for i in range(30)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert list(notes.rounding) == ["t0", "t1", "t2"]
    assert notes.rounding["t2"] == numerics.Rounding(10, 20, 0.29)


def test_compress_kernels_give_the_best_factors():
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((6, 20)), rng.standard_normal((15, 6))
    b[:, 4:] = b[:, :2]  # rank 4 + 2 dependent columns: still rank 6 in form, 4 in fact
    sources = {"a": bits_of(a, "float64"), "b": bits_of(b, "float64")}
    args = tuple(axes.read(spec(n, x, "float64")) for n, x in sources.items())
    f64 = BY_NAME["float64"]
    small_a = run(axes.Compute("compress_a", args, (("rank", 4),), "", f64, (4, 20)), sources)
    small_b = run(axes.Compute("compress_b", args, (("rank", 4),), "", f64, (15, 4)), sources)
    np.testing.assert_allclose(numerics.values(small_b, f64) @ numerics.values(small_a, f64), b @ a, atol=1e-12)
    sources["a"] = bits_of(np.full_like(a, np.nan), "float64")
    with pytest.raises(MappingError, match="not finite"):
        run(axes.Compute("compress_a", args, (("rank", 4),), "", f64, (4, 20)), sources)
