"""Merged checkpoints against base and adapter: merges by peft and loralib, correct ones, and wrong ones."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from adapters import Net, checked, converted, edit, factor, notes, peft_model, randomise, stated
from safetensors.torch import load_file, save_file
from torch import nn

from lorabridge.errors import MappingError, UsageError

KINDS = {
    "linear": {"target_modules": ["q_proj", "up"]},
    "embedding": {"target_modules": ["tokens"]},
    "conv": {"target_modules": ["line", "image", "volume"]},
    "dora": {"target_modules": ["q_proj", "up"], "use_dora": True},
    "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["up"]},
    "biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
}
FILES = ("peft", "merged.safetensors", "base.safetensors")


def save(model: nn.Module, path: Path) -> None:
    save_file({n: t.detach().clone().contiguous() for n, t in model.state_dict().items()}, path, {"format": "pt"})


def merged(
    folder: Path, *, dtype: torch.dtype = torch.float32, safe: bool = False, **options: object
) -> tuple[Path, ...]:
    """Let peft merge; save base, adapter and result."""
    torch.manual_seed(0)
    net = Net().to(dtype)
    save(net, folder / FILES[2])
    model = peft_model(copy.deepcopy(net), **options)
    model.save_pretrained(folder / FILES[0])
    save(model.merge_and_unload(safe_merge=safe), folder / FILES[1])
    return tuple(folder / name for name in FILES)


def rows(source: Path, target: Path, base: Path, **options: object):
    report = checked(source, target, "tensors", base=base, **options)
    assert report.relation == "merge"
    return report, report.depths[0].modules


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_peft_merges_is_within_the_roundings_of_a_merge(kind: str, tmp_path: Path) -> None:
    adapter, target, base = merged(tmp_path, **KINDS[kind])
    for one, other in ((adapter, target), (target, adapter)):
        report, found = rows(one, other, base)
        assert report.verdict == "equal", notes(report, "tensors")
        assert all(row.ratio is not None and 0 < row.ratio <= 1 for row in found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("safe", [False, True])
def test_half_types_and_double_rounding(dtype: torch.dtype, safe: bool, tmp_path: Path) -> None:
    """peft's default adds in float32 and rounds once; safe_merge rounds the delta first, which the share shows."""
    adapter, target, base = merged(tmp_path, dtype=dtype, safe=safe, target_modules=["q_proj", "up"])
    report, found = rows(adapter, target, base)
    assert report.verdict == "equal"
    shares = [float(row.note.partition("(")[2].partition(")")[0] or 0) for row in found]
    assert (min(shares) > 0.03) == safe
    assert (max(shares) < 0.01) == (not safe)


def exact(folder: Path, change: float = 1.0) -> tuple[Path, ...]:
    """Merge in double precision and round once, ``change`` times the delta."""
    adapter, target, base = merged(folder, dtype=torch.bfloat16)
    factors, weights = load_file(adapter / "adapter_model.safetensors"), load_file(base)
    for i in range(2):
        for name in "qkv":
            path = f"layers.{i}.{name}_proj"
            a, b = (factors[factor(path, letter)].double() for letter in "AB")
            weights[f"{path}.weight"] = (weights[f"{path}.weight"].double() + change * 2 * (b @ a)).bfloat16()
    save_file(weights, target, {"format": "pt"})
    return adapter, target, base


def test_correct_rounding_is_recognised(tmp_path: Path) -> None:
    report, found = rows(*exact(tmp_path))
    assert report.verdict == "equal"
    assert {row.note for row in found} == {"rounded once"}
    assert "rounded once to nearest" in report.depths[0].proved[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [(2.0, "added twice"), (0.0, "not added"), (-1.0, "subtracted"), (0.5, "as if the scaling were 1"), (1.1, "2.2")],
)
def test_a_wrong_multiple_of_the_delta(change: float, said: str, tmp_path: Path) -> None:
    """Merged twice, not at all, or with another alpha."""
    report, found = rows(*exact(tmp_path, change))
    assert report.verdict == "different"
    assert all(row.ok is False for row in found)
    assert said in notes(report, "tensors")


def test_merged_twice_by_loralib(tmp_path: Path) -> None:
    """A state saved in evaluation mode, loaded into a fresh model and evaluated again."""
    import loralib

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = loralib.Linear(12, 20, r=4, lora_alpha=6)

    torch.manual_seed(0)
    net = randomise(One())
    save_file({"layer.weight": net.layer.weight.detach().clone()}, tmp_path / "base.safetensors", {"format": "pt"})
    torch.save(loralib.lora_state_dict(net), tmp_path / "lora.pt")
    net.eval()
    again = One()
    again.load_state_dict(net.state_dict())
    said = {"facts": stated(alpha=6, kind="linear", fan_in_fan_out=False)}
    for state, verdict in ((net, "equal"), (again.eval(), "different")):
        weight = {"layer.weight": state.layer.weight.detach().clone()}
        save_file(weight, tmp_path / "merged.safetensors", {"format": "pt"})
        report, _ = rows(*(tmp_path / n for n in ("lora.pt", "merged.safetensors", "base.safetensors")), **said)
        assert report.verdict == verdict
    assert "added twice" in notes(report, "tensors")


