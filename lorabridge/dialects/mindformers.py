"""MindFormers' own LoRA layers: ``mcore`` (graph modes on parallel_core) and ``pynative`` (PyNative mode).

| dialect | release | A | B |
|---|---|---|---|
| mcore | 1.6 ... 2.1, parallel_core/training_graph/tensor_parallel/lora_layers.py | ``P.lora_A.weight[r, in]`` | ``P.lora_B.weight[out, r]`` |
| pynative | 2.0 and later, pynative/pet/lora_layer.py | ``P.lora_a[r, in]`` | ``P.lora_b[out, r]`` |
| routed experts | 2.1, see ``mindformers_experts`` | ``P.weight1_lora_a[experts, in, r]`` | ``P.weight1_lora_b[experts, r, out]`` |

Both have one rank and one alpha for all layers (scaling ``alpha / rank``), stored beside the file at best, and never
merge. Checkpoints of a run hold base weights and optimizer state beside the factors. A network that predicts several
tokens adapts its shared head twice: ``mtp.output_layer`` has factors of its own and no weight.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ..axes import Expr
from ..errors import counted
from .adapter import Adapter, Content, Fact, Facts, LoraModule, Written
from .loralib import parse_bare
from .mindformers_config import carried, read_config, statements
from .mindformers_experts import ROLES as EXPERT_ROLES
from .mindformers_experts import pair_fits, rank_of, read_experts, spell_experts, without_experts
from .mindformers_write import graph_files, pynative_files, refuse, shared
from .pairs import Names, Problems, extras, group, in_mindspore
from .spelling import spell_extras

BUFFERS = ("fi_accu", "expert_load", "tokens_per_expert", "key_cache", "value_cache")
"""Last components of what networks count or cache while they run; no weights."""

LLAMA_CELLS = frozenset({"wq", "wk", "wv", "wo", "w1", "w2", "w3", "w_qkv", "w_gate_hidden", "tok_embeddings"})
"""What the cells of MindFormers' Llama are called; only they are served by S-LoRA, whose names are PyNative mode's."""

MCORE_ROLES = {"lora_A.weight": ("a", "weight"), "lora_B.weight": ("b", "weight")}
LOWER_ROLES = {"lora_a": ("a", "weight"), "lora_b": ("b", "weight")}
PYNATIVE_ROLES = {**LOWER_ROLES, **EXPERT_ROLES}
Check = Callable[[Names, Problems], None]
NEVER = Facts((Fact("*", "merged", False),))
LINEAR = Facts((Fact("*", "kind", "linear"), Fact("*", "enable_lora", [True])))


@dataclass(frozen=True, slots=True)
class Mcore:
    """Read and write the factors of ColumnParallelLinearWithLoRA and RowParallelLinearWithLoRA."""

    name: str = "mcore"
    framework: Literal["torch", "mindspore"] = "mindspore"

    def detect(self, content: Content) -> str | None:
        """Claim MindSpore files with ``P.lora_A.weight`` that have none of peft's prefixes."""
        if not in_mindspore(content):
            return None
        found = [name for name in content.specs if name.endswith(".lora_A.weight") and not _wrapped(name)]
        return f"{counted(len(found), 'parameter')} such as {found[0]} in a MindSpore file" if found else None

    def parse(self, content: Content) -> Adapter:
        """Read every adapted layer; a MappingError names what is missing, odd or not LoRA."""
        return parse_pairs(content, MCORE_ROLES, "MindFormers' parallel_core", LINEAR)

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell linear modules with one rank and one integer alpha; MappingError for all that has no place."""
        refuse(adapter, "MindFormers' parallel_core")
        made = shared(adapter, facts, whole_alpha=True)
        tensors = factor_names(made.modules, "lora_A.weight", "lora_B.weight") + spell_extras(adapter.extras)
        files, notes = graph_files(adapter, made, freeze=True)
        return Written(tensors, facts=made.facts, notes=(*notes, *made.notes), modules=made.modules, files=files)


@dataclass(frozen=True, slots=True)
class Pynative:
    """Read and write the factors of LinearWithLoRA and GroupedMLPWithLoRA."""

    name: str = "pynative"
    framework: Literal["torch", "mindspore"] = "mindspore"

    def detect(self, content: Content) -> str | None:
        """Claim MindSpore files with ``P.lora_a`` whose cells are none of the Llama cells that S-LoRA serves."""
        found = lower_case(content)
        if llama_cells(found):
            return None
        if in_mindspore(content):
            found += [name for name in content.specs if EXPERT_ROLES.get(name.rpartition(".")[2], ("",))[0] == "a"]
        return f"{counted(len(found), 'parameter')} such as {found[0]} in a MindSpore file" if found else None

    def parse(self, content: Content) -> Adapter:
        """Read every adapted layer; a MappingError names what is missing, odd or not LoRA."""
        return parse_pairs(content, PYNATIVE_ROLES, "MindFormers' PyNative mode", LINEAR)

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell linear modules with one rank and one integer alpha; MappingError for all that has no place."""
        refuse(adapter, "MindFormers' PyNative mode", experts=True)
        made = shared(adapter, facts, whole_alpha=True)
        plain, stacked, told = spell_experts(made.modules)
        tensors = factor_names(tuple(plain), "lora_a", "lora_b") + stacked + spell_extras(adapter.extras)
        files, notes = pynative_files(adapter, made)
        notes = (*notes, *made.notes, *told)
        return Written(tensors, facts=made.facts, notes=notes, modules=made.modules, files=files)


