"""Which of peft's methods become LoRA, why the others do not, and the LoRA config that stands for theirs.

The methods are those of peft 0.21.2 (``PeftType``). ``peft.convert_to_lora`` factorises the delta of those whose layers
say ``supports_lora_conversion``; merging is for those that change weights; the others act on activations or inputs.
"""

from __future__ import annotations

from typing import NoReturn

from ..errors import MappingError, counted
from .adapter import Json, Value

TUNERS = {
    "ADALORA": "AdaLoRA", "VERA": "VeRA", "LOHA": "LoHa", "LOKR": "LoKr", "MISS": "MiSS", "VBLORA": "VB-LoRA",
    "DELORA": "DeLoRA", "PVERA": "PVeRA", "GRALORA": "GraLoRA", "RANDLORA": "RandLora", "C3A": "C3A", "SHIRA": "SHiRA",
    "FOURIERFT": "FourierFT",
}  # fmt: skip
"""peft_type to name of what ``as = lora`` writes as LoRA."""

MERGE = "merge it into the base in peft with merge_and_unload, and convert the model"
FACTORISE = "make a LoRA of it with peft.convert_to_lora, of a rank that you choose, or " + MERGE
STAY = "it stays in peft: no weight of the model holds it"

MULTIPLIED = {
    "IA3": "IA3 multiplies activations, so its delta is a multiple of the base weight",
    "OFT": "OFT rotates the base weight",
    "BOFT": "BOFT rotates the base weight",
    "HRA": "HRA reflects the base weight",
    "HIRA": "HiRA multiplies the base weight element by element",
    "ROAD": "RoAd rotates and scales activations",
    "GLORA": "GLoRA's delta depends on the base weight",
    "DEFT": "DEFT projects the base weight",
    "PEANUT": "PEANuT computes its update from the base weight",
}
ADDED = {
    "PSOFT": "PSOFT turns a principal subspace of the base weight",
    "TINYLORA": "TinyLoRA adds a combination of directions of the base weight",
    "UNILORA": "Uni-LoRA projects one vector into all factors",
    "WAVEFT": "WaveFT adds a matrix that is sparse in wavelets",
}
REPLACED = {
    "BONE": "Bone's block depends on the base weight or is repeated",
    "LN_TUNING": "LN tuning trains the norms' own weights",
    "TRAINABLE_TOKENS": "it trains rows of an embedding and no factors",
    "BEFT": "BEFT trains biases and no factors",
    "OSF": "OSF trains parts of the base weight's own decomposition",
    "FROD": "FRoD writes the adapted weight itself as a decomposition that layers share",
    "ADAMSS": "AdaMSS adds factors in clusters of a subspace of the base weight",
    "SUPERTUNING": "Super-Tuning trains single entries of the base weight",
}
INPUTS = {
    "MULTITASK_PROMPT_TUNING": "multitask prompt tuning prepends trained inputs",
    "ADAPTION_PROMPT": "LLaMA-Adapter prepends trained inputs to attention",
    "CPT": "CPT prepends trained inputs",
    "CARTRIDGE": "a cartridge is a trained cache of keys and values",
    "XLORA": "X-LoRA mixes several LoRAs by the input",
    "LILY": "Lily routes between several factors by the input",
    "SHADOW": "ShadowPEFT runs a second network beside the model",
    "POLY": "Poly mixes several LoRAs by the task",
}
PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")

COMMON = (
    "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "layers_pattern", "layers_to_transform", "modules_to_save", "peft_version", "revision", "target_modules",
    "task_type", "trainable_token_indices",
)  # fmt: skip
"""Fields that mean the same in a LoRA config."""

_OWN = {
    "ADALORA": frozenset({
        "r", "init_r", "target_r", "lora_alpha", "lora_dropout", "deltaT", "beta1", "beta2", "orth_reg_weight", "tinit",
        "tfinal", "total_step", "rank_pattern", "init_lora_weights", "use_rslora", "megatron_core", "qalora_group_size",
        "runtime_config", "ensure_weight_tying",
    }),
    "VERA": frozenset({"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"}),
    "LOHA": frozenset({
        "r", "alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights", "rank_pattern",
        "alpha_pattern",
    }),
    "LOKR": frozenset({
        "r", "alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights", "rank_pattern",
        "alpha_pattern", "decompose_both", "decompose_factor", "rank_dropout_scale",
    }),
    "MISS": frozenset({"r", "miss_dropout", "mini_r", "init_weights"}),
    "VBLORA": frozenset({
        "r", "num_vectors", "vector_length", "topk", "save_only_topk_weights", "vblora_dropout",
        "init_vector_bank_bound", "init_logits_std",
    }),
    "DELORA": frozenset({"r", "delora_lambda", "module_dropout", "init_weights", "rank_pattern", "lambda_pattern"}),
    "PVERA": frozenset({
        "r", "projection_prng_key", "save_projection", "pvera_dropout", "d_initial", "init_weights",
        "sample_at_inference", "generator_seed",
    }),
    "GRALORA": frozenset({"r", "hybrid_r", "alpha", "gralora_dropout", "gralora_k", "init_weights"}),
    "RANDLORA": frozenset({
        "r", "projection_prng_key", "save_projection", "sparse", "very_sparse", "randlora_dropout", "randlora_alpha",
        "init_weights",
    }),
    "C3A": frozenset({"block_size", "block_size_pattern", "init_weights"}),
    "SHIRA": frozenset({"r", "mask_type", "random_seed", "init_weights"}),
    "FOURIERFT": frozenset({"n_frequency", "scaling", "random_loc_seed", "n_frequency_pattern", "init_weights"}),
}  # fmt: skip
"""Fields that a tuner has of its own, of which some give its scaling and the others are about training."""


def refuse_type(kind: str, where: str) -> NoReturn:
    """Raise for a peft_type that is neither LoRA nor one of ``TUNERS``: what it is, and what to do with it."""
    said = f"adapter_config.json says peft_type {kind!r}, not LORA"
    if kind in PROMPTS:
        raise MappingError(
            f"{said}: it is a prompt method, whose dialect is peft-prompt", where=where, hint="pass --from peft-prompt"
        )
    for reasons, hint in ((MULTIPLIED, MERGE), (ADDED, FACTORISE), (REPLACED, MERGE), (INPUTS, STAY)):
        if kind in reasons:
            raise MappingError(f"{said}: {reasons[kind]}", where=where, hint=hint)
    raise MappingError(said, where=where, hint=FACTORISE)


def lora_config(config: Json, where: str) -> dict[str, Value]:
    """Return the fields of a tuner's config that a LoRA config has, without rank and alpha.

    MappingError: fields that are set and that peft 0.21.2 does not have for the tuner, since they may mean anything.
    """
    kind = str(config.get("peft_type"))
    known = {*COMMON, *_OWN[kind], "peft_type"}
    unknown = [f"{name} = {repr(value)[:60]}" for name, value in config.items() if name not in known and value]
    if unknown:
        raise MappingError(
            f"adapter_config.json sets {counted(len(unknown), 'field')} that {TUNERS[kind]} of peft 0.21.2 has not",
            where=[where, *unknown],
            hint="remove fields that do not matter, or " + FACTORISE,
        )
    kept: dict[str, Value] = {name: config[name] for name in COMMON if name in config}
    if kept.get("bias") == "vera_only":
        kept["bias"] = "lora_only"
    return {"peft_type": "LORA", **kept}
