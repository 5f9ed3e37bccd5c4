"""Build small encoders of MindFormers, or models of MindNLP 0.1.1, and write their parameters' names and shapes.

``python make_encoder_names.py mindformers|mindnlp`` writes ``networks/FAMILY.RELEASE.json`` for the release that
``import mindformers`` or ``import mindnlp`` finds: mindformers 1.3.2 and mindnlp 0.1.1, which hold these models.
Run with mindspore 2.10.0 on the CPU; the names that MindFormers imports and MindSpore no longer has are stood in for.
The tests read what this wrote and run none of it.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "networks"
MODELS = "mindformers.models"
T5 = {"vocab_size": 31, "d_model": 12, "d_kv": 6, "d_ff": 15, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2}
OWN_T5 = {"vocab_size": 31, "hidden_size": 12, "d_kv": 6, "d_ff": 15, "num_layers": 2, "num_decoder_layers": 3,
          "num_heads": 2, "seq_length": 16, "max_decode_length": 16, "batch_size": 1}  # fmt: skip
BUCKETS = {"relative_attention_num_buckets": 32}
VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
       "intermediate_size": 24}  # fmt: skip
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 3, "decoder_num_attention_heads": 2,
           "decoder_intermediate_size": 32}  # fmt: skip
SWIN = {"image_size": 64, "patch_size": 2, "embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8],
        "window_size": 4, "num_labels": 5}  # fmt: skip
TEXT = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 7}  # fmt: skip
VISION = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2,
          "image_size": 32, "patch_size": 8}  # fmt: skip
WHISPER = {"vocab_size": 31, "num_mel_bins": 6, "encoder_layers": 2, "encoder_attention_heads": 2, "decoder_layers": 3,
           "decoder_attention_heads": 2, "decoder_ffn_dim": 14, "encoder_ffn_dim": 20, "d_model": 12,
           "max_source_positions": 10, "max_target_positions": 17}  # fmt: skip
TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}
QFORMER = {"num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 31, "hidden_size": 16,
           "max_position_embeddings": 17, "intermediate_size": 20}  # fmt: skip
LLAMA = {"model_type": "llama", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 28, "vocab_size": 40}  # fmt: skip
OWN_LLAMA = {"hidden_size": 24, "num_layers": 2, "num_heads": 4, "n_kv_heads": 2, "intermediate_size": 28,
             "vocab_size": 40, "seq_length": 64}  # fmt: skip
BERT = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 14,
        "max_position_embeddings": 17, "type_vocab_size": 3}  # fmt: skip
GPT2 = {"n_embd": 12, "n_layer": 2, "n_head": 2, "vocab_size": 31, "n_positions": 17, "n_inner": 14, "num_labels": 5,
        "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
OWN_GPT2 = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 31, "n_inner": 14,
            "max_position_embeddings": 17, "num_labels": 5}  # fmt: skip
Entry = dict[str, object]


def entry(
    net: object, hf: str, config: str, fields: Mapping[str, object], *, source: str = "",
    layout: Mapping[str, str] | None = None, own: Mapping[str, str] | None = None, tree: bool = False,
    apart: Mapping[str, str] | None = None,
) -> Entry:  # fmt: skip
    """Describe a network.

    ``apart``: parameters of either side that have no rule. ``tree``: by its tree's names, not by those that are saved.
    """
    if tree:
        parameters = {name: list(p.shape) for name, p in net.parameters_and_names()}  # type: ignore[attr-defined]
    else:
        parameters = {p.name: list(p.shape) for p in net.get_parameters()}  # type: ignore[attr-defined]
    said: Entry = {"network": type(net).__name__, "hf": hf, "config": config, "fields": dict(fields)}
    said |= {"source": source} if source else {}
    print(f"{type(net).__name__}: {len(parameters)} parameters")
    said |= {"apart": dict(apart)} if apart else {}
    return {**said, "layout": dict(layout or {}), "own": dict(own or {}), "parameters": parameters}


def built(folder: str, module: str, cls: str, config_module: str, config: str, fields: Mapping[str, object]) -> object:
    """Build one network of MindFormers from its classes' places and its configuration."""
    made = getattr(importlib.import_module(f"{MODELS}.{folder}.{config_module}"), config)(**fields)
    return getattr(importlib.import_module(f"{MODELS}.{folder}.{module}"), cls)(made)