def _wrapped(name: str) -> bool:
    return name.startswith("base_model.")


def lower_case(content: Content) -> list[str]:
    """Return the names of MindSpore files that end in ``lora_a``, as PyNative mode and S-LoRA call the first factor.

    MLX and torchtune call theirs so too; the container tells.
    """
    return [name for name in content.specs if name.rpartition(".")[2] == "lora_a"] if in_mindspore(content) else []


def llama_cells(names: list[str]) -> bool:
    """Say whether these are factors of the Llama cells that S-LoRA serves."""
    cells = {name.split(".")[-2] for name in names if "." in name}
    return bool(cells & LLAMA_CELLS) or cells == {"lm_head"}


def factor_names(modules: tuple[LoraModule, ...], a: str, b: str) -> list[tuple[str, Expr]]:
    """Return each module's two factors under their full names."""
    rows = []
    for module in modules:
        (term,) = module.terms
        dot = f"{module.path}." if module.path else ""
        rows += [(f"{dot}{a}", term.a), (f"{dot}{b}", term.b)]
    return rows


def parse_pairs(
    content: Content, roles: Mapping[str, tuple[str, str]], title: str, kinds: Facts, *, served: bool = False,
    check: Check | None = None,
) -> Adapter:  # fmt: skip
    """Read the factor pairs of a checkpoint that MindFormers wrote, with what its config beside says.

    ``roles``: see ``pairs.group``. ``title``: what the layers are called in messages. ``kinds``: what the dialect
    says about its modules. ``served``: the config is S-LoRA's, whose targets are names and whose scaling may be
    rank-stabilised. ``check`` adds problems of its own. The network's running state is left out and listed, as the
    optimizer's is.
    """
    counters = [(name, "running state of the network") for name in content.specs if _buffer(name)]
    skipped = {name for name, _ in counters}
    weights = {name: spec for name, spec in content.specs.items() if name not in skipped}
    found = group(replace(content, specs=weights), roles)
    _check(content, found, title, check)
    config = read_config(content.config, content.path)
    if config is not None:
        foreign = (*config.foreign, *(("use_rslora",) if config.rslora and not served else ()))
        config = replace(config, foreign=foreign, targets=None if served else config.targets)
    ranks = {path: rank_of(weight, tensors) for (path, weight), tensors in found.pairs.items()}
    said, warnings = statements(config, content.facts, ranks, content.path)
    facts = kinds.then(said).then(content.facts).then(NEVER)
    told = replace(content, specs=weights, facts=facts, config=None)
    experts, plain = read_experts(told, found), without_experts(found)
    adapter = parse_bare(told, plain) if plain.pairs or not experts else _only_base(told, plain)
    return replace(
        adapter,
        modules=(*adapter.modules, *experts),
        config=carried(config) if said.entries else {},
        left_out=(*adapter.left_out, *counters),
        warnings=(*adapter.warnings, *warnings),
    )


def _only_base(content: Content, found: Names) -> Adapter:
    """Read what lies beside the factors of experts."""
    return Adapter((), tuple(extras(content, found.rest, ())), left_out=found.left_out, warnings=found.warnings)


def _buffer(name: str) -> bool:
    return name.rpartition(".")[2] in BUFFERS


def _check(content: Content, found: Names, title: str, check: Check | None) -> None:
    """Refuse factors that are no pair of matrices of one rank, and what a dialect has against a file's names."""
    problems = Problems()
    for (path, weight), tensors in found.pairs.items():
        if not pair_fits(weight, tensors):
            shapes = " and ".join(str(list(tensors[role].shape)) for role in ("a", "b"))
            problems.add(f"shapes are not those of {title}", f"{path}: {shapes}", "check --from")
    if check is not None:
        check(found, problems)
    problems.raise_any(content.path)
