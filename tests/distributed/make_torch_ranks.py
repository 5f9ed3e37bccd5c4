"""Write what four FSDP2 processes save, each by itself and as sharded safetensors (torch 2.13, gloo on the CPU).

    python make_torch_ranks.py data/torch_ranks

For each mesh (``fsdp``: 4; ``hsdp``: 2 copies of 2; ``tp``: FSDP2 over tensor parallelism, 2 x 2) the folder holds
``model_world_size_4_rank_<r>.pt``, named as verl names them, ``hf`` with the files of HuggingFaceStorageWriter, and
``full.pt``, the network before it was cut. Seven and five rows over four ranks leave short and empty parts. ``fsdp1``
holds one rank's ShardedTensors, which are refused.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

WORLD = 4


def net() -> nn.Module:
    """Return the same small network on every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5, bias=False), nn.LayerNorm(5, dtype=torch.bfloat16))


def shard(model: nn.Module, kind: str) -> None:
    """Cut a network over the mesh of one kind."""
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,), mesh_dim_names=("fsdp",)))
    elif kind == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", "fsdp")))
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(model, mesh=mesh["fsdp"])


def main(rank: int, out: Path) -> None:
    """Do one process's part."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29621")
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    for kind in ("fsdp", "hsdp", "tp"):
        model = net()
        folder = out / kind
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            torch.save(model.state_dict(), folder / "full.pt")
        shard(model, kind)
        state = model.state_dict()
        torch.save(state, folder / f"model_world_size_{WORLD}_rank_{rank}.pt")
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder / "hf"), save_distributed=True))
        dist.barrier()
    model = FullyShardedDataParallel(nn.Linear(8, 8), device_id=torch.device("cpu"))
    config = ShardedStateDictConfig(offload_to_cpu=False)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, config):
        state = model.state_dict()
    if rank == 0:
        (out / "fsdp1").mkdir(exist_ok=True)
        torch.save(state, out / "fsdp1" / "model_world_size_4_rank_0.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    mp.spawn(main, (target,), WORLD)
