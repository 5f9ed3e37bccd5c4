"""Bare factor pairs: what loralib, loralib-ms and MindPet have in common.

All three keep their factors as parameters of the adapted layer itself and say nothing else, so a module is a path,
tensors by role, and facts from outside. ``Content.metadata`` tells the container: its key "container" is
"safetensors", "torch" or "mindspore", its key "format" what a safetensors header says ("pt", "ms").
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..axes import read
from ..errors import MappingError
from ..tensors import TensorSpec
from .adapter import Content, Extra, ExtraKind, LoraModule, Scaling
from .optimizer import training_state

WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that DataParallel and torch.compile put before every name."""

BASE_WEIGHTS = ("weight", "conv.weight")
EMBEDDING_WEIGHTS = ("embedding_table", "embedding_weight")
"""What MindSpore and MindFormers call the table of an embedding."""

MERGE = "merge the adapter into the base first (in peft: merge_and_unload)"
"""The cure for what a dialect cannot express."""

TOKENS = "trainable_tokens"
"""Last component under which loralib-ms keeps peft's trained token rows; config says which rows they are."""


class Problems:
    """Collect what is wrong with a file, so that one error names everything.

    ``summary``: what the problems are, behind their number, where there are several.
    """

    def __init__(self, summary: str = "things about the adapter are wrong or not stated") -> None:
        self._summary = summary
        self._places: dict[tuple[str, str], list[str]] = {}

    def add(self, problem: str, where: str, hint: str) -> None:
        """Note one problem at one place."""
        self._places.setdefault((problem, hint), []).append(where)

    def raise_any(self, path: str = "") -> None:
        """Raise one MappingError for everything noted, if anything is."""
        if not self._places:
            return
        hints = "; ".join(dict.fromkeys(hint for _, hint in self._places))
        if len(self._places) == 1:
            (((problem, _), where),) = self._places.items()
        else:
            problem = f"{len(self._places)} {self._summary}"
            where = [f"{place}: {what}" for (what, _), places in self._places.items() for place in places]
        raise MappingError(problem, where=[*where, f"in {path}"] if path else where, hint=hints)


@dataclass(frozen=True, slots=True)
class Names:
    """Tensors of a file by what they are.

    ``pairs``: (module path, weight name) to role ("a", "b", "magnitude", "bias") to spec. ``rest``: the tensors
    beside, by name without wrapper prefix. ``left_out``: recognised and not carried.
    """

    pairs: Mapping[tuple[str, str], Mapping[str, TensorSpec]]
    rest: Mapping[str, TensorSpec]
    left_out: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reader:
    """What reading one module needs: its specs, the facts, and where to put problems."""

    content: Content
    rest: Mapping[str, TensorSpec]
    problems: Problems = field(default_factory=Problems)

    def fact(self, path: str, name: str) -> object:
        """Return what is stated about a module, or None."""
        return self.content.facts.get(path, name)

    def number(self, path: str, name: str) -> int | None:
        """Return a stated positive integer."""
        value = self.fact(path, name)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            return value
        self.problems.add(f"{name} must be a positive integer, not {value!r}", path, f"correct {flag(name)}")
        return None

    def switch(self, path: str, name: str) -> bool | None:
        """Return a stated yes or no."""
        value = self.fact(path, name)
        if value is None or isinstance(value, bool):
            return value
        self.problems.add(f"{name} must be yes or no, not {value!r}", path, f"correct {flag(name)}")
        return None

    def scaling(self, path: str, rank: int) -> Scaling:
        """Return alpha over rank; a missing alpha is a problem, never a guess."""
        stated = self.number(path, "rank")
        if stated is not None and stated != rank:
            self.problems.add(f"rank is stated as {stated}, but lora_A has rank {rank}", path, "correct --rank")
        alpha = self.fact(path, "alpha")
        if isinstance(alpha, int | float) and not isinstance(alpha, bool) and math.isfinite(alpha):
            return Scaling(float(alpha), rank, bool(self.switch(path, "use_rslora")))
        what = "alpha is not stored in the file" if alpha is None else f"alpha must be a number, not {alpha!r}"
        self.problems.add(what, path, "give the alpha of the training run with --alpha (PATTERN=VALUE for one module)")
        return Scaling(0.0, rank)


def in_mindspore(content: Content) -> bool:
    """Say whether the container is MindSpore's: its .ckpt, or a safetensors file that says ``format: ms``."""
    return content.metadata.get("container") == "mindspore" or content.metadata.get("format") == "ms"


def flag(fact: str) -> str:
    """Return the option that states a fact."""
    return "--" + fact.replace("_", "-")


