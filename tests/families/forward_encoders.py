"""Compare what transformers and other projects compute from one set of weights, converted by a table.

``python forward_encoders.py prepare DIR`` (torch, transformers, lorabridge) writes small random models, the converted
weights and torch's outputs; ``run DIR PROJECT`` loads the weights into the network of mindformers
(1.3.2), mindnlp (0.1.1), modelzoo-bert or modelzoo-albert (with its folder of mindspore-ai/models on the path) with
mindspore 2.10.0 on the CPU, and prints what was not loaded and how far the outputs are apart.
docs/families-other.md says what was printed.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

IDS = [[3, 17, 25, 8, 30, 1, 29, 13, 5, 9, 20, 21, 2, 11, 28, 7]]
TARGET = [[0, 4, 9, 1, 22, 6, 5, 30, 12, 3, 18, 27, 14, 2, 10, 8]]
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
T5 = {"vocab_size": 31, "d_model": 12, "d_kv": 6, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2,
      "dropout_rate": 0.0}  # fmt: skip
OWN_T5 = {"vocab_size": 31, "hidden_size": 12, "d_kv": 6, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 3,
          "num_heads": 2, "seq_length": 16, "max_decode_length": 16, "batch_size": 1, "compute_dtype": "float32",
          "dropout_rate": 0.0}  # fmt: skip
BERT = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
        "max_position_embeddings": 17, "type_vocab_size": 3, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0}  # fmt: skip
TANH = {"hidden_act": "gelu_new", "layer_norm_eps": 1e-7}
ALBERT = BERT | {"embedding_size": 12, "num_hidden_groups": 1, "inner_group_num": 1, "classifier_dropout_prob": 0.0}
VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
       "intermediate_size": 24}  # fmt: skip
SWIN = {"image_size": 64, "patch_size": 2, "embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8],
        "window_size": 4, "num_labels": 5}  # fmt: skip
TEXT = {"vocab_size": 31, "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16}  # fmt: skip
VISION = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 32, "patch_size": 8}  # fmt: skip
WHISPER = {"vocab_size": 31, "num_mel_bins": 6, "encoder_layers": 2, "encoder_attention_heads": 2, "decoder_layers": 3,
           "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "encoder_ffn_dim": 20, "d_model": 12,
           "max_source_positions": 10, "max_target_positions": 16}  # fmt: skip
GPT2 = {"n_embd": 12, "n_layer": 2, "n_head": 2, "vocab_size": 31, "n_positions": 17, "n_inner": 16,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
Net = Callable[..., object]


@dataclass(frozen=True)
class Case:
    """``hf``: class and configuration of transformers; ``inputs``: names of :func:`feeds`; ``get``: which output.

    ``run``: load the converted weights into the project's network and give its output for the inputs.
    """

    project: str
    family: str
    hf: tuple[str, str]
    fields: Mapping[str, object]
    inputs: tuple[str, ...]
    get: str
    run: Callable[[Callable[[object], object], Mapping[str, np.ndarray]], object]
    layout: Mapping[str, str] = field(default_factory=dict)
    drop: tuple[str, ...] = ()


def feeds() -> dict[str, np.ndarray]:
    """Return every input that a case may take."""
    rng = np.random.default_rng(0)
    ones = np.ones((1, 16), np.int64)
    return {
        "input_ids": np.array(IDS), "decoder_input_ids": np.array(TARGET), "attention_mask": ones,
        "pixel_values": rng.normal(size=(1, 3, 32, 32)).astype(np.float32),
        "wide_pixels": rng.normal(size=(1, 3, 64, 64)).astype(np.float32),
        "input_features": rng.normal(size=(1, 6, 20)).astype(np.float32),
        "token_type_ids": ones - 1,
    }  # fmt: skip


def tensor(values: np.ndarray, dtype: str = "int32") -> object:
    import mindspore

    return mindspore.Tensor(values, getattr(mindspore, dtype))


def mindformers(folder: str, module: str, cls: str, config_module: str, config: str, **fields: object) -> object:
    models = "mindformers.models"
    made = getattr(importlib.import_module(f"{models}.{folder}.{config_module}"), config)(**fields)
    return getattr(importlib.import_module(f"{models}.{folder}.{module}"), cls)(made)


def own_t5(module: str, cls: str, body: str, **fields: object) -> Callable[..., object]:
    def run(load: Net, x: Mapping[str, np.ndarray]) -> object:
        net = load(mindformers("t5", module, cls, "t5_config", "T5Config", **OWN_T5, **fields))
        mask = tensor(x["attention_mask"], "float32")
        return getattr(net, body)(tensor(x["input_ids"]), mask, tensor(x["decoder_input_ids"]), mask)

    return run


def own_vit(load: Net, x: Mapping[str, np.ndarray]) -> object:
    """Return what leaves the blocks: MindFormers' ViT norms the mean, or nothing at all."""
    net = load(mindformers("vit", "vit", "ViTForImageClassification", "vit_config", "ViTConfig", **VIT, num_classes=5,
                           drop_path_rate=0.0))  # fmt: skip
    return net.vit.construct_without_pool(tensor(x["pixel_values"], "float32"))  # type: ignore[attr-defined]


