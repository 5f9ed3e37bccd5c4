"""Spell an adapter as peft does: tensor names, and an adapter_config.json that peft resolves to the same modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..axes import Expr, zeros
from ..errors import MappingError
from .adapter import Adapter, Extra, Facts, LoraModule, Value, Written
from .experts import ExpertFactors, experts_together
from .peft_config import DEFAULTS, changes_base, read_settings, selected
from .peft_parameters import by_module, nested, parameter_fields, spelled, stand_in
from .peft_scaling import scaling_fields
from .spelling import name_tables

PREFIX = "base_model.model."


def write(adapter: Adapter, facts: Facts) -> Written:
    """Return peft's tensors, sorted by name, and its config; MappingError lists what peft cannot express.

    Modules of several terms and loralib's conv factors become single pairs of a higher rank, exactly, which the notes
    say; a higher ``rank`` in ``facts`` pads with zeros. Fields of ``adapter.config`` that still describe the adapter
    are kept as they are; who drops modules calls :func:`of_part` first.
    """
    modules, stacks, notes = _pairs(adapter, facts)
    _refuse(modules, adapter.extras)
    _refuse_stacks(modules, stacks)
    modules, filled = _with_bias(modules)
    extras = name_tables(adapter, "weight")
    spelling = _Spelling.of(modules, stacks, extras)
    tensors = [item for module in modules for item in spelling.factors(module)]
    tensors += [item for factors in stacks for item in spelling.stack(factors)]
    tensors += [(spelling.extra(extra), extra.value) for extra in extras]
    _refuse_twins([name for name, _ in tensors])
    named = [*modules, *(stand_in(factors) for factors in stacks)]
    fields, scaled = scaling_fields(named, spelling.attention, adapter.config)
    more, changed = parameter_fields(stacks, adapter.config)
    config: dict[str, Value] = {**DEFAULTS, **adapter.config, "peft_type": "LORA", **fields}
    config.update(_flags(modules, adapter))
    if modules or not stacks:
        config.update(_targets(modules, spelling.attention, adapter.config))
    elif config["target_modules"]:
        config["target_modules"] = None
    config.update(_beside(adapter))
    config.update(more)
    modules += [item for factors in stacks for item in factors.apart()]
    ordered = sorted(tensors, key=lambda item: item[0])
    return Written(ordered, config, notes=(*notes, *filled, *scaled, *changed), modules=modules)


def of_part(adapter: Adapter) -> Adapter:
    """Return an adapter of which modules or extras were dropped, its config without what selected them.

    peft fails to load a config that names whole modules or trained tokens which the file lacks, and starts new factors
    in modules that it targets. The heads of classification tasks are named by peft itself, so ``task_type`` goes too
    when a head is gone.
    """
    kinds = {extra.kind for extra in adapter.extras}
    config = dict(adapter.config)
    gone = [
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
    ]
    if "trainable_tokens" not in kinds:
        gone.append("trainable_token_indices")
    if "modules_to_save" not in kinds and config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"):
        gone.append("task_type")
    config.update({name: None for name in gone if name in config})
    return replace(adapter, config=config)


def _pairs(adapter: Adapter, facts: Facts) -> tuple[list[LoraModule], list[ExpertFactors], list[str]]:
    """Make every module one pair of factors, put experts together, and say where the rank grew."""
    from .factors import pad_rank, single_pair

    modules, notes = [], []
    for module in adapter.modules:
        pair = single_pair(module, "peft")
        wanted = facts.get(module.path, "rank")
        if isinstance(wanted, int) and wanted > pair.terms[0].rank:
            pair = pad_rank(pair, wanted)
        modules.append(pair)
        before, after = [term.rank for term in module.terms], pair.terms[0].rank
        before = [module.scaling.rank] if len(before) == 1 else before
        if before != [after]:
            notes.append(f"{module.path}: ranks {before} became one pair of rank {after}, exactly")
    init = changes_base(adapter.config)
    if notes and init:
        raise MappingError(
            f"init_lora_weights={init!r} ties the factors to their rank, which had to grow",
            where=notes,
            hint="convert the adapter to plain LoRA in peft first (path_initial_model_for_weight_conversion)",
        )
    plain, stacks = experts_together(modules)
    for factors in stacks:
        if factors.untrained:
            said = ", ".join(map(str, factors.untrained[:5])) + ("..." if len(factors.untrained) > 5 else "")
            notes.append(f"{factors.parameter}: experts {said} got factors of zeros")
    return plain, stacks, notes


def _refuse_stacks(modules: Sequence[LoraModule], stacks: Sequence[ExpertFactors]) -> None:
    """Raise for what peft's layers around parameters cannot stand beside."""
    if not stacks:
        return
    issues = [
        f"{m.path}: has a DoRA magnitude, which is one switch for all" for m in modules if m.magnitude is not None
    ]
    issues += [f"{m.path}: has a bias of B, which is one switch for all" for m in modules if m.lora_bias is not None]
    issues += [f"{m.path}: is stored [in, out], which is one switch for all" for m in modules if m.fan_in_fan_out]
    paths = {module.path for module in modules}
    for module, parameters in by_module(stacks).items():
        if nested(parameters) is None:
            issues.append(f"{module}: the order of its parameters {', '.join(parameters)} is not known")
        if module in paths:
            issues.append(f"{module}: peft adapts a module or its parameters")
    if issues:
        raise MappingError(
            "peft cannot adapt stacked experts beside these modules",
            where=issues,
            hint="convert them separately with --include, or merge the adapter instead",
        )


