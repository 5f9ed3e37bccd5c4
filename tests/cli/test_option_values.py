from __future__ import annotations

import click
import pytest

from lorabridge.commands import _values
from lorabridge.commands._group import Manual, _complete_values
from lorabridge.dialects.adapter import FACT_FIELDS, Fact


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("5GiB", 5 * 2**30), ("5g", 5 * 10**9), ("1.5 MB", 1_500_000), ("1000", 1000),
     ("512MiB", 512 * 2**20), ("10B", 10), ("2TB", 2 * 10**12)],
)  # fmt: skip
def test_sizes_are_decimal_unless_binary_is_asked_for(text: str, nbytes: int) -> None:
    assert _values.Size().convert(text, None, None) == nbytes


@pytest.mark.parametrize("text", ["", "5XB", "GB", "-5GB", "1e9", "nan", "٥GB", "0", "0.1B", "5 G B"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        _values.Size().convert(text, None, None)


def test_every_fact_of_the_hub_has_an_option() -> None:
    assert set(_values.FACTS) == set(FACT_FIELDS)


def test_patterns_count_before_values_for_all_modules() -> None:
    found = _values.facts({"alpha": ["16", "layer.1.*=32"], "rank": ["*.value=4"]}.items())
    assert found.get("layer.0.query", "alpha") == 16
    assert found.get("layer.1.query", "alpha") == 32
    assert found.get("layer.0.value", "rank") == 4
    assert found.get("layer.0.query", "rank") is None


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [("alpha", "16", 16), ("alpha", "0.5", 0.5), ("alpha", "-1e-3", -1e-3), ("rank", "8", 8),
     ("enable_lora", "T,F,T", [True, False, True]), ("enable_lora", "true, false", [True, False]),
     ("kernel_size", "3,5", [3, 5]), ("kernel_size", "3", [3]), ("merged", "no", False), ("use_rslora", "yes", True),
     ("kind", "conv2d", "conv2d"), ("conv_form", "loralib", "loralib"), ("groups", "2", 2),
     ("out_features", "768", 768), ("as", "lora", "lora"), ("names_of", "sdxl", "sdxl"),
     ("alpha_in", "config", "config"), ("non_linearity", "gelu", "gelu"), ("cell", "m.prefix", "m.prefix"),
     ("fan_in_fan_out", "True", True)],
)  # fmt: skip
def test_statements_are_read_as_their_types(field: str, text: str, value: object) -> None:
    (entry,) = _values.facts({field: [text]}.items()).entries
    assert entry == Fact("*", field, value)
    assert type(entry.value) is type(value)


@pytest.mark.parametrize(
    ("field", "text"),
    [("alpha", "nan"), ("alpha", "inf"), ("alpha", "x"), ("alpha", ""), ("rank", "0"), ("rank", "-1"), ("rank", "1.5"),
     ("rank", "²"), ("enable_lora", ""), ("enable_lora", "T,,F"), ("kernel_size", "3x3"), ("merged", "maybe"),
     ("kind", "Linear"), ("conv_form", "other")],
)  # fmt: skip
def test_a_statement_that_cannot_be_read_names_its_option(field: str, text: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        _values.facts({field: [text]}.items())
    assert f"--{field.replace('_', '-')}" in caught.value.format_message()


def test_key_value_pairs() -> None:
    assert _values.pairs(["qkv=grouped", "a=b=c"], "--layout") == {"qkv": "grouped", "a": "b=c"}
    for bad in (["qkv"], ["=x"], ["x="], ["a=1", "a=2"]):
        with pytest.raises(click.BadParameter):
            _values.pairs(bad, "--layout")


def test_an_optional_value_is_told_from_the_next_argument() -> None:
    manual = Manual(optional={"--compress": (_values.is_tolerance_or_rank, "1e-6")})
    cases = [
        (["--compress", "SRC", "DST"], ["--compress=1e-6", "SRC", "DST"]),
        (["SRC", "DST", "--compress"], ["SRC", "DST", "--compress=1e-6"]),
        (["--compress", "8", "SRC"], ["--compress", "8", "SRC"]),
        (["--compress", "1e-3", "SRC"], ["--compress", "1e-3", "SRC"]),
        (["--compress", "0.01"], ["--compress", "0.01"]),
        (["--compress", "--", "8"], ["--compress=1e-6", "--", "8"]),
        (["--", "--compress"], ["--", "--compress"]),
    ]
    for given, expected in cases:
        assert _complete_values(given, manual) == expected


def test_a_misspelt_name_gets_the_nearest_one() -> None:
    with pytest.raises(click.BadParameter) as caught:
        _values.Name("dialect", lambda: ["peft", "loralib", "mindpet"]).convert("peff", None, None)
    assert "Did you mean peft?" in caught.value.format_message()


def test_names_complete() -> None:
    dialect = _values.Name("dialect", lambda: ["peft", "loralib", "loralib-ms"])
    items = dialect.shell_complete(click.Context(click.Command("x")), click.Option(["--to"]), "lora")
    assert [item.value for item in items] == ["loralib", "loralib-ms"]