def own_swin(load: Net, x: Mapping[str, np.ndarray]) -> object:
    net = load(mindformers("swin", "swin", "SwinForImageClassification", "swin_config", "SwinConfig", **SWIN,
                           drop_path_rate=0.0))  # fmt: skip
    return net(tensor(x["wide_pixels"], "float32"))[0]  # type: ignore[operator]


def own_clip(load: Net, x: Mapping[str, np.ndarray]) -> object:
    configs = importlib.import_module("mindformers.models.clip.clip_config")
    text, vision = configs.CLIPTextConfig(**TEXT), configs.CLIPVisionConfig(**VISION)
    model = importlib.import_module("mindformers.models.clip.clip")
    net = load(model.CLIPModel(configs.CLIPConfig(text, vision, projection_dim=10, dtype="float32")))
    image = tensor(x["pixel_values"], "float32")
    return net.get_text_features(tensor(x["input_ids"])), net.get_image_features(image)  # type: ignore[attr-defined]


def own_whisper(load: Net, x: Mapping[str, np.ndarray]) -> object:
    exact = {"compute_dtype": "float32", "param_init_type": "float32", "embedding_init_type": "float32"}
    net = load(mindformers("whisper", "modeling_whisper", "WhisperForConditionalGeneration", "configuration_whisper",
                           "WhisperConfig", **WHISPER, **exact))  # fmt: skip
    return net(tensor(x["input_features"], "float32"), tensor(x["decoder_input_ids"]))[0]  # type: ignore[operator]


def zoo_bert(load: Net, x: Mapping[str, np.ndarray]) -> object:
    import mindspore

    model = importlib.import_module("src.bert_model")
    net = load(model.BertModel(model.BertConfig(seq_length=16, compute_type=mindspore.float32, **BERT), False))
    inputs = (tensor(x[name]) for name in ("input_ids", "token_type_ids", "attention_mask"))
    return net(*inputs)[0]  # type: ignore[operator]


def zoo_albert(load: Net, x: Mapping[str, np.ndarray]) -> object:
    import mindspore

    model = importlib.import_module("src.albert_model")
    model.P.GatherV2 = lambda: mindspore.ops.gather  # as MindSpore 2.10 calls it
    item = mindspore.nn.CellList.__getitem__
    mindspore.nn.CellList.__getitem__ = lambda cells, index: item(cells, int(index))  # its index is a float
    kept = {name: value for name, value in ALBERT.items() if name != "classifier_dropout_prob"}
    net = load(model.AlbertModel(model.AlbertConfig(seq_length=16, compute_type=mindspore.float32, **kept), False))
    inputs = (tensor(x[name]) for name in ("input_ids", "token_type_ids", "attention_mask"))
    return net(*inputs)[0]  # type: ignore[operator]


def nlp_bert(load: Net, x: Mapping[str, np.ndarray]) -> object:
    bert = importlib.import_module("mindnlp.models.bert")
    net = load(bert.BertModel(bert.BertConfig(**BERT)))
    return net(tensor(x["input_ids"]), tensor(x["attention_mask"]))[0]  # type: ignore[operator]


def nlp_t5(load: Net, x: Mapping[str, np.ndarray]) -> object:
    t5 = importlib.import_module("mindnlp.models.t5")
    net = load(t5.T5Model(t5.T5Config(**T5, relative_attention_num_buckets=32, feed_forward_proj="gated-gelu")))
    given = {name: tensor(x[name]) for name in ("input_ids", "decoder_input_ids")}
    return net(**given)[0]  # type: ignore[operator]


def nlp_gpt2(load: Net, x: Mapping[str, np.ndarray]) -> object:
    gpt2 = importlib.import_module("mindnlp.models.gpt2.gpt2")
    fields = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 31, "n_inner": 16,
              "max_position_embeddings": 17, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
    config = importlib.import_module("mindnlp.models.gpt2.config_gpt2").GPT2Config(**fields)
    return load(gpt2.GPT2Model(config))(tensor(x["input_ids"]))[0]  # type: ignore[operator]


