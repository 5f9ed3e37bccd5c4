"""What a table leaves out because of its number is left out at that number only."""

from __future__ import annotations

import pytest

from lorabridge import axes
from lorabridge.dialects.adapter import Adapter, Extra
from lorabridge.dtypes import BY_NAME
from lorabridge.errors import MappingError
from lorabridge.families.tables import load_family, map_adapter, read_table, sizes_from_config

TABLE = """
schema = 1
family = "further"
match = { model_type = ["further"] }
[sizes]
layers = "l"
extra = "e"
hidden = "h"
[holes]
i = "layers"
n = { count = "extra", hf = "layers", ms = "0" }
[[layout]]
name = "kind"
choices = { training = "1", inference = "2" }
[[param]]
hf = "layers.{i}.bias"
ms = "blocks.{i}.bias"
axes = "hidden"
when = { kind = "training" }
[[param]]
hf = "norm"
ms = "norm.gamma"
axes = "hidden"
[[buffer]]
hf = "layers.{n}.bias"
drop = "a layer for further tokens"
when = { kind = "inference" }
"""


def model(*names: str) -> Adapter:
    extras = [Extra(*n.rpartition(".")[::2], axes.Read(n, BY_NAME["float32"], (4,)), "base") for n in names]
    return Adapter((), tuple(extras))


def test_a_layer_that_the_layout_has_no_rule_for_is_not_taken_for_one_to_leave_out() -> None:
    table = read_table(TABLE, "further.toml")
    sizes, layout = {"layers": 2, "extra": 1, "hidden": 4}, {"kind": "inference"}
    made = map_adapter(table, model("norm", "layers.2.bias"), to="ms", sizes=sizes, layout=layout)
    assert [name for name, _ in made.left_out] == ["layers.2.bias"]
    with pytest.raises(MappingError, match="1 of 3 names") as caught:
        map_adapter(table, model("norm", "layers.1.bias", "layers.2.bias"), to="ms", sizes=sizes, layout=layout)
    assert "layers.1.bias: no rule" in str(caught.value)


def test_without_a_config_nothing_is_left_out_for_its_number() -> None:
    table = read_table(TABLE, "further.toml")
    with pytest.raises(MappingError, match="number decides") as caught:
        map_adapter(table, model("norm", "layers.1.bias"), to="ms", layout={"kind": "inference"})
    assert "--config" in caught.value.hint


def test_the_routing_bias_of_deepseek_is_not_lost_in_a_layout_that_inference_does_not_have() -> None:
    table = load_family("deepseek3")
    config = {"hidden_size": 8, "intermediate_size": 8, "moe_intermediate_size": 4, "n_shared_experts": 1,
              "first_k_dense_replace": 1, "num_hidden_layers": 2, "num_nextn_predict_layers": 1,
              "n_routed_experts": 4, "vocab_size": 9, "num_attention_heads": 2, "q_lora_rank": 4, "kv_lora_rank": 4,
              "qk_nope_head_dim": 2, "qk_rope_head_dim": 2, "v_head_dim": 2}  # fmt: skip
    with pytest.raises(MappingError, match="do not fit the table deepseek3"):
        map_adapter(
            table, model("model.layers.1.mlp.gate.e_score_correction_bias"), to="ms",
            sizes=sizes_from_config(table, config), layout={"mla": "predict", "experts": "batched"},
        )  # fmt: skip
