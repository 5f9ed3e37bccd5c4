"""Networks of other projects than transformers as their own code built them: one file of names for each family."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path

FOLDER = Path(__file__).parent / "networks"
SOURCES = Path(__file__).parent / "sources"
HF_NAMES = {"vit": ("disk", "memory"), "swin": ("disk", "memory"), "mae": ("disk", "disk5", "memory")}
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Network:
    """One network, and the model of transformers with the same parameters.

    ``parameters``: as the project names them. ``hf``: a class of transformers, built from ``config`` and ``fields``;
    for models that transformers does not have, ``names`` are its parameters as written down in sources/. ``layout``:
    choices that the network makes, and which of transformers' names are meant. ``own``: parameters of the network that
    the class of transformers is without; ``lacking``: the other way round; ``apart``: parameters of either that have no
    rule and are left out here. Each has its reason.
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
    apart: Mapping[str, str]

    def __str__(self) -> str:
        tied = "-tied" if self.fields.get("tie_word_embeddings") is True else ""
        chosen = "".join(f"-{choice}" for key, choice in self.layout.items() if not key.endswith("prefix"))
        return f"{self.family}-{self.network}{tied}{chosen}"

    def model(self) -> tuple[Shapes, dict[str, object]]:
        """Return the parameters of the torch side as they lie on disk, and its config.json."""
        if self.names:
            return self.names, saved(self.config, json.dumps(dict(self.fields)), self.hf, "memory")[1]
        shapes, config = saved(self.config, json.dumps(dict(self.fields)), self.hf, self.layout.get("hf_names", "disk"))
        return {name: shape for name, shape in shapes.items() if name not in self.apart}, config


@lru_cache(maxsize=128)
def saved(config: str, fields: str, hf: str, names: str) -> tuple[Shapes, dict[str, object]]:
    """Build a class of transformers; return the shapes of what its ``save_pretrained`` would write, and its config.

    Parameters that share one tensor are written once. transformers 5 gives some files other names than the modules
    have: ``names`` "memory" keeps the modules'. "disk" differs from what it writes for MAE, see mappings/mae.toml.
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
    if names != "memory":
        state = transformers.core_model_loading.revert_weight_conversion(module, state)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if names == "disk":
        shapes = {k.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): v for k, v in shapes.items()}
    return shapes, json.loads(made.to_json_string(use_diff=False)) | said


def read() -> Iterator[Network]:
    """Return every network that was written down."""
    for path in sorted(FOLDER.glob("*.json")):
        said = json.loads(path.read_text())
        family = path.name.split(".")[0]
        for entry, names in product(said["networks"], HF_NAMES.get(family, ("",))):
            layout = entry.get("layout", {}) | ({"hf_names": names} if names else {})
            source = json.loads((SOURCES / f"{entry['source']}.json").read_text()) if "source" in entry else {}
            apart = entry.get("apart", {})
            parameters = {n: s for n, s in _shapes(entry["parameters"]).items() if n not in apart}
            yield Network(
                family, said["release"], entry["network"], entry["hf"], entry["config"], entry["fields"], parameters,
                layout, entry.get("own", {}), entry.get("lacking", {}), _shapes(source.get("parameters", {})), apart,
            )  # fmt: skip


def _shapes(parameters: Mapping[str, list[int]]) -> Shapes:
    return {name: tuple(shape) for name, shape in parameters.items()}


NETWORKS = tuple(read())
