"""Full models: every tensor is a base parameter under its own name, on the Hugging Face or the MindSpore side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import MappingError
from .adapter import Adapter, Content, Extra, Facts, Written


@dataclass(frozen=True, slots=True)
class FullModel:
    """Spell a whole network's parameters as they are; a family table does the renaming."""

    name: str
    framework: Literal["torch", "mindspore"]

    def detect(self, content: Content) -> str | None:
        """Claim nothing: a full model is what no adapter dialect claims."""
        return None

    def parse(self, content: Content) -> Adapter:
        """Take every tensor as a base parameter; training state is left out and listed."""
        from ..axes import read
        from .optimizer import training_state

        left_out = training_state(content.specs)
        skipped = {name for name, _ in left_out}
        extras = []
        for name, spec in content.specs.items():
            if name not in skipped:
                path, _, parameter = name.rpartition(".")
                extras.append(Extra(path, parameter, read(spec), "base"))
        if not extras:
            raise MappingError("the checkpoint holds no parameters", where=content.path, hint="check the file")
        return Adapter((), tuple(extras), left_out=tuple(left_out))

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Write every extra under its full name; adapted modules must be merged before."""
        if adapter.modules:
            raise MappingError(
                f"{len(adapter.modules)} modules carry LoRA factors, which a plain model cannot hold",
                where=[module.path for module in adapter.modules],
                hint="merge the adapter first, or choose an adapter dialect with --to",
            )
        return Written([(extra.name, extra.value) for extra in adapter.extras])


HF = FullModel("hf", "torch")
MS = FullModel("ms", "mindspore")
