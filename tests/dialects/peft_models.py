"""Small real models and the adapters that real peft makes for them: one case per kind of adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from lorabridge.axes import evaluate
from lorabridge.dialects.adapter import Content, Facts, Json, Written
from lorabridge.dtypes import BY_TORCH
from lorabridge.tensors import TensorSpec

if TYPE_CHECKING:
    from peft import PeftModel

SIZE = 16


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(SIZE, 24), "k": nn.Linear(24, SIZE)}) for _ in "ab")
        self.head = nn.Linear(SIZE, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer["k"](torch.tanh(layer["q"](x))))
        return self.head(x)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, SIZE)
        self.lin = nn.Linear(SIZE, SIZE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.emb(x))


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3)
        self.two = nn.Conv2d(1, 8, (3, 2), bias=False)
        self.three = nn.Conv3d(1, 2, (1, 2, 3))
        self.grouped = nn.Conv1d(6, 8, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)  # [n, 6, l - 2]
        a = self.grouped(x)
        b = self.two(x[:, None])
        c = self.three(x[:, None, None])
        return torch.cat([t.flatten(1) for t in (a, b, c)], dim=1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(SIZE, SIZE)
        self.mha = nn.MultiheadAttention(SIZE, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.lin(x)
        return self.mha(x, x, x)[0]


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=SIZE, n_layer=2, n_head=2))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(
        vocab_size=32, hidden_size=SIZE, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, num_labels=5,
    )  # fmt: skip
    return BertForTokenClassification(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=SIZE, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def tokens() -> torch.Tensor:
    return torch.arange(12).reshape(2, 6)


@dataclass(frozen=True)
class Case:
    """A model, a LoRA configuration and an input."""

    model: Callable[[], nn.Module]
    lora: dict[str, Any]
    example: Callable[[], torch.Tensor] = field(default=lambda: floats(5, SIZE))

    def base(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model().eval()

    def adapted(self) -> PeftModel:
        """Return the base wrapped by peft, every adapter tensor set to small numbers other than its start."""
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(self.base(), LoraConfig(**self.lora))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        return model.eval()

    def output(self, model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            out = model(self.example())
        return out if isinstance(out, torch.Tensor) else out.logits


Q = ["q"]
CASES: dict[str, Case] = {
    "linear": Case(Dense, {"r": 4, "lora_alpha": 8, "target_modules": Q}),
    "linear float alpha": Case(Dense, {"r": 3, "lora_alpha": 7.3, "target_modules": ["q", "k"]}),
    "rslora": Case(Dense, {"r": 3, "lora_alpha": 5, "target_modules": Q, "use_rslora": True}),
    "dora": Case(Dense, {"r": 4, "target_modules": ["q", "head"], "use_dora": True}),
    "lora_bias": Case(Dense, {"r": 4, "target_modules": Q, "lora_bias": True}),
    "bias all": Case(Dense, {"r": 4, "target_modules": Q, "bias": "all"}),
    "bias lora_only": Case(Dense, {"r": 4, "target_modules": Q, "bias": "lora_only"}),
    "bias all and saved": Case(Dense, {"r": 4, "target_modules": Q, "bias": "all", "modules_to_save": ["head"]}),
    "patterns": Case(
        Dense,
        {
            "r": 4, "lora_alpha": 6, "target_modules": ["q", "k"], "rank_pattern": {"layers.0.q": 2, "k": 5},
            "alpha_pattern": {r"^layers\.1\.(q|k)": 3, r".*0\.k": 9},
        },
    ),
    "regex target": Case(Dense, {"r": 4, "target_modules": r"layers\.\d+\.[qk]"}),
    "transformed layers": Case(
        Dense, {"r": 4, "target_modules": Q, "layers_to_transform": [1], "layers_pattern": "layers"}
    ),
    "modules_to_save": Case(Dense, {"r": 4, "target_modules": Q, "modules_to_save": ["head"]}),
    "embedding": Case(Words, {"r": 4, "target_modules": ["emb", "lin"]}, tokens),
    "embedding dora": Case(Words, {"r": 4, "target_modules": ["emb"], "use_dora": True}, tokens),
    "trainable tokens": Case(
        Words, {"r": 4, "target_modules": ["lin"], "trainable_token_indices": {"emb": [1, 3, 5]}}, tokens
    ),
    "conv": Case(Convs, {"r": 3, "target_modules": ["one", "two", "three"]}, lambda: floats(2, 4, 9)),
    "conv dora": Case(
        Convs, {"r": 3, "target_modules": ["one", "two", "three"], "use_dora": True}, lambda: floats(2, 4, 9)
    ),
    "grouped conv": Case(Convs, {"r": 4, "target_modules": ["grouped"]}, lambda: floats(2, 4, 9)),
    "attention": Case(Attention, {"r": 4, "target_modules": ["mha", "lin"]}, lambda: floats(2, 3, SIZE)),
    "attention bias": Case(
        Attention, {"r": 4, "target_modules": ["mha", "lin"], "bias": "all"}, lambda: floats(2, 3, SIZE)
    ),
    "attention pattern": Case(
        Attention,
        {"r": 4, "target_modules": ["mha", "lin"], "rank_pattern": {"mha": 2}, "alpha_pattern": {"mha": 16}},
        lambda: floats(2, 3, SIZE),
    ),
    "gpt2": Case(gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj"], "task_type": "CAUSAL_LM"}, tokens),
    "gpt2 embedding": Case(gpt2, {"r": 4, "target_modules": ["wte", "c_attn"], "task_type": "CAUSAL_LM"}, tokens),
    "bert": Case(bert, {"r": 4, "target_modules": ["query", "value"], "task_type": "TOKEN_CLS"}, tokens),
    "llama embedding": Case(
        llama, {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"], "task_type": "CAUSAL_LM"}, tokens
    ),
    "layer_replication": Case(
        llama,
        {
            "r": 4, "target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 3]], "task_type": "CAUSAL_LM",
        },
        tokens,
    ),
    "pissa": Case(Dense, {"r": 4, "target_modules": Q, "init_lora_weights": "pissa"}),
    "olora": Case(Dense, {"r": 4, "target_modules": Q, "init_lora_weights": "olora"}),
}  # fmt: skip


def content(tensors: Mapping[str, torch.Tensor], config: Json | None = None, facts: Facts = Facts()) -> Content:  # noqa: B008
    """Describe tensors as a container would."""
    specs = {
        name: TensorSpec(name, BY_TORCH[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    return Content(specs, config=config, facts=facts, path="adapter_model.safetensors")


def tensors_of(written: Written, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Evaluate what a dialect wants written; float32 tensors only."""

    def bits(name: str) -> np.ndarray:
        return tensors[name].detach().contiguous().numpy().view(np.uint32)

    return {
        name: torch.from_numpy(
            np.ascontiguousarray(evaluate(expr, bits, {})).view(np.float32).reshape(expr.shape).copy()
        )
        for name, expr in written.tensors
    }


def save_written(written: Written, tensors: Mapping[str, torch.Tensor], directory: Path) -> None:
    """Write the two files that peft reads."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors_of(written, tensors), directory / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(written.config, indent=2, sort_keys=True)
    (directory / "adapter_config.json").write_text(text)


def save(model: PeftModel, directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Save with peft's own save_pretrained; return the tensors and the config as they are on disk."""
    from safetensors.torch import load_file

    model.save_pretrained(str(directory))
    config = json.loads((directory / "adapter_config.json").read_text())
    return load_file(directory / "adapter_model.safetensors"), config


def load(case: Case, directory: Path) -> PeftModel:
    """Load with peft, a fresh base beneath; unexpected or missing keys are errors."""
    import warnings

    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return PeftModel.from_pretrained(case.base(), str(directory)).eval()
