"""Reading peft files: what real peft saves in each kind, and files that are wrong in one place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft_models import CASES, SIZE, Case, Dense, content, save

from lorabridge.axes import Read
from lorabridge.dialects.adapter import Adapter, Content, Fact, Facts, Json
from lorabridge.dialects.peft import PEFT
from lorabridge.errors import MappingError

CONFIG: dict[str, object] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}


def tensors(*, rank: int = 4, extra: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, torch.Tensor]:
    made: dict[str, tuple[int, ...]] = {**(extra or {})}
    for layer in "01":
        made |= {f"{layer}.q.lora_A.weight": (rank, SIZE), f"{layer}.q.lora_B.weight": (24, rank)}
    return {f"base_model.model.{name}": torch.zeros(shape) for name, shape in made.items()}


def parse(found: Mapping[str, torch.Tensor], config: Json | None = CONFIG, *facts: Fact) -> Adapter:
    return PEFT.parse(content(found, config, Facts(facts)))


def refusal(found: Mapping[str, torch.Tensor], config: Json | None = CONFIG, *facts: Fact) -> MappingError:
    with pytest.raises(MappingError) as caught:
        parse(found, config, *facts)
    assert caught.value.hint
    return caught.value


def saved(name: str, directory: Path) -> tuple[Adapter, dict[str, torch.Tensor]]:
    found, config = save(CASES[name].adapted(), directory)
    return PEFT.parse(content(found, config)), found


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_of_a_real_adapter_is_accounted_for_once(name: str, tmp_path: Path) -> None:
    adapter, found = saved(name, tmp_path)
    used = [e for m in adapter.modules for t in m.terms for e in (t.a, t.b)]
    used += [e for m in adapter.modules for e in (m.magnitude, m.lora_bias) if e is not None]
    used += [extra.value for extra in adapter.extras]
    names = [e.name for e in used if isinstance(e, Read)] + [n for n, _ in adapter.left_out]
    assert sorted(names) == sorted(found)
    assert PEFT.detect(content(found)) is not None


@pytest.mark.parametrize("name", CASES)
def test_scaling_is_the_number_peft_multiplies_with(name: str, tmp_path: Path) -> None:
    model = CASES[name].adapted()
    found, config = save(model, tmp_path)
    adapter = PEFT.parse(content(found, config))
    theirs = {
        path.removeprefix("base_model.model.").replace("base_layer.", ""): layer.scaling["default"]
        for path, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert {m.path: m.scaling.value for m in adapter.modules} == theirs


def test_kinds_kernels_and_groups(tmp_path: Path) -> None:
    conv, _ = saved("conv", tmp_path / "conv")
    assert [(m.path, m.kind, m.kernel_size, m.groups) for m in conv.modules] == [
        ("one", "conv1d", (3,), 1), ("three", "conv3d", (1, 2, 3), 1), ("two", "conv2d", (3, 2), 1),
    ]  # fmt: skip
    grouped, _ = saved("grouped conv", tmp_path / "grouped")
    (module,) = grouped.modules
    assert (module.kind, module.groups, module.terms[0].b.shape) == ("conv1d", 2, (8, 2, 1))
    words, _ = saved("embedding", tmp_path / "words")
    assert [(m.path, m.kind, m.out) for m in words.modules] == [("emb", "embedding", SIZE), ("lin", "linear", SIZE)]


def test_attention_is_a_fused_parameter_and_an_output_projection(tmp_path: Path) -> None:
    adapter, _ = saved("attention pattern", tmp_path)
    assert [(m.path, m.weight, m.out, m.scaling.value) for m in adapter.modules] == [
        ("lin", "weight", SIZE, 2.0), ("mha", "in_proj_weight", 3 * SIZE, 8.0), ("mha.out_proj", "weight", SIZE, 8.0),
    ]  # fmt: skip


def test_storage_order_comes_from_the_config_unless_layer_types_are_mixed(tmp_path: Path) -> None:
    fused, _ = saved("gpt2", tmp_path / "a")
    assert {m.fan_in_fan_out for m in fused.modules} == {True}
    plain, _ = saved("linear", tmp_path / "b")
    assert {m.fan_in_fan_out for m in plain.modules} == {False}
    lora = {"r": 4, "target_modules": ["c_attn", "lm_head"], "task_type": "CAUSAL_LM"}
    found, config = save(Case(CASES["gpt2"].model, lora).adapted(), tmp_path / "c")
    assert config["fan_in_fan_out"] is False  # peft leaves the value of the layer type it wrapped last
    assert {m.fan_in_fan_out for m in PEFT.parse(content(found, config)).modules} == {None}
    given = Facts((Fact("*.c_attn", "fan_in_fan_out", True), Fact("lm_head", "fan_in_fan_out", False)))
    told = PEFT.parse(content(found, config, given))
    assert [(m.path[-6:], m.fan_in_fan_out) for m in told.modules] == [
        ("m_head", False),
        ("c_attn", True),
        ("c_attn", True),
    ]


def test_extras_of_real_adapters_have_their_kinds(tmp_path: Path) -> None:
    def kinds(name: str) -> dict[str, str]:
        return {extra.name: extra.kind for extra in saved(name, tmp_path / name)[0].extras}

    assert kinds("bert") == {"classifier.weight": "modules_to_save", "classifier.bias": "modules_to_save"}
    assert kinds("bias lora_only") == {"layers.0.q.bias": "bias", "layers.1.q.bias": "bias"}
    assert kinds("bias all")["layers.0.k.bias"] == "bias"
    assert kinds("bias all and saved")["head.bias"] == "modules_to_save"
    assert kinds("trainable tokens") == {"emb.weight": "trainable_tokens"}
    assert kinds("llama embedding") == {"lm_head.weight": "base", "model.embed_tokens.weight": "base"}


def test_raw_dump_keeps_base_weights_and_lists_frozen_originals(tmp_path: Path) -> None:
    model = CASES["bias all and saved"].adapted()
    _, config = save(model, tmp_path)
    adapter = PEFT.parse(content(model.state_dict(), config))
    kinds = {extra.name: extra.kind for extra in adapter.extras}
    assert kinds["layers.0.q.weight"] == "base"
    assert kinds["layers.0.q.bias"] == "bias"
    assert kinds["head.weight"] == "modules_to_save"
    assert [n for n, _ in adapter.left_out] == [
        f"base_model.model.head.original_module.{p}" for p in ("weight", "bias")
    ]


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model."])
def test_wrapped_dumps_read_the_same(wrapper: str) -> None:
    raw = CASES["dora"].adapted().state_dict()
    config = {"lora_alpha": 8, "r": 4, "use_dora": True}
    plain, wrapped = parse(raw, config), parse({wrapper + n: t for n, t in raw.items()}, config)
    assert [m.path for m in wrapped.modules] == [m.path for m in plain.modules]
    assert [(e.name, e.kind) for e in wrapped.extras] == [(e.name, e.kind) for e in plain.extras]


@pytest.mark.parametrize("ending", ["", ".weight", ".x.weight", ".x"])
def test_every_spelling_of_dora_magnitudes(ending: str) -> None:
    name = ".x" if ".x" in ending else ""
    found = {
        f"q.lora_A{name}.weight": (4, 8),
        f"q.lora_B{name}.weight": (6, 4),
        f"q.lora_magnitude_vector{ending}": (6,),
    }
    adapter = parse({n: torch.zeros(s) for n, s in found.items()}, {**CONFIG, "use_dora": True})
    assert adapter.modules[0].magnitude is not None


def test_paths_do_not_depend_on_the_order_in_the_file() -> None:
    found = tensors(extra={"head.weight": (3, 4)})
    config = {**CONFIG, "modules_to_save": ["head"]}
    assert parse(found, config) == parse(dict(reversed(found.items())), config)


@pytest.mark.parametrize("missing", ["base_model.model.0.q.lora_A.weight", "base_model.model.1.q.lora_B.weight"])
def test_every_half_pair_is_named(missing: str) -> None:
    found = tensors()
    del found[missing]
    _, path, _, side, _ = missing.rsplit(".", 4)
    assert any(f"{path}.q" in place and f"{side} missing" in place for place in refusal(found).where)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((4, 8), (6, 5)), "rank 4, lora_B has rank 5"), (((4, 8), (6, 4, 1)), "no layer"), (((4,), (6,)), "no layer"),
        (((4, 8, 3), (6, 3, 1)), "groups"), (((4, 8, 3), (6, 4, 2)), "groups"), (((4, 8, 3), (5, 2, 1)), "5 output"),
        (((4, 8, 1, 1, 1, 1), (6, 4, 1, 1, 1, 1)), "no layer"), (((2, 8), (6, 2)), "rank 2, adapter_config"),
    ],
)  # fmt: skip
def test_factors_that_are_no_pair_are_refused_with_both_numbers(
    shapes: tuple[tuple[int, ...], ...], words: str
) -> None:
    found = {f"q.lora_{side}.weight": torch.zeros(shape) for side, shape in zip("AB", shapes, strict=True)}
    assert any(words in place for place in refusal(found).where)


def test_all_problems_are_listed_at_once() -> None:
    found = tensors(rank=3, extra={"stray.weight": (2, 2), "0.q.lora_magnitude_vector": (24,)})
    del found["base_model.model.1.q.lora_A.weight"]
    places = refusal(found).where
    for words in ("0.q: the factors have rank 3", "1.q: lora_A missing", "stray.weight: neither", "use_dora = False"):
        assert any(words in place for place in places), words


@pytest.mark.parametrize(
    ("extra", "field"),
    [({"0.q.lora_magnitude_vector": (24,)}, "use_dora"), ({"0.q.lora_B.bias": (24,)}, "lora_bias"),
     ({"0.q.lora_diag": (4,)}, "kasa_config")],
)  # fmt: skip
def test_tensors_without_their_switch_and_the_reverse_are_refused(
    extra: dict[str, tuple[int, ...]], field: str
) -> None:
    assert any(field in place for place in refusal(tensors(extra=extra)).where)
    if field != "kasa_config":
        assert any("missing" in place for place in refusal(tensors(), {**CONFIG, field: True}).where)


def test_variant_tensors_travel_with_their_config(tmp_path: Path) -> None:
    found = tensors(extra={"0.q.lora_diag": (4,), "1.q.lora_diag": (4,)})
    config = {**CONFIG, "kasa_config": {"beta": 1e-4}}
    adapter = parse(found, config)
    assert {(e.name, e.kind) for e in adapter.extras} == {("0.q.lora_diag", "buffer"), ("1.q.lora_diag", "buffer")}
    assert any("kasa_config" in warning for warning in adapter.warnings)
    assert sorted(n for n, _ in PEFT.write(adapter, Facts()).tensors) == sorted(found)


@pytest.mark.parametrize("shape", [(0,), (0, SIZE), (4, 0)])
def test_empty_tensors_of_zero3_are_refused_with_the_cure(shape: tuple[int, ...]) -> None:
    found = tensors() | {"base_model.model.0.q.lora_A.weight": torch.zeros(shape)}
    error = refusal(found)
    assert "ZeRO-3" in error.problem
    assert "GatheredParameters" in error.hint
    assert error.where == (f"base_model.model.0.q.lora_A.weight {shape}",)


def test_a_file_without_modules_is_never_a_success() -> None:
    for found in ({}, {"head.weight": torch.zeros(2, 2)}, {"base_model.model.q.lora_A": torch.zeros(2, 2)}):
        assert "no LoRA module" in refusal(found, None).problem
    assert PEFT.detect(content({"q.lora_A": torch.zeros(2, 2)})) is None
    assert PEFT.detect(content({"q.lora_A": torch.zeros(2, 2)}, {"peft_type": "LOHA"})) is not None


def test_a_bare_file_needs_alpha_and_takes_it_per_module() -> None:
    found = tensors(extra={"head.weight": (3, 4), "head.bias": (3,), "other.bias": (3,)})
    error = refusal(found, None)
    assert error.where == ("0.q", "1.q")
    assert "--alpha" in error.hint
    assert "--config" in error.hint
    adapter = parse(found, None, Fact("1.*", "alpha", 3), Fact("*", "alpha", 16), Fact("*", "use_rslora", True))
    assert [(m.scaling.alpha, m.scaling.rslora, m.fan_in_fan_out) for m in adapter.modules] == [
        (16, True, None),
        (3, True, None),
    ]
    kinds = {e.name: e.kind for e in adapter.extras}
    assert kinds == {"head.weight": "modules_to_save", "head.bias": "modules_to_save", "other.bias": "bias"}
    assert "lora_alpha" not in adapter.config


def test_config_without_alpha_is_completed_by_a_fact_not_by_a_default() -> None:
    config = {"peft_type": "LORA", "r": 4}
    assert "--alpha" in refusal(tensors(), config).hint
    adapter = parse(tensors(), config, Fact("*", "alpha", 12))
    assert {m.scaling.alpha for m in adapter.modules} == {12}
    assert PEFT.write(adapter, Facts()).config["lora_alpha"] == 12


def test_the_config_overrules_facts_and_says_so() -> None:
    adapter = parse(tensors(), CONFIG, Fact("*", "alpha", 16), Fact("*", "rank", 8))
    assert {(m.scaling.alpha, m.scaling.rank) for m in adapter.modules} == {(8, 4)}
    assert adapter.warnings == ("the source has alpha 8, as adapter_config.json says, not 16",)
    assert parse(tensors(), CONFIG, Fact("*", "alpha", 8)).warnings == ()


def test_rows_of_trained_tokens_must_be_those_of_the_config() -> None:
    found = tensors(extra={"emb.token_adapter.trainable_tokens_delta": (3, 4)})
    for indices, fits in (
        ([1, 2, 3], True),
        ([1, 2], False),
        ({"emb": [1, 2, 3]}, True),
        ({"other": [1, 2, 3]}, False),
        (None, False),
    ):
        config = {**CONFIG, "trainable_token_indices": indices}
        if fits:
            assert parse(found, config).extras[0].kind == "trainable_tokens"
        else:
            assert any("3 rows" in place for place in refusal(found, config).where)


def test_optimizer_state_is_left_out_and_listed() -> None:
    found = tensors()
    name = "base_model.model.0.q.lora_A.weight"
    state = {
        f"adam_m.{name}": torch.zeros(4, SIZE),
        f"moment1.{name}": torch.zeros(4, SIZE),
        "global_step": torch.zeros(1),
    }
    adapter = parse(found | state)
    assert {n for n, _ in adapter.left_out} == set(state)
    assert len(adapter.modules) == 2


def test_embeddings_saved_whole_are_carried_and_said() -> None:
    adapter = parse(tensors(extra={"model.embed_tokens.weight": (40, 4)}))
    assert adapter.extras[0].kind == "base"
    assert any("embed_tokens" in warning for warning in adapter.warnings)


def test_attention_without_one_of_its_projections_is_refused() -> None:
    def pair(path: str, out: int) -> dict[str, torch.Tensor]:
        return {f"{path}.lora_A.weight": torch.zeros(4, 8), f"{path}.lora_B.weight": torch.zeros(out, 4)}

    assert any("in_proj_weight are missing" in p for p in refusal(pair("mha.base_layer.out_proj", 8)).where)
    odd = pair("mha.base_layer.out_proj", 8) | pair("mha", 20)
    assert any("20 rows, not 3 times" in p for p in refusal(odd).where)
    assert any("no attention" in p for p in refusal(pair("x.base_layer.inner", 8)).where)


@pytest.mark.parametrize(
    "stray",
    [
        "k.base_layer.weight",
        "weight",
        "k.lora_A.x.y",
        "head.modules_to_save.lora_A",
        "lora_diag",
        "k.token_adapter.weight",
    ],
)
def test_tensors_that_belong_to_nothing_are_never_taken_for_base_weights(stray: str) -> None:
    for config in (CONFIG, {**CONFIG, "kasa_config": {"beta": 1}}):
        assert any(stray in place for place in refusal(tensors(extra={stray: (2, 2)}), config).where)


def test_hostile_patterns_do_not_hang() -> None:
    long = "a" * 5000
    found = {f"{long}.lora_{side}.weight": torch.zeros(shape) for side, shape in (("A", (4, 8)), ("B", (6, 4)))}
    assert parse(found, {**CONFIG, "rank_pattern": {"(a+)+b": 3, "(a|a)*b": 2}}).modules[0].scaling.rank == 4
    with pytest.raises(MappingError, match="safely"):
        parse(found, {**CONFIG, "rank_pattern": {"(?=a)": 3}})


def test_content_needs_headers_only() -> None:
    found: Content = content(tensors(), CONFIG)
    assert all(spec.shape for spec in found.specs.values())
    assert PEFT.parse(found).modules[0].scaling.value == 2.0


def test_a_dense_model_has_no_adapter() -> None:
    assert PEFT.detect(content(Dense().state_dict())) is None
