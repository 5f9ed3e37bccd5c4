"""MindNLP 0.2 to 0.4: peft's names in a MindSpore ``adapter_model.ckpt``, beside an adapter_config.json.

The factors are peft's own, ``base_model.model.P.lora_A.weight``; only the container differs, and which fields of the
config are read: what a release does not know it passes over in silence. Sources: mindnlp 0.2.0, 0.2.4, 0.3.1, 0.4.0 and
0.4.1, ``mindnlp/peft`` (config.py, tuners/lora, utils/save_and_load.py); 0.3.1 saves ``adapter_model.bin``, which is a
MindSpore file all the same and which it cannot load again. MindNLP 0.5 uses peft itself: dialect ``peft``.

``mindnlp`` writes for 0.3 and 0.4, ``mindnlp-0.2`` for 0.2, whose LoRA has one rank and alpha for all and no DoRA.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

from ..errors import MappingError
from . import factors
from .adapter import Adapter, Content, Facts, LoraModule, Value, Written
from .pairs import MERGE, Problems, in_mindspore
from .peft import PEFT
from .peft_config import changes_base
from .peft_write import PREFIX, write
from .prefixes import is_factor

SHARED = frozenset({
    "base_model_name_or_path", "peft_type", "task_type", "inference_mode", "r", "target_modules", "lora_alpha",
    "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save", "init_lora_weights", "layers_to_transform",
    "layers_pattern",
})  # fmt: skip
"""Fields of LoraConfig in every release."""
LATER = SHARED | {
    "use_rslora", "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "use_dora",
    "layer_replication",
}  # fmt: skip
"""Fields of LoraConfig in 0.3 and 0.4."""
UNNEEDED = frozenset({
    "peft_version", "revision", "auto_mapping", "runtime_config", "exclude_modules", "qalora_group_size", "eva_config",
    "corda_config", "lora_ga_config", "ensure_weight_tying", "merge_weights", "loftq_config", "megatron_core",
})  # fmt: skip
"""Fields that say nothing a loaded adapter depends on, once target_modules lists what is adapted."""
SAVED_INITS = {"mindnlp": ("pissa", "olora", "loftq"), "mindnlp-0.2": ()}
KINDS = {"mindnlp": ("linear", "embedding", "conv2d"), "mindnlp-0.2": ("linear", "embedding")}


@dataclass(frozen=True, slots=True)
class Mindnlp:
    """Read and write MindNLP's adapter directories; ``name``: "mindnlp" (0.3 and 0.4) or "mindnlp-0.2"."""

    name: str = "mindnlp"
    framework: Literal["torch", "mindspore"] = "mindspore"

    def detect(self, content: Content) -> str | None:
        """Claim MindSpore files with peft's full names; both releases read alike, so only one claims."""
        if self.name != "mindnlp" or not in_mindspore(content):
            return None
        found = next((name for name in content.specs if name.startswith("base_model.") and is_factor(name)), None)
        return None if found is None else f"tensor {found} is spelled as peft does, in a MindSpore file"

    def parse(self, content: Content) -> Adapter:
        """Resolve names and config exactly as for peft."""
        return PEFT.parse(content)

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell an adapter with the config fields that the release reads; MappingError for what they cannot say."""
        _refuse(adapter, self.name)
        notes: tuple[str, ...] = ()
        if self.name == "mindnlp-0.2":
            modules, _, _, notes = factors.uniform_as_told(adapter.modules, facts)
            adapter = replace(adapter, modules=modules)
        written = write(adapter, facts)
        config = self._config(written.config or {}, written.modules)
        tensors = [(_magnitude(name), expr) for name, expr in written.tensors]
        _check_saved(config, [name for name, _ in tensors])
        return replace(written, tensors=tensors, config=config, notes=(*notes, *written.notes))

    def _config(self, config: Mapping[str, Value], modules: Sequence[LoraModule]) -> dict[str, Value]:
        """Return the fields that the release reads, saying the same."""
        known = SHARED if self.name == "mindnlp-0.2" else LATER
        fields = {name: value for name, value in config.items() if name in known}
        chosen = config.get("target_modules")
        if config.get("exclude_modules") or chosen == "all-linear":
            paths: list[Value] = [*sorted(m.path for m in modules)]
            fields |= {"target_modules": paths, "layers_to_transform": None}
        if isinstance(chosen, list) and not all(isinstance(name, str) for name in chosen):
            raise MappingError("target_modules holds something else than names", where=repr(chosen)[:200])
        _check_fields(config, known, self.name)
        init = fields.get("init_lora_weights")
        if not isinstance(init, bool) and not changes_base(config):
            fields["init_lora_weights"] = True  # how training began; releases refuse values that they do not know
        if self.name == "mindnlp":
            fields |= _patterns(modules, config)
        return fields


def _magnitude(name: str) -> str:
    """Return the name of a DoRA magnitude with the parameter's own level, as 0.4 has it."""
    return f"{name}.weight" if name.endswith(".lora_magnitude_vector") else name