def _refuse(modules: Sequence[LoraModule], extras: Sequence[Extra]) -> None:
    """Raise for what no peft file can say."""
    plain = [m.path for m in modules if m.magnitude is None]
    if 0 < len(plain) < len(modules):
        raise MappingError(
            f"{len(plain)} modules have no DoRA magnitude and others have: use_dora is one switch in peft",
            where=plain,
            hint="merge the adapter, or convert the two kinds of modules separately with --include",
        )
    paths = {m.path for m in modules}
    trained = {extra.path for extra in extras if extra.kind == "trainable_tokens"}
    counts = Counter(m.path for m in modules)
    issues = [f"{path}: adapted {n} times" for path, n in counts.items() if n > 1]
    for module in modules:
        if not module.path:
            issues.append("the adapted module is the model itself, which peft cannot replace")
        if module.weight not in ("weight", "in_proj_weight"):
            issues.append(f"{module.path}: adapts {module.weight}, peft only weights of layers")
        if module.weight == "in_proj_weight" and f"{module.path}.out_proj" not in paths:
            issues.append(f"{module.path}: peft adapts out_proj together with in_proj_weight, it has no factors")
        if module.path in trained:
            issues.append(f"{module.path}: peft either adapts an embedding or trains single rows of it")
        if module.kind == "embedding" and module.lora_bias is not None:
            issues.append(f"{module.path}: peft has no lora_bias for embeddings")
    if issues:
        raise MappingError("peft cannot express the adapter", where=issues, hint="merge the adapter instead")


def _with_bias(modules: Sequence[LoraModule]) -> tuple[list[LoraModule], list[str]]:
    """Give every layer a bias of B where some have one: lora_bias is one switch in peft, and zeros change nothing."""
    if all(module.lora_bias is None for module in modules):
        return list(modules), []
    filled, notes = [], []
    for module in modules:
        if module.kind == "embedding":
            raise MappingError(
                "peft has no lora_bias for embeddings, and one switch for all layers",
                where=module.path,
                hint="convert embeddings separately with --include, or merge the adapter",
            )
        if module.lora_bias is None:
            module = replace(module, lora_bias=zeros(module.terms[0].b.dtype, (module.out,)))
            notes.append(f"{module.path}: lora_B got a bias of zeros")
        filled.append(module)
    return filled, notes


def _refuse_twins(names: Sequence[str]) -> None:
    twins = [name for name, count in Counter(names).items() if count > 1]
    if twins:
        raise MappingError(
            f"{len(twins)} names would hold two tensors each: a module is both saved in full and part of the base",
            where=twins,
            hint="leave one of them out with --exclude",
        )