def clip() -> object:
    configs = importlib.import_module(f"{MODELS}.clip.clip_config")
    text, vision = configs.CLIPTextConfig(**TEXT), configs.CLIPVisionConfig(**VISION)
    model = importlib.import_module(f"{MODELS}.clip.clip")
    return model.CLIPModel(configs.CLIPConfig(text, vision, projection_dim=10))


def blip2_config() -> Any:
    vit = importlib.import_module(f"{MODELS}.vit.vit_config").ViTConfig(**VIT)
    qformer = importlib.import_module(f"{MODELS}.blip2.qformer_config").QFormerConfig(
        **QFORMER, query_length=5, encoder_width=12, head_embed_dim=6, bos_token_id=0, sep_token_id=1,
        resize_token_embeddings=False,
    )  # fmt: skip
    return importlib.import_module(f"{MODELS}.blip2.blip2_config").Blip2Config(
        vision_config=vit, qformer_config=qformer
    )


def blip2() -> object:
    return importlib.import_module(f"{MODELS}.blip2.blip2_qformer").Blip2Qformer(blip2_config())


def blip2_second(cls: str) -> object:
    """Build the second stage: the vision model and the Q-Former in front of a Llama."""
    first = blip2_config()
    llama = importlib.import_module(f"{MODELS}.llama.llama_config").LlamaConfig(**OWN_LLAMA)
    llama.model_type, llama.type = "llama", "LlamaForBlip2"
    config = importlib.import_module(f"{MODELS}.blip2.blip2_config").Blip2Config(
        vision_config=first.vision_config, qformer_config=first.qformer_config, text_config=llama
    )
    return getattr(importlib.import_module(f"{MODELS}.blip2.blip2_llm"), cls)(config)


