"""msbnb (MindNLP master, 2026-03): ``P.lora.lora_A[in, r]`` and ``P.lora.lora_B[r, out]`` of its quantized LoRA layers.

P is a Linear4bitWithLoRA or its kin, whose factors lie in a LoRALinear called ``lora``; a LoRALinear by itself has
``P.lora_A``, which is read as well. The names are loralib's and the factors its transposes, so the dialect is never
detected: name it with ``--from msbnb``. Where the factors make no sense as loralib's, both dialects are offered. Rank
and alpha are in no file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ..axes import read
from ..errors import MappingError
from . import factors
from .adapter import Adapter, Content, Extra, Facts, LoraModule, Written
from .optimizer import training_state
from .pairs import MERGE, Problems, Reader
from .spelling import Spelled, facts_about, spell_extras
from .transposed import Spelling, read_modules, sort_names, turned

SPELLING = Spelling("lora_A", "lora_B")
INNER = ".lora"
"""Where a quantized layer keeps its factors."""


class Msbnb:
    """Read and write the parameters of msbnb's LoRA layers; linear ones only."""

    name = "msbnb"
    framework: Literal["torch", "mindspore"] = "mindspore"

    def detect(self, content: Content) -> str | None:
        """Claim files of bare factors that only fit together when turned around, beside whoever reads them straight."""
        pairs, _ = sort_names(content, SPELLING)
        shapes = [(specs["a"].shape, specs["b"].shape) for specs in pairs.values() if {"a", "b"} <= set(specs)]
        if not shapes or any(len(a) != 2 or len(b) != 2 or a[1] != b[0] or a[1] > min(a[0], b[1]) for a, b in shapes):
            return None
        odd = [(a, b) for a, b in shapes if not b[1] or a[0] % b[1] or b[1] > min(a[1], b[0])]
        return f"factors of shape {list(odd[0][0])} and {list(odd[0][1])} fit as [in, r] and [r, out]" if odd else None

    def parse(self, content: Content) -> Adapter:
        """Read every pair turned around; a MappingError names what is missing, alpha first of all."""
        left_out = training_state(content.specs)
        skipped = {name for name, _ in left_out}
        specs = {name: spec for name, spec in content.specs.items() if name not in skipped}
        found, rest = sort_names(replace(content, specs=specs), SPELLING)
        pairs = {
            path if path.removesuffix(INNER) in found else path.removesuffix(INNER): s for path, s in found.items()
        }
        if not pairs:
            raise MappingError("the file holds no lora_A and lora_B", where=content.path, hint="check --from")
        reader = Reader(content, rest)
        ranked = {path: pair["b"].shape[0] for path, pair in pairs.items() if "b" in pair and pair["b"].shape}
        scaling = {path: reader.scaling(path, rank) for path, rank in ranked.items() if rank}
        modules = read_modules(content, pairs, scaling, reader.problems)
        reader.problems.raise_any(content.path)
        extras = tuple(
            Extra(name.rpartition(".")[0], name.rpartition(".")[2], read(spec), "base") for name, spec in rest.items()
        )
        return Adapter(modules, extras, dict(content.config or {}), tuple(left_out))

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell linear modules turned around; rank and alpha become facts beside the file."""
        problems = Problems("properties of the adapter have no place in msbnb")
        for module in adapter.modules:
            if module.kind != "linear" or module.weight != "weight":
                problems.add(f"msbnb has LoRA for linear layers only, not {module.kind}", module.path, MERGE)
            if module.magnitude is not None or module.lora_bias is not None:
                problems.add("msbnb has neither DoRA nor a bias on the B factor", module.path, MERGE)
        problems.raise_any()
        modules = tuple(_plain(module) for module in adapter.modules)
        spelled = [Spelled(module, ()) for module in modules]
        inner = [replace(module, path=f"{module.path}{INNER}") for module in modules]
        tensors = [*turned(inner, SPELLING), *spell_extras(adapter.extras)]
        return Written(tensors, facts=facts_about(adapter, spelled), modules=modules)


def _plain(module: LoraModule) -> LoraModule:
    module = factors.grow(module)
    return replace(module, scaling=factors.plain_scaling(module))
