"""AdapterHub's bottleneck adapters, as ``save_adapter`` of adapters 1.3.0 writes them.

A directory with ``adapter_config.json`` (``{"config": {...}, "name": ...}``) and ``pytorch_adapter.bin``. Names:
``L.adapters.NAME.adapter_down.0.{weight,bias}`` and ``L.adapters.NAME.adapter_up.{weight,bias}``, L being where the
adapter lies: in BERT ``encoder.layer.0.attention.output`` and ``encoder.layer.0.output``, whose dense layer it follows
(``L.dense``). With ``phm_layer`` (Compacter) the projections are ``W_left`` ``[n, in / n, r]``, ``W_right``
``[n, r, out / n]``, ``b`` and ``phm_rule`` ``[n, n, n]``: ``H = sum_i kron(phm_rule_i, W_left_i W_right_i)``. With
``phm_dim`` 1 that is MindPet's low-rank adapter times one number.

AdapterHub computes ``h + scaling * up(act(down(h)))`` of the dense layer's output h before the residual and the norm,
as MindPet's AdapterDense does, where neither ``original_ln_before`` nor a norm of its own comes between.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from ..arithmetic.products import constant
from ..axes import Expr, read, reshape, scale
from ..errors import MappingError, counted
from .adapter import Adapter, Content, Extra, Facts, Value, Written
from .adapterhub import refuse_method
from .deltas import DENSE, LOW_RANK, Adapters, adapters, one, require, sizes
from .pairs import Problems, in_mindspore

_NAME = re.compile(
    r"^(?P<place>.+)\.adapters\.(?P<adapter>[^.]+)\.adapter_(?P<side>down|up)(?:\.(?P<at>\d+))?\."
    r"(?P<part>weight|bias|W_left|W_right|W|b|phm_rule|phm_rule_left|phm_rule_right)$"
)
_PARTS = {"weight": "weight", "bias": "bias", "W_left": "left", "W_right": "right", "b": "bias"}

DEFAULTS: dict[str, Value] = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True,
    "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
    "init_weights_seed": None, "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False,
    "learn_phm": True, "leave_out": [], "ln_after": False, "ln_before": False, "mh_adapter": True,
    "non_linearity": "swish", "original_ln_after": True, "original_ln_before": False, "output_adapter": True,
    "phm_bias": True, "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False, "phm_rank": 1,
    "reduction_factor": 16, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False, "shared_phm_rule": True,
    "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
"""DoubleSeqBnConfig, Houlsby's form, of adapters 1.3.0."""
_MUST: dict[str, tuple[Value, str]] = {
    "original_ln_before": (False, "the adapter comes after the block's norm and adds what was before it"),
    "residual_before_ln": (True, "the residual is taken elsewhere"),
    "ln_before": (False, "a norm of its own comes before"), "ln_after": (False, "a norm of its own comes after"),
    "is_parallel": (False, "the adapter runs beside the layer"), "use_gating": (False, "its output is gated"),
    "inv_adapter": (None, "an invertible adapter follows the embeddings"),
    "cross_adapter": (False, "adapters follow the cross attention"),
    "phm_bias": (True, "the projections have no bias"), "shared_W_phm": (False, "layers share their factors"),
    "factorized_phm_W": (True, "its matrices are not factorized"),
    "shared_phm_rule": (False, "all layers share one rule, which save_adapter leaves out of the file"),
    "factorized_phm_rule": (False, "its rule is factorized"),
    "phm_dim": (1, "it is a sum of Kronecker products"),
}  # fmt: skip
_OF_PHM = ("phm_bias", "shared_W_phm", "factorized_phm_W", "shared_phm_rule", "factorized_phm_rule", "phm_dim")
_ATTENTION = (".attention.output", ".attention_adapters")


