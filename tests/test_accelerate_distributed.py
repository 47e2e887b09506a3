"""Accelerated models under DistributedDataParallel and FSDP2, two processes over gloo."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from drop_in_check import fused_calls, operators, scrambled
from test_kernels import free_port
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mbv2
from mbv2.errors import UserError

WRAPPERS = ("ddp", "swap, then shard", "shard, then swap")
STEPS = 5  # stem, three blocks, head


def network() -> nn.Module:
    setting = [[1, 16, 1, 1], [6, 24, 2, 2]]
    model = torchvision.models.mobilenet_v2(
        width_mult=0.35, num_classes=3, dropout=0.0, inverted_residual_setting=setting
    )
    return scrambled(model.double()).train()


def shard(model: nn.Module) -> nn.Module:
    """Every block on its own, and the rest: as FSDP2 is used."""
    for block in model.features[1:-1]:
        fully_shard(block)
    return fully_shard(model)


def wrapped(wrapper: str) -> tuple[nn.Module, nn.Module]:
    """An accelerated network and its original, both wrapped for two processes."""
    ours, theirs = network(), network()
    if wrapper == "shard, then swap":
        ours, theirs = shard(ours), shard(theirs)
    mbv2.accelerate(ours)
    if wrapper == "swap, then shard":
        ours, theirs = shard(ours), shard(theirs)
        # The class that fully_shard made stands on the accelerated one.
        with pytest.raises(UserError, match="FSDPAccelerated.*restore the model before"):
            mbv2.restore(ours)
    if wrapper == "ddp":
        return DistributedDataParallel(ours), DistributedDataParallel(theirs)
    return ours, theirs


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for wrapper in WRAPPERS:
        states = []
        for model, fused in zip(wrapped(wrapper), (STEPS, 0), strict=True):
            before = fused_calls()
            torch.manual_seed(rank)
            with operators("operators"):
                train(model)
            assert fused_calls() - before == 3 * fused
            state = model.state_dict()
            states.append({n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()})
        if rank == 0:
            torch.save(states, Path(folder) / f"{wrapper}.pt")
    dist.destroy_process_group()


def train(model: nn.Module) -> None:
    """Three steps of SGD on this rank's own pictures."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32).double()).square().mean().backward()
        optimizer.step()


def test_three_steps_in_two_processes_equal_the_originals(tmp_path: Path) -> None:
    mp.spawn(worker, (free_port(), str(tmp_path)), nprocs=2)
    start = network().state_dict()["features.2.conv.2.weight"]
    for wrapper in WRAPPERS:
        ours, theirs = torch.load(tmp_path / f"{wrapper}.pt")
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
        moved = next(tensor for name, tensor in ours.items() if name.endswith("features.2.conv.2.weight"))
        assert not torch.equal(moved, start)
