"""Tables of encoders, vision, speech and of other projects: real names of both sides, bits, and the merge square."""

from __future__ import annotations

import json

import pytest

from lorabridge import axes, inversion
from lorabridge.errors import MappingError
from lorabridge.families.tables import (
    Table,
    check_complete,
    detect_family,
    layout_from_config,
    load_family,
    map_adapter,
    sizes_from_config,
)

from .conftest import Store, model, reread
from .networks import NETWORKS, SOURCES, Network, Shapes
from .square import KINDS, square

CASES = [pytest.param(network, id=str(network)) for network in NETWORKS]
FIRST = {(network.family, network.layout.get("hf_names")): network for network in reversed(NETWORKS)}.values()


def opened(network: Network) -> tuple[Table, Shapes, dict[str, object], dict[str, str]]:
    """Return the table, the model of the torch side, its config, and the layout that config and network make."""
    table = load_family(network.family)
    shapes, config = network.model()
    return table, shapes, config, {**layout_from_config(table, config), **network.layout}


def ties(table: Table) -> set[str]:
    """Return what transformers does not write because it equals another parameter."""
    return {tied.hf.text for tied in table.tied if tied.hf is not None}


def ms_side(layout: dict[str, str]) -> dict[str, str]:
    return {key: choice for key, choice in layout.items() if key != "hf_prefix"}


def hf_side(layout: dict[str, str]) -> dict[str, str]:
    return {key: choice for key, choice in layout.items() if key != "ms_prefix"}


@pytest.mark.parametrize("network", CASES)
def test_a_converted_model_has_the_parameters_of_the_network(store: Store, network: Network) -> None:
    table, shapes, config, layout = opened(network)
    sizes = sizes_from_config(table, config)
    found = check_complete(table, shapes, side="hf", sizes=sizes, layout=layout, architecture=network.hf)
    assert found.problems == ()
    there = map_adapter(table, model(store, shapes), to="ms", sizes=sizes, layout=ms_side(layout))
    made = {extra.name: extra.value.shape for extra in there.extras}
    assert {n: s for n, s in made.items() if n not in network.lacking} == {
        n: s for n, s in network.parameters.items() if n not in network.own
    }
    assert all(why for why in (*network.own.values(), *network.lacking.values()))


@pytest.mark.parametrize("network", CASES)
def test_the_parameters_of_the_network_become_the_model(network: Network) -> None:
    table, shapes, config, layout = opened(network)
    sizes = sizes_from_config(table, config)
    found = check_complete(table, network.parameters, side="ms", sizes=sizes, layout=layout, architecture=network.hf)
    back = map_adapter(table, model(Store(), network.parameters), to="hf", sizes=sizes, layout=hf_side(layout))
    beyond = {extra.name for extra in back.extras if set(axes.reads(extra.value)) <= set(network.own)}
    copies = ties(table) - set(shapes)
    made = {extra.name: extra.value.shape for extra in back.extras if extra.name not in beyond | copies}
    assert (set(found.missing), found.shapes) == (set(network.lacking), ())
    assert set(found.unexpected) | {name for name, _ in back.left_out} == set(network.own)
    assert not beyond & set(shapes)
    assert made.items() <= shapes.items()
    there = map_adapter(table, model(Store(), shapes), to="ms", sizes=sizes, layout=ms_side(layout))
    lost = {name for extra in there.extras if extra.name in network.lacking for name in axes.reads(extra.value)}
    assert set(shapes) - set(made) == {name for name, _ in there.left_out} | lost


@pytest.mark.parametrize("network", CASES)
def test_there_and_back_is_the_identity_on_bits(store: Store, network: Network) -> None:
    table, shapes, config, layout = opened(network)
    sizes = sizes_from_config(table, config)
    there = map_adapter(table, model(store, shapes), to="ms", sizes=sizes, layout=ms_side(layout))
    assert not any(axes.computes(extra.value) for extra in there.extras)
    written, said = reread(there)
    back = map_adapter(table, written, to="hf", sizes=sizes, layout=hf_side(layout))
    kept = [extra for extra in back.extras if extra.name in shapes or extra.name not in ties(table)]
    assert {extra.name for extra in kept} == set(shapes) - {name for name, _ in there.left_out}
    for extra in kept:
        assert axes.substitute(extra.value, said) == axes.Read(extra.name, extra.value.dtype, shapes[extra.name])
    assert inversion.invert(said).lost == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", [pytest.param(network, id=str(network)) for network in FIRST])
def test_merging_and_converting_commute(store: Store, network: Network, kind: str) -> None:
    table, shapes, config, layout = opened(network)
    sizes = sizes_from_config(table, config)
    few = {"gpt2_mindnlp": 2, "bit_mindone": 0}.get(network.family, 8)  # a Conv1D that cannot be adapted; convolutions
    assert square(store, table, shapes, sizes=sizes, layout=layout, kind=kind) >= few


@pytest.mark.parametrize("network", [pytest.param(network, id=str(network)) for network in FIRST])
def test_a_model_is_known_by_its_names_and_its_config(network: Network) -> None:
    table, shapes, config, _ = opened(network)
    tables = {table.family: table}
    assert detect_family(tables, shapes, "hf") == [network.family]
    assert detect_family(tables, network.parameters, "ms") == [network.family]
    assert config["model_type"] in table.model_types


def test_a_norm_that_the_other_network_does_not_have_is_refused(store: Store) -> None:
    """transformers norms before it takes the class token, MindFormers after it has taken the mean."""
    with pytest.raises(MappingError) as error:
        map_adapter(load_family("vit"), model(store, {"vit.layernorm.weight": (8,)}), to="ms")
    assert error.value.where[0].startswith("vit.layernorm.weight: no rule in vit.toml")
    token = json.loads((SOURCES / "vit_timm.token.json").read_text())["parameters"]
    shapes = {name: tuple(shape) for name, shape in token.items()}
    assert check_complete(load_family("vit_timm"), shapes, side="hf").unexpected == ("norm.bias", "norm.weight")
