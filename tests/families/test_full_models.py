"""Full models through the shipped tables: names and shapes of the real classes, and the way there and back."""

from __future__ import annotations

import json

import pytest

from lorabridge import axes, inversion
from lorabridge.dialects.adapter import Adapter
from lorabridge.errors import MappingError, UsageError
from lorabridge.families.tables import (
    Table,
    check_complete,
    detect_family,
    map_adapter,
    names,
    resolve,
    sizes_from_config,
    tied_checks,
)  # fmt: skip

from .conftest import Store, model, reread

GPT2 = [
    {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 11, "n_positions": 6},
    {"n_embd": 15, "n_layer": 11, "n_head": 3, "vocab_size": 17, "n_positions": 5, "n_inner": 7},
]
BERT = [
    {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 11,
     "max_position_embeddings": 6},
    {"hidden_size": 15, "num_hidden_layers": 11, "num_attention_heads": 3, "intermediate_size": 15, "vocab_size": 15,
     "max_position_embeddings": 15, "type_vocab_size": 3, "num_labels": 5},
]  # fmt: skip
CASES = [
    ("gpt2", "GPT2Model", {"hf_prefix": ""}),
    ("gpt2", "GPT2LMHeadModel", {}),
    ("gpt2", "GPT2ForSequenceClassification", {}),
    ("bert", "BertModel", {"hf_prefix": ""}),
    ("bert", "BertForMaskedLM", {"mlm_head": "cell"}),
    ("bert", "BertForMaskedLM", {"mlm_head": "script"}),
    ("bert", "BertForPreTraining", {"mlm_head": "cell"}),
    ("bert", "BertForTokenClassification", {}),
    ("bert", "BertForSequenceClassification", {}),
    ("bert", "BertForQuestionAnswering", {}),
    ("bert", "BertForMultipleChoice", {}),
]