def test_the_base_of_another_model(tmp_path: Path) -> None:
    adapter, target, _ = merged(tmp_path)
    torch.manual_seed(5)
    save(Net(), tmp_path / "other.safetensors")
    report, found = rows(adapter, target, tmp_path / "other.safetensors")
    assert report.verdict == "different"
    assert {row.note for row in found} == {
        "not this base and this adapter: the difference to BASE is no multiple of the delta"
    }
    (check,) = report.depths[0].checks
    assert any(place.startswith("tokens.weight:") for place in check.where)


def change(path: Path, name: str, index: tuple[int, ...], bit: int = 0) -> None:
    """Flip one bit of one float32 element."""
    tensors = load_file(path)
    tensors[name].view(torch.int32)[index] ^= 1 << bit
    save_file(tensors, path, {"format": "pt"})


def test_one_bit_of_a_frozen_parameter(tmp_path: Path) -> None:
    adapter, target, base = merged(tmp_path)
    change(target, "layers.0.up.weight", (3, 4))
    report, _ = rows(adapter, target, base)
    (check,) = report.depths[0].checks
    assert check.where == ("layers.0.up.weight: 1 of 960 elements are not BASE's",)


def test_a_wrong_element_and_nan_in_a_merged_weight(tmp_path: Path) -> None:
    adapter, target, base = merged(tmp_path)
    change(target, "layers.0.q_proj.weight", (3, 4), bit=15)
    report, _ = rows(adapter, target, base)
    assert notes(report, "tensors") == "layers.0.q_proj: 1 of 576 elements are wrong"
    tensors = load_file(target)
    tensors["layers.1.k_proj.weight"][0, 0] = float("nan")
    save_file(tensors, target, {"format": "pt"})
    assert "layers.1.k_proj: 1 NaN or infinite values" in notes(rows(adapter, target, base)[0], "tensors")


def test_nan_in_the_adapter(tmp_path: Path) -> None:
    adapter, target, base = merged(tmp_path)
    edit(adapter, lambda tensors: tensors[factor("layers.0.q_proj", "A")].__setitem__((0, 0), np.nan))
    assert "NaN" in notes(rows(adapter, target, base)[0], "tensors")


def test_missing_parameters(tmp_path: Path) -> None:
    adapter, target, base = merged(tmp_path)
    tensors = load_file(target)
    del tensors["layers.0.q_proj.weight"], tensors["line.bias"]
    save_file({**tensors, "more": torch.ones(3)}, target, {"format": "pt"})
    report, _ = rows(adapter, target, base)
    assert "layers.0.q_proj: DST has no weight" in notes(report, "tensors")
    (check,) = report.depths[0].checks
    assert check.where == (
        "more: BASE has no such parameter", "layers.0.q_proj.weight: missing in DST", "line.bias: missing in DST",
    )  # fmt: skip