def mindformers() -> dict[str, list[Entry]]:
    t5 = built("t5", "t5", "T5ForConditionalGeneration", "t5_config", "T5Config", OWN_T5)
    mt5 = built("t5", "mt5", "MT5ForConditionalGeneration", "t5_config", "T5Config", OWN_T5)
    vit = built("vit", "vit", "ViTForImageClassification", "vit_config", "ViTConfig", VIT | {"num_classes": 5})
    mae = built("mae", "mae", "ViTMAEForPreTraining", "mae_config", "ViTMAEConfig", VIT | DECODER)
    swin = built("swin", "swin", "SwinForImageClassification", "swin_config", "SwinConfig", SWIN)
    whisper = built("whisper", "modeling_whisper", "WhisperForConditionalGeneration", "configuration_whisper",
                    "WhisperConfig", WHISPER)  # fmt: skip
    captions = ("bias", "transform.dense.weight", "transform.dense.bias", "transform.layernorm.gamma",
                "transform.layernorm.beta", "decoder.weight")  # fmt: skip
    unused = {"visual_encoder.fc_norm.gamma": "unused", "visual_encoder.fc_norm.beta": "unused",
              "temp": "only training uses it", "qformer.bert.embeddings.position_ids": "a constant"}  # fmt: skip
    unused |= {f"qformer.cls.predictions.{name}": "only training uses it" for name in captions}
    cross = {f"{p}.tfm_decoder.blocks.0.cross_attention.cross_bias": "zeros" for p in ("t5_model", "mt5_model")}
    windows = {name: "a constant" for name in (p.name for p in swin.get_parameters())  # type: ignore[attr-defined]
               if name.endswith(("relative_position_index", "attn_mask"))}  # fmt: skip
    clips = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 10}
    texts = QFORMER | {"vocab_size": 32, "encoder_hidden_size": 12, "use_qformer_text_input": True}
    blip = {"vision_config": VIT, "qformer_config": texts,
            "num_query_tokens": 5, "image_text_hidden_size": 6}  # fmt: skip
    second = {key: value for key, value in blip.items() if key != "image_text_hidden_size"}
    second |= {"text_config": LLAMA, "qformer_config": {**texts, "use_qformer_text_input": False}}
    fewer = {name: why for name, why in unused.items() if not name.startswith(("temp", "qformer.cls"))}
    labels = {"num_labels": 5}
    norms = {f"vit.{name}": "norms something else" for name in
             ("layernorm.weight", "layernorm.bias", "fc_norm.gamma", "fc_norm.beta")}  # fmt: skip
    plain, gated = {"feed_forward_proj": "relu"}, {"feed_forward_proj": "gated-gelu"}
    untied = {"tie_word_embeddings": False}

    small = BERT | {"num_labels": 5}
    own_bert = small | {"embedding_size": 12, "seq_length": 17, "batch_size": 1}
    pooler = dict.fromkeys(("bert.dense.weight", "bert.dense.bias"), "the pooler, which the class is without")
    gpt2 = {"vocab_size": 31, "n_embd": 12, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 0,
            "eos_token_id": 0}  # fmt: skip
    own_gpt2 = {"vocab_size": 31, "hidden_size": 12, "num_layers": 2, "num_heads": 2, "seq_length": 16}

    def bert(task: str, **said: Mapping[str, str]) -> Entry:
        net = built("bert", "bert", f"BertFor{task}", "bert_config", "BertConfig",
                    own_bert | ({"num_labels": 1} if task == "MultipleChoice" else {}))  # fmt: skip
        fields = BERT if task == "QuestionAnswering" else small
        return entry(net, f"BertFor{task}", "BertConfig", fields, **said)

    def crossed(prefix: str) -> dict[str, str]:
        return {name: why for name, why in cross.items() if name.startswith(prefix)}

    return {
        "bert": [
            bert("PreTraining", layout={"mlm_head": "cell"}), bert("TokenClassification", own=pooler),
            bert("MultipleChoice"), bert("QuestionAnswering", own=pooler),
        ],
        "gpt2": [
            entry(built("gpt2", "gpt2", "GPT2LMHeadModel", "gpt2_config", "GPT2Config", own_gpt2), "GPT2LMHeadModel",
                  "GPT2Config", gpt2),
            entry(built("gpt2", "gpt2", "GPT2ForSequenceClassification", "gpt2_config", "GPT2Config",
                        own_gpt2 | labels), "GPT2ForSequenceClassification", "GPT2Config", gpt2 | labels),
        ],
        "t5": [entry(t5, "T5ForConditionalGeneration", "T5Config", T5 | BUCKETS | plain, own=crossed("t5"))],
        "mt5": [
            entry(mt5, "MT5ForConditionalGeneration", "MT5Config", T5 | BUCKETS | gated | untied, own=crossed("mt5")),
            entry(mt5, "MT5ForConditionalGeneration", "MT5Config", T5 | BUCKETS | gated, own=crossed("mt5")),
        ],
        "vit": [entry(vit, "ViTForImageClassification", "ViTConfig", VIT | labels, apart=norms)],
        "vit_timm": [entry(vit, "ViTForImageClassification", "ViTConfig", VIT | labels, source="vit_timm.avg")],
        "mae": [entry(mae, "ViTMAEForPreTraining", "ViTMAEConfig", VIT | DECODER)],
        "mae_facebook": [entry(mae, "ViTMAEForPreTraining", "ViTMAEConfig", VIT | DECODER, source="mae_facebook")],
        "swin": [entry(swin, "SwinForImageClassification", "SwinConfig", SWIN, own=windows)],
        "swin_microsoft": [
            entry(swin, "SwinForImageClassification", "SwinConfig", SWIN, source="swin_microsoft", own=windows)
        ],
        "clip": [entry(clip(), "CLIPModel", "CLIPConfig", clips)],
        "clip_openai": [entry(clip(), "CLIPModel", "CLIPConfig", clips, source="clip_openai")],
        "whisper": [entry(whisper, "WhisperForConditionalGeneration", "WhisperConfig", WHISPER | TOKENS)],
        "blip2": [entry(blip2(), "Blip2ForImageTextRetrieval", "Blip2Config", blip, own=unused)],
        "blip2_llm": [
            entry(blip2_second(cls), "Blip2ForConditionalGeneration", "Blip2Config", second, own=fewer)
            for cls in ("Blip2Llm", "Blip2ImageToTextGeneration")
        ],
    }  # fmt: skip