def _refuse(adapter: Adapter, release: str) -> None:
    problems = Problems("properties of the adapter have no place in MindNLP")
    cure = f"{MERGE}, or use MindNLP 0.5, which reads --to peft"
    for module in adapter.modules:
        if module.kind not in KINDS[release]:
            problems.add(f"{release} has no LoRA for {module.kind}", module.path, cure)
        elif module.weight != "weight":
            problems.add(f"MindNLP has no LoRA for {module.weight}", module.path, cure)
        if module.magnitude is not None and release == "mindnlp-0.2":
            problems.add("MindNLP 0.2 has no DoRA", module.path, f"{MERGE}, or choose --to mindnlp")
        if module.lora_bias is not None:
            problems.add("MindNLP has no bias on the B factor", module.path, cure)
    for extra in adapter.extras:
        if extra.kind == "trainable_tokens":
            problems.add("MindNLP has no trained token rows", extra.name, cure)
    if adapter.merged:
        cure_base = "leave the base out with --adapter-only"
        problems.add(
            "the base weights already hold the delta, and MindNLP would add it again", "base weights", cure_base
        )
    init = changes_base(adapter.config)
    if init and not init.lower().startswith(SAVED_INITS[release]):
        problems.add(f"{release} does not know init_lora_weights={init!r}, which changed the base", "config", cure)
    problems.raise_any()


def _check_fields(config: Mapping[str, Value], known: frozenset[str], release: str) -> None:
    lost = [f"{name} = {repr(value)[:60]}" for name, value in config.items()
            if name not in known and name not in UNNEEDED and value]  # fmt: skip
    if lost:
        raise MappingError(
            f"{release} passes over fields of the config that mean something",
            where=lost,
            hint=f"{MERGE}, or use MindNLP 0.5, which reads --to peft",
        )


def _patterns(modules: Sequence[LoraModule], config: Mapping[str, Value]) -> dict[str, Value]:
    """Return rank_pattern and alpha_pattern with whole paths, checked against the way 0.3 and 0.4 look them up.

    They take the first key of either pattern that ends a path, for both (tuners/lora/model.py), which peft no longer
    does; ``use_rslora`` is one switch.
    """
    rslora = config.get("use_rslora") is True
    ranks = {m.path: m.terms[0].rank for m in modules}
    alphas = {m.path: _alpha(m, config) for m in modules}
    rank, alpha = _common(ranks), _common(alphas)
    rank_pattern = {p: n for p, n in ranks.items() if n != rank}
    alpha_pattern = {p: n for p, n in alphas.items() if n != alpha}
    keys = list(chain(rank_pattern, alpha_pattern))
    wrong = []
    for path in ranks:
        key = next((key for key in keys if re.match(rf".*\.{key}$", path)), path)
        if (rank_pattern.get(key, rank), alpha_pattern.get(key, alpha)) != (ranks[path], alphas[path]):
            wrong.append(path)
    if wrong:
        raise MappingError(
            "MindNLP would look up another module's rank or alpha for these",
            where=wrong,
            hint="bring the modules to one rank and alpha with --to mindnlp-0.2",
        )
    return {
        "r": rank, "lora_alpha": alpha, "use_rslora": rslora,
        "rank_pattern": {**rank_pattern}, "alpha_pattern": {**alpha_pattern},
    }  # fmt: skip


def _alpha(module: LoraModule, config: Mapping[str, Value]) -> int | float:
    from .peft_scaling import exact_alpha

    alpha = exact_alpha(module, config.get("use_rslora") is True)
    if alpha is None:  # peft_write chose the switch so that every module has one
        raise MappingError("no alpha gives the scaling exactly", where=module.path, hint="report this")
    return alpha


def _common(values: Mapping[str, int | float]) -> int | float:
    counts = Counter(values.values())
    return min(counts, key=lambda value: (-counts[value], value)) if counts else 8


def _check_saved(config: Mapping[str, Value], names: Sequence[str]) -> None:
    """Refuse saved modules that MindNLP would misplace: it finds them anywhere in a name."""
    saved = config.get("modules_to_save")
    chosen = [name for name in saved if isinstance(name, str)] if isinstance(saved, list) else []
    wrong = [
        name for name in names for word in chosen
        if name.removeprefix(PREFIX).count(word) > 1 or (word in name and ".lora_" in name)
    ]  # fmt: skip
    if wrong:
        raise MappingError(
            "MindNLP finds a saved module by a part of a name, and these contain one besides",
            where=wrong,
            hint=f"{MERGE}, or leave the saved modules out with --exclude",
        )
