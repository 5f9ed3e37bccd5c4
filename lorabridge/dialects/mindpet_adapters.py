"""MindPet 1.0.4's Adapter and Low-Rank Adapter: what AdapterDense and LowRankAdapterDense add to a dense layer P.

Names: ``P.mindpet_delta_adapter.mindpet_delta_adapter_block.mindpet_delta_adapter_{down,up}_sampler.{weight,bias}``
(``[bottleneck, hidden]`` and ``[hidden, bottleneck]``), and
``P.mindpet_delta_low_rank_adapter.mindpet_delta_low_rank_adapter_{down,up}_sampler.`` with
``mindpet_delta_low_rank_adapter_weight_left`` ``[in, s]``, ``..._right`` ``[s, out]`` and ``bias``. An AdapterLayer
that lies in a network by itself has these without the level before the block. The package was called tk at first, and
names said ``tk_delta``. A file does not say the activation: MindPet's default is gelu.
"""

from __future__ import annotations

import re
from typing import Literal

from ..axes import read
from ..errors import counted
from .adapter import Adapter, Content, Extra, ExtraKind, Fact, Facts, Value, Written
from .deltas import DENSE, LOW_RANK, adapters, one, require, sizes
from .optimizer import training_state
from .pairs import Problems

_SIDE = r"(?:mindpet|tk)_delta_{kind}_(?P<side>down|up)_sampler\."
_NAMES = (
    re.compile(
        r"^(?P<path>.*?)\.?(?P<cell>(?:mindpet|tk)_delta_adapter)\.(?:mindpet|tk)_delta_adapter_block\."
        + _SIDE.format(kind="adapter") + r"(?P<part>weight|bias)$"
    ),
    re.compile(
        r"^(?P<path>.*?)\.?(?P<cell>(?:mindpet|tk)_delta_low_rank_adapter)\." + _SIDE.format(kind="low_rank_adapter")
        + r"(?:(?:mindpet|tk)_delta_low_rank_adapter_weight_)?(?P<part>left|right|bias)$"
    ),
)  # fmt: skip
_MINE = re.compile(r"(^|\.)(mindpet|tk)_delta_(low_rank_)?adapter")
_OTHERS = re.compile(r"(^|\.)(mindpet|tk)_delta_(?!(low_rank_)?adapter)")

ACTIVATIONS = {
    "gelu": "gelu_new", "relu": "relu", "silu": "silu", "tanh": "tanh", "sigmoid": "sigmoid", "relu6": "relu6",
    "fast_gelu": "quick_gelu", "mish": "mish",
}  # fmt: skip
"""MindSpore's activations by what transformers calls the same function; MindSpore's gelu is the one through tanh."""
SPELLINGS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new"}
"""Other names that transformers has for one of these functions."""


