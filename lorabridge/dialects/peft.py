"""peft's LoRA adapters: names ``base_model.model.P.lora_A.weight`` and an adapter_config.json.

Facts were read in and measured with peft 0.21.2; files of older versions and raw dumps of a wrapped model
(``torch.save(model.state_dict())``, FSDP, torch.compile) are read too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import MappingError
from . import peft_tuners
from .adapter import Adapter, Content, Facts, Written
from .optimizer import training_state
from .pairs import in_mindspore
from .peft_config import read_settings, warnings_of
from .peft_read import Reader
from .peft_write import write
from .prefixes import PeftNames, is_factor, recognise


@dataclass(frozen=True, slots=True)
class Peft:
    """Read and write peft's spelling of an adapter."""

    name: str = "peft"
    framework: Literal["torch", "mindspore"] = "torch"

    def detect(self, content: Content) -> str | None:
        """Claim a file by the names of its factors, else by the ``peft_type`` of the config beside it.

        MindSpore files with peft's names are those of the dialects mindnlp and pynative.
        """
        factor = next((name for name in content.specs if is_factor(name)), None)
        if factor is not None and not in_mindspore(content):
            return f"tensor {factor} is spelled as peft does"
        if content.config and content.config.get("peft_type"):
            return f"adapter_config.json says peft_type {content.config['peft_type']}"
        return None

    def parse(self, content: Content) -> Adapter:
        """Resolve a peft adapter; modules and extras come in the order of their paths.

        MappingError: unknown or refused config fields, several adapters or prefixes in one file, half pairs, ranks
        that contradict the config, tensors of ZeRO-3 shards, a missing alpha, tensors that belong to nothing.
        What peft_types other than LORA become ``peft_tuners`` says.
        """
        if (content.config or {}).get("peft_type", "LORA") != "LORA":
            return peft_tuners.parse(content)
        settings = read_settings(content.config, content.path)
        left_out = training_state(content.specs)
        skipped = {name for name, _ in left_out}
        names = recognise(name for name in content.specs if name not in skipped)
        _refuse_shards(names, content)
        reader = Reader(content, settings, names)
        modules = reader.modules()
        extras = reader.extras()
        reader.finish()
        return Adapter(
            modules=modules,
            extras=extras,
            config=dict(content.config or {}),
            left_out=(*left_out, *reader.left_out),
            warnings=(*names.warnings, *reader.warnings, *warnings_of(content.config or {})),
        )

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell an adapter as peft does; see :func:`lorabridge.dialects.peft_write.write`."""
        return write(adapter, facts)


PEFT = Peft()


def _refuse_shards(names: PeftNames, content: Content) -> None:
    empty = [n.name for n in names.names if n.role not in ("plain", "original") and content.specs[n.name].size == 0]
    if empty:
        raise MappingError(
            f"{len(empty)} adapter tensors have no elements, as DeepSpeed ZeRO-3 saves ungathered shards",
            where=[f"{name} {content.specs[name].shape}" for name in empty],
            hint="save again inside deepspeed.zero.GatheredParameters, or run zero_to_fp32.py on the checkpoint",
        )
