"""Write data/deepspeed_parallel: DeepSpeed under tensor parallelism and pipelines, by four gloo processes on a CPU.

torchrun --nproc_per_node 4 make_deepspeed.py autotp 2 OUT/autotp_zero2     (and: autotp 3 OUT/autotp_zero3)
torchrun --nproc_per_node 4 make_deepspeed.py fused 1 OUT/fused_zero1
torchrun --nproc_per_node 4 make_deepspeed.py pipeline 1 OUT/pipeline_zero1  (and: pipeline 0 OUT/pipeline)
python -m deepspeed.checkpoint.ds_to_universal --input_folder OUT/X/global_step2 --output_folder UNIVERSAL \
    --num_extract_workers 1 --num_merge_workers 1 --inject_missing_state
python make_deepspeed.py full UNIVERSAL OUT/X/full.pt

Versions: deepspeed 0.19.8, torch 2.13.0, transformers 5.23. ``full.pt`` is what ds_to_universal makes of the run; it
refuses autotp_zero2 for its frozen parameters, whose ``full.pt`` holds the trained ones (``--no_strict``), and of the
frozen ones what the model was made with. The loss is of no meaning.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_allow_untested_optimizer": True,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}
FUSED = [
    {"patterns": [r".*\.qkv_proj\.weight$"], "partition_type": "column", "shape": [[16, 8, 8], -1], "partition_dim": 0},
    {"patterns": [r".*\.gate_up_proj\.weight$"], "partition_type": "column", "shape": [2, -1], "partition_dim": 0},
    {"patterns": [r".*\.(o_proj|down_proj)\.weight$"], "partition_type": "row"},
]
SAID = {
    "universal_checkpoint_version": 0.2,
    "original_vocab_size": 20,
    "tp_replicated_parameter_patterns": [
        r"tied_modules.embed.position_embeddings.weight", r"\d+.input_layernorm.weight", r"\d+.input_layernorm.bias",
        r"\d+.dense_4h_to_h.bias", r"\d+.norm.weight", r"\d+.norm.bias",
    ],
    "parameter_with_row_parallelism_patterns": [r"\d+.dense_4h_to_h.weight"],
}  # fmt: skip


class FusedBlock(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(16)
        self.qkv_proj, self.o_proj = torch.nn.Linear(16, 32), torch.nn.Linear(16, 16)
        self.gate_up_proj, self.down_proj = torch.nn.Linear(16, 48, bias=False), torch.nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.qkv_proj(self.norm(x))
        n = y.shape[-1] // 2
        q, k, v = y.split([n, n // 2, n // 2], -1)
        x = x + self.o_proj(torch.tanh(q) * torch.cat([k, v], -1))
        gate, up = self.gate_up_proj(self.norm(x)).chunk(2, -1)
        return x + self.down_proj(torch.nn.functional.silu(gate) * up)


class Fused(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([FusedBlock(), FusedBlock()])
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    return LlamaForCausalLM(LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, max_position_embeddings=32, tie_word_embeddings=False,
    ))  # fmt: skip


def autotp(stage: int, out: str) -> None:
    model = llama()
    if stage == 2:
        model.model.layers[0].requires_grad_(False)
        model.model.embed_tokens.requires_grad_(False)
    config = {**CONFIG, "zero_optimization": {"stage": stage}, "tensor_parallel": {"autotp_size": 2}}
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    for step in range(2):
        torch.manual_seed(100 + step)
        ids = torch.randint(0, 40, (1, 8))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(out, tag="global_step2")


def fused(stage: int, out: str) -> None:
    torch.manual_seed(7)
    model = Fused().to(torch.bfloat16)
    parallel = {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": FUSED}}
    config = {**CONFIG, "zero_optimization": {"stage": stage}, "tensor_parallel": parallel}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    for step in range(2):
        torch.manual_seed(50 + step)
        engine.backward(engine(torch.randn(1, 5, 16, dtype=torch.bfloat16)).float().pow(2).mean())
        engine.step()
    engine.save_checkpoint(out, tag="global_step2")


GROUP: list[object] = []


class Enter(torch.autograd.Function):
    """What tensor ranks share on their way in: gradients are summed."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x

    @staticmethod
    def backward(ctx: object, g: torch.Tensor) -> torch.Tensor:
        g = g.contiguous().clone()
        dist.all_reduce(g, group=GROUP[0])
        return g


