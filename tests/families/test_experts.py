"""Mixtures of experts: names and shapes of both sides, there and back, and the merge square, for every layout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from lorabridge import axes, inversion
from lorabridge.dialects.adapter import Adapter
from lorabridge.errors import MappingError
from lorabridge.families.tables import (
    Table,
    check_complete,
    detect_family,
    layout_from_config,
    load_family,
    map_adapter,
    sizes_from_config,
    tied_checks,
)

from .catalogue import Case, Shapes, built, shapes_of, written
from .conftest import Store, lora, model, reread
from .square import KINDS, square

QWEN = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2,
        "vocab_size": 128, "tie_word_embeddings": False}  # fmt: skip
DEEPSEEK = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
            "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 4, "n_shared_experts": 2,
            "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "vocab_size": 128,
            "q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "v_head_dim": 16,
            "qk_nope_head_dim": 12}  # fmt: skip
TELECHAT3 = DEEPSEEK | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}  # names of DeepSeek-V3, says weight_mapping
MIXTRAL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
           "intermediate_size": 28, "num_local_experts": 3, "num_experts_per_tok": 2, "vocab_size": 40}  # fmt: skip
SHARING = MIXTRAL | {"moe_intermediate_size": 28, "shared_expert_intermediate_size": 56, "num_experts": 3}
OLD = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
       "intermediate_size": 28, "moe_intermediate_size": 10, "n_routed_experts": 4, "n_shared_experts": 2,
       "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "vocab_size": 40,
       "q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": 8,
       "qk_nope_head_dim": 6}  # fmt: skip
GLM = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
       "intermediate_size": 96, "moe_intermediate_size": 48, "n_routed_experts": 4, "n_shared_experts": 1,
       "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "vocab_size": 128,
       "use_qk_norm": True, "attention_bias": True}  # fmt: skip
GRAPH = {"qkv": "grouped", "fc1": "interleaved", "experts": "flat", "expert_bias": "router"}
PYNATIVE = GRAPH | {"experts": "stacked", "expert_bias": "layer"}
PREDICT = {"qkv": "contiguous", "fc1": "contiguous", "experts": "stacked", "expert_bias": "router"}
ONE = {"fc1": "interleaved", "experts": "flat", "expert_bias": "router"}
INFERRED = {key: choice for key, choice in PREDICT.items() if key != "qkv"}
BATCHED, GROUPED = {"experts": "batched"}, {"experts": "grouped"}
DISK = {"hf_experts": "disk"}

CASES = [
    Case("qwen3_moe_mcore", "Qwen3MoeForCausalLM", QWEN, {
        "qwen3_moe_mcore.2.1.0.graph": GRAPH, "qwen3_moe_mcore.2.1.0.predict": PREDICT}, DISK),
    Case("deepseek3_mcore", "DeepseekV3ForCausalLM", DEEPSEEK, {
        "deepseek3_mcore.2.1.0.graph": GRAPH | {"mla": "split"},
        "deepseek3_mcore.2.1.0.graph_concat": GRAPH | {"mla": "concat"},
        "deepseek3_mcore.2.1.0.pynative": PYNATIVE | {"mla": "concat"},
        "deepseek3_mcore.2.1.0.predict": PREDICT | {"mla": "predict"}}, DISK | {"query": "compressed"}),
    Case("deepseek3_mcore", "DeepseekV3ForCausalLM", DEEPSEEK | {"q_lora_rank": None}, {
        "deepseek3_mcore.2.1.0.direct_graph": GRAPH | {"mla": "split"},
        "deepseek3_mcore.2.1.0.direct_graph_concat": GRAPH | {"mla": "concat"},
        "deepseek3_mcore.2.1.0.direct_pynative": PYNATIVE | {"mla": "concat"},
        "deepseek3_mcore.2.1.0.direct_predict": PREDICT | {"mla": "predict"}}, DISK | ONE | {"query": "direct"}),
    Case("deepseek3_mcore", "DeepseekV3ForCausalLM", TELECHAT3, {
        "deepseek3_mcore.2.1.0.telechat3_graph": GRAPH | {"mla": "split"},
        "deepseek3_mcore.2.1.0.telechat3_graph_concat": GRAPH | {"mla": "concat"}},
        DISK | ONE | {"query": "compressed", "mla": "split"}),
    Case("glm4_moe_mcore", "Glm4MoeForCausalLM", GLM, {"glm4_moe_mcore.2.1.0.predict": {}}, DISK),
    Case("mixtral", "MixtralForCausalLM", MIXTRAL, {
        "mixtral.1.5.0.batched": BATCHED, "mixtral.1.5.0.grouped": GROUPED,
        "mixtral.1.5.0.predict": {"experts": "transposed"}}, DISK),
    Case("qwen2_moe", "Qwen2MoeForCausalLM", SHARING, {
        "qwen2_moe.1.5.0.batched": BATCHED, "qwen2_moe.1.5.0.grouped": GROUPED,
        "qwen2_moe.1.5.0.predict_concat": {"experts": "transposed", "qkv_concat": "grouped"}}, DISK),
    Case("deepseek2", "DeepseekV2ForCausalLM", OLD | {"head_dim": 4, "norm_topk_prob": False}, {
        "deepseek2.1.3.0.whole": BATCHED | {"mla": "whole"}, "deepseek2.1.5.0.batched": BATCHED,
        "deepseek2.1.5.0.grouped": GROUPED}, DISK),
    Case("deepseek3", "DeepseekV3ForCausalLM", OLD, {
        "deepseek3.1.5.0.batched": BATCHED | {"mla": "split"}, "deepseek3.1.5.0.grouped": GROUPED | {"mla": "split"},
        "deepseek3.1.5.0.predict": {"experts": "transposed", "mla": "predict"},
        "deepseek3.1.5.0.predict_concat": {"experts": "transposed", "mla": "predict_concat"}},
        DISK | {"query": "compressed"}),
    Case("deepseek3", "DeepseekV3ForCausalLM", OLD | {"q_lora_rank": None}, {
        "deepseek3.1.5.0.predict_direct": {"experts": "transposed"}}, DISK | {"query": "direct", "mla": "predict"}),
]  # fmt: skip
FURTHER = ("deepseek3", "deepseek3_mcore")
COUNTERS = ("fi_accu", "expert_load", "tokens_per_expert", "key_cache", "value_cache")
ZEROS = "router.router.topk_bias"  # in the inference network beside the bias that it reads
TABLES = {case.table: load_family(case.table) for case in CASES}


def on_disk(case: Case) -> tuple[Shapes, dict[str, object]]:
    return saved(case.hf, json.dumps(dict(case.config)))


@lru_cache(maxsize=16)
def saved(architecture: str, fields: str) -> tuple[Shapes, dict[str, object]]:
    """Save a small model as transformers does and return the names and shapes in its files."""
    import torch
    import transformers
    from safetensors import safe_open

    name = architecture.split("For")[0] + "Config"
    config = getattr(transformers, name)(**json.loads(fields))
    torch.manual_seed(0)
    shapes: Shapes = {}
    with TemporaryDirectory() as folder:
        getattr(transformers, architecture)(config).save_pretrained(folder)
        for path in Path(folder).glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes, config.to_dict()


def further(shapes: Shapes, config: Mapping[str, object]) -> Shapes:
    """Add what the published DeepSeek-V3 has and transformers leaves out: a layer that predicts further tokens.

    Names are those of the index of deepseek-ai/DeepSeek-V3 for layer 61.
    """
    last = int(str(config["num_hidden_layers"]))
    hidden, vocab = int(str(config["hidden_size"])), int(str(config["vocab_size"]))
    copied = {
        name.replace(f"layers.{last - 1}.", f"layers.{last}."): shape
        for name, shape in shapes.items()
        if f"layers.{last - 1}." in name
    }
    own = {
        "enorm.weight": (hidden,), "hnorm.weight": (hidden,), "eh_proj.weight": (hidden, 2 * hidden),
        "shared_head.norm.weight": (hidden,), "embed_tokens.weight": (vocab, hidden),
        "shared_head.head.weight": (vocab, hidden),
    }  # fmt: skip
    return shapes | copied | {f"model.layers.{last}.{name}": shape for name, shape in own.items()}


def models() -> Iterator[object]:
    for case in CASES:
        yield pytest.param(case, False, id=str(case))
        if case.table in FURTHER and case.fixed.get("mla") != "predict":
            yield pytest.param(case, True, id=f"{case}-further")


def of(case: Case, more: bool) -> tuple[Table, Shapes, dict[str, object], dict[str, int]]:
    shapes, config = on_disk(case)
    config = config | {"num_nextn_predict_layers": 1 if more else 0}
    table = TABLES[case.table]
    return table, further(shapes, config) if more else shapes, config, sizes_from_config(table, config)


def layouts(case: Case, more: bool) -> Iterator[dict[str, str]]:
    table = TABLES[case.table]
    names = [layout.name for layout in table.layouts if layout.name not in case.fixed]
    choices = [[choice for choice, _ in layout.choices] for layout in table.layouts if layout.name in names]
    for chosen in product(*choices):
        layout = {**case.fixed, **dict(zip(names, chosen, strict=True))}
        predict = str(layout.get("mla")).startswith("predict")
        told = {key: layout[key] for key in PREDICT if key in layout}
        if predict and (more or told not in (INFERRED, ONE, {"experts": "transposed"})):
            continue  # inference has one form
        if layout.get("head") != "tied":
            yield layout


def every_layout() -> Iterator[object]:
    for case in CASES:
        for more in (False, True) if case.table in FURTHER and case.fixed.get("mla") != "predict" else (False,):
            for layout in layouts(case, more):
                said = "-".join(f"{key}={choice}" for key, choice in layout.items())
                yield pytest.param(case, more, layout, id=f"{case}{'-further' * more}-{said}")


def every_dump() -> Iterator[object]:
    for case in CASES:
        for name, layout in case.dumps.items():
            known = {entry.name for entry in TABLES[case.table].layouts}
            yield pytest.param(case, name, {k: c for k, c in {**case.fixed, **layout}.items() if k in known}, id=name)


@pytest.mark.parametrize(("case", "more"), models())
def test_every_parameter_on_the_disk_is_known(case: Case, more: bool) -> None:
    table, shapes, config, sizes = of(case, more)
    found = check_complete(table, shapes, side="hf", sizes=sizes, layout=next(layouts(case, more)),
                           architecture=case.architecture)  # fmt: skip
    assert found.problems == ()
    assert case.table in detect_family(TABLES, shapes, "hf")
    assert config["model_type"] in table.model_types
    gone = {name: shape for name, shape in shapes.items() if ".experts.2." not in name}
    missing = check_complete(table, gone, side="hf", sizes=sizes, layout=next(layouts(case, more))).missing
    last = f"layers.{config['num_hidden_layers']}."
    assert {name for name in set(shapes) - set(gone) if last not in name} == set(missing)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_transformers_holds_in_memory_is_known_too(case: Case) -> None:
    table = TABLES[case.table]
    shapes, config = built(case.hf, json.dumps(dict(case.config)))
    sizes = sizes_from_config(table, config | {"num_nextn_predict_layers": 0})
    shapes = {name: shape for name, shape in shapes.items() if "inv_freq" not in name}
    assert any(name.endswith("experts.gate_up_proj") for name in shapes)
    layout = next(layouts(case, False)) | {"hf_experts": "memory"}
    found = check_complete(table, shapes, side="hf", sizes=sizes, layout=layout, architecture=case.architecture)
    assert found.problems == ()
    short = {name: shape[:-1] if "gate_up" in name else shape for name, shape in shapes.items()}
    assert check_complete(table, short, side="hf", sizes=sizes, layout=layout).problems


@pytest.mark.parametrize(("case", "name", "layout"), every_dump())
def test_a_converted_model_has_the_parameters_of_the_network(
    store: Store, case: Case, name: str, layout: dict[str, str]
) -> None:
    network = shapes_of(written(name))
    more = any("mtp" in key for key in network)
    table, shapes, config, sizes = of(case, more)
    there = map_adapter(table, model(store, shapes), to="ms", sizes=sizes, layout=layout)
    counted = {key for key in network if key.endswith(COUNTERS)}
    if layout.get("mla", "").startswith("predict"):
        counted |= {key for key in network if key.endswith(ZEROS)}
    made: Shapes = {extra.name: extra.value.shape for extra in there.extras}
    assert made == {key: shape for key, shape in network.items() if key not in counted}
    told = {key: choice for key, choice in layout.items() if key in ("qkv", "fc1", "qkv_concat")}
    told |= {key: choice for key, choice in layout_from_config(table, config).items() if key == "query"}
    told |= {"mla": "predict"} if layout.get("mla") == "predict" else {}
    told |= {"experts": layout["experts"]} if layout.get("experts") in ("batched", "transposed") else {}
    back = map_adapter(table, model(Store(), network), to="hf", sizes=sizes, layout=told)
    dropped = {key for key, _ in there.left_out}
    assert {extra.name: extra.value.shape for extra in back.extras} == {
        key: shape for key, shape in shapes.items() if key not in dropped
    }
    assert {key for key, _ in back.left_out} == counted
    last = config["num_hidden_layers"]
    own = ("embed_tokens.weight", "shared_head.head.weight")
    assert dropped == ({f"model.layers.{last}.{key}" for key in own} if more else set())
    checks = dict(tied_checks(table, shapes, side="hf", layout=layout))
    assert set(checks) == dropped


@pytest.mark.parametrize(("case", "more", "layout"), every_layout())
def test_there_and_back_is_the_identity_on_bits(
    store: Store, case: Case, more: bool, layout: dict[str, str]
) -> None:  # fmt: skip
    table, shapes, _, sizes = of(case, more)
    there = map_adapter(table, model(store, shapes), to="ms", sizes=sizes, layout=layout)
    assert not any(axes.computes(extra.value) for extra in there.extras)
    file, said = reread(there)
    back = map_adapter(table, file, to="hf", sizes=sizes, layout=layout)
    dropped = {name for name, _ in there.left_out}
    assert {extra.name for extra in back.extras} == set(shapes) - dropped
    for extra in back.extras:
        assert axes.substitute(extra.value, said) == axes.Read(extra.name, extra.value.dtype, shapes[extra.name])
    assert set(inversion.invert(said).lost) <= dropped


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("lora_bias", "bias")])
@pytest.mark.parametrize(("case", "more", "layout"), every_layout())
def test_merging_and_converting_commute(
    store: Store, case: Case, more: bool, layout: dict[str, str], kind: str
) -> None:  # fmt: skip
    table, shapes, _, sizes = of(case, more)
    copies = {name for name, _ in tied_checks(table, shapes, side="hf", layout=layout)}
    kept = {name: shape for name, shape in shapes.items() if name not in copies}
    assert square(store, table, kept, sizes=sizes, layout=layout, kind=kind) >= 8


@pytest.mark.parametrize("experts", ["flat", "stacked"])
def test_experts_lie_as_mindformers_stacks_them(store: Store, experts: str) -> None:
    """Gate and up of every expert transposed side by side, [experts, in, 2 * out]; graph mode joins the first axes."""
    table, shapes, _, sizes = of(CASES[0], False)
    there = map_adapter(table, model(store, shapes), to="ms", sizes=sizes,
                        layout={"qkv": "grouped", "experts": experts})  # fmt: skip
    made = {extra.name: axes.evaluate(extra.value, store.bits.__getitem__, {}) for extra in there.extras}
    at = "model.layers.1.mlp.experts"
    both = [np.concatenate([store.bits[f"{at}.{e}.{n}_proj.weight"] for n in ("gate", "up")]).T for e in range(4)]
    down = [store.bits[f"{at}.{e}.down_proj.weight"].T for e in range(4)]
    join = np.concatenate if experts == "flat" else np.stack
    assert (made["decoder.layers.1.mlp.experts.weight1"] == join(both)).all()
    assert (made["decoder.layers.1.mlp.experts.weight2"] == join(down)).all()


def test_inference_reorders_rotary_rows_as_mindformers_does(store: Store) -> None:
    """parallel_core/inference/weights_utils.py: of every head the last rows, first the even ones, then the odd ones.

    tensor_parallel/layers.py puts kv_down before q_down since 1.7; 1.6 had them the other way round.
    """
    table, shapes, _, sizes = of(CASES[1], False)
    layout = PREDICT | {"mla": "predict"}
    layout = {key: layout[key] for key in ("mla", "fc1", "experts", "expert_bias")}
    there = map_adapter(table, model(store, shapes), to="ms", sizes=sizes, layout=layout)
    made = {extra.name: axes.evaluate(extra.value, store.bits.__getitem__, {}) for extra in there.extras}
    at, to = "model.layers.1.self_attn.", "decoder.layers.1.self_attention."
    heads = store.bits[f"{at}q_b_proj.weight"].reshape(4, 20, 24)
    turned = np.concatenate([heads[:, :12], heads[:, 12::2], heads[:, 13::2]], 1)
    assert (made[f"{to}linear_q_up_proj.weight"] == turned.reshape(80, 24)).all()
    kv = store.bits[f"{at}kv_a_proj_with_mqa.weight"]
    parts = [kv[:32], kv[32::2], kv[33::2], store.bits[f"{at}q_a_proj.weight"]]
    assert (made[f"{to}linear_qkv_down_proj.weight"] == np.concatenate(parts)).all()
    older = map_adapter(table, model(Store(), shapes), to="ms", sizes=sizes, layout=layout | {"mla": "predict16"})
    down = next(extra.value for extra in older.extras if extra.name == f"{to}linear_qkv_down_proj.weight")
    old = axes.evaluate(down, store.bits.__getitem__, {})
    assert (old == np.concatenate([parts[-1], *parts[:-1]])).all()
    pairs = store.bits[f"{at}kv_b_proj.weight"].reshape(4, 28, 32)
    keys_values = np.concatenate([pairs[:, :12].reshape(48, 32), pairs[:, 12:].reshape(64, 32)])
    assert (made[f"{to}linear_kv_up_proj.weight"] == keys_values).all()


def test_adapters_of_memory_and_disk_mean_the_same(store: Store) -> None:
    table, _, _, sizes = of(CASES[0], False)
    at = "model.layers.1.mlp.experts"
    fused = [lora(store, f"{at}.gate_up_proj.{e}", 96, 64, name=f"f{e}") for e in (0, 3)]
    there = map_adapter(table, Adapter(tuple(fused)), to="ms", sizes=sizes)
    assert [m.path for m in there.modules] == [f"decoder.layers.1.mlp.experts.weight1.{e}" for e in (0, 3)]
    assert [(m.stack.number, m.stack.count, m.fan_in_fan_out) for m in there.modules if m.stack] == [
        (0, 4, True),
        (3, 4, True),
    ]
    disk = map_adapter(table, there, to="hf", sizes=sizes, layout={"hf_experts": "disk"})
    assert [m.path for m in disk.modules] == [f"{at}.{e}.{n}_proj" for e in (0, 3) for n in ("gate", "up")]
    memory = map_adapter(table, there, to="hf", sizes=sizes, layout={"hf_experts": "memory"})
    assert [m.terms for m in memory.modules] == [m.terms for m in fused]
    again = map_adapter(table, disk, to="ms", sizes=sizes)
    assert [m.terms for m in again.modules] == [m.terms for m in there.modules]


def test_a_stack_without_one_of_its_experts_is_not_written(store: Store) -> None:
    table, shapes, _, sizes = of(CASES[0], False)
    gone = {name: shape for name, shape in shapes.items() if "layers.1.mlp.experts.2.down" not in name}
    with pytest.raises(MappingError) as error:
        map_adapter(table, model(store, gone), to="ms", sizes=sizes, layout={"qkv": "grouped", "experts": "flat"})
    assert error.value.where == ("decoder.layers.1.mlp.experts.weight2: needs all 4 of its parts; number 2 is missing",)


def test_a_flat_stack_needs_a_config_and_a_deep_one_none(store: Store) -> None:
    table, shapes, _, sizes = of(CASES[0], False)
    for experts in ("flat", "stacked"):
        there = map_adapter(table, model(store, shapes), to="ms", sizes=sizes,
                            layout={"qkv": "contiguous", "experts": experts})  # fmt: skip
        file, _ = reread(there)
        file = Adapter((), tuple(e for e in file.extras if "experts" in e.name))
        if experts == "flat":
            with pytest.raises(MappingError, match="do not fit") as error:
                map_adapter(table, file, to="hf", layout={"qkv": "contiguous"})
            assert "--config config.json" in error.value.hint
        else:
            assert len(map_adapter(table, file, to="hf").extras) == 2 * 4 * 3


@pytest.mark.parametrize("value", [None, 0])
def test_a_model_without_the_rank_that_the_cell_has_is_refused(value: object) -> None:
    """The cell of research/deepseek2 has no other path for queries, which DeepSeek-V2-Lite would need."""
    with pytest.raises(MappingError, match="has no model with this config") as error:
        sizes_from_config(TABLES["deepseek2"], OLD | {"q_lora_rank": value})
    assert "and has no q_proj" in error.value.where[0]


@pytest.mark.parametrize(("field", "value"), [("mlp_only_layers", [1]), ("decoder_sparse_step", 2)])
def test_layers_without_experts_that_the_network_would_give_experts_are_refused(field: str, value: object) -> None:
    """Qwen3MoeConfig of MindFormers 2.1.0 calls both fields useless; its networks have one spec for every layer."""
    table, _, config, _ = of(CASES[0], False)
    with pytest.raises(MappingError, match="qwen3_moe_mcore has no model with this config") as error:
        sizes_from_config(table, config | {field: value})
    assert f"{field} is {value} in the config: MindFormers reads it nowhere" in error.value.where[0]


def test_the_config_tells_how_queries_are_made() -> None:
    table = TABLES["deepseek3_mcore"]
    assert layout_from_config(table, {"q_lora_rank": 24})["query"] == "compressed"
    assert layout_from_config(table, {"q_lora_rank": None})["query"] == "direct"
    assert layout_from_config(table, {}) == {}
    sizes = sizes_from_config(table, dict(CASES[2].config) | {"num_nextn_predict_layers": 0})
    assert "q_rank" not in sizes
    with pytest.raises(MappingError, match="does not fit") as error:
        sizes_from_config(table, {k: v for k, v in CASES[2].config.items() if k != "kv_lora_rank"})
    assert any("'kv_lora_rank' needs kv_lora_rank" in line for line in error.value.where)


def test_the_layer_of_glm_that_no_network_has_is_left_out_by_name(store: Store) -> None:
    """Names as in the index of zai-org/GLM-4.5-Air; transformers ignores them when it loads the model."""
    case = next(case for case in CASES if case.table == "glm4_moe_mcore")
    table, shapes, config, _ = of(case, False)
    more = further(shapes, config)
    sizes = sizes_from_config(table, config | {"num_nextn_predict_layers": 1})
    found = check_complete(table, more, side="hf", sizes=sizes, layout=DISK, architecture=case.architecture)
    assert found.problems == ()
    there = map_adapter(table, model(store, more), to="ms", sizes=sizes)
    left = {name for name, why in there.left_out if "predicts further tokens" in why}
    assert left == set(more) - set(shapes)
    assert len(left) == 34
    plain = map_adapter(table, model(Store(), shapes), to="ms", sizes=sizes)
    assert {e.name: e.value.shape for e in there.extras} == {e.name: e.value.shape for e in plain.extras}
    with pytest.raises(MappingError, match="do not fit"):
        map_adapter(table, model(Store(), more), to="ms", sizes=sizes_from_config(table, config))


def test_inference_leaves_the_layers_for_further_tokens_out(store: Store) -> None:
    case = next(case for case in CASES if case.table == "deepseek3")
    table, shapes, config, _ = of(case, False)
    more = further(shapes, config)
    sizes = sizes_from_config(table, config | {"num_nextn_predict_layers": 1})
    layout = {"experts": "transposed", "mla": "predict"}
    assert check_complete(table, more, side="hf", sizes=sizes, layout=layout).problems == ()
    there = map_adapter(table, model(store, more), to="ms", sizes=sizes, layout=layout)
    left = {name for name, why in there.left_out if "predicts further tokens" in why}
    assert left == set(more) - set(shapes)
    assert tied_checks(table, more, side="hf", layout=layout) == []
    at = "model.layers.1."
    pe = store.bits[f"{at}self_attn.kv_a_proj_with_mqa.weight"][16:]
    made = {extra.name: axes.evaluate(extra.value, store.bits.__getitem__, {}) for extra in there.extras}
    assert (made[f"{at}attention.kv2l.weight"][16:] == np.concatenate([pe[0::2], pe[1::2]])).all()
    heads = store.bits[f"{at}self_attn.q_b_proj.weight"].reshape(4, 10, 12)
    turned = np.concatenate([heads[:, :6], heads[:, 6::2], heads[:, 7::2]], 1)
    assert (made[f"{at}attention.l2q_proj.weight"] == turned.reshape(40, 12)).all()
