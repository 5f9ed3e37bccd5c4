"""Mistakes that conversions make, planted one by one: each must be found at every depth that can see it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from adapters import WIDTH, checked, configure, converted, edit, factor, notes, peft_adapter, stated, without_manifest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorabridge.errors import MappingError

Q, K, V = (f"layers.0.{name}_proj" for name in "qkv")
DEPTHS = ["tensors", "layers"]
BARE = {"facts": stated(alpha=8)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter of square modules, its conversion, and the same conversion without manifest."""
    folder = tmp_path_factory.mktemp("made")
    # of rank WIDTH too, so that every factor is square and its transpose fits
    peft_adapter(folder / "peft", r=4, rank_pattern={"v_proj": WIDTH}, alpha_pattern={"v_proj": 2 * WIDTH})
    converted(folder / "peft", folder / "out.ckpt")
    shutil.copy(folder / "out.ckpt", folder / "bare.ckpt")
    return folder


@pytest.fixture
def pair(made: Path, tmp_path: Path) -> Path:
    """A copy of that folder to damage."""
    shutil.copytree(made, tmp_path / "copy")
    return tmp_path / "copy"


def bare(folder: Path, *depths: str, **options: object):
    """Compare with the file that has no manifest; alpha and rank of v are stated."""
    from lorabridge.dialects.adapter import Fact, Facts

    facts = Facts((Fact("*v_proj", "alpha", 2 * WIDTH), Fact("*", "alpha", 8)))
    return checked(folder / "peft", folder / "bare.ckpt", *depths, **{"facts": facts, **options})


@pytest.mark.parametrize("depth", DEPTHS)
def test_without_a_mistake_nothing_is_found(pair: Path, depth: str) -> None:
    assert checked(pair / "peft", pair / "out.ckpt", depth).verdict == "equal"
    assert bare(pair, depth).verdict == "equal"


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("fields", [{"lora_alpha": 16}, {"lora_alpha": 8.01}, {"use_rslora": True}])
def test_wrong_scaling(pair: Path, depth: str, fields: dict[str, object]) -> None:
    configure(pair / "peft", **fields)
    for report in (checked(pair / "peft", pair / "out.ckpt", depth), bare(pair, depth)):
        assert report.verdict == "different"
        found = report.depth(depth)
        assert found is not None
        wrong = [row for row in found.modules if row.ok is False]
        assert {row.path for row in wrong} >= {Q, K}


def test_a_flipped_rslora_flag_is_called_by_its_name(pair: Path) -> None:
    configure(pair / "peft", use_rslora=True)
    assert "rsLoRA" in notes(bare(pair, "tensors"), "tensors")


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_wrong_stated_alpha(pair: Path, depth: str) -> None:
    assert bare(pair, depth, facts=stated(alpha=4)).verdict == "different"


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_and_b_exchanged_and_transposed(pair: Path, depth: str) -> None:
    """The shapes agree where the weight is square, the delta is its own transpose."""

    def swap(tensors: dict[str, np.ndarray]) -> None:
        a, b = tensors[factor(Q, "A")], tensors[factor(Q, "B")]
        tensors[factor(Q, "A")], tensors[factor(Q, "B")] = b.T, a.T

    edit(pair / "peft", swap)
    for report in (checked(pair / "peft", pair / "out.ckpt", depth), bare(pair, depth)):
        assert report.verdict == "different"
        assert Q in notes(report, depth)
    if depth == "tensors":
        assert "exchanged and transposed" in notes(bare(pair, depth), depth)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_and_b_exchanged_where_all_is_square(pair: Path, depth: str) -> None:
    def swap(tensors: dict[str, np.ndarray]) -> None:
        tensors[factor(V, "A")], tensors[factor(V, "B")] = tensors[factor(V, "B")], tensors[factor(V, "A")]

    edit(pair / "peft", swap)
    for report in (checked(pair / "peft", pair / "out.ckpt", depth), bare(pair, depth)):
        assert V in notes(report, depth)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_transposed_square_factor(pair: Path, depth: str, letter: str) -> None:
    edit(pair / "peft", lambda tensors: tensors.update({factor(V, letter): tensors[factor(V, letter)].T}))
    for report in (checked(pair / "peft", pair / "out.ckpt", depth), bare(pair, depth)):
        assert V in notes(report, depth)
    if depth == "tensors":
        assert f"lora_{letter} is transposed" in notes(bare(pair, depth), depth)


@pytest.mark.parametrize("depth", DEPTHS)
def test_query_and_key_exchanged(pair: Path, depth: str) -> None:
    def swap(tensors: dict[str, np.ndarray]) -> None:
        for letter in "AB":
            q, k = factor(Q, letter), factor(K, letter)
            tensors[q], tensors[k] = tensors[k], tensors[q]

    edit(pair / "peft", swap)
    for report in (checked(pair / "peft", pair / "out.ckpt", depth), bare(pair, depth)):
        assert report.verdict == "different"
        assert Q in notes(report, depth)
        assert K in notes(report, depth)
    if depth == "tensors":
        assert f"{Q}: holds what SRC has for {K}" in notes(bare(pair, depth), depth)


