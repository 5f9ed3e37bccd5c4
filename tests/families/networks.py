"""Networks of other projects than transformers as their own code built them: one file of names for each family."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parent / "networks"
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Network:
    """One network, and the model of transformers with the same parameters.

    ``parameters``: as the project names them. ``hf``: a class of transformers, built from ``config`` and ``fields``;
    or, for models that transformers does not have, ``names``: its parameters as written down. ``layout``: choices
    that the network makes. ``own``: parameters of the network that the class of transformers is without, and
    ``lacking``: the other way round; both are stated in the file, each with its reason.
    """

    family: str
    release: str
    network: str
    hf: str
    config: str
    fields: Mapping[str, object]
    parameters: Shapes
    layout: Mapping[str, str]
    own: Mapping[str, str]
    lacking: Mapping[str, str]
    names: Shapes

    def __str__(self) -> str:
        tied = "-tied" if self.fields.get("tie_word_embeddings") is True else ""
        chosen = "".join(f"-{choice}" for key, choice in self.layout.items() if not key.endswith("prefix"))
        return f"{self.family}-{self.network}{tied}{chosen}"

    def model(self) -> tuple[Shapes, dict[str, object]]:
        """Return the parameters of the torch side as they lie on disk, and its config.json."""
        if self.names:
            return self.names, dict(self.fields)
        return saved(self.config, json.dumps(dict(self.fields)), self.hf)


@lru_cache(maxsize=128)
def saved(config: str, fields: str, hf: str) -> tuple[Shapes, dict[str, object]]:
    """Build a class of transformers; return the shapes of what its ``save_pretrained`` would write, and its config.

    Parameters that share one tensor are written once; fused experts come apart as on disk.
    """
    import torch
    import transformers

    said = json.loads(fields)
    made = getattr(transformers, config)(**said)
    with torch.device("meta"):
        module = getattr(transformers, hf)(made)
    tied = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in module.named_parameters()}
    if said.get("tie_word_embeddings") is False:  # transformers 5 ties mT5 all the same, and 4 did not
        tied.discard("lm_head.weight")
    state = {name: value for name, value in module.state_dict().items() if name not in tied}
    if made.model_type == "granitemoe":
        state = transformers.core_model_loading.revert_weight_conversion(module, state)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return shapes, json.loads(made.to_json_string(use_diff=False)) | said


def read() -> Iterator[Network]:
    """Return every network that was written down."""
    for path in sorted(FOLDER.glob("*.json")):
        said = json.loads(path.read_text())
        for entry in said["networks"]:
            yield Network(
                path.name.split(".")[0], said["release"], entry["network"], entry.get("hf", ""),
                entry.get("config", ""), entry["fields"], _shapes(entry["parameters"]), entry.get("layout", {}),
                entry.get("own", {}), entry.get("lacking", {}), _shapes(entry.get("names", {})),
            )  # fmt: skip


def _shapes(parameters: Mapping[str, list[int]]) -> Shapes:
    return {name: tuple(shape) for name, shape in parameters.items()}


NETWORKS = tuple(read())
