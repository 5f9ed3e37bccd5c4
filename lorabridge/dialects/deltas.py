"""Parameters of other algorithms than LoRA in the hub: bottleneck adapters, low-rank adapters, prefixes and prompts.

They are extras of the kind "delta" and no modules: nothing that is added to a weight. ``path`` is the linear layer
whose output an adapter adapts, ``h + up(act(down(h)))``, and "" for what belongs to the whole network. ``parameter``:

- ``adapter_down.weight`` ``[bottleneck, hidden]``, ``adapter_down.bias``, ``adapter_up.weight``, ``adapter_up.bias``;
- ``adapter_down.left`` ``[hidden, s]``, ``adapter_down.right`` ``[s, bottleneck]`` and the same of ``adapter_up``;
- ``prefix`` ``[n, layers * 2 * heads * head]``: per token, for each layer its key, then its value;
- ``prompt`` ``[n, hidden]``: virtual tokens before the embeddings.

What files say about them is in ``Adapter.config``: AdapterHub's adapter_config.json, or peft's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..axes import Expr
from ..errors import MappingError, counted
from .adapter import Adapter, Extra
from .pairs import Problems

DENSE = ("adapter_down.weight", "adapter_down.bias", "adapter_up.weight", "adapter_up.bias")
LOW_RANK = (
    "adapter_down.left", "adapter_down.right", "adapter_down.bias",
    "adapter_up.left", "adapter_up.right", "adapter_up.bias",
)  # fmt: skip
PREFIX, PROMPT = "prefix", "prompt"

COUNTERPARTS = {
    "adapterhub-bottleneck": "mindpet-adapter", "mindpet-adapter": "adapterhub-bottleneck",
    "peft-prompt": "mindpet-prompt", "mindpet-prompt": "peft-prompt",
}  # fmt: skip
"""The dialects that hold such parameters, each with the one that says the same in the other framework."""

_WHAT = {
    **dict.fromkeys(DENSE, "a bottleneck adapter computes a function of a layer's output"),
    **dict.fromkeys(LOW_RANK, "a low-rank adapter computes a function of a layer's output"),
    PREFIX: "a prefix is keys and values before those of the attention",
    PROMPT: "a prompt is virtual tokens before the input",
}
Adapters = dict[str, dict[str, Expr]]


def deltas(adapter: Adapter) -> list[Extra]:
    """Return the parameters of other algorithms than LoRA."""
    return [extra for extra in adapter.extras if extra.kind == "delta"]


def refuse_deltas(adapter: Adapter, doing: str) -> None:
    """Raise MappingError, with every parameter, where an adapter is none that changes weights.

    ``doing``: what cannot be done, such as "be merged".
    """
    found = deltas(adapter)
    if found:
        reasons = dict.fromkeys(_WHAT[extra.parameter] for extra in found)
        raise MappingError(
            f"these parameters cannot {doing}: {'; '.join(reasons)}, not a change of a weight",
            where=[extra.name for extra in found],
            hint=f"keep them beside the base; convert them with --to {' or '.join(_dialects(found))}",
        )


def require(adapter: Adapter, dialect: str, parameters: Sequence[Sequence[str]]) -> None:
    """Raise MappingError for everything in an adapter that a dialect of these parameters cannot hold."""
    known = {name for group in parameters for name in group}
    problems = Problems(f"parts of the adapter have no place in {dialect}")
    for module in adapter.modules:
        problems.add("LoRA factors", module.path, "convert them to a LoRA dialect, apart from the rest (--include)")
    for extra in adapter.extras:
        if extra.kind != "delta":
            problems.add(
                f"{dialect} files hold no parameter of the network itself", extra.name,
                "leave it out with --exclude, or --adapter-only for base weights; convert it as a model with --include",
            )  # fmt: skip
        elif extra.parameter not in known:
            wanted = " or ".join(_dialects([extra]))
            problems.add(f"{dialect} has no {_WHAT[extra.parameter].partition(' is ')[0].split(' computes')[0][2:]}",
                         extra.name, f"choose --to {wanted}")  # fmt: skip
    problems.raise_any()


def adapters(adapter: Adapter) -> Adapters:
    """Return the bottleneck and low-rank adapters by the layer they follow; MappingError for one without its parts."""
    found: Adapters = {}
    for extra in deltas(adapter):
        found.setdefault(extra.path, {})[extra.parameter] = extra.value
    problems = Problems("adapters are not whole")
    for path, parts in found.items():
        kind = LOW_RANK if any(name in parts for name in ("adapter_down.left", "adapter_up.left")) else DENSE
        for name in kind:
            if name not in parts:
                problems.add(f"{name} is missing", path or "the network", "save the adapter again, as a whole")
        if set(parts) <= set(kind) and len(parts) == len(kind):
            _check_shapes(path, parts, problems)
    problems.raise_any()
    return found


def sizes(parts: Mapping[str, Expr]) -> tuple[int, int, int]:
    """Return an adapter's hidden size, bottleneck size, and the rank of its factors (0 for one without)."""
    if "adapter_down.left" in parts:
        return (
            parts["adapter_up.bias"].shape[0],
            parts["adapter_down.bias"].shape[0],
            parts["adapter_down.left"].shape[1],
        )
    return parts["adapter_up.bias"].shape[0], parts["adapter_down.bias"].shape[0], 0


def _check_shapes(path: str, parts: Mapping[str, Expr], problems: Problems) -> None:
    if any(len(parts[name].shape) != 1 for name in ("adapter_down.bias", "adapter_up.bias")):
        problems.add("a bias has more than one axis", path, "check the file")
        return
    hidden, inner, rank = sizes(parts)
    wanted = {
        "adapter_down.weight": (inner, hidden), "adapter_up.weight": (hidden, inner),
        "adapter_down.left": (hidden, rank), "adapter_down.right": (rank, inner),
        "adapter_up.left": (inner, rank), "adapter_up.right": (rank, hidden),
    }  # fmt: skip
    for name, value in parts.items():
        if name in wanted and value.shape != wanted[name]:
            said = f"{path}.{name}: {list(value.shape)}, not {list(wanted[name])}"
            problems.add("shapes contradict each other", said, "check the file")


def one(values: Mapping[str, object], what: str) -> object:
    """Return what all layers have in common; MappingError naming them where they differ."""
    found = list(dict.fromkeys(values.values()))
    if len(found) > 1:
        said = [f"{path}: {value}" for path, value in values.items()]
        raise MappingError(
            f"the layers have {counted(len(found), 'different ' + what)}", where=said,
            hint="the target has one for all; convert them apart with --include",
        )  # fmt: skip
    return found[0]


def _dialects(found: Sequence[Extra]) -> list[str]:
    prompts = any(extra.parameter in (PREFIX, PROMPT) for extra in found)
    return ["peft-prompt", "mindpet-prompt"] if prompts else ["adapterhub-bottleneck", "mindpet-adapter"]
