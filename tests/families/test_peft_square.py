"""peft as the judge: what it merges, converted, is the converted base with the converted adapter merged."""

from __future__ import annotations

import numpy as np
import pytest

from lorabridge import axes
from lorabridge.dialects.adapter import Adapter, Extra, LoraModule, Scaling, Term
from lorabridge.families.tables import Table, map_adapter, sizes_from_config

from .conftest import F64, Store, delta

RANK, ALPHA = 3, 5


def keep(store: Store, name: str, tensor: object) -> axes.Expr:
    """Put a torch tensor into the store."""
    values = tensor.detach().double().numpy()  # type: ignore[attr-defined]
    store.bits[name] = np.ascontiguousarray(values).view("<u8")
    return axes.Read(name, F64, values.shape)


def whole(store: Store, label: str, state: dict[str, object]) -> Adapter:
    extras = [Extra(*n.rpartition(".")[::2], keep(store, f"{label}:{n}", t), "base") for n, t in state.items()]
    return Adapter((), tuple(extras))


def small(architecture: str) -> object:
    import torch
    import transformers

    torch.manual_seed(0)
    if architecture == "GPT2LMHeadModel":
        config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, n_positions=6, bos_token_id=0,
                                         eos_token_id=0)  # fmt: skip
    else:
        config = transformers.BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=11,
                                         intermediate_size=8, max_position_embeddings=8)  # fmt: skip
    return getattr(transformers, architecture)(config).double()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("family", "architecture", "targets"),
    [
        ("gpt2", "GPT2LMHeadModel", ["c_attn", "c_fc", "c_proj"]),
        ("bert", "BertForTokenClassification", ["query", "value", "dense"]),
    ],
)
def test_a_merge_by_peft_converts_to_the_merge_of_the_conversion(
    tables: dict[str, Table], store: Store, family: str, architecture: str, targets: list[str], dora: bool
) -> None:
    import peft
    import torch

    base = small(architecture)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}  # type: ignore[attr-defined]
    wrapped = peft.get_peft_model(
        base, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, use_dora=dora,
                              fan_in_fan_out=family == "gpt2", init_lora_weights=False)
    )  # fmt: skip
    modules = []
    for name, layer in wrapped.base_model.model.named_modules():
        if hasattr(layer, "lora_A"):
            if dora:
                magnitude = layer.lora_magnitude_vector["default"].weight
                magnitude.data *= torch.linspace(0.5, 1.5, magnitude.numel())
            a, b = (keep(store, f"{name}.{k}", getattr(layer, k)["default"].weight) for k in ("lora_A", "lora_B"))
            m = keep(store, f"{name}.m", layer.lora_magnitude_vector["default"].weight.flatten()) if dora else None
            out = b.shape[0]
            terms = (Term(a, b, 0, out),)
            modules.append(LoraModule(name, "linear", out, terms, Scaling(ALPHA, RANK), magnitude=m))
    after = wrapped.merge_and_unload().state_dict()
    table = tables[family]
    sizes = sizes_from_config(table, base.config.to_dict())  # type: ignore[attr-defined]
    first = {e.name: store.value(e.value) for e in map_adapter(table, whole(store, "after", after), to="ms").extras}
    second = {e.name: store.value(e.value) for e in map_adapter(table, whole(store, "base", before), to="ms").extras}
    for module in map_adapter(table, Adapter(tuple(modules)), to="ms", sizes=sizes).modules:
        name = f"{module.path}.weight"
        weight = second[name].T if module.fan_in_fan_out else second[name]
        total = weight + delta(store, module, weight.shape[1])
        if module.magnitude is not None:
            total *= (store.value(module.magnitude) / np.linalg.norm(total, axis=1))[:, None]
        second[name] = total.T if module.fan_in_fan_out else total
    assert set(first) == set(second)
    changed = sum(not np.array_equal(store.bits[f"base:{n}"], store.bits[f"after:{n}"]) for n in before)
    assert changed == len(modules) > 4
    for name, values in first.items():
        np.testing.assert_allclose(values, second[name], rtol=1e-12, atol=1e-14, err_msg=name)
