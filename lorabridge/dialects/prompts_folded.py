"""Prefixes that layers of their own compute in training: MindPet's projected PrefixEncoder, and its PrefixLayers.

Both are ``tanh(rows @ W0.T + b0) @ W2.T + b2``; here it is computed once, in float64, and rounded once to the type of
the rows, so that peft's ``prompt_embeddings`` hold what the cells compute. MindPet's PrefixLayer lies in one attention:
``wte`` ``[n, embed]``, ``control_trans.0`` ``[mid, embed]``, ``control_trans.2`` ``[hidden, mid]``, one matrix
that is key and value alike; with ``2 * hidden`` rows (``separate_value`` of ``lorabridge.layers``) the key's come
first. Its ``prefix_token_num`` rows are shared out among the sequences of a batch, so that a file stands for one prefix
only where they are as many as the config's ``num_virtual_tokens``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..arithmetic import tuned
from ..axes import Expr, cut, join, read
from ..tensors import TensorSpec
from .adapter import Json
from .pairs import Problems

_PROJECTION = re.compile(
    r"^(?P<path>.*?)\.?(?:mindpet|tk)_delta_ptuning2_(?P<at>trans\.[02]|dense_in|dense_out)\.(?P<part>weight|bias)$"
)
_LAYER = re.compile(
    r"^(?P<path>.*?)\.?(?:mindpet|tk)_delta_prefixtuning_"
    r"(?P<at>wte|control_trans\.[02])\.(?P<part>embedding_table|weight|bias)$"
)
_TOKENS = re.compile(r"(^|\.)((mindpet|tk)_delta_prefixtuning_)?input_tokens$")
_SIDES = {"trans.0": "0", "dense_in": "0", "trans.2": "2", "dense_out": "2", "control_trans.0": "0",
          "control_trans.2": "2", "wte": "rows"}  # fmt: skip
_ORDER = ("rows", "0.weight", "0.bias", "2.weight", "2.bias")
FOLDED = "a projection computed the prefix in training; its result is written, from which the projection cannot return"


@dataclass
class Computed:
    """The tensors of projections by the path of their cell, as they are found."""

    projections: dict[str, dict[str, TensorSpec]] = field(default_factory=dict)
    layers: dict[str, dict[str, TensorSpec]] = field(default_factory=dict)
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def take(self, name: str, spec: TensorSpec) -> bool:
        """Keep a tensor that belongs to a projection; False for any other."""
        if match := _PROJECTION.match(name):
            self.projections.setdefault(match["path"], {})[f"{_SIDES[match['at']]}.{match['part']}"] = spec
        elif match := _LAYER.match(name):
            side = _SIDES[match["at"]]
            key = side if side == "rows" else f"{side}.{match['part']}"
            self.layers.setdefault(match["path"], {})[key] = spec
        elif _TOKENS.search(name):
            self.left_out.append((name, "the numbers 0, 1, 2 ..., which the cell makes itself"))
        else:
            return False
        return True

    def through(self, path: str, rows: Expr, problems: Problems) -> Expr:
        """Return a prefix as it is, or what the projection beside it makes of it."""
        found = self.projections.pop(path, None)
        return rows if found is None else _projected(path, rows, found, problems)

    def whole(self, config: Json, problems: Problems) -> Expr | None:
        """Put the prefixes of all PrefixLayers together as peft has them; None where there are none or after a problem.

        Shape ``[n, layers * 2 * hidden]``: per token, for each layer its key, then its value.
        """
        if not self.layers:
            return None
        width = config.get("token_dim")
        tokens, count = config.get("num_virtual_tokens"), config.get("num_layers")
        if not (isinstance(width, int) and isinstance(tokens, int) and isinstance(count, int)):
            problems.add(
                "a PrefixLayer's file does not say how many layers, how wide, and for how many sequences they are",
                ", ".join(self.layers),
                "name peft's adapter_config.json with --config: num_layers, token_dim and num_virtual_tokens",
            )
            return None
        made = []
        for path in sorted(self.layers, key=_number):
            rows = self.layers[path].pop("rows", None)
            if rows is None:
                problems.add("wte is missing", path, "save the layer again, as a whole")
                return None
            one = _projected(path, read(rows), self.layers[path], problems)
            if one.shape not in ((tokens, width), (tokens, 2 * width)):
                said = f"{path}: {list(one.shape)}, not [{tokens}, {width}] or [{tokens}, {2 * width}]"
                cure = "correct num_virtual_tokens and token_dim; prefixes of several sequences have no counterpart"
                problems.add("the prefix is not of the config's sizes", said, cure)
                return None
            made += [cut(one, 1, 0, width), cut(one, 1, one.shape[1] - width, one.shape[1])]
        if len(made) != 2 * count:
            problems.add(f"{len(made) // 2} PrefixLayers, and num_layers is {count}", ", ".join(self.layers),
                         "every layer needs its own")  # fmt: skip
            return None
        return join(made, 1)

    def finish(self, problems: Problems) -> None:
        """Note projections without a prefix."""
        for path in self.projections:
            problems.add("a projection without the rows that it projects", path or "the network", "save the whole cell")


def _projected(path: str, rows: Expr, found: Mapping[str, TensorSpec], problems: Problems) -> Expr:
    missing = [name for name in _ORDER[1:] if name not in found]
    if missing:
        problems.add(f"{', '.join(missing)} of the projection is missing", path or "the network", "save it as a whole")
        return rows
    first, bias, second, last = (read(found[name]) for name in _ORDER[1:])
    fits = (
        len(rows.shape) == len(first.shape) == len(second.shape) == 2
        and first.shape[1] == rows.shape[1] and bias.shape == first.shape[:1]
        and second.shape[1] == first.shape[0] and last.shape == second.shape[:1]
    )  # fmt: skip
    if not fits:
        said = ", ".join(f"{name} {list(found[name].shape)}" for name in _ORDER[1:])
        problems.add("shapes do not fit together", f"{path}: rows {list(rows.shape)}, {said}", "check the file")
        return rows
    return tuned.made("projected", (rows, first, bias, second, last), (rows.shape[0], second.shape[0]), rows.dtype)


def _number(path: str) -> tuple[int, ...]:
    return tuple(int(level) for level in path.split(".") if level.isdigit())