class Bottlenecks:
    """Read and write adapters in Houlsby's place, and Compacter's where it is a low-rank adapter."""

    name = "adapterhub-bottleneck"
    framework: Literal["torch", "mindspore"] = "torch"

    def detect(self, content: Content) -> str | None:
        """Claim files with AdapterHub's names."""
        if in_mindspore(content):
            return None
        found = [name for name in content.specs if _NAME.match(name)]
        return f"{counted(len(found), 'parameter')} such as {found[0]}" if found else None

    def parse(self, content: Content) -> Adapter:
        """Read every adapter of one name; MappingError for forms that compute something else than MindPet's cells."""
        config = _section(content)
        problems = Problems("properties of the adapter have no counterpart")
        _check(config, problems)
        problems.raise_any(content.path)
        extras: list[Extra] = []
        left_out: list[tuple[str, str]] = []
        rules: dict[str, float] = {}
        names = set()
        for name, spec in content.specs.items():
            match = _NAME.match(name)
            if match is None:
                problems.add("no parameter of an adapter", name, "heads and fusion layers are files of their own")
                continue
            names.add(match["adapter"])
            path = _host(match["place"], problems)
            if match["part"] == "phm_rule":
                rules[f"{path} {match['side']}"] = float(str(content.facts.read("value").get(name, "nan")))
                left_out.append((name, "its one number is multiplied into the left factor"))
            elif match["part"] in _PARTS and match["at"] in (None, "0"):
                value = read(spec)
                value = reshape(value, value.shape[1:]) if match["part"] in ("W_left", "W_right") else value
                extras.append(Extra(path, f"adapter_{match['side']}.{_PARTS[match['part']]}", value, "delta"))
            else:
                problems.add("no projection of a plain adapter", name, "merge or retrain it in Houlsby's form")
        if len(names) > 1:
            problems.add("several adapters in one file", ", ".join(sorted(names)), "save them one by one")
        problems.raise_any(content.path)
        factor = config.get("scaling", 1.0)
        extras = [_folded(extra, rules, factor) for extra in extras]
        adapter = Adapter((), tuple(extras), dict(content.config or {}), tuple(left_out))
        adapters(adapter)
        return adapter

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell adapters with a config that ``load_adapter`` takes; MappingError for what one config cannot say."""
        require(adapter, self.name, (DENSE, LOW_RANK))
        found = adapters(adapter)
        config = _config(adapter, found)
        label = str(config["name"])
        tensors = []
        for path, parts in found.items():
            stem = f"{_place(path)}.adapters.{label}"
            low = "adapter_down.left" in parts
            for name, value in parts.items():
                side, _, part = name.partition(".")
                at = ".0" if side == "adapter_down" else ""
                tensors += _spelled(f"{stem}.{side}{at}", part, value, low)
        tensors.sort(key=lambda row: row[0])
        note = f"load it with model.load_adapter(DIR); its name is {label!r}"
        return Written(tensors, config, notes=(note,))


def _spelled(stem: str, part: str, value: Expr, low: bool) -> list[tuple[str, Expr]]:
    if not low:
        return [(f"{stem}.{part}", value)]
    if part == "bias":
        return [(f"{stem}.b", value)]
    rule = [(f"{stem}.phm_rule", constant(1.0, value.dtype, (1, 1, 1)))] if part == "left" else []
    return [(f"{stem}.W_{part}", reshape(value, (1, *value.shape))), *rule]


def _section(content: Content) -> Mapping[str, Value]:
    section = (content.config or {}).get("config")
    if not isinstance(section, dict):
        raise MappingError(
            "the adapter_config.json of the adapter is missing, which says how it computes", where=content.path,
            hint="convert the directory that save_adapter wrote, or name the file with --config",
        )  # fmt: skip
    refuse_method(section, content.path)
    return {**DEFAULTS, **section}


def _check(config: Mapping[str, Value], problems: Problems) -> None:
    """Refuse what computes something else than ``h + up(act(down(h)))`` of a dense layer's output."""
    for name, (wanted, why) in _MUST.items():
        if name in _OF_PHM and not config["phm_layer"]:
            continue
        if config[name] != wanted:
            cure = "train it with DoubleSeqBnConfig (Houlsby's form), which MindPet's AdapterDense computes"
            if name in _OF_PHM:
                cure = "train with phm_dim=1, shared_phm_rule=False, which MindPet's low-rank adapter computes"
            problems.add(why, f"adapter_config.json: {name} is {config[name]!r}", cure)
    if isinstance(config["scaling"], str):
        problems.add(
            "its scaling is learned", "adapter_config.json", "multiply it into adapter_up and set scaling to 1.0"
        )