@dataclass(frozen=True, slots=True)
class _Spelling:
    """Where peft's layers put their levels: ``adapted`` paths, attention paths, and embeddings with trained tokens."""

    adapted: frozenset[str]
    attention: frozenset[str]
    tokens: frozenset[str]
    depths: Mapping[str, int]

    @classmethod
    def of(
        cls, modules: Sequence[LoraModule], stacks: Sequence[ExpertFactors], extras: Sequence[Extra]
    ) -> _Spelling:  # fmt: skip
        depths: dict[str, int] = {}
        for parameters in by_module(stacks).values():
            depths |= nested(parameters) or {}
        return cls(
            frozenset({m.path for m in modules} | set(by_module(stacks))),
            frozenset(m.path for m in modules if m.weight == "in_proj_weight"),
            frozenset(e.path for e in extras if e.kind == "trainable_tokens"),
            depths,
        )

    def stack(self, factors: ExpertFactors) -> list[tuple[str, Expr]]:
        """Spell the factors around one parameter."""
        layer = self.layer(factors.parameter.rpartition(".")[0]) + ".base_layer" * self.depths[factors.parameter]
        a, b = spelled(factors)
        return [(f"{layer}.lora_A.weight", a), (f"{layer}.lora_B.weight", b)]

    def layer(self, path: str) -> str:
        """Spell the place of peft's own layer for a module."""
        parent, _, last = path.rpartition(".")
        inner = f"{parent}.base_layer.{last}" if parent in self.attention else path
        return f"{PREFIX}{inner}"

    def factors(self, module: LoraModule) -> list[tuple[str, Expr]]:
        """Spell one module's tensors."""
        layer, (term,) = self.layer(module.path), module.terms
        if module.kind == "embedding":
            tensors = [(f"{layer}.lora_embedding_A", term.a), (f"{layer}.lora_embedding_B", term.b)]
        else:
            tensors = [(f"{layer}.lora_A.weight", term.a), (f"{layer}.lora_B.weight", term.b)]
        if module.lora_bias is not None:
            tensors.append((f"{layer}.lora_B.bias", module.lora_bias))
        if module.magnitude is not None:
            tensors.append((f"{layer}.lora_magnitude_vector", module.magnitude))
        return tensors

    def extra(self, extra: Extra) -> str:
        """Spell a tensor beside the factors."""
        if extra.kind == "trainable_tokens":
            return f"{PREFIX}{extra.path}.token_adapter.trainable_tokens_delta"
        if extra.kind == "modules_to_save":
            return f"{PREFIX}{extra.name}"
        if extra.parameter.startswith("lora_"):
            return f"{self.layer(extra.path)}.{extra.parameter}"
        if not extra.path:
            return f"{PREFIX}{extra.parameter}"
        inside = ".token_adapter.base_layer" if extra.path in self.tokens else ""
        inside = ".base_layer" if extra.path in self.adapted else inside
        return f"{self.layer(extra.path)}{inside}.{extra.parameter}"


def _flags(modules: Sequence[LoraModule], adapter: Adapter) -> dict[str, Value]:
    """Return the switches that the modules and extras imply."""
    flags: dict[str, Value] = {"use_dora": modules[0].magnitude is not None} if modules else {}
    if any(module.lora_bias is not None for module in modules) or "lora_bias" in adapter.config:
        flags["lora_bias"] = any(module.lora_bias is not None for module in modules)
    orders = {module.fan_in_fan_out for module in modules} - {None}
    if orders:
        flags["fan_in_fan_out"] = True in orders
    biases = {extra.path for extra in adapter.extras if extra.kind == "bias"}
    if biases and adapter.config.get("bias") not in ("all", "lora_only"):
        flags["bias"] = "lora_only" if biases <= {module.path for module in modules} else "all"
    return flags


def _targets(modules: Sequence[LoraModule], attention: frozenset[str], config: Mapping[str, Value]) -> dict[str, Value]:
    """Return target_modules: the config's own where it selects every module, else the modules' full paths."""
    paths = sorted(m.path for m in modules if m.path.rpartition(".")[0] not in attention)
    if config.get("target_modules") and selected(config, paths) == set(paths):
        return {}
    fields: dict[str, Value] = {"target_modules": list(paths)}
    for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if config.get(name) is not None:
            fields[name] = None
    return fields


def _beside(adapter: Adapter) -> dict[str, Value]:
    """Return the fields for whole modules and trained tokens."""
    fields: dict[str, Value] = {}
    saved = sorted({extra.path for extra in adapter.extras if extra.kind == "modules_to_save"})
    carried = adapter.config.get("modules_to_save")
    names = [name for name in carried if isinstance(name, str)] if isinstance(carried, list) else []
    settings = read_settings({"lora_alpha": 1, "modules_to_save": list(names)}, "")
    lacking = [path for path in saved if not settings.saves(path)]
    if lacking:
        fields["modules_to_save"] = [*names, *lacking]
    tokens = [extra for extra in adapter.extras if extra.kind == "trainable_tokens"]
    if tokens and not adapter.config.get("trainable_token_indices"):
        raise MappingError(
            "the adapter replaces rows of embeddings, but does not say which",
            where=[extra.name for extra in tokens],
            hint="give trainable_token_indices in an adapter_config.json with --config",
        )
    return fields
