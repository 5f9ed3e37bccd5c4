"""Write what Megatron saves, in both of its forms, and the truth (megatron-core 0.16.1, torch 2.13, gloo on the CPU).

    python make_megatron.py data/megatron

``dense`` is cut over 2 tensor and 2 pipeline ranks, ``experts`` over 2 tensor and 2 expert ranks. ``torch_dist`` is
written by megatron-core's own dist_checkpointing; ``full.pt`` is what torch's DCP reads from it in one process, layers
stacked as they lie there. The states in ``legacy`` are those of the same models (``state_dict_for_save_checkpoint``);
their container is megatron's training script, which needs a GPU, and was built here as its ``checkpointing.py`` says.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

WORLD = 4


def stand_in_for_a_gpu() -> None:
    """Answer what megatron-core asks of torch.cuda."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.is_available = lambda: False
    torch.cuda.get_rng_state = lambda *args, **named: torch.zeros(1, dtype=torch.uint8)
    torch.cuda.synchronize = lambda *args, **named: None
    torch.cuda.empty_cache = lambda *args, **named: None


def main(rank: int, out: Path, kind: str) -> None:
    """Do one process's part."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29622", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ["WORLD_SIZE"] = str(WORLD)
    stand_in_for_a_gpu()
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as ranks
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    stages, experts = (2, 1) if kind == "dense" else (1, 2)
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": stages,
             "expert_model_parallel_size": experts}  # fmt: skip
    ranks.initialize_model_parallel(**sizes, expert_tensor_parallel_size=2)
    tensor, stage = ranks.get_tensor_model_parallel_rank(), ranks.get_pipeline_model_parallel_rank()
    expert = ranks.get_expert_model_parallel_rank()
    more = {"num_moe_experts": 4, "moe_ffn_hidden_size": 6, "moe_token_dispatcher_type": "allgather",
            "expert_tensor_parallel_size": 2} if experts > 1 else {}  # fmt: skip
    config = TransformerConfig(
        num_layers=4 // experts, hidden_size=8, ffn_hidden_size=12, num_attention_heads=4, num_query_groups=2,
        use_cpu_initialization=True, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, add_qkv_bias=True, normalization="RMSNorm", pipeline_dtype=torch.float32,
        **sizes, **more,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", num_experts=more.get("num_moe_experts"))
    model = GPTModel(
        config, spec, vocab_size=24, max_sequence_length=16, pre_process=stage == 0, post_process=stage == stages - 1,
        share_embeddings_and_output_weights=False, position_embedding_type="rope",
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            own = getattr(parameter, "tensor_model_parallel", False) * tensor + 7 * expert * ("local_experts" in name)
            seed = 1000 * stage + own + sum(map(ord, name))
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    place = (
        f"mp_rank_{tensor:02d}" + (f"_{stage:03d}" if stages > 1 else "") + (f"_{expert:03d}" if experts > 1 else "")
    )
    folder = out / kind / "legacy" / "iter_0000003" / place
    folder.mkdir(parents=True, exist_ok=True)
    args = argparse.Namespace(num_layers=config.num_layers, swiglu=True, **sizes)
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 3, "model": model.state_dict_for_save_checkpoint()}
    torch.save(state, folder / "model_optim_rng.pt")
    folder = out / kind / "torch_dist" / "iter_0000003"
    folder.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save({"model": model.sharded_state_dict(), "iteration": 3}, str(folder))
    dist.barrier()
    if rank == 0:
        for parent in (out / kind / "legacy", out / kind / "torch_dist"):
            (parent / "latest_checkpointed_iteration.txt").write_text("3")
        torch.save(read(folder), out / kind / "full.pt")
    dist.destroy_process_group()


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a DCP directory by torch's own reader."""
    metadata = dcp.FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in metadata.items() if isinstance(about, TensorStorageMetadata)
    }  # fmt: skip
    dcp.load(state, checkpoint_id=str(folder), no_dist=True)
    return state


if __name__ == "__main__":
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    for which in ("dense", "experts"):
        mp.spawn(main, (target, which), WORLD)
