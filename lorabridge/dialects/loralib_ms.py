"""loralib-ms: the names of lorabridge's own MindSpore layers, bare parameters of the cell that replaces P.

| tensor | name | shape |
|---|---|---|
| factors | ``P.lora_A``, ``P.lora_B`` | as loralib; convolutions also in peft's form |
| DoRA magnitude | ``P.lora_magnitude_vector`` | ``[out]``, conv ``[1, out, 1, ...]`` |
| bias of B | ``P.lora_bias`` | ``[out]`` |
| trained token rows | ``P.trainable_tokens`` | ``[n, dim]``; the config lists which rows |
| fused input projection of attention | ``P.in_proj_lora_A`` and so on | the delta is added to ``P.in_proj_weight`` |

peft's form of a convolution is ``A[r, in, *k]``, ``B[out, r/groups, 1, ...]``; loralib's is ``A[r*k, in*k]``,
``B[out//groups*k, r*k]``, in d dimensions ``B[out//groups * k**(d-1), r*k]``. Base parameters keep MindSpore's names
(``P.weight``, ``P.embedding_table``). Alpha, rsLoRA, kinds, enabled blocks and kernels are facts beside the file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from . import factors
from .adapter import Adapter, Content, Facts, LoraModule, Written
from .loralib import bare_names, named, parse_bare, spell_pair
from .pairs import group, in_mindspore
from .spelling import Spelled, facts_about, name_tables, spell_extras

PARTS = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "magnitude", "lora_bias": "bias"}
ROLES = {
    **{name: (role, "weight") for name, role in PARTS.items()},
    **{f"in_proj_{name}": (role, "in_proj_weight") for name, role in PARTS.items()},
}


class LoralibMs:
    """Read and write the parameters of lorabridge's MindSpore LoRA cells."""

    name = "loralib-ms"
    framework: Literal["torch", "mindspore"] = "mindspore"

    def detect(self, content: Content) -> str | None:
        """Claim MindSpore files with bare ``lora_A`` parameters."""
        return bare_names(content) if in_mindspore(content) else None

    def parse(self, content: Content) -> Adapter:
        """Read modules from names, shapes and facts; raise one MappingError for everything that is missing or odd."""
        return parse_bare(content, group(content, ROLES))

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell an adapter for our layers; conv factors keep their form unless the fact ``conv_form`` chooses one."""
        spelled = [_spell(module, facts) for module in adapter.modules]
        tensors = [pair for item in spelled for pair in item.tensors]
        tensors += spell_extras(name_tables(adapter, "embedding_table"))
        notes = tuple(note for item in spelled for note in item.notes)
        config = dict(adapter.config) or None
        modules = tuple(item.module for item in spelled)
        return Written(tensors, config, facts_about(adapter, spelled), notes, modules)


def _spell(module: LoraModule, facts: Facts) -> Spelled:
    form, before = facts.get(module.path, "conv_form"), module.scaling.rank
    if form == "peft":
        module = factors.conv_to_peft(module)
    elif form == "loralib":
        module = factors.conv_to_loralib(module, extended=True)
    item = spell_pair(module, facts)
    if module.scaling.rank != before:
        grown = (
            f"{module.path}: rank {before} became {module.scaling.rank} in {module.conv_form}'s conv factors, exactly"
        )
        item = replace(item, notes=(*item.notes, grown))
    beside = {"lora_magnitude_vector": module.magnitude, "lora_bias": module.lora_bias}
    extra = named(module, {name: expr for name, expr in beside.items() if expr is not None})
    return replace(item, tensors=(*item.tensors, *extra.items()))