def real(architecture: str, fields: dict[str, int]) -> tuple[dict[str, tuple[int, ...]], dict[str, object]]:
    """Build a class of transformers on the meta device; return its parameters' shapes and its config.json."""
    import torch
    import transformers

    name = architecture.split("For")[0].split("LM")[0].removesuffix("Model") + "Config"
    config = getattr(transformers, name)(**fields, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    with torch.device("meta"):
        module = getattr(transformers, architecture)(config)
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    return shapes, json.loads(config.to_json_string(use_diff=False))


@pytest.mark.parametrize(("family", "architecture", "layout"), CASES)
@pytest.mark.parametrize("which", [0, 1])
def test_names_and_shapes_are_those_of_the_real_class(
    tables: dict[str, Table], family: str, architecture: str, layout: dict[str, str], which: int
) -> None:
    table = tables[family]
    shapes, config = real(architecture, {"gpt2": GPT2, "bert": BERT}[family][which])
    sizes = sizes_from_config(table, config)
    wanted = names(table, sizes, "hf", layout=layout, architecture=architecture)
    tied = {name for name, _ in tied_checks(table, shapes, side="hf", layout=layout)}
    tied |= {name for name in shapes if name not in wanted and name.startswith("cls.predictions.decoder")}
    assert set(wanted) == set(shapes) - tied
    for name, shape in wanted.items():
        assert len(shape) == len(shapes[name])
        assert all(a in (-1, b) for a, b in zip(shape, shapes[name], strict=True)), name
    found = check_complete(table, shapes, side="hf", sizes=sizes, layout=layout, architecture=architecture)
    assert found.problems == ()
    assert family in detect_family(tables, shapes, "hf")


@pytest.mark.parametrize(("family", "architecture", "layout"), CASES)
def test_there_and_back_is_the_identity_on_expressions_and_bits(
    tables: dict[str, Table], store: Store, family: str, architecture: str, layout: dict[str, str]
) -> None:
    table = tables[family]
    shapes, config = real(architecture, {"gpt2": GPT2, "bert": BERT}[family][1])
    sizes = sizes_from_config(table, config)
    given = model(store, shapes)
    choices = {key: choice for key, choice in layout.items() if key != "hf_prefix"}
    there = map_adapter(table, given, to="ms", sizes=sizes, layout=choices)
    assert not any(axes.computes(extra.value) for extra in there.extras)

    written, said = reread(there)
    expected = names(table, sizes, "ms", layout=choices, architecture=architecture)
    copies = {"bert.mlmloss.vocab_dense.weight"} if choices.get("mlm_head") == "script" else set()
    assert {e.name for e in written.extras} - copies == set(expected)
    for extra in written.extras:
        shape = expected.get(extra.name, extra.value.shape)
        assert all(a in (-1, b) for a, b in zip(shape, extra.value.shape, strict=True)), extra.name
    back = map_adapter(table, written, to="hf", sizes=sizes, layout=layout)

    dropped = {name for name, _ in there.left_out}
    assert {extra.name for extra in back.extras} == set(shapes) - dropped
    for extra in back.extras:
        whole = axes.substitute(extra.value, said)
        assert whole == axes.Read(extra.name, whole.dtype, shapes[extra.name]), extra.name
        assert (axes.evaluate(whole, store.bits.__getitem__, {}) == store.bits[extra.name]).all()
    inverse = inversion.invert(said)
    assert inverse.lost == ()


def test_transposes_are_right_even_where_shapes_cannot_tell(tables: dict[str, Table], store: Store) -> None:
    table = tables["bert"]
    shapes, config = real("BertModel", BERT[1])
    there = map_adapter(table, model(store, shapes), to="ms", sizes=sizes_from_config(table, config))
    made = {extra.name: axes.evaluate(extra.value, store.bits.__getitem__, {}) for extra in there.extras}
    block = "bert.bert_encoder.encoder.blocks.3."
    for ms, hf, turned in [
        ("attention.dense2", "attention.self.key", False),
        ("attention.projection", "attention.output.dense", True),
        ("output.mapping", "intermediate.dense", True),
        ("output.projection", "output.dense", True),
    ]:
        source = store.bits[f"encoder.layer.3.{hf}.weight"]
        assert source.shape == (15, 15)
        assert (made[f"{block}{ms}.weight"] == (source.T if turned else source)).all()


def test_gpt2_dense_layers_are_the_transposed_thirds(tables: dict[str, Table], store: Store) -> None:
    table = tables["gpt2"]
    shapes, config = real("GPT2LMHeadModel", GPT2[0])
    there = map_adapter(table, model(store, shapes), to="ms", sizes=sizes_from_config(table, config))
    made = {extra.name: axes.evaluate(extra.value, store.bits.__getitem__, {}) for extra in there.extras}
    fused = store.bits["transformer.h.1.attn.c_attn.weight"]
    for k in range(3):
        assert (made[f"backbone.blocks.1.attention.dense{k + 1}.weight"] == fused[:, 8 * k : 8 * k + 8].T).all()
        bias = store.bits["transformer.h.1.attn.c_attn.bias"]
        assert (made[f"backbone.blocks.1.attention.dense{k + 1}.bias"] == bias[8 * k : 8 * k + 8]).all()
    kept = store.bits["transformer.h.1.attn.c_proj.weight"]
    assert (made["backbone.blocks.1.attention.projection.weight"] == kept).all()
    assert ("lm_head.weight", "tied: equal to transformer.wte.weight") in there.left_out


def test_sizes_are_not_needed_for_equal_parts(tables: dict[str, Table], store: Store) -> None:
    shapes, config = real("GPT2LMHeadModel", GPT2[1])
    given = model(store, shapes)
    sizes = sizes_from_config(tables["gpt2"], config)
    assert map_adapter(tables["gpt2"], given, to="ms") == map_adapter(tables["gpt2"], given, to="ms", sizes=sizes)


def test_output_order_does_not_depend_on_input_order(tables: dict[str, Table], store: Store) -> None:
    shapes, _ = real("BertForTokenClassification", BERT[1])
    given = model(store, shapes)
    turned = Adapter((), given.extras[::-1])
    there = [map_adapter(tables["bert"], adapter, to="ms").extras for adapter in (given, turned)]
    assert there[0] == there[1]


def test_buffers_are_left_out_with_a_reason(tables: dict[str, Table], store: Store) -> None:
    shapes, _ = real("GPT2LMHeadModel", GPT2[0])
    shapes |= {"transformer.h.0.attn.bias": (1, 1, 6, 6), "transformer.h.1.attn.masked_bias": ()}
    there = map_adapter(tables["gpt2"], model(store, shapes), to="ms")
    assert dict(there.left_out)["transformer.h.0.attn.bias"] == "causal mask, rebuilt by the model"
    assert dict(there.left_out)["transformer.h.1.attn.masked_bias"] == "causal mask, rebuilt by the model"
    assert check_complete(tables["gpt2"], shapes, side="hf").problems == ()


def test_every_missing_and_unexpected_parameter_is_listed(tables: dict[str, Table]) -> None:
    table = tables["gpt2"]
    shapes, config = real("GPT2LMHeadModel", GPT2[0])
    sizes = sizes_from_config(table, config)
    for name in [n for n in shapes if n != "lm_head.weight"]:
        without = {key: shape for key, shape in shapes.items() if key != name}
        assert check_complete(table, without, side="hf", sizes=sizes).missing == (name,)
    extra = shapes | {"transformer.h.2.ln_1.weight": (8,), "transformer.h.01.ln_1.weight": (8,), "head.weight": (1,)}
    found = check_complete(table, extra, side="hf", sizes=sizes)
    assert found.unexpected == ("head.weight", "transformer.h.01.ln_1.weight", "transformer.h.2.ln_1.weight")


def test_a_gap_in_the_layers_is_found_without_a_config(tables: dict[str, Table]) -> None:
    shapes, _ = real("GPT2LMHeadModel", GPT2[1])
    gap = {name: shape for name, shape in shapes.items() if ".h.3." not in name}
    missing = check_complete(tables["gpt2"], gap, side="hf").missing
    assert len(missing) == 12
    assert all(".h.3." in name for name in missing)


def test_half_a_head_is_missing_its_other_half(tables: dict[str, Table]) -> None:
    shapes, _ = real("BertForTokenClassification", BERT[0])
    del shapes["classifier.bias"]
    assert check_complete(tables["bert"], shapes, side="hf").missing == ("classifier.bias",)


def test_wrong_sizes_name_the_size_and_both_numbers(tables: dict[str, Table], store: Store) -> None:
    table = tables["gpt2"]
    shapes, config = real("GPT2LMHeadModel", GPT2[0])
    sizes = sizes_from_config(table, config | {"n_embd": 16})
    with pytest.raises(MappingError) as error:
        map_adapter(table, model(store, shapes), to="ms", sizes=sizes)
    line = next(line for line in error.value.where if line.startswith("transformer.h.0.ln_1.weight"))
    assert line.startswith("transformer.h.0.ln_1.weight: shape (8,), but hidden = 16 (gpt2.toml:")
    wrong = check_complete(table, shapes, side="hf", sizes=sizes).shapes
    assert len(wrong) == len(error.value.where) == len(shapes) - 1


def test_a_layer_beyond_the_config_is_refused(tables: dict[str, Table], store: Store) -> None:
    shapes, config = real("GPT2Model", GPT2[0])
    with pytest.raises(MappingError, match="number 1, but layers = 1 in the config"):
        map_adapter(
            tables["gpt2"],
            model(store, shapes),
            to="ms",
            sizes=sizes_from_config(tables["gpt2"], config | {"n_layer": 1}),
        )


def test_a_head_whose_layout_the_names_do_not_tell_must_be_chosen(tables: dict[str, Table], store: Store) -> None:
    table = tables["bert"]
    shapes, _ = real("BertForMaskedLM", BERT[0])
    given = model(store, shapes)
    with pytest.raises(UsageError, match="the names do not tell which mlm_head is meant") as error:
        map_adapter(table, given, to="ms")
    assert "--layout mlm_head=cell" in error.value.hint
    assert "--layout mlm_head=script" in error.value.hint
    for choice in ("cell", "script"):
        there = map_adapter(table, given, to="ms", layout={"mlm_head": choice})
        written, _ = reread(there)
        assert resolve(table, (e.name for e in written.extras), side="ms", layout={}).layout == {"mlm_head": choice}
        assert map_adapter(table, written, to="hf").extras
    with pytest.raises(UsageError, match="no choice 'other'"):
        map_adapter(table, given, to="ms", layout={"mlm_head": "other"})
    with pytest.raises(UsageError, match="no layout 'mlm'"):
        map_adapter(table, given, to="ms", layout={"mlm": "cell"})


def test_a_tied_head_that_the_source_omits_is_written_where_the_target_keeps_it(
    tables: dict[str, Table], store: Store
) -> None:
    shapes, _ = real("BertForMaskedLM", BERT[0])
    del shapes["cls.predictions.decoder.weight"], shapes["cls.predictions.decoder.bias"]
    there = map_adapter(tables["bert"], model(store, shapes), to="ms", layout={"mlm_head": "script"})
    made = {extra.name: extra.value for extra in there.extras}
    assert made["bert.mlmloss.vocab_dense.weight"] == made["bert.word_embedding.embedding_table"]


def test_a_tied_head_without_its_original_is_refused(tables: dict[str, Table], store: Store) -> None:
    with pytest.raises(MappingError, match=r"transformer\.wte\.weight is not here to compare"):
        map_adapter(tables["gpt2"], model(store, {"lm_head.weight": (11, 8)}), to="ms")


def test_prefixes_are_one_answer_per_checkpoint(tables: dict[str, Table], store: Store) -> None:
    mixed = model(store, {"transformer.ln_f.weight": (8,), "h.0.ln_1.weight": (8,)})
    with pytest.raises(MappingError, match=r"with and without the prefix 'transformer\.'"):
        map_adapter(tables["gpt2"], mixed, to="ms")
    with pytest.raises(UsageError, match=r"no hf prefix 'model\.'"):
        map_adapter(tables["gpt2"], mixed, to="hf", layout={"hf_prefix": "model."})


def test_a_second_conversion_is_refused_by_name(tables: dict[str, Table], store: Store) -> None:
    shapes, _ = real("GPT2LMHeadModel", GPT2[0])
    there, _ = reread(map_adapter(tables["gpt2"], model(store, shapes), to="ms"))
    with pytest.raises(MappingError, match="every name is already on the ms side"):
        map_adapter(tables["gpt2"], there, to="ms")


def test_unmapped_names_are_all_listed_with_the_nearest_rule(tables: dict[str, Table], store: Store) -> None:
    odd = {f"transformer.h.{k}.attn.c_atn.weight": (8, 24) for k in range(12)}
    with pytest.raises(MappingError) as error:
        map_adapter(tables["gpt2"], model(store, odd), to="ms")
    assert len(error.value.where) == 12
    assert error.value.where[0] == (
        "transformer.h.0.attn.c_atn.weight: no rule in gpt2.toml (nearest: h.{i}.attn.c_attn.weight)"
    )


def test_the_identity_table_changes_nothing(tables: dict[str, Table], store: Store) -> None:
    given = model(store, {"any.thing.weight": (2, 3), "x": (1,)})
    assert map_adapter(tables["identity"], given, to="ms") is given
    assert map_adapter(tables["identity"], given, to="hf") is given
    with pytest.raises(UsageError):
        map_adapter(tables["identity"], given, to="ms", layout={"qkv": "grouped"})


def test_a_config_that_lacks_fields_lists_all_of_them(tables: dict[str, Table]) -> None:
    with pytest.raises(MappingError) as error:
        sizes_from_config(tables["bert"], {"hidden_size": 8, "vocab_size": "many"})
    text = error.value.text()
    assert "intermediate_size" in text
    assert "num_hidden_layers" in text
    assert "'many', not an integer" in text