SEQ = ("input_ids", "attention_mask", "decoder_input_ids")
PLAIN, GATED = {"feed_forward_proj": "relu"}, {"feed_forward_proj": "gated-gelu"}
BASE = {"ms_prefix": "", "hf_prefix": ""}
CASES = {
    "t5": Case("mindformers", "t5", ("T5ForConditionalGeneration", "T5Config"), T5 | PLAIN, SEQ, "logits",
               own_t5("t5", "T5ForConditionalGeneration", "t5_model")),
    "mt5": Case("mindformers", "mt5", ("MT5ForConditionalGeneration", "MT5Config"), T5 | GATED, SEQ, "logits",
                own_t5("mt5", "MT5ForConditionalGeneration", "mt5_model", scale_output=False, hidden_act="gelu")),
    "vit": Case("mindformers", "vit", ("ViTForImageClassification", "ViTConfig"), VIT | {"num_labels": 5},
                ("pixel_values",), "hidden_states", own_vit, drop=("vit.layernorm.*",)),
    "swin": Case("mindformers", "swin", ("SwinForImageClassification", "SwinConfig"), SWIN, ("wide_pixels",), "logits",
                 own_swin),
    "clip": Case("mindformers", "clip", ("CLIPModel", "CLIPConfig"),
                 {"text_config": TEXT | {"eos_token_id": 30, "bos_token_id": 0}, "vision_config": VISION,
                  "projection_dim": 10}, ("input_ids", "pixel_values"), "features", own_clip),
    "whisper": Case("mindformers", "whisper", ("WhisperForConditionalGeneration", "WhisperConfig"),
                    WHISPER | TOKENS | {"decoder_start_token_id": 2}, ("input_features", "decoder_input_ids"), "logits",
                    own_whisper),
    "bert_modelzoo": Case("modelzoo-bert", "bert_modelzoo", ("BertModel", "BertConfig"), BERT | TANH,
                          ("input_ids", "attention_mask", "token_type_ids"), "last_hidden_state", zoo_bert, BASE),
    "albert_modelzoo": Case("modelzoo-albert", "albert_modelzoo", ("AlbertModel", "AlbertConfig"),
                            ALBERT | TANH, ("input_ids", "attention_mask", "token_type_ids"),
                            "last_hidden_state", zoo_albert, BASE),
    "bert_mindnlp": Case("mindnlp", "bert_mindnlp", ("BertModel", "BertConfig"), BERT, ("input_ids", "attention_mask"),
                         "last_hidden_state", nlp_bert),
    "t5_mindnlp": Case("mindnlp", "t5_mindnlp", ("T5Model", "T5Config"), T5 | GATED, ("input_ids", "decoder_input_ids"),
                       "last_hidden_state", nlp_t5, {"head": "none"}),
    "gpt2_mindnlp": Case("mindnlp", "gpt2_mindnlp", ("GPT2Model", "GPT2Config"), GPT2 | TOKENS, ("input_ids",),
                         "last_hidden_state", nlp_gpt2),
}  # fmt: skip


def prepare(folder: Path) -> None:
    """Write models, converted weights and torch's outputs."""
    import torch
    import transformers

    from lorabridge import ConvertOptions, convert

    given = feeds()
    for name, case in CASES.items():
        torch.manual_seed(0)
        config = getattr(transformers, case.hf[1])(**case.fields, attn_implementation="eager")
        model = getattr(transformers, case.hf[0])(config).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
        if (
            name == "albert_modelzoo"
        ):  # ModelZoo passes over this layer where it maps a size to itself, and fails elsewhere
            model.encoder.embedding_hidden_mapping_in.weight.data = torch.eye(12)
            model.encoder.embedding_hidden_mapping_in.bias.data *= 0
        model.save_pretrained(folder / name / "hf")
        known = {"wide_pixels": "pixel_values"}
        inputs = {known.get(key, key): torch.tensor(given[key]) for key in case.inputs}
        with torch.no_grad():
            if case.get == "features":
                made = [
                    model.get_text_features(inputs["input_ids"]),
                    model.get_image_features(inputs["pixel_values"]),
                ]
                found = [getattr(value, "pooler_output", value) for value in made]
            elif case.get == "hidden_states":
                found = [model(**inputs, output_hidden_states=True).hidden_states[-1]]
            else:
                found = [getattr(model(**inputs), case.get)]
        np.savez(folder / name / "outputs.npz", *(value.numpy() for value in found))
        layout = {key: choice for key, choice in case.layout.items() if key != "hf_prefix"}
        convert(folder / name / "hf", folder / name / "model.ckpt",
                ConvertOptions(family=case.family, layout=layout, exclude=case.drop))  # fmt: skip


def run(folder: Path, project: str) -> None:
    """Load and run one project's networks; print the largest difference of each case."""
    import mindspore

    mindspore.train.serialization._get_available_memory = lambda: None
    mindspore.nn.Cell.cast = mindspore.ops.Cast()  # which cells had before MindSpore 2.7
    given = feeds()
    for name, case in CASES.items():
        if case.project != project:
            continue
        weights = mindspore.load_checkpoint(str(folder / name / "model.ckpt"))

        def load(net: object, weights: dict[str, object] = weights) -> object:
            net.set_train(False)  # type: ignore[attr-defined]
            lacking, unused = mindspore.load_param_into_net(net, weights)
            print(f"   not loaded: {lacking[:4]} {len(lacking)}, unused: {unused}")
            return net

        found = case.run(load, given)
        found = found if isinstance(found, tuple | list) else (found,)
        wanted = np.load(folder / name / "outputs.npz").values()
        pairs = [(f.asnumpy().reshape(w.shape), w) for f, w in zip(found, wanted, strict=True)]
        apart = max(float(np.abs(f - w).max()) for f, w in pairs)
        size = max(float(np.abs(w).max()) for _, w in pairs)
        print(json.dumps({"case": name, "outputs": float(f"{size:.3g}"), "apart": float(f"{apart:.3g}")}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare(Path(sys.argv[2]))
    else:
        if sys.argv[3] == "mindformers":
            importlib.import_module("make_mindformers_names").stand_in()
        run(Path(sys.argv[2]), sys.argv[3])
