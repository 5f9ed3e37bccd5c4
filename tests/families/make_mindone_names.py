"""Build small networks of MindOne on the CPU and write their parameters' names and shapes beside this file.

``python make_mindone_names.py`` writes ``networks/FAMILY_mindone.0.5.0.json`` for every family below. Run with
mindone 0.5.0, mindspore 2.10.0, transformers 4.57.1 and numpy 1.26.4. The operations that MindSpore 2.10 has for Ascend
only, and that networks need while they are built, are stood in for here. The tests read what this wrote and run none
of it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path

OUT = Path(__file__).parent / "networks"
SMALL = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 14,
         "max_position_embeddings": 17, "num_labels": 5}  # fmt: skip
TYPES = SMALL | {"type_vocab_size": 3}
DECODER = SMALL | {"num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
T5 = {"vocab_size": 31, "d_model": 12, "d_kv": 7, "d_ff": 15, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2,
      "relative_attention_num_buckets": 8, "num_labels": 5}  # fmt: skip
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
TEXT = {"vocab_size": 31, "hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 17, "projection_dim": 9, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 18, "num_hidden_layers": 3, "num_attention_heads": 2,
          "image_size": 32, "patch_size": 8, "projection_dim": 9}  # fmt: skip
WHISPER = {"vocab_size": 31, "num_mel_bins": 6, "encoder_layers": 2, "encoder_attention_heads": 2, "decoder_layers": 3,
           "decoder_attention_heads": 2, "decoder_ffn_dim": 14, "encoder_ffn_dim": 20, "d_model": 12,
           "max_source_positions": 10, "max_target_positions": 17, "decoder_start_token_id": 2,
           "begin_suppress_tokens": None, **TOKENS}  # fmt: skip
ALBERT = TYPES | {"embedding_size": 10, "num_hidden_layers": 3, "num_hidden_groups": 2, "inner_group_num": 2}
REMBERT = TYPES | {"input_embedding_size": 10, "output_embedding_size": 11}
GPT2 = {"n_embd": 12, "n_layer": 2, "n_head": 2, "vocab_size": 31, "n_positions": 17, "n_inner": 14, "num_labels": 5,
        **TOKENS}  # fmt: skip
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")

Case = tuple[str, str, Mapping[str, object], tuple[str, ...]]


def classes(stem: str, *ends: str) -> tuple[str, ...]:
    return tuple(f"{stem}{end}" for end in ends)


# family, configuration of transformers, its fields, classes of MindOne (and of transformers: they have the same names)
CASES: tuple[Case, ...] = (
    ("albert", "AlbertConfig", ALBERT, classes("Albert", "Model", "ForPreTraining", "ForMaskedLM", *CLASSIFIERS)),
    ("gpt2", "GPT2Config", GPT2, classes("GPT2", "Model", "LMHeadModel", "DoubleHeadsModel", *CLASSIFIERS[:3])),
    ("qwen2", "Qwen2Config", DECODER | UNTIED, classes("Qwen2", "Model", "ForCausalLM", *CLASSIFIERS[:2])),
    ("qwen2", "Qwen2Config", DECODER | TIED, classes("Qwen2", "ForCausalLM")),
    ("phi", "PhiConfig", DECODER | TOKENS | {"partial_rotary_factor": 0.67},
     classes("Phi", "Model", "ForCausalLM", *CLASSIFIERS[:2])),
    ("phi3", "Phi3Config", DECODER | TOKENS | UNTIED, classes("Phi3", "Model", "ForCausalLM", *CLASSIFIERS[:2])),
    ("phi3", "Phi3Config", DECODER | TOKENS | TIED, classes("Phi3", "ForCausalLM")),
    ("glm", "GlmConfig", DECODER | TOKENS | UNTIED | {"head_dim": 3, "attention_bias": True},
     classes("Glm", "Model", "ForCausalLM", *CLASSIFIERS[:2])),
    ("granitemoe", "GraniteMoeConfig", DECODER | TOKENS | UNTIED | {"num_local_experts": 5, "num_experts_per_tok": 2},
     classes("GraniteMoe", "Model", "ForCausalLM")),
    ("mt5", "MT5Config", T5 | UNTIED, classes("MT5", "Model", "EncoderModel", "ForConditionalGeneration")),
    ("mt5", "MT5Config", T5 | TIED, classes("MT5", "ForConditionalGeneration")),
    ("umt5", "UMT5Config", T5, classes("UMT5", "Model", "EncoderModel", *CLASSIFIERS[:3])),
    ("rembert", "RemBertConfig", REMBERT, classes("RemBert", "Model", "ForMaskedLM", "ForCausalLM", *CLASSIFIERS)),
    ("whisper", "WhisperConfig", WHISPER, classes("Whisper", "Model", "ForConditionalGeneration")),
    ("deberta", "DebertaConfig", TYPES | RELATIVE | {"max_relative_positions": 9},
     classes("Deberta", "Model", "ForMaskedLM", *CLASSIFIERS[:3])),
    ("deberta_v2", "DebertaV2Config",
     TYPES | RELATIVE | {"position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True,
                         "position_biased_input": False},
     classes("DebertaV2", "Model", "ForMaskedLM", *CLASSIFIERS)),
    ("deberta_v2", "DebertaV2Config", SMALL | RELATIVE | {"type_vocab_size": 0}, ("DebertaV2ForMaskedLM",)),
    ("clip", "CLIPConfig", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 9}, ("CLIPModel",)),
    ("clip", "CLIPTextConfig", TEXT, ("CLIPTextModelWithProjection",)),
    ("clip", "CLIPVisionConfig", VISION, ("CLIPVisionModelWithProjection",)),
)  # fmt: skip


def stand_in() -> None:
    """Give the CPU what building a network needs; none of it decides a name or a shape."""
    import numpy as np
    from mindspore import Tensor, mint

    def number(x: object) -> object:
        return x.asnumpy().item() if isinstance(x, Tensor) else x

    def arange(start: object, end: object = None, step: object = 1, *, dtype: object = None) -> Tensor:
        first, last = (0, start) if end is None else (start, end)
        values = np.arange(number(first), number(last), number(step))
        made = Tensor(values.astype(np.int64 if values.dtype.kind in "iu" else np.float32))
        return made if dtype is None else made.astype(dtype)

    def unchanged(self: Tensor, *_: object, **__: object) -> Tensor:
        return self

    mint.arange = arange
    mint.nn.functional.pad = lambda x, pad, mode="constant", value=0.0: x
    for name in ("normal_", "uniform_", "zero_", "fill_"):
        setattr(Tensor, name, unchanged)


def network(config: str, fields: Mapping[str, object], cls: str, family: str) -> dict[str, list[int]]:
    """Return a network's parameters by the names that MindOne saves."""
    import mindone.transformers
    import transformers

    folder = importlib.import_module(f"mindone.transformers.models.{family}.modeling_{family}")
    kind = getattr(folder, cls, None) or getattr(mindone.transformers, cls)
    net = kind(getattr(transformers, config)(**fields))
    return {name: list(parameter.shape) for name, parameter in net.parameters_and_names()}


def main() -> None:
    """Write a file for each family; print what was written."""
    said: dict[str, list[dict[str, object]]] = {}
    for family, config, fields, names in CASES:
        for cls in names:
            found = network(config, fields, cls, family)
            said.setdefault(family, []).append(
                {"network": cls, "hf": cls, "config": config, "fields": fields, "parameters": found}
            )
            print(f"{family} {cls}: {len(found)} parameters")
    for family, networks in said.items():
        rows = ",\n".join(json.dumps(entry) for entry in networks)
        text = f'{{"release": "MindOne 0.5.0", "mindspore": "2.10.0", "networks": [\n{rows}\n]}}\n'
        (OUT / f"{family}_mindone.0.5.0.json").write_text(text)


if __name__ == "__main__":
    stand_in()
    main()