def group(content: Content, roles: Mapping[str, tuple[str, str]]) -> Names:
    """Sort names into factor pairs, training state and the rest.

    ``roles``: last one or two components of a name to (role, weight name). A wrapper's prefix is taken off where all
    names have it. Raises MappingError for a factor without its partner and for empty factors (as partitioned training
    saves them).
    """
    left_out = training_state(content.specs)
    skipped = {name for name, _ in left_out}
    names = [name for name in content.specs if name not in skipped]
    prefix = next((w for w in WRAPPERS if names and all(name.startswith(w) for name in names)), "")
    pairs: dict[tuple[str, str], dict[str, TensorSpec]] = {}
    rest: dict[str, TensorSpec] = {}
    for name in names:
        bare = name.removeprefix(prefix)
        path, _, last = bare.rpartition(".")
        if last not in roles and (stem := path.rpartition("."))[2] + "." + last in roles:
            path, last = stem[0], f"{stem[2]}.{last}"
        if last in roles:
            role, weight = roles[last]
            pairs.setdefault((path, weight), {})[role] = content.specs[name]
        else:
            rest[bare] = content.specs[name]
    _complete(pairs, content.path)
    warnings = (f"the prefix {prefix!r} of every name was taken off",) if prefix else ()
    return Names(pairs, rest, tuple(left_out), warnings)


def _complete(pairs: Mapping[tuple[str, str], Mapping[str, TensorSpec]], file: str) -> None:
    problems = Problems()
    for (path, _), tensors in pairs.items():
        missing = [role for role in ("a", "b") if role not in tensors]
        if missing:
            has = ", ".join(spec.name for spec in tensors.values())
            problems.add(f"lora_{'/'.join(missing).upper()} is missing", f"{path}: has {has}", "re-save the adapter")
            continue
        for spec in (tensors["a"], tensors["b"]):
            if spec.size == 0 or len(spec.shape) < 2:
                problems.add(
                    "factors are empty or not matrices",
                    f"{spec.name}: {list(spec.shape)}",
                    "gather partitioned parameters before saving (ZeRO-3 saves empty ones)",
                )
    problems.raise_any(file)


def extras(content: Content, rest: Mapping[str, TensorSpec], modules: Sequence[LoraModule]) -> list[Extra]:
    """Classify the tensors beside the factors.

    In a file that holds adapted weights everything is "base". Otherwise biases are "bias" (loralib's bias modes) and
    whole parameters "modules_to_save": trained beside the adapter, or they would not be in the file.
    """
    full = any(module_weight(module, rest) for module in modules)
    conv = {module.path for module in modules if module.kind.startswith("conv")}
    out = []
    for name, spec in rest.items():
        path, _, parameter = name.rpartition(".")
        owner = path.removesuffix(".conv") if path.endswith(".conv") else ("" if path == "conv" else None)
        if owner is not None and owner in conv:
            path = owner
        kind: ExtraKind = "base" if full or not modules else "modules_to_save"
        if parameter == TOKENS:
            parameter, kind = "weight", "trainable_tokens"
        elif not full and parameter.endswith("bias"):
            kind = "bias"
        out.append(Extra(path, parameter, read(spec), kind))
    count = Counter(extra.name for extra in out)
    twice = [name for name, times in count.items() if times > 1]
    if twice:
        raise MappingError(
            "a parameter occurs twice, beside and below .conv", where=twice, hint="remove one of the two"
        )
    return out


def weight_names(path: str, weight: str) -> Iterable[str]:
    """Return the names under which a module's base weight may lie in a full checkpoint."""
    dot = f"{path}." if path else ""
    return tuple(dot + name for name in (*BASE_WEIGHTS, *EMBEDDING_WEIGHTS)) if weight == "weight" else (dot + weight,)


def module_weight(module: LoraModule, rest: Mapping[str, TensorSpec]) -> TensorSpec | None:
    """Return the base weight of an adapted module, if the file holds it."""
    return next((rest[name] for name in weight_names(module.path, module.weight) if name in rest), None)


def merged_state(reader: Reader, modules: Sequence[LoraModule]) -> bool | None:
    """Say whether the base weights in the file already contain the delta; None when it holds none.

    loralib merges in place on ``eval()`` and saves the merged weight beside the factors, and nothing in the file
    tells. A file with base weights therefore needs the statement.
    """
    holding = [module.path for module in modules if module_weight(module, reader.rest)]
    states = {path: reader.switch(path, "merged") for path in holding}
    for path in (path for path, state in states.items() if state is None):
        reader.problems.add(
            "the file holds base weights and does not say whether the adapter is merged into them",
            path,
            "pass --merged yes (saved after model.eval()) or --merged no (saved in training mode)",
        )
    if len({state for state in states.values() if state is not None}) > 1:
        where = [f"{path}: {'merged' if state else 'not merged'}" for path, state in states.items()]
        reader.problems.add("some base weights are merged and some are not", "; ".join(where[:4]), "convert them apart")
    return any(states.values()) if holding else None
