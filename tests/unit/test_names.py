from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabridge.names import Template, TemplateError, natural_key

LITERALS = ["a", "b", "ab", ".", "1", "a1", "0"]
PIECES = st.sampled_from([*LITERALS, "{i}", "{j}", "{c:a|b}", "{d:a|ab}", "{e:1|10}", "{f:0|x.y}", "{g:.|a.b}"])


def parsed(text: str) -> Template | None:
    try:
        return Template.parse(text)
    except TemplateError:
        return None


TEMPLATES = st.lists(PIECES, min_size=1, max_size=4).map("".join).map(parsed).filter(lambda t: t is not None)


def every_name(template: Template) -> list[str]:
    """Return the template's names with small integers."""
    ranges = [range(n) if n else (0, 1, 10, 11, 101) for n in template.holes.values()]
    return [template.fill(dict(zip(template.holes, values, strict=True))) for values in itertools.product(*ranges)]


@settings(deadline=None, max_examples=300)
@given(TEMPLATES)
def test_what_a_template_writes_it_reads_back(template: Template) -> None:
    for values in itertools.product(*[range(n) if n else (0, 7, 10, 999999999) for n in template.holes.values()]):
        bindings = dict(zip(template.holes, values, strict=True))
        assert template.match(template.fill(bindings)) == bindings


@settings(deadline=None, max_examples=300)
@given(TEMPLATES, st.text("ab.01xy", max_size=6))
def test_what_a_template_reads_it_writes_back(template: Template, name: str) -> None:
    bindings = template.match(name)
    if bindings is not None:
        assert template.fill(bindings) == name


@settings(deadline=None, max_examples=400)
@given(TEMPLATES, TEMPLATES)
def test_overlap_is_symmetric_and_found_wherever_a_common_name_exists(one: Template, two: Template) -> None:
    assert one.overlap(two) == two.overlap(one)
    assert one.overlap(one)
    common = any(two.match(name) is not None for name in every_name(one))
    if common:
        assert one.overlap(two)


SHORT_NAMES = ["".join(letters) for size in range(1, 6) for letters in itertools.product("ab1", repeat=size)]


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.sampled_from(["a", "b", "1", "{i}", "{c:a|b}", "{d:a|bb}"]), min_size=1, max_size=3).map("".join),
    st.lists(st.sampled_from(["a", "b", "1", "{j}", "{d:b|ab}"]), min_size=1, max_size=3).map("".join),
)
def test_overlap_claims_no_common_name_that_does_not_exist(first: str, second: str) -> None:
    one, two = parsed(first), parsed(second)
    if one is not None and two is not None and one.overlap(two):
        short = [name for name in SHORT_NAMES if one.match(name) is not None and two.match(name) is not None]
        long = [name for name in [*every_name(one), *every_name(two)] if one.match(name) and two.match(name)]
        assert short or long


@pytest.mark.parametrize(
    ("template", "name", "bindings"),
    [
        ("h.{i}.attn.c_attn", "h.11.attn.c_attn", {"i": 11}),
        ("h.{i}.x", "h.0.x", {"i": 0}),
        ("h.{i}.x", "h.01.x", None),
        ("h.{i}.x", "h.00.x", None),
        ("h.{i}.x", "h..x", None),
        ("h.{i}.x", "h.-1.x", None),
        ("h.{i}.x", "h.١.x", None),
        ("h.{i}.x", "h.1.x.y", None),
        ("h.{i}.x", "h.9999999999.x", None),
        ("ln.{t:weight|bias}", "ln.bias", {"t": 1}),
        ("ln.{t:weight|bias}", "ln.weigh", None),
        ("{p:w1|w10}.x", "w10.x", {"p": 1}),
        ("{p:a|ab}", "ab", {"p": 1}),
        ("plain", "plain", {}),
        ("plain", "plain2", None),
    ],
)
def test_matching(template: str, name: str, bindings: dict[str, int] | None) -> None:
    assert Template.parse(template).match(name) == bindings


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "1 to"),
        ("a" * 500, "1 to"),
        ("h.{i", "open brace"),
        ("h.i}", "character other"),
        ("h.*", "character other"),
        ("a b", "character other"),
        ("h.{}.x", "without a name"),
        ("h.{1:a|b}", "without a name"),
        ("h.{i}.{i}", "uses a hole twice"),
        ("h.{i}{j}", "two holes without text"),
        ("h.{i}0", "a digit after the integer"),
        ("{t:a|a}", "repeats an option"),
        ("{t:a|}", "empty or unreadable"),
        ("{t:a|a.b}.b", "begin alike"),
        ("{t:w|w.}.", "begin alike"),
    ],
)
def test_templates_that_could_be_read_in_two_ways_are_refused(text: str, problem: str) -> None:
    with pytest.raises(TemplateError, match=problem):
        Template.parse(text)


def test_filling_an_impossible_value_is_an_error() -> None:
    template = Template.parse("h.{i}.{t:a|b}")
    for bindings in ({}, {"i": 1}, {"i": -1, "t": 0}, {"i": 1, "t": 2}):
        with pytest.raises(ValueError, match="hole"):
            template.fill(bindings)


@settings(deadline=None)
@given(st.lists(st.text("ab0129.", max_size=8), unique=True))
def test_natural_keys_differ_where_names_differ(names: list[str]) -> None:
    assert len({natural_key(name) for name in names}) == len(names)


def test_natural_order() -> None:
    names = ["h.10.b", "h.2.b", "h.2.a", "h", "g.9", "h.02.a"]
    assert sorted(names, key=natural_key) == ["g.9", "h", "h.02.a", "h.2.a", "h.2.b", "h.10.b"]
