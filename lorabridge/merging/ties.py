"""Embeddings that a language model's head shares, when an adapter reaches one of the two.

A LoRA delta on the input embedding is not a delta on the head: training added it to the embedding alone, so the merged
model has two different matrices and must say so in its config. Only what peft trained on both (trained token rows, and
``ensure_weight_tying``) stays tied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..dialects.adapter import Extra, LoraModule
from .landing import parameter_of
from .twins import Same, without_twin
from .worksheet import Addition, Worksheet

EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight",
    "tok_embeddings.embedding_weight", "word_embedding.embedding_table",
)  # fmt: skip
"""How the names of input embeddings end."""
HEAD = "lm_head.weight"
WITH_HEAD = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")
OTHER_HEADS = ("ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")
"""Ends of transformers' architecture names: where the head is ``lm_head``, and where it may be called otherwise."""


def settle(work: Worksheet, additions: Sequence[Addition], same: Same | None) -> list[Addition]:
    """Untie the head from the embedding where the adapters make them differ; note it, and change the config.

    Returns the additions without what they hold for a head that stays tied. ``same``: compares bits; without it
    nothing counts as equal.
    """
    embedding = next((name for name in work.values if name.endswith(EMBEDDINGS)), "")
    heads = [str(name) for name in work.config.get("architectures") or ()] if work.config else []  # type: ignore[union-attr]
    reached = _reached(work, additions)
    if not embedding or not (reached & {embedding, HEAD}):
        return list(additions)
    told = work.config.get("tie_word_embeddings") if work.config is not None else None
    if told is False or (HEAD in work.values and told is None):
        return list(additions)
    if any(name.endswith(OTHER_HEADS) for name in heads):
        work.landing.refuse(f"{embedding}: the head of {heads[0]} may share it", "merge such a model in peft")
        return list(additions)
    if HEAD not in work.values and HEAD not in reached and not any(name.endswith(WITH_HEAD) for name in heads):
        if work.config is None:
            work.landing.refuse(f"{embedding}: a head may share it", "give the model's config.json with --config")
        return list(additions)
    if same is not None and HEAD in reached:
        stripped = [_stripped(work, addition, embedding, same) for addition in additions]
        if all(copied for _, copied in stripped):
            _keep(work, embedding, {embedding})
            return [addition for addition, _ in stripped]
    if any(addition.adapter.config.get("ensure_weight_tying") for addition in additions) or _only_rows(additions):
        _keep(work, embedding, reached)
    else:
        _untie(work, embedding)
    return list(additions)


def _stripped(work: Worksheet, addition: Addition, embedding: str, same: Same) -> tuple[Addition, bool]:
    adapter, known = addition.adapter, {*work.values, HEAD}
    items: list[LoraModule | Extra] = [*adapter.modules, *adapter.extras]
    names = {id(item): _name_of(item, known) for item in items}
    kept, copied = without_twin(adapter, names, embedding, HEAD, same)
    return replace(addition, adapter=kept), copied


def _untie(work: Worksheet, embedding: str) -> None:
    if work.config is None:
        work.landing.refuse(f"{embedding}: is tied to the head", "give the model's config.json with --config")
        return
    work.values.setdefault(HEAD, work.values[embedding])
    work.config["tie_word_embeddings"] = False
    work.notes.append(
        f"{HEAD} was tied to {embedding} and now differs: both are written, and config says tie_word_embeddings=false"
    )


def _keep(work: Worksheet, embedding: str, reached: set[str]) -> None:
    if {embedding, HEAD} <= reached:
        work.landing.refuse(
            f"{HEAD} and {embedding} are to stay tied, but the adapter has different values for them",
            "merge such an adapter in peft",
        )
    elif HEAD in work.values:
        work.shared[HEAD] = embedding


def _reached(work: Worksheet, additions: Sequence[Addition]) -> set[str]:
    items: list[LoraModule | Extra] = [m for a in additions for m in a.adapter.modules]
    items += [e for a in additions for e in a.adapter.extras]
    known = {*work.values, HEAD}
    return {_name_of(item, known) for item in items}


def _name_of(item: LoraModule | Extra, known: set[str]) -> str:
    """Return the base parameter that something of an adapter reaches."""
    if isinstance(item, LoraModule):
        return parameter_of(item.path, item.weight, known)
    rows = item.kind == "trainable_tokens"
    return parameter_of(item.path, item.parameter, known) or item.name if rows else item.name


def _only_rows(additions: Sequence[Addition]) -> bool:
    """Say whether trained token rows are all that reaches an embedding."""
    ends = tuple(name.rpartition(".")[0] for name in (*EMBEDDINGS, HEAD))
    paths = [m.path for a in additions for m in a.adapter.modules]
    paths += [e.path for a in additions for e in a.adapter.extras if e.kind != "trainable_tokens"]
    return not any(path.endswith(ends) for path in paths)


def share(work: Worksheet) -> None:
    """Give what stays tied the merged value."""
    for name, other in work.shared.items():
        work.values[name] = work.values[other]
