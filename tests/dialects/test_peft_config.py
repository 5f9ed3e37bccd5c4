"""adapter_config.json: the fields of real peft, its matching of patterns, and what is refused."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorabridge.dialects.adapter import Json
from lorabridge.dialects.peft_config import (
    DEFAULTS,
    KNOWN,
    read_settings,
    selected,
    unsupported_fields,
    warnings_of,
)
from lorabridge.dialects.peft_patterns import KeyTable, key_matches, pattern_matches
from lorabridge.errors import MappingError

PIECES = [
    "a",
    "b",
    "0",
    "-",
    ".",
    r"\.",
    r"\d",
    r"\w",
    r"\S",
    r"\-",
    "[ab]",
    "[^a]",
    "[a-b0]",
    "[]a]",
    r"[\d.]",
    "(",
    "(?:",
    "(?P<n>",
    ")",
    "|",
    "*",
    "+",
    "?",
    "{2}",
    "{1,2}",
    "{,1}",
    "{1,}",
    "^",
    "$",
    "{",
    "}",
    "é",
]
patterns = st.lists(st.sampled_from(PIECES), max_size=7).map("".join)
INITS = ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga")
paths = st.text(alphabet="ab0.-é\n", max_size=7)


def judged(match: Callable[[], bool]) -> bool | str:
    """Return whether something matches, or why it cannot be told."""
    try:
        return match()
    except re.error:
        return "invalid"
    except MappingError as error:
        return "unsupported" if "possessive" in error.problem or "extension" in error.problem else "invalid"


@settings(deadline=None, max_examples=700)
@given(patterns, paths)
@example("[^a][^a]$[^a]", "00\n")
def test_keys_match_exactly_where_peft_matches(key: str, path: str) -> None:
    from peft.utils.other import get_pattern_key

    class Asked(str):
        """A path that peft cannot confuse with the key it returns."""

    asked = Asked(path)
    ours = judged(lambda: key_matches(key, path))
    assert ours == "unsupported" or ours == judged(lambda: get_pattern_key([key], asked) is not asked)


literals = st.lists(st.sampled_from(["a", "b", "0", ".", r"\.", r"\-", "-", "q"]), max_size=5).map("".join)
literals = st.tuples(st.sampled_from(["", "^"]), literals, st.sampled_from(["", "$"])).map("".join)


@settings(deadline=None, max_examples=500)
@given(st.lists(literals | st.sampled_from([".*q", "a|b"]), max_size=6), st.lists(paths, min_size=1, max_size=6))
def test_a_table_of_keys_finds_what_each_key_matches(keys: list[str], names: list[str]) -> None:
    table = KeyTable(keys)
    for path in names:
        assert table.matching(path) == [key for key in keys if re.match(rf"(.*\.)?({key})$", path)]


@settings(deadline=None, max_examples=500)
@given(patterns, paths.map(lambda path: path.replace("\n", "1")))
def test_whole_patterns_match_exactly_where_re_matches(pattern: str, path: str) -> None:
    ours = judged(lambda: pattern_matches(pattern, path))
    assert ours == "unsupported" or ours == judged(lambda: re.fullmatch(pattern, path) is not None)


@pytest.mark.parametrize(
    "bomb",
    [
        "(a+)+b",
        "(a|a)*b",
        "(a|aa)+b",
        "(.*)*b",
        ".*.*.*.*.*.*.*.*.*.*b",
        "(a?){30}a{30}b",
        "((a*)*)*b",
        "(a|a)(a|a)" * 20,
    ],
)
def test_patterns_that_take_re_forever_take_no_time(bomb: str) -> None:
    start = time.process_time()
    assert key_matches(bomb, "a" * 300) is False
    assert pattern_matches(bomb, "a" * 300) is False
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("a" * 1001, "1001 characters"), ("(?=a)b", r"extension \(\?="), (r"(a)\1", r"uses \\1"), (r"\bq", r"uses \\b"),
        ("(?i)q", r"extension \(\?i"), ("a{900}{900}", "quantifier follows"), ("(a{900}){900}", "states"),
        ("((){999999}){999999}", "states"), ("(" * 60 + ")" * 60, "nested"), ("a)", "no '\\('"), ("(a", "no '\\)'"),
        ("[a", "too early"), ("*a", "nothing"), ("a++", "possessive"), ("[b-a]", "wrong way"), ("a{3,2}", "wrong way"),
    ],
)  # fmt: skip
def test_patterns_outside_the_subset_are_refused_by_name(pattern: str, words: str) -> None:
    with pytest.raises(MappingError, match=words):
        pattern_matches(pattern, "q")


def test_every_field_of_the_installed_peft_is_known_with_its_default() -> None:
    from peft import LoraConfig

    config = LoraConfig(target_modules=["q"]).to_dict()
    assert set(config) <= KNOWN
    assert {f.name for f in dataclasses.fields(LoraConfig)} <= KNOWN
    differing = {name for name, value in DEFAULTS.items() if config[name] != value}
    assert differing == {"inference_mode", "target_modules"}  # a saved config is for inference


def test_layer_selection_agrees_with_peft() -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    candidates = [
        "q",
        "layers.0.q",
        "layers.1.q",
        "m.layers.0.q",
        "m.layers.1.q",
        "m.layers.1.experts.0.q",
        "m.xq",
        "m.k",
    ]
    configs: list[dict[str, object]] = [
        {"target_modules": ["q"]},
        {"target_modules": ["layers.0.q"]},
        {"target_modules": ["m.layers.1.q", "k"]},
        {"target_modules": r"m\..*[qk]"},
        {"target_modules": ["q"], "layers_to_transform": [1]},
        {"target_modules": ["q"], "layers_to_transform": 0},
        {"target_modules": ["q"], "exclude_modules": ["layers.0.q"]},
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]},
        {"target_modules": ["q"], "exclude_modules": r".*layers\.1.*"},
        {"target_modules": ["m.layers.0.q"], "layers_to_transform": [1]},
    ]
    for config in configs:
        theirs = LoraConfig(**config)
        for path in candidates:
            found = check_target_module_exists(theirs, path)
            assert (path in selected(config, [path])) == (bool(found) and not isinstance(found, _ExcludedModule)), (
                config,
                path,
            )


def refusal(config: Json) -> MappingError:
    with pytest.raises(MappingError) as caught:
        read_settings(config, "adapter_config.json")
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("enable_lora", [True, False]),
    ],
)
def test_forms_of_lora_with_other_factors_are_refused_by_field(field: str, value: object) -> None:
    error = refusal({"peft_type": "LORA", field: value})
    assert any(place.startswith(field) for place in error.where)
    assert "merge" in error.hint
    assert read_settings({"peft_type": "LORA", field: None, "lora_alpha": 1}, "").alpha == 1


def test_unknown_fields_are_refused_when_set_and_carried_when_not() -> None:
    error = refusal(
        {"peft_type": "LORA", "lora_alpha": 8, "new_scaling": 3, "other": ["x"], "unset": None, "off": False}
    )
    assert [place.split()[0] for place in error.where[1:]] == ["new_scaling", "other"]
    assert refusal({"init_lora_weights": "brand_new"}).where[1].startswith("init_lora_weights")
    assert read_settings({"lora_alpha": 8, "unset": None, "off": False}, "").alpha == 8


@pytest.mark.parametrize("kind", ["LOHA", "ADALORA", "IA3", "lora", 3])
def test_other_tuners_are_refused_by_name(kind: object) -> None:
    assert repr(kind) in refusal({"peft_type": kind}).problem


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0), ("r", "8"), ("r", True), ("r", 2.0), ("lora_alpha", float("nan")), ("lora_alpha", float("inf")),
        ("lora_alpha", 10**400), ("lora_alpha", "16"), ("rank_pattern", ["q"]), ("rank_pattern", {"q": -1}),
        ("alpha_pattern", {"q": None}), ("use_dora", "yes"), ("use_rslora", 1), ("bias", "some"),
        ("modules_to_save", "head"), ("trainable_token_indices", {"emb": "1"}), ("trainable_token_indices", 3),
    ],
)  # fmt: skip
def test_values_of_a_wrong_type_are_refused_by_field(field: str, value: object) -> None:
    error = refusal({"lora_alpha": 8, field: value})
    assert any(place.startswith(field) for place in error.where)


def test_wrong_values_are_listed_together() -> None:
    assert len(refusal({"r": 0, "lora_alpha": "x", "bias": 1, "rank_pattern": {"a": 0, "b": 0}}).where) == 6


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"), ({"arrow_config": {"top_k": 2}}, "arrow_config"),
        ({"monteclora_config": {"num_samples": 8}}, "monteclora_config"),
        ({"velora_config": {"scale": 1}}, "velora_config"),
    ],
)  # fmt: skip
def test_fields_only_peft_understands_warn_and_are_listed_for_other_dialects(config: Json, field: str) -> None:
    assert [name for name, _ in unsupported_fields(config)] == [field]
    assert any(field in sentence for sentence in warnings_of(config))


@pytest.mark.parametrize("init", INITS)
def test_a_changed_base_is_warned_about_and_changes_no_delta(init: str) -> None:
    assert unsupported_fields({"init_lora_weights": init}) == []
    assert any("init_lora_weights" in sentence for sentence in warnings_of({"init_lora_weights": init}))


def test_ordinary_configs_have_nothing_unsupported() -> None:
    from peft import LoraConfig

    for init in (True, False, "gaussian", "eva", "orthogonal", "mica"):
        config = LoraConfig(target_modules=["q"], init_lora_weights=init, eva_config=None).to_dict()
        config["target_modules"] = ["q"]
        config["eva_config"] = None
        assert unsupported_fields(config) == []
        assert warnings_of(config) == []
    assert "layer_replication" in warnings_of({"layer_replication": [[0, 2], [1, 3]]})[0]