def _host(place: str, problems: Problems) -> str:
    """Return the layer whose output is adapted."""
    if place.endswith(".output"):
        return f"{place}.dense"
    head, _, last = place.rpartition(".")
    if last in ("attention_adapters", "output_adapters") and re.search(r"(^|\.)h\.\d+$", head):
        return f"{head}.{'attn' if last == 'attention_adapters' else 'mlp'}.c_proj"
    problems.add(
        "the layer that this adapter follows is not known", place, "known: BERT's and GPT-2's; report the model"
    )
    return place


def _place(path: str) -> str:
    """Return where AdapterHub has the adapter of a layer; MappingError for layers that it adapts nowhere."""
    if path.endswith(".output.dense"):
        return path.removesuffix(".dense")
    match = re.match(r"^((?:.*\.)?h\.\d+)\.(attn|mlp)\.c_proj$", path)
    if match is None:
        raise MappingError(
            "AdapterHub has no adapter behind this layer", where=path or "the network itself",
            hint="it adapts attention.output and output of BERT, attn.c_proj and mlp.c_proj of GPT-2; if these are "
            "MindSpore's names, pass --family",
        )  # fmt: skip
    return f"{match[1]}.{'attention' if match[2] == 'attn' else 'output'}_adapters"


def _folded(extra: Extra, rules: Mapping[str, float], scaling: Value) -> Extra:
    """Multiply a rule of one number into the left factor, and the scaling into what comes last."""
    side, _, part = extra.parameter.partition(".")
    factor = rules.get(f"{extra.path} {side.removeprefix('adapter_')}", 1.0) if part == "left" else 1.0
    if side == "adapter_up" and part in ("weight", "bias", "right"):
        factor *= float(str(scaling))
    if factor == 1.0:
        return extra
    return Extra(extra.path, extra.parameter, scale(extra.value, factor, extra.value.dtype), extra.kind)


def _config(adapter: Adapter, found: Adapters) -> dict[str, Value]:
    """Return an adapter_config.json for adapters of one shape, all with factors or none."""
    shapes = {path: sizes(parts) for path, parts in found.items()}
    one({path: bool(shape[2]) for path, shape in shapes.items()}, "kinds of adapters")
    hidden, inner, rank = (int(str(one({p: s[i] for p, s in shapes.items()}, what)))
                           for i, what in enumerate(("hidden sizes", "bottleneck sizes", "ranks")))  # fmt: skip
    given = adapter.config.get("config")
    kept: Mapping[str, Value] = given if isinstance(given, dict) else {}
    if "non_linearity" not in kept:
        raise MappingError(
            "the file does not say which activation the adapters have, and AdapterHub must",
            where="adapter_config.json", hint="pass --non-linearity NAME; MindPet's default is gelu",
        )  # fmt: skip
    places = {path: _place(path) for path in found}
    config = {**DEFAULTS, **kept, **_where(list(places.values())), "reduction_factor": _reduction(hidden, inner)}
    config |= {"scaling": 1.0, "phm_layer": bool(rank)}
    if rank:
        config |= {"phm_dim": 1, "phm_rank": rank, "shared_phm_rule": False, "factorized_phm_W": True}
    out: dict[str, Value] = {**adapter.config, "config": config, "hidden_size": hidden}
    out.setdefault("name", "adapter")
    out.setdefault("version", "adapters.1.3.0")
    return out


def _where(places: list[str]) -> dict[str, Value]:
    """Return which of the two places have adapters, and the layers that have none."""
    numbers: dict[bool, set[int]] = {True: set(), False: set()}
    for place in places:
        found = [int(part) for part in place.split(".") if part.isdigit()]
        numbers[place.endswith(_ATTENTION)].add(found[-1] if found else 0)
    attention, output = numbers[True], numbers[False]
    if attention and output and attention != output:
        odd = sorted(attention ^ output)
        raise MappingError(
            "some layers have an adapter in one of the two places only, which AdapterHub's config cannot say",
            where=[f"layer {number}" for number in odd], hint="leave these layers out with --layers or --exclude",
        )  # fmt: skip
    present = attention | output
    gaps: list[Value] = [number for number in range(max(present) + 1) if number not in present]
    return {"mh_adapter": bool(attention), "output_adapter": bool(output), "leave_out": gaps}


def _reduction(hidden: int, inner: int) -> Value:
    """Return a factor with ``int(hidden // factor) == inner``, an integer where there is one."""
    factors = [hidden // inner if hidden >= inner else 0, hidden / inner, hidden / (inner + 0.5)]
    return next(factor for factor in factors if factor and int(hidden // factor) == inner)
