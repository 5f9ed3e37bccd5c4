"""MindPet 1.0.4: ``P.mindpet_delta_lora_a[r, in]`` and ``P.mindpet_delta_lora_b[out, r]`` of a LoRADense.

MindFormers' legacy networks (0.8 ... 2.1) put LoRADense in the place of their dense layers. A LoRADense that is itself
the network keeps its parameters' upper-case names (``mindpet_delta_lora_A``). Until MindFormers 0.6 the package was
called tk, and checkpoints say ``tk_delta_lora_a``: the dialect ``tk``. There is one rank and one alpha for all layers
(scaling ``alpha / rank``), stored nowhere; MindFormers 1.7 and later leave an adapter_config.json in their output
directory. ``TrainableParamsCheckPoint`` and MindFormers' own checkpoints also hold the optimizer's state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..axes import Expr
from ..errors import counted
from .adapter import Adapter, Content, Facts, LoraModule, Written
from .mindformers import LINEAR, parse_pairs
from .mindformers_write import graph_files, refuse, shared
from .pairs import Names, Problems
from .spelling import spell_extras

STEMS = {"mindpet": "mindpet_delta_lora_", "tk": "tk_delta_lora_"}
ROLES = {f"{stem}{letter}": (letter.lower(), "weight") for stem in STEMS.values() for letter in ("a", "b", "A", "B")}
OTHER = ("mindpet_delta_", "tk_delta_")


@dataclass(frozen=True, slots=True)
class Mindpet:
    """Read and write LoRADense parameters; linear layers with one global rank and alpha.

    ``name``: "mindpet", or "tk" for the spelling of MindFormers up to 0.6. Each reads both spellings.
    """

    name: str = "mindpet"
    framework: Literal["torch", "mindspore"] = "mindspore"

    def detect(self, content: Content) -> str | None:
        """Claim files with the dialect's own LoRA names; a file with both spellings is MindPet's to refuse."""
        found = {name: _named(content, stem) for name, stem in STEMS.items()}
        mine = found[self.name]
        if not mine or (self.name == "tk" and found["mindpet"]):
            return None
        return f"{counted(len(mine), 'parameter')} such as {mine[0]}"

    def parse(self, content: Content) -> Adapter:
        """Read every LoRADense; a MappingError names mixed spellings and MindPet's other algorithms."""
        return parse_pairs(content, ROLES, "a LoRADense", LINEAR, check=_check_names)

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell linear modules with one rank and alpha (see ``factors.uniform``).

        ``facts`` may state ``rank`` and ``alpha`` for ``*``. Raises MappingError for all that a LoRADense is not.
        """
        refuse(adapter, "MindPet")
        made = shared(adapter, facts, whole_alpha=False)
        tensors = [pair for module in made.modules for pair in self._pair(module)] + spell_extras(adapter.extras)
        files, told = graph_files(adapter, made, freeze=False)
        alpha = made.facts.get("*", "alpha")
        needs = f"build the network with lora_rank={made.rank} and lora_alpha={alpha}: the file cannot say them"
        notes = (needs, *told, *made.notes)
        if made.alpha != int(made.alpha):
            notes = (*notes, f"alpha {alpha!r} is not an integer, which MindPet accepts and MindFormers' tools round")
        return Written(tensors, facts=made.facts, notes=notes, modules=made.modules, files=files)

    def _pair(self, module: LoraModule) -> tuple[tuple[str, Expr], tuple[str, Expr]]:
        (term,) = module.terms
        a, b = ("a", "b") if module.path else ("A", "B")
        stem = f"{module.path}.{STEMS[self.name]}" if module.path else STEMS[self.name]
        return ((f"{stem}{a}", term.a), (f"{stem}{b}", term.b))


TK = Mindpet("tk")


def _named(content: Content, stem: str) -> list[str]:
    return [name for name in content.specs if name.rpartition(".")[2] in {f"{stem}{x}" for x in ("a", "b", "A", "B")}]


def _check_names(found: Names, problems: Problems) -> None:
    """Refuse two spellings in one file (two adapters, or a half-renamed one) and MindPet's other algorithms."""
    last = {spec.name.rpartition(".")[2]: spec.name for tensors in found.pairs.values() for spec in tensors.values()}
    styles = {name[:-1] + ("a" if name[-1].islower() else "A"): full for name, full in last.items()}
    if len(styles) > 1:
        problems.add(
            "two spellings of MindPet's LoRA names in one file", ", ".join(styles.values()), "rename one of them"
        )
    for name in found.rest:
        part = next((part for part in name.split(".") if part.startswith(OTHER)), None)
        if part is not None:
            problems.add(
                f"{part} belongs to another algorithm than LoRA", name, "save the LoRA parameters by themselves"
            )
