"""Read peft's tensor names: wrappers, prefixes and adapter names are recognised once for the whole file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import MappingError

Role = Literal["A", "B", "embedding_A", "embedding_B", "magnitude", "variant", "tokens", "saved", "original", "plain"]

PREFIX = ("base_model", "model")
INNER_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Levels that torch.compile, FSDP and activation checkpointing put anywhere into a path."""
VARIANTS = ("lora_diag", "lora_velora_embed", "lora_monteclora_sampler")
"""What KaSA, VeLoRA and MonteCLoRA keep beside the factors (peft 0.21.2)."""
OTHER_TUNERS = {
    "lora_E": "AdaLoRA", "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "ia3_l": "IA3",
    "vera_lambda_b": "VeRA", "oft_R": "OFT", "boft_R": "BOFT", "hra_u": "HRA", "fourierft_spectrum": "FourierFT",
    "vblora_logits_A": "VB-LoRA", "ln_tuning_layers": "LN tuning", "prompt_embeddings": "prompt tuning",
}  # fmt: skip
_ROLES: dict[str, Role] = {
    "lora_A": "A", "lora_B": "B", "lora_embedding_A": "embedding_A", "lora_embedding_B": "embedding_B",
    "lora_magnitude_vector": "magnitude", "trainable_tokens_delta": "tokens",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PeftName:
    """One tensor name, taken apart.

    ``path``: the module's path without wrappers and prefixes, ``base_layer`` levels included only where they separate
    nn.MultiheadAttention from its ``out_proj``. ``parameter``: "weight", "bias" ... or the name of a variant's tensor.
    ``adapter``: the adapter's name where the tensor name has one. ``wrapped``: a ``base_layer`` level was removed.
    ``nested``: how many of them stood directly before a factor: layers that peft put around one module's parameters.
    """

    name: str
    path: str
    role: Role
    parameter: str
    adapter: str = ""
    wrapped: bool = False
    nested: int = 0


@dataclass(frozen=True, slots=True)
class PeftNames:
    """All names of a file, the prefix they share, and the name of the adapter ("" where names carry none)."""

    names: tuple[PeftName, ...]
    prefix: str
    adapter: str
    warnings: tuple[str, ...] = ()


def has_marker(name: str) -> bool:
    """Say whether a name has a level that only peft's own layers have, so that it is no parameter of the base."""
    return any(
        level in _ROLES or level in VARIANTS or level in ("modules_to_save", "original_module")
        for level in name.split(".")
    )


def is_factor(name: str) -> bool:
    """Say whether a name is one of peft's LoRA factors; loralib's bare ``p.lora_A`` is not."""
    parts = name.split(".")
    for level in (-1, -2, -3):
        role = _ROLES.get(parts[level]) if len(parts) > -level else None
        if role in ("embedding_A", "embedding_B"):
            return level > -3
        if role in ("A", "B"):
            return level < -1 and parts[-1] in ("weight", "bias")
    return False


def recognise(names: Iterable[str]) -> PeftNames:
    """Take every name of a file apart.

    Wrappers: ``module.`` (DataParallel), ``_orig_mod.``, ``_fsdp_wrapped_module.``; prefix ``base_model.model.``, also
    none or repeated; adapter names behind ``lora_A`` and its like. A MappingError lists names with different
    prefixes, the adapters of a file with several, names that other tuners of peft made, and names that coincide.
    """
    paths = {name: _levels(name) for name in names}
    prefix, stripped, warnings = _strip(paths)
    taken = [_role(name, levels) for name, levels in stripped.items()]
    adapter = _adapter(taken)
    taken = [_settle(name, adapter) for name in taken]
    _refuse_twins(taken)
    return PeftNames(tuple(taken), prefix, adapter, warnings)


def _levels(name: str) -> tuple[str, ...]:
    levels = tuple(level for level in name.split(".") if level not in INNER_WRAPPERS)
    if not levels or "" in levels:
        raise MappingError(
            "a tensor name has an empty part", where=repr(name), hint="rename the tensor, or repair the file"
        )
    return levels


def _strip(
    paths: Mapping[str, tuple[str, ...]],
) -> tuple[str, dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Remove the one prefix that all names share: (prefix, levels without it, warnings)."""
    warnings: tuple[str, ...] = ()
    found: dict[tuple[int, int], list[str]] = {}
    for name, levels in paths.items():
        found.setdefault(_prefix(levels), []).append(name)
    if set(found) == {(0, 0)} and all(len(levels) > 2 and levels[0] == "module" for levels in paths.values()):
        warnings = ("all names begin with 'module.', which DataParallel adds; it is removed",)
        found = {(1, 0): list(paths)}
    if len(found) > 1:
        counts = sorted(found.items(), key=lambda item: -len(item[1]))
        raise MappingError(
            "the tensor names begin with different prefixes: "
            + ", ".join(f"{_spell(*key) or 'none'!r} ({len(group)} tensors)" for key, group in counts),
            where=[f"{_spell(*key) or 'none'}: {group[0]}" for key, group in counts],
            hint="save all parts from the same model object, or rename the tensors to one prefix",
        )
    module, repeats = next(iter(found), (0, 0))
    skip = module + 2 * repeats
    return _spell(module, repeats), {name: levels[skip:] for name, levels in paths.items()}, warnings


def _prefix(levels: tuple[str, ...]) -> tuple[int, int]:
    """Count (DataParallel levels before peft's prefix, repetitions of peft's prefix)."""
    module = 1 if levels[:3] == ("module", *PREFIX) else 0
    repeats = 0
    while levels[module + 2 * repeats :][:2] == PREFIX and len(levels) > module + 2 * repeats + 2:
        repeats += 1
    return module, repeats


def _spell(module: int, repeats: int) -> str:
    return "module." * module + "base_model.model." * repeats


def _role(name: str, levels: tuple[str, ...]) -> PeftName:
    """Read one name; an adapter's name that may be a part of the module is settled later."""
    tuner = next((OTHER_TUNERS[level] for level in levels if level in OTHER_TUNERS), None)
    if tuner:
        raise MappingError(
            f"the file holds a {tuner} adapter, which is not LoRA",
            where=name,
            hint="turn it into LoRA with peft.convert_to_lora, or merge it with merge_and_unload",
        )
    for marker, role in (("modules_to_save", "saved"), ("original_module", "original")):
        if marker in levels[:-1]:
            at = levels.index(marker)
            rest = levels[at + 1 :]
            adapter = rest[0] if role == "saved" and len(rest) > 1 else ""
            rest = rest[1:] if adapter else rest
            path, wrapped = _path((*levels[:at], *rest[:-1]))
            return PeftName(
                name, path, "saved" if adapter or role == "saved" else "original", rest[-1], adapter, wrapped
            )
    variant = next((level for level in levels if level in VARIANTS), None)
    if variant:
        at = levels.index(variant)
        path, wrapped = _path(levels[:at])
        return PeftName(name, path, "variant", ".".join(levels[at:]), "", wrapped)
    return _factor(name, levels) or _plain(name, levels)


def _factor(name: str, levels: tuple[str, ...]) -> PeftName | None:
    at = next((i for i in range(len(levels) - 1, 0, -1) if levels[i] in _ROLES), None)
    if at is None:
        return None
    role, rest = _ROLES[levels[at]], levels[at + 1 :]
    parameter = "weight"
    if rest and rest[-1] in ("weight", "bias") and role in ("A", "B", "magnitude"):
        parameter, rest = rest[-1], rest[:-1]
    elif role in ("A", "B"):
        return None
    if len(rest) > 1 or (parameter == "bias" and role != "B"):
        return None
    head = levels[:at]
    if role == "tokens":
        if head[-1:] != ("token_adapter",):
            return None
        head = head[:-1]
    nested = 0
    while head[-1:] == ("base_layer",):
        head, nested = head[:-1], nested + 1
    path, wrapped = _path(head)
    return PeftName(name, path, role, parameter, rest[0] if rest else "", wrapped, nested)


def _plain(name: str, levels: tuple[str, ...]) -> PeftName:
    path, wrapped = _path(levels[:-1])
    return PeftName(name, path, "plain", levels[-1], "", wrapped)


def _path(levels: tuple[str, ...]) -> tuple[str, bool]:
    """Join a module's path without the levels that peft's layers add, and say whether there were any."""
    own = [level for level in levels if level not in ("base_layer", "token_adapter")]
    return ".".join(own), len(own) != len(levels)


def _adapter(names: Sequence[PeftName]) -> str:
    """Return the one adapter's name; "" where the names carry none."""
    seen: dict[str, str] = {}
    saved: dict[str, str] = {}
    for name in names:
        if name.role == "saved":
            saved.setdefault(name.adapter, name.name)
        elif name.role not in ("plain", "original", "variant"):
            seen.setdefault(name.adapter, name.name)
    if "" not in seen:  # where it is, bias="all" left copies under modules_to_save.<name>. in a file without names
        seen = {adapter: name for adapter, name in saved.items() if adapter} | seen
    if len(seen) > 1:
        listed = sorted(adapter or "(no name)" for adapter in seen)
        raise MappingError(
            f"the file holds {len(seen)} adapters: {', '.join(listed)}",
            where=[f"{adapter or '(no name)'}: {name}" for adapter, name in sorted(seen.items())],
            hint="save one at a time, for example model.save_pretrained(path, selected_adapters=[...])",
        )
    return next(iter(seen), "")


def _settle(name: PeftName, adapter: str) -> PeftName:
    """Take the adapter's name out of the tensors of variants, where it can only be told from the others."""
    if name.role != "variant" or not adapter:
        return name
    levels = name.parameter.split(".")
    return replace(name, parameter=".".join([levels[0], *levels[2:]]) if levels[1:2] == [adapter] else name.parameter)


def _refuse_twins(names: Iterable[PeftName]) -> None:
    groups: dict[tuple[str, str, str, bool, str, int], list[str]] = {}
    for name in names:
        key = (name.path, name.role, name.parameter, name.wrapped and name.role == "plain", name.adapter, name.nested)
        groups.setdefault(key, []).append(name.name)
    twins = [" and ".join(group) for group in groups.values() if len(group) > 1]
    if twins:
        raise MappingError(
            f"{len(twins)} parameters occur twice under different names", where=twins, hint="remove one of each"
        )