class MindpetAdapters:
    """Read and write the parameters of AdapterDense and LowRankAdapterDense."""

    name = "mindpet-adapter"
    framework: Literal["torch", "mindspore"] = "mindspore"

    def detect(self, content: Content) -> str | None:
        """Claim files with the samplers of MindPet's adapters."""
        found = [name for name in content.specs if any(pattern.match(name) for pattern in _NAMES)]
        return f"{counted(len(found), 'parameter')} such as {found[0]}" if found else None

    def parse(self, content: Content) -> Adapter:
        """Read every adapter; MappingError for MindPet's other algorithms beside it, and adapters without parts."""
        left_out = training_state(content.specs)
        skipped = {name for name, _ in left_out}
        extras: list[Extra] = []
        rest: list[str] = []
        problems = Problems()
        for name, spec in content.specs.items():
            match = next((m for pattern in _NAMES if (m := pattern.match(name))), None)
            if name in skipped:
                continue
            if match is not None:
                extras.append(Extra(match["path"], f"adapter_{match['side']}.{match['part']}", read(spec), "delta"))
            elif _MINE.search(name):
                problems.add("not of an AdapterDense", name, "an AdapterLayer of its own has no counterpart elsewhere")
            elif _OTHERS.search(name):
                problems.add("belongs to another of MindPet's algorithms", name, "convert it apart, with --include")
            else:
                rest.append(name)
        problems.raise_any(content.path)
        hosts = {extra.path for extra in extras}
        full = any(f"{path}.weight" in rest for path in hosts)
        for name in rest:
            path, _, parameter = name.rpartition(".")
            kind: ExtraKind = "base" if full else "bias" if parameter.endswith("bias") else "modules_to_save"
            extras.append(Extra(path, parameter, read(content.specs[name]), kind))
        stated = content.facts.get("*", "non_linearity")
        config: dict[str, Value] = {"config": {"non_linearity": hub_activation(stated)}} if stated is not None else {}
        adapter = Adapter((), tuple(extras), config, tuple(left_out))
        adapters(adapter)
        return adapter

    def write(self, adapter: Adapter, facts: Facts) -> Written:
        """Spell adapters; the notes say how to build the cells that load them."""
        require(adapter, self.name, (DENSE, LOW_RANK))
        found = adapters(adapter)
        low = {path for path, parts in found.items() if "adapter_down.left" in parts}
        tensors = [(_name(extra, extra.path in low), extra.value) for extra in adapter.extras]
        shapes = {path: sizes(parts) for path, parts in found.items()}
        inner = one({path: shape[1] for path, shape in shapes.items()}, "bottleneck sizes")
        activation, notes = mindspore_activation(adapter, facts)
        said = f"non_linearity={activation!r}" if activation else "the non_linearity it was trained with"
        for rank in sorted({shape[2] for shape in shapes.values()}):
            hidden = next(shape[0] for shape in shapes.values() if shape[2] == rank)
            if rank:
                build = f"LowRankAdapterDense with reduction_factor={hidden // int(str(inner))}, low_rank_size={rank}"
            else:
                build = f"AdapterDense with bottleneck_size={inner}"
            notes = (*notes, f"build the layers as {build} and {said}: the file cannot say it")
        stated = Facts((Fact("*", "non_linearity", activation),)) if activation else Facts()
        return Written(tensors, facts=stated, notes=notes)


def _name(extra: Extra, low_rank: bool) -> str:
    side, _, part = extra.parameter.removeprefix("adapter_").partition(".")
    dot = f"{extra.path}." if extra.path else ""
    if not low_rank:
        cell = "mindpet_delta_adapter"
        return f"{dot}{cell}.{cell}_block.{cell}_{side}_sampler.{part}"
    cell = "mindpet_delta_low_rank_adapter"
    last = part if part == "bias" else f"{cell}_weight_{part}"
    return f"{dot}{cell}.{cell}_{side}_sampler.{last}"


def hub_activation(stated: Value) -> str:
    """Return transformers' name of what MindSpore calls an activation; MappingError where it has none."""
    problems = Problems()
    name = ACTIVATIONS.get(str(stated))
    if name is None:
        problems.add(
            f"no function of transformers is MindSpore's {stated!r}", "--non-linearity",
            f"known: {', '.join(ACTIVATIONS)}; leakyrelu, for one, has slope 0.2 there and 0.01 here",
        )  # fmt: skip
    problems.raise_any()
    return str(name)


def mindspore_activation(adapter: Adapter, facts: Facts) -> tuple[str, tuple[str, ...]]:
    """Return MindSpore's name of the adapter's activation ("" where nothing says it), and notes.

    ``facts`` may state ``non_linearity`` for the target. Raises MappingError where MindSpore's cell has no such
    function: transformers' gelu is exact, and MindSpore's the approximation through tanh, at most 5e-4 apart.
    """
    section = adapter.config.get("config")
    given = section.get("non_linearity") if isinstance(section, dict) else None
    stated = facts.get("*", "non_linearity")
    if given is None:
        return ("" if stated is None else str(stated)), ()
    canonical = SPELLINGS.get(str(given), str(given))
    name = next((mine for mine, theirs in ACTIVATIONS.items() if theirs == canonical), "")
    if stated is not None and stated != name:
        return str(stated), (f"the source computes {given}, and the target is stated to compute {stated}",)
    if not name:
        problems = Problems()
        cure = (
            "MindSpore's gelu is the approximation through tanh, at most 5e-4 apart: accept with --non-linearity gelu"
            if canonical == "gelu" else "state what the target computes with --non-linearity NAME, if you accept it"
        )  # fmt: skip
        problems.add(
            f"MindPet's adapters have no activation that is transformers' {given}", "adapter_config.json", cure
        )
        problems.raise_any()
    return name, ()