class Leave(torch.autograd.Function):
    """Sums over tensor ranks."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=GROUP[0])
        return x

    @staticmethod
    def backward(ctx: object, g: torch.Tensor) -> torch.Tensor:
        return g


class Embedding(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.position_embeddings = torch.nn.Embedding(20, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.position_embeddings(x)


class Block(torch.nn.Module):
    def __init__(self, seed: int, rank: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        up, down, bias, held = torch.randn(12, 8), torch.randn(8, 12), torch.randn(12), slice(rank * 6, rank * 6 + 6)
        self.input_layernorm = torch.nn.LayerNorm(8)
        self.dense_h_to_4h, self.dense_4h_to_h = torch.nn.Linear(8, 6), torch.nn.Linear(6, 8)
        with torch.no_grad():
            self.dense_h_to_4h.weight.copy_(up[held])
            self.dense_h_to_4h.bias.copy_(bias[held])
            self.dense_4h_to_h.weight.copy_(down[:, held])
        self.register_buffer("inv_freq", torch.full((3,), float(seed)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.dense_h_to_4h(Enter.apply(self.input_layernorm(x))))
        return x + Leave.apply(torch.nn.functional.linear(h, self.dense_4h_to_h.weight)) + self.dense_4h_to_h.bias


class Last(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def pipeline(stage: int, out: str) -> None:
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    deepspeed.init_distributed("gloo")
    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=2, num_dp=1)
    rank = topology.get_coord(dist.get_rank()).model
    tied = {"tied_weight_attr": ["position_embeddings.weight"]}
    layers = [
        TiedLayerSpec("embed", Embedding, **tied), *(LayerSpec(Block, seed, rank) for seed in (1, 2, 3)),
        LayerSpec(Last),
        TiedLayerSpec("embed", Embedding, **tied, forward_fn=lambda m, x: x @ m.position_embeddings.weight.T),
    ]  # fmt: skip

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(x.flatten(0, 1).float(), y.flatten())

    net = PipelineModule(layers, loss_fn=loss, topology=topology, partition_method="uniform")
    GROUP.append(net._grid.slice_proc_group)
    config = {**CONFIG, "zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 2}
    if stage:
        net.universal_checkpoint_info = SAID
    else:
        config["bf16"] = {"enabled": False}
    engine, *_ = deepspeed.initialize(model=net, model_parameters=list(net.parameters()), config=config)
    generator = torch.Generator().manual_seed(5)
    batches = ((ids, ids) for ids in iter(lambda: torch.randint(0, 20, (1, 6), generator=generator), None))
    for _ in range(2):
        engine.train_batch(batches)
    engine.save_checkpoint(out, tag="global_step2")


def full(universal: str, out: str) -> None:
    held = {
        p.parent.name: torch.load(p, weights_only=False)["param"] for p in Path(universal, "zero").glob("*/fp32.pt")
    }
    frozen = Path(out).parent.name == "autotp_zero2"
    for name, value in llama().to(torch.bfloat16).state_dict().items() if frozen else ():
        if name.startswith(("model.layers.0.", "model.embed_tokens.")):
            held[name] = value
    torch.save(held, out)


if __name__ == "__main__":
    if sys.argv[1] == "full":
        full(*sys.argv[2:])
    else:
        {"autotp": autotp, "fused": fused, "pipeline": pipeline}[sys.argv[1]](int(sys.argv[2]), sys.argv[3])
