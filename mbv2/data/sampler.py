"""Which picture comes when, on which rank: pure functions of (seed, epoch, rank, world size)."""

import torch


def train_order(n: int, epoch: int, seed: int) -> torch.Tensor:
    """The permutation of 0..n-1 that an epoch goes through, the same on every rank."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batches_per_epoch(n: int, batch_size: int, world_size: int, repeat: int = 1) -> int:
    """Training batches per rank and epoch: the ragged tail of the repeated data is dropped on all ranks alike."""
    return n * repeat // (batch_size * world_size)


def train_batches(
    n: int, batch_size: int, rank: int, world_size: int, epoch: int, seed: int, repeat: int = 1
) -> list[list[int]]:
    """This rank's batches of indices for one epoch; index i is sample i % n, in turn i // n of the repeats.

    Batch i of all ranks together is one slice of the global order, so two ranks with batch B see in step i what
    one rank with batch 2B sees.

    Args:
        n: samples in the whole data set.
        batch_size: per rank.
        rank, world_size: global ones.
        epoch: counted from 0.
        seed: of the run.
        repeat: how many times an epoch goes through the data, each time in another order.
    """
    order = torch.cat([train_order(n, epoch * repeat + turn, seed) + turn * n for turn in range(repeat)])
    steps = batches_per_epoch(n, batch_size, world_size, repeat)
    mine = order[: steps * batch_size * world_size].view(steps, world_size, batch_size)[:, rank]
    return mine.tolist()


def val_batches(n: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """This rank's validation batches; over all ranks every index comes exactly once, with no padding."""
    mine = list(range(rank, n, world_size))
    return [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
