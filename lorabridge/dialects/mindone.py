"""MindOne's own LoRA layers, whose files hold no scaling: ``mindone.models.lora`` and gm, the port of SDXL's code.

| dialect | written by | factors | base weight |
|---|---|---|---|
| ``mindone-lora`` | ``inject_trainable_lora`` | ``P.lora_down.weight``, ``P.lora_up.weight`` | ``P.linear.weight`` |
| ``mindone-gm`` | ``examples/stable_diffusion_xl`` | ``P.lora_A.weight``, ``P.lora_B.weight`` | ``P.weight`` |

All layers share one rank. ``mindone-lora``, used by the examples of Stable Diffusion 2, multiplies by a ``scale`` that
is an argument of the network, not ``alpha / rank``; ``mindone-gm`` by ``lora_alpha / lora_dim``. Neither is in the
file, so alpha has to be stated; for a ``scale`` it is ``scale * rank``. P is the path in the original code
(``model.diffusion_model.input_blocks.1.1 ...``): the family tables sd15, sd21 and sdxl give diffusers' names. Read in
MindOne's sources of 2023-12 to 2024-11.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ..axes import Expr
from ..errors import MappingError
from . import factors
from .adapter import Adapter, Content, Fact, Facts, LoraModule, Written
from .diffusers_names import COMPONENTS
from .loralib import parse_bare
from .pairs import MERGE, Problems, group, in_mindspore
from .spelling import spell_extras

ROLES = {"lora_A": ("a", "weight"), "lora_B": ("b", "weight")}


@dataclass(frozen=True, slots=True)
class MindoneLayers:
    """Read and write linear factors of one rank and scaling below MindOne's paths.

    ``ends``: how factors and base weights end, and loralib's parameters that they are.
    """

    name: str
    ends: Mapping[str, str]
    needs: str
    framework: Literal["torch", "mindspore"] = "mindspore"

    def detect(self, content: Content) -> str | None:
        """Claim MindSpore files with these factors; gm's only below the paths of its networks."""
        down, _ = self.factors
        found = next((name for name in content.specs if name.endswith(down)), None)
        if found is None or not in_mindspore(content):
            return None
        if self.name == "mindone-gm" and not found.startswith(("model.diffusion_model.", "conditioner.")):
            return None
        return f"parameters such as {found}"

    @property
    def factors(self) -> tuple[str, str]:
        """How the names of A and of B end."""
        first, second, *_ = self.ends
        return first, second

    def parse(self, content: Content) -> Adapter:
        """Read every layer; a MappingError asks for alpha, which the file does not hold, and names what is odd."""
        specs = {self._plain(name): spec for name, spec in content.specs.items()}
        if len(specs) < len(content.specs):
            raise MappingError(
                "two tensors are one parameter", where=content.path, hint="remove one of each pair of names"
            )
        known = Facts((Fact("*", "kind", "linear"), Fact("*", "enable_lora", [True])))
        inner = replace(content, specs=specs, facts=known.then(content.facts))
        return parse_bare(inner, group(inner, ROLES))

    def _plain(self, name: str) -> str:
        for end, parameter in self.ends.items():
            if name.endswith(end):
                return name.removesuffix(end) + parameter
        return name

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell linear modules with one rank and scaling (see ``factors.uniform``).

        ``facts`` may state ``rank`` and ``alpha`` for ``*``. MappingError for all that these layers are not, and for
        diffusers' paths, which no network of these has.
        """
        self._refuse(adapter)
        modules, top, shared, notes = factors.uniform_as_told(adapter.modules, facts)
        down, up = self.factors
        tensors: list[tuple[str, Expr]] = []
        for module in modules:
            (term,) = module.terms
            tensors += [(f"{module.path}{down}", term.a), (f"{module.path}{up}", term.b)]
        for name, value in spell_extras(adapter.extras):
            plain = next((end for end, parameter in self.ends.items() if parameter == ".weight"), ".weight")
            own = name.removesuffix(".weight") in {module.path for module in modules}
            tensors.append(
                (f"{name.removesuffix('.weight')}{plain}" if own and name.endswith(".weight") else name, value)
            )
        whole = factors.as_written(shared)
        needs = self.needs.format(rank=top, alpha=f"{whole:g}", scale=f"{shared / top:g}" if top else "1")
        said = Facts((Fact("*", "rank", top), Fact("*", "alpha", whole)))
        return Written(tensors, facts=said, notes=(needs, *notes), modules=modules)

    def _refuse(self, adapter: Adapter) -> None:
        problems = Problems(f"properties of the adapter have no place in {self.name}")
        for module in adapter.modules:
            for wrong, what in _odd(module):
                if wrong:
                    problems.add(f"{self.name} has no {what}", module.path, MERGE)
        if any(module.path.partition(".")[0] in COMPONENTS for module in adapter.modules):
            outside = [m.path for m in adapter.modules if m.path.partition(".")[0] in COMPONENTS]
            raise MappingError(
                "the paths are diffusers', and these networks of MindOne have the original code's",
                where=outside,
                hint="give the table of the original names with --family sd15, sd21 or sdxl; "
                "select the U-Net with --include 'unet.*'",
            )
        for extra in adapter.extras:
            if extra.kind == "trainable_tokens":
                problems.add(f"{self.name} has no trainable token rows", extra.name, MERGE)
        if adapter.merged and any(extra.kind == "base" for extra in adapter.extras):
            problems.add(
                "the base weights already contain the adapter, and the layers would add it again",
                "base weights", "leave the base out with --adapter-only",
            )  # fmt: skip
        problems.raise_any()


def _odd(module: LoraModule) -> tuple[tuple[bool, str], ...]:
    return (
        (module.kind != "linear", f"LoRA for {module.kind}"),
        (module.weight != "weight", f"LoRA for {module.weight}"),
        (module.magnitude is not None, "DoRA magnitude"),
        (module.lora_bias is not None, "bias on the B factor"),
    )


LAYERS = MindoneLayers(
    "mindone-lora",
    {
        ".lora_down.weight": ".lora_A",
        ".lora_up.weight": ".lora_B",
        ".linear.weight": ".weight",
        ".linear.bias": ".bias",
    },
    "inject the layers with rank={rank} and scale={scale}: the file cannot say them",
)
GM = MindoneLayers(
    "mindone-gm",
    {".lora_A.weight": ".lora_A", ".lora_B.weight": ".lora_B"},
    "build the network with lora_dim={rank} and lora_alpha={alpha}: the file cannot say them",
)
