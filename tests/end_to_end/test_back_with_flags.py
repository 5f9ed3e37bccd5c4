"""The way back without a manifest: flags say what the file does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dialects.peft_models import CASES

from lorabridge import ConvertOptions, convert
from lorabridge.dialects.adapter import Fact, Facts, Value
from lorabridge.errors import MappingError


def stated(**facts: Value | dict[str, Value]) -> Facts:
    """Return facts for all modules, or per pattern where a dict is given."""
    found = []
    for name, value in facts.items():
        pairs = value.items() if isinstance(value, dict) else [("*", value)]
        found += [Fact(pattern, name, one) for pattern, one in pairs]
    return Facts(tuple(sorted(found, key=lambda fact: fact.pattern == "*")))


def back(name: str, folder: Path, facts: Facts, *, to: str, family: str | None = None, config: bool = False) -> None:
    """Convert a peft adapter, drop what travelled with it, convert it back; peft must compute what it did."""
    from peft import PeftModel

    case = CASES[name]
    adapted = case.adapted()
    adapted.save_pretrained(folder / "peft")
    out = folder / ("out.pt" if to == "loralib" else "out.ckpt")
    convert(folder / "peft", out, ConvertOptions(target_dialect=to, family=family))
    out.with_name(out.name + ".lorabridge.json").unlink()
    options = ConvertOptions(
        target_dialect="peft", family=family, facts=facts,
        config=folder / "peft" / "adapter_config.json" if config else None,
    )  # fmt: skip
    convert(out, folder / "back", options)
    again = PeftModel.from_pretrained(case.base(), folder / "back").eval()
    torch.testing.assert_close(case.output(again), case.output(adapted), rtol=0, atol=3e-7)


PATTERNS = stated(alpha={"layers.1.*": 3, "layers.0.k": 9, "*": 6})


@pytest.mark.parametrize("to", ["loralib-ms", "loralib"])
@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("rslora", stated(alpha=5, use_rslora=True)),
        ("patterns", PATTERNS),
        ("embedding", stated(alpha=8, kind={"emb": "embedding"})),
        ("llama embedding", stated(alpha=8, merged=False, kind={"*embed_tokens": "embedding"})),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_back_to_peft(name: str, facts: Facts, to: str, tmp_path: Path) -> None:
    back(name, tmp_path, facts, to=to)


@pytest.mark.parametrize(
    ("name", "family", "facts"),
    [
        ("gpt2 embedding", "gpt2", stated(alpha=8, kind={"*word_embedding": "embedding"})),
        ("llama embedding", "llama", stated(alpha=8, merged=False, kind={"*tok_embeddings": "embedding"})),
    ],
)
def test_an_embedding_through_a_family(name: str, family: str, facts: Facts, tmp_path: Path, mindspore) -> None:
    """MindFormers calls the table embedding_table or embedding_weight; the factors are the cell's lora_A and lora_B."""
    back(name, tmp_path, facts, to="loralib-ms", family=family)
    loaded = mindspore.load_checkpoint(str(tmp_path / "out.ckpt"))
    assert any(key.endswith(("word_embedding.lora_A", "tok_embeddings.lora_A")) for key in loaded)


@pytest.mark.parametrize("name", ["trainable tokens", "layer_replication", "pissa"])
def test_back_with_the_config_that_only_peft_knows(name: str, tmp_path: Path) -> None:
    """An adapter_config.json beside or with a file of another dialect does not make it peft's."""
    back(name, tmp_path, stated(alpha=8), to="loralib-ms", config=True)


@pytest.mark.parametrize("to", ["mindpet", "loralib"])
def test_what_a_target_cannot_express_is_its_own_lack(to: str, tmp_path: Path) -> None:
    CASES["embedding dora" if to == "mindpet" else "attention"].adapted().save_pretrained(tmp_path / "peft")
    with pytest.raises(MappingError) as raised:
        convert(tmp_path / "peft", tmp_path / "out", ConvertOptions(target_dialect=to))
    assert "wrong" not in raised.value.problem
    assert "merge_and_unload" in raised.value.hint
    assert not (tmp_path / "out").exists()


def test_a_stated_alpha_stays_as_short_as_it_was(tmp_path: Path) -> None:
    CASES["linear float alpha"].adapted().save_pretrained(tmp_path / "peft")
    report = convert(tmp_path / "peft", tmp_path / "out.ckpt", ConvertOptions(target_dialect="mindpet"))
    assert "lora_rank=3 and lora_alpha=7.3" in report.notes[0]
    assert not any("7.29" in note for note in report.notes)
