"""Every decoder family that is tested: what its models hold on either side, and who said so. A table is one entry."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path

from lorabridge.families.tables import Table

NAMES = Path(__file__).parent / "names"
Shapes = dict[str, tuple[int, ...]]
Layout = Mapping[str, str]


@dataclass(frozen=True)
class Case:
    """A small model of a family.

    ``hf``: a class of transformers, which is built from ``config``; or a file of names that were written down, which
    holds its config. ``dumps``: names that a network of MindSpore was found to have, and the layout they have.
    ``fixed``: choices that the hf side makes by what it holds, such as a prefix.
    """

    table: str
    hf: str
    config: Mapping[str, object] = field(default_factory=dict)
    dumps: Mapping[str, Layout] = field(default_factory=dict)
    fixed: Layout = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.table}-{self.hf}"

    @property
    def real(self) -> bool:
        """The hf side is a class that was built, not names that were read."""
        return not self.hf.endswith(".hf")

    @property
    def architecture(self) -> str:
        """Name of the class in config.json."""
        return self.hf if self.real else ""

    def model(self) -> tuple[Shapes, dict[str, object]]:
        """Return the parameters' shapes on the hf side, and the fields of config.json."""
        if self.real:
            return built(self.hf, json.dumps(dict(self.config)))
        said = written(self.hf)
        return shapes_of(said), dict(said["config"])  # type: ignore[call-overload]

    def layouts(self, table: Table) -> Iterator[dict[str, str]]:
        """Return every combination of the table's choices."""
        names = [layout.name for layout in table.layouts if layout.name not in self.fixed]
        choices = [[choice for choice, _ in layout.choices] for layout in table.layouts if layout.name in names]
        for chosen in product(*choices):
            yield {**self.fixed, **dict(zip(names, chosen, strict=True))}


def written(name: str) -> dict[str, object]:
    """Return a file of names."""
    return json.loads((NAMES / f"{name}.json").read_text())  # type: ignore[no-any-return]


def shapes_of(said: Mapping[str, object]) -> Shapes:
    """Return the shapes in a file of names."""
    parameters = said["parameters"]
    assert isinstance(parameters, dict)
    return {name: tuple(shape) for name, shape in parameters.items()}


@lru_cache(maxsize=64)
def built(architecture: str, config: str) -> tuple[Shapes, dict[str, object]]:
    """Build a class of transformers on the meta device; return its parameters' shapes and its config.json."""
    import torch
    import transformers

    name = architecture.split("For")[0].split("LMHead")[0].removesuffix("Model") + "Config"
    made = getattr(transformers, name)(**json.loads(config), bos_token_id=0, eos_token_id=0, pad_token_id=0)
    with torch.device("meta"):
        module = getattr(transformers, architecture)(made)
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    return shapes, json.loads(made.to_json_string(use_diff=False))


BLOOM = {"hidden_size": 24, "n_layer": 2, "n_head": 4, "vocab_size": 40}
CODER = {"n_embd": 24, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 16}
LLAMA = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 28, "vocab_size": 40}  # fmt: skip
GLM = LLAMA | {"hidden_size": 32, "head_dim": 8, "attention_bias": True}
CORE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 128, "tie_word_embeddings": False}  # fmt: skip
WIDE = CORE | {"head_dim": 32}
TRAIN = {"qkv": "grouped", "fc1": "interleaved"}
PREDICT = {"qkv": "contiguous", "fc1": "contiguous"}

CASES = [
    Case("bloom", "BloomForCausalLM", BLOOM, {"bloom.1.3.2": {}}),
    Case("bloom", "BloomModel", BLOOM, {"bloom.1.3.2": {}}, {"hf_prefix": ""}),
    Case("wizardcoder", "GPTBigCodeForCausalLM", CODER, {"wizardcoder.1.0.2": {"head": "cell"}}),
    Case("llama", "LlamaForCausalLM", LLAMA, {
        "llama.1.3.2.off": {"qkv_concat": "off"}, "llama.1.3.2.contiguous": {"qkv_concat": "contiguous"},
        "llama.2.1.0.off": {"qkv_concat": "off"}, "llama.2.1.0.grouped": {"qkv_concat": "grouped"}}),
    Case("llama_meta", "llama_meta.hf", dumps={"llama.1.3.2.off": {}, "llama.2.1.0.off": {}}),
    Case("llama", "internlm.hf", dumps={"internlm.1.3.2": {"qkv_concat": "off"}}),
    Case("baichuan2", "baichuan2.hf", dumps={
        "baichuan2.1.3.2.7b": {"qkv_concat": "off"}, "baichuan2.1.3.2.13b": {"qkv_concat": "off"},
        "baichuan2.1.3.2.7b_concat": {"qkv_concat": "contiguous"}}),
    Case("internlm2", "internlm2.hf", dumps={
        "internlm2.1.3.2.on": {"qkv_concat": "on"}, "internlm2.1.3.2.off": {"qkv_concat": "off"}}),
    Case("qwen", "qwen.hf", dumps={"qwen.1.3.2": {}}),
    Case("glm", "glm.hf", dumps={"glm.1.3.2": {}}),
    Case("glm2", "glm2.hf", dumps={
        "glm2.1.0.2": {"embedding": "table"}, "glm2.1.3.2": {}, "glm2.2.1.0.concat": {},
        "glm2.2.1.0.split": {"qkv": "split", "mlp": "split"}}),
    Case("glm4", "GlmForCausalLM", GLM, {
        "glm2.2.1.0.concat": {}, "glm2.2.1.0.split": {"qkv": "split", "mlp": "split"}}),
    Case("telechat", "telechat_7b.hf", dumps={"telechat.1.4.0-beta1.7b": {}},
         fixed={"hf_prefix": "", "head": "tied"}),
    Case("telechat", "telechat_12b.hf", dumps={"telechat.1.4.0-beta1.12b": {}}),
    Case("telechat", "telechat2.hf", dumps={
        "telechat.1.5.0.telechat2": {}, "telechat.1.5.0.telechat2_concat": {"qkv_concat": "contiguous"}}),
    Case("telechat_52b", "telechat_52b.hf", dumps={"telechat_52b.1.4.0-beta1": {"mp": "4"}}),
    Case("telechat2_mcore", "telechat2_wide.hf", dumps={"telechat2_mcore.2.1.0.predict": {}}),
    Case("qwen2_mcore", "Qwen2ForCausalLM", CORE, {"qwen2_mcore.2.1.0.predict": {}}),
    Case("qwen3_mcore", "Qwen3ForCausalLM", WIDE, {
        "qwen3_mcore.2.1.0.graph": TRAIN, "qwen3_mcore.2.1.0.graph_tied": TRAIN | {"head": "tied"},
        "qwen3_mcore.2.1.0.pynative": TRAIN, "qwen3_mcore.2.1.0.predict": PREDICT}),
    Case("glm4_mcore", "Glm4ForCausalLM", WIDE | {"attention_bias": True}, {"glm4_mcore.2.1.0.predict": {}}),
    Case("telechat3_mcore", "telechat3.hf", dumps={
        "telechat3_mcore.2.1.0.graph": TRAIN, "telechat3_mcore.2.1.0.predict": PREDICT}),
]  # fmt: skip
