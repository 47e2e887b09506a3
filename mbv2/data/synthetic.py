"""Random pictures already on the device: what training costs when loading costs nothing."""

from collections.abc import Iterator

import torch

from mbv2.data.batch import Batch
from mbv2.data.recipe import Recipe
from mbv2.distributed import World

_DISTINCT = 4


class SyntheticLoader:
    """`length` random pictures per epoch over all ranks, out of a few distinct batches made once from the seed."""

    def __init__(
        self,
        recipe: Recipe,
        batch_size: int,
        world: World,
        num_classes: int,
        length: int = 1280,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.num_samples = length
        self.skipped = 0
        self._steps = max(1, length // (batch_size * world.world_size))
        self._start = 0
        generator = torch.Generator().manual_seed(seed * 1_000_003 + world.rank)
        shape = (batch_size, 3, recipe.resolution, recipe.resolution)
        self._batches = []
        for _ in range(min(_DISTINCT, self._steps)):
            images = torch.randn(shape, generator=generator).to(world.device, dtype)
            labels = torch.randint(num_classes, (batch_size,), generator=generator).to(world.device)
            names = [f"synthetic {index}" for index in range(batch_size)]
            self._batches.append(Batch(images.contiguous(memory_format=torch.channels_last), labels, names))

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Start at `start_batch`; every epoch is the same."""
        self._start = start_batch

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self._start, self._steps):
            yield self._batches[step % len(self._batches)]

    def close(self) -> None:
        """Let go of the batches."""
        self._batches = []
