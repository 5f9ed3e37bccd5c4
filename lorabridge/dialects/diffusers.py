"""diffusers: a pipeline's ``pytorch_lora_weights.safetensors``, ``unet.<path>.lora_A.weight``; and MindOne's port.

| written by | factors of ``<path>`` below ``unet.``, ``transformer.``, ``text_encoder.`` ... |
|---|---|
| 0.22 and later | ``.lora_A.weight``, ``.lora_B.weight``, ``.lora_B.bias``, ``.lora_magnitude_vector`` |
| 0.17 and later | ``.lora.down.weight``, ``.lora.up.weight``; text encoders ``.lora_linear_layer.down.weight`` |
| before | ``<attention>.processor.to_q_lora.down.weight``; text encoders ``.to_q_lora.`` for ``q_proj`` |

Alpha is in the safetensors metadata (``lora_adapter_metadata``: each component's LoraConfig), or in ``<path>.alpha``,
or it equals the rank. A file may mix the spellings; diffusers itself then loads one of them and warns, so a mixed file
is read whole and written in one. MindOne 0.5 reads and writes the same names, in safetensors or ``.ckpt``, and wants a
config with ``rank_pattern`` and ``alpha_pattern``. Sources: diffusers 0.42 (``utils/state_dict_utils.py``,
``utils/peft_utils.py``, ``loaders/lora_base.py``), MindOne 0.5.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import InputError, MappingError, counted
from ..tensors import TensorSpec
from . import diffusers_write
from .adapter import CARRIED, Adapter, Content, Fact, Facts, Json, Value, Written
from .diffusers_names import COMPONENTS, Name, recognise
from .pairs import in_mindspore
from .peft import PEFT
from .peft_config import unsupported_fields

METADATA = diffusers_write.METADATA


@dataclass(frozen=True, slots=True)
class Diffusers:
    """Read every spelling, write the newest. ``mindone``: the same names in MindSpore's containers."""

    name: str = "diffusers"
    framework: Literal["torch", "mindspore"] = "torch"

    def detect(self, content: Content) -> str | None:
        """Claim a file by factors below a pipeline's component, by an old spelling, or by diffusers' metadata."""
        ours = in_mindspore(content) or content.metadata.get("format") == "np"
        if ours is not (self.framework == "mindspore"):
            return None
        if METADATA in content.metadata:
            return f"its metadata has {METADATA}"
        found = next((name for name in map(recognise, content.specs) if name.sure), None)
        return f"tensor {found.original} is spelled as a pipeline's" if found else None

    def parse(self, content: Content) -> Adapter:
        """Read each component as peft does, under its own config; paths keep the component before them.

        Raises MappingError as the dialect peft does, and for alphas in tensors and metadata at once.
        """
        names = [recognise(name) for name in content.specs]
        configs, alphas = _configs(content), _alphas(names, content)
        if configs and alphas:
            raise MappingError(
                "alpha is in the metadata and in tensors at once, which diffusers refuses too",
                where=[content.path, *list(alphas)[:3]],
                hint="remove one of them",
            )
        parts = [
            self._component(component, names, content, configs, alphas)
            for component in dict.fromkeys(name.component for name in names if name.role != "alpha")
        ]
        styles = {name.style for name in names if name.style}
        warnings = [warning for part in parts for warning in part.warnings]
        if len(styles) > 1:
            warnings.append(
                f"the file mixes the spellings {' and '.join(sorted(styles))}: diffusers would load one of them only"
            )
        modules = tuple(module for part in parts for module in part.modules)
        left = tuple(item for part in parts for item in part.left_out)
        carried = tuple((name.original, CARRIED) for name in names if name.role == "alpha")
        extras = tuple(extra for part in parts for extra in part.extras)
        return Adapter(modules, extras, left_out=(*left, *carried), warnings=tuple(warnings))

    def _component(
        self, component: str, names: list[Name], content: Content, configs: Mapping[str, Json],
        alphas: Mapping[str, float],
    ) -> Adapter:  # fmt: skip
        """Read one component as a peft adapter of its own."""
        mine = {n.peft: content.specs[n.original] for n in names if n.component == component and n.role != "alpha"}
        config = configs.get(component)
        facts = Facts() if config is not None else Facts(tuple(_scalings(component, mine, alphas)))
        where = f"{content.path} ({component})" if content.path else component
        bare = PEFT.parse(Content(mine, {"container": content.metadata.get("container", "")}, config, facts, where))
        unsupported = unsupported_fields(bare.config)
        if unsupported:
            raise MappingError(
                "the adapter is more than LoRA", where=[f"{component}: {name}: {why}" for name, why in unsupported],
                hint="merge it into the base in diffusers (fuse_lora)",
            )  # fmt: skip
        modules = tuple(replace(module, path=f"{component}.{module.path}") for module in bare.modules)
        extras = tuple(replace(e, path=f"{component}.{e.path}" if e.path else component) for e in bare.extras)
        warnings = tuple(f"{component}: {warning}" for warning in bare.warnings)
        return replace(bare, modules=modules, extras=extras, config={}, warnings=warnings)

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell an adapter as diffusers does; see :func:`lorabridge.dialects.diffusers_write.write`."""
        return diffusers_write.write(adapter, facts)


def _scalings(component: str, specs: Mapping[str, TensorSpec], alphas: Mapping[str, float]) -> Iterator[Fact]:
    """State every module's alpha: what its tensor says, else the rank."""
    for name, spec in specs.items():
        head, found, _ = name.partition(".lora_A")
        if found and spec.shape:
            path = head.removeprefix("base_model.model.")
            alpha = alphas.get(f"{component}.{path}", float(spec.shape[0]))
            yield Fact(glob.escape(path), "alpha", alpha)


def _alphas(names: list[Name], content: Content) -> dict[str, float]:
    """Return the alphas in tensors by path, the component before it."""
    numbers = content.facts.read("value")
    found: dict[str, float] = {}
    paths = {f"{name.component}.{name.path}" for name in names if name.role != "alpha"}
    wrong = []
    for name in names:
        if name.role == "alpha":
            value = numbers.get(name.original)
            path = f"{name.component}.{name.path}"
            if not isinstance(value, int | float) or path not in paths:
                wrong.append(name.original)
            else:
                found[path] = float(value)
    if wrong:
        raise MappingError(
            f"{counted(len(wrong), 'alpha')} is not one number of a module with factors",
            where=[*wrong, f"in {content.path}"],
            hint="remove the tensor, or save the adapter again",
        )
    return found


def _configs(content: Content) -> dict[str, Json]:
    """Return each component's LoraConfig from the metadata; {} where there is none.

    A file of one network by itself (``save_lora_adapter``) has its fields without a component.
    """
    text = content.metadata.get(METADATA)
    if text is None:
        return {}
    try:
        raw: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{METADATA} is not JSON: {error}", where=content.path, hint="remove the metadata") from error
    if not isinstance(raw, dict):
        raise InputError(f"{METADATA} is not a JSON object", where=content.path, hint="remove the metadata")
    found: dict[str, dict[str, Value]] = {}
    for key, value in raw.items():
        component, dot, field = key.partition(".")
        if dot and component in COMPONENTS:
            found.setdefault(component, {})[field] = value
    if not found:
        implied = {recognise(name).component for name in content.specs}
        found = {component: dict(raw) for component in implied}
    return dict(found)


MINDONE = Diffusers("mindone", "mindspore")
