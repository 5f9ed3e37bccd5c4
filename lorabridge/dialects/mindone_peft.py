"""MindOne's port of peft (``mindone.peft``, MindOne 0.5, peft 0.15.2): peft's names, its own cells' beside the factors.

The factors are peft's own, ``base_model.model.P.lora_A.weight``, in ``adapter_model.safetensors`` beside an
adapter_config.json. Biases and saved modules have the names of MindOne's cells, which for some families are those of
mindspore.nn (``gamma``, ``beta``, ``embedding_table``): the tables NAME_mindone give them. MindOne does not translate
them itself: saved modules under torch's names stop its loading with a KeyError, biases are passed over in silence.

Sources: mindone 0.5.0, ``mindone/peft`` (tuners/lora/config.py, layer.py, model.py, utils/save_and_load.py). It has no
DoRA, no LoRA on embeddings and no trained token rows. It always looks up ``rank_pattern`` and ``alpha_pattern``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..axes import reads
from ..errors import MappingError
from .adapter import Adapter, Content, Extra, Facts, LoraModule, Value, Written
from .pairs import MERGE, Problems
from .peft import PEFT
from .peft_config import changes_base
from .peft_scaling import exact_alpha
from .peft_write import write
from .prefixes import is_factor

FIELDS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "init_lora_weights", "layer_replication", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_bias", "lora_dropout", "modules_to_save", "peft_type", "r", "rank_pattern", "revision", "target_modules",
    "task_type", "use_dora", "use_rslora",
})  # fmt: skip
"""Fields of its LoraConfig that say something about a finished adapter."""
SILENT = frozenset({
    "peft_version", "runtime_config", "qalora_group_size", "eva_config", "corda_config", "lora_ga_config",
    "loftq_config", "ensure_weight_tying", "merge_weights", "megatron_core",
})  # fmt: skip
"""Fields that say nothing a loaded adapter depends on."""
INITS = ("pissa", "olora", "loftq", "corda")
NATIVE = (".gamma", ".beta", ".embedding_table", ".moving_mean", ".moving_variance")
"""How parameters of mindspore.nn's cells end."""


@dataclass(frozen=True, slots=True)
class MindonePeft:
    """Read and write adapter directories of MindOne's peft."""

    name: str = "mindone-peft"
    framework: Literal["torch", "mindspore"] = "mindspore"

    def detect(self, content: Content) -> str | None:
        """Claim peft's names with names of mindspore.nn among them, in safetensors that numpy or torch is said of."""
        if content.metadata.get("container") == "mindspore" or content.metadata.get("format") not in ("np", "pt"):
            return None
        ours = any(name.startswith("base_model.") and is_factor(name) for name in content.specs)
        found = next((name for name in content.specs if name.endswith(NATIVE)), None)
        return f"tensor {found} is named as in mindspore.nn, among peft's" if ours and found else None

    def parse(self, content: Content) -> Adapter:
        """Resolve names and config as for peft, to which a ``beta`` is the bias that it is."""
        specs = {_as_bias(name, content): spec for name, spec in content.specs.items()}
        adapter = PEFT.parse(replace(content, specs=specs))
        extras = (replace(e, parameter="beta") if _is_beta(e) else e for e in adapter.extras)
        return replace(adapter, extras=tuple(extras))

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell an adapter as MindOne's peft loads it; MappingError names what it has no place for, and the cure.

        Notes name parameters that kept transformers' names, which some of MindOne's networks do not have.
        """
        _refuse(adapter)
        written = write(adapter, facts)
        config = written.config or {}
        _check_fields(config)
        fields = {name: value for name, value in config.items() if name in FIELDS}
        if not isinstance(fields.get("init_lora_weights"), bool) and not changes_base(config):
            fields["init_lora_weights"] = True
        fields |= _scaling(written.modules, config)
        return replace(written, config=fields, notes=(*_unnamed(adapter), *written.notes))


def _as_bias(name: str, content: Content) -> str:
    path, _, parameter = name.rpartition(".")
    renamed = f"{path}.bias"
    return renamed if parameter == "beta" and renamed not in content.specs else name


def _is_beta(extra: Extra) -> bool:
    return extra.parameter == "bias" and any(name.endswith(".beta") for name in reads(extra.value))


def _refuse(adapter: Adapter) -> None:
    problems = Problems("properties of the adapter have no place in MindOne's peft")
    for module in adapter.modules:
        if module.magnitude is not None:
            problems.add("MindOne has no DoRA", module.path, MERGE)
        if module.kind not in ("linear", "conv2d"):
            problems.add(f"MindOne has no LoRA for {module.kind}", module.path, MERGE)
        elif module.weight != "weight":
            problems.add(f"MindOne has no LoRA for {module.weight}", module.path, MERGE)
    for extra in adapter.extras:
        if extra.kind == "trainable_tokens":
            problems.add("MindOne has no trained token rows", extra.name, MERGE)
    if adapter.merged:
        cure = "leave the base out with --adapter-only"
        problems.add("the base weights already hold the delta, and MindOne would add it again", "base weights", cure)
    init = changes_base(adapter.config)
    if init and not init.lower().startswith(INITS):
        problems.add(f"MindOne does not know init_lora_weights={init!r}, which changed the base", "config", MERGE)
    problems.raise_any()


def _check_fields(config: Mapping[str, Value]) -> None:
    lost = [f"{name} = {repr(value)[:60]}" for name, value in config.items()
            if name not in FIELDS | SILENT and value]  # fmt: skip
    if lost:
        raise MappingError("MindOne passes over fields of the config that mean something", where=lost, hint=MERGE)


def _scaling(modules: Sequence[LoraModule], config: Mapping[str, Value]) -> dict[str, Value]:
    """Return rank, alpha and both patterns by whole paths, checked against the way that MindOne looks them up."""
    rslora = config.get("use_rslora") is True
    ranks: dict[str, Value] = {m.path: m.terms[0].rank for m in modules}
    alphas: dict[str, Value] = {m.path: exact_alpha(m, rslora) for m in modules}
    fields: dict[str, Value] = {}
    for name, pattern, values in (("r", "rank_pattern", ranks), ("lora_alpha", "alpha_pattern", alphas)):
        usual = Counter(values.values()).most_common(1)[0][0] if values else 8
        special = {path: value for path, value in values.items() if value != usual}
        wrong = [path for path, value in values.items() if _looked_up(special, path, usual) != value]
        if wrong:
            hint = "bring the modules to one rank and alpha with --to vllm first"
            raise MappingError(f"MindOne would look up another module's {name} for these", where=wrong, hint=hint)
        fields |= {name: usual, pattern: special}
    return fields


def _looked_up(pattern: Mapping[str, Value], path: str, usual: Value) -> Value:
    """Return what MindOne finds for a path: the first key that ends it (utils/other.py, get_pattern_key)."""
    key = next((key for key in pattern if re.match(rf"(.*\.)?({key})$", path)), path)
    return pattern.get(key, usual)


def _unnamed(adapter: Adapter) -> list[str]:
    plain = [e.name for e in adapter.extras if e.parameter in ("weight", "bias") and e.kind != "base"]
    native = any(extra.name.endswith(NATIVE) for extra in adapter.extras)
    if not plain or native:
        return []
    return [
        f"{plain[0]} and other names beside the factors are transformers': where MindOne's network has cells of "
        "mindspore.nn it does not load them; --family NAME_mindone gives its names (lorabridge tables list)"
    ]
