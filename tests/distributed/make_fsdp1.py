"""Write what four FSDP1 processes save of a model and its optimizer by ``dcp.save`` (torch 2.13, gloo on the CPU).

    python make_fsdp1.py data/dcp_fsdp1_train

``full.pt`` holds the gathered model. FSDP1 cuts flat parameters, whose sharded state has uneven rows.
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
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
)

WORLD = 4


def main(rank: int, out: Path) -> None:
    """Do one process's part."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29622")
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.LayerNorm(5))
    model = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.randn(3, 8)).pow(2).mean().backward()
    optimizer.step()
    configs = ShardedStateDictConfig(offload_to_cpu=False), ShardedOptimStateDictConfig(offload_to_cpu=False)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, *configs):
        state = {"model": model.state_dict(), "optim": FullyShardedDataParallel.optim_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=str(out))
    config = FullStateDictConfig(rank0_only=True)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, config):
        full = model.state_dict()
    if rank == 0:
        torch.save(full, out / "full.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    target = Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    mp.spawn(main, (target,), WORLD)