def tied(folder: Path, **options: object) -> tuple[nn.Module, Path]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = LlamaConfig(**fields, vocab_size=32, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    made = peft_model(model, target_modules=["embed_tokens"], **options)
    made.save_pretrained(folder / "peft", save_embedding_layers=False)
    return made, folder


def test_a_tied_head_to_which_the_delta_was_added_twice(tmp_path: Path) -> None:
    """peft 0.21's ensure_weight_tying merges the embedding once as itself and once as the head."""
    import inspect

    from peft import LoraConfig

    if "ensure_weight_tying" not in inspect.signature(LoraConfig).parameters:
        pytest.skip("this peft has no ensure_weight_tying")
    model, folder = tied(tmp_path, ensure_weight_tying=True)
    state = model.merge_and_unload().state_dict()
    weights = {n: t.detach().clone() for n, t in state.items() if n != "lm_head.weight"}
    save_file(weights, folder / "merged.safetensors", {"format": "pt"})
    factors = {n: v for n, v in load_file(folder / "peft" / "adapter_model.safetensors").items() if "embed_tokens" in n}
    save_file(factors, folder / "peft" / "adapter_model.safetensors", {"format": "pt"})
    report, found = rows(folder / "peft", folder / "merged.safetensors", folder / "base")
    embedding = next(row for row in found if row.path == "model.embed_tokens")
    base = load_file(folder / "base" / "model.safetensors")["model.embed_tokens.weight"]
    names = [next(n for n in factors if n.endswith(f"embedding_{letter}")) for letter in "AB"]
    delta = 2 * (factors[names[1]] @ factors[names[0]]).T
    times = ((weights["model.embed_tokens.weight"] - base) * delta).sum() / (delta * delta).sum()
    if round(float(times)) == 2:  # the defect is in the installed peft
        assert embedding.note == "the delta was added twice"
        assert report.verdict == "different"
    else:
        assert embedding.ok


def test_a_tied_head_written_out(tmp_path: Path) -> None:
    """A head that BASE leaves out may be the old table or the new one, and nothing else."""
    model, folder = tied(tmp_path)
    state = {n: t.detach().clone() for n, t in model.merge_and_unload().state_dict().items()}
    old = load_file(folder / "base" / "model.safetensors")["model.embed_tokens.weight"]
    target = folder / "merged.safetensors"
    for head, verdict in ((old, "equal"), (state["model.embed_tokens.weight"], "equal"), (old * 1.5, "different")):
        save_file({**state, "lm_head.weight": head.clone()}, target, {"format": "pt"})
        assert rows(folder / "peft", target, folder / "base")[0].verdict == verdict


def test_trained_token_rows(tmp_path: Path) -> None:
    """peft replaces rows of the embedding; one that is wrong is named."""
    torch.manual_seed(0)
    net = Net()
    save(net, tmp_path / "base.safetensors")
    model = peft_model(copy.deepcopy(net), trainable_token_indices={"tokens": [3, 17]})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(1)
    model.save_pretrained(tmp_path / "peft")
    save(model.merge_and_unload(), tmp_path / "merged.safetensors")
    files = tuple(tmp_path / name for name in FILES)
    assert rows(*files)[0].verdict == "equal"
    change(files[1], "tokens.weight", (17, 2))
    (check,) = rows(*files)[0].depths[0].checks
    assert check.where == ("tokens.weight: 1 rows are wrong, first [17]",)


def test_across_frameworks(tmp_path: Path) -> None:
    """A MindSpore adapter, a MindSpore merge and a PyTorch base, in any combination."""
    adapter, target, base = merged(tmp_path, target_modules=["q_proj", "up"])
    ours = converted(adapter, tmp_path / "lora.ckpt")
    new, old = (converted(p, p.with_suffix(".ckpt"), target_dialect="ms", family="identity") for p in (target, base))
    for files in ((ours, new, old), (adapter, new, base), (ours, target, old), (adapter, new, old)):
        report, found = rows(*files)
        assert report.verdict == "equal", report.summary()
        assert len(found) == 4


def test_gpt2_stores_some_weights_the_other_way_round(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    fields = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 20, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**fields, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path / "base")
    made = peft_model(model, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    made.save_pretrained(tmp_path / "peft")
    made.merge_and_unload().save_pretrained(tmp_path / "merged")
    files = tmp_path / "peft", tmp_path / "merged", tmp_path / "base"
    assert rows(*files)[0].verdict == "equal"
    converted(files[1], tmp_path / "ms", family="gpt2")
    report, found = rows(files[0], tmp_path / "ms", files[2])
    assert report.verdict == "equal"
    assert len(found) == 5


def test_what_is_needed_is_said(tmp_path: Path) -> None:
    adapter, target, base = merged(tmp_path)
    with pytest.raises(UsageError, match="adapter and the other file a whole model") as raised:
        checked(adapter, target)
    assert "--base" in raised.value.hint
    with pytest.raises(UsageError, match="--base is an adapter"):
        checked(adapter, target, base=adapter)
    with pytest.raises(UsageError, match="'layers' cannot run"):
        checked(adapter, target, "layers", base=base)
    found = checked(adapter, target, base=base).depth("layers")
    assert found is not None
    assert (found.state, found.ok) == ("left out", None)


def test_a_square_weight_of_unknown_order_is_asked_for(tmp_path: Path) -> None:
    import loralib

    torch.manual_seed(0)
    net = nn.Sequential(loralib.Linear(12, 12, r=4, lora_alpha=6))
    torch.save(loralib.lora_state_dict(randomise(net)), tmp_path / "lora.pt")
    weight = {"0.weight": torch.randn(12, 12)}
    for name in ("merged", "base"):
        save_file(weight, tmp_path / f"{name}.safetensors", {"format": "pt"})
    with pytest.raises(MappingError, match="square"):
        rows(*(tmp_path / n for n in ("lora.pt", "merged.safetensors", "base.safetensors")), facts=stated(alpha=6))
