"""Decoder families: names and shapes of both sides, the way there and back, and the merge square, for every layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest

from lorabridge import axes, inversion
from lorabridge.dialects.adapter import Adapter
from lorabridge.errors import UsageError
from lorabridge.families.tables import (
    check_complete,
    detect_family,
    load_family,
    map_adapter,
    sizes_from_config,
)

from .catalogue import CASES, Case, Shapes, shapes_of, written
from .conftest import Store, lora, model, reread
from .square import KINDS, square

TABLES = {case.table: load_family(case.table) for case in CASES}


def every_layout() -> Iterator[object]:
    for case in CASES:
        for layout in case.layouts(TABLES[case.table]):
            said = "-".join(f"{key}={choice}" for key, choice in layout.items())
            yield pytest.param(case, layout, id=f"{case}-{said}")


def every_dump() -> Iterator[object]:
    for case in CASES:
        for name, layout in case.dumps.items():
            yield pytest.param(case, name, {**case.fixed, **layout}, id=f"{case}-{name}")


def without_prefix(layout: Mapping[str, str]) -> dict[str, str]:
    return {key: choice for key, choice in layout.items() if key != "hf_prefix"}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_parameter_of_the_hf_side_is_known(case: Case) -> None:
    table = TABLES[case.table]
    shapes, config = case.model()
    layout = next(iter(case.layouts(table)))
    found = check_complete(table, shapes, side="hf", sizes=sizes_from_config(table, config), layout=layout,
                           architecture=case.architecture)  # fmt: skip
    assert found.problems == ()
    assert case.table in detect_family(TABLES, shapes, "hf")
    assert config.get("model_type") in (table.model_types or (None,))


@pytest.mark.parametrize(("case", "name", "layout"), every_dump())
def test_a_converted_model_has_the_parameters_of_the_network(
    store: Store, case: Case, name: str, layout: dict[str, str]
) -> None:
    table = TABLES[case.table]
    shapes, config = case.model()
    sizes = sizes_from_config(table, config)
    network = shapes_of(written(name))
    there = map_adapter(table, model(store, shapes), to="ms", sizes=sizes, layout=without_prefix(layout))
    caches = {key for key in network if key.endswith(("key_cache", "value_cache"))}
    made: Shapes = {extra.name: extra.value.shape for extra in there.extras}
    assert made == {key: shape for key, shape in network.items() if key not in caches}
    back = map_adapter(table, model(Store(), network), to="hf", sizes=sizes, layout=layout)
    dropped = {key for key, _ in there.left_out}
    assert {extra.name: extra.value.shape for extra in back.extras} == {
        key: shape for key, shape in shapes.items() if key not in dropped
    }
    assert {key for key, _ in back.left_out} == caches


@pytest.mark.parametrize(("case", "layout"), every_layout())
def test_there_and_back_is_the_identity_on_bits(store: Store, case: Case, layout: dict[str, str]) -> None:
    table = TABLES[case.table]
    shapes, config = case.model()
    sizes = sizes_from_config(table, config)
    there = map_adapter(table, model(store, shapes), to="ms", sizes=sizes, layout=without_prefix(layout))
    assert not any(axes.computes(extra.value) for extra in there.extras)
    file, said = reread(there)
    back = map_adapter(table, file, to="hf", sizes=sizes, layout=layout)
    dropped = {name for name, _ in there.left_out}
    assert {extra.name for extra in back.extras} == set(shapes) - dropped
    for extra in back.extras:
        assert axes.substitute(extra.value, said) == axes.Read(extra.name, extra.value.dtype, shapes[extra.name])
    assert inversion.invert(said).lost == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("case", "layout"), every_layout())
def test_merging_and_converting_commute(store: Store, case: Case, layout: dict[str, str], kind: str) -> None:
    table = TABLES[case.table]
    shapes, config = case.model()
    sizes = sizes_from_config(table, config)
    assert square(store, table, shapes, sizes=sizes, layout=layout, kind=kind) >= 8


@pytest.mark.parametrize("name", ["qwen3_mcore-Qwen3ForCausalLM", "telechat3_mcore-telechat3.hf"])
def test_what_neither_names_nor_shapes_tell_is_asked_for(store: Store, name: str) -> None:
    case = next(case for case in CASES if str(case) == name)
    table = TABLES[case.table]
    shapes, config = case.model()
    sizes = sizes_from_config(table, config)
    with pytest.raises(UsageError, match="the names do not tell which fc1 and qkv are meant") as error:
        map_adapter(table, model(store, shapes), to="ms", sizes=sizes)
    flags = [place.partition(":")[0] for place in error.value.where]
    both = [f"--layout {key}={choice}" for key, choice in (("fc1", "interleaved"), ("fc1", "contiguous"))]
    assert flags == [*both, "--layout qkv=grouped", "--layout qkv=contiguous"]
    assert all("training" in place for place in error.value.where)
    assert error.value.hint.endswith("--layout fc1=interleaved|contiguous --layout qkv=grouped|contiguous")
    with pytest.raises(UsageError, match="the names do not tell which qkv is meant"):
        map_adapter(table, model(store, shapes), to="ms", sizes=sizes, layout={"fc1": "contiguous"})
    with pytest.raises(UsageError, match="has no layout 'qkx'") as error:
        map_adapter(table, model(store, shapes), to="ms", sizes=sizes, layout={"qkx": "grouped"})
    assert "qkv=grouped|contiguous" in error.value.hint
    adapter = Adapter((lora(store, "decoder.layers.0.self_attention.linear_qkv", 256, 64),))
    with pytest.raises(UsageError, match="the names do not tell which qkv is meant") as error:
        map_adapter(table, adapter, to="hf", sizes=sizes)
    assert "--layout qkv=grouped (training" in error.value.hint
    there = map_adapter(table, adapter, to="hf", sizes=sizes, layout={"qkv": "grouped"})
    assert [module.out for module in there.modules] == [64, 128, 64]
