"""Build small networks of MindOne with native convolutions, and others that need more on the CPU; write their names.

``python make_mindone_more_names.py [FAMILY ...]`` writes ``networks/FAMILY_mindone.0.5.0.json`` as
make_mindone_names.py does, with the same releases. The tests read what this wrote and run none of it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

from make_mindone_names import CLASSIFIERS, OUT, SMALL, Case, classes, network, stand_in

SPEECH = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
          "intermediate_size": 14, "conv_dim": [16, 18, 20], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 7],
          "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 3, "num_feat_extract_layers": 3,
          "classifier_proj_size": 9, "num_labels": 5,
          "tdnn_dim": [21, 22], "tdnn_kernel": [5, 3], "tdnn_dilation": [1, 2], "xvector_output_dim": 23}  # fmt: skip
STABLE = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
SQUEEZED = SPEECH | {"squeeze_factor": 2}
DEPTHWISE = {"conv_depthwise_kernel_size": 11}
CLAP_TEXT = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 1,
             "intermediate_size": 14, "max_position_embeddings": 17, "type_vocab_size": 3}  # fmt: skip
CLAP_AUDIO = {"hidden_size": 128, "depths": [2, 3, 4, 5], "num_attention_heads": [2, 2, 4, 4], "spec_size": 256,
              "patch_embeds_hidden_size": 16, "num_mel_bins": 64, "window_size": 8, "num_classes": 5}  # fmt: skip
CLAP = {"text_config": CLAP_TEXT, "audio_config": CLAP_AUDIO, "projection_dim": 9}
CANINE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 14,
          "max_position_embeddings": 17, "type_vocab_size": 3, "num_hash_functions": 8, "num_hash_buckets": 19,
          "downsampling_rate": 5, "upsampling_kernel_size": 3, "num_labels": 5}  # fmt: skip
CONVBERT = SMALL | {"type_vocab_size": 3, "embedding_size": 10, "conv_kernel_size": 9,
                    "num_attention_heads": 4, "head_ratio": 2, "pad_token_id": 0, "bos_token_id": 0,
                    "eos_token_id": 1}  # fmt: skip
QWEN2_AUDIO = {"num_mel_bins": 6, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 14,
               "d_model": 12, "max_source_positions": 10}  # fmt: skip
BIT = {"embedding_size": 40, "hidden_sizes": [32, 64, 96, 128], "depths": [2, 3, 4, 5], "num_groups": 4}
DPT = {"hidden_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 14, "image_size": 32,
       "patch_size": 8, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [5, 6, 7, 8],
       "fusion_hidden_size": 10}  # fmt: skip
VITS = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "window_size": 4,
        "ffn_dim": 14, "ffn_kernel_size": 3, "flow_size": 8, "spectrogram_bins": 10, "prior_encoder_num_flows": 5,
        "prior_encoder_num_wavenet_layers": 2, "posterior_encoder_num_wavenet_layers": 3, "wavenet_kernel_size": 5,
        "duration_predictor_flow_bins": 6, "duration_predictor_num_flows": 3, "depth_separable_num_layers": 7,
        "duration_predictor_kernel_size": 3, "upsample_initial_channel": 32, "upsample_rates": [4, 4, 2],
        "upsample_kernel_sizes": [8, 8, 4], "resblock_kernel_sizes": [3, 7],
        "resblock_dilation_sizes": [[1, 3, 5, 7], [1, 3, 5, 7]]}  # fmt: skip
MAMBA = {"vocab_size": 31, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 14, "mamba_n_heads": 4, "mamba_d_head": 6, "mamba_n_groups": 1,
         "mamba_d_state": 9, "mamba_d_conv": 3, "mamba_expand": 2, "tie_word_embeddings": False}  # fmt: skip
FALCON = MAMBA | {"head_dim": 6, "mamba_d_ssm": 24}
GRANITE = MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16, "num_local_experts": 5,
                   "num_experts_per_tok": 2}  # fmt: skip
FASTSPEECH2 = {"hidden_size": 12, "vocab_size": 31, "num_mel_bins": 6, "encoder_num_attention_heads": 2,
               "encoder_layers": 2, "encoder_linear_units": 14, "decoder_layers": 3, "decoder_num_attention_heads": 2,
               "decoder_linear_units": 15, "speech_decoder_postnet_layers": 4, "speech_decoder_postnet_units": 18,
               "duration_predictor_layers": 2, "duration_predictor_channels": 20, "energy_predictor_layers": 6,
               "energy_predictor_channels": 21, "pitch_predictor_layers": 5, "pitch_predictor_channels": 22,
               "encoder_kernel_size": 7, "decoder_kernel_size": 11}  # fmt: skip
TASKS = ("ForCTC", "ForSequenceClassification")
SPOKEN = (*TASKS, "ForAudioFrameClassification", "ForXVector")

CASES: tuple[Case, ...] = (
    ("wav2vec2", "Wav2Vec2Config", SPEECH, classes("Wav2Vec2", "Model", *SPOKEN)),
    ("wav2vec2", "Wav2Vec2Config", SPEECH | STABLE, classes("Wav2Vec2", "Model")),
    ("hubert", "HubertConfig", SPEECH, classes("Hubert", "Model", *TASKS)),
    ("wavlm", "WavLMConfig", SPEECH | {"num_buckets": 11}, classes("WavLM", "Model", *SPOKEN)),
    ("unispeech", "UniSpeechConfig", SPEECH | {"num_ctc_classes": 31}, classes("UniSpeech", "Model", *TASKS)),
    ("unispeech_sat", "UniSpeechSatConfig", SPEECH, classes("UniSpeechSat", "Model", *SPOKEN)),
    ("sew", "SEWConfig", SQUEEZED, classes("SEW", "Model", *TASKS)),
    ("sew_d", "SEWDConfig", SQUEEZED | {"max_position_embeddings": 17}, classes("SEWD", "Model", *TASKS)),
    ("wav2vec2_conformer", "Wav2Vec2ConformerConfig", SPEECH | DEPTHWISE,
     classes("Wav2Vec2Conformer", "Model", *SPOKEN)),
    ("wav2vec2_bert", "Wav2Vec2BertConfig",
     SPEECH | DEPTHWISE | {"feature_projection_input_dim": 10, "left_max_position_embeddings": 4,
                           "right_max_position_embeddings": 2}, classes("Wav2Vec2Bert", "Model", *SPOKEN)),
    ("canine", "CanineConfig", CANINE, classes("Canine", "Model", *CLASSIFIERS)),
    ("convbert", "ConvBertConfig", CONVBERT, classes("ConvBert", "Model", "ForMaskedLM", *CLASSIFIERS)),
    ("qwen2_audio", "Qwen2AudioEncoderConfig", QWEN2_AUDIO, ("Qwen2AudioEncoder",)),
    ("clap", "ClapConfig", CLAP, ("ClapModel",)),
    ("clap", "ClapTextConfig", CLAP_TEXT | {"projection_dim": 9}, ("ClapTextModelWithProjection",)),
    ("clap", "ClapAudioConfig", CLAP_AUDIO | {"projection_dim": 9}, ("ClapAudioModelWithProjection",)),
    ("bit", "BitConfig", BIT, ("BitModel",)),
    ("dpt", "DPTConfig", DPT, classes("DPT", "Model", "ForDepthEstimation")),
    ("vits", "VitsConfig", VITS, ("VitsModel",)),
    ("falcon_h1", "FalconH1Config", FALCON, classes("FalconH1", "Model", "ForCausalLM")),
    ("granitemoehybrid", "GraniteMoeHybridConfig", GRANITE, classes("GraniteMoeHybrid", "Model", "ForCausalLM")),
    ("fastspeech2_conformer", "FastSpeech2ConformerConfig", FASTSPEECH2, ("FastSpeech2ConformerModel",)),
)  # fmt: skip
COMPUTED = "computed from weight_g and weight_v before each use"


def stand_in_more() -> None:
    """Give the CPU the norms of weights, and values at the start; of these only the shapes matter here."""
    import mindone.utils.weight_norm as norms
    import numpy as np
    from mindone.transformers.modeling_utils import MSPreTrainedModel
    from mindspore import Tensor, mint, ops
    from mindspore.ops.auto_generate import gen_ops_prim

    def norm(v: Tensor, _: int, dim: int) -> Tensor:
        return Tensor(np.ones([n if k == _axis(v, dim) else 1 for k, n in enumerate(v.shape)], np.float32))

    def _axis(v: Tensor, dim: int) -> int:
        """Return the axis that is kept: MindOne turns the first axis and the last where ``dim`` is between them."""
        return dim if dim in (0, v.ndim - 1) else v.ndim - 1

    def filled(*shape: object, **_: object) -> Tensor:
        sizes = [n for size in shape for n in (size if isinstance(size, tuple | list) else [size])]
        return Tensor(np.zeros(sizes, np.float32))

    MSPreTrainedModel.post_init = lambda self: self.tie_weights()
    norms.norm_except_dim = norm
    norms._weight_norm = lambda v, g, dim: Tensor(np.zeros(v.shape, np.float32))
    for module in (ops, mint):
        for name in ("rand", "randn"):
            setattr(module, name, filled)
    mint.outer = lambda first, second: Tensor(np.outer(first.asnumpy(), second.asnumpy()))
    log = mint.log
    mint.log = lambda values: log(values.float())
    mint.stack = lambda tensors, dim=0: Tensor(np.stack([t.asnumpy() for t in tensors], dim))
    for name in ("UniformExt", "InplaceNormal", "InplaceUniform"):
        getattr(gen_ops_prim, name).__call__ = lambda self, tensor, *_, **__: tensor
    for name in ("normal_", "uniform_", "zero_", "fill_", "random_"):
        setattr(Tensor, name, lambda self, *_, **__: self)


def entries(case: Case) -> list[Mapping[str, object]]:
    """Build a case's networks."""
    family, config, fields, names = case
    made = []
    for cls in names:
        found = network(config, fields, cls, family)
        own = {name: COMPUTED for name in found if name.endswith(".weight_norm_cell.weight")}
        print(f"{family} {cls}: {len(found)} parameters")
        made.append(
            {"network": cls, "hf": cls, "config": config, "fields": fields, "own": own, "parameters": found}
        )  # fmt: skip
    return made


def main(families: list[str]) -> None:
    """Write a file for each family; print what was written."""
    for family in dict.fromkeys(case[0] for case in CASES):
        if families and family not in families:
            continue
        rows = ",\n".join(json.dumps(entry) for case in CASES if case[0] == family for entry in entries(case))
        text = f'{{"release": "MindOne 0.5.0", "mindspore": "2.10.0", "networks": [\n{rows}\n]}}\n'
        (OUT / f"{family}_mindone.0.5.0.json").write_text(text)


if __name__ == "__main__":
    stand_in()
    stand_in_more()
    main(sys.argv[1:])