def mindnlp() -> dict[str, list[Entry]]:
    bert = importlib.import_module("mindnlp.models.bert")
    t5 = importlib.import_module("mindnlp.models.t5")
    gpt2 = importlib.import_module("mindnlp.models.gpt2.gpt2")
    gpt2_config = importlib.import_module("mindnlp.models.gpt2.config_gpt2").GPT2Config
    plain, gated = {"feed_forward_proj": "relu"}, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    few = {"relative_attention_num_buckets": 8}

    def t5_entry(cls: str, kind: Mapping[str, object], layout: Mapping[str, str], tree: bool = False) -> Entry:
        net = getattr(t5, cls)(t5.T5Config(**{**T5, **few, "feed_forward_proj": kind["feed_forward_proj"]}))
        return entry(net, cls, "T5Config", {**T5, **few, **kind}, layout=layout, tree=tree)

    def gpt2_entry(cls: str, head: str) -> Entry:
        net = getattr(gpt2, cls)(gpt2_config(**OWN_GPT2))
        prefix = "" if cls == "GPT2Model" else "transformer."
        masks = {f"{prefix}h.{i}.attn.{name}": "a mask" for i in range(2) for name in ("bias", "masked_bias")}
        return entry(net, cls, "GPT2Config", GPT2, layout={"head": head}, own=masks)

    return {
        "bert_mindnlp": [
            entry(bert.BertModel(bert.BertConfig(**BERT)), "BertModel", "BertConfig", BERT),
            entry(bert.BertForPretraining(bert.BertConfig(**BERT)), "BertForPreTraining", "BertConfig", BERT),
        ],
        "t5_mindnlp": [
            t5_entry("T5ForConditionalGeneration", gated, {"embedding": "decoder"}),
            t5_entry("T5ForConditionalGeneration", gated, {"embedding": "shared"}, tree=True),
            t5_entry("T5ForConditionalGeneration", plain, {"embedding": "decoder"}),
            t5_entry("T5Model", plain, {"embedding": "decoder", "head": "none"}),
            t5_entry("T5EncoderModel", plain, {"embedding": "encoder", "head": "none"}),
        ],
        "gpt2_mindnlp": [
            gpt2_entry("GPT2Model", "none"), gpt2_entry("GPT2LMHeadModel", "own"),
            gpt2_entry("GPT2DoubleHeadsModel", "own"), gpt2_entry("GPT2ForSequenceClassification", "none"),
            gpt2_entry("GPT2ForTokenClassification", "none"),
        ],
    }  # fmt: skip


def main(project: str) -> None:
    """Write a file for each family."""
    if project == "mindformers":
        importlib.import_module("make_mindformers_names").stand_in()
    release, found = ("1.3.2", mindformers()) if project == "mindformers" else ("0.1.1", mindnlp())
    for family, networks in found.items():
        rows = ",\n".join(json.dumps(item) for item in networks)
        name = "MindFormers" if project == "mindformers" else "MindNLP"
        text = f'{{"release": "{name} {release}", "mindspore": "2.10.0", "networks": [\n{rows}\n]}}\n'
        (OUT / f"{family}.{release}.json").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1])