@pytest.mark.parametrize("depth", DEPTHS)
def test_one_module_missing(pair: Path, depth: str) -> None:
    edit(pair / "peft", lambda tensors: {n: t for n, t in tensors.items() if f".{K}." not in n})
    for report in (checked(pair / "peft", pair / "out.ckpt", depth), bare(pair, depth)):
        assert report.verdict == "different"
        assert f"{K}: only DST has this module" in notes(report, depth)


def test_half_a_module_missing_is_no_adapter(pair: Path) -> None:
    edit(pair / "peft", lambda tensors: {n: t for n, t in tensors.items() if n != factor(K, "B")})
    with pytest.raises(MappingError, match=r"does not fit together|missing"):
        checked(pair / "peft", pair / "out.ckpt", "tensors")


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan(pair: Path, depth: str, value: float) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[factor(Q, "B")][3, 1] = value

    edit(pair / "peft", spoil)
    for report in (checked(pair / "peft", pair / "out.ckpt", depth), bare(pair, depth)):
        assert report.verdict == "different"
        assert Q in notes(report, depth)
        assert "NaN" in notes(bare(pair, depth), depth)


def test_nan_on_both_sides_cannot_be_run(pair: Path) -> None:
    """The files agree bit for bit, which is said; that layers of NaN compute the same is not."""

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[factor(Q, "B")][3, 1] = np.nan

    edit(pair / "peft", spoil)
    converted(pair / "peft", pair / "nan.ckpt")
    files = checked(pair / "peft", pair / "nan.ckpt", "tensors")
    assert files.verdict == "equal"
    assert any("NaN" in row.note for row in files.depths[0].modules)
    assert checked(pair / "peft", pair / "nan.ckpt", "layers").verdict == "different"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_one_bit_changed_anywhere(pair: Path, data: st.DataObject) -> None:
    """Any bit of any tensor, on either side, with and without a manifest."""
    from lorabridge.conversion.repository import open_input

    name = data.draw(st.sampled_from(["peft/adapter_model.safetensors", "out.ckpt", "bare.ckpt"]))
    path = pair / name
    opened = open_input(path)
    extents = [extent for tensor in opened.source.specs for extent in opened.source.extents(tensor)]
    opened.source.close()
    extent = data.draw(st.sampled_from(extents))
    at = extent.offset + data.draw(st.integers(0, extent.length - 1))
    bit = data.draw(st.integers(0, 7))
    before = path.read_bytes()
    changed = bytearray(before)
    changed[at] ^= 1 << bit
    try:
        path.write_bytes(changed)
        reports = [bare(pair, "tensors")] if name != "out.ckpt" else []
        reports += [checked(pair / "peft", pair / "out.ckpt", "tensors")] if name != "bare.ckpt" else []
        assert [report.verdict for report in reports] == ["different"] * len(reports)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("field", ["alpha", "enable_lora"])
def test_a_changed_manifest(pair: Path, field: str) -> None:
    """Bits all agree, but what the target's manifest says of them does not."""
    import json

    path = pair / "out.ckpt.lorabridge.json"
    raw = json.loads(path.read_text())
    wanted = "alpha" if field == "alpha" else "rank"
    raw["facts"] = [[p, f, v * 2 if f == wanted == "alpha" else v] for p, f, v in raw["facts"]]
    if field != "alpha":
        raw["facts"].append(["*", "fan_in_fan_out", True])
    path.write_text(json.dumps(raw))
    report = checked(pair / "peft", pair / "out.ckpt", "tensors")
    assert report.verdict == "different"
    assert not {c.name: c.ok for c in report.depths[0].checks}["facts about the target"]


def test_a_manifest_of_another_conversion_is_told(pair: Path, tmp_path: Path) -> None:
    other = peft_adapter(tmp_path / "other", target_modules=["q_proj", "up"])
    converted(other, tmp_path / "other.ckpt")
    report = checked(pair / "peft", tmp_path / "other.ckpt", "tensors")
    assert report.verdict == "different"
    assert report.relation == "adapters"
    assert any("not SRC" in text for text in report.warnings)


def test_a_vector_beside_the_factors(tmp_path: Path) -> None:
    """DoRA's magnitudes and the bias of B count as well."""
    for option, name in (("use_dora", "lora_magnitude_vector"), ("lora_bias", "lora_B.bias")):
        folder = peft_adapter(tmp_path / option, **{option: True})
        target = without_manifest(converted(folder, tmp_path / f"{option}.ckpt"))

        def spoil(tensors: dict[str, np.ndarray], name: str = name) -> None:
            tensors[f"base_model.model.{Q}.{name}"][2] *= 1.001

        assert checked(folder, target, **BARE).verdict == "equal"
        edit(folder, spoil)
        report = checked(folder, target, **BARE)
        assert [report.depth(depth).ok for depth in DEPTHS] == [False, False]
        assert Q in notes(report, "layers")


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_config_changed_in_the_target(depth: str, tmp_path: Path) -> None:
    """peft reads the config beside the file, whatever the manifest says."""
    source = converted(peft_adapter(tmp_path / "peft"), tmp_path / "first.ckpt")
    (tmp_path / "first.ckpt.lorabridge.json").unlink()
    target = converted(source, tmp_path / "back", target_dialect="peft", **BARE)
    assert checked(source, target, depth, **BARE).verdict == "equal"
    configure(target, lora_alpha=4)
    report = checked(source, target, depth, **BARE)
    assert report.verdict == "different"
    assert Q in notes(report, depth)
