"""Facts that are read before a dialect parses, since it sees headers only: numbers, and a base model's module names.

They are facts like those that a user states, so a manifest records them and the conversion can be planned again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .. import formats
from ..dialects import flattened, flattened_tables, kohya_split, originals, peft_tuners
from ..dialects.adapter import Fact, Facts
from ..errors import InputError, MappingError
from ..merging.landing import PREFIXES
from ..tensors import Source, TensorSpec

NUMBERS = ("alpha", "phm_rule")
"""Last components of the tensors of one element that say something about a module: sd-scripts' and LyCORIS' alpha, and
Compacter's rule where it is one number."""

# How the names of a whole checkpoint of the original code begin, and the component that lies there.
_ORIGINAL = {
    "model.diffusion_model.": "unet",
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
}
_FIRST = {
    **dict.fromkeys(("down_blocks", "up_blocks", "mid_block", "input_blocks"), "unet"),
    **dict.fromkeys(("double_blocks", "transformer_blocks", "joint_blocks"), "transformer"),
    "text_model": "text_encoder",
}


def completed(facts: Facts, source: Source) -> Facts:
    """Add what can be read to what was stated: numbers of the file, and modules where a base model was named."""
    known = facts if facts.read("value") else facts.then(numbers(source))
    if not known.read("split"):
        known = known.then(blocks(known, source))
    return known.then(modules(facts, source.specs))


def blocks(facts: Facts, source: Source) -> Facts:
    """Return the number of blocks of every B that sd-scripts' ``split_qkv`` made, by headers, alphas and some rows."""
    found = kohya_split.joined(source.specs, source.metadata, facts.read("value"))
    return Facts(tuple(Fact(one.up, "split", one.parts) for one in found if kohya_split.is_split(one, source)))


def numbers(source: Source) -> Facts:
    """Return the value of every tensor of one element whose name ends in one of ``NUMBERS``."""
    wanted = [spec for spec in source.specs.values() if _is_number(spec)]
    return Facts(tuple(Fact(spec.name, "value", _number(source, spec)) for spec in wanted))


def _is_number(spec: TensorSpec) -> bool:
    return spec.size == 1 and spec.name.rpartition(".")[2] in NUMBERS and spec.dtype.numpy is not None


def _number(source: Source, spec: TensorSpec) -> float:
    value = float(source.read(spec.name).view(spec.dtype.values()).reshape(-1)[0])
    if not math.isfinite(value):
        raise InputError(f"a scaling of {value}", where=f"{source.path}: {spec.name}", hint="repair the tensor")
    return value


def modules(facts: Facts, specs: Mapping[str, TensorSpec]) -> Facts:
    """Look flattened names, and the modules of peft's other tuners, up in the base that ``names_of`` gives the path of.

    Nothing where the fact names a known pipeline, or where the modules are known already. Raises MappingError for
    names without a module, InputError for files that cannot be read.
    """
    base = facts.get("*", "names_of")
    if not isinstance(base, str) or facts.read("module") or not Path(base).exists():
        return Facts()
    tuned = peft_tuners.paths(specs)
    if tuned:
        weights = _weights(Path(base))
        return Facts(tuple(Fact(path, "module", [path, *weights[path]]) for path in tuned if path in weights))
    names = dict.fromkeys(name.partition(".")[0] for name in specs if flattened_tables.prefix_of(name))
    names |= dict.fromkeys(originals.dotted_modules(specs))
    found = flattened.resolve_in(names, base_modules(Path(base)), base)
    return Facts(tuple(Fact(name, "module", [path, *shape]) for name, (path, shape) in found.items()))


def of_base(facts: Facts, names: Iterable[str], base: Mapping[str, TensorSpec], where: str) -> Facts:
    """Look the same names up in a base that is at hand, where no other is named and nothing is known already.

    ``base``: its tensors, in transformers' or the original code's names; ``where``: its path. Names that it lacks and a
    known pipeline has are left to the pipeline's tables. MappingError for others that not exactly one module has.
    """
    if facts.get("*", "names_of") is not None or facts.read("module"):
        return Facts()
    names = list(names)
    weights, tuned = _matrices(base), peft_tuners.paths(names)
    if tuned:
        return Facts(tuple(Fact(path, "module", [path, *shape]) for path, shape in _found(tuned, weights).items()))
    flat = dict.fromkeys(name.partition(".")[0] for name in names if flattened_tables.prefix_of(name))
    flat |= dict.fromkeys(originals.dotted_modules(names))
    try:
        found = flattened.resolve_in(flat, _by_component(weights), where)
    except MappingError:
        if flattened.known(flat):
            return Facts()
        raise
    return Facts(tuple(Fact(name, "module", [path, *shape]) for name, (path, shape) in found.items()))


def _found(paths: Sequence[str], weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the weights' shapes by the paths; where none is there, with a body's prefix before them or taken off."""
    spellings = [{path: path for path in paths}]
    for prefix in PREFIXES:
        spellings.append({path: prefix + path for path in paths})
        spellings.append({path: path.removeprefix(prefix) for path in paths})
    for spelled in spellings:
        found = {path: weights[name] for path, name in spelled.items() if name in weights}
        if found:
            return found
    return {}


def base_modules(path: Path) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the modules with weights of a model's files, by component and path, with their weights' shapes.

    A pipeline's folder has its components in subfolders; a network's folder, or one file, is what its names say.
    """
    parts = {name: path / name for name in flattened_tables.COMPONENTS if (path / name).is_dir()}
    if parts:
        return {name: _weights(folder) for name, folder in parts.items()}
    return _by_component(_weights(path))


def _by_component(weights: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Sort modules by the network of a pipeline that they belong to, "" for those of another network."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for module, shape in weights.items():
        original = next((prefix for prefix in _ORIGINAL if module.startswith(prefix)), "")
        first, _, rest = module.partition(".")
        component = _ORIGINAL.get(original) or _FIRST.get(first, "")
        if not component and first in flattened_tables.COMPONENTS:
            component, module = first, rest
        found.setdefault(component, {})[module.removeprefix(original)] = shape
    known = [component for component in found if component]
    return {known[0]: {**found[known[0]], **found.get("", {})}} if len(known) == 1 else found


def _weights(path: Path) -> dict[str, tuple[int, ...]]:
    source = formats.open_source(path)
    try:
        return _matrices(source.specs)
    finally:
        source.close()


def _matrices(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, ...]]:
    return {
        name.removesuffix(".weight"): spec.shape
        for name, spec in specs.items()
        if name.endswith(".weight") and len(spec.shape) > 1
    }
